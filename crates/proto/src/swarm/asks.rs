//! Whom a puller asks: enough peers, and none that stays silent while others could give.

use super::Stock;
use crate::limits::{
    ASK_RETRY, ASKS_MAX, CREDIT_BYTES_MIN, DIAL_PATIENCE, FAR_ASKS, FLIGHT_BYTES_MAX, FLIGHT_UNITS,
};
use aquifer_core::message::Terms;
use aquifer_core::{NodeId, Time};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug, Default)]
pub(super) struct Asks {
    asked: BTreeMap<NodeId, Ask>,
    /// Candidates that a link was wanted to, and when: one that does not come up must not keep a
    /// place from others, as a publisher that died does.
    dialled: BTreeMap<NodeId, Time>,
    /// Peers that refused or gave nothing, and until when they are passed over.
    passed_over: BTreeMap<NodeId, Time>,
}

#[derive(Debug)]
pub(super) struct Ask {
    pub(super) distance: u8,
    pub(super) sent_at: Time,
    pub(super) last_grant: Time,
    /// How much of the news it has heard.
    pub(super) cursor: u64,
}

/// A peer that takes part in the swarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) node: NodeId,
    pub(crate) connected: bool,
    /// Boundaries between it and this node, see `reach`.
    pub(crate) distance: u8,
}

impl Asks {
    pub(super) fn len(&self) -> usize {
        self.asked.len()
    }

    pub(super) fn nodes(&self) -> Vec<NodeId> {
        self.asked.keys().copied().collect()
    }

    pub(super) fn get_mut(&mut self, node: &NodeId) -> Option<&mut Ask> {
        self.asked.get_mut(node)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&NodeId, &mut Ask)> {
        self.asked.iter_mut()
    }

    pub(super) fn remove(&mut self, node: &NodeId) -> bool {
        self.asked.remove(node).is_some()
    }

    /// The peer gives nothing: others have its place for a while.
    pub(super) fn pass_over(&mut self, node: NodeId, now: Time) {
        self.passed_over.insert(node, now + ASK_RETRY);
    }

    /// The oldest cursor: what lies before it everybody has heard.
    pub(super) fn least_cursor(&self) -> Option<u64> {
        self.asked.values().map(|a| a.cursor).min()
    }

    /// Fills free places, with connected peers before those that must be dialled. Returns whom to
    /// ask now and whom to dial.
    pub(super) fn fill(
        &mut self,
        now: Time,
        cursor: u64,
        mut candidates: Vec<Candidate>,
        rng: &mut SmallRng,
    ) -> (Vec<NodeId>, Vec<NodeId>) {
        self.dialled.retain(|_, at| now.since(*at) < DIAL_PATIENCE);
        self.passed_over.retain(|_, until| *until > now);
        candidates.retain(|c| !self.asked.contains_key(&c.node) && !self.passed_over.contains_key(&c.node));
        let near = candidates.iter().filter(|c| c.distance == 0).count();
        candidates.retain(|c| c.connected || !self.dialled.contains_key(&c.node));
        candidates.shuffle(rng);
        candidates.sort_by_key(|c| !c.connected);
        let chosen = self.share_places(candidates, near);
        let (near, strange): (Vec<_>, Vec<_>) = chosen.into_iter().partition(|c| c.connected);
        let dials: Vec<NodeId> = strange.into_iter().map(|c| c.node).collect();
        for c in &near {
            let ask = Ask { distance: c.distance, sent_at: now, last_grant: now, cursor };
            self.asked.insert(c.node, ask);
        }
        let asked = near.into_iter().map(|c| c.node).collect();
        self.dialled.extend(dials.iter().map(|n| (*n, now)));
        (asked, dials)
    }

    /// Most places go to the `near_others` that are near and not asked yet, reached or not; the
    /// rest go to those that are not, the outermost first.
    fn share_places(&self, candidates: Vec<Candidate>, near_others: usize) -> Vec<Candidate> {
        let far_asked = self.asked.values().filter(|a| a.distance > 0).count();
        let near_asked = self.asked.len() - far_asked;
        let (mut near, mut far): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|c| c.distance == 0);
        far.sort_by_key(|c| std::cmp::Reverse((c.distance, c.connected)));
        let far_max = FAR_ASKS.max(ASKS_MAX.saturating_sub(near_asked + near_others));
        let free = ASKS_MAX.saturating_sub(self.asked.len());
        far.truncate(far_max.saturating_sub(far_asked).min(free));
        near.truncate(free - far.len());
        near.extend(far);
        near
    }

    /// Who granted nothing for longest, if for at least `patience`.
    pub(super) fn most_silent(&self, now: Time, patience: Duration) -> Option<NodeId> {
        let silent = self.asked.iter().filter(|(_, a)| now.since(a.last_grant) >= patience);
        silent.min_by_key(|(_, a)| a.last_grant).map(|(n, _)| *n)
    }

    /// Shares what may be in flight among those asked.
    pub(super) fn terms(&self, stock: &Stock, flight_bytes: u64) -> Terms {
        let window = (FLIGHT_UNITS * stock.unit_bytes()).min(FLIGHT_BYTES_MAX);
        let share = window / self.asked.len().max(1) as u64;
        Terms { credit_bytes: share.max(stock.unit_bytes()).max(CREDIT_BYTES_MIN), flight_bytes }
    }
}
