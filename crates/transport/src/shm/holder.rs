//! The serving side: accepts readers of this machine and tells them where the bytes are.

use super::directory::{Socket, check_user};
use super::slots::Slots;
use super::window::{Room, Window};
use super::wire::{Header, Place, REQUEST_BYTES, Request, SETTLE, send_header};
use super::{Counters, ShmConfig};
use crate::handshake::{Fault, examine};
use crate::limits::{
    ACCEPT_BACKOFF, SEND_PIECE_BYTES, SHM_ACCEPTED_PER_PEER_MAX, SHM_SOCKET_QUEUE_BYTES, THREAD_STACK_BYTES,
};
use crate::socket::{is_timeout, read_exact_by, send};
use crate::{Grants, Refusal};
use aquifer_core::NodeId;
use aquifer_memory::{Mapping, Span};
use rustix::net::sockopt::set_socket_send_buffer_size;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

pub(super) struct Holder {
    config: ShmConfig,
    grants: Arc<dyn Grants>,
    counters: Arc<Counters>,
    socket: Socket,
    room: Room,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    closing: bool,
    next: u64,
    connections: BTreeMap<u64, Arc<UnixStream>>,
    unauthenticated: usize,
    per_peer: BTreeMap<NodeId, usize>,
    threads: usize,
    /// Misbehaviour was logged once.
    scolded: bool,
}

/// Why a connection ended.
enum End {
    /// The reader did what an honest one would not.
    Misbehaved(&'static str),
    /// Our own trouble with the bytes.
    Source(String),
    /// Nothing to speak of.
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

impl Holder {
    pub(super) fn start(
        socket: Socket,
        config: ShmConfig,
        grants: Arc<dyn Grants>,
        counters: Arc<Counters>,
    ) -> io::Result<Arc<Self>> {
        let state = Mutex::new(State { threads: 1, ..State::default() });
        let holder = Arc::new(Holder {
            room: Room::new(config.windows_bytes_max),
            config,
            grants,
            counters,
            socket,
            state,
            ended: Condvar::new(),
        });
        let accepting = holder.clone();
        thread::Builder::new().name("aquifer-shm".into()).stack_size(THREAD_STACK_BYTES).spawn(move || {
            accepting.accept_all();
            accepting.leave();
        })?;
        Ok(holder)
    }

    /// Stops accepting and cuts every connection.
    pub(super) fn close(&self) {
        self.socket.remove();
        let mut state = self.lock();
        state.closing = true;
        // On Linux this wakes accept(2) with EINVAL.
        let _ = rustix::net::shutdown(&self.socket.listener, rustix::net::Shutdown::Both);
        for stream in state.connections.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn join(&self) {
        let mut state = self.lock();
        while state.threads > 0 {
            state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counts and maps change together without anything between that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self) {
        self.lock().threads -= 1;
        self.ended.notify_all();
    }

    fn accept_all(self: &Arc<Self>) {
        loop {
            match self.socket.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(_) if self.lock().closing => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!("cannot accept readers of this machine: {error}");
                    thread::sleep(ACCEPT_BACKOFF);
                }
            }
        }
    }

    /// Starts a thread for a new connection, if there is room for one.
    fn admit(self: &Arc<Self>, stream: UnixStream) {
        let stream = Arc::new(stream);
        let id = {
            let mut state = self.lock();
            let full = state.connections.len() >= self.config.accepted_max
                || state.unauthenticated >= self.config.unauthenticated_max;
            if state.closing {
                return;
            }
            if full {
                self.counters.rejected.fetch_add(1, Ordering::Relaxed);
                return tracing::debug!("no room for another reader of this machine");
            }
            state.next += 1;
            state.unauthenticated += 1;
            state.threads += 1;
            let id = state.next;
            state.connections.insert(id, stream.clone());
            id
        };
        let seat = Seat { holder: self.clone(), id, peer: None, slots: Slots::default(), window: None };
        let serving = move || {
            let mut seat = seat;
            if let Err(end) = seat.serve(&stream) {
                seat.holder.report(end);
            }
            let _ = stream.shutdown(Shutdown::Both);
        };
        let name = format!("aquifer-lend-{id}");
        if let Err(error) = thread::Builder::new().name(name).stack_size(THREAD_STACK_BYTES).spawn(serving) {
            tracing::warn!("cannot start a thread for a reader of this machine: {error}"); // and the seat is dropped
        }
    }

    fn report(&self, end: End) {
        let reason = match end {
            End::Lost(error) => return tracing::debug!("a reader of this machine is gone: {error}"),
            End::Source(reason) => return tracing::warn!("cannot serve a chunk: {reason}"),
            End::Misbehaved(reason) => reason,
        };
        self.counters.rejected.fetch_add(1, Ordering::Relaxed);
        match std::mem::replace(&mut self.lock().scolded, true) {
            false => tracing::warn!("turned a reader of this machine away: {reason}; more of the same is not logged"),
            true => tracing::debug!("turned a reader of this machine away: {reason}"),
        }
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Holder({:?}, {} connections)", self.socket.path(), self.lock().connections.len())
    }
}

/// One connection's place in the holder's counts.
struct Seat {
    holder: Arc<Holder>,
    id: u64,
    /// Known once it has shown a ticket.
    peer: Option<NodeId>,
    slots: Slots,
    window: Option<Window>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.holder.lock();
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
        self.holder.leave();
    }
}

impl Seat {
    fn serve(&mut self, stream: &UnixStream) -> Result<(), End> {
        if check_user(stream).is_err() {
            return Err(End::Misbehaved("it is of another user"));
        }
        stream.set_write_timeout(Some(self.holder.config.write_timeout))?;
        // Best effort: a smaller queue is slower, and no less right.
        let _ = set_socket_send_buffer_size(stream, SHM_SOCKET_QUEUE_BYTES);
        let holder = self.holder.clone();
        let deadline = Instant::now() + holder.config.handshake_timeout;
        let peer = examine(stream, deadline, |ticket| holder.grants.secret(ticket), |peer| self.sit(peer))?;
        loop {
            let mut bytes = [0; REQUEST_BYTES];
            self.hear(stream, &mut bytes)?;
            let request = Request::decode(&bytes).map_err(End::Misbehaved)?;
            if self.answer(stream, peer, request)? {
                self.settle(stream, peer, request)?;
            }
        }
    }

