//! The reading side: queues, and the threads that empty them.
//!
//! A read is in exactly one place at any time: in the queue of its peer, in the hands of one
//! connection's thread, or completed. Whoever takes it out completes it, and no lock is held then. A
//! connection carries one read at a time, so that one that is cut concerns no other.

use super::link::{Link, Loss, Watch};
use super::wire::Request;
use super::{Counters, ShmConfig};
use crate::limits::{RETRIES_MAX, SHM_CONNECTIONS_MAX, SHM_CONNECTIONS_PER_PEER_MAX, THREAD_STACK_BYTES};
use crate::pieces::Pieces;
use crate::{Completion, Endpoint, OpId, ReadDone, ReadError, ReadOp, check_landing};
use aquifer_core::NodeId;
use aquifer_memory::Known;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

type Completions = Box<dyn Fn(Completion) + Send + Sync>;

pub(super) struct Reader {
    config: ShmConfig,
    completions: Completions,
    counters: Arc<Counters>,
    known: Arc<Known>,
    pieces: Arc<Pieces>,
    state: Mutex<State>,
    /// Told when a thread ends.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    closing: bool,
    next: u64,
    threads: usize,
    peers: BTreeMap<NodeId, Peer>,
    /// Where each read that is not completed is to be found.
    ops: BTreeMap<OpId, NodeId>,
}

#[derive(Default)]
struct Peer {
    queue: VecDeque<ReadOp>,
    connections: BTreeMap<u64, Connection>,
    /// Told when there is something to do for a waiting connection.
    wake: Arc<Condvar>,
}

/// What others may know of, and do to, a connection: its thread owns the rest.
#[derive(Default)]
struct Connection {
    stream: Option<Arc<UnixStream>>,
    /// The handshake succeeded, and the connection is not lost yet.
    linked: bool,
    under_way: Option<OpId>,
    /// Its answer has begun.
    begun: bool,
    /// Why the read under way must end.
    stop: Option<ReadError>,
    waiting: bool,
    /// It must end after its read, and takes no other.
    end: bool,
}

