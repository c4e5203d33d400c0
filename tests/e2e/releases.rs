//! What counts as a release, and what follows from one.

use crate::site::{CHANNEL, Checkpoint, Member, Proxy, Publisher, Site, Status, stored_chunks, until};
use aquifer_core::{GossipMessage, ManifestHash, NodeId, PeerMessage, Policy, PublisherSecret, Release, SignedRelease};
use std::collections::BTreeMap;

const MIB: u64 = 1 << 20;
/// Messages of each kind, by each way.
const MESSAGES: u64 = 20;

fn release(seq: u64, manifest: &[u8], note: &str) -> Release {
    Release {
        channel: CHANNEL.parse().expect("a channel"),
        seq,
        manifest: ManifestHash::of(manifest),
        manifest_bytes: 1000,
        rolls_back_to: None,
        policy: Policy::default(),
        created_unix_ms: 0,
        note: note.to_string(),
    }
}

/// Claims to be the trusted publisher's and is not.
fn forged(trusted: &PublisherSecret, n: u64) -> SignedRelease {
    let stranger = PublisherSecret::from_seed([99; 32]);
    let mut signed = SignedRelease::sign(&release(100 + n, b"forged", "forged"), &stranger);
    signed.publisher = trusted.public();
    signed
}

fn untrusted(n: u64) -> SignedRelease {
    SignedRelease::sign(&release(200 + n, b"untrusted", "untrusted"), &PublisherSecret::from_seed([98; 32]))
}

/// The trusted publisher's own words, from before.
fn older(trusted: &PublisherSecret, n: u64) -> SignedRelease {
    SignedRelease::sign(&release(1, b"older", &format!("said {n} years ago")), trusted)
}

/// Somebody inside the mesh brings forged, untrusted and old releases, again and again, in both
/// ways in which releases travel. Nothing changes but counters, and one line each is logged; nor
/// does a restart make an agent forget what it has accepted.
#[test]
fn forged_untrusted_and_replayed_releases_change_nothing() {
    let site = Site::new();
    let (first, second) = (site.checkpoint("first", 2 * MIB, 1), site.checkpoint("second", 2 * MIB, 2));
    let agent = site.agent("a").flag("--hold", "all").agent();
    let publisher = site.publish("publisher", &first.dir).peer(&agent.address).publisher();
    agent.until_holds(&publisher.manifest);
    publisher.process.kill();
    let publisher = site.publish("publisher-2", &second.dir).peer(&agent.address).publisher();
    let before = agent.until_holds(&publisher.manifest);
    assert_eq!((publisher.seq, before.channel().seq), (2, 2));

    let trusted = site.publisher_secret();
    let liar = Member::join(&site, 77, &[&agent.address], true);
    let node: NodeId = before.node.parse().expect("a node id");
    liar.until_connected(node);
    let kinds = |n: u64| [forged(trusted, n), untrusted(n), older(trusted, n)];
    for n in 0..MESSAGES {
        for signed in kinds(n) {
            liar.send(
                node,
                PeerMessage::Snapshot { statuses: Vec::new(), releases: vec![signed], statements: Vec::new() },
            );
        }
    }
    let counts = |s: &Status| [s.rejected_releases.forged, s.rejected_releases.untrusted, s.rejected_releases.older];
    agent.until("counts what it was told", |s| counts(s) == [MESSAGES; 3]);
    // Gossip reaches it once its subscription is known, so it is said until it is heard.
    let mut said = MESSAGES;
    until("gossiped lies are counted", || {
        kinds(said).into_iter().for_each(|signed| liar.gossip(GossipMessage::Release(signed)));
        said += 1;
        counts(&agent.status()).iter().all(|&n| n >= 2 * MESSAGES).then_some(())
    });

    let after = agent.status();
    assert_eq!((after.channel().seq, &after.channel().manifest), (2, &publisher.manifest));
    assert_eq!(after.channel().state, "hydrated");
    let from_liar = format!("brought by {} is refused", liar.id().short());
    for kind in ["Forged", "Untrusted", "Older"] {
        let lines = agent.process.log_lines_with(&format!("{from_liar} ({kind})"));
        assert_eq!(lines.len(), 1, "{lines:#?}");
        assert!(lines[0].contains("WARN"), "{lines:#?}");
    }
    assert_eq!(agent.process.log_lines_with("is refused").len(), 3);

    // Alone with the liar after a restart.
    publisher.process.kill();
    agent.process.kill();
    let agent = site.agent("a").flag("--hold", "all").agent();
    drop(liar);
    let liar = Member::join(&site, 78, &[&agent.address], true);
    liar.until_connected(node);
    for signed in kinds(0) {
        liar.send(node, PeerMessage::Snapshot { statuses: Vec::new(), releases: vec![signed], statements: Vec::new() });
    }
    let status = agent.until("counts what it was told", |s| counts(s) == [1; 3]);
    assert_eq!((status.channel().seq, &status.channel().manifest), (2, &publisher.manifest));
}

