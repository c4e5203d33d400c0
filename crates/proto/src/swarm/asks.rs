//! Whom a puller asks: enough peers, and none that stays silent while others could give.

use super::Stock;
use super::reach::Share;
use crate::limits::{
    ASK_RETRY, ASKS_MAX, ASKS_OWN, CREDIT_BYTES_MIN, DIAL_PATIENCE, FAR_ASKS, FLIGHT_BYTES_MAX, IDLE_TOLERATED,
};
use aquifer_core::message::{Refusal, Terms};
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
    /// What of all that is missing it was asked for, once it was.
    pub(super) share: Option<Share>,
    pub(super) sent_at: Time,
    /// Asks sent within [`ASK_RETRY`] of one another, less those that were refused: a refusal does
    /// not say which it answers.
    open: u32,
    pub(super) last_grant: Time,
    /// How much of the news it has heard.
    pub(super) cursor: u64,
    under_way: u32,
    /// Since when nothing of it is under way, once something was.
    idle_since: Option<Time>,
    /// The shortest time from the end of its last read to its next grant: a round trip.
    turnaround: Option<Duration>,
    /// How long one chunk of it takes, as a moving average, were it alone.
    service: Option<Duration>,
}

impl Ask {
    fn new(distance: u8, now: Time, cursor: u64) -> Self {
        Ask {
            distance,
            share: None,
            sent_at: now,
            open: 0,
            last_grant: now,
            cursor,
            under_way: 0,
            idle_since: None,
            turnaround: None,
            service: None,
        }
    }

    pub(super) fn on_sent(&mut self, now: Time, cursor: u64) {
        self.open = if now.since(self.sent_at) < ASK_RETRY { self.open.saturating_add(1) } else { 1 };
        (self.sent_at, self.cursor) = (now, cursor);
    }

    /// Returns whether none is left that may stand.
    fn on_refused(&mut self, now: Time) -> bool {
        self.open = if now.since(self.sent_at) < ASK_RETRY { self.open.saturating_sub(1) } else { 0 };
        self.open == 0
    }

    pub(super) fn on_begin(&mut self, now: Time) {
        self.under_way += 1;
        if let Some(idle) = self.idle_since.take() {
            let waited = now.since(idle);
            self.turnaround = Some(self.turnaround.map_or(waited, |t| t.min(waited)));
        }
    }

    pub(super) fn on_end(&mut self, now: Time, took: Duration) {
        let alone = took / self.under_way.max(1);
        self.service = Some(self.service.map_or(alone, |s| (s * 7 + alone) / 8));
        self.under_way = self.under_way.saturating_sub(1);
        if self.under_way == 0 {
            self.idle_since = Some(now);
        }
    }

    /// Chunks that keep this holder's link busy: one, and what it could send in the time that a word
    /// to it and back takes, unless that is so short that its other askers fill the gap. Flows that
    /// began together end together, and then all wait for words at once.
    fn depth(&self) -> u64 {
        let (Some(turnaround), Some(service)) = (self.turnaround, self.service) else { return 1 };
        let idle = turnaround.as_secs_f64() / service.as_secs_f64().max(1e-9);
        if idle < IDLE_TOLERATED { 1 } else { 1 + whole(idle.ceil()) }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "`as` saturates")]
#[expect(clippy::cast_sign_loss, reason = "`as` saturates")]
fn whole(value: f64) -> u64 {
    value as u64
}

