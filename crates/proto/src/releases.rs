//! Which release of each channel this node believes in.

use crate::limits::REJECTION_PEERS_MAX;
use aquifer_core::{ChannelName, ManifestHash, NodeId, PublisherKey, Release, SignedRelease};
use bincode::Encode;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Default)]
pub(crate) struct Releases {
    channels: BTreeMap<ChannelName, Channel>,
    counts: RejectionCounts,
    /// What has been told already: once per peer and kind.
    told: BTreeSet<(NodeId, Rejection)>,
}

#[derive(Debug, Default)]
struct Channel {
    trusted: BTreeSet<PublisherKey>,
    newest: Option<(SignedRelease, Release)>,
}

/// Why a release changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode)]
pub enum Rejection {
    /// Its signature is not its publisher's, or it does not decode.
    Forged,
    /// Signed by a key this node does not trust for the channel.
    Untrusted,
    /// Not newer than what was accepted before.
    Older,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RejectionCounts {
    pub forged: u64,
    pub untrusted: u64,
    pub older: u64,
}

/// What came of a release.
#[derive(Debug)]
pub(crate) enum Heard {
    Accepted(Box<Release>),
    /// The one we have.
    Known,
    /// Of a channel this node does not follow: none of its business, but signed correctly.
    Elsewhere,
    Rejected {
        rejection: Rejection,
        detail: String,
        first: bool,
    },
}

impl Releases {
    pub(crate) fn follow(&mut self, channel: ChannelName, trusted: impl IntoIterator<Item = PublisherKey>) {
        self.channels.entry(channel).or_default().trusted.extend(trusted);
    }

    pub(crate) fn counts(&self) -> RejectionCounts {
        self.counts
    }

    pub(crate) fn newest(&self, channel: &ChannelName) -> Option<&Release> {
        self.channels.get(channel)?.newest.as_ref().map(|(_, release)| release)
    }

    /// Every followed channel, and its newest release if one was heard of.
    pub(crate) fn followed(&self) -> impl Iterator<Item = (&ChannelName, Option<&Release>)> {
        self.channels.iter().map(|(name, c)| (name, c.newest.as_ref().map(|(_, release)| release)))
    }

    /// Channels whose newest release is this manifest.
    pub(crate) fn channels_at<'a>(&'a self, manifest: &'a ManifestHash) -> impl Iterator<Item = &'a ChannelName> {
        self.all_newest().filter(move |(_, r)| r.manifest == *manifest).map(|(_, r)| &r.channel)
    }

    pub(crate) fn all_newest(&self) -> impl Iterator<Item = &(SignedRelease, Release)> {
        self.channels.values().filter_map(|c| c.newest.as_ref())
    }

    /// Judges a release brought by `via`. Of two with one sequence number, which only an
    /// unsettled pair of publishers makes, the greater manifest hash wins, so that all nodes
    /// settle alike whichever they hear first.
    pub(crate) fn on_release(&mut self, via: NodeId, signed: &SignedRelease) -> Heard {
        let release = match signed.open() {
            Ok(release) => release,
            Err(error) => return self.reject(via, Rejection::Forged, error.to_string()),
        };
        let Some(channel) = self.channels.get_mut(&release.channel) else {
            return Heard::Elsewhere;
        };
        if !channel.trusted.contains(&signed.publisher) {
            let detail = format!("{} is not trusted for {}", signed.publisher, release.channel);
            return self.reject(via, Rejection::Untrusted, detail);
        }
        let order = |r: &Release| -> (u64, ManifestHash) { (r.seq, r.manifest) };
        if let Some((_, newest)) = &channel.newest {
            if order(newest) == order(&release) {
                return Heard::Known;
            }
            if order(newest) > order(&release) {
                let detail = format!("{} is at {}, this is {}", release.channel, newest.seq, release.seq);
                return self.reject(via, Rejection::Older, detail);
            }
        }
        channel.newest = Some((signed.clone(), release.clone()));
        Heard::Accepted(Box::new(release))
    }

    fn reject(&mut self, via: NodeId, rejection: Rejection, detail: String) -> Heard {
        let count = match rejection {
            Rejection::Forged => &mut self.counts.forged,
            Rejection::Untrusted => &mut self.counts.untrusted,
            Rejection::Older => &mut self.counts.older,
        };
        *count = count.saturating_add(1);
        let first = self.told.len() < REJECTION_PEERS_MAX && self.told.insert((via, rejection));
        Heard::Rejected { rejection, detail, first }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_core::{Policy, PublisherSecret};

    fn release(seq: u64, manifest: &[u8]) -> Release {
        Release {
            channel: "c".parse().unwrap(),
            seq,
            manifest: ManifestHash::of(manifest),
            manifest_bytes: 1,
            rolls_back_to: None,
            policy: Policy::default(),
            created_unix_ms: 0,
            note: String::new(),
        }
    }

    fn followed(secret: &PublisherSecret) -> Releases {
        let mut releases = Releases::default();
        releases.follow("c".parse().unwrap(), [secret.public()]);
        releases
    }

    const VIA: NodeId = NodeId([1; 32]);

    #[test]
    fn only_newer_trusted_releases_change_anything() {
        let (secret, stranger) = (PublisherSecret::from_seed([1; 32]), PublisherSecret::from_seed([2; 32]));
        let mut releases = followed(&secret);
        let mut hear =
            |seq, by: &PublisherSecret| releases.on_release(VIA, &SignedRelease::sign(&release(seq, b"m"), by));
        assert!(matches!(hear(3, &stranger), Heard::Rejected { rejection: Rejection::Untrusted, first: true, .. }));
        assert!(matches!(hear(9, &stranger), Heard::Rejected { rejection: Rejection::Untrusted, first: false, .. }));
        assert!(matches!(hear(3, &secret), Heard::Accepted(_)));
        assert!(matches!(hear(3, &secret), Heard::Known));
        assert!(matches!(hear(2, &secret), Heard::Rejected { rejection: Rejection::Older, first: true, .. }));
        assert!(matches!(hear(4, &secret), Heard::Accepted(_)));
        assert_eq!(releases.counts(), RejectionCounts { forged: 0, untrusted: 2, older: 1 });
        assert_eq!(releases.newest(&"c".parse().unwrap()).unwrap().seq, 4);
    }

    #[test]
    fn two_releases_with_one_number_settle_alike_in_any_order() {
        let secret = PublisherSecret::from_seed([1; 32]);
        let pair = [b"a", b"b"].map(|m| SignedRelease::sign(&release(1, m), &secret));
        let settled = |order: [usize; 2]| {
            let mut releases = followed(&secret);
            order.iter().for_each(|&i| drop(releases.on_release(VIA, &pair[i])));
            releases.newest(&"c".parse().unwrap()).unwrap().manifest
        };
        assert_eq!(settled([0, 1]), settled([1, 0]));
    }
}
