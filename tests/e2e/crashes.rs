//! `kill -9` at whatever moment: nothing verified is lost, nothing unverified is believed.

use crate::site::{OwnEngine, Proxy, Site, Told, stored_chunks};

const MIB: u64 = 1 << 20;

/// An agent with a store is killed in the middle of a pull, several times, and goes on each time
/// with what it had.
#[test]
fn an_agent_with_a_store_fetches_nothing_twice() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let proxy = Proxy::new();
    proxy.allow(2 * MIB);
    let publisher = site.publish("publisher", &checkpoint.dir).behind(&proxy).publisher();
    let store = site.path("store");
    let start = || site.agent("a").flag("--store", &store).peer(&publisher.address).agent();

    let mut held = (0, 0);
    for round in 0..4 {
        let agent = start();
        let found = agent.until("has checked its store", |s| s.channel().state == "fetching");
        assert_eq!(found.traffic.chunks_found, held.0, "round {round}");
        proxy.until_stopped();
        agent.process.kill();
        let now = stored_chunks(&store);
        assert!(now >= held && now.0 < publisher.chunks, "round {round}: {now:?} after {held:?}");
        held = now;
        proxy.allow(3 * MIB);
    }
    assert!(held.0 > 0, "nothing was in the middle of anything");

    proxy.allow_all();
    let agent = start();
    let traffic = agent.until_holds(&publisher.manifest).traffic;
    assert_eq!(traffic.chunks_found, held.0);
    assert_eq!(traffic.chunks_found + traffic.chunks_verified, publisher.chunks);
    assert_eq!(traffic.bytes_in + held.1, checkpoint.distinct_bytes());
    assert_eq!(stored_chunks(&store), (publisher.chunks, checkpoint.distinct_bytes()));
}

/// The same for `aquifer pull`: what it had written when it was killed is found, and not fetched.
#[test]
fn a_pull_fetches_nothing_twice() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let proxy = Proxy::new();
    proxy.allow(4 * MIB);
    let publisher = site.publish("publisher", &checkpoint.dir).behind(&proxy).publisher();
    let dir = site.path("pulled");
    let start = || site.pull("pull", &dir).peer(&publisher.address).process();

    let mut written = (0, 0);
    for round in 0..3 {
        let pull = start();
        proxy.until_stopped();
        pull.kill();
        let now = checkpoint.chunks_growing_in(&dir);
        assert!(now >= written && now.0 < publisher.chunks, "round {round}: {now:?} after {written:?}");
        written = now;
        proxy.allow(3 * MIB);
    }
    assert!(written.0 > 0, "nothing was in the middle of anything");

    proxy.allow_all();
    let pull = start();
    let report = pull.next_event(&["pulled"]);
    assert!(pull.ended().success());
    let number = |name: &str| report[name].as_u64().expect("a number");
    assert_eq!(number("chunks_found"), written.0);
    assert_eq!(number("chunks_found") + number("chunks_fetched"), publisher.chunks);
    assert_eq!(number("bytes_in") + written.1, checkpoint.distinct_bytes());
    checkpoint.assert_equals(&dir);

    let again = start();
    let report = again.next_event(&["pulled"]);
    assert_eq!(report["chunks_fetched"], 0);
    assert_eq!(report["chunks_found"], publisher.chunks);
}

/// An engine dies while its memory is being filled. The agent goes on, and fills the next one's.
#[test]
fn an_engine_killed_while_it_hydrates() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let proxy = Proxy::new();
    proxy.allow(4 * MIB);
    let publisher = site.publish("publisher", &checkpoint.dir).behind(&proxy).publisher();
    let agent = site.agent("a").peer(&publisher.address).agent();
    let engine = agent.engine(&site, "engine");
    proxy.until_stopped();
    let status = agent.until("is filling it", |s| s.engines.first().is_some_and(|e| e.chunks_done > 0));
    assert_eq!(status.engines[0].phase, "hydrating");
    assert!(status.engines[0].chunks_done < status.engines[0].chunks_total);
    engine.kill();
    let status = agent.until("has seen it die", |s| s.engines.is_empty());
    let (channel, lost) = (status.channel(), status.traffic.bytes_in);
    assert!(channel.chunks_wanted == 0 || channel.chunks_have <= channel.chunks_wanted, "{status:?}");

    proxy.allow_all();
    let mut engine = agent.engine(&site, "engine-2");
    engine.until_serves(&publisher.manifest);
    engine.assert_holds(&checkpoint);
    let status = agent.status();
    assert!(status.engines[0].ready, "{status:?}");
    assert!(status.traffic.bytes_in <= lost + checkpoint.tensor_bytes(), "{status:?}");
}

