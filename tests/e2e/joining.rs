//! Nodes that come, go, and come back elsewhere.

use crate::site::{Site, free_address, stored_chunks, until};
use std::fs;
use std::time::Instant;

const MIB: u64 = 1 << 20;

/// The publisher dies; who comes after it gets everything from the others.
#[test]
fn a_late_joiner_after_the_publisher_is_gone() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let agents = ["a", "b"].map(|name| site.agent(name).peer(&publisher.address).agent());
    let mut engines = [0, 1].map(|i| agents[i].engine(&site, &format!("engine-{i}")));
    for engine in &mut engines {
        engine.until_serves(&publisher.manifest);
        engine.assert_holds(&checkpoint);
    }
    let manifest = publisher.manifest.clone();
    publisher.process.kill();

    let late = site.agent("late").peer(&agents[0].address).agent();
    let mut engine = late.engine(&site, "late-engine");
    engine.until_serves(&manifest);
    engine.assert_holds(&checkpoint);
    let status = late.status();
    assert_eq!(status.traffic.bytes_in, checkpoint.tensor_bytes());
    let from_others: u64 = ["a", "b"].iter().filter_map(|n| status.peer(n)).map(|p| p.bytes_from).sum();
    assert_eq!(from_others, checkpoint.tensor_bytes(), "nothing came from the dead");
}

/// An agent dies, comes back on other ports with the same state, and is found again; what it had
/// is not fetched anew, and the mesh goes on.
#[test]
fn an_agent_that_comes_back_elsewhere() {
    let site = Site::new();
    let first = site.checkpoint("first", 8 * MIB, 1);
    let (second, _) = first.changed(&site, "second", 3);
    let publisher = site.publish("publisher", &first.dir).publisher();
    let start = |name: &str, peer: &str| {
        site.agent(name).flag("--store", site.path(&format!("{name}.store"))).peer(peer).agent()
    };
    let a = start("a", &publisher.address);
    let b = start("b", &publisher.address);
    let c = start("c", &publisher.address);
    for agent in [&a, &b, &c] {
        agent.until_holds(&publisher.manifest);
    }
    let (node, address) = (c.status().node, c.address.clone());
    c.process.kill();
    let c = start("c", &a.address);
    assert_ne!(c.address, address, "a port of the system's choosing, and the old one may not be free yet");
    assert_eq!(c.until_holds(&publisher.manifest).traffic.bytes_in, 0);
    for other in [&a, &b] {
        let status = other.until("is connected to it again", |s| s.peer("c").is_some_and(|p| p.connected));
        assert_eq!(status.peer("c").map(|p| p.node.clone()), Some(node.clone()));
        assert_eq!(status.peers.iter().filter(|p| p.name == "c").count(), 1, "{status:?}");
    }

    publisher.process.kill();
    let newer = site.publish("publisher-2", &second.dir).peer(&b.address).publisher();
    for agent in [&a, &b, &c] {
        agent.until_holds(&newer.manifest);
        let store = site.path(&format!("{}.store", agent.process.name));
        until("the old release is swept away", || (stored_chunks(&store).0 == newer.chunks).then_some(()));
    }
}

/// Leaving is announced: the others drop the node at once, and do not wait for its silence.
#[test]
fn leaving_announces_itself() {
    let site = Site::new();
    let a = site.agent("a").agent();
    let b = site.agent("b").peer(&a.address).agent();
    let c = site.agent("c").peer(&a.address).agent();
    for (agent, others) in [(&a, ["b", "c"]), (&b, ["a", "c"]), (&c, ["a", "b"])] {
        agent.until("sees all", |s| others.iter().all(|other| s.peer(other).is_some()));
    }
    assert!(b.process.terminate().success());
    for agent in [&a, &c] {
        agent.until("has dropped it", |s| s.peer("b").is_none());
        assert_eq!(agent.process.log_lines_with(") left").len(), 1, "{}", agent.process.log());
        assert!(!agent.process.log().contains("is not heard of any more"), "{}", agent.process.log());
    }
    assert!(!b.socket.exists(), "it takes its socket with it");
}

/// A node's clock was hours ahead in an earlier life. It is heard all the same, in this life and
/// the next.
#[test]
fn a_clock_that_went_back() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 2 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let state = site.path("a.state");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_millis();
    let ahead = now + 10 * 3_600_000;
    fs::create_dir(&state).expect("a directory");
    fs::write(state.join("incarnation"), ahead.to_string()).expect("a file");
    let other = site.agent("other").peer(&publisher.address).agent();
    let mut known = None;
    for life in 1..=3 {
        let agent = site.agent("a").flag("--hold", "all").peer(&publisher.address).agent();
        agent.until_holds(&publisher.manifest);
        let whole = |s: &crate::site::Status| {
            s.peer("a")
                .is_some_and(|p| p.connected && p.channels.iter().any(|(_, _, have, want)| have == want && *want > 0))
        };
        let node = other.until("hears of it", whole).peer("a").map(|p| p.node.clone());
        assert_eq!(*known.get_or_insert(node.clone()), node);
        agent.process.kill();
        let text = fs::read_to_string(state.join("incarnation")).expect("the file");
        assert_eq!(text.parse::<u128>().expect("a number"), ahead + life);
        other.until("has noticed that it is gone", |s| s.peer("a").is_none_or(|p| !p.connected));
    }
}

/// 32 agents, started at once, each knowing nothing but the address of the one before.
#[test]
fn a_crowd_that_starts_at_once() {
    const AGENTS: usize = 32;
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 64 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let started = Instant::now();
    let mut peer = publisher.address.clone();
    let mut agents = Vec::new();
    for i in 0..AGENTS {
        let own = free_address();
        let launch = site.agent(&format!("agent-{i:02}")).flag("--hold", "all").peer(&peer).listen(own);
        agents.push(launch.begin());
        peer = own.to_string();
    }
    let spawned = started.elapsed();
    for agent in &mut agents {
        agent.up();
    }
    let everybody = |s: &crate::site::Status| s.peers.len() == AGENTS;
    let (mut from_publisher, mut several) = (0, 0);
    for agent in &agents {
        let status = agent.until_holds(&publisher.manifest);
        assert_eq!(status.traffic.bytes_in, checkpoint.distinct_bytes(), "each chunk once");
        assert_eq!(status.traffic.chunks_corrupt, 0);
        from_publisher += status.peer("publisher").map_or(0, |p| p.bytes_from);
        several += usize::from(status.traffic.sources > 1);
    }
    let held = started.elapsed();
    for agent in &agents {
        agent.until("sees everybody", everybody);
    }
    let seen = started.elapsed();
    let sent = loop {
        let held = publisher.process.next_event(&["held"]);
        if held["nodes"] == AGENTS {
            break held["bytes_out"].as_u64().expect("a number");
        }
    };
    let multiple = sent as f64 / checkpoint.distinct_bytes() as f64;
    eprintln!(
        "{AGENTS} agents started in {spawned:.1?}; all hold {} MiB after {held:.1?}, all see all after {seen:.1?}; \
         the publisher sent {multiple:.2} times the checkpoint; {several} agents had several sources",
        checkpoint.distinct_bytes() / MIB
    );
    assert!(spawned.as_secs() < 1, "they were to start at once, not within {spawned:?}");
    assert!(sent >= from_publisher, "{sent} bytes sent, {from_publisher} received");
    assert!(multiple <= 4.0, "the publisher sent {multiple:.2} times the checkpoint");
    assert!(several > AGENTS * 3 / 4, "only {several} agents had several sources");
}
