//! A member of the mesh that holds the right key and no good intentions.

use super::{Site, until};
use aquifer_core::{GossipMessage, NodeId, NodeSecret, PeerMessage, Status};
use aquifer_mesh::{Mesh, MeshConfig, MeshEvent};
use std::collections::BTreeSet;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::runtime::Runtime;

pub(crate) struct Member {
    mesh: Mesh,
    heard: Arc<Mutex<Heard>>,
    /// Ends with this value, and the member with it.
    _runtime: Runtime,
}

#[derive(Default)]
struct Heard {
    connected: BTreeSet<NodeId>,
    messages: Vec<(NodeId, PeerMessage)>,
    statuses: Vec<Arc<Status>>,
}

impl Member {
    /// Joins through `peers`. `listens`: takes in what it is sent; if not, others find that out.
    pub(crate) fn join(site: &Site, seed: u8, peers: &[&str], listens: bool) -> Self {
        let key = fs::read_to_string(site.mesh_key()).expect("the mesh key");
        let config = MeshConfig {
            identity: NodeSecret::from_seed([seed; 32]),
            mesh_key: key.parse().expect("a mesh key"),
            listen: vec!["127.0.0.1:0".to_string()],
            bootstrap: peers.iter().map(ToString::to_string).collect(),
            mdns: false,
            external: Vec::new(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let (mesh, mut events) = runtime.block_on(aquifer_mesh::start(config)).expect("a mesh");
        let heard = Arc::new(Mutex::new(Heard::default()));
        let hearing = heard.clone();
        runtime.spawn(async move {
            while let Some(event) = events.recv().await {
                let connected = matches!(event, MeshEvent::Connected { .. });
                hearing.lock().unwrap_or_else(PoisonError::into_inner).note(event);
                if connected && !listens {
                    // Keeps the receiver, and never looks into it again.
                    std::future::pending::<()>().await;
                }
            }
        });
        Member { mesh, heard, _runtime: runtime }
    }

    pub(crate) fn id(&self) -> NodeId {
        self.mesh.node()
    }

    pub(crate) fn until_connected(&self, to: NodeId) {
        until("the member is connected", || self.heard(|h| h.connected.contains(&to)).then_some(()));
    }

    pub(crate) fn send(&self, to: NodeId, message: PeerMessage) {
        self.mesh.send(to, message);
    }

    pub(crate) fn gossip(&self, message: GossipMessage) {
        self.mesh.gossip(message);
    }

    /// Waits until it was sent something that `wanted` picks.
    pub(crate) fn until_hears(&self, what: &str, wanted: impl Fn(&NodeId, &PeerMessage) -> bool) {
        until(what, || self.heard(|h| h.messages.iter().any(|(from, message)| wanted(from, message))).then_some(()));
    }

    /// Waits until a status record reached it by gossip that `wanted` picks.
    pub(crate) fn until_hears_gossip(&self, what: &str, wanted: impl Fn(&Status) -> bool) {
        until(what, || self.heard(|h| h.statuses.iter().any(|s| wanted(s))).then_some(()));
    }

    fn heard<T>(&self, look: impl FnOnce(&Heard) -> T) -> T {
        look(&self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Heard {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the rest is of no interest to who wants to do harm")]
    fn note(&mut self, event: MeshEvent) {
        match event {
            MeshEvent::Connected { node, .. } => drop(self.connected.insert(node)),
            MeshEvent::Disconnected { node } => drop(self.connected.remove(&node)),
            MeshEvent::Message { from, message } => self.messages.push((from, message)),
            MeshEvent::Gossip { message: GossipMessage::Status(signed), .. } => self.statuses.extend(signed.open()),
            _ => {}
        }
    }
}
