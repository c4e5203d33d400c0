//! The loop that owns the swarm: one thing happens, it is applied, and whatever follows from it is
//! put where the loop finds it.

use crate::behaviour::{self, Behaviour, BehaviourEvent};
use crate::bootstrap::{Bootstrap, Who};
use crate::complaints::{Complaints, DialEnd, Refused, words_for};
use crate::control::{self, Sent, cost};
use crate::dials::{Dials, Why};
use crate::gossip::{self, GossipId, Verdict};
use crate::identity::{node_of, peer_of};
use crate::limits::{
    BOOTSTRAP_REVISIT, CLOSING_MAX, DIAL_ADDRESSES_MAX, EVENTS_MAX, FAREWELL_MAX, FAREWELL_MIN, LOOKUP,
    MDNS_CONNECTIONS_WANTED, MDNS_NODES_MAX,
};
use crate::listeners::Listeners;
use crate::place::{Host, Place, multiaddr_of, socket_addr_of};
use crate::secure::{Fault, fault_of};
use crate::{MeshConfig, MeshError, MeshEvent, Shared};
use aquifer_core::{GossipMessage, NodeId};
use libp2p::core::transport::TransportError;
use libp2p::futures::StreamExt;
use libp2p::multiaddr::Multiaddr;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, ListenError, Swarm, SwarmEvent};
use libp2p::{PeerId, gossipsub, mdns, ping};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep_until, timeout};
use tracing::{debug, info};

#[derive(Debug)]
pub(crate) enum Command {
    Send { to: NodeId, frame: Vec<u8> },
    Gossip { message: GossipMessage },
    Verdict { id: GossipId, verdict: Verdict },
    Dial { node: NodeId, addresses: Vec<String> },
    Disconnect { node: NodeId },
    Shutdown { done: oneshot::Sender<()> },
}

pub(crate) struct Driver {
    us: NodeId,
    swarm: Swarm<Behaviour>,
    commands: mpsc::UnboundedReceiver<Command>,
    shared: Arc<Shared>,
    events: mpsc::Sender<MeshEvent>,
    /// Events the agent has no room for yet. While it is long, the network waits.
    waiting: VecDeque<MeshEvent>,
    lookups: (mpsc::UnboundedSender<Lookup>, mpsc::UnboundedReceiver<Lookup>),
    listeners: Listeners,
    bootstrap: Bootstrap,
    dials: Dials,
    /// Dials under way, and what each is for.
    attempts: BTreeMap<ConnectionId, Purpose>,
    /// Since when.
    connected: BTreeMap<NodeId, Instant>,
    /// Heard of on the local network.
    nearby: BTreeMap<NodeId, BTreeSet<SocketAddr>>,
    nearby_due: Instant,
    complaints: Complaints,
    refused: Refused,
}

/// The resolver's answer.
struct Lookup {
    purpose: LookupFor,
    found: Result<Vec<SocketAddr>, String>,
}

enum LookupFor {
    Bootstrap(usize),
    Node(NodeId),
}

#[derive(Clone, Copy)]
enum Purpose {
    Bootstrap(usize, SocketAddr),
    Node(NodeId),
}

enum Step {
    Command(Option<Command>),
    Swarm(Box<SwarmEvent<BehaviourEvent>>),
    Found(Lookup),
    /// The agent took an event, or is gone.
    Taken(bool),
    Tick,
}

/// What becomes of the loop after a step.
enum Next {
    Go,
    End(Option<oneshot::Sender<()>>),
}

