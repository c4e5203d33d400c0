//! Meshes of a few nodes in one process, over real sockets on loopback.
//!
//! Nothing here waits for a time to pass; what must happen is waited for, and its absence is
//! shown by something that happens after it.
#![expect(clippy::wildcard_enum_match_arm, reason = "a test that meets another event fails or waits on")]

use aquifer_core::{
    ChannelName, GossipMessage, ManifestHash, NodeId, NodeSecret, PeerMessage, Policy, PublisherSecret, Release,
    SignedRelease,
};
use aquifer_mesh::{Mesh, MeshConfig, MeshError, MeshEvent, MeshKey, Verdict};
use std::net::TcpListener;
use std::time::Duration;
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);
const KEY: [u8; 32] = [7; 32];

struct Node {
    mesh: Mesh,
    events: Receiver<MeshEvent>,
    address: String,
}

fn config(seed: u8, bootstrap: &[&str]) -> MeshConfig {
    MeshConfig {
        identity: NodeSecret::from_seed([seed; 32]),
        mesh_key: MeshKey::generate(KEY),
        listen: vec!["127.0.0.1:0".to_string()],
        bootstrap: bootstrap.iter().map(ToString::to_string).collect(),
        mdns: false,
        external: vec![],
    }
}

async fn start(config: MeshConfig) -> Node {
    let (mesh, events) = aquifer_mesh::start(config).await.expect("the mesh starts");
    let mut node = Node { mesh, events, address: String::new() };
    node.address = node
        .until(|event| match event {
            MeshEvent::Listening { address } => Some(address),
            _ => None,
        })
        .await;
    node
}

async fn node(seed: u8, bootstrap: &[&str]) -> Node {
    start(config(seed, bootstrap)).await
}

impl Node {
    fn id(&self) -> NodeId {
        self.mesh.node()
    }

    async fn next(&mut self) -> MeshEvent {
        let event = timeout(PATIENCE, self.events.recv()).await;
        event.expect("an event within a minute").expect("the mesh is running")
    }

    async fn until<T>(&mut self, mut found: impl FnMut(MeshEvent) -> Option<T>) -> T {
        let mut seen = Vec::new();
        loop {
            match timeout(PATIENCE, self.events.recv()).await {
                Ok(Some(event)) => {
                    seen.push(format!("{event:.200?}"));
                    if let Some(found) = found(event) {
                        return found;
                    }
                }
                Ok(None) => panic!("the mesh ended; before that: {seen:#?}"),
                Err(_) => panic!("not within a minute; instead: {seen:#?}"),
            }
        }
    }

    async fn connected(&mut self, to: NodeId) {
        self.until(|event| matches!(event, MeshEvent::Connected { node, .. } if node == to).then_some(())).await;
    }

    async fn disconnected(&mut self, from: NodeId) {
        self.until(|event| matches!(event, MeshEvent::Disconnected { node } if node == from).then_some(())).await;
    }

    async fn message(&mut self) -> (NodeId, PeerMessage) {
        self.until(|event| match event {
            MeshEvent::Message { from, message } => Some((from, message)),
            _ => None,
        })
        .await
    }

    async fn unreachable(&mut self) -> (String, String) {
        self.until(|event| match event {
            MeshEvent::Unreachable { target, reason } => Some((target, reason)),
            _ => None,
        })
        .await
    }

    /// From here on the node judges all gossip in the background and reports nothing else.
    fn judge_by(mut self, judge: impl Fn(&GossipMessage) -> Verdict + Send + 'static) -> Mesh {
        let handle = self.mesh.clone();
        tokio::spawn(async move {
            while let Some(event) = self.events.recv().await {
                if let MeshEvent::Gossip { id, message, .. } = event {
                    self.mesh.verdict(id, judge(&message));
                }
            }
        });
        handle
    }
}

/// Two nodes, the second of which was told of the first.
async fn pair() -> (Node, Node) {
    let mut a = node(1, &[]).await;
    let mut b = node(2, &[&a.address]).await;
    let (a_id, b_id) = (a.id(), b.id());
    tokio::join!(a.connected(b_id), b.connected(a_id));
    (a, b)
}

fn numbered(n: u64) -> PeerMessage {
    PeerMessage::ManifestAsk { manifest: ManifestHash::of(b"m"), offset: n }
}

fn number(message: &PeerMessage) -> u64 {
    match message {
        PeerMessage::ManifestAsk { offset, .. } => *offset,
        other => panic!("not a numbered message: {other:?}"),
    }
}

