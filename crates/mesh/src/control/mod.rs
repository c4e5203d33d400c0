//! The control protocol between two agents: messages, in order, on one stream each way.
//!
//! A *session* with a peer lasts from [`Event::Up`] to [`Event::Down`] and never loses a message
//! in between: when the connection that carried one of its streams ends, so does the session, and
//! whatever connection is left starts a new one. Two nodes that dial each other at once have two
//! connections; each sends on the one it saw first, and that is fine.

mod frame;
mod handler;

use crate::identity::node_of;
use crate::limits::PEER_QUEUE_BYTES_MAX;
use aquifer_core::{NodeId, PeerMessage};
pub(crate) use handler::cost;
use handler::{Handler, Line, News};
use libp2p::PeerId;
use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::multiaddr::Multiaddr;
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished};
use libp2p::swarm::{
    CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm,
};
use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::task::{Context, Poll};
use thiserror::Error;
use tracing::{debug, warn};

#[derive(Debug)]
pub(crate) enum Event {
    Up { node: NodeId, address: Option<IpAddr> },
    Down { node: NodeId },
    Message { from: NodeId, message: PeerMessage },
    Malformed { from: NodeId, reason: String },
}

/// What became of a message given to [`Control::send`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Queued,
    NotConnected,
}

#[derive(Default)]
pub(crate) struct Control {
    sessions: BTreeMap<PeerId, Session>,
    /// Of connections that are just being established.
    lines: BTreeMap<ConnectionId, Line>,
    out: VecDeque<ToSwarm<Event, THandlerInEvent<Self>>>,
}

struct Session {
    node: NodeId,
    /// The first is the one we send on.
    connections: Vec<Connection>,
    /// The one the peer sends on.
    inbound: Option<ConnectionId>,
}

struct Connection {
    id: ConnectionId,
    address: Option<IpAddr>,
    line: Line,
    /// It carried a message of this session, one way or the other.
    used: bool,
}

#[derive(Debug, Error)]
#[error("its identity is not an ed25519 key")]
struct NotANode;

impl Control {
    /// `frame` is an encoded message. A peer that lets too much pile up loses its session.
    pub(crate) fn send(&mut self, to: PeerId, frame: Vec<u8>) -> Sent {
        let Some(Session { node, connections, .. }) = self.sessions.get_mut(&to) else { return Sent::NotConnected };
        let Some(connection) = connections.first_mut() else { return Sent::NotConnected };
        if connection.line.queued_bytes() + cost(&frame) > PEER_QUEUE_BYTES_MAX {
            warn!(node = %node.short(), "disconnecting: it does not take what we send, {PEER_QUEUE_BYTES_MAX} bytes are waiting");
            self.end(to);
            return Sent::NotConnected;
        }
        connection.used = true;
        match connection.line.push(frame) {
            true => Sent::Queued,
            // The handler gave up, and its reason is on the way here.
            false => Sent::NotConnected,
        }
    }

    /// Ends the session with `peer`, if there is one, and closes its connections.
    pub(crate) fn end(&mut self, peer: PeerId) {
        if let Some(session) = self.sessions.remove(&peer) {
            self.out.push_back(ToSwarm::GenerateEvent(Event::Down { node: session.node }));
            session.connections.iter().for_each(|connection| self.close(peer, connection.id));
        }
    }

    pub(crate) fn end_all(&mut self) {
        let peers: Vec<_> = self.sessions.keys().copied().collect();
        peers.into_iter().for_each(|peer| self.end(peer));
    }

    /// Bytes that wait to be sent, over all peers.
    pub(crate) fn queued_bytes(&self) -> usize {
        let connections = self.sessions.values().flat_map(|session| &session.connections);
        connections.map(|connection| connection.line.queued_bytes()).sum()
    }

    fn close(&mut self, peer_id: PeerId, connection: ConnectionId) {
        self.out.push_back(ToSwarm::CloseConnection { peer_id, connection: CloseConnection::One(connection) });
    }

