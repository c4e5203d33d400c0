//! Which release of each channel this node believes in.

use crate::limits::{REJECTION_PEERS_MAX, RELEASES_KEPT};
use aquifer_core::{
    ChannelName, ManifestHash, NodeId, PublisherKey, Release, ReleaseId, SignedRelease, SignedStatement, Statement,
};
use bincode::Encode;
use std::collections::{BTreeMap, BTreeSet};

/// Statements of a channel that are remembered. Guess: one of each release, and some that came before theirs.
const STATEMENTS_KEPT: usize = 2 * RELEASES_KEPT;

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
    /// The last ones, oldest first. A newcomer needs those before the newest as well: rollouts go from one to the next.
    known: BTreeMap<ReleaseId, (SignedRelease, Release)>,
    statements: BTreeMap<ReleaseId, (SignedStatement, Statement)>,
}

impl Channel {
    fn newest(&self) -> Option<&(SignedRelease, Release)> {
        self.known.last_key_value().map(|(_, pair)| pair)
    }

    /// The oldest goes first, but for the newest of each selector: its nodes may serve it for long. What is
    /// `used` here stays.
    fn make_room(&mut self, used: &[ReleaseId]) {
        while self.known.len() > RELEASES_KEPT {
            let is_followed = |id: &ReleaseId, r: &Release| {
                self.known.iter().any(|(later, (_, l))| later > id && l.policy.subset == r.policy.subset)
            };
            let mut unused = self.known.iter().filter(|(id, _)| !used.contains(id));
            let oldest = unused.clone().find(|(id, (_, r))| is_followed(id, r)).or_else(|| unused.next());
            match oldest.map(|(id, _)| *id) {
                Some(id) => drop(self.known.remove(&id)),
                None => return,
            }
        }
    }
}

/// Why a release changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode)]
pub enum Rejection {
    /// Its signature is not its publisher's, or it does not decode.
    Forged,
    /// Signed by a key this node does not trust for the channel.
    Untrusted,
    /// Not newer than what was accepted before, and none of those that led there.
    Older,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RejectionCounts {
    pub forged: u64,
    pub untrusted: u64,
    pub older: u64,
}

/// What came of a release, or of a statement about one.
#[derive(Debug)]
pub(crate) enum Heard<T> {
    Accepted(Box<T>),
    /// One we have, or one that does not count beside it.
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
        self.channels.get(channel)?.newest().map(|(_, release)| release)
    }

    /// Every followed channel, and its newest release if one was heard of.
    pub(crate) fn followed(&self) -> impl Iterator<Item = (&ChannelName, Option<&Release>)> {
        self.channels.iter().map(|(name, c)| (name, c.newest().map(|(_, release)| release)))
    }

    /// The newest release of each channel that names this manifest.
    pub(crate) fn of_manifest<'a>(&'a self, manifest: &'a ManifestHash) -> impl Iterator<Item = &'a Release> {
        let newest = |c: &'a Channel| c.known.values().rev().map(|(_, r)| r).find(|r| r.manifest == *manifest);
        self.channels.values().filter_map(newest)
    }

    /// What is known of all channels, to be told to others: releases oldest first.
    pub(crate) fn all(&self) -> (Vec<SignedRelease>, Vec<SignedStatement>) {
        let releases = self.channels.values().flat_map(|c| c.known.values().map(|(signed, _)| signed.clone()));
        let statements = self.channels.values().flat_map(|c| c.statements.values().map(|(signed, _)| signed.clone()));
        (releases.collect(), statements.collect())
    }

    /// What is known of one channel, oldest first.
    pub(crate) fn of_channel(&self, channel: &ChannelName) -> impl Iterator<Item = &(SignedRelease, Release)> {
        self.channels.get(channel).into_iter().flat_map(|c| c.known.values())
    }

    pub(crate) fn statements(&self, channel: &ChannelName) -> impl Iterator<Item = &(SignedStatement, Statement)> {
        self.channels.get(channel).into_iter().flat_map(|c| c.statements.values())
    }

    /// What was said of a release.
    pub(crate) fn statement(&self, channel: &ChannelName, release: &ReleaseId) -> Option<&Statement> {
        self.channels.get(channel)?.statements.get(release).map(|(_, statement)| statement)
    }

    /// Judges a release brought by `via`. Of two with one sequence number, which only an
    /// unsettled pair of publishers makes, the greater manifest hash wins, so that all nodes
    /// settle alike whichever they hear first.
    pub(crate) fn on_release(
        &mut self,
        via: NodeId,
        signed: &SignedRelease,
        used: impl Fn(&ChannelName) -> Vec<ReleaseId>,
    ) -> Heard<Release> {
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
        let id = release.id();
        if channel.known.contains_key(&id) {
            return Heard::Known;
        }
        if let Some((newest, _)) = channel.known.last_key_value().filter(|(newest, _)| **newest > id) {
            // One that led to the newest has a number of its own, and there is room for it.
            let taken = channel.known.keys().any(|known| known.seq == id.seq);
            let room = channel.known.len() < RELEASES_KEPT;
            if taken || !room {
                let detail = format!("{} is at {}, this is {}", release.channel, newest.seq, release.seq);
                return self.reject(via, Rejection::Older, detail);
            }
        }
        channel.known.insert(id, (signed.clone(), release.clone()));
        channel.make_room(&used(&release.channel));
        Heard::Accepted(Box::new(release))
    }

