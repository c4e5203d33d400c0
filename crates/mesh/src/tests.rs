//! What a node of ours would never send.

use crate::behaviour::{self, Behaviour};
use crate::limits::MESSAGE_BYTES_MAX;
use crate::{Mesh, MeshConfig, MeshEvent, MeshKey, start};
use aquifer_core::{ManifestHash, NodeSecret, PeerMessage};
use libp2p::futures::StreamExt;
use libp2p::swarm::Swarm;
use std::time::Duration;
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);

fn config(seed: u8) -> MeshConfig {
    MeshConfig {
        identity: NodeSecret::from_seed([seed; 32]),
        mesh_key: MeshKey::generate([7; 32]),
        listen: vec!["127.0.0.1:0".to_string()],
        bootstrap: vec![],
        mdns: false,
        external: vec![],
    }
}

async fn next(events: &mut Receiver<MeshEvent>) -> MeshEvent {
    timeout(PATIENCE, events.recv()).await.expect("an event within a minute").expect("the mesh is running")
}

/// A node, and a swarm with its protocols that does as it is told, connected to it.
async fn node_and_rogue() -> (Mesh, Receiver<MeshEvent>, Swarm<Behaviour>) {
    let (mesh, mut events) = start(config(1)).await.unwrap();
    let MeshEvent::Listening { address } = next(&mut events).await else { panic!("it listens first") };
    let mut rogue = behaviour::swarm(&config(2)).unwrap();
    rogue.dial(address.parse::<libp2p::Multiaddr>().unwrap()).unwrap();
    let connected = async {
        while rogue.connected_peers().next().is_none() {
            rogue.next().await;
        }
    };
    timeout(PATIENCE, connected).await.expect("the rogue connects");
    let MeshEvent::Connected { .. } = next(&mut events).await else { panic!("it is connected") };
    (mesh, events, rogue)
}

/// Sends the frames and expects the node to complain once, for `reason`, and to disconnect.
async fn is_malformed(frames: Vec<Vec<u8>>, reason: &str) {
    let (mesh, mut events, mut rogue) = node_and_rogue().await;
    let peer = crate::identity::peer_of(mesh.node()).unwrap();
    for frame in frames {
        rogue.behaviour_mut().control.send(peer, frame);
    }
    let rogue = tokio::spawn(async move {
        while rogue.connected_peers().next().is_some() {
            rogue.next().await;
        }
    });
    let first = next(&mut events).await;
    assert!(matches!(&first, MeshEvent::Malformed { reason: said, .. } if said.contains(reason)), "{first:?}");
    assert!(matches!(next(&mut events).await, MeshEvent::Disconnected { .. }));
    timeout(PATIENCE, rogue).await.expect("the rogue is disconnected").unwrap();
    mesh.shutdown().await;
    assert!(events.recv().await.is_none(), "and nothing else is said");
}

fn honest() -> Vec<u8> {
    PeerMessage::ManifestAsk { manifest: ManifestHash::of(b"m"), offset: 0 }.encode()
}

#[tokio::test]
async fn garbage_is_said_once_and_ends_the_connection() {
    is_malformed(vec![b"garbage".to_vec(), b"more garbage".to_vec(), honest()], "the first bytes are wrong").await;
}

#[tokio::test]
async fn an_oversized_message_ends_the_connection() {
    is_malformed(vec![vec![0; MESSAGE_BYTES_MAX + 1]], "the limit is").await;
}

#[tokio::test]
async fn bytes_after_a_message_end_the_connection() {
    is_malformed(vec![[honest(), vec![0]].concat()], "after its end").await;
}

#[tokio::test]
async fn gossip_that_says_nothing_ends_the_connection() {
    let (_mesh, mut events, mut rogue) = node_and_rogue().await;
    let topic = crate::gossip::any_topic();
    tokio::spawn(async move {
        for n in 0u64.. {
            // Refused until the node has said that it listens to the topic.
            let _ = rogue.behaviour_mut().gossip.publish(topic.clone(), n.to_le_bytes().to_vec());
            let _ = timeout(Duration::from_millis(20), rogue.next()).await;
        }
    });
    assert!(matches!(next(&mut events).await, MeshEvent::Malformed { reason, .. } if reason.contains("gossip")));
    assert!(matches!(next(&mut events).await, MeshEvent::Disconnected { .. }));
}
