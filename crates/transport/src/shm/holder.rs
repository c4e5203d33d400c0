//! The serving side: accepts readers of this machine and tells them where the bytes are.

use super::directory::{Socket, check_user};
use super::slots::Slots;
use super::window::{Window, Windows};
use super::wire::{Header, Place, REQUEST_BYTES, Request, SETTLE, send_header};
use super::{Counters, ShmConfig};
use crate::handshake::examine;
use crate::limits::{SEND_PIECE_BYTES, SHM_ACCEPTED_PER_PEER_MAX, SHM_SOCKET_QUEUE_BYTES};
use crate::room::{End, Room, RoomTerms};
use crate::socket::{is_timeout, read_exact_by, send};
use crate::{Grants, still_whole};
use aquifer_core::NodeId;
use aquifer_memory::{Mapping, Span};
use rustix::net::sockopt::set_socket_send_buffer_size;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Serves readers of this machine.
#[derive(Debug)]
pub(super) struct Holder(Arc<Room<Socket>>);

struct Serving {
    config: ShmConfig,
    grants: Arc<dyn Grants>,
    counters: Arc<Counters>,
    windows: Windows,
}

type Seat = crate::room::Seat<Socket>;

impl Holder {
    pub(super) fn start(
        socket: Socket,
        config: ShmConfig,
        grants: Arc<dyn Grants>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let terms = RoomTerms {
            accepted_max: config.accepted_max,
            unauthenticated_max: config.unauthenticated_max,
            per_peer_max: SHM_ACCEPTED_PER_PEER_MAX,
            what: "a reader of this machine",
            threads: "aquifer-lend",
        };
        let serving = Serving { windows: Windows::new(config.windows_bytes_max), config, grants, counters };
        let serving = Arc::new(serving);
        Room::open(socket, terms, move |seat, stream| {
            Lending { serving: serving.clone(), slots: Slots::default(), window: None }.serve(seat, stream)
        })
        .map(Holder)
    }

    pub(super) fn room(&self) -> &Room<Socket> {
        &self.0
    }
}

/// What one reader was given.
struct Lending {
    serving: Arc<Serving>,
    slots: Slots,
    window: Option<Window>,
}

impl Lending {
    fn serve(&mut self, seat: &mut Seat, stream: &UnixStream) -> Result<(), End> {
        if check_user(stream).is_err() {
            return Err(End::Misbehaved("it is of another user"));
        }
        stream.set_write_timeout(Some(self.serving.config.write_timeout))?;
        // Best effort: a smaller queue is slower, and no less right.
        let _ = set_socket_send_buffer_size(stream, SHM_SOCKET_QUEUE_BYTES);
        let deadline = Instant::now() + self.serving.config.handshake_timeout;
        let secret = |ticket| self.serving.grants.secret(ticket);
        let peer = examine(stream, deadline, secret, |peer| seat.sit(peer))?;
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
        read_exact_by(stream, bytes, Instant::now() + self.serving.config.accepted_idle_timeout)
    }

    /// Says where the bytes are, or why they cannot be had. True if they can.
    fn answer(&mut self, stream: &UnixStream, peer: NodeId, request: Request) -> Result<bool, End> {
        let Request { chunk, lease, len } = request;
        let opened = self.serving.grants.open(peer, lease, chunk).and_then(still_whole);
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
        match self.lend(&span).map_err(|error| End::Own(format!("{span:?} cannot be read: {error}")))? {
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
            self.window = self.serving.windows.window(span.len());
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
                    return Err(End::Own(format!("{span:?} was truncated while it was sent")));
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
        self.serving.counters.sent.fetch_add(len.into(), Ordering::Relaxed);
        self.serving.grants.sent(peer, lease, len.into());
        let valid = self.serving.grants.still_valid(peer, lease, chunk);
        Ok(stream.write_all(&[u8::from(valid)])?)
    }
}
