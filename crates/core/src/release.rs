//! Releases: "this channel is now at that manifest", signed by a publisher.

use crate::checked::Checked;
use crate::codec::{self, CodecError, Kind};
use crate::hash::ManifestHash;
use crate::id::{ChannelName, IdError, PublisherKey, PublisherSecret, SIGNATURE_BYTES};
use crate::limits::{MANIFEST_BYTES_MAX, RELEASE_BYTES_MAX, RELEASE_NOTE_BYTES_MAX};
use crate::policy::{Policy, PolicyError};
use bincode::{Decode, Encode};
use thiserror::Error;

const CONTEXT: &str = "aquifer release v1";

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Release {
    pub channel: ChannelName,
    /// Grows by at least one with each release of the channel.
    pub seq: u64,
    pub manifest: ManifestHash,
    /// Length of the manifest's canonical bytes, so that a puller knows what to expect.
    pub manifest_bytes: u64,
    /// The number of the release whose manifest this one names again, if it is a rollback.
    pub rolls_back_to: Option<u64>,
    /// Who takes it, and in which order they switch.
    pub policy: Policy,
    /// The publisher's clock, milliseconds since 1970. For people; nothing is decided by it.
    pub created_unix_ms: u64,
    pub note: String,
}

/// Which release of a channel. Of two publishers that give out one number, the greater manifest
/// hash is the later release, so that all nodes settle alike whichever they hear first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub struct ReleaseId {
    pub seq: u64,
    pub manifest: ManifestHash,
}

impl Release {
    /// What is signed, for whoever is to sign it elsewhere.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(Kind::Release, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReleaseError> {
        let release: Release = codec::decode::<_, RELEASE_BYTES_MAX>(Kind::Release, bytes)?;
        release.check()?;
        Ok(release)
    }

    /// What decoding cannot see.
    fn check(&self) -> Result<(), ReleaseError> {
        if self.manifest_bytes > MANIFEST_BYTES_MAX as u64 {
            return Err(ReleaseError::ManifestBytes(self.manifest_bytes));
        }
        if self.note.len() > RELEASE_NOTE_BYTES_MAX {
            return Err(ReleaseError::Note(self.note.len()));
        }
        if let Some(to) = self.rolls_back_to.filter(|to| *to >= self.seq) {
            return Err(ReleaseError::RollsForward { seq: self.seq, to });
        }
        self.policy.check()?;
        Ok(())
    }

    pub fn id(&self) -> ReleaseId {
        ReleaseId { seq: self.seq, manifest: self.manifest }
    }
}

