//! What the reading side keeps of its peers: reads that wait, and connections.

use super::TcpConfig;
use crate::limits::CONNECTIONS_PER_PEER_MAX;
use crate::{OpId, ReadOp};
use aquifer_core::NodeId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar};

#[derive(Default)]
pub(super) struct State {
    pub(super) closing: bool,
    pub(super) next: u64,
    pub(super) threads: usize,
    pub(super) peers: BTreeMap<NodeId, Peer>,
    /// Where each read that is not completed is to be found.
    pub(super) ops: BTreeMap<OpId, NodeId>,
}

#[derive(Default)]
pub(super) struct Peer {
    pub(super) queue: VecDeque<Queued>,
    pub(super) connections: BTreeMap<u64, Connection>,
    /// Told when there is something to do for a waiting connection.
    pub(super) wake: Arc<Condvar>,
    /// Where the last connection succeeded.
    pub(super) reached: Option<SocketAddr>,
}

#[derive(Clone, Debug)]
pub(super) struct Queued {
    pub(super) op: ReadOp,
    pub(super) retries: u8,
}

/// What others may know of, and do to, a connection: its thread owns the rest.
#[derive(Default)]
pub(super) struct Connection {
    pub(super) stream: Option<Arc<TcpStream>>,
    pub(super) under_way: BTreeSet<OpId>,
    pub(super) cancelled: BTreeSet<OpId>,
    pub(super) waiting: bool,
    /// Its thread is what is slow, not the network.
    pub(super) busy: bool,
    /// We cut it ourselves, to cancel a read.
    pub(super) cut: bool,
    /// It must end, and its reads with it, for this reason.
    pub(super) end: Option<&'static str>,
}

impl Connection {
    pub(super) fn shut(&self) {
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn end(&mut self, reason: &'static str) {
        self.end.get_or_insert(reason);
        self.shut();
    }
}

impl State {
    pub(super) fn register(&mut self, peer: NodeId) -> u64 {
        self.next += 1;
        self.threads += 1;
        self.peers.entry(peer).or_default().connections.insert(self.next, Connection::default());
        self.next
    }

    pub(super) fn connection(&mut self, peer: NodeId, id: u64) -> Option<&mut Connection> {
        self.peers.get_mut(&peer)?.connections.get_mut(&id)
    }

    /// Takes all queued reads of a peer, which the caller must complete.
    pub(super) fn drain(&mut self, peer: NodeId, mut which: impl FnMut(&Queued) -> bool) -> Vec<Queued> {
        let Some(entry) = self.peers.get_mut(&peer) else { return Vec::new() };
        let (taken, kept) = std::mem::take(&mut entry.queue).into_iter().partition::<Vec<_>, _>(|q| which(q));
        entry.queue = kept.into();
        taken.iter().for_each(|q| {
            self.ops.remove(&q.op.id);
        });
        taken
    }

    /// The queue, if no other connection is there to serve it.
    pub(super) fn drain_unserved(&mut self, peer: NodeId) -> Vec<Queued> {
        let served = self.peers.get(&peer).is_some_and(|p| p.connections.values().any(|c| c.end.is_none()));
        match served {
            true => Vec::new(),
            false => self.drain(peer, |_| true),
        }
    }

    pub(super) fn end_peer(&mut self, peer: NodeId, reason: &'static str) -> Vec<Queued> {
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.connections.values_mut().for_each(|c| c.end(reason));
            entry.wake.notify_all();
        }
        self.drain(peer, |_| true)
    }

    pub(super) fn forget_if_idle(&mut self, peer: NodeId) {
        if self.peers.get(&peer).is_some_and(|p| p.queue.is_empty() && p.connections.is_empty()) {
            self.peers.remove(&peer);
        }
    }
}

impl Peer {
    /// Whether another connection should be opened for what is queued.
    pub(super) fn wants_connection(&self, config: &TcpConfig) -> bool {
        let alive = || self.connections.values().filter(|c| c.end.is_none());
        let most = match alive().all(|c| c.busy) {
            true => config.connections_per_peer.max(config.connections_per_peer_max),
            false => config.connections_per_peer,
        };
        let waiting = alive().filter(|c| c.waiting).count();
        self.queue.len() > waiting && alive().count() < most.clamp(1, CONNECTIONS_PER_PEER_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{memory, read_of};

    fn queued(n: usize) -> VecDeque<Queued> {
        let op = read_of(&[], 1, memory(1));
        (0..n).map(|_| Queued { op: op.clone(), retries: 0 }).collect()
    }

    fn peer(reads: usize, connections: impl IntoIterator<Item = Connection>) -> Peer {
        Peer { queue: queued(reads), connections: (0..).zip(connections).collect(), ..Peer::default() }
    }

    fn connection(busy: bool) -> Connection {
        Connection { busy, ..Connection::default() }
    }

    #[test]
    fn a_connection_is_opened_for_what_waits_and_more_only_where_threads_are_slow() {
        let config = TcpConfig::default();
        let wants = |reads, connections: &[bool]| {
            peer(reads, connections.iter().map(|busy| connection(*busy))).wants_connection(&config)
        };
        assert!(wants(1, &[]) && !wants(0, &[]));
        assert!(wants(1, &[true]) && !wants(1, &[false]) && !wants(0, &[true]));
        assert!(wants(1, &[true, true]) && !wants(1, &[true, false]));
        assert!(!wants(1, &[true; CONNECTIONS_PER_PEER_MAX]));
    }

    #[test]
    fn connections_that_end_do_not_count_and_those_that_wait_take_what_there_is() {
        let config = TcpConfig::default();
        let mut ending = connection(false);
        ending.end = Some("a reason");
        assert!(peer(1, [ending]).wants_connection(&config));
        let waiting = || Connection { waiting: true, ..connection(true) };
        assert!(!peer(1, [waiting()]).wants_connection(&config));
        assert!(peer(2, [waiting()]).wants_connection(&config));
    }

    #[test]
    fn so_many_as_are_configured_are_opened_at_once() {
        let config = TcpConfig { connections_per_peer: 2, connections_per_peer_max: 2, ..TcpConfig::default() };
        assert!(peer(1, [connection(false)]).wants_connection(&config));
        assert!(!peer(9, [connection(true), connection(true)]).wants_connection(&config));
    }
}