impl Connection {
    fn stop(&mut self, error: ReadError) {
        self.stop.get_or_insert(error);
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

const SHUTTING_DOWN: &str = "this node's transport is shutting down";
const ASKED_TO: &str = "this node closed its connections to the peer";

impl Reader {
    pub(super) fn new(config: ShmConfig, completions: Completions, counters: Arc<Counters>) -> Self {
        Reader {
            config,
            completions,
            counters,
            known: Arc::default(),
            pieces: Arc::default(),
            state: Mutex::default(),
            ended: Condvar::new(),
        }
    }

    pub(super) fn read(self: &Arc<Self>, op: ReadOp) {
        if let Err(reason) = check_landing(&op) {
            return self.complete(op.id, Err(ReadError::Landing(reason)));
        }
        let (id, peer) = (op.id, op.peer);
        let mut state = self.lock();
        let connections = state.threads;
        let entry = state.peers.entry(peer).or_default();
        let (alive, waiting) = entry.alive();
        let error = match alive == 0 && connections >= SHM_CONNECTIONS_MAX {
            _ if state.closing => Some(ReadError::Disconnected(SHUTTING_DOWN.into())),
            true => Some(ReadError::Unreachable(format!("{connections} connections on this machine are enough"))),
            false => None,
        };
        if let Some(error) = error {
            state.forget_if_idle(peer);
            drop(state);
            drop(op);
            return self.complete(id, Err(error));
        }
        state.ops.insert(id, peer);
        let entry = state.peers.entry(peer).or_default();
        entry.queue.push_back(op);
        entry.wake.notify_one();
        let most = self.config.connections_per_peer.clamp(1, SHM_CONNECTIONS_PER_PEER_MAX);
        if entry.queue.len() > waiting && alive < most && connections < SHM_CONNECTIONS_MAX {
            let connection = state.register(peer);
            drop(state);
            self.spawn(peer, connection);
        }
    }

    pub(super) fn cancel(&self, id: OpId) {
        let mut state = self.lock();
        let Some(peer) = state.ops.get(&id).copied() else { return };
        let Some(entry) = state.peers.get_mut(&peer) else { return };
        if let Some(at) = entry.queue.iter().position(|op| op.id == id) {
            let queued = entry.queue.remove(at);
            state.ops.remove(&id);
            drop(state);
            drop(queued);
            return self.complete(id, Err(ReadError::Cancelled));
        }
        if let Some(connection) = entry.connections.values_mut().find(|c| c.under_way == Some(id)) {
            connection.stop(ReadError::Cancelled);
        }
    }

    pub(super) fn disconnect(&self, peer: NodeId) {
        let mut state = self.lock();
        let queue = state.end_peer(peer, ASKED_TO);
        drop(state);
        self.fail(queue, &ReadError::Disconnected(ASKED_TO.into()));
    }

    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        let peers: Vec<NodeId> = state.peers.keys().copied().collect();
        let queues: Vec<ReadOp> = peers.into_iter().flat_map(|peer| state.end_peer(peer, SHUTTING_DOWN)).collect();
        drop(state);
        self.fail(queues, &ReadError::Disconnected(SHUTTING_DOWN.into()));
    }

    pub(super) fn join(&self) {
        let mut state = self.lock();
        while state.threads > 0 {
            state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs between changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete(&self, id: OpId, result: Result<ReadDone, ReadError>) {
        (self.completions)(Completion { id, result });
    }

    fn fail(&self, reads: impl IntoIterator<Item = ReadOp>, error: &ReadError) {
        for read in reads {
            let id = read.id;
            drop(read); // and with it the landing place
            self.complete(id, Err(error.clone()));
        }
    }

    fn spawn(self: &Arc<Self>, peer: NodeId, connection: u64) {
        let worker = Worker { reader: self.clone(), peer, connection };
        let name = format!("aquifer-copy-{connection}");
        let started = thread::Builder::new().name(name).stack_size(THREAD_STACK_BYTES).spawn(move || worker.work());
        if let Err(error) = started {
            tracing::error!("cannot start a thread to read with: {error}"); // and the worker was dropped
        }
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        write!(f, "Reader({} reads of {} peers)", state.ops.len(), state.peers.len())
    }
}

impl State {
    fn register(&mut self, peer: NodeId) -> u64 {
        self.next += 1;
        self.threads += 1;
        self.peers.entry(peer).or_default().connections.insert(self.next, Connection::default());
        self.next
    }

    fn connection(&mut self, peer: NodeId, id: u64) -> Option<&mut Connection> {
        self.peers.get_mut(&peer)?.connections.get_mut(&id)
    }

    /// Takes all queued reads of a peer, which the caller must complete.
    fn drain(&mut self, peer: NodeId) -> VecDeque<ReadOp> {
        let queue = self.peers.get_mut(&peer).map(|entry| std::mem::take(&mut entry.queue)).unwrap_or_default();
        queue.iter().for_each(|op| {
            self.ops.remove(&op.id);
        });
        queue
    }

    /// The queue, if no connection has reached the peer: it will not be reached for those either.
    fn drain_unlinked(&mut self, peer: NodeId) -> VecDeque<ReadOp> {
        match self.peers.get(&peer).is_some_and(|p| p.connections.values().any(|c| c.linked)) {
            true => VecDeque::new(),
            false => self.drain(peer),
        }
    }

    fn end_peer(&mut self, peer: NodeId, reason: &str) -> VecDeque<ReadOp> {
        if let Some(entry) = self.peers.get_mut(&peer) {
            for connection in entry.connections.values_mut() {
                connection.end = true;
                connection.stop(ReadError::Disconnected(reason.into()));
            }
            entry.wake.notify_all();
        }
        self.drain(peer)
    }

    fn forget_if_idle(&mut self, peer: NodeId) {
        if self.peers.get(&peer).is_some_and(|p| p.queue.is_empty() && p.connections.is_empty()) {
            self.peers.remove(&peer);
        }
    }
}

impl Peer {
    /// Connections that take reads, and those of them that wait for one.
    fn alive(&self) -> (usize, usize) {
        let alive = self.connections.values().filter(|c| !c.end);
        alive.fold((0, 0), |(n, w), c| (n + 1, w + usize::from(c.waiting)))
    }
}

/// One connection's thread.
struct Worker {
    reader: Arc<Reader>,
    peer: NodeId,
    connection: u64,
}

impl Worker {
    fn work(&self) {
        let mut link = None;
        while let Some(op) = self.take(link.is_some()) {
            let id = op.id;
            let mut result = self.attempt(&mut link, &op);
            drop(op); // and with it the landing place
            if let Some(stopped) = self.put_down(id) {
                // What it came to by itself before it was stopped is as good.
                result = result.or(Err(stopped));
            }
            if let Err(error @ ReadError::Unreachable(_)) = &result {
                let queued = self.reader.lock().drain_unlinked(self.peer);
                self.reader.fail(queued, error);
            }
            self.reader.complete(id, result);
        }
        if let Some(link) = link {
            link.shut();
        }
    }

    /// The next read. Waits for one if `connected`, for as long as an unused connection is kept. `None`
    /// when this connection is to end; it is then out of the state.
    fn take(&self, connected: bool) -> Option<ReadOp> {
        let deadline = Instant::now() + self.reader.config.idle_timeout;
        let mut state = self.reader.lock();
        loop {
            let entry = state.peers.get_mut(&self.peer)?;
            let wake = entry.wake.clone();
            let connection = entry.connections.get_mut(&self.connection)?;
            connection.waiting = false;
            if !connection.end
                && let Some(op) = entry.queue.pop_front()
            {
                connection.under_way = Some(op.id);
                return Some(op);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if connection.end || !connected || left.is_zero() {
                self.leave(&mut state);
                return None;
            }
            connection.waiting = true;
            state = wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes this connection out of the state.
    fn leave(&self, state: &mut State) {
        if let Some(entry) = state.peers.get_mut(&self.peer) {
            entry.connections.remove(&self.connection);
        }
        state.forget_if_idle(self.peer);
    }

    /// Reads a chunk, over the connection that is there or over a new one.
    fn attempt(&self, link: &mut Option<Link>, op: &ReadOp) -> Result<ReadDone, ReadError> {
        let mut retries = 0;
        loop {
            let open = match link.as_mut() {
                Some(open) => open,
                None => link.insert(self.connect(op)?),
            };
            let loss = match open.read(op, self, &self.reader.counters) {
                Ok(result) => return result,
                Err(loss) => loss,
            };
            open.shut();
            *link = None;
            let begun = self.detach();
            match loss {
                Loss::Stalled => return Err(ReadError::Stalled),
                Loss::Unwanted => return Err(ReadError::Disconnected(ASKED_TO.into())),
                Loss::Broken(_) if !begun && retries < RETRIES_MAX && self.is_wanted() => retries += 1,
                Loss::Broken(reason) => return Err(ReadError::Disconnected(reason)),
            }
        }
    }

    fn connect(&self, op: &ReadOp) -> Result<Link, ReadError> {
        let timeout = self.reader.config.handshake_timeout;
        let mut error = ReadError::Unreachable("the peer announced no socket on this machine".into());
        for path in op.endpoints.iter().filter_map(Endpoint::shm) {
            error = match Link::open(path, &op.access, timeout, self, &self.reader.known, &self.reader.pieces) {
                Ok(link) => {
                    self.reader.counters.connected.fetch_add(1, Ordering::Relaxed);
                    if let Some(connection) = self.reader.lock().connection(self.peer, self.connection) {
                        connection.linked = true;
                    }
                    return Ok(link);
                }
                Err(error @ (ReadError::Refused(_) | ReadError::Disconnected(_))) => return Err(error),
                Err(error) => error,
            };
        }
        Err(error)
    }

    /// Forgets a lost stream; says whether the read's answer had begun.
    fn detach(&self) -> bool {
        let mut state = self.reader.lock();
        let Some(connection) = state.connection(self.peer, self.connection) else { return false };
        connection.stream = None;
        connection.linked = false;
        connection.begun
    }

    /// The read has ended. Why it was to end, if somebody wanted that.
    fn put_down(&self, id: OpId) -> Option<ReadError> {
        let mut state = self.reader.lock();
        state.ops.remove(&id);
        let connection = state.connection(self.peer, self.connection)?;
        connection.under_way = None;
        connection.begun = false;
        connection.stop.take()
    }
}

impl Watch for Worker {
    fn attach(&self, stream: &Arc<UnixStream>) -> Result<(), ReadError> {
        let mut state = self.reader.lock();
        let ended = ReadError::Disconnected(ASKED_TO.into());
        let connection = state.connection(self.peer, self.connection).ok_or(ended)?;
        connection.stream = Some(stream.clone());
        connection.stop.clone().map_or(Ok(()), Err)
    }

    fn begun(&self) {
        if let Some(connection) = self.reader.lock().connection(self.peer, self.connection) {
            connection.begun = true;
        }
    }

    /// The first in the queue, unless another connection may take it.
    fn upcoming(&self) -> Option<Request> {
        let state = self.reader.lock();
        let entry = state.peers.get(&self.peer).filter(|entry| entry.connections.len() == 1)?;
        let op = entry.queue.front().filter(|op| op.adopts)?;
        Some(Request { chunk: op.chunk, lease: op.lease, len: u32::try_from(op.into.len()).ok()? })
    }

    fn is_wanted(&self) -> bool {
        self.reader.lock().connection(self.peer, self.connection).is_some_and(|c| c.stop.is_none())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A thread that ended as it should has left nothing to do here.
        let mut state = self.reader.lock();
        let under_way = state.connection(self.peer, self.connection).and_then(|c| c.under_way.take());
        if let Some(id) = under_way {
            state.ops.remove(&id);
        }
        self.leave(&mut state);
        let served = state.peers.get(&self.peer).is_some_and(|p| p.alive().0 > 0);
        let queued = if served { VecDeque::new() } else { state.drain(self.peer) };
        state.forget_if_idle(self.peer);
        drop(state);
        let error = ReadError::Landing("a thread of the transport could not start, or panicked".into());
        if let Some(id) = under_way {
            self.reader.complete(id, Err(error.clone()));
        }
        self.reader.fail(queued, &error);
        self.reader.lock().threads -= 1;
        self.reader.ended.notify_all();
    }
}