/// A release as it travels: its exact bytes, who signed them, and the signature.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SignedRelease {
    pub publisher: PublisherKey,
    body: Vec<u8>,
    signature: [u8; SIGNATURE_BYTES],
    checked: Checked,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ReleaseError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("release: {0}")]
    Signature(#[from] IdError),
    #[error("release: a manifest of {0} bytes, allowed are {MANIFEST_BYTES_MAX}")]
    ManifestBytes(u64),
    #[error("release: a note of {0} bytes, allowed are {RELEASE_NOTE_BYTES_MAX}")]
    Note(usize),
    #[error("release {seq} goes back to release {to}: it must be an earlier one")]
    RollsForward { seq: u64, to: u64 },
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

impl SignedRelease {
    pub fn sign(release: &Release, secret: &PublisherSecret) -> Self {
        let body = release.encode();
        let signature = secret.sign(CONTEXT, &body);
        SignedRelease { publisher: secret.public(), body, signature, checked: Checked::default() }
    }

    /// The release, if the signature is the publisher's. Whether the publisher is *trusted* for
    /// the channel is the node's own business.
    pub fn open(&self) -> Result<Release, ReleaseError> {
        self.checked.once(|| self.publisher.verify(CONTEXT, &self.body, &self.signature))?;
        Release::decode(&self.body)
    }

    pub fn encode(&self) -> Vec<u8> {
        codec::encode(Kind::SignedRelease, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReleaseError> {
        Ok(codec::decode::<_, { RELEASE_BYTES_MAX * 2 }>(Kind::SignedRelease, bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::NodeId;
    use crate::limits::{CHANNEL_BYTES_MAX, ROSTER_MAX, SELECTOR_LABELS_MAX, STATUS_LABEL_BYTES_MAX};
    use crate::policy::tests::policy;
    use crate::policy::{Entry, How, Selector, Unavailable};
    use proptest::prelude::*;

    fn release() -> Release {
        Release {
            channel: "a/b".parse().unwrap(),
            seq: 4,
            manifest: ManifestHash::of(b"m"),
            manifest_bytes: 1,
            rolls_back_to: None,
            policy: Policy::default(),
            created_unix_ms: 0,
            note: String::new(),
        }
    }

    #[test]
    fn opens_with_its_own_signature_only() {
        let secret = PublisherSecret::from_seed([1; 32]);
        let signed = SignedRelease::sign(&release(), &secret);
        assert_eq!(signed.open(), Ok(release()));
        let again = SignedRelease::decode(&signed.encode()).unwrap();
        assert_eq!(again, signed);

        let copy = || SignedRelease::decode(&signed.encode()).unwrap();
        let mut forged = copy();
        forged.publisher = PublisherSecret::from_seed([2; 32]).public();
        assert!(matches!(forged.open(), Err(ReleaseError::Signature(_))));
        let mut changed = copy();
        *changed.body.last_mut().unwrap() ^= 1;
        assert!(matches!(changed.open(), Err(ReleaseError::Signature(_))));
    }

    #[test]
    fn hostile_sizes_are_refused_even_when_signed() {
        let secret = PublisherSecret::from_seed([1; 32]);
        let huge = Release { manifest_bytes: u64::MAX, ..release() };
        assert_eq!(SignedRelease::sign(&huge, &secret).open(), Err(ReleaseError::ManifestBytes(u64::MAX)));
    }

    #[test]
    fn a_release_goes_back_to_an_earlier_one() {
        let secret = PublisherSecret::from_seed([1; 32]);
        let to = |seq| SignedRelease::sign(&Release { rolls_back_to: Some(seq), ..release() }, &secret).open();
        assert_eq!(to(3).map(|r| r.rolls_back_to), Ok(Some(3)));
        assert_eq!(to(4), Err(ReleaseError::RollsForward { seq: 4, to: 4 }));
    }

    #[test]
    fn the_longest_release_that_there_may_be_can_be_read() {
        let secret = PublisherSecret::from_seed([1; 32]);
        let label =
            |i: usize| (format!("{i:0>0$}", STATUS_LABEL_BYTES_MAX / 2), "v".repeat(STATUS_LABEL_BYTES_MAX / 2));
        let selector = Selector::new((0..SELECTOR_LABELS_MAX).map(label).collect()).unwrap();
        let entry = |i: usize| {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&(i as u64).to_be_bytes());
            Entry { node: NodeId(id), canary: true, group: u32::MAX }
        };
        let by = Some("k".repeat(STATUS_LABEL_BYTES_MAX));
        let longest = Release {
            channel: "c".repeat(CHANNEL_BYTES_MAX).parse().unwrap(),
            note: "n".repeat(RELEASE_NOTE_BYTES_MAX),
            policy: Policy {
                subset: selector.clone(),
                pinned: true,
                how: How::Rolling { canary: Some(selector), max_unavailable: Unavailable::Count(1), by },
                roster: (0..ROSTER_MAX).map(entry).collect(),
            },
            ..release()
        };
        let signed = SignedRelease::decode(&SignedRelease::sign(&longest, &secret).encode()).unwrap();
        assert_eq!(signed.open(), Ok(longest));
    }

    proptest! {
        #[test]
        fn a_policy_arrives_as_it_was_signed(policy in policy(), seed: [u8; 32]) {
            let release = Release { policy, ..release() };
            let signed = SignedRelease::sign(&release, &PublisherSecret::from_seed(seed));
            prop_assert_eq!(SignedRelease::decode(&signed.encode()).unwrap().open(), Ok(release));
        }

        #[test]
        fn nothing_of_it_can_be_changed(policy in policy(), at: prop::sample::Index, bit in 0..8u8) {
            let release = Release { policy, ..release() };
            let mut bytes = SignedRelease::sign(&release, &PublisherSecret::from_seed([1; 32])).encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(SignedRelease::decode(&bytes).and_then(|s| s.open()).is_err());
        }

        /// Signed nonsense: what a publisher's program may do wrong must not end a node.
        #[test]
        fn any_signed_bytes_are_a_release_or_an_error(policy in policy(), cut: prop::sample::Index, noise: Vec<u8>) {
            let secret = PublisherSecret::from_seed([1; 32]);
            let whole = codec::encode(Kind::Release, &Release { policy, ..release() });
            let body = [&whole[..cut.index(whole.len())], &noise].concat();
            let signature = secret.sign(CONTEXT, &body);
            let signed = SignedRelease { publisher: secret.public(), body, signature, checked: Checked::default() };
            prop_assert!(signed.open().map_or(true, |release| release.policy.check().is_ok()));
        }
    }
}
