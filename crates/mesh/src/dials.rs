//! When to dial which node. The agent says whom it wants; here it is decided when the next
//! attempt is due, so that a node that fails is not asked faster and faster.

use crate::backoff;
use crate::limits::{CONNECTION_SHORT, DIALS_MAX, DIALS_RUNNING_MAX};
use crate::place::Place;
use aquifer_core::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
pub(crate) struct Dials {
    nodes: BTreeMap<NodeId, Dial>,
    /// The wanted ones, by when they may be dialled.
    wanted: BTreeSet<(Instant, NodeId)>,
    running: usize,
}

#[derive(Debug)]
struct Dial {
    places: Vec<Place>,
    phase: Phase,
    /// Attempts in a row that failed.
    failures: u32,
    not_before: Instant,
    why: Why,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Wanted,
    Running,
}

/// Why a node is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// The agent asked for it, and is told of failures.
    Asked,
    /// It was heard of on the local network, where others' nodes are heard too.
    Heard,
}

impl Dials {
    /// One attempt, as soon as the node's backoff allows; `places` replace what was known.
    pub(crate) fn want(&mut self, node: NodeId, places: Vec<Place>, why: Why, now: Instant) {
        if !self.nodes.contains_key(&node) && self.nodes.len() >= DIALS_MAX && !self.forget_one() {
            return;
        }
        let fresh = || Dial { places: Vec::new(), phase: Phase::Idle, failures: 0, not_before: now, why };
        let dial = self.nodes.entry(node).or_insert_with(fresh);
        dial.places = places;
        if why == Why::Asked {
            dial.why = why;
        }
        if dial.phase == Phase::Idle {
            dial.phase = Phase::Wanted;
            self.wanted.insert((dial.not_before, node));
        }
        self.assert_invariants();
    }

    /// A node to dial now; what becomes of it is answered with [`Dials::on_failed`] or
    /// [`Dials::on_up`].
    pub(crate) fn due(&mut self, now: Instant) -> Option<(NodeId, Vec<Place>)> {
        if self.running >= DIALS_RUNNING_MAX {
            return None;
        }
        let (_, node) = *self.wanted.first().filter(|(not_before, _)| *not_before <= now)?;
        self.wanted.pop_first();
        let dial = self.nodes.get_mut(&node)?;
        dial.phase = Phase::Running;
        let places = dial.places.clone();
        self.running += 1;
        self.assert_invariants();
        Some((node, places))
    }

    pub(crate) fn timeout(&self) -> Option<Instant> {
        if self.running >= DIALS_RUNNING_MAX {
            return None;
        }
        self.wanted.first().map(|(not_before, _)| *not_before)
    }

    /// Why the node was dialled, if it was.
    pub(crate) fn on_failed(&mut self, node: NodeId, now: Instant) -> Option<Why> {
        let dial = self.nodes.get_mut(&node).filter(|dial| dial.phase == Phase::Running)?;
        self.running -= 1;
        dial.phase = Phase::Idle;
        dial.failures = dial.failures.saturating_add(1);
        dial.not_before = now + backoff::wait(dial.failures);
        let why = dial.why;
        self.assert_invariants();
        Some(why)
    }

    /// Another attempt to reach the node is under way; this one is owed still.
    pub(crate) fn on_busy(&mut self, node: NodeId, now: Instant) {
        let Some(dial) = self.nodes.get_mut(&node).filter(|dial| dial.phase == Phase::Running) else { return };
        self.running -= 1;
        dial.phase = Phase::Wanted;
        dial.not_before = now + backoff::wait(1);
        self.wanted.insert((dial.not_before, node));
        self.assert_invariants();
    }

    /// The attempt is over; the node is connected, by it or otherwise.
    pub(crate) fn on_up(&mut self, node: NodeId) {
        let Some(dial) = self.nodes.get_mut(&node) else { return };
        match std::mem::replace(&mut dial.phase, Phase::Idle) {
            Phase::Running => self.running -= 1,
            Phase::Wanted => drop(self.wanted.remove(&(dial.not_before, node))),
            Phase::Idle => {}
        }
        self.assert_invariants();
    }

    /// The connection is gone after it `lasted` so long.
    pub(crate) fn on_down(&mut self, node: NodeId, lasted: Duration, now: Instant) {
        let Some(dial) = self.nodes.get_mut(&node).filter(|dial| dial.phase == Phase::Idle) else { return };
        if lasted >= CONNECTION_SHORT {
            dial.failures = 0;
            dial.not_before = now;
        } else {
            dial.failures = dial.failures.saturating_add(1);
            dial.not_before = now + backoff::wait(dial.failures);
        }
    }

    fn assert_invariants(&self) {
        assert!(self.running <= DIALS_RUNNING_MAX && self.nodes.len() <= DIALS_MAX);
        assert!(self.wanted.len() + self.running <= self.nodes.len());
    }

    /// False if every node known is being dialled or about to be.
    fn forget_one(&mut self) -> bool {
        let idle = self.nodes.iter().filter(|(_, dial)| dial.phase == Phase::Idle);
        let Some(oldest) = idle.min_by_key(|(_, dial)| dial.not_before).map(|(node, _)| *node) else { return false };
        self.nodes.remove(&oldest).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId([1; 32]);

    fn places() -> Vec<Place> {
        vec!["10.0.0.1:7000".parse().unwrap()]
    }

    #[test]
    fn asking_often_does_not_dial_often() {
        let now = Instant::now();
        let mut dials = Dials::default();
        (0..5).for_each(|_| dials.want(NODE, places(), Why::Asked, now));
        assert_eq!(dials.due(now), Some((NODE, places())));
        dials.want(NODE, places(), Why::Asked, now);
        assert_eq!(dials.due(now), None, "one at a time");
        assert_eq!(dials.on_failed(NODE, now), Some(Why::Asked));
        assert_eq!(dials.timeout(), None, "one attempt for all that was asked before it");

        dials.want(NODE, places(), Why::Asked, now);
        assert_eq!(dials.due(now), None, "not so soon");
        let then = dials.timeout().unwrap();
        assert!(then > now && dials.due(then).is_some());
    }

    #[test]
    fn an_attempt_that_could_not_be_made_is_owed() {
        let now = Instant::now();
        let mut dials = Dials::default();
        dials.want(NODE, places(), Why::Asked, now);
        dials.due(now);
        dials.on_busy(NODE, now);
        let then = dials.timeout().unwrap();
        assert!(then > now && dials.due(then).is_some());
    }

    #[test]
    fn a_connection_that_does_not_last_is_a_failure() {
        let now = Instant::now();
        let mut dials = Dials::default();
        dials.want(NODE, places(), Why::Asked, now);
        dials.due(now);
        dials.on_up(NODE);
        dials.on_down(NODE, Duration::from_millis(1), now);
        dials.want(NODE, places(), Why::Asked, now);
        assert_eq!(dials.due(now), None);
        dials.on_up(NODE);
        dials.on_down(NODE, CONNECTION_SHORT, now);
        dials.want(NODE, places(), Why::Asked, now);
        assert!(dials.due(now).is_some());
    }

    #[test]
    fn memory_is_bounded() {
        let now = Instant::now();
        let mut dials = Dials::default();
        for n in 0..DIALS_MAX + 10 {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&n.to_le_bytes());
            dials.want(NodeId(id), places(), Why::Heard, now);
            let (node, _) = dials.due(now).unwrap();
            dials.on_failed(node, now);
        }
        assert_eq!(dials.nodes.len(), DIALS_MAX);
        assert_eq!(dials.running, 0);
    }
}