/// Three publishers, each trusted for its own channel, begin at once.
#[test]
fn three_publishers_on_three_channels() {
    const CHANNELS: [&str; 3] = ["team/red", "team/green", "team/blue"];
    let site = Site::new();
    let keys = CHANNELS.map(|_| site.new_publisher());
    let checkpoints: Vec<Checkpoint> =
        (1..=3).map(|seed| site.checkpoint(&format!("model-{seed}"), 8 * MIB, seed)).collect();
    let follower = |name: &str, channels: &[&str], peer: Option<&str>| {
        let store = site.path(&format!("{name}.store"));
        let mut launch = site.agent(name).channels(channels).distrustful().flag("--store", store);
        for (channel, (_, secret)) in CHANNELS.iter().zip(&keys) {
            launch = launch.flag("--trust", format!("{channel}={}", secret.public()));
        }
        match peer {
            Some(peer) => launch.peer(peer).agent(),
            None => launch.agent(),
        }
    };
    let of_all = follower("all", &CHANNELS, None);
    let of_one = CHANNELS.map(|c| follower(&c.replace('/', "-"), &[c], Some(&of_all.address)));
    let begun: Vec<_> = (0..3)
        .map(|i| {
            let launch = site.publish(&format!("publisher-of-{i}"), &checkpoints[i].dir).channels(&[CHANNELS[i]]);
            launch.publisher_key(&keys[i].0).peer(&of_all.address).process()
        })
        .collect();
    let publishers: Vec<Publisher> = begun.into_iter().map(Publisher::of).collect();

    let mut everything = BTreeMap::new();
    for (i, agent) in of_one.iter().enumerate() {
        let status = agent.until_holds(&publishers[i].manifest);
        let expected = checkpoints[i].chunks();
        let bytes = expected.values().sum();
        assert_eq!((status.channel().channel.as_str(), status.channel().seq), (CHANNELS[i], 1));
        assert_eq!(status.traffic.bytes_in, bytes, "it fetches its channel and nothing else");
        assert_eq!(stored_chunks(&site.path(&format!("{}.store", agent.process.name))), (expected.len() as u64, bytes));
        everything.extend(expected);
    }
    for publisher in &publishers {
        of_all.until_holds(&publisher.manifest);
    }
    let bytes = everything.values().sum();
    assert_eq!(stored_chunks(&site.path("all.store")), (everything.len() as u64, bytes));
    assert_eq!(of_all.status().traffic.bytes_in, bytes, "each chunk once, whichever channels share it");
}

/// A second release comes while the first is being pulled. Nobody ends up with the first, nobody
/// waits for it, and what both share is not fetched again.
#[test]
fn a_release_superseded_while_it_is_pulled() {
    let site = Site::new();
    let first = site.checkpoint("first", 16 * MIB, 1);
    let (second, changed_bytes) = first.changed(&site, "second", 8);
    let proxy = Proxy::new();
    proxy.allow(6 * MIB);
    let publisher = site.publish("publisher", &first.dir).behind(&proxy).publisher();
    let agents = ["a", "b"].map(|name| site.agent(name).peer(&publisher.address).agent());
    let mut engines = [0, 1].map(|i| agents[i].engine(&site, &format!("engine-{i}")));
    let dir = site.path("pulled");
    let pull = site.pull("pull", &dir).peer(&publisher.address).process();
    proxy.until_stopped();
    for agent in &agents {
        let status = agent.until("is in the middle of it", |s| !s.engines.is_empty());
        assert_eq!(status.engines[0].phase, "hydrating");
        assert_eq!(status.channel().seq, 1);
    }

    let newer = site.publish("publisher-2", &second.dir).peer(&agents[0].address).publisher();
    assert_eq!(newer.seq, 2);
    assert_eq!(publisher.process.next_event(&["superseded"])["manifest"], newer.manifest.as_str());
    for (agent, engine) in agents.iter().zip(&mut engines) {
        engine.until_serves(&newer.manifest);
        engine.assert_holds(&second);
        let told: Vec<_> = engine.events().iter().map(|e| e["event"].clone()).collect();
        assert_eq!(told, ["hydrated"], "it never saw the first release");
        let status = agent.status();
        assert_eq!((status.channel().seq, &status.channel().manifest), (2, &newer.manifest));
        assert_eq!(status.engines[0].serving, newer.manifest);
        let in_flight = 4 * MIB;
        assert!(status.traffic.bytes_in <= second.tensor_bytes() + changed_bytes + in_flight, "{status:?}");
    }
    let pulled = pull.next_event(&["pulled"]);
    assert_eq!(pulled["manifest"], newer.manifest.as_str());
    assert!(pull.ended().success());
    second.assert_equals(&dir);
    assert_eq!(proxy.passed(), 6 * MIB, "the first release is still where it was");
}

/// Two engines of one node, on two channels whose checkpoints share most of their weights, hydrate
/// at once: what both need is fetched once, and reaches both.
#[test]
fn two_channels_that_share_weights() {
    let site = Site::new();
    let base = site.checkpoint("base", 8 * MIB, 1);
    let (tuned, _) = base.changed(&site, "tuned", 5);
    let (first, second) = (Proxy::new(), Proxy::new());
    [&first, &second].iter().for_each(|proxy| proxy.allow(0));
    let publisher = site.publish("publisher", &base.dir).channels(&["base"]).behind(&first).publisher();
    let launch = site.publish("publisher-2", &tuned.dir).channels(&["tuned"]).behind(&second);
    let other = launch.peer(&publisher.address).publisher();
    let agent = site.agent("a").channels(&["base", "tuned"]).peer(&publisher.address).agent();
    let mut engines = ["base", "tuned"].map(|channel| agent.engine_on(&site, &format!("engine-{channel}"), channel));
    agent.until("both engines wait", |s| {
        s.engines.len() == 2 && s.engines.iter().all(|e| e.phase == "hydrating" && e.chunks_done == 0)
    });
    [&first, &second].iter().for_each(|proxy| proxy.allow_all());

    engines[0].until_serves(&publisher.manifest);
    engines[1].until_serves(&other.manifest);
    engines[0].assert_holds(&base);
    engines[1].assert_holds(&tuned);
    let mut chunks = base.tensor_chunks();
    chunks.extend(tuned.tensor_chunks());
    assert_eq!(agent.status().traffic.bytes_in, chunks.values().sum::<u64>(), "what is shared is fetched once");
}
