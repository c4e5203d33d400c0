//! The part of the loop that reaches other nodes: looks names up, dials, and keeps account of
//! what became of it.

use super::Driver;
use crate::MeshEvent;
use crate::bootstrap::Who;
use crate::complaints::{DialEnd, words_for};
use crate::dials::Why;
use crate::identity::{node_of, peer_of};
use crate::limits::{
    BOOTSTRAP_REVISIT, DIAL_ADDRESSES_MAX, EVENTS_MAX, LOOKUP, MDNS_CONNECTIONS_WANTED, MDNS_NODES_MAX,
};
use crate::place::{Host, Place, multiaddr_of, socket_addr_of};
use aquifer_core::NodeId;
use libp2p::multiaddr::Multiaddr;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError};
use libp2p::{PeerId, mdns};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Instant;
use tokio::time::timeout;
use tracing::debug;

/// The resolver's answer.
pub(super) struct Lookup {
    purpose: LookupFor,
    found: Result<Vec<SocketAddr>, String>,
}

pub(super) enum LookupFor {
    Bootstrap(usize),
    Node(NodeId),
}

/// What a dial is for.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    Bootstrap(usize, SocketAddr),
    Node(NodeId),
}

impl Driver {
    pub(super) fn want(&mut self, node: NodeId, addresses: &[String]) {
        if node == self.us || self.connected.contains_key(&node) {
            return;
        }
        let places: Vec<_> = addresses.iter().filter_map(|text| text.parse().ok()).take(DIAL_ADDRESSES_MAX).collect();
        match (peer_of(node), places.is_empty()) {
            (Some(_), false) => self.dials.want(node, places, Why::Asked, Instant::now()),
            (Some(_), true) => self.unreachable(node.short(), "it has no address that can be dialled".to_string()),
            (None, _) => self.unreachable(node.short(), "that is not the id of a node".to_string()),
        }
    }

    pub(super) fn start_what_is_due(&mut self) {
        let now = Instant::now();
        if self.nearby_due <= now {
            self.nearby_due = now + BOOTSTRAP_REVISIT;
            self.want_nearby();
        }
        while let Some(target) = self.bootstrap.due(now) {
            let place = self.bootstrap.place(target).clone();
            self.look_up(LookupFor::Bootstrap(target), vec![place]);
        }
        while let Some((node, places)) = self.dials.due(now) {
            self.look_up(LookupFor::Node(node), places);
        }
    }

    /// Asks the resolver, where there is anything to ask.
    fn look_up(&mut self, purpose: LookupFor, places: Vec<Place>) {
        let known = |place: &Place| match &place.host {
            Host::Ip(ip) => Some(SocketAddr::new(*ip, place.port)),
            Host::Name(_) => None,
        };
        if let Some(found) = places.iter().map(known).collect::<Option<Vec<_>>>() {
            return self.on_lookup(Lookup { purpose, found: Ok(found) });
        }
        let answers = self.lookups.0.clone();
        tokio::spawn(async move {
            let found = resolve_all(&places).await;
            // An error says that the mesh has ended.
            let _ = answers.send(Lookup { purpose, found });
        });
    }

    pub(super) fn on_lookup(&mut self, Lookup { purpose, found }: Lookup) {
        match purpose {
            LookupFor::Bootstrap(target) => self.dial_bootstrap(target, found),
            LookupFor::Node(node) => self.dial_node(node, found),
        }
    }

    fn dial_bootstrap(&mut self, target: usize, found: Result<Vec<SocketAddr>, String>) {
        let nodes = self.connected_nodes();
        let addresses = match self.bootstrap.on_found(target, found, &nodes, Instant::now()) {
            Ok(addresses) => addresses,
            Err(end) => return self.on_round(target, end),
        };
        for address in addresses {
            let opts = match self.bootstrap.place(target).peer {
                None => DialOpts::unknown_peer_id().address(multiaddr_of(address)).allocate_new_port().build(),
                Some(peer) => match node_of(peer).filter(|node| self.connected.contains_key(node)) {
                    Some(node) => {
                        self.on_bootstrap_dialed(target, address, Ok(Who::Node(node)));
                        continue;
                    }
                    None => dial_opts(peer, vec![address]),
                },
            };
            self.dial(opts, Purpose::Bootstrap(target, address));
        }
    }

    fn dial_node(&mut self, node: NodeId, found: Result<Vec<SocketAddr>, String>) {
        if self.connected.contains_key(&node) {
            return self.dials.on_up(node);
        }
        match (found, peer_of(node)) {
            (Ok(addresses), Some(peer)) => self.dial(dial_opts(peer, addresses), Purpose::Node(node)),
            (Err(reason), _) => self.on_dial_end(Purpose::Node(node), DialEnd::Failed(reason)),
            // Nothing else is ever wanted.
            (Ok(_), None) => self.dials.on_up(node),
        }
    }

    fn dial(&mut self, opts: DialOpts, purpose: Purpose) {
        let id = opts.connection_id();
        match self.swarm.dial(opts) {
            Ok(()) => {
                self.attempts.insert(id, purpose);
            }
            Err(error) => self.on_dial_end(purpose, words_for(&error)),
        }
    }

    fn on_dial_end(&mut self, purpose: Purpose, end: DialEnd) {
        match purpose {
            Purpose::Bootstrap(target, address) => {
                let outcome = match (end, self.bootstrap.place(target).peer.and_then(node_of)) {
                    (DialEnd::Ourselves, _) => Ok(Who::Ourselves),
                    (DialEnd::Busy, Some(node)) => Ok(Who::Node(node)),
                    (DialEnd::Busy, None) => Err("given up".to_string()),
                    (DialEnd::Failed(reason), _) => Err(reason),
                };
                self.on_bootstrap_dialed(target, address, outcome);
            }
            Purpose::Node(node) => match end {
                DialEnd::Busy => self.dials.on_busy(node, Instant::now()),
                DialEnd::Ourselves => self.on_node_failed(node, "its addresses lead back to this node".to_string()),
                DialEnd::Failed(reason) => self.on_node_failed(node, reason),
            },
        }
    }

