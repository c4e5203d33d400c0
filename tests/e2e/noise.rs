//! Peers that send garbage, nothing, or never stop, to a node that has work to do.

use crate::site::{CHANNEL, Member, Site, until};
use aquifer_core::message::{Outcome, Refusal, Returned, Terms};
use aquifer_core::{Access, ChunkSet, ManifestHash, NodeId, PeerMessage};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Connections of each kind of noise to each port.
const CONNECTIONS: usize = 40;
/// An idle agent has about 10 MiB; a queue of 32 MiB and a handful of buffers may come to it.
const RESIDENT_MAX: u64 = 160 * MIB;

/// An asker that takes everything at once, and says that it starves.
const GREED: Terms = Terms { credit_bytes: u64::MAX, flight_bytes: 0 };

/// Sends until it is told to stop; connects again whenever it is hung up on.
fn noise(to: SocketAddr, stop: &Arc<AtomicBool>, sent: &Arc<AtomicU64>, first: &'static [u8], then: Option<u8>) {
    let (stop, sent) = (stop.clone(), sent.clone());
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            let Ok(mut stream) = TcpStream::connect(to) else {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            // A node that stops reading must not keep this thread.
            let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
            let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
            let mut going = stream.write_all(first).is_ok();
            while going && !stop.load(Ordering::Relaxed) {
                going = match then {
                    Some(byte) => stream.write_all(&[byte; 4096]).is_ok(),
                    // Says nothing more, and listens until it is hung up on.
                    None => !matches!(stream.read(&mut [0; 1024]), Ok(0)),
                };
                sent.fetch_add(u64::from(then.is_some()) * 4096, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
}

fn socket_addr(text: &str) -> SocketAddr {
    // `/ip4/127.0.0.1/tcp/PORT`, or `:PORT`.
    let port = text.rsplit(['/', ':']).next().and_then(|port| port.parse().ok()).expect("a port");
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Strangers on both ports. The agent hydrates its engine meanwhile, and stays small.
#[test]
fn strangers_that_send_garbage_nothing_or_never_stop() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 8 * MIB, 1);
    let agent = site.agent("a").agent();
    let ports = [socket_addr(&agent.address), socket_addr(&agent.status().data_endpoint)];
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    for port in ports {
        for _ in 0..CONNECTIONS {
            noise(port, &stop, &sent, b"", None);
            noise(port, &stop, &sent, b"GET / HTTP/1.1\r\n\r\n", Some(b'x'));
            noise(port, &stop, &sent, b"AQDP\x01\x00\x00\x00", Some(0));
        }
    }
    until("there is noise", || (sent.load(Ordering::Relaxed) > 4 * MIB).then_some(()));

    let publisher = site.publish("publisher", &checkpoint.dir).peer(&agent.address).publisher();
    let mut engine = agent.engine(&site, "engine");
    engine.until_serves(&publisher.manifest);
    engine.assert_holds(&checkpoint);
    // And it serves others.
    publisher.process.kill();
    let late = site.agent("late").peer(&agent.address).agent();
    let mut engine = late.engine(&site, "late-engine");
    engine.until_serves(&publisher.manifest);
    engine.assert_holds(&checkpoint);
    let resident = agent.process.resident_bytes();
    stop.store(true, Ordering::Relaxed);
    assert!(resident < RESIDENT_MAX, "{} MiB resident", resident / MIB);
    let complaints = agent.process.log().lines().count();
    assert!(complaints < 100, "{complaints} lines logged");
}

/// A member of the mesh that says well-formed nonsense: about chunks that do not exist, leases that
/// were never given, bytes nobody asked for.
#[test]
fn a_member_that_talks_nonsense() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 8 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let agent = site.agent("a").flag("--hold", "all").peer(&publisher.address).agent();
    let status = agent.until_holds(&publisher.manifest);
    let node: NodeId = status.node.parse().expect("a node id");
    let member = Member::join(&site, 66, &[&agent.address], true);
    member.until_connected(node);

    let real: ManifestHash = publisher.manifest.parse().expect("a manifest");
    let chunks = u32::try_from(publisher.chunks).expect("few chunks");
    for manifest in [real, ManifestHash::of(b"another")] {
        for len in [0, 1, chunks - 1, chunks, chunks + 1, 4 << 20] {
            let (wanted, have) = (ChunkSet::full(len), ChunkSet::full(len));
            member.send(node, PeerMessage::Ask { manifest, wanted: wanted.clone(), have, terms: GREED });
            let terms = Terms::default();
            member.send(node, PeerMessage::Ask { manifest, wanted, have: ChunkSet::empty(len), terms });
        }
        for chunk in [0, chunks, u32::MAX] {
            let (returned, taken, again) = (vec![], vec![chunk; 2000], vec![chunk; 2000]);
            member.send(node, PeerMessage::Progress { manifest, returned, taken, again, terms: GREED });
            let access = Access { ticket: 1, secret: [1; 32] };
            let granted = vec![chunk, chunk];
            member.send(node, PeerMessage::Grant { manifest, lease: 1, ttl_ms: 0, chunks: granted, access });
            for lease in [0, 1, u64::MAX] {
                let returned = vec![Returned { lease, chunk, outcome: Outcome::Corrupt }; 2];
                let (taken, again, terms) = (vec![], vec![], Terms::default());
                member.send(node, PeerMessage::Progress { manifest, returned, taken, again, terms });
                member.send(node, PeerMessage::Revoke { manifest, lease });
            }
        }
        member.send(node, PeerMessage::Refuse { manifest, refusal: Refusal::Nothing });
        for offset in [1, u64::MAX / 2, u64::MAX] {
            member.send(node, PeerMessage::ManifestAsk { manifest, offset });
            let bytes = vec![7; 1000];
            member.send(node, PeerMessage::ManifestPiece { manifest, offset, total: u64::MAX, bytes });
        }
    }
    // Messages are heard in order: this one's answer says that all were.
    member.send(node, PeerMessage::ManifestAsk { manifest: real, offset: 0 });
    member.until_hears("an answer to the last of it", |from, message| {
        let PeerMessage::ManifestPiece { manifest, offset: 0, bytes, .. } = message else { return false };
        *from == node && *manifest == real && !bytes.is_empty()
    });
    // Asked for its chunks in earnest, it still grants them.
    let (wanted, have) = (ChunkSet::full(chunks), ChunkSet::empty(chunks));
    member.send(node, PeerMessage::Ask { manifest: real, wanted, have, terms: GREED });
    member.until_hears("a grant", |from, message| {
        let PeerMessage::Grant { manifest, chunks, .. } = message else { return false };
        *from == node && *manifest == real && !chunks.is_empty()
    });
    publisher.process.kill();
    let late = site.agent("late").flag("--hold", "all").peer(&agent.address).agent();
    late.until_holds(&publisher.manifest);
    assert_eq!(agent.status().channel().chunks_have, publisher.chunks);
    assert!(!agent.process.log().contains("panicked"));
}

/// A member that asks and asks, and takes nothing in: it is hung up on before its answers fill the
/// memory.
#[test]
fn a_member_that_never_stops_asking() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 8 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let agent = site.agent("a").peer(&publisher.address).agent();
    let status = agent.until("knows the manifest", |s| s.channel().state == "idle");
    let node: NodeId = status.node.parse().expect("a node id");
    let member = Member::join(&site, 65, &[&agent.address], false);
    member.until_connected(node);

    let manifest: ManifestHash = publisher.manifest.parse().expect("a manifest");
    let before = agent.process.resident_bytes();
    let mut most = 0;
    // A member that is never hung up on has its messages pile up on its own side.
    for _ in 0..200 {
        for _ in 0..2000 {
            member.send(node, PeerMessage::ManifestAsk { manifest, offset: 0 });
        }
        most = most.max(agent.process.resident_bytes());
        assert_eq!(agent.status().channel().channel, CHANNEL);
    }
    eprintln!("{} MiB resident before, {} MiB at most", before / MIB, most / MIB);
    assert!(most < RESIDENT_MAX, "{} MiB resident", most / MIB);
    let mut engine = agent.engine(&site, "engine");
    engine.until_serves(&publisher.manifest);
    engine.assert_holds(&checkpoint);
}