fn piece(bytes: usize) -> PeerMessage {
    let bytes = (0..=250).cycle().take(bytes).collect();
    PeerMessage::ManifestPiece { manifest: ManifestHash::of(b"m"), offset: 0, total: 1, bytes }
}

fn release(seq: u64) -> GossipMessage {
    let channel: ChannelName = "test/gossip".parse().expect("a channel name");
    let release = Release {
        channel,
        seq,
        manifest: ManifestHash::of(b"m"),
        manifest_bytes: 1,
        rolls_back_to: None,
        policy: Policy::default(),
        created_unix_ms: 0,
        note: String::new(),
    };
    GossipMessage::Release(SignedRelease::sign(&release, &PublisherSecret::from_seed([1; 32])))
}

fn seq(message: &GossipMessage) -> u64 {
    match message {
        GossipMessage::Release(release) => release.open().expect("a signed release").seq,
        GossipMessage::Status(_) | GossipMessage::Statement(_) => panic!("nobody here gossips those"),
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// `address` as `127.0.0.1:port`.
fn port_of(address: &str) -> u16 {
    address.rsplit('/').next().expect("a port").parse().expect("a port")
}

#[tokio::test]
async fn messages_arrive_in_order_both_ways() {
    const COUNT: u64 = 10_000;
    let (mut a, mut b) = pair().await;
    for n in 0..COUNT {
        a.mesh.send(b.id(), numbered(n));
        b.mesh.send(a.id(), numbered(n));
    }
    let receive = async |node: &mut Node| {
        for n in 0..COUNT {
            assert_eq!(number(&node.message().await.1), n);
        }
    };
    tokio::join!(receive(&mut a), receive(&mut b));
    assert_eq!(a.mesh.messages_dropped() + b.mesh.messages_dropped(), 0);
}

#[tokio::test]
async fn the_remote_address_is_seen() {
    let a = node(1, &[]).await;
    let mut b = node(2, &[&a.address]).await;
    let address = b
        .until(|event| match event {
            MeshEvent::Connected { address, .. } => Some(address),
            _ => None,
        })
        .await;
    assert_eq!(address, Some("127.0.0.1".parse().expect("an address")));
}

#[tokio::test]
async fn a_wrong_mesh_key_is_said_plainly_and_lets_nobody_in() {
    let mut a = node(1, &[]).await;
    let stranger = MeshConfig { mesh_key: MeshKey::generate([8; 32]), ..config(2, &[&a.address]) };
    let ours = stranger.mesh_key.fingerprint();
    let mut b = start(stranger).await;
    for _ in 0..3 {
        let (target, reason) = b.unreachable().await;
        assert_eq!(target, format!("127.0.0.1:{}", port_of(&a.address)));
        assert!(reason.contains("most likely its mesh key is not ours") && reason.contains(&ours), "{reason}");
    }
    let refused = async {
        while a.mesh.connections_refused() < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, refused).await.expect("the listener counts them too");

    // The first thing the listener hears of is a node with the right key.
    let c = node(3, &[&a.address]).await;
    assert!(matches!(a.next().await, MeshEvent::Connected { node, .. } if node == c.id()));
}

#[tokio::test]
async fn what_is_no_agent_is_said_plainly() {
    let stranger = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = stranger.local_addr().expect("its address").to_string();
    std::thread::spawn(move || stranger.incoming().for_each(drop));
    let mut a = node(1, &[&address]).await;
    let (_, reason) = a.unreachable().await;
    assert!(reason.contains("hung up before it said anything"), "{reason}");
}

#[tokio::test]
async fn gossip_reaches_nodes_that_are_not_neighbours() {
    let a = node(1, &[]).await;
    let b = node(2, &[&a.address]).await;
    let mut c = node(3, &[&b.address]).await;
    let (a, b_id) = (a.judge_by(|_| Verdict::Accept), b.id());
    let _b = b.judge_by(|_| Verdict::Accept);
    // The one in the middle may not know yet that there is somebody to pass it on to, so what
    // matters is said again until it is heard.
    let speaker = tokio::spawn(async move {
        for n in 1.. {
            a.gossip(release(n));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let (via, message) = c
        .until(|event| match event {
            MeshEvent::Gossip { via, message, .. } => Some((via, message)),
            _ => None,
        })
        .await;
    assert_eq!(via, b_id);
    assert!(seq(&message) > 0);
    speaker.abort();
}

#[tokio::test]
async fn gossip_reaches_all_that_know_one_node_only() {
    const LEAVES: u8 = 20;
    let hub = node(1, &[]).await;
    let address = hub.address.clone();
    let _hub = hub.judge_by(|_| Verdict::Accept);
    let (heard, mut hearings) = tokio::sync::mpsc::unbounded_channel();
    let mut leaves = Vec::new();
    for leaf in 0..LEAVES {
        let heard = heard.clone();
        leaves.push(node(leaf + 2, &[&address]).await.judge_by(move |message| {
            heard.send(seq(message)).expect("the test goes on");
            Verdict::Accept
        }));
    }
    let speaker = tokio::spawn(async move {
        for n in 1.. {
            leaves[0].gossip(release(n));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    let mut counts = std::collections::BTreeMap::new();
    let heard_by_all = async {
        loop {
            let count = counts.entry(hearings.recv().await.expect("the leaves listen")).or_insert(0);
            *count += 1;
            if *count == LEAVES - 1 {
                return;
            }
        }
    };
    timeout(PATIENCE, heard_by_all).await.expect("some message is heard by all but its speaker");
    speaker.abort();
}

#[tokio::test]
async fn rejected_gossip_is_not_passed_on() {
    let a = node(1, &[]).await;
    let b = node(2, &[&a.address]).await;
    let mut c = node(3, &[&b.address]).await;
    let a = a.judge_by(|_| Verdict::Accept);
    let _b = b.judge_by(|message| if seq(message).is_multiple_of(2) { Verdict::Accept } else { Verdict::Reject });
    let speaker = tokio::spawn(async move {
        for n in 1.. {
            a.gossip(release(n));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut heard = 0;
    while heard < 10 {
        let (id, message) = c
            .until(|event| match event {
                MeshEvent::Gossip { id, message, .. } => Some((id, message)),
                _ => None,
            })
            .await;
        c.mesh.verdict(id, Verdict::Accept);
        assert_eq!(seq(&message) % 2, 0, "an odd release was rejected on the way");
        heard += 1;
    }
    speaker.abort();
}

#[tokio::test]
async fn long_messages_arrive_whole() {
    let (a, mut b) = pair().await;
    a.mesh.send(b.id(), piece(1 << 20));
    a.mesh.send(b.id(), numbered(1));
    assert_eq!(b.message().await, (a.id(), piece(1 << 20)));
    assert_eq!(b.message().await, (a.id(), numbered(1)));
}

#[tokio::test]
async fn disconnected_nodes_can_be_dialled_again() {
    let (mut a, mut b) = pair().await;
    let (a_id, b_id) = (a.id(), b.id());
    for round in 0..5 {
        // The one that was not told of the other, so that only `dial` brings them together again.
        b.mesh.disconnect(a_id);
        tokio::join!(a.disconnected(b_id), b.disconnected(a_id));
        a.mesh.send(b_id, numbered(99));
        a.mesh.dial(b_id, vec![b.address.clone()]);
        tokio::join!(a.connected(b_id), b.connected(a_id));
        a.mesh.send(b_id, numbered(round));
        b.mesh.send(a_id, numbered(round));
        assert_eq!(number(&b.message().await.1), round, "nothing from before the connection");
        assert_eq!(number(&a.message().await.1), round);
    }
    assert_eq!(a.mesh.messages_dropped(), 5);
}

#[tokio::test]
async fn a_node_is_found_again_at_its_new_address() {
    let (mut a, b) = pair().await;
    let (b_id, old) = (b.id(), b.address.clone());
    b.mesh.shutdown().await;
    a.disconnected(b_id).await;

    let mut b = node(2, &[]).await;
    assert_ne!(b.address, old);
    a.mesh.dial(b_id, vec![old, b.address.clone()]);
    let a_id = a.id();
    tokio::join!(a.connected(b_id), b.connected(a_id));
    b.mesh.send(a_id, numbered(1));
    assert_eq!(a.message().await, (b_id, numbered(1)));
}

#[tokio::test]
async fn dialling_says_why_it_failed() {
    let (mut a, b) = (node(1, &[]).await, node(2, &[]).await);
    let nobody = NodeSecret::from_seed([9; 32]).public();
    a.mesh.dial(nobody, vec![format!("127.0.0.1:{}", free_port())]);
    let (target, reason) = a.unreachable().await;
    assert_eq!(target, nobody.short());
    assert!(reason.contains("connection refused"), "{reason}");

    a.mesh.dial(nobody, vec![b.address.clone()]);
    assert!(a.unreachable().await.1.contains("another node answers there"));
    a.mesh.dial(nobody, vec![a.address.clone()]);
    assert!(a.unreachable().await.1.contains("lead back to this node"));
    a.mesh.dial(nobody, vec!["nonsense".to_string()]);
    assert!(a.unreachable().await.1.contains("no address"));
}

#[tokio::test]
async fn a_bootstrap_name_is_looked_up() {
    let mut a = node(1, &[]).await;
    let mut b = node(2, &[&format!("localhost:{}", port_of(&a.address))]).await;
    let (a_id, b_id) = (a.id(), b.id());
    tokio::join!(a.connected(b_id), b.connected(a_id));
}

#[tokio::test]
async fn a_bootstrap_name_that_does_not_exist_is_said_plainly() {
    let mut a = node(1, &["no-such-name.invalid:7000"]).await;
    let (target, reason) = a.unreachable().await;
    assert_eq!(target, "no-such-name.invalid:7000");
    assert!(reason.contains("looking up"), "{reason}");
}

#[tokio::test]
async fn dialling_oneself_is_no_news() {
    let port = free_port();
    let (plain, named) = (format!("127.0.0.1:{port}"), format!("localhost:{port}"));
    let config = MeshConfig { listen: vec![plain.clone()], ..config(1, &[&plain, &named]) };
    let mut a = start(config).await;
    let b = node(2, &[&a.address]).await;
    assert!(matches!(a.next().await, MeshEvent::Connected { node, .. } if node == b.id()));
    b.mesh.send(a.id(), numbered(1));
    assert!(matches!(a.next().await, MeshEvent::Message { .. }), "nothing was said of ourselves");
}

#[tokio::test]
async fn dialling_oneself_by_an_unexpected_address_is_no_news() {
    let port = free_port();
    let everywhere = format!("0.0.0.0:{port}");
    // Not among the addresses that the node knows for its own.
    let config =
        MeshConfig { listen: vec![everywhere, "127.0.0.1:0".into()], ..config(1, &[&format!("127.0.0.2:{port}")]) };
    let mut a = start(config).await;
    let b = node(2, &[&format!("127.0.0.1:{port}")]).await;
    loop {
        match a.next().await {
            MeshEvent::Listening { address } => assert!(!address.contains("/127."), "{address}"),
            MeshEvent::Connected { node, .. } if node == b.id() => break,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_bootstrap_node_may_come_up_later() {
    let port = free_port();
    let bootstrap = format!("127.0.0.1:{port}");
    let mut a = node(1, &[&bootstrap]).await;
    let (target, reason) = a.unreachable().await;
    assert_eq!(target, bootstrap);
    assert!(reason.contains("connection refused"), "{reason}");
    let mut b = start(MeshConfig { listen: vec![bootstrap], ..config(2, &[]) }).await;
    let (a_id, b_id) = (a.id(), b.id());
    tokio::join!(a.connected(b_id), b.connected(a_id));
}

#[tokio::test]
async fn a_lost_bootstrap_node_is_found_again() {
    let port = free_port();
    let bootstrap = format!("127.0.0.1:{port}");
    let listening = || MeshConfig { listen: vec![bootstrap.clone()], ..config(2, &[]) };
    let b = start(listening()).await;
    let mut a = node(1, &[&bootstrap]).await;
    a.connected(b.id()).await;
    let b_id = b.id();
    b.mesh.shutdown().await;
    a.disconnected(b_id).await;
    let _b = start(listening()).await;
    a.connected(b_id).await;
}

#[tokio::test]
async fn nodes_that_dial_each_other_at_once_understand_each_other() {
    for round in 0..20 {
        let (mut a, mut b) = (node(1, &[]).await, node(2, &[]).await);
        let (a_id, b_id) = (a.id(), b.id());
        a.mesh.dial(b_id, vec![b.address.clone()]);
        b.mesh.dial(a_id, vec![a.address.clone()]);
        tokio::join!(a.connected(b_id), b.connected(a_id));
        for n in 0..100 {
            a.mesh.send(b_id, numbered(n));
            b.mesh.send(a_id, numbered(n));
        }
        let receive = async |node: &mut Node| {
            for n in 0..100 {
                match node.next().await {
                    MeshEvent::Message { message, .. } => assert_eq!(number(&message), n, "round {round}"),
                    other => panic!("round {round}: {other:?}"),
                }
            }
        };
        tokio::join!(receive(&mut a), receive(&mut b));
    }
}

#[tokio::test]
async fn who_does_not_take_messages_is_disconnected() {
    let (mut a, b) = pair().await;
    // Nobody takes the events of `b`, so it stops reading; what is sent piles up.
    let (sender, b_id) = (a.mesh.clone(), b.id());
    let flood = tokio::spawn(async move {
        loop {
            sender.send(b_id, piece(1 << 20));
            tokio::task::yield_now().await;
        }
    });
    a.disconnected(b_id).await;
    flood.abort();
}

#[tokio::test]
async fn last_words_are_heard() {
    const COUNT: u64 = 1000;
    let (a, mut b) = pair().await;
    let a_id = a.id();
    for n in 0..COUNT {
        a.mesh.send(b.id(), numbered(n));
    }
    a.mesh.send(b.id(), piece(1 << 20));
    let receive = async {
        for n in 0..COUNT {
            assert_eq!(number(&b.message().await.1), n);
        }
        assert_eq!(b.message().await.1, piece(1 << 20));
        b.disconnected(a_id).await;
    };
    tokio::join!(a.mesh.shutdown(), receive);
}

#[tokio::test]
async fn gossip_waits_for_the_first_to_hear_it_and_last_gossip_is_heard() {
    let a = node(1, &[]).await;
    a.mesh.gossip(release(1));
    a.mesh.gossip(release(2));
    let mut b = node(2, &[&a.address]).await;
    let gossip = |event| match event {
        MeshEvent::Gossip { message, .. } => Some(seq(&message)),
        _ => None,
    };
    assert_eq!(b.until(gossip).await, 1);
    assert_eq!(b.until(gossip).await, 2);
    a.mesh.gossip(release(3));
    let (_, last) = tokio::join!(a.mesh.shutdown(), b.until(gossip));
    assert_eq!(last, 3);
}

#[tokio::test]
async fn a_node_that_started_over_replaces_its_old_self() {
    let (mut a, mut b) = pair().await;
    a.mesh.send(b.id(), numbered(1));
    assert_eq!(number(&b.message().await.1), 1);
    // The old self still holds its connection, as one does that lost its power.
    let (a_id, b_id) = (a.id(), b.id());
    let again = node(1, &[]).await;
    again.mesh.dial(b_id, vec![b.address.clone()]);
    again.mesh.send(b_id, numbered(99));
    let mut again = again;
    again.connected(b_id).await;
    again.mesh.send(b_id, numbered(2));
    assert!(matches!(b.next().await, MeshEvent::Disconnected { node } if node == a_id));
    assert!(matches!(b.next().await, MeshEvent::Connected { node, .. } if node == a_id));
    assert!(matches!(b.next().await, MeshEvent::Message { message, .. } if number(&message) == 2));
    b.mesh.send(a_id, numbered(3));
    assert_eq!(number(&again.message().await.1), 3);
    a.disconnected(b_id).await;
}

#[tokio::test]
async fn a_taken_port_is_an_error() {
    let a = node(1, &[]).await;
    let taken = MeshConfig { listen: vec![format!("127.0.0.1:{}", port_of(&a.address))], ..config(2, &[]) };
    let error = aquifer_mesh::start(taken).await.expect_err("the port is taken");
    assert!(matches!(error, MeshError::Listen { .. }), "{error}");
    let nonsense = MeshConfig { bootstrap: vec!["nonsense".into()], ..config(2, &[]) };
    let error = aquifer_mesh::start(nonsense).await.expect_err("not an address");
    assert!(matches!(error, MeshError::Address { option: "peer", .. }), "{error}");
}

#[tokio::test]
async fn external_addresses_are_told() {
    let config = MeshConfig { external: vec!["mesh.example:7000".into()], ..config(1, &[]) };
    let (mesh, mut events) = aquifer_mesh::start(config).await.expect("the mesh starts");
    let first = timeout(PATIENCE, events.recv()).await.expect("an event");
    assert!(matches!(first, Some(MeshEvent::Listening { address }) if address == "/dns/mesh.example/tcp/7000"));
    mesh.shutdown().await;
    let rest = timeout(PATIENCE, async { while events.recv().await.is_some() {} });
    rest.await.expect("the events end with the mesh");
}
