//! The reading side: queues, and the threads that empty them.
//!
//! A read is in exactly one place at any time: in the queue of its peer, in the hands of one
//! connection's thread, or completed. Whoever takes it out completes it, and no lock is held then.

use super::book::{Connection, Queued, State};
use super::greeting::greet;
use super::link::Link;
use super::pace::Pace;
use super::wire::{HEADER_BYTES, Header, Request};
use super::{Counters, Encryption, TcpConfig};
use crate::limits::{BUSY_DEPTH, PIPELINE_DEPTH, RETRIES_MAX, THREAD_STACK_BYTES};
use crate::pieces::Pieces;
use crate::socket::{Timed, is_timeout};
use crate::tls::Tls;
use crate::{Completion, Endpoint, OpId, ReadDone, ReadError, ReadOp, check_landing};
use aquifer_core::{Access, ChunkHash, Hash, NodeId};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

type Completions = Box<dyn Fn(Completion) + Send + Sync>;

pub(super) struct Reader {
    config: TcpConfig,
    /// None: this node speaks no TLS.
    tls: Option<Tls>,
    completions: Completions,
    counters: Arc<Counters>,
    pieces: Arc<Pieces>,
    state: Mutex<State>,
    /// Told when a thread ends.
    ended: Condvar,
}

const SHUTTING_DOWN: &str = "this node's transport is shutting down";
const ASKED_TO: &str = "this node closed its connections to the peer";

impl Reader {
    pub(super) fn new(config: TcpConfig, tls: Option<Tls>, completions: Completions, counters: Arc<Counters>) -> Self {
        let (pieces, state) = (Arc::default(), Mutex::default());
        Reader { config, tls, completions, counters, pieces, state, ended: Condvar::new() }
    }

    pub(super) fn read(self: &Arc<Self>, op: ReadOp) {
        if let Err(reason) = check_landing(&op) {
            return self.complete(op.id, Err(ReadError::Landing(reason)));
        }
        let (id, peer) = (op.id, op.peer);
        let mut state = self.lock();
        if state.closing {
            drop(state);
            return self.complete(id, Err(ReadError::Disconnected(SHUTTING_DOWN.into())));
        }
        state.ops.insert(id, peer);
        let entry = state.peers.entry(peer).or_default();
        entry.queue.push_back(Queued { op, retries: 0 });
        entry.wake.notify_one();
        self.connect_if_wanted(peer, state);
    }

    /// Opens another connection to the peer, if that is of use.
    fn connect_if_wanted(self: &Arc<Self>, peer: NodeId, mut state: MutexGuard<'_, State>) {
        if state.peers.get(&peer).is_some_and(|entry| entry.wants_connection(&self.config)) {
            let thread = state.register(peer);
            drop(state);
            self.spawn(peer, thread);
        }
    }