    fn accept(&mut self, id: ConnectionId, peer: PeerId) -> Result<Handler, ConnectionDenied> {
        node_of(peer).ok_or_else(|| ConnectionDenied::new(NotANode))?;
        let (line, handler) = Line::new();
        self.lines.insert(id, line);
        Ok(handler)
    }

    fn on_established(&mut self, peer: PeerId, id: ConnectionId, point: &ConnectedPoint) {
        let (Some(line), Some(node)) = (self.lines.remove(&id), node_of(peer)) else { return };
        let address = ip_of(point.get_remote_address());
        let session = self.sessions.entry(peer).or_insert_with(|| {
            self.out.push_back(ToSwarm::GenerateEvent(Event::Up { node, address }));
            Session { node, connections: Vec::new(), inbound: None }
        });
        session.connections.push(Connection { id, address, line, used: false });
    }

    /// The session survives the loss of a connection that carried nothing of it.
    fn on_closed(&mut self, peer: PeerId, id: ConnectionId) {
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        let Some(index) = session.connections.iter().position(|connection| connection.id == id) else { return };
        let connection = session.connections.remove(index);
        if index == 0 || connection.used {
            self.restart(peer, |connection| !connection.used);
        }
    }

    /// The session is over; a new one begins on the connections to `keep`, if there are any.
    fn restart(&mut self, peer: PeerId, keep: impl Fn(&Connection) -> bool) {
        let Some(session) = self.sessions.remove(&peer) else { return };
        let node = session.node;
        self.out.push_back(ToSwarm::GenerateEvent(Event::Down { node }));
        let (kept, dropped): (Vec<_>, Vec<_>) = session.connections.into_iter().partition(keep);
        dropped.iter().for_each(|connection| self.close(peer, connection.id));
        if let Some(first) = kept.first() {
            debug!(node = %node.short(), "its session starts over on another connection");
            self.out.push_back(ToSwarm::GenerateEvent(Event::Up { node, address: first.address }));
            self.sessions.insert(peer, Session { node, connections: kept, inbound: None });
        }
    }

    /// A peer opens one control stream in a session. If it opens one on another connection, it
    /// started over and we had not noticed.
    fn on_opened(&mut self, peer: PeerId, id: ConnectionId) {
        if self.sessions.get(&peer).is_some_and(|session| session.inbound.is_some()) {
            self.restart(peer, |connection| connection.id == id);
        }
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        session.inbound = Some(id);
        session.connections.iter_mut().filter(|connection| connection.id == id).for_each(|c| c.used = true);
    }
}

fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    crate::place::socket_addr_of(address).map(|address| address.ip())
}

impl NetworkBehaviour for Control {
    type ConnectionHandler = Handler;
    type ToSwarm = Event;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.accept(connection, peer)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.accept(connection, peer)
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "libp2p may add events; those we do not know change nothing here"
    )]
    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                self.on_established(peer_id, connection_id, endpoint);
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { peer_id, connection_id, .. }) => {
                self.on_closed(peer_id, connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, news: THandlerOutEvent<Self>) {
        // What comes from a connection that its session gave up is of no interest any more.
        let Some(session) = self.sessions.get(&peer) else { return };
        if !session.connections.iter().any(|connection| connection.id == id) {
            return;
        }
        let from = session.node;
        match news {
            News::Opened => self.on_opened(peer, id),
            News::Message(message) => self.out.push_back(ToSwarm::GenerateEvent(Event::Message { from, message })),
            News::Malformed(reason) => {
                self.out.push_back(ToSwarm::GenerateEvent(Event::Malformed { from, reason }));
                self.end(peer);
            }
            News::Broken(reason) => {
                debug!(node = %from.short(), reason, "control stream lost");
                self.end(peer);
            }
            News::Ended => self.end(peer),
        }
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Event, THandlerInEvent<Self>>> {
        self.out.pop_front().map_or(Poll::Pending, Poll::Ready)
    }
}
