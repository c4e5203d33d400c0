//! Who is in the mesh: status records, their time-outs, and the links worth having.

use crate::io::Notice;
use crate::limits::{
    CONNECTIONS_WANTED, MEMBER_TIMEOUT_INTERVALS, MEMBERS_MAX, PROGRESS_STATUS_INTERVAL, PROGRESS_STATUS_TURN,
    SNAPSHOT_BYTES_MAX, SNAPSHOT_FAMILIAR_MAX, SNAPSHOT_STATUSES_MAX, STATUS_INTERVAL, STATUS_TURN, TOMBSTONE,
};
use aquifer_core::status::StatusError;
use aquifer_core::{NodeId, SignedStatus, Status, Time};
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::{IteratorRandom, SliceRandom};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Another node, as it last spoke of itself.
#[derive(Clone, Debug)]
pub struct Member {
    /// Shared by all who heard it in this process.
    pub status: Arc<Status>,
    signed: SignedStatus,
    heard_at: Time,
    /// How old the record was then: it may be older than this node.
    age: Duration,
}

impl Member {
    /// How old its record is.
    fn age(&self, now: Time) -> Duration {
        self.age.saturating_add(now.since(self.heard_at))
    }
}

#[derive(Debug)]
pub(crate) struct Members {
    me: NodeId,
    members: BTreeMap<NodeId, Member>,
    connected: BTreeSet<NodeId>,
    /// Grows whenever somebody comes, goes, or says to stand elsewhere, to drain or to follow other channels.
    version: u64,
    /// Nodes that left or timed out, and their last record's order.
    gone: BTreeMap<NodeId, ((u64, u64), Time)>,
}

/// What a status record changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// A newer record of a member, or of a newcomer.
    News(NodeId),
    /// The newest record we know of the node, once more. Whoever brought it another way may not
    /// have told the others.
    Known,
    OldNews,
    Refused(StatusError),
}

impl Members {
    pub(crate) fn new(me: NodeId) -> Self {
        Members { me, members: BTreeMap::new(), connected: BTreeSet::new(), version: 1, gone: BTreeMap::new() }
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&NodeId, &Member)> {
        self.members.iter()
    }