    pub(super) fn cancel(&self, id: OpId) {
        let mut state = self.lock();
        let Some(peer) = state.ops.get(&id).copied() else { return };
        let Some(entry) = state.peers.get_mut(&peer) else { return };
        if let Some(at) = entry.queue.iter().position(|q| q.op.id == id) {
            let queued = entry.queue.remove(at);
            state.ops.remove(&id);
            drop(state);
            drop(queued);
            return self.complete(id, Err(ReadError::Cancelled));
        }
        if let Some(connection) = entry.connections.values_mut().find(|c| c.under_way.contains(&id)) {
            connection.cancelled.insert(id);
            connection.cut = true;
            connection.shut();
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
        let queues: Vec<Queued> = peers.into_iter().flat_map(|peer| state.end_peer(peer, SHUTTING_DOWN)).collect();
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

    fn fail(&self, reads: impl IntoIterator<Item = Queued>, error: &ReadError) {
        for read in reads {
            let id = read.op.id;
            drop(read); // and with it the landing place
            self.complete(id, Err(error.clone()));
        }
    }

    fn spawn(self: &Arc<Self>, peer: NodeId, connection: u64) {
        let mut worker = Worker {
            reader: self.clone(),
            peer,
            connection,
            under_way: VecDeque::new(),
            last: Instant::now(),
            received: 0,
            busy: false,
            pace: None,
        };
        let name = format!("aquifer-read-{connection}");
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

/// Where to connect to.
#[derive(Clone, Copy)]
struct Target {
    address: SocketAddr,
    /// The holder takes nothing else.
    encrypted: bool,
}

impl Target {
    fn of(endpoint: &Endpoint) -> Option<Self> {
        match endpoint {
            Endpoint::Tcp(address) => Some(Target { address: *address, encrypted: false }),
            Endpoint::Tls(address) => Some(Target { address: *address, encrypted: true }),
            Endpoint::Shm(_) | Endpoint::Rdma(_) => None,
        }
    }
}

/// One connection's thread.
struct Worker {
    reader: Arc<Reader>,
    peer: NodeId,
    connection: u64,
    /// Asked for and not answered yet, in that order.
    under_way: VecDeque<Flight>,
    /// When the last answer ended.
    last: Instant,
    /// Bytes, since the thread began.
    received: u64,
    /// As others see it: see [`Connection::busy`].
    busy: bool,
    /// Since when it has been received without a break.
    pace: Option<Pace>,
}

struct Flight {
    read: Queued,
    asked: Instant,
    /// Its answer has begun.
    begun: bool,
}

/// Why a connection cannot be used any more.
enum Loss {
    /// Nothing to do for a while, or told to end: nobody's fault.
    Unneeded,
    /// No byte for as long as the first read wanted to wait.
    Stalled,
    Broken(String),
}

impl From<io::Error> for Loss {
    fn from(error: io::Error) -> Self {
        match is_timeout(&error) {
            true => Loss::Stalled,
            false => Loss::Broken(error.to_string()),
        }
    }
}

/// What a wait ended with.
enum Waited {
    Work,
    Unneeded,
}

impl Worker {
    fn work(&mut self) {
        while let Some((stream, link)) = self.connect() {
            let loss = match self.run(&link) {
                Ok(()) => Loss::Unneeded,
                Err(loss) => loss,
            };
            let _ = stream.shutdown(Shutdown::Both);
            self.settle(&loss);
        }
    }

    /// Connects to the peer, for as long as reads are queued. `None` if there is nothing to do.
    fn connect(&mut self) -> Option<(Arc<TcpStream>, Link)> {
        loop {
            let (access, endpoints) = self.next_target()?;
            match self.try_endpoints(&access, &endpoints) {
                Ok(connected) => {
                    self.reader.counters.connected.fetch_add(1, Ordering::Relaxed);
                    return Some(connected);
                }
                Err(ReadError::Refused(refusal)) => {
                    let same = |q: &Queued| q.op.access == access;
                    let reads = self.reader.lock().drain(self.peer, same);
                    self.reader.fail(reads, &ReadError::Refused(refusal));
                }
                Err(error) => {
                    let reads = self.leave_and_drain();
                    self.reader.fail(reads, &error);
                    return None;
                }
            }
        }
    }

    /// The first queued read's way in. Leaves, if there is none or the connection must end.
    fn next_target(&mut self) -> Option<(Access, Vec<Target>)> {
        let mut state = self.reader.lock();
        let ended = state.connection(self.peer, self.connection).is_none_or(|c| c.end.is_some());
        let first = state.peers.get(&self.peer).and_then(|p| p.queue.front());
        let addresses = |op: &ReadOp| op.endpoints.iter().filter_map(Target::of).collect();
        let target = first.filter(|_| !ended).map(|q| (q.op.access.clone(), addresses(&q.op)));
        if target.is_none() {
            self.leave(&mut state);
        }
        let (access, mut endpoints): (_, Vec<Target>) = target?;
        if let Some(reached) = state.peers.get(&self.peer).and_then(|p| p.reached)
            && let Some(at) = endpoints.iter().position(|e| e.address == reached)
        {
            endpoints[..=at].rotate_right(1);
        }
        Some((access, endpoints))
    }

    fn leave_and_drain(&mut self) -> Vec<Queued> {
        let mut state = self.reader.lock();
        self.leave(&mut state);
        let reads = state.drain_unserved(self.peer);
        state.forget_if_idle(self.peer);
        reads
    }

    /// Takes this connection out of the state. If reads are queued that nobody else serves, the
    /// caller must see to them.
    fn leave(&self, state: &mut State) {
        if let Some(entry) = state.peers.get_mut(&self.peer) {
            entry.connections.remove(&self.connection);
        }
        state.forget_if_idle(self.peer);
    }

    fn try_endpoints(&self, access: &Access, endpoints: &[Target]) -> Result<(Arc<TcpStream>, Link), ReadError> {
        let mut failures = Vec::new();
        for endpoint in endpoints {
            match self.try_endpoint(access, *endpoint) {
                Ok(connected) => return Ok(connected),
                Err(error @ (ReadError::Refused(_) | ReadError::Disconnected(_))) => return Err(error),
                Err(error) => failures.push(format!("{}: {error}", endpoint.address)),
            }
        }
        match failures.is_empty() {
            true => Err(ReadError::Unreachable("the peer announced no endpoint for this transport".into())),
            false => Err(ReadError::Unreachable(failures.join("; "))),
        }
    }

    fn try_endpoint(&self, access: &Access, target: Target) -> Result<(Arc<TcpStream>, Link), ReadError> {
        let failed = |error: io::Error| ReadError::Unreachable(error.to_string());
        let Reader { config, tls, .. } = &*self.reader;
        let tls = match config.encryption == Encryption::Tls || target.encrypted {
            true => {
                Some(tls.as_ref().ok_or(ReadError::Unreachable("it demands TLS, which is not set up here".into()))?)
            }
            false => None,
        };
        let stream = TcpStream::connect_timeout(&target.address, config.connect_timeout).map_err(failed)?;
        let stream = Arc::new(stream);
        self.attach(&stream, target.address)?;
        let link = greet(&stream, tls, (self.peer, access), config.handshake_timeout)?;
        Ok((stream, link))
    }

    /// Lets others cut the stream. Fails if the connection was ended meanwhile.
    fn attach(&self, stream: &Arc<TcpStream>, endpoint: SocketAddr) -> Result<(), ReadError> {
        let mut state = self.reader.lock();
        if let Some(entry) = state.peers.get_mut(&self.peer) {
            entry.reached = Some(endpoint);
        }
        let ended = ReadError::Disconnected(ASKED_TO.into());
        let connection = state.connection(self.peer, self.connection).ok_or(ended.clone())?;
        connection.cut = false;
        connection.stream = Some(stream.clone());
        match connection.end {
            Some(_) => Err(ended),
            None => Ok(()),
        }
    }

    fn run(&mut self, link: &Link) -> Result<(), Loss> {
        loop {
            self.ask(link)?;
            if !self.under_way.is_empty() {
                self.receive_next(link)?;
                self.look_at_pace();
            } else {
                self.pace = None;
                if matches!(self.wait(), Waited::Unneeded) {
                    return Ok(());
                }
            }
        }
    }

    /// Sends requests while there are any and the pipeline has room.
    fn ask(&mut self, mut link: &Link) -> Result<(), Loss> {
        let depth = if self.busy { BUSY_DEPTH } else { PIPELINE_DEPTH };
        while self.under_way.len() < depth {
            let Some(read) = self.take_queued() else { return Ok(()) };
            let ReadOp { chunk, lease, .. } = read.op;
            let len = u32::try_from(read.op.into.len()).unwrap_or(u32::MAX); // checked when it was submitted
            self.under_way.push_back(Flight { read, asked: Instant::now(), begun: false });
            link.write_all(&Request { chunk, lease, len }.encode())?;
        }
        Ok(())
    }

    /// Where this thread is what is slow, another takes a share of what is queued.
    fn look_at_pace(&mut self) {
        let bytes = self.received;
        let Some(busy) = self.pace.get_or_insert_with(|| Pace::begin(bytes)).busy(bytes) else { return };
        self.pace = None;
        self.busy = busy;
        let mut state = self.reader.lock();
        if let Some(connection) = state.connection(self.peer, self.connection) {
            connection.busy = busy;
        }
        self.reader.connect_if_wanted(self.peer, state);
    }

    fn take_queued(&self) -> Option<Queued> {
        let mut state = self.reader.lock();
        let entry = state.peers.get_mut(&self.peer)?;
        let connection = entry.connections.get_mut(&self.connection)?;
        if connection.end.is_some() || connection.cut {
            return None;
        }
        let read = entry.queue.pop_front()?;
        connection.under_way.insert(read.op.id);
        Some(read)
    }

    fn wait(&self) -> Waited {
        let deadline = Instant::now() + self.reader.config.idle_timeout;
        let mut state = self.reader.lock();
        loop {
            let Some(entry) = state.peers.get_mut(&self.peer) else { return Waited::Unneeded };
            let (wake, queued) = (entry.wake.clone(), !entry.queue.is_empty());
            let Some(connection) = entry.connections.get_mut(&self.connection) else { return Waited::Unneeded };
            connection.waiting = false;
            let left = deadline.saturating_duration_since(Instant::now());
            if connection.end.is_some() || connection.cut {
                return Waited::Unneeded;
            }
            if queued {
                return Waited::Work;
            }
            if left.is_zero() {
                return Waited::Unneeded;
            }
            connection.waiting = true;
            state = wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Receives the answer to the oldest request and completes its read.
    fn receive_next(&mut self, link: &Link) -> Result<(), Loss> {
        let result = self.receive_answer(link)?;
        self.complete_front(result);
        Ok(())
    }

    fn receive_answer(&mut self, mut link: &Link) -> Result<Result<ReadDone, ReadError>, Loss> {
        let Some(flight) = self.under_way.front() else { return Err(Loss::Unneeded) };
        let op = flight.read.op.clone();
        let turn = flight.asked.max(self.last);
        link.set_read_timeout(Some(op.stall.max(Duration::from_millis(1))))?;
        let mut header = [0; HEADER_BYTES];
        link.read_exact(&mut header)?;
        let header = Header::decode(&header).map_err(|reason| Loss::Broken(reason.into()))?;
        if header.chunk != op.chunk || u64::from(header.len) != op.into.len() {
            return Err(Loss::Broken("it answered a request that was not made".into()));
        }
        if let Err(refusal) = header.answer {
            return Ok(Err(ReadError::Refused(refusal)));
        }
        if let Some(flight) = self.under_way.front_mut() {
            flight.begun = true;
        }
        let digest = self.receive_payload(link, &op)?;
        let mut trailer = [0];
        link.read_exact(&mut trailer)?;
        match trailer {
            [0] => Ok(Err(ReadError::Revoked)),
            [1] => Ok(Ok(ReadDone { digest, bytes: op.into.len(), elapsed: turn.elapsed(), adopted: None })),
            _ => Err(Loss::Broken("its answer ended with an unknown status".into())),
        }
    }

    fn receive_payload(&mut self, link: &Link, op: &ReadOp) -> Result<ChunkHash, Loss> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = self.reader.pieces.take();
        let mut landed = 0;
        while landed < op.into.len() {
            let left = usize::try_from(op.into.len() - landed).unwrap_or(usize::MAX);
            let n = left.min(buffer.len());
            let piece = &mut buffer[..n];
            self.fill_piece(link, piece)?;
            hasher.update(piece);
            op.into.write_past_caches(landed, piece)?;
            landed += n as u64;
            self.ask(link)?;
        }
        Ok(ChunkHash(Hash(*hasher.finalize().as_bytes())))
    }

    fn fill_piece(&mut self, mut link: &Link, piece: &mut [u8]) -> Result<(), Loss> {
        let mut got = 0;
        while got < piece.len() {
            match link.read(&mut piece[got..]) {
                Ok(0) => return Err(Loss::Broken("it closed the connection in the middle of a chunk".into())),
                Ok(n) => {
                    got += n;
                    self.received += n as u64;
                    self.reader.counters.received.fetch_add(n as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn complete_front(&mut self, result: Result<ReadDone, ReadError>) {
        self.last = Instant::now();
        let Some(flight) = self.under_way.pop_front() else { return };
        let id = flight.read.op.id;
        drop(flight);
        let mut state = self.reader.lock();
        state.ops.remove(&id);
        if let Some(connection) = state.connection(self.peer, self.connection) {
            connection.under_way.remove(&id);
            connection.cancelled.remove(&id);
        }
        drop(state);
        self.reader.complete(id, result);
    }

    /// After the connection was lost: decides for each read under way whether it goes back to the
    /// queue or ends.
    fn settle(&mut self, loss: &Loss) {
        let flights = std::mem::take(&mut self.under_way);
        let mut state = self.reader.lock();
        let connection = state.connection(self.peer, self.connection).map(std::mem::take).unwrap_or_default();
        let mut ended = Vec::new();
        let mut again = Vec::new();
        for (at, flight) in flights.into_iter().enumerate() {
            match verdict(&flight, at == 0, &connection, loss) {
                Some(error) => {
                    state.ops.remove(&flight.read.op.id);
                    ended.push((flight.read.op.id, error));
                }
                None => again.push(Queued { retries: flight.read.retries + u8::from(!connection.cut), ..flight.read }),
            }
        }
        if let Some(own) = state.connection(self.peer, self.connection) {
            own.end = connection.end;
        }
        if let Some(entry) = state.peers.get_mut(&self.peer) {
            again.into_iter().rev().for_each(|read| entry.queue.push_front(read));
        }
        drop(state);
        for (id, error) in ended {
            self.reader.complete(id, Err(error));
        }
    }
}

/// How a read ends that was under way on a lost connection; `None` if it may try another.
/// The first is the one whose patience ran out, where that is the loss; those behind it may be younger.
fn verdict(flight: &Flight, first: bool, connection: &Connection, loss: &Loss) -> Option<ReadError> {
    let op = &flight.read.op;
    if connection.cancelled.contains(&op.id) {
        return Some(ReadError::Cancelled);
    }
    if let Some(reason) = connection.end {
        return Some(ReadError::Disconnected(reason.into()));
    }
    if connection.cut {
        return None;
    }
    match loss {
        Loss::Stalled if first || flight.asked.elapsed() >= op.stall => Some(ReadError::Stalled),
        Loss::Broken(reason) if flight.begun || flight.read.retries >= RETRIES_MAX => {
            Some(ReadError::Disconnected(reason.clone()))
        }
        Loss::Stalled | Loss::Broken(_) | Loss::Unneeded => None,
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A thread that ended as it should has left nothing to do here.
        let flights = std::mem::take(&mut self.under_way);
        let mut state = self.reader.lock();
        flights.iter().for_each(|f| {
            state.ops.remove(&f.read.op.id);
        });
        self.leave(&mut state);
        let queued = state.drain_unserved(self.peer);
        state.forget_if_idle(self.peer);
        drop(state);
        let error = ReadError::Landing("a thread of the transport could not start, or panicked".into());
        self.reader.fail(flights.into_iter().map(|f| f.read).chain(queued), &error);
        self.reader.lock().threads -= 1;
        self.reader.ended.notify_all();
    }
}