    fn on_node_failed(&mut self, node: NodeId, reason: String) {
        match self.dials.on_failed(node, Instant::now()) {
            Some(Why::Asked) if !self.connected.contains_key(&node) => self.unreachable(node.short(), reason),
            Some(_) | None => debug!(node = %node.short(), reason, "not reached"),
        }
    }

    fn on_bootstrap_dialed(&mut self, target: usize, address: SocketAddr, outcome: Result<Who, String>) {
        let nodes = self.connected_nodes();
        if let Some(end) = self.bootstrap.on_dialed(target, address, outcome, &nodes, Instant::now()) {
            self.on_round(target, end);
        }
    }

    fn on_round(&mut self, target: usize, end: Result<(), String>) {
        let target = self.bootstrap.place(target).to_string();
        match end {
            Ok(()) => self.complaints.settle(&target),
            Err(reason) => self.unreachable(target, reason),
        }
    }

    pub(super) fn unreachable(&mut self, target: String, reason: String) {
        self.complaints.complain("cannot be reached", &target, &reason);
        // These go on while the agent takes nothing; all others stop with the network.
        if self.waiting.len() < EVENTS_MAX {
            self.waiting.push_back(MeshEvent::Unreachable { target, reason });
        }
    }

    pub(super) fn connected_nodes(&self) -> BTreeSet<NodeId> {
        self.connected.keys().copied().collect()
    }

    pub(super) fn on_mdns(&mut self, event: mdns::Event) {
        match event {
            mdns::Event::Discovered(found) => {
                for (peer, address) in found {
                    self.on_nearby(peer, &address);
                }
                self.want_nearby();
            }
            mdns::Event::Expired(gone) => {
                gone.into_iter().for_each(|(peer, address)| self.on_not_nearby(peer, &address));
            }
        }
    }

    fn on_nearby(&mut self, peer: PeerId, address: &Multiaddr) {
        let (Some(node), Some(address)) = (node_of(peer), socket_addr_of(address)) else { return };
        if node == self.us || (self.nearby.len() >= MDNS_NODES_MAX && !self.nearby.contains_key(&node)) {
            return;
        }
        let addresses = self.nearby.entry(node).or_default();
        if addresses.len() < DIAL_ADDRESSES_MAX && addresses.insert(address) {
            debug!(node = %node.short(), %address, "heard of over mDNS");
        }
    }

    fn on_not_nearby(&mut self, peer: PeerId, address: &Multiaddr) {
        let (Some(node), Some(address)) = (node_of(peer), socket_addr_of(address)) else { return };
        let Some(addresses) = self.nearby.get_mut(&node) else { return };
        addresses.remove(&address);
        if addresses.is_empty() {
            self.nearby.remove(&node);
        }
    }

    fn want_nearby(&mut self) {
        if self.connected.len() >= MDNS_CONNECTIONS_WANTED {
            return;
        }
        let now = Instant::now();
        for (node, addresses) in self.nearby.iter().filter(|(node, _)| !self.connected.contains_key(node)) {
            let place = |address: &SocketAddr| Place { host: Host::Ip(address.ip()), port: address.port(), peer: None };
            self.dials.want(*node, addresses.iter().map(place).collect(), Why::Heard, now);
        }
    }

    pub(super) fn on_established(&mut self, peer: PeerId, connection: ConnectionId) {
        let Some(purpose) = self.attempts.remove(&connection) else { return };
        match (purpose, node_of(peer)) {
            (Purpose::Bootstrap(target, address), Some(node)) => {
                self.on_bootstrap_dialed(target, address, Ok(Who::Node(node)));
            }
            (Purpose::Bootstrap(target, address), None) => {
                self.on_bootstrap_dialed(target, address, Err("not an Aquifer agent".to_string()));
            }
            (Purpose::Node(node), _) => self.dials.on_up(node),
        }
    }

    pub(super) fn on_outgoing_error(&mut self, connection: ConnectionId, error: &DialError) {
        if let Some(purpose) = self.attempts.remove(&connection) {
            self.on_dial_end(purpose, words_for(error));
        }
    }
}

/// Whether the node is connected is known better here: libp2p still counts connections that are
/// being closed.
///
/// Never from the port we listen on: two nodes that dial each other at once from there would end
/// up with one connection on which both believe to have dialled.
fn dial_opts(peer: PeerId, addresses: Vec<SocketAddr>) -> DialOpts {
    DialOpts::peer_id(peer)
        .condition(PeerCondition::NotDialing)
        .addresses(addresses.into_iter().map(multiaddr_of).collect())
        .allocate_new_port()
        .build()
}

async fn resolve_all(places: &[Place]) -> Result<Vec<SocketAddr>, String> {
    let (mut found, mut failure) = (BTreeSet::new(), None);
    for place in places {
        match timeout(LOOKUP, place.resolve()).await {
            Ok(Ok(addresses)) => found.extend(addresses),
            Ok(Err(error)) => failure = Some(format!("looking up {place}: {error}")),
            Err(_) => failure = Some(format!("looking up {place}: no answer within {} s", LOOKUP.as_secs())),
        }
    }
    match (found.is_empty(), failure) {
        (true, Some(reason)) => Err(reason),
        (_, _) => Ok(found.into_iter().collect()),
    }
}