impl Driver {
    pub(crate) async fn new(
        config: MeshConfig,
        commands: mpsc::UnboundedReceiver<Command>,
        events: mpsc::Sender<MeshEvent>,
        shared: Arc<Shared>,
    ) -> Result<Self, MeshError> {
        let mut swarm = behaviour::swarm(&config)?;
        let now = Instant::now();
        let listeners = Listeners::open(&mut swarm, &config.listen, &config.external).await?;
        let bootstrap = Bootstrap::new(places("bootstrap", &config.bootstrap)?, now);
        let waiting = listeners.external().map(|address| MeshEvent::Listening { address }).collect();
        info!(node = %config.identity.public().short(), mesh_key = config.mesh_key.fingerprint(), "mesh started");
        Ok(Driver {
            us: config.identity.public(),
            swarm,
            commands,
            shared,
            events,
            waiting,
            lookups: mpsc::unbounded_channel(),
            listeners,
            bootstrap,
            dials: Dials::default(),
            attempts: BTreeMap::new(),
            connected: BTreeMap::new(),
            nearby: BTreeMap::new(),
            nearby_due: now + BOOTSTRAP_REVISIT,
            complaints: Complaints::default(),
            refused: Refused::default(),
        })
    }

    pub(crate) async fn run(mut self) {
        loop {
            let step = self.step().await;
            if let Next::End(done) = self.apply(step) {
                self.close().await;
                if let Some(done) = done {
                    // An error says that nobody waits for it any more.
                    let _ = done.send(());
                }
                return;
            }
        }
    }

    async fn step(&mut self) -> Step {
        let due = self.due();
        tokio::select! {
            permit = self.events.reserve(), if !self.waiting.is_empty() => match permit {
                Ok(permit) => {
                    if let Some(event) = self.waiting.pop_front() {
                        permit.send(event);
                    }
                    Step::Taken(true)
                }
                Err(_) => Step::Taken(false),
            },
            command = self.commands.recv() => Step::Command(command),
            event = self.swarm.select_next_some(), if self.waiting.len() < EVENTS_MAX => Step::Swarm(Box::new(event)),
            Some(found) = self.lookups.1.recv() => Step::Found(found),
            () = self.events.closed() => Step::Taken(false),
            () = sleep_until(due.into()) => Step::Tick,
        }
    }

    fn due(&self) -> Instant {
        let timeouts = [self.bootstrap.timeout(), self.dials.timeout(), Some(self.nearby_due)];
        timeouts.into_iter().flatten().min().unwrap_or(self.nearby_due)
    }

