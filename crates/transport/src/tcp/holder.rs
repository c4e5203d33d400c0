//! The serving side: accepts readers and sends what they were granted.

use super::link::{Link, speaks_tls};
use super::wire::{Header, REQUEST_BYTES, Request};
use super::{Counters, Encryption, TcpConfig};
use crate::handshake::{Fault, Handshake, examine, turn_away};
use crate::limits::{ACCEPT_BACKOFF, ACCEPTED_PER_PEER_MAX, SCOLDED_MAX, SEND_PIECE_BYTES, THREAD_STACK_BYTES};
use crate::socket::{is_timeout, read_exact_by};
use crate::tls::Tls;
use crate::{Grants, Refusal};
use aquifer_core::NodeId;
use aquifer_memory::Span;
use rustix::net::Shutdown;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

pub(super) struct Holder {
    config: TcpConfig,
    /// None: this node speaks no TLS.
    tls: Option<Tls>,
    grants: Arc<dyn Grants>,
    counters: Arc<Counters>,
    listener: TcpListener,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    closing: bool,
    next: u64,
    connections: BTreeMap<u64, Arc<TcpStream>>,
    unauthenticated: usize,
    per_peer: BTreeMap<NodeId, usize>,
    /// Who misbehaved and was logged.
    scolded: BTreeSet<IpAddr>,
    threads: usize,
}

/// Why a connection ended, other than by the reader's wish.
enum End {
    /// The reader did what an honest one would not.
    Misbehaved(&'static str),
    /// Our own trouble with the bytes.
    Source(String),
    /// The network's, or nothing to speak of.
    Lost(io::Error),
    Closing,
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
        listener: TcpListener,
        config: TcpConfig,
        tls: Option<Tls>,
        grants: Arc<dyn Grants>,
        counters: Arc<Counters>,
    ) -> io::Result<Arc<Self>> {
        let state = Mutex::new(State { threads: 1, ..State::default() });
        let holder = Arc::new(Holder { config, tls, grants, counters, listener, state, ended: Condvar::new() });
        let accepting = holder.clone();
        thread::Builder::new().name("aquifer-accept".into()).stack_size(THREAD_STACK_BYTES).spawn(move || {
            accepting.accept_all();
            accepting.leave();
        })?;
        Ok(holder)
    }

    /// Stops accepting and cuts every connection.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        // On Linux this wakes accept(2) with EINVAL.
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        for stream in state.connections.values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
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
            match self.listener.accept() {
                Ok((stream, from)) => self.admit(stream, from),
                Err(_) if self.lock().closing => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!("cannot accept data connections: {error}");
                    thread::sleep(ACCEPT_BACKOFF);
                }
            }
        }
    }

    /// Starts a thread for a new connection, if there is room for one.
    fn admit(self: &Arc<Self>, stream: TcpStream, from: SocketAddr) {
        let stream = Arc::new(stream);
        let id = {
            let mut state = self.lock();
            let full = state.connections.len() >= self.config.accepted_max
                || state.unauthenticated >= self.config.unauthenticated_max;
            if full || state.closing {
                self.counters.rejected.fetch_add(1, Ordering::Relaxed);
                tracing::debug!("no room for a data connection from {from}");
                return;
            }
            state.next += 1;
            state.unauthenticated += 1;
            state.threads += 1;
            let id = state.next;
            state.connections.insert(id, stream.clone());
            id
        };
        let seat = Seat { holder: self.clone(), id, peer: None };
        let serving = move || {
            let mut seat = seat;
            if let Err(end) = seat.serve(&stream) {
                seat.holder.report(from, end);
            }
            let _ = stream.shutdown(std::net::Shutdown::Both);
        };
        let name = format!("aquifer-send-{id}");
        if let Err(error) = thread::Builder::new().name(name).stack_size(THREAD_STACK_BYTES).spawn(serving) {
            tracing::warn!("cannot start a thread for a data connection: {error}"); // and the seat is dropped
        }
    }

    fn report(&self, from: SocketAddr, end: End) {
        let reason: &dyn fmt::Display = match &end {
            End::Closing => return,
            End::Lost(error) => return tracing::debug!("data connection from {from} ended: {error}"),
            End::Source(reason) => return tracing::warn!("cannot serve a chunk: {reason}"),
            End::Misbehaved(reason) => reason,
        };
        self.counters.rejected.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        let first = state.scolded.len() < SCOLDED_MAX && state.scolded.insert(from.ip());
        drop(state);
        match first {
            true => tracing::warn!("closed a data connection from {from}: {reason}; more of the same is not logged"),
            false => tracing::debug!("closed a data connection from {from}: {reason}"),
        }
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Holder({} connections)", self.lock().connections.len())
    }
}