    /// How many are there, and how many that left are remembered.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        (self.members.len(), self.gone.len())
    }

    /// Time in which every member may speak once.
    pub(crate) fn turns(&self) -> Duration {
        self.turns_of(STATUS_TURN)
    }

    /// The same, where each has `turn` for it.
    pub(crate) fn turns_of(&self, turn: Duration) -> Duration {
        turn.saturating_mul(u32::try_from(self.members.len()).unwrap_or(u32::MAX))
    }

    /// How soon a node tells of its progress, and no later than it would speak anyway.
    pub(crate) fn progress_interval(&self) -> Duration {
        PROGRESS_STATUS_INTERVAL.max(self.turns_of(PROGRESS_STATUS_TURN)).min(self.status_interval())
    }

    /// How often a node speaks when nothing changed.
    pub(crate) fn status_interval(&self) -> Duration {
        STATUS_INTERVAL.max(self.turns())
    }

    /// A node that spoke `status` and is not heard of for this long is gone: never sooner than by
    /// its own word. Who just came knows few members, and hears of nodes that take turns with
    /// thousands. Nor later than the largest mesh would wait.
    fn timeout(&self, status: &Status) -> Duration {
        let members_max = u32::try_from(MEMBERS_MAX).unwrap_or(u32::MAX);
        let told = Duration::from_millis(status.interval_ms.into()).min(STATUS_TURN.saturating_mul(members_max));
        self.status_interval().max(told) * MEMBER_TIMEOUT_INTERVALS
    }

    pub(crate) fn member(&self, node: &NodeId) -> Option<&Member> {
        self.members.get(node)
    }

    pub(crate) fn is_connected(&self, node: &NodeId) -> bool {
        self.connected.contains(node)
    }

    pub(crate) fn connected(&self) -> impl Iterator<Item = &NodeId> {
        self.connected.iter()
    }

    pub(crate) fn on_connected(&mut self, node: NodeId) {
        self.connected.insert(node);
    }

    pub(crate) fn on_disconnected(&mut self, node: &NodeId) {
        self.connected.remove(node);
    }

    /// Takes a record of age `age`; only what the node itself signed, newer than what is known.
    pub(crate) fn on_status(
        &mut self,
        now: Time,
        signed: SignedStatus,
        age: Duration,
        notices: &mut Vec<Notice>,
    ) -> Heard {
        if self.has_exactly(&signed) {
            return Heard::Known;
        }
        let status = match signed.open() {
            Ok(status) => status,
            Err(error) => return Heard::Refused(error),
        };
        let (node, order) = (status.node, (status.incarnation, status.seq));
        if node == self.me || age >= self.timeout(&status) {
            return Heard::OldNews;
        }
        let known = self.members.get(&node).map(|m| (m.status.incarnation, m.status.seq));
        let buried = self.gone.get(&node).map(|(order, _)| *order);
        match known.max(buried).map(|known| known.cmp(&order)) {
            Some(Ordering::Greater) => return Heard::OldNews,
            Some(Ordering::Equal) => return Heard::Known,
            Some(Ordering::Less) | None => {}
        }
        if status.leaving {
            self.bury(node, order, now, true, notices);
            return Heard::News(node);
        }
        if known.is_none() {
            if self.members.len() >= MEMBERS_MAX {
                return Heard::OldNews;
            }
            notices.push(Notice::MemberJoined { node, name: status.name.clone() });
        }
        self.gone.remove(&node);
        let moved = self.members.get(&node).is_none_or(|m| is_elsewhere(&m.status, &status));
        self.version += u64::from(moved);
        self.members.insert(node, Member { status, signed, heard_at: now, age });
        Heard::News(node)
    }

    /// Whether this is the very record we know, so that its signature need not be checked again:
    /// gossip brings most records many times.
    fn has_exactly(&self, signed: &SignedStatus) -> bool {
        let known = signed.claimed_node().and_then(|node| self.members.get(&node));
        known.is_some_and(|m| m.signed == *signed)
    }

    /// Returns those that are not heard of any more.
    pub(crate) fn on_timeout(&mut self, now: Time, notices: &mut Vec<Notice>) -> Vec<NodeId> {
        let silent = |m: &Member| m.age(now) >= self.timeout(&m.status);
        let expired: Vec<_> = self.members.iter().filter(|(_, m)| silent(m)).map(|(n, _)| *n).collect();
        for &node in &expired {
            let order = self.members.get(&node).map_or((0, 0), |m| (m.status.incarnation, m.status.seq));
            self.bury(node, order, now, false, notices);
        }
        self.gone.retain(|_, (_, since)| now.since(*since) < TOMBSTONE);
        expired
    }

    /// Records to greet a new connection to `node` with, and their ages in milliseconds.
    pub(crate) fn snapshot(&self, now: Time, node: &NodeId, rng: &mut SmallRng) -> Vec<(SignedStatus, u32)> {
        let most = if self.members.contains_key(node) { SNAPSHOT_FAMILIAR_MAX } else { SNAPSHOT_STATUSES_MAX };
        let age = |m: &Member| u32::try_from(m.age(now).as_millis()).unwrap_or(u32::MAX);
        let chosen = self.members.values().choose_multiple(rng, most);
        let mut room = SNAPSHOT_BYTES_MAX;
        let fits = |m: &&Member| {
            let left = room.checked_sub(m.signed.len());
            room = left.unwrap_or(0);
            left.is_some()
        };
        chosen.into_iter().take_while(fits).map(|m| (m.signed.clone(), age(m))).collect()
    }

    /// Members to dial so that this node keeps enough links, in random order.
    pub(crate) fn to_dial(&self, rng: &mut SmallRng) -> Vec<(NodeId, Vec<String>)> {
        let lacking = CONNECTIONS_WANTED.saturating_sub(self.connected.len());
        if lacking == 0 {
            return Vec::new();
        }
        let strangers = self.members.values().filter(|m| !self.connected.contains(&m.status.node));
        let mut chosen = strangers.choose_multiple(rng, lacking);
        chosen.shuffle(rng);
        chosen.into_iter().map(|m| (m.status.node, m.status.addresses.clone())).collect()
    }

    fn bury(&mut self, node: NodeId, order: (u64, u64), now: Time, said_goodbye: bool, notices: &mut Vec<Notice>) {
        if let Some(member) = self.members.remove(&node) {
            self.version += 1;
            notices.push(Notice::MemberLeft { node, name: member.status.name.clone(), said_goodbye });
        }
        self.gone.insert(node, (order, now));
        if self.gone.len() > MEMBERS_MAX {
            let oldest = self.gone.iter().min_by_key(|(_, (_, since))| *since).map(|(n, _)| *n);
            oldest.map(|n| self.gone.remove(&n));
        }
    }
}