    fn apply(&mut self, step: Step) -> Next {
        match step {
            Step::Command(Some(Command::Shutdown { done })) => return Next::End(Some(done)),
            Step::Command(None) | Step::Taken(false) => return Next::End(None),
            Step::Command(Some(command)) => self.on_command(command),
            Step::Swarm(event) => self.on_swarm_event(*event),
            Step::Found(lookup) => self.on_lookup(lookup),
            Step::Taken(true) | Step::Tick => {}
        }
        self.start_what_is_due();
        Next::Go
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Send { to, frame } => self.send(to, frame),
            Command::Gossip { message } => gossip::publish(&mut self.swarm.behaviour_mut().gossip, &message),
            Command::Verdict { id, verdict } => gossip::judge(&mut self.swarm.behaviour_mut().gossip, id, verdict),
            Command::Dial { node, addresses } => self.want(node, &addresses),
            Command::Disconnect { node } => self.disconnect(node),
            Command::Shutdown { .. } => {}
        }
    }

    fn send(&mut self, to: NodeId, frame: Vec<u8>) {
        self.shared.handed_bytes.fetch_sub(cost(&frame), Ordering::Relaxed);
        let sent = match peer_of(to) {
            Some(peer) => self.swarm.behaviour_mut().control.send(peer, frame),
            None => Sent::NotConnected,
        };
        if sent == Sent::NotConnected {
            self.shared.messages_dropped.fetch_add(1, Ordering::Relaxed);
            debug!(to = %to.short(), "dropped a message: the node is not connected");
        }
    }

    fn want(&mut self, node: NodeId, addresses: &[String]) {
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

    fn disconnect(&mut self, node: NodeId) {
        if let Some(peer) = peer_of(node) {
            self.swarm.behaviour_mut().control.end(peer);
        }
    }

    fn start_what_is_due(&mut self) {
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

    fn on_lookup(&mut self, Lookup { purpose, found }: Lookup) {
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
                Some(peer) => dial_opts(peer, vec![address]),
            };
            self.dial(opts, Purpose::Bootstrap(target, address));
        }
    }

    fn dial_node(&mut self, node: NodeId, found: Result<Vec<SocketAddr>, String>) {
        match (found, peer_of(node)) {
            (Ok(addresses), Some(peer)) => self.dial(dial_opts(peer, addresses), Purpose::Node(node)),
            (Err(reason), _) => self.on_dial_end(Purpose::Node(node), DialEnd::Failed(reason)),
            (Ok(_), None) => self.on_dial_end(Purpose::Node(node), DialEnd::Needless),
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
                    (DialEnd::Needless, Some(node)) => Ok(Who::Node(node)),
                    (DialEnd::Needless, None) => Ok(Who::Ourselves),
                    (DialEnd::Failed(reason), _) => Err(reason),
                };
                self.on_bootstrap_dialed(target, address, outcome);
            }
            Purpose::Node(node) => match end {
                DialEnd::Needless => self.dials.on_up(node),
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

    fn unreachable(&mut self, target: String, reason: String) {
        self.complaints.complain(&target, &reason);
        self.waiting.push_back(MeshEvent::Unreachable { target, reason });
    }

    fn connected_nodes(&self) -> BTreeSet<NodeId> {
        self.connected.keys().copied().collect()
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "libp2p may add events; those we do not know change nothing here"
    )]
    fn on_swarm_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Control(event)) => self.on_control(event),
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(event)) => self.on_gossip(event),
            SwarmEvent::Behaviour(BehaviourEvent::Ping(event)) => self.on_ping(&event),
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(event)) => self.on_mdns(event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, .. } => {
                self.on_established(peer_id, connection_id);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                self.on_outgoing_error(connection_id, &error);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                self.on_incoming_error(&send_back_addr, &error);
            }
            SwarmEvent::NewListenAddr { listener_id, address } => {
                self.bootstrap.on_moved();
                if let Some(address) = self.listeners.on_new(listener_id, &address) {
                    info!(address, "listening");
                    self.waiting.push_back(MeshEvent::Listening { address });
                }
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => self.on_expired(&address),
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                debug!(?reason, "a listener closed");
                addresses.iter().for_each(|address| self.on_expired(address));
            }
            event => debug!(?event, "swarm"),
        }
    }

    fn on_expired(&mut self, address: &Multiaddr) {
        if let Some(address) = self.listeners.on_expired(address) {
            info!(address, "not listening any more");
            self.waiting.push_back(MeshEvent::ListeningEnded { address });
        }
    }

    fn on_control(&mut self, event: control::Event) {
        match event {
            control::Event::Up { node, address } => {
                debug!(node = %node.short(), ?address, "connected");
                self.connected.insert(node, Instant::now());
                self.dials.on_up(node);
                self.complaints.settle(&node.short());
                self.waiting.push_back(MeshEvent::Connected { node, address });
            }
            control::Event::Down { node } => {
                debug!(node = %node.short(), "disconnected");
                let now = Instant::now();
                if let Some(since) = self.connected.remove(&node) {
                    self.dials.on_down(node, now - since, now);
                }
                self.bootstrap.on_lost(&self.connected_nodes(), now);
                self.waiting.push_back(MeshEvent::Disconnected { node });
            }
            control::Event::Message { from, message } => {
                self.waiting.push_back(MeshEvent::Message { from, message });
            }
            control::Event::Malformed { from, reason } => {
                self.waiting.push_back(MeshEvent::Malformed { from, reason });
            }
        }
    }

    fn on_gossip(&mut self, event: gossipsub::Event) {
        let gossipsub::Event::Message { propagation_source, message_id, message } = event else {
            return debug!(?event, "gossip");
        };
        let Some(heard) = gossip::hear(propagation_source, &message_id, &message) else { return };
        match heard.message {
            Ok(message) => self.waiting.push_back(MeshEvent::Gossip { via: heard.via, id: heard.id, message }),
            Err(reason) => {
                // Nobody passes on what it cannot read, so this peer made it.
                gossip::judge(&mut self.swarm.behaviour_mut().gossip, heard.id, Verdict::Reject);
                self.waiting.push_back(MeshEvent::Malformed { from: heard.via, reason: format!("gossip: {reason}") });
                self.disconnect(heard.via);
            }
        }
    }

    fn on_ping(&mut self, event: &ping::Event) {
        match &event.result {
            Ok(_) | Err(ping::Failure::Unsupported) => {}
            Err(error @ (ping::Failure::Timeout | ping::Failure::Other { .. })) => {
                debug!(peer = %event.peer, %error, "closing a connection that does not answer");
                self.swarm.close_connection(event.connection);
            }
        }
    }

    fn on_mdns(&mut self, event: mdns::Event) {
        match event {
            mdns::Event::Discovered(found) => {
                for (peer, address) in found {
                    self.on_nearby(peer, &address);
                }
                self.want_nearby();
            }
            mdns::Event::Expired(gone) => {
                for node in gone.iter().filter_map(|(peer, _)| node_of(*peer)) {
                    self.nearby.remove(&node);
                }
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

    fn on_established(&mut self, peer: PeerId, connection: ConnectionId) {
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

    fn on_outgoing_error(&mut self, connection: ConnectionId, error: &DialError) {
        if let Some(purpose) = self.attempts.remove(&connection) {
            self.on_dial_end(purpose, words_for(error));
        }
    }

    /// Who hangs up at once is a port scanner or a health check, and no news.
    fn on_incoming_error(&mut self, from: &Multiaddr, error: &ListenError) {
        let ListenError::Transport(TransportError::Other(io)) = error else {
            return debug!(%from, %error, "incoming connection not taken");
        };
        match (fault_of(io), socket_addr_of(from)) {
            (Some(fault @ (Fault::Key { .. } | Fault::Silent | Fault::Handshake(_))), Some(from)) => {
                self.shared.connections_refused.fetch_add(1, Ordering::Relaxed);
                self.refused.note(from.ip(), fault);
            }
            (_, _) => debug!(%from, error = %io, "incoming connection not taken"),
        }
    }

    /// Lets last words leave, then closes everything. What still comes in is nobody's any more.
    async fn close(mut self) {
        self.listeners.close(&mut self.swarm);
        let start = tokio::time::Instant::now();
        let least = if self.connected.is_empty() { start } else { start + FAREWELL_MIN };
        let unsent = |swarm: &Swarm<Behaviour>| swarm.behaviour().control.queued_bytes() > 0;
        self.swarm_until(least, |_| true).await;
        self.swarm_until(start + FAREWELL_MAX, unsent).await;
        self.swarm.behaviour_mut().control.end_all();
        let closing = tokio::time::Instant::now() + CLOSING_MAX;
        self.swarm_until(closing, |swarm| swarm.network_info().num_peers() > 0).await;
    }

    async fn swarm_until(&mut self, end: tokio::time::Instant, still: impl Fn(&Swarm<Behaviour>) -> bool) {
        /// Queues shrink without telling the swarm.
        const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_millis(10);
        while still(&self.swarm) && tokio::time::Instant::now() < end {
            let again = (tokio::time::Instant::now() + LOOK_AGAIN).min(end);
            tokio::select! {
                event = self.swarm.select_next_some() => drop(event),
                () = sleep_until(again) => {}
            }
        }
    }
}

/// Never from the port we listen on: two nodes that dial each other at once from there would end
/// up with one connection on which both believe to have dialled.
fn dial_opts(peer: PeerId, addresses: Vec<SocketAddr>) -> DialOpts {
    DialOpts::peer_id(peer)
        .condition(PeerCondition::DisconnectedAndNotDialing)
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

pub(crate) fn places(option: &'static str, texts: &[String]) -> Result<Vec<Place>, MeshError> {
    let parse = |text: &String| text.parse().map_err(|source| MeshError::Address { option, source });
    texts.iter().map(parse).collect()
}
