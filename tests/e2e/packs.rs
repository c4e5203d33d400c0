//! Short tensors, which share chunks: into an engine's memory, after a crash, and in an update.

use crate::site::Site;

const TENSORS: u64 = 3000;

/// The engine's tensors begin at multiples of 256 bytes: these lie in it as in the file, and packs land
/// there at once.
#[test]
fn packs_that_lie_in_one_piece() {
    short_tensors_live_through_everything(4096);
}

/// Between these there are gaps: packs are copied in pieces, and gathered to be checked.
#[test]
fn packs_that_lie_in_pieces() {
    short_tensors_live_through_everything(4000);
}

fn short_tensors_live_through_everything(bytes: u64) {
    let site = Site::new();
    let first = site.short_tensors("first", TENSORS, bytes);
    let (second, changed_bytes) = first.changed(&site, "second", 3);
    let (old, new) = (first.tensor_chunks(), second.tensor_chunks());
    assert!((old.len() as u64) < TENSORS / 10, "{} chunks", old.len());

    let publisher = site.publish("publisher", &first.dir).publisher();
    let agent = site.agent("a").peer(&publisher.address).agent();
    let mut engine = agent.engine(&site, "engine");
    engine.until_serves(&publisher.manifest);
    engine.assert_holds(&first);
    assert_eq!(agent.status().traffic.bytes_in, old.values().sum::<u64>());

    publisher.process.kill();
    agent.process.kill();
    let agent = site.agent("a").agent();
    let status = agent.until("knows its engine again", |s| s.engines.iter().any(|e| e.ready));
    assert_eq!((status.traffic.chunks_found, status.traffic.bytes_in), (old.len() as u64, 0));

    let newer = site.publish("publisher-2", &second.dir).peer(&agent.address).publisher();
    engine.until_serves(&newer.manifest);
    engine.assert_holds(&second);
    let moved: u64 = new.iter().filter(|(hash, _)| !old.contains_key(*hash)).map(|(_, len)| len).sum();
    assert_eq!(agent.status().traffic.bytes_in, moved);
    assert!(moved > changed_bytes, "a changed tensor brings its pack");
    assert!(moved <= 3 * (64 << 10), "and no more than that: {moved} bytes");
}