/// A peer that takes part in the swarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) node: NodeId,
    pub(crate) connected: bool,
    /// Boundaries between it and this node, see `reach`.
    pub(crate) distance: u8,
    /// It asks this node.
    pub(crate) asks_us: bool,
    /// It is about to leave, and gives only what nobody else has: others are asked before it.
    pub(crate) drains: bool,
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

    /// It is passed over for a while, unless it was asked again since and the refusal may answer the
    /// ask before. Who drains refuses whatever stands, however often it was asked.
    pub(super) fn on_refused(&mut self, node: NodeId, refusal: Refusal, now: Time) {
        let is_over = |ask: &mut Ask| ask.on_refused(now) || refusal == Refusal::Draining;
        if self.asked.get_mut(&node).is_some_and(is_over) {
            self.asked.remove(&node);
            self.pass_over(node, now, ASK_RETRY);
        }
    }

    /// The peer gives nothing: others have its place for a while.
    pub(super) fn pass_over(&mut self, node: NodeId, now: Time, pause: Duration) {
        self.passed_over.insert(node, now + pause);
    }

    /// The oldest cursor: what lies before it everybody has heard.
    pub(super) fn least_cursor(&self) -> Option<u64> {
        self.asked.values().map(|a| a.cursor).min()
    }

    /// Fills free places. Those who ask this node come first: where asking is mutual, nobody is
    /// asked by many more than it asks, and no node's upload lies idle while another's is crowded.
    /// To leave them room a node picks only half of its places by itself, unless it is `alone`.
    /// Returns whom to ask now and whom to dial.
    pub(super) fn fill(
        &mut self,
        now: Time,
        cursor: u64,
        mut candidates: Vec<Candidate>,
        alone: bool,
        rng: &mut SmallRng,
    ) -> (Vec<NodeId>, Vec<NodeId>) {
        self.dialled.retain(|_, at| now.since(*at) < DIAL_PATIENCE);
        self.passed_over.retain(|_, until| *until > now);
        for up in candidates.iter().filter(|c| c.connected) {
            self.dialled.remove(&up.node);
        }
        candidates.retain(|c| !self.asked.contains_key(&c.node) && !self.passed_over.contains_key(&c.node));
        let near = candidates.iter().filter(|c| c.distance == 0).count();
        candidates.retain(|c| c.connected || !self.dialled.contains_key(&c.node));
        candidates.shuffle(rng);
        candidates.sort_by_key(|c| (c.drains, !c.asks_us, !c.connected));
        // Who is being dialled counts at first only: one that never comes up keeps no place.
        let own = if alone { ASKS_MAX } else { ASKS_OWN.saturating_sub(self.dialled.len()) };
        let chosen = self.share_places(candidates, near, own);
        let (near, strange): (Vec<_>, Vec<_>) = chosen.into_iter().partition(|c| c.connected);
        let dials: Vec<NodeId> = strange.into_iter().map(|c| c.node).collect();
        for c in &near {
            self.asked.insert(c.node, Ask::new(c.distance, now, cursor));
        }
        let asked = near.into_iter().map(|c| c.node).collect();
        self.dialled.extend(dials.iter().map(|n| (*n, now)));
        (asked, dials)
    }

    /// Most places go to the `near_others` that are near and not asked yet, reached or not; the
    /// rest go to those that are not, the outermost first. Of the near, those who do not ask this
    /// node get no more than `own` places.
    fn share_places(&self, candidates: Vec<Candidate>, near_others: usize, own: usize) -> Vec<Candidate> {
        let far_asked = self.asked.values().filter(|a| a.distance > 0).count();
        let near_asked = self.asked.len() - far_asked;
        let (mut near, mut far): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|c| c.distance == 0);
        far.sort_by_key(|c| std::cmp::Reverse((!c.drains, c.asks_us, c.distance, c.connected)));
        let far_max = FAR_ASKS.max(ASKS_MAX.saturating_sub(near_asked + near_others));
        let free = ASKS_MAX.saturating_sub(self.asked.len());
        far.truncate(far_max.saturating_sub(far_asked).min(free));
        let mutual = near.iter().filter(|c| c.asks_us).count();
        near.truncate(mutual.max(own.saturating_sub(near_asked)));
        near.truncate(free - far.len());
        near.extend(far);
        near
    }

    /// Who granted nothing for longest, if for at least `patience`, and if one of `candidates` that
    /// is as near or as far could have its place.
    pub(super) fn replaceable(&self, now: Time, patience: Duration, candidates: &[Candidate]) -> Option<NodeId> {
        let is_other = |c: &&Candidate| {
            !self.asked.contains_key(&c.node)
                && !self.passed_over.contains_key(&c.node)
                && (c.connected || !self.dialled.contains_key(&c.node))
        };
        let others = |far: bool| candidates.iter().filter(is_other).any(|c| (c.distance > 0) == far);
        let (near, far) = (others(false), others(true));
        let silent = self
            .asked
            .iter()
            .filter(|(_, a)| now.since(a.last_grant) >= patience && if a.distance > 0 { far } else { near });
        silent.min_by_key(|(_, a)| a.last_grant).map(|(n, _)| *n)
    }

    /// What `to` may give at a time: enough to keep it busy, and no more than its share of what may
    /// be under way.
    pub(super) fn terms(&self, stock: &Stock, to: &NodeId, flight_bytes: u64) -> Terms {
        let depth = self.asked.get(to).map_or(1, Ask::depth);
        let share = FLIGHT_BYTES_MAX / self.asked.len().max(1) as u64;
        let credit = depth.saturating_mul(stock.unit_bytes()).max(CREDIT_BYTES_MIN).min(share);
        Terms { credit_bytes: credit.max(stock.unit_bytes()), flight_bytes }
    }
}

#[cfg(test)]
mod tests;