/// One connection's place in the holder's counts.
struct Seat {
    holder: Arc<Holder>,
    id: u64,
    /// Known once it has shown a ticket.
    peer: Option<NodeId>,
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
    fn serve(&mut self, stream: &Arc<TcpStream>) -> Result<(), End> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(self.holder.config.write_timeout))?;
        let (link, peer) = self.handshake(stream)?;
        loop {
            let mut bytes = [0; REQUEST_BYTES];
            let deadline = Instant::now() + self.holder.config.accepted_idle_timeout;
            read_exact_by(&link, &mut bytes, deadline)?;
            let request = Request::decode(&bytes).map_err(End::Misbehaved)?;
            self.answer(&link, peer, request)?;
        }
    }

    fn handshake(&mut self, stream: &Arc<TcpStream>) -> Result<(Link, NodeId), End> {
        let holder = self.holder.clone();
        let deadline = Instant::now() + holder.config.handshake_timeout;
        let link = match &holder.tls {
            Some(tls) if speaks_tls(stream, deadline).map_err(Fault::from)? => {
                Link::from_anybody(stream.clone(), tls, deadline).map_err(unproved)?
            }
            _ if holder.config.encryption == Encryption::Tls => {
                turn_away(&**stream, deadline, Handshake::Plain).map_err(Fault::from)?;
                return Err(End::Misbehaved(
                    "it does not encrypt; with data-encryption = \"tls\" this node takes no other",
                ));
            }
            _ => Link::plain(stream.clone()),
        };
        // A ticket is good for the node it was given to: over TLS that node has proved who it is.
        let of_the_peer = |(node, _): &(NodeId, [u8; 32])| link.peer().is_none_or(|peer| peer == *node);
        let secret = |ticket| holder.grants.secret(ticket).filter(of_the_peer);
        let peer = examine(&link, deadline, secret, |peer| self.sit(peer))?;
        Ok((link, peer))
    }

    /// Counts the connection as the peer's, unless that has too many.
    fn sit(&mut self, peer: NodeId) -> bool {
        let mut state = self.holder.lock();
        let count = state.per_peer.entry(peer).or_insert(0);
        if *count >= ACCEPTED_PER_PEER_MAX {
            return false;
        }
        *count += 1;
        state.unauthenticated -= 1;
        self.peer = Some(peer);
        self.holder.counters.accepted.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn answer(&self, mut link: &Link, peer: NodeId, request: Request) -> Result<(), End> {
        let Request { chunk, lease, len } = request;
        let opened = self.holder.grants.open(peer, lease, chunk).and_then(whole);
        let span = match opened {
            Ok(span) if span.len() != u64::from(len) => {
                return Err(End::Misbehaved("it asks for a chunk by the wrong length"));
            }
            Ok(span) => span,
            Err(refusal) => return Ok(link.write_all(&Header { answer: Err(refusal), chunk, len }.encode())?),
        };
        if !span.is_writable() {
            span.prefault(); // a file: its pages are read from the disk while the first are sent
        }
        link.send_before(&Header { answer: Ok(()), chunk, len }.encode())?;
        self.send_payload(link, peer, &span)?;
        let valid = self.holder.grants.still_valid(peer, lease, chunk);
        Ok(link.write_all(&[u8::from(valid)])?)
    }

    fn send_payload(&self, link: &Link, peer: NodeId, span: &Span) -> Result<(), End> {
        let mut done = 0;
        while done < span.len() {
            let piece = SEND_PIECE_BYTES.min(span.len() - done);
            let sent = match link.send(span, done, piece) {
                Ok(sent) => sent,
                Err(_) if self.holder.lock().closing => return Err(End::Closing),
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    return Err(End::Source(format!("{span:?} was truncated while it was sent")));
                }
                Err(error) if is_timeout(&error) => {
                    return Err(End::Misbehaved("it asks for bytes and does not take them"));
                }
                Err(error) => return Err(error.into()),
            };
            done += sent;
            self.holder.counters.sent.fetch_add(sent, Ordering::Relaxed);
            self.holder.grants.sent(peer, sent);
        }
        Ok(())
    }
}

/// How a TLS handshake ended that did not succeed.
fn unproved(error: io::Error) -> End {
    match error.kind() == io::ErrorKind::InvalidData {
        true => End::Misbehaved("its TLS is not that of a node of this mesh"),
        false => Fault::from(error).into(),
    }
}

/// A chunk whose file is too short by now is gone: better said before its first byte than after.
fn whole(span: Span) -> Result<Span, Refusal> {
    match span.is_backed() {
        Ok(true) => Ok(span),
        Ok(false) | Err(_) => Err(Refusal::Gone),
    }
}
