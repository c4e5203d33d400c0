//! Holders whose bytes are not what they should be, on purpose or because a file changed.

use crate::site::{Agent, Checkpoint, Proxy, Publisher, Site, stored_chunks};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// One of two holders flips bits. Everybody completes with the right bytes; the liar alone is
/// blamed, and avoided.
#[test]
fn a_holder_that_flips_bits() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let (lying, honest) = (Proxy::new(), Proxy::new());
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let holder = |name: &str, proxy: &Proxy| {
        let launch = site.agent(name).flag("--hold", "all").peer(&publisher.address).behind(proxy);
        let agent = launch.agent();
        agent.until_holds(&publisher.manifest);
        agent
    };
    let (liar, good) = (holder("liar", &lying), holder("good", &honest));
    let manifest = publisher.manifest.clone();
    publisher.process.kill();

    // The liar has time to be believed: the other is silent until it was caught.
    lying.lie();
    honest.allow(0);
    let agents = ["a", "b", "c"].map(|name| site.agent(name).peer(&liar.address).peer(&good.address).agent());
    let mut engines = ["a", "b", "c"].map(|name| {
        let agent = agents.iter().find(|a| a.process.name == name).expect("an agent of that name");
        agent.engine(&site, &format!("engine-{name}"))
    });
    for agent in &agents {
        let status = agent.until("catches the liar", |s| s.peer("liar").is_some_and(|p| p.corrupt_chunks > 0));
        assert!(status.peer("liar").is_some_and(|p| p.avoided), "{status:?}");
    }
    honest.allow_all();

    for (agent, engine) in agents.iter().zip(&mut engines) {
        engine.until_serves(&manifest);
        engine.assert_holds(&checkpoint);
        let status = agent.status();
        assert_eq!(status.traffic.bytes_in, checkpoint.tensor_bytes());
        let blamed = |name: &str| status.peer(name).map_or(0, |p| p.corrupt_chunks);
        assert_eq!(status.traffic.chunks_corrupt, blamed("liar"), "others are blamed too: {status:?}");
        assert_eq!(status.peer("liar").map(|p| p.bytes_from), Some(0), "{status:?}");
        let lines = agent.process.log_lines_with("sent wrong bytes");
        assert!(lines.iter().all(|line| line.contains(&liar.status().node[..12])), "{lines:#?}");
    }
    liar.process.until_logged("it is right here");
    assert_eq!(liar.status().channel().chunks_have, publisher.chunks, "it has done nothing wrong that it knows of");
}

/// The publisher's file is written to while it is being served.
#[test]
fn a_published_file_that_is_overwritten() {
    published_file_changed(|shard| {
        let file = OpenOptions::new().write(true).open(shard).expect("the shard");
        let len = file.metadata().expect("its length").len();
        for at in (len / 8..len).step_by(64 << 10) {
            file.write_all_at(b"these are not the weights you are looking for", at).expect("room");
        }
    });
}

/// The publisher's file is cut short while it is being served.
#[test]
fn a_published_file_that_is_truncated() {
    published_file_changed(|shard| {
        let file = OpenOptions::new().write(true).open(shard).expect("the shard");
        let len = file.metadata().expect("its length").len();
        file.set_len(len / 8).expect("it can be cut");
    });
}

fn published_file_changed(spoil: impl Fn(&Path)) {
    let site = Site::new();
    // Larger than what may wait between sockets, and so cannot be spoilt any more.
    let checkpoint = site.checkpoint("model", 64 * MIB, 1);
    let spoilt = site.checkpoint("spoilt", 64 * MIB, 1);
    let proxy = Proxy::new();
    proxy.allow(3 * MIB);
    let publisher = site.publish("publisher", &spoilt.dir).behind(&proxy).publisher();
    let store = site.path("store");
    let agent = site.agent("a").flag("--store", &store).peer(&publisher.address).agent();
    proxy.until_stopped();

    let shard = spoilt.shards().pop().expect("a shard");
    spoil(&shard);
    let name = shard.file_name().expect("a name").to_string_lossy().into_owned();
    publisher.process.until_logged("the published files changed");
    assert_eq!(publisher.process.log_lines_with(&name).len(), 1, "{}", publisher.process.log());
    proxy.allow_all();

    // What is in the other files still comes, and nothing wrong is kept.
    let other_chunks = checkpoint.chunks_outside(&name);
    let status = agent.until("has all but the changed file", |s| s.channel().chunks_have >= other_chunks);
    assert!(status.channel().chunks_have < publisher.chunks, "{status:?}");
    stored_chunks(&store);

    let (second, status) = publish_again(&site, &checkpoint, &publisher, &agent);
    assert_eq!(status.channel().seq, 1, "the same manifest is no new release");
    assert_eq!(stored_chunks(&store), (publisher.chunks, checkpoint.distinct_bytes()));
    publisher.process.assert_alive();
    second.process.assert_alive();
}

fn publish_again(
    site: &Site,
    whole: &Checkpoint,
    first: &Publisher,
    agent: &Agent,
) -> (Publisher, crate::site::Status) {
    let again = site.publish("publisher-2", &whole.dir).peer(&agent.address).publisher();
    assert_eq!(again.manifest, first.manifest);
    let status = agent.until_holds(&first.manifest);
    (again, status)
}