/// Whether a node takes part at another place or in other channels than before, or no more.
fn is_elsewhere(before: &Status, now: &Status) -> bool {
    let channels = before.channels.iter().map(|c| &c.channel);
    before.labels != now.labels
        || before.draining != now.draining
        || !channels.eq(now.channels.iter().map(|c| &c.channel))
}

/// Spreads what all nodes do at the same interval: between 75 % and 125 % of it.
pub(crate) fn jittered(interval: Duration, rng: &mut SmallRng) -> Duration {
    interval.mul_f64(rng.random_range(0.75..1.25))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::bare_status;
    use aquifer_core::{ChannelStatus, ManifestHash, NodeSecret};
    use rand::SeedableRng;

    fn record(seed: u8, incarnation: u64, seq: u64, leaving: bool) -> SignedStatus {
        record_every(3000, seed, incarnation, seq, leaving)
    }

    fn record_every(interval_ms: u32, seed: u8, incarnation: u64, seq: u64, leaving: bool) -> SignedStatus {
        let secret = NodeSecret::from_seed([seed; 32]);
        SignedStatus::sign(&Status { incarnation, seq, leaving, interval_ms, ..status(seed) }, &secret)
    }

    fn status(seed: u8) -> Status {
        Status { name: format!("n{seed}"), ..bare_status(NodeSecret::from_seed([seed; 32]).public()) }
    }

    fn hear(members: &mut Members, now: Time, record: SignedStatus, age: Duration) -> bool {
        matches!(members.on_status(now, record, age, &mut Vec::new()), Heard::News(_))
    }

    const S: Duration = Duration::from_secs(1);
    const MEMBER_TIMEOUT: Duration = Duration::from_secs(15);

    #[test]
    fn the_newest_record_of_a_node_counts() {
        let mut members = Members::new(NodeId([9; 32]));
        assert!(hear(&mut members, Time::ZERO, record(1, 5, 2, false), S));
        assert!(!hear(&mut members, Time::ZERO, record(1, 5, 2, false), S));
        assert!(!hear(&mut members, Time::ZERO, record(1, 4, 9, false), S));
        let again = members.on_status(Time::ZERO, record(1, 5, 2, false), S, &mut Vec::new());
        assert_eq!(again, Heard::Known, "others may not know it yet");
        assert!(hear(&mut members, Time::ZERO, record(1, 6, 0, false), S));
        assert_eq!(members.iter().count(), 1);
    }

    #[test]
    fn the_dead_stay_dead_until_they_speak_again() {
        let mut members = Members::new(NodeId([9; 32]));
        assert!(hear(&mut members, Time::ZERO, record(1, 5, 2, false), S));
        let later = Time::ZERO + MEMBER_TIMEOUT;
        let mut notices = Vec::new();
        members.on_timeout(later, &mut notices);
        assert_eq!(members.iter().count(), 0);
        assert!(matches!(notices[..], [Notice::MemberLeft { said_goodbye: false, .. }]));
        assert!(!hear(&mut members, later, record(1, 5, 2, false), S), "an old copy revives nobody");
        assert!(hear(&mut members, later, record(1, 5, 3, false), S));
        assert!(hear(&mut members, later, record(1, 5, 4, true), S));
        assert_eq!(members.iter().count(), 0);
        assert!(!hear(&mut members, later, record(1, 5, 3, false), S));
    }

    #[test]
    fn records_age_on_their_way() {
        let mut members = Members::new(NodeId([9; 32]));
        assert!(!hear(&mut members, Time::ZERO, record(1, 5, 2, false), MEMBER_TIMEOUT));
        let old = MEMBER_TIMEOUT - S;
        let start = Time::ZERO + MEMBER_TIMEOUT;
        assert!(hear(&mut members, start, record(1, 5, 3, false), old));
        members.on_timeout(start + S, &mut Vec::new());
        assert_eq!(members.iter().count(), 0);
    }

    #[test]
    fn a_newcomer_that_knows_few_waits_as_long_as_those_who_speak_rarely() {
        let mut members = Members::new(NodeId([9; 32]));
        let every = 16_000;
        let start = Time::ZERO + MEMBER_TIMEOUT * 6;
        assert!(hear(&mut members, start, record_every(every, 1, 5, 2, false), MEMBER_TIMEOUT + S));
        assert!(hear(&mut members, start, record(2, 5, 2, false), S));
        members.on_timeout(start + MEMBER_TIMEOUT, &mut Vec::new());
        assert_eq!(members.iter().count(), 1, "only who said to speak often is missed soon");
        members.on_timeout(start + MEMBER_TIMEOUT * 5, &mut Vec::new());
        assert_eq!(members.iter().count(), 0);
    }

    #[test]
    fn nobody_is_waited_for_without_end() {
        let mut members = Members::new(NodeId([9; 32]));
        assert!(hear(&mut members, Time::ZERO, record_every(u32::MAX, 1, 5, 2, false), S));
        members.on_timeout(Time::ZERO + MEMBER_TIMEOUT * 12, &mut Vec::new());
        assert_eq!(members.iter().count(), 0);
    }

    #[test]
    fn a_goodbye_counts_however_rarely_a_node_speaks() {
        let mut members = Members::new(NodeId([9; 32]));
        assert!(hear(&mut members, Time::ZERO, record_every(16_000, 1, 5, 2, false), S));
        assert!(hear(&mut members, Time::ZERO, record_every(16_000, 1, 5, 3, true), S));
        assert_eq!(members.iter().count(), 0);
    }

    #[test]
    fn a_record_may_be_older_than_who_hears_it() {
        let mut members = Members::new(NodeId([9; 32]));
        assert!(hear(&mut members, Time::ZERO, record(1, 5, 2, false), MEMBER_TIMEOUT - S));
        let told = members.snapshot(Time::ZERO, &NodeId([8; 32]), &mut SmallRng::seed_from_u64(1));
        assert_eq!(told.iter().map(|(_, age_ms)| *age_ms).collect::<Vec<_>>(), [14_000]);
        members.on_timeout(Time::ZERO + S, &mut Vec::new());
        assert_eq!(members.iter().count(), 0);
    }

    #[test]
    fn who_takes_part_elsewhere_is_noticed() {
        let mut members = Members::new(NodeId([9; 32]));
        let secret = NodeSecret::from_seed([1; 32]);
        let mut status = status(1);
        let mut versions = Vec::new();
        let mut says = |change: &dyn Fn(&mut Status)| {
            change(&mut status);
            status.seq += 1;
            assert!(hear(&mut members, Time::ZERO, SignedStatus::sign(&status, &secret), S));
            versions.push(members.version());
        };
        let manifest = ManifestHash::of(b"m");
        let channel = "c".parse().unwrap();
        let follows = ChannelStatus {
            channel,
            seq: 1,
            manifest,
            chunks_wanted: 9,
            chunks_have: 0,
            also: Vec::new(),
            report: None,
        };
        says(&|_| ());
        says(&|s| s.labels = vec![("rack".into(), "1".into())]);
        says(&|s| s.channels = vec![follows.clone()]);
        says(&|s| s.channels[0].chunks_have = 9);
        assert_eq!(versions, [2, 3, 4, 4]);
    }
}