/// The agent dies while its engine serves. The engine serves on; the agent that comes back finds
/// every byte in the engine's memory, and needs nobody else.
#[test]
fn an_agent_killed_while_its_engine_serves() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let agent = site.agent("a").peer(&publisher.address).agent();
    let mut engine = agent.engine(&site, "engine");
    engine.until_serves(&publisher.manifest);
    let manifest = publisher.manifest.clone();
    publisher.process.kill();
    agent.process.kill();
    engine.assert_holds(&checkpoint);

    let agent = site.agent("a").agent();
    let status = agent.until("knows its engine again", |s| s.engines.iter().any(|e| e.ready));
    assert_eq!(status.engines[0].serving, manifest);
    assert_eq!(status.traffic.chunks_found, checkpoint.tensor_chunks().len() as u64);
    assert_eq!(status.traffic.bytes_in, 0);
    engine.assert_holds(&checkpoint);
    let told: Vec<_> = engine.events().iter().map(|e| e["event"].clone()).collect();
    assert!(told.iter().all(|event| event == "hydrated"), "it was never disturbed: {told:?}");
}

/// The agent dies while the engine stands still for it, and leaves memory half one release and half
/// something else. The engine does not serve until an agent has looked at every byte; that one
/// fetches what is wrong, and nothing else.
#[test]
fn an_agent_killed_while_it_applies_a_release() {
    let site = Site::new();
    let first = site.checkpoint("first", 16 * MIB, 1);
    let (second, changed_bytes) = first.changed(&site, "second", 3);
    let publisher = site.publish("publisher", &first.dir).publisher();
    let agent = site.agent("a").peer(&publisher.address).agent();
    let engine = OwnEngine::start(&agent);
    assert_eq!(engine.next(), Told::Hydrated(publisher.manifest.clone()));
    engine.assert_holds(&first);

    let newer = site.publish("publisher-2", &second.dir).peer(&agent.address).publisher();
    assert_eq!(engine.next(), Told::Pause(newer.manifest.clone()));
    assert_eq!(agent.until("waits for it", |s| s.engines[0].phase == "pausing").engines[0].serving, publisher.manifest);
    agent.process.kill();
    let spoilt = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"];
    spoilt.iter().for_each(|tensor| engine.spoil(tensor));
    engine.go_on();

    let agent = site.agent("a").peer(&newer.address).agent();
    assert_eq!(engine.next(), Told::Resume(newer.manifest.clone()));
    engine.assert_holds(&second);
    assert!(engine.is_told_nothing());
    let traffic = agent.until("says so", |s| s.engines.iter().any(|e| e.ready)).traffic;
    let missing =
        second.tensor_chunks_of(|name| spoilt.contains(&name) || first.tensors()[name] != second.tensors()[name]);
    assert_eq!(traffic.bytes_in, missing.values().sum::<u64>());
    assert!(traffic.bytes_in > changed_bytes, "spoilt tensors are fetched besides those that changed");
    assert_eq!(traffic.chunks_found + traffic.chunks_verified, second.tensor_chunks().len() as u64);
}

/// The same with a real engine, killed at whatever instant it happens to be: before bytes move,
/// between them, or after.
#[test]
fn agents_killed_as_soon_as_their_engines_pause() {
    let site = Site::new();
    let mut current = site.checkpoint("release-1", 32 * MIB, 1);
    let mut publisher = site.publish("publisher-1", &current.dir).publisher();
    let mut agent = site.agent("a").peer(&publisher.address).agent();
    let mut engine = agent.engine(&site, "engine");
    engine.until_serves(&publisher.manifest);
    for n in 2..6 {
        let next = current.changed(&site, &format!("release-{n}"), 20).0;
        let newer = site.publish(&format!("publisher-{n}"), &next.dir).peer(&agent.address).publisher();
        engine.process().next_event(&["paused"]);
        agent.process.kill();
        publisher.process.kill();
        agent = site.agent("a").peer(&newer.address).agent();
        engine.until_serves(&newer.manifest);
        engine.assert_holds(&next);
        let status = agent.until("says so", |s| s.engines.iter().any(|e| e.ready));
        assert_eq!(status.engines[0].serving, newer.manifest);
        (current, publisher) = (next, newer);
    }
}
