//! Nodes that come, go, and come back elsewhere.

use crate::site::{Site, until};

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
