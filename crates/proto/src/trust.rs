//! How peers behaved as holders, and for how long each is avoided.

use crate::limits::{
    AVOID_CORRUPT, AVOID_CORRUPT_MAX, AVOID_FAILED, AVOID_FAILED_MAX, EXCUSE_SPACING, EXCUSES_MAX, TRUST_MAX,
};
use aquifer_core::{NodeId, Time};
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug, Default)]
pub(crate) struct Trust {
    peers: BTreeMap<NodeId, Record>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Record {
    /// Chunks in all that did not hash to their name.
    pub(crate) corrupt: u32,
    /// How often it was avoided for that: chunks that were under way together count once.
    lies: u32,
    /// Chunks that did not hash to their name and whose lease had been taken back, since it was last
    /// avoided for that, and when the last of them was counted.
    excused: u32,
    excused_at: Time,
    /// Reads failed in a row.
    failed: u32,
    avoid_until: Time,
}

impl Trust {
    pub(crate) fn is_avoided(&self, node: &NodeId, now: Time) -> bool {
        self.peers.get(node).is_some_and(|r| r.avoid_until > now)
    }

    pub(crate) fn len(&self) -> usize {
        self.peers.len()
    }

    pub(crate) fn record(&self, node: &NodeId) -> Record {
        self.peers.get(node).copied().unwrap_or_default()
    }

    pub(crate) fn on_good_read(&mut self, node: &NodeId) {
        if let Some(record) = self.peers.get_mut(node) {
            record.failed = 0;
        }
    }

    /// Returns for how long the peer is avoided now. Failures that were under way together count
    /// once: nothing is added while the peer is avoided already.
    pub(crate) fn on_failed_read(&mut self, node: NodeId, now: Time) -> Option<Duration> {
        let record = self.entry(node);
        if record.avoid_until > now {
            return None;
        }
        let avoid = doubled(AVOID_FAILED, record.failed, AVOID_FAILED_MAX);
        record.failed += 1;
        record.avoid_until = now + avoid;
        Some(avoid)
    }

    pub(crate) fn on_corrupt_read(&mut self, node: NodeId, now: Time) -> Duration {
        let record = self.entry(node);
        record.corrupt = record.corrupt.saturating_add(1);
        if record.lies > 0 && record.avoid_until > now {
            return record.avoid_until.since(now);
        }
        let avoid = doubled(AVOID_CORRUPT, record.lies, AVOID_CORRUPT_MAX);
        record.lies = record.lies.saturating_add(1);
        record.avoid_until = record.avoid_until.max(now + avoid);
        avoid
    }

    /// Bytes that do not hash to their name, under a lease that was taken back before they were all
    /// here. That may be: the holder's memory was written over. Who does it again and again hides
    /// lies behind it: returns for how long it is avoided then. Chunks that were under way together
    /// count once.
    pub(crate) fn on_excused_read(&mut self, node: NodeId, now: Time) -> Option<Duration> {
        let record = self.entry(node);
        if record.excused > 0 && now.since(record.excused_at) < EXCUSE_SPACING {
            return None;
        }
        (record.excused, record.excused_at) = (record.excused + 1, now);
        if record.excused <= EXCUSES_MAX {
            return None;
        }
        record.excused = 0;
        Some(self.on_corrupt_read(node, now))
    }

    fn entry(&mut self, node: NodeId) -> &mut Record {
        if self.peers.len() >= TRUST_MAX && !self.peers.contains_key(&node) {
            // Forget whoever is forgiven soonest.
            let soonest = self.peers.iter().min_by_key(|(_, r)| r.avoid_until).map(|(n, _)| *n);
            soonest.map(|n| self.peers.remove(&n));
        }
        self.peers.entry(node).or_default()
    }
}

fn doubled(base: Duration, times: u32, most: Duration) -> Duration {
    base.saturating_mul(1u32.checked_shl(times.min(20)).unwrap_or(u32::MAX)).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_liar_is_avoided_longer_each_time_and_has_a_way_back() {
        let (mut trust, node) = (Trust::default(), NodeId([1; 32]));
        assert_eq!(trust.on_corrupt_read(node, Time::ZERO), AVOID_CORRUPT);
        assert_eq!(trust.on_corrupt_read(node, Time::ZERO), AVOID_CORRUPT, "it was under way with the first");
        assert_eq!(trust.record(&node).corrupt, 2);
        assert!(trust.is_avoided(&node, Time::ZERO + AVOID_CORRUPT / 2));
        let later = Time::ZERO + AVOID_CORRUPT;
        assert!(!trust.is_avoided(&node, later));
        assert_eq!(trust.on_corrupt_read(node, later), AVOID_CORRUPT * 2);
    }

    #[test]
    fn who_takes_leases_of_wrong_bytes_back_again_and_again_is_a_liar() {
        let (mut trust, node) = (Trust::default(), NodeId([1; 32]));
        let mut now = Time::ZERO;
        for _ in 0..EXCUSES_MAX {
            assert_eq!(trust.on_excused_read(node, now), None);
            assert_eq!(trust.on_excused_read(node, now), None, "they were under way together");
            trust.on_good_read(&node);
            now = now + EXCUSE_SPACING;
        }
        assert!(!trust.is_avoided(&node, now));
        assert_eq!(trust.on_excused_read(node, now), Some(AVOID_CORRUPT));
        assert_eq!(trust.on_excused_read(node, now + EXCUSE_SPACING), None, "it has its way back");
    }

    #[test]
    fn failures_back_off_and_a_good_read_forgives() {
        let (mut trust, node) = (Trust::default(), NodeId([1; 32]));
        assert_eq!(trust.on_failed_read(node, Time::ZERO), Some(AVOID_FAILED));
        assert_eq!(trust.on_failed_read(node, Time::ZERO), None);
        let later = Time::ZERO + AVOID_FAILED;
        assert_eq!(trust.on_failed_read(node, later), Some(AVOID_FAILED * 2));
        trust.on_good_read(&node);
        assert_eq!(trust.on_failed_read(node, Time::ZERO + AVOID_FAILED_MAX), Some(AVOID_FAILED));
    }
}