    fn hear(&self, stream: &UnixStream, bytes: &mut [u8]) -> io::Result<()> {
        read_exact_by(stream, bytes, Instant::now() + self.holder.config.accepted_idle_timeout)
    }

    /// Counts the connection as the peer's, unless that has too many.
    fn sit(&mut self, peer: NodeId) -> bool {
        let mut state = self.holder.lock();
        let count = state.per_peer.entry(peer).or_insert(0);
        if *count >= SHM_ACCEPTED_PER_PEER_MAX {
            return false;
        }
        *count += 1;
        state.unauthenticated -= 1;
        self.peer = Some(peer);
        self.holder.counters.accepted.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Says where the bytes are, or why they cannot be had. True if they can.
    fn answer(&mut self, stream: &UnixStream, peer: NodeId, request: Request) -> Result<bool, End> {
        let Request { chunk, lease, len } = request;
        let opened = self.holder.grants.open(peer, lease, chunk).and_then(whole);
        let dropped = self.slots.take_dropped();
        let header = |answer, place| Header { answer, place, chunk, len, dropped };
        let span = match opened {
            Ok(span) if span.len() != u64::from(len) => {
                return Err(End::Misbehaved("it asks for a chunk by the wrong length"));
            }
            Ok(span) => span,
            Err(refusal) => {
                send_header(stream, &header(Err(refusal), Place::Here), None)?;
                return Ok(false);
            }
        };
        match self.lend(&span).map_err(|error| End::Source(format!("{span:?} cannot be read: {error}")))? {
            Some((place, fd)) => send_header(stream, &header(Ok(()), place), fd.as_ref().map(AsFd::as_fd))?,
            None => {
                send_header(stream, &header(Ok(()), Place::Here), None)?;
                self.send_payload(stream, &span)?;
            }
        }
        Ok(true)
    }

    /// Where a reader finds the bytes, and the descriptor it needs for that if it does not have it. What
    /// may not be shared is copied to this connection's window.
    fn lend(&mut self, span: &Span) -> io::Result<Option<(Place, Option<OwnedFd>)>> {
        let (mapping, offset) = span.mapping();
        if let Some(slot) = self.slots.find(mapping) {
            span.prefault(); // a file is read from the disk while its first pages are copied
            return Ok(Some((Place::Slot { slot, offset, fresh: false }, None)));
        }
        match mapping.share() {
            Ok(Some(fd)) => {
                span.prefault();
                return Ok(self.put(mapping, offset, fd));
            }
            Ok(None) => {}
            Err(error) => tracing::debug!("{mapping:?} is copied, not shared: {error}"),
        }
        if self.window.as_ref().is_none_or(|window| window.len() < span.len()) {
            self.window = None; // which makes room for the next
            self.window = self.holder.room.window(span.len());
        }
        let Some(window) = &self.window else { return Ok(None) };
        let mapping = window.fill(span)?;
        if let Some(slot) = self.slots.find(&mapping) {
            return Ok(Some((Place::Slot { slot, offset: 0, fresh: false }, None)));
        }
        Ok(mapping.share()?.and_then(|fd| self.put(&mapping, 0, fd)))
    }

    fn put(&mut self, mapping: &Arc<Mapping>, offset: u64, fd: OwnedFd) -> Option<(Place, Option<OwnedFd>)> {
        let slot = self.slots.put(mapping)?;
        Some((Place::Slot { slot, offset, fresh: true }, Some(fd)))
    }

    fn send_payload(&self, stream: &UnixStream, span: &Span) -> Result<(), End> {
        let mut done = 0;
        while done < span.len() {
            let piece = SEND_PIECE_BYTES.min(span.len() - done);
            done += match send(stream, span, done, piece, false) {
                Ok(sent) => sent,
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    return Err(End::Source(format!("{span:?} was truncated while it was sent")));
                }
                Err(error) if is_timeout(&error) => {
                    return Err(End::Misbehaved("it asks for bytes and does not take them"));
                }
                Err(error) => return Err(error.into()),
            };
        }
        Ok(())
    }

    /// Once the reader has the bytes: whether they were what they should be all the while.
    fn settle(&self, mut stream: &UnixStream, peer: NodeId, request: Request) -> Result<(), End> {
        let mut settle = [0];
        self.hear(stream, &mut settle)?;
        if settle != [SETTLE] {
            return Err(End::Misbehaved("it sent something that does not settle what it was given"));
        }
        let Request { chunk, lease, len } = request;
        self.holder.counters.sent.fetch_add(len.into(), Ordering::Relaxed);
        self.holder.grants.sent(peer, len.into());
        let valid = self.holder.grants.still_valid(peer, lease, chunk);
        Ok(stream.write_all(&[u8::from(valid)])?)
    }
}

/// A chunk whose file is too short by now is gone: better said before its first byte than after.
fn whole(span: Span) -> Result<Span, Refusal> {
    match span.is_backed() {
        Ok(true) => Ok(span),
        Ok(false) | Err(_) => Err(Refusal::Gone),
    }
}
