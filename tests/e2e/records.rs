//! What a live agent decided can be looked at afterwards, without the mesh it decided it in.

use crate::site::{Site, until};
use aquifer_proto::Output;
use aquifer_proto::record::{Replay, Report};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// An agent on record hydrates from a publisher, serves another agent, and leaves. Told the same
/// again, its brain decides the same. A later life keeps the earlier record aside.
#[test]
fn a_live_agents_decisions_replay_alike() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let record = site.path("a.record");
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let start = || {
        let a = site.agent("a").flag("--store", site.path("a.store")).flag("--record", &record);
        a.peer(&publisher.address).agent()
    };
    let a = start();
    a.until_holds(&publisher.manifest);
    let b = site.agent("b").flag("--store", site.path("b.store")).peer(&a.address).agent();
    b.until_holds(&publisher.manifest);
    let node = a.status().node;
    assert!(a.process.terminate().success());

    let life = Life::read(&record);
    assert_eq!((life.report.node.to_string(), life.report.name.as_str()), (node, "a"));
    assert_eq!(life.report.torn_bytes, 0);
    assert!(life.reads >= publisher.chunks && life.hydrated > 0, "{} reads", life.reads);
    let mode = fs::metadata(&record).expect("a recording").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let first = fs::read(&record).expect("a recording");
    let identity = fs::read_to_string(site.path("a.state").join("identity")).expect("its key");
    let (_, seed) = identity.trim().rsplit_once(':').expect("a kind and a seed");
    let seed = hex::decode(seed).expect("a seed in hexadecimal");
    assert!(!first.windows(seed.len()).any(|w| w == seed), "the node's key is in its recording");

    let again = start();
    again.until_holds(&publisher.manifest);
    assert!(again.process.terminate().success());
    assert_eq!(Life::read(&record).reads, 0, "the second life had everything");
    assert!(fs::read(site.path("a.record.old")).expect("the first recording") == first);
}

/// `kill -9` leaves a recording that can be replayed up to about that moment.
#[test]
fn a_killed_agent_leaves_its_record() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let record = site.path("a.record");
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let a = site.agent("a").flag("--store", site.path("a.store")).flag("--record", &record);
    let a = a.peer(&publisher.address).agent();
    a.until_holds(&publisher.manifest);
    until("the end of the pull is on record", || (Life::read(&record).hydrated > 0).then_some(()));
    a.process.kill();
    let life = Life::read(&record);
    assert!(life.reads >= publisher.chunks && life.hydrated > 0, "{} reads", life.reads);
}

/// A recording replayed, every decision found the same.
struct Life {
    report: Report,
    reads: u64,
    hydrated: u64,
}

impl Life {
    fn read(record: &Path) -> Self {
        let (mut replay, mut reads, mut hydrated) = (Replay::default(), 0, 0);
        let mut count = |_, output: &Output| {
            reads += u64::from(matches!(output, Output::Read { .. }));
            hydrated += u64::from(matches!(output, Output::Hydrated { .. }));
        };
        replay.feed(&fs::read(record).expect("a recording"), &mut count).expect("a sound recording");
        let report = replay.finish().expect("a node's beginning");
        assert_eq!(report.difference, None);
        assert!(report.events > 0 && report.decisions > 0, "{report:?}");
        Life { report, reads, hydrated }
    }
}
