//! The parts of libp2p that a node runs, put together.

use crate::control::Control;
use crate::gossip::{self, Gossip};
use crate::limits::{
    CONNECTION_EVENTS_MAX, CONNECTIONS_MAX, CONNECTIONS_PENDING_MAX, CONNECTIONS_PER_NODE_MAX, PING_INTERVAL,
    PING_TIMEOUT, STREAMS_NEGOTIATING_MAX,
};
use crate::{MeshConfig, MeshError, identity, secure};
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::swarm::{self, NetworkBehaviour, Swarm};
use libp2p::{PeerId, mdns, ping};
use tracing::warn;

/// The limits come first, so that nothing else hears of a connection they refuse; control comes
/// before gossip, so that a node is announced before anything it passes on.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    limits: connection_limits::Behaviour,
    pub(crate) control: Control,
    pub(crate) gossip: Gossip,
    ping: ping::Behaviour,
    mdns: Toggle<mdns::tokio::Behaviour>,
}

pub(crate) fn swarm(config: &MeshConfig) -> Result<Swarm<Behaviour>, MeshError> {
    let setup = |reason: String| MeshError::Setup { reason };
    let keypair = identity::keypair(&config.identity).map_err(|e| setup(e.to_string()))?;
    let peer = keypair.public().to_peer_id();
    let transport = secure::transport(&keypair, &config.mesh_key).map_err(|e| setup(e.to_string()))?;
    let limits = ConnectionLimits::default()
        .with_max_pending_incoming(Some(CONNECTIONS_PENDING_MAX))
        .with_max_pending_outgoing(Some(CONNECTIONS_PENDING_MAX))
        .with_max_established(Some(CONNECTIONS_MAX))
        .with_max_established_per_peer(Some(CONNECTIONS_PER_NODE_MAX));
    let behaviour = Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        control: Control::default(),
        gossip: gossip::behaviour().map_err(setup)?,
        ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_INTERVAL).with_timeout(PING_TIMEOUT)),
        mdns: config.mdns.then(|| mdns_behaviour(peer)).flatten().into(),
    };
    let config = swarm::Config::with_tokio_executor()
        .with_per_connection_event_buffer_size(CONNECTION_EVENTS_MAX)
        .with_max_negotiating_inbound_streams(STREAMS_NEGOTIATING_MAX);
    Ok(Swarm::new(transport, behaviour, peer, config))
}

/// A machine without multicast can still be reached in every other way.
fn mdns_behaviour(peer: PeerId) -> Option<mdns::tokio::Behaviour> {
    let mdns = mdns::tokio::Behaviour::new(mdns::Config::default(), peer);
    mdns.inspect_err(|error| warn!(%error, "mDNS is off: the local network cannot be listened to")).ok()
}
