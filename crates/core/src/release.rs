//! Releases: "this channel is now at that manifest", signed by a publisher.

use crate::checked::Checked;
use crate::codec::{self, CodecError, Kind};
use crate::hash::ManifestHash;
use crate::id::{ChannelName, IdError, PublisherKey, PublisherSecret, SIGNATURE_BYTES};
use crate::limits::{MANIFEST_BYTES_MAX, RECORD_BYTES_MAX, RELEASE_NOTE_BYTES_MAX};
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
    /// True if this release names an older manifest on purpose.
    pub rollback: bool,
    /// The publisher's clock, milliseconds since 1970. For people; nothing is decided by it.
    pub created_unix_ms: u64,
    pub note: String,
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
}

impl SignedRelease {
    pub fn sign(release: &Release, secret: &PublisherSecret) -> Self {
        let body = codec::encode(Kind::Release, release);
        let signature = secret.sign(CONTEXT, &body);
        SignedRelease { publisher: secret.public(), body, signature, checked: Checked::default() }
    }

    /// The release, if the signature is the publisher's. Whether the publisher is *trusted* for
    /// the channel is the node's own business.
    pub fn open(&self) -> Result<Release, ReleaseError> {
        self.checked.once(|| self.publisher.verify(CONTEXT, &self.body, &self.signature))?;
        let release: Release = codec::decode::<_, RECORD_BYTES_MAX>(Kind::Release, &self.body)?;
        if release.manifest_bytes > MANIFEST_BYTES_MAX as u64 {
            return Err(ReleaseError::ManifestBytes(release.manifest_bytes));
        }
        if release.note.len() > RELEASE_NOTE_BYTES_MAX {
            return Err(ReleaseError::Note(release.note.len()));
        }
        Ok(release)
    }

    pub fn encode(&self) -> Vec<u8> {
        codec::encode(Kind::SignedRelease, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReleaseError> {
        Ok(codec::decode::<_, { RECORD_BYTES_MAX * 2 }>(Kind::SignedRelease, bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release() -> Release {
        Release {
            channel: "a/b".parse().unwrap(),
            seq: 4,
            manifest: ManifestHash::of(b"m"),
            manifest_bytes: 1,
            rollback: false,
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
}
