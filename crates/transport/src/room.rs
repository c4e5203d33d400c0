//! The room for those who connect: a bounded number, counted by peer once they have proved who they
//! are, each on a thread of its own.

use crate::handshake::Fault;
use crate::limits::{ACCEPT_BACKOFF, SCOLDED_MAX, THREAD_STACK_BYTES};
use aquifer_core::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// What people connect to.
pub trait Listener: Send + Sync + 'static {
    type Stream: Send + Sync + 'static;
    /// Waits for the next connection, and says where it is from, if that is anywhere else than here.
    fn accept(&self) -> io::Result<(Self::Stream, Option<SocketAddr>)>;
    /// Ends every `accept`, now and later, with an error.
    fn close(&self);
    /// Ends whatever waits for the stream, at both ends.
    fn cut(stream: &Self::Stream);
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    fn accept(&self) -> io::Result<(TcpStream, Option<SocketAddr>)> {
        TcpListener::accept(self).map(|(stream, from)| (stream, Some(from)))
    }

    fn close(&self) {
        // On Linux this wakes accept(2) with EINVAL.
        let _ = rustix::net::shutdown(self, rustix::net::Shutdown::Both);
    }

    fn cut(stream: &TcpStream) {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// How many may come, and what they are called.
#[derive(Clone, Copy, Debug)]
pub struct RoomTerms {
    pub accepted_max: usize,
    /// Of those without a valid ticket.
    pub unauthenticated_max: usize,
    pub per_peer_max: usize,
    /// One of them, for logs: `a data connection`.
    pub what: &'static str,
    /// What the threads' names begin with.
    pub threads: &'static str,
}

/// Why a connection ended, other than by the reader's wish.
#[derive(Debug)]
pub enum End {
    /// The reader did what an honest one would not.
    Misbehaved(&'static str),
    /// This machine's own trouble.
    Own(String),
    /// The network's, or nothing to speak of.
    Lost(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        End::Lost(error)
    }
}

impl From<Fault> for End {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Misbehaved(reason) => End::Misbehaved(reason),
            Fault::Lost(error) => End::Lost(error),
        }
    }
}

/// See the module.
pub struct Room<L: Listener> {
    listener: L,
    terms: RoomTerms,
    accepted: AtomicU64,
    rejected: AtomicU64,
    state: Mutex<State<L::Stream>>,
    /// Told when a thread ends.
    ended: Condvar,
}

struct State<S> {
    closing: bool,
    next: u64,
    connections: BTreeMap<u64, Arc<S>>,
    unauthenticated: usize,
    per_peer: BTreeMap<NodeId, usize>,
    /// Whose misbehaviour was logged. `None`: somebody's of this machine.
    scolded: BTreeSet<Option<IpAddr>>,
    threads: usize,
}

impl<L: Listener> Room<L> {
    /// Accepts on a thread of its own, and has `serve` serve each connection until that returns.
    pub fn open<F>(listener: L, terms: RoomTerms, serve: F) -> io::Result<Arc<Self>>
    where
        F: Fn(&mut Seat<L>, &Arc<L::Stream>) -> Result<(), End> + Send + Sync + 'static,
    {
        let state = State {
            closing: false,
            next: 0,
            connections: BTreeMap::new(),
            unauthenticated: 0,
            per_peer: BTreeMap::new(),
            scolded: BTreeSet::new(),
            threads: 1,
        };
        let (accepted, rejected) = (AtomicU64::new(0), AtomicU64::new(0));
        let room =
            Arc::new(Room { listener, terms, accepted, rejected, state: Mutex::new(state), ended: Condvar::new() });
        let accepting = room.clone();
        let name = format!("{}-in", terms.threads);
        thread::Builder::new().name(name).stack_size(THREAD_STACK_BYTES).spawn(move || {
            accepting.accept_all(&Arc::new(serve));
            accepting.leave();
        })?;
        Ok(room)
    }

