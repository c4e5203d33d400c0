//! The serving side: accepts readers and sends what they were granted.

use super::link::{Link, speaks_tls};
use super::wire::{Header, REQUEST_BYTES, Request};
use super::{Counters, Encryption, TcpConfig};
use crate::handshake::{Fault, Handshake, examine, turn_away};
use crate::limits::{ACCEPTED_PER_PEER_MAX, SEND_PIECE_BYTES};
use crate::room::{End, Room, RoomTerms};
use crate::socket::{is_timeout, read_exact_by};
use crate::tls::Tls;
use crate::{Grants, still_whole};
use aquifer_core::NodeId;
use aquifer_memory::Span;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Serves readers over TCP, and over TLS on top.
#[derive(Debug)]
pub(super) struct Holder(Arc<Room<TcpListener>>);

struct Serving {
    config: TcpConfig,
    /// None: this node speaks no TLS.
    tls: Option<Tls>,
    grants: Arc<dyn Grants>,
    counters: Arc<Counters>,
}

type Seat = crate::room::Seat<TcpListener>;

impl Holder {
    pub(super) fn start(
        listener: TcpListener,
        config: TcpConfig,
        tls: Option<Tls>,
        grants: Arc<dyn Grants>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let terms = RoomTerms {
            accepted_max: config.accepted_max,
            unauthenticated_max: config.unauthenticated_max,
            per_peer_max: ACCEPTED_PER_PEER_MAX,
            what: "a data connection",
            threads: "aquifer-send",
        };
        let serving = Serving { config, tls, grants, counters };
        Room::open(listener, terms, move |seat, stream| serving.serve(seat, stream)).map(Holder)
    }

    pub(super) fn room(&self) -> &Room<TcpListener> {
        &self.0
    }
}

impl Serving {
    fn serve(&self, seat: &mut Seat, stream: &Arc<TcpStream>) -> Result<(), End> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(self.config.write_timeout))?;
        let (link, peer) = self.handshake(seat, stream)?;
        loop {
            let mut bytes = [0; REQUEST_BYTES];
            let deadline = Instant::now() + self.config.accepted_idle_timeout;
            read_exact_by(&link, &mut bytes, deadline)?;
            let request = Request::decode(&bytes).map_err(End::Misbehaved)?;
            self.answer(seat, &link, peer, request)?;
        }
    }

    fn handshake(&self, seat: &mut Seat, stream: &Arc<TcpStream>) -> Result<(Link, NodeId), End> {
        let deadline = Instant::now() + self.config.handshake_timeout;
        let link = match &self.tls {
            Some(tls) if speaks_tls(stream, deadline).map_err(Fault::from)? => {
                Link::from_anybody(stream.clone(), tls, deadline).map_err(unproved)?
            }
            _ if self.config.encryption == Encryption::Tls => {
                turn_away(&**stream, deadline, Handshake::Plain).map_err(Fault::from)?;
                return Err(End::Misbehaved(
                    "it does not encrypt; with data-encryption = \"tls\" this node takes no other",
                ));
            }
            _ => Link::plain(stream.clone()),
        };
        // A ticket is good for the node it was given to: over TLS that node has proved who it is.
        let of_the_peer = |(node, _): &(NodeId, [u8; 32])| link.peer().is_none_or(|peer| peer == *node);
        let secret = |ticket| self.grants.secret(ticket).filter(of_the_peer);
        let peer = examine(&link, deadline, secret, |peer| seat.sit(peer))?;
        Ok((link, peer))
    }

    fn answer(&self, seat: &Seat, mut link: &Link, peer: NodeId, request: Request) -> Result<(), End> {
        let Request { chunk, lease, len } = request;
        let opened = self.grants.open(peer, lease, chunk).and_then(still_whole);
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
        self.send_payload(seat, link, (peer, lease), &span)?;
        let valid = self.grants.still_valid(peer, lease, chunk);
        Ok(link.write_all(&[u8::from(valid)])?)
    }

    fn send_payload(&self, seat: &Seat, link: &Link, (peer, lease): (NodeId, u64), span: &Span) -> Result<(), End> {
        let mut done = 0;
        while done < span.len() {
            let piece = SEND_PIECE_BYTES.min(span.len() - done);
            let sent = match link.send(span, done, piece) {
                Ok(sent) => sent,
                Err(error) if seat.is_closing() => return Err(End::Lost(error)),
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    return Err(End::Own(format!("{span:?} was truncated while it was sent")));
                }
                Err(error) if is_timeout(&error) => {
                    return Err(End::Misbehaved("it asks for bytes and does not take them"));
                }
                Err(error) => return Err(error.into()),
            };
            done += sent;
            self.counters.sent.fetch_add(sent, Ordering::Relaxed);
            self.grants.sent(peer, lease, sent);
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
