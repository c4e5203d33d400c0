//! The mesh: who the other agents are, how to reach them, and carrying what agents say to each
//! other, over libp2p.
//!
//! It decides nothing about releases or chunks and does not know what a message means. A mesh is
//! private: connections are made under a shared [`MeshKey`], and the other side's [`NodeId`] is
//! proven by Noise. Bulk bytes do not travel here.
#![forbid(unsafe_code)]

mod backoff;
mod behaviour;
mod bootstrap;
mod complaints;
mod control;
mod dials;
mod driver;
mod gossip;
mod identity;
mod key;
pub mod limits;
mod listeners;
mod place;
mod secure;
#[cfg(test)]
mod tests;

use crate::limits::{EVENTS_MAX, HANDOFF_BYTES_MAX};
use aquifer_core::{GossipMessage, NodeId, NodeSecret, PeerMessage};
use driver::{Command, Driver};
pub use gossip::{GossipId, Verdict};
pub use key::{MeshKey, MeshKeyError};
pub use place::AddressError;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

/// How a node takes part in its mesh.
#[derive(Clone, Debug)]
pub struct MeshConfig {
    pub identity: NodeSecret,
    pub mesh_key: MeshKey,
    /// Where to listen: `host:port` or multiaddresses. None is allowed, for a node that only dials.
    pub listen: Vec<String>,
    /// Whom to find the mesh through: multiaddresses, `ip:port`, or `name:port` where the name may
    /// have any number of addresses, and others tomorrow.
    pub bootstrap: Vec<String>,
    /// Whether to announce this node on the local network and dial those announced there.
    pub mdns: bool,
    /// Addresses at which others reach this node, besides those it listens on.
    pub external: Vec<String>,
}

#[derive(Debug, Error)]
pub enum MeshError {
    #[error("{option}: {source}")]
    Address { option: &'static str, source: AddressError },
    #[error("cannot listen on {address}: {reason}")]
    Listen { address: String, reason: String },
    #[error("cannot set up the mesh: {reason}")]
    Setup { reason: String },
}

/// What the mesh tells its agent. For one node, messages come only between `Connected` and
/// `Disconnected`, in the order they were sent and without gaps.
#[derive(Debug)]
pub enum MeshEvent {
    /// A multiaddress at which others may reach us.
    Listening {
        address: String,
    },
    /// Not any more.
    ListeningEnded {
        address: String,
    },
    /// `address` is where we see it, which may be a gateway's.
    Connected {
        node: NodeId,
        address: Option<IpAddr>,
    },
    Disconnected {
        node: NodeId,
    },
    Message {
        from: NodeId,
        message: PeerMessage,
    },
    /// To be answered with [`Mesh::verdict`] within a few seconds.
    Gossip {
        via: NodeId,
        id: GossipId,
        message: GossipMessage,
    },
    /// What came from the node was no message; it is being disconnected.
    Malformed {
        from: NodeId,
        reason: String,
    },
    /// An attempt to reach a bootstrap address or a node that was to be dialled failed. Sent for
    /// each attempt, logged only when the reason changes.
    Unreachable {
        target: String,
        reason: String,
    },
}

/// A handle on a running mesh. The mesh ends with [`Mesh::shutdown`], with its last handle, or
/// with the receiver of its events.
#[derive(Clone, Debug)]
pub struct Mesh {
    node: NodeId,
    commands: mpsc::UnboundedSender<Command>,
    shared: Arc<Shared>,
}

/// What handles and driver both count.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// Bytes of messages handed over and not looked at yet.
    handed_bytes: AtomicUsize,
    messages_dropped: AtomicU64,
    connections_refused: AtomicU64,
}

/// Starts a node: it listens when this returns. Must be called on a tokio runtime, which it uses
/// until it ends.
pub async fn start(config: MeshConfig) -> Result<(Mesh, mpsc::Receiver<MeshEvent>), MeshError> {
    let node = config.identity.public();
    let shared = Arc::new(Shared::default());
    let (commands, inbox) = mpsc::unbounded_channel();
    let (events, outbox) = mpsc::channel(EVENTS_MAX);
    let driver = Driver::new(config, inbox, events, shared.clone()).await?;
    tokio::spawn(driver.run());
    Ok((Mesh { node, commands, shared }, outbox))
}

impl Mesh {
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Messages to one node arrive in the order they were sent, or the node is disconnected. A
    /// message to a node that is not connected is dropped and counted.
    pub fn send(&self, to: NodeId, message: PeerMessage) {
        let frame = message.encode();
        let cost = control::cost(&frame);
        let command = match self.shared.handed_bytes.fetch_add(cost, Ordering::Relaxed) + cost {
            handed if handed <= HANDOFF_BYTES_MAX => Command::Send { to, frame },
            // A gap in what a node is sent would be worse than its loss.
            _ => {
                self.shared.handed_bytes.fetch_sub(cost, Ordering::Relaxed);
                self.shared.messages_dropped.fetch_add(1, Ordering::Relaxed);
                Command::Disconnect { node: to }
            }
        };
        self.command(command);
    }

    /// Tells everybody who is there; if nobody is, a few of the newest messages are kept for the
    /// first to come. Who comes later is not told: say again what matters.
    pub fn gossip(&self, message: GossipMessage) {
        self.command(Command::Gossip { message });
    }

    /// Decides about a gossip message; until then it is not passed on.
    pub fn verdict(&self, id: GossipId, verdict: Verdict) {
        self.command(Command::Verdict { id, verdict });
    }

    /// Tries once to connect to `node`, now or when its backoff allows; any number of calls until
    /// then are one. Does nothing if it is connected. A failure is told as
    /// [`MeshEvent::Unreachable`].
    pub fn dial(&self, node: NodeId, addresses: Vec<String>) {
        self.command(Command::Dial { node, addresses });
    }

    pub fn disconnect(&self, node: NodeId) {
        self.command(Command::Disconnect { node });
    }

    /// Messages that were dropped because their node was not connected.
    pub fn messages_dropped(&self) -> u64 {
        self.shared.messages_dropped.load(Ordering::Relaxed)
    }

    /// Incoming connections that could not be secured, most likely for want of our mesh key.
    pub fn connections_refused(&self) -> u64 {
        self.shared.connections_refused.load(Ordering::Relaxed)
    }

    /// Lets queued messages leave, for a moment, then closes all connections.
    pub async fn shutdown(self) {
        let (done, finished) = oneshot::channel();
        self.command(Command::Shutdown { done });
        // An error says that the driver is gone already.
        let _ = finished.await;
    }

    fn command(&self, command: Command) {
        // Nobody listens any more once the mesh has shut down.
        let _ = self.commands.send(command);
    }
}
