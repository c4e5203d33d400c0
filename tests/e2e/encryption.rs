//! A mesh whose nodes encrypt chunks on their way, and one that was not switched yet.

use crate::site::{Site, Wiretap};
use std::fs;

const MIB: u64 = 1 << 20;

/// Chunks go from a node with `tls` to one with `off`, and on to one with `tls`, and nothing of them
/// can be read from the wire where either end has it.
#[test]
fn chunks_are_hidden_while_a_mesh_is_switched_node_by_node() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 8 * MIB, 1);
    let bytes = fs::read(&checkpoint.shards()[0]).expect("a shard");
    let middle = bytes.len() / 2;
    let sample = &bytes[middle..middle + 64];
    assert!(sample.windows(2).any(|w| w[0] != w[1]), "a sample of noise");

    let first = Wiretap::new(sample);
    let publisher =
        site.publish("publisher", &checkpoint.dir).flag("--data-encryption", "tls").tapped(&first).publisher();
    let old = site.agent("old").flag("--hold", "all").peer(&publisher.address).agent();
    assert_eq!(old.until_holds(&publisher.manifest).data_encryption, "off");
    assert!(!first.has_seen(), "chunks went by in the clear");
    assert!(first.passed_bytes() >= checkpoint.distinct_bytes(), "{} bytes passed", first.passed_bytes());

    publisher.process.kill();
    let new = site.agent("new").flag("--hold", "all").flag("--data-encryption", "tls").peer(&old.address).agent();
    let status = new.until_holds(&publisher.manifest);
    assert_eq!(status.data_encryption, "tls");
    assert!(status.data_endpoint.starts_with("tls:"), "{}", status.data_endpoint);
    let mut engine = new.engine(&site, "engine");
    engine.until_serves(&publisher.manifest);
    engine.assert_holds(&checkpoint);
}

/// What the test above would see if nothing were encrypted.
#[test]
fn a_wiretap_reads_what_is_sent_in_the_clear() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 8 * MIB, 1);
    let bytes = fs::read(&checkpoint.shards()[0]).expect("a shard");
    let tap = Wiretap::new(&bytes[bytes.len() / 2..][..64]);
    let publisher = site.publish("publisher", &checkpoint.dir).tapped(&tap).publisher();
    let agent = site.agent("a").flag("--hold", "all").peer(&publisher.address).agent();
    agent.until_holds(&publisher.manifest);
    assert!(tap.has_seen());
}

#[test]
fn an_unknown_way_to_encrypt_is_refused() {
    let site = Site::new();
    let ended = site.agent("a").flag("--data-encryption", "rot13").run();
    assert_ne!(ended.code, Some(0));
    assert!(ended.errors.contains("--data-encryption: 'rot13': it is 'off' or 'tls'"), "{}", ended.errors);
}