    /// Stops accepting and cuts every connection.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        self.listener.close();
        state.connections.values().for_each(|stream| L::cut(stream));
    }

    /// Waits for the threads.
    pub fn join(&self) {
        let mut state = self.lock();
        while state.threads > 0 {
            state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Connections that proved whose they are, since the start.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Connections turned away or ended for what the other side did, since the start.
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    pub fn listener(&self) -> &L {
        &self.listener
    }

    fn lock(&self) -> MutexGuard<'_, State<L::Stream>> {
        // Counts and maps change together without anything between that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self) {
        self.lock().threads -= 1;
        self.ended.notify_all();
    }

    fn accept_all<F>(self: &Arc<Self>, serve: &Arc<F>)
    where
        F: Fn(&mut Seat<L>, &Arc<L::Stream>) -> Result<(), End> + Send + Sync + 'static,
    {
        loop {
            match self.listener.accept() {
                Ok((stream, from)) => self.admit(stream, from, serve),
                Err(_) if self.lock().closing => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!("cannot accept {}: {error}", self.terms.what);
                    thread::sleep(ACCEPT_BACKOFF);
                }
            }
        }
    }

    /// Starts a thread for a new connection, if there is room for one.
    fn admit<F>(self: &Arc<Self>, stream: L::Stream, from: Option<SocketAddr>, serve: &Arc<F>)
    where
        F: Fn(&mut Seat<L>, &Arc<L::Stream>) -> Result<(), End> + Send + Sync + 'static,
    {
        let stream = Arc::new(stream);
        let Some(id) = self.seat(&stream) else {
            self.rejected.fetch_add(1, Ordering::Relaxed);
            return tracing::debug!("no room for {}", self.called(from));
        };
        let (mut seat, serve) = (Seat { room: self.clone(), id, peer: None }, serve.clone());
        let serving = move || {
            if let Err(end) = serve(&mut seat, &stream) {
                seat.room.report(from, end);
            }
            L::cut(&stream);
        };
        let name = format!("{}-{id}", self.terms.threads);
        if let Err(error) = thread::Builder::new().name(name).stack_size(THREAD_STACK_BYTES).spawn(serving) {
            tracing::warn!("cannot start a thread for {}: {error}", self.called(from)); // and the seat is dropped
        }
    }

    fn seat(&self, stream: &Arc<L::Stream>) -> Option<u64> {
        let mut state = self.lock();
        let full = state.connections.len() >= self.terms.accepted_max
            || state.unauthenticated >= self.terms.unauthenticated_max;
        if full || state.closing {
            return None;
        }
        state.next += 1;
        state.unauthenticated += 1;
        state.threads += 1;
        let id = state.next;
        state.connections.insert(id, stream.clone());
        Some(id)
    }

    fn called(&self, from: Option<SocketAddr>) -> String {
        let what = self.terms.what;
        from.map_or_else(|| what.into(), |from| format!("{what} from {from}"))
    }

    fn report(&self, from: Option<SocketAddr>, end: End) {
        let what = self.called(from);
        let reason = match end {
            End::Lost(error) => return tracing::debug!("{what} ended: {error}"),
            End::Own(reason) => return tracing::warn!("cannot serve {what}: {reason}"),
            End::Misbehaved(reason) => reason,
        };
        self.rejected.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        let first = state.scolded.len() < SCOLDED_MAX && state.scolded.insert(from.map(|from| from.ip()));
        drop(state);
        match first {
            true => tracing::warn!("closed {what}: {reason}; more of the same is not logged"),
            false => tracing::debug!("closed {what}: {reason}"),
        }
    }
}

impl<L: Listener> fmt::Debug for Room<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Room({} connections)", self.lock().connections.len())
    }
}

/// One connection's place in the room.
pub struct Seat<L: Listener> {
    room: Arc<Room<L>>,
    id: u64,
    /// Known once it has shown a ticket.
    peer: Option<NodeId>,
}

impl<L: Listener> Seat<L> {
    /// Counts the connection as the peer's, unless that has too many.
    pub fn sit(&mut self, peer: NodeId) -> bool {
        let mut state = self.room.lock();
        let count = state.per_peer.entry(peer).or_insert(0);
        if *count >= self.room.terms.per_peer_max || self.peer.is_some() {
            return false;
        }
        *count += 1;
        state.unauthenticated -= 1;
        self.peer = Some(peer);
        self.room.accepted.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Whether the room is closing, and so whatever fails now is no wonder.
    pub fn is_closing(&self) -> bool {
        self.room.lock().closing
    }
}

impl<L: Listener> Drop for Seat<L> {
    fn drop(&mut self) {
        let mut state = self.room.lock();
        state.connections.remove(&self.id);
        match self.peer {
            None => state.unauthenticated -= 1,
            Some(peer) => {
                let count = state.per_peer.entry(peer).or_insert(1);
                *count -= 1;
                if *count == 0 {
                    state.per_peer.remove(&peer);
                }
            }
        }
        drop(state);
        self.room.leave();
    }
}

impl<L: Listener> fmt::Debug for Seat<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seat({}, {:?})", self.id, self.peer)
    }
}
