//! What waits to be read from one node, and by which connections.

use super::LinkId;
use crate::limits::{ASKED_AHEAD_MAX, PORT_PAUSE};
use aquifer_core::Access;
use aquifer_transport::{Endpoint, ReadOp};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Instant;

/// A read that has not been asked for, or has to be asked for again.
#[derive(Clone, Debug)]
pub(super) struct Queued {
    pub(super) op: ReadOp,
    pub(super) retries: u8,
    /// The NUMA node it lands on, where that makes a difference.
    pub(super) node: Option<u32>,
}

#[derive(Debug, Default)]
pub(super) struct Peer {
    pub(super) queue: VecDeque<Queued>,
    /// Connections that take reads, and attempts at one, each with its port.
    pub(super) links: BTreeMap<LinkId, usize>,
    pub(super) joining: BTreeMap<LinkId, usize>,
    /// Connections that take no more and have not ended yet.
    pub(super) ending: usize,
    /// Where the last connection succeeded.
    pub(super) reached: Option<SocketAddr>,
    /// Ports by which this peer could not be read from lately, and until when they are not tried again.
    paused: BTreeMap<usize, Instant>,
    /// The way in of the latest read.
    pub(super) way: Option<(Access, Vec<Endpoint>)>,
    /// The NUMA node that the latest read lands on.
    pub(super) node: Option<u32>,
}

impl Peer {
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.links.is_empty() && self.joining.is_empty() && self.ending == 0
    }

    pub(super) fn has_connection(&self) -> bool {
        !self.links.is_empty() || !self.joining.is_empty()
    }

    pub(super) fn pause(&mut self, rail: usize, now: Instant) {
        self.paused.insert(rail, now + PORT_PAUSE);
    }

    /// The port to connect by next, of so many, if another connection is of use: one for each port,
    /// the nearest first, as long as there is enough to read.
    pub(super) fn next_rail(
        &self,
        rails: usize,
        under_way: usize,
        now: Instant,
        distance: impl Fn(usize) -> u32,
    ) -> Option<usize> {
        let connected = self.links.len() + self.joining.len();
        if self.queue.is_empty() && (connected == 0 || under_way <= connected * (ASKED_AHEAD_MAX / 4)) {
            return None;
        }
        let free = |rail: &usize| !self.links.values().chain(self.joining.values()).any(|used| used == rail);
        let is_paused = |rail: &usize| self.paused.get(rail).is_some_and(|until| *until > now);
        let rested = (0..rails).filter(|rail| free(rail) && !is_paused(rail)).min_by_key(|rail| distance(*rail));
        match connected {
            // There must be one: if all are paused, the one that has been for longest.
            0 => rested.or_else(|| (0..rails).min_by_key(|rail| self.paused.get(rail).copied())),
            _ => rested,
        }
    }

    /// The endpoints of the way in, the one that was reached before first.
    pub(super) fn target(&self) -> Option<(Access, Vec<Endpoint>)> {
        let first = self.queue.front().map(|q| (q.op.access.clone(), q.op.endpoints.clone()));
        let (access, mut endpoints) = first.or_else(|| self.way.clone())?;
        if let Some(at) = self.reached.and_then(|reached| endpoints.iter().position(|e| e.rdma() == Some(reached))) {
            endpoints[..=at].rotate_right(1);
        }
        Some((access, endpoints))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_taken_one_after_another_and_rest_after_a_failure() {
        let now = Instant::now();
        let mut peer = Peer::default();
        let next = |peer: &Peer, under_way, now| peer.next_rail(2, under_way, now, |_| 10);
        assert_eq!(next(&peer, 0, now), None, "nothing is to be read");
        assert_eq!(next(&peer, 1, now), None, "nothing waits");
        peer.links.insert(1, 0);
        assert_eq!(next(&peer, 5, now), Some(1), "the first has enough to do");
        peer.pause(1, now);
        assert_eq!(next(&peer, 5, now), None);
        assert_eq!(next(&peer, 5, now + PORT_PAUSE), Some(1));
    }

    #[test]
    fn near_ports_are_taken_before_far_ones() {
        let now = Instant::now();
        let mut peer = Peer::default();
        peer.links.insert(0, 3);
        let mut taken = Vec::new();
        for link in 1.. {
            let next = peer.next_rail(4, 100, now, |rail| [32, 10, 32, 10][rail]);
            let Some(rail) = next else { break };
            peer.links.insert(link, rail);
            taken.push(rail);
        }
        assert_eq!(taken, [1, 0, 2]);
    }
}
