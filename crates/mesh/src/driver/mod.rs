//! The loop that owns the swarm: one thing happens, it is applied, and whatever follows from it is
//! put where the loop finds it.

mod reach;

use crate::behaviour::{self, Behaviour, BehaviourEvent};
use crate::bootstrap::Bootstrap;
use crate::complaints::{Complaints, Refused};
use crate::control::{self, Sent, cost};
use crate::dials::Dials;
use crate::gossip::{self, GossipId, Verdict};
use crate::identity::peer_of;
use crate::limits::{BOOTSTRAP_REVISIT, CLOSING_MAX, EVENTS_MAX, FAREWELL_MAX, FAREWELL_MIN, GOSSIP_UNHEARD_MAX};
use crate::listeners::Listeners;
use crate::place::{Place, socket_addr_of};
use crate::secure::{Fault, fault_of};
use crate::{MeshConfig, MeshError, MeshEvent, Shared};
use aquifer_core::{GossipMessage, NodeId};
use libp2p::core::transport::TransportError;
use libp2p::futures::StreamExt;
use libp2p::multiaddr::Multiaddr;
use libp2p::swarm::{ConnectionId, ListenError, Swarm, SwarmEvent};
use libp2p::{gossipsub, ping};
use reach::{Lookup, Purpose};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;
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
    /// Gossip for whoever comes first, newest first.
    unheard: VecDeque<GossipMessage>,
    complaints: Complaints,
    refused: Refused,
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
        let bootstrap = Bootstrap::new(places("peer", &config.bootstrap)?, now);
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
            unheard: VecDeque::new(),
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
            Command::Gossip { message } => self.gossip(message),
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

    /// A node that has just connected has not said yet what it listens to. What is said before is
    /// kept for it, the newest first to stay.
    fn gossip(&mut self, message: GossipMessage) {
        if !gossip::publish(&mut self.swarm.behaviour_mut().gossip, &message) {
            self.unheard.truncate(GOSSIP_UNHEARD_MAX - 1);
            self.unheard.push_front(message);
        }
    }

    fn gossip_again(&mut self) {
        while let Some(message) = self.unheard.pop_back() {
            if !gossip::publish(&mut self.swarm.behaviour_mut().gossip, &message) {
                return self.unheard.push_back(message);
            }
        }
    }

    fn disconnect(&mut self, node: NodeId) {
        if let Some(peer) = peer_of(node) {
            self.swarm.behaviour_mut().control.end(peer);
        }
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
            SwarmEvent::ListenerError { error, .. } => {
                self.complaints.complain("cannot accept connections", "this node", &error.to_string());
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
                let lasted = self.connected.remove(&node).map_or(Duration::ZERO, |since| now - since);
                self.dials.on_down(node, lasted, now);
                self.bootstrap.on_lost(lasted, &self.connected_nodes(), now);
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
        let (propagation_source, message_id, message) = match event {
            gossipsub::Event::Message { propagation_source, message_id, message } => {
                (propagation_source, message_id, message)
            }
            gossipsub::Event::Subscribed { .. } => return self.gossip_again(),
            gossipsub::Event::Unsubscribed { .. }
            | gossipsub::Event::GossipsubNotSupported { .. }
            | gossipsub::Event::SlowPeer { .. } => return debug!(?event, "gossip"),
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
        const LOOK_AGAIN: Duration = Duration::from_millis(10);
        while still(&self.swarm) && tokio::time::Instant::now() < end {
            let again = (tokio::time::Instant::now() + LOOK_AGAIN).min(end);
            tokio::select! {
                event = self.swarm.select_next_some() => drop(event),
                () = sleep_until(again) => {}
            }
        }
    }
}

pub(crate) fn places(option: &'static str, texts: &[String]) -> Result<Vec<Place>, MeshError> {
    let parse = |text: &String| text.parse().map_err(|source| MeshError::Address { option, source });
    texts.iter().map(parse).collect()
}
