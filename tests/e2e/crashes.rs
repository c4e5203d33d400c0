//! `kill -9` at whatever moment: nothing verified is lost, nothing unverified is believed.

use crate::site::{Proxy, Site, stored_chunks};

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
        assert!(now > held && now.0 < publisher.chunks, "round {round}: {now:?} after {held:?}");
        held = now;
        proxy.allow(2 * MIB);
    }

    proxy.allow_all();
    let agent = start();
    let traffic = agent.until_holds(&publisher.manifest).traffic;
    assert_eq!(traffic.chunks_found, held.0);
    assert_eq!(traffic.chunks_found + traffic.chunks_verified, publisher.chunks);
    assert_eq!(traffic.bytes_in + held.1, checkpoint.distinct_bytes());
    assert_eq!(stored_chunks(&store), (publisher.chunks, checkpoint.distinct_bytes()));
}