    /// Judges a statement brought by `via`; it may come before the release that it speaks of.
    pub(crate) fn on_statement(&mut self, via: NodeId, signed: &SignedStatement) -> Heard<Statement> {
        let statement = match signed.open() {
            Ok(statement) => statement,
            Err(error) => return self.reject(via, Rejection::Forged, error.to_string()),
        };
        let Some(channel) = self.channels.get_mut(&statement.channel) else {
            return Heard::Elsewhere;
        };
        if !channel.trusted.contains(&signed.publisher) {
            let detail = format!("{} is not trusted for {}", signed.publisher, statement.channel);
            return self.reject(via, Rejection::Untrusted, detail);
        }
        let known = channel.statements.get(&statement.release);
        if known.is_some_and(|(_, known)| known.word >= statement.word) {
            return Heard::Known;
        }
        channel.statements.insert(statement.release, (signed.clone(), statement.clone()));
        while channel.statements.len() > STATEMENTS_KEPT {
            let unknown = channel.statements.keys().find(|id| !channel.known.contains_key(id)).copied();
            let Some(id) = unknown.or_else(|| channel.statements.keys().next().copied()) else { break };
            channel.statements.remove(&id);
        }
        Heard::Accepted(Box::new(statement))
    }

    fn reject<T>(&mut self, via: NodeId, rejection: Rejection, detail: String) -> Heard<T> {
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
    use aquifer_core::{Policy, PublisherSecret, Word};

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
        let hear_of = |releases: &mut Releases, seq, manifest: &[u8], by: &PublisherSecret| {
            releases.on_release(VIA, &SignedRelease::sign(&release(seq, manifest), by), |_| Vec::new())
        };
        let mut hear = |seq, by: &PublisherSecret| hear_of(&mut releases, seq, b"m", by);
        assert!(matches!(hear(3, &stranger), Heard::Rejected { rejection: Rejection::Untrusted, first: true, .. }));
        assert!(matches!(hear(9, &stranger), Heard::Rejected { rejection: Rejection::Untrusted, first: false, .. }));
        assert!(matches!(hear(3, &secret), Heard::Accepted(_)));
        assert!(matches!(hear(3, &secret), Heard::Known));
        assert!(matches!(hear(2, &secret), Heard::Accepted(_)), "it led there");
        assert!(matches!(hear(4, &secret), Heard::Accepted(_)));
        let other = hear_of(&mut releases, 2, b"other", &secret);
        assert!(matches!(other, Heard::Rejected { rejection: Rejection::Older, first: true, .. }));
        assert_eq!(releases.counts(), RejectionCounts { forged: 0, untrusted: 2, older: 1 });
        assert_eq!(releases.newest(&"c".parse().unwrap()).unwrap().seq, 4);
        let seqs: Vec<u64> = releases.of_channel(&"c".parse().unwrap()).map(|(_, r)| r.seq).collect();
        assert_eq!(seqs, [2, 3, 4]);
    }

    #[test]
    fn a_few_are_remembered_and_the_newest_of_each_selector() {
        let secret = PublisherSecret::from_seed([1; 32]);
        let mut releases = followed(&secret);
        let used = |_: &ChannelName| vec![release(3, b"m").id()];
        let mut hear = |release: &Release| releases.on_release(VIA, &SignedRelease::sign(release, &secret), used);
        let side = Policy { subset: "ab=x".parse().unwrap(), pinned: true, ..Policy::default() };
        hear(&Release { policy: side, ..release(1, b"x") });
        let last = 3 * RELEASES_KEPT as u64;
        for seq in 2..=last {
            hear(&release(seq, b"m"));
        }
        assert!(matches!(hear(&release(5, b"m")), Heard::Rejected { rejection: Rejection::Older, .. }), "too old");
        let seqs: Vec<u64> = releases.of_channel(&"c".parse().unwrap()).map(|(_, r)| r.seq).collect();
        assert_eq!((seqs.len(), seqs[0], seqs[1], seqs[seqs.len() - 1]), (RELEASES_KEPT, 1, 3, last));
    }

    #[test]
    fn of_what_is_said_the_greater_word_of_a_trusted_key_counts() {
        let (secret, stranger) = (PublisherSecret::from_seed([1; 32]), PublisherSecret::from_seed([2; 32]));
        let mut releases = followed(&secret);
        let of = |seq, word| Statement {
            channel: "c".parse().unwrap(),
            release: release(seq, b"m").id(),
            word,
            reason: String::new(),
            created_unix_ms: 0,
        };
        let mut hear = |seq, word, by| releases.on_statement(VIA, &SignedStatement::sign(&of(seq, word), by));
        let untrusted = hear(1, Word::Commit, &stranger);
        assert!(matches!(untrusted, Heard::Rejected { rejection: Rejection::Untrusted, .. }));
        assert!(matches!(hear(1, Word::Abort, &secret), Heard::Accepted(_)));
        assert!(matches!(hear(1, Word::Commit, &secret), Heard::Accepted(_)));
        assert!(matches!(hear(1, Word::Abort, &secret), Heard::Known));
        for seq in 2..=3 * STATEMENTS_KEPT as u64 {
            hear(seq, Word::Commit, &secret);
        }
        assert_eq!(releases.statements(&"c".parse().unwrap()).count(), STATEMENTS_KEPT);
    }

    #[test]
    fn two_releases_with_one_number_settle_alike_in_any_order() {
        let secret = PublisherSecret::from_seed([1; 32]);
        let pair = [b"a", b"b"].map(|m| SignedRelease::sign(&release(1, m), &secret));
        let settled = |order: [usize; 2]| {
            let mut releases = followed(&secret);
            order.iter().for_each(|&i| drop(releases.on_release(VIA, &pair[i], |_| Vec::new())));
            releases.newest(&"c".parse().unwrap()).unwrap().manifest
        };
        assert_eq!(settled([0, 1]), settled([1, 0]));
    }
}
