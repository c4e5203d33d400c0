//! Nodes of one machine that share memory, and what they do when that fails.

use crate::site::{Agent, Site, Status, files_in};
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

const MIB: u64 = 1 << 20;

/// What reached the node by each way, and what left it, whole chunks or not.
fn moved(status: &Status, transport: &str) -> (u64, u64) {
    status.transports.get(transport).map_or((0, 0), |t| (t.received_bytes, t.sent_bytes))
}

/// Sockets of nodes that share memory at this site.
fn sockets(site: &Site) -> Vec<PathBuf> {
    files_in(&site.path("shm"))
}

/// A publisher's files, an agent's store and an engine's memory: whatever it lies in, nothing goes over
/// TCP between nodes of one machine, and status says so.
#[test]
fn everything_goes_through_shared_memory() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let first = site.agent("first").flag("--hold", "all").peer(&publisher.address).agent();
    first.until_holds(&publisher.manifest);
    let manifest = publisher.manifest.clone();
    publisher.process.kill();

    // From a store, and, once that is gone, from an engine's memory.
    let second = site.agent("second").peer(&first.address).agent();
    let mut engine = second.engine(&site, "engine");
    engine.until_serves(&manifest);
    let pulled = site.path("pulled");
    let pull = site.pull("pull", &pulled).peer(&first.address).process();
    pull.next_event(&["pulled"]);
    assert!(pull.ended().success());
    checkpoint.assert_equals(&pulled);
    engine.assert_holds(&checkpoint);
    let wanted = [("first", "publisher", checkpoint.distinct_bytes()), ("second", "first", checkpoint.tensor_bytes())];
    for (agent, (name, from, bytes)) in [&first, &second].into_iter().zip(wanted) {
        let status = agent.status();
        let by: Vec<(String, u64)> = status.peers.iter().flat_map(|p| p.bytes_by.clone()).collect();
        assert_eq!(by, [("shm".to_string(), bytes)], "{name} read from {from}: {status:?}");
        assert_eq!((moved(&status, "shm").0, moved(&status, "tcp")), (bytes, (0, 0)), "{status:?}");
        assert_eq!((status.traffic.bytes_in, status.traffic.chunks_corrupt), (bytes, 0));
    }
    let sent = moved(&first.status(), "shm").1;
    assert!(sent >= checkpoint.tensor_bytes(), "{sent}");
    let shown = site.run(|command| command.args(["status", "--socket"]).arg(&second.socket));
    assert!(shown.output.contains("(shm)"), "{shown:?}");

    first.process.kill();
    let third = site.agent("third").peer(&second.address).agent();
    let mut engine = third.engine(&site, "third-engine");
    engine.until_serves(&manifest);
    engine.assert_holds(&checkpoint);
    let status = third.status();
    assert_eq!((moved(&status, "shm").0, moved(&status, "tcp").0), (checkpoint.tensor_bytes(), 0), "{status:?}");
    let sockets_now = || sockets(&site).len();
    assert_eq!(sockets_now(), 2, "a dead node's socket is removed by the next to start");
    assert!(third.process.terminate().success());
    assert_eq!(sockets_now(), 1, "who leaves removes its own");
}

/// One of two holders is killed while it is read from. The rest comes from the other.
#[test]
fn a_holder_killed_while_it_is_read() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).flag("--upload-limit", "4MiB").publisher();
    let holder = site.agent("holder").flag("--hold", "all").flag("--upload-limit", "2MiB").peer(&publisher.address);
    let holder = holder.agent();
    holder.until_holds(&publisher.manifest);
    let agent = site.agent("a").peer(&publisher.address).peer(&holder.address).agent();
    let mut engine = agent.engine(&site, "engine");
    let from = |status: &Status, name: &str| status.peer(name).map_or(0, |p| p.bytes_from);
    agent.until("reads from the publisher", |s| from(s, "publisher") > 0);
    let manifest = publisher.manifest.clone();
    publisher.process.kill();
    engine.until_serves(&manifest);
    engine.assert_holds(&checkpoint);
    let status = agent.status();
    assert!(from(&status, "publisher") < checkpoint.tensor_bytes(), "it was killed too late: {status:?}");
    assert_eq!(from(&status, "publisher") + from(&status, "holder"), checkpoint.tensor_bytes());
    assert_eq!((status.traffic.chunks_corrupt, moved(&status, "tcp").0), (0, 0), "{status:?}");
}

/// Something else answers where the holder's socket was. It proves nothing, and the chunks come over TCP,
/// with nobody to blame.
#[test]
fn an_impostor_at_the_holders_socket() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 8 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let path = sockets(&site).pop().expect("the publisher's socket");
    fs::remove_file(&path).expect("a socket to remove");
    let impostor = UnixListener::bind(&path).expect("its place");
    std::thread::spawn(move || impostor.incoming().for_each(drop));
    let agent = site.agent("a").peer(&publisher.address).agent();
    let mut engine = agent.engine(&site, "engine");
    engine.until_serves(&publisher.manifest);
    engine.assert_holds(&checkpoint);
    assert_came_by_tcp(&agent, checkpoint.tensor_bytes());
    agent.process.until_logged("by TCP for");
}

/// A node that shares no memory, and one that finds no place for its socket.
#[test]
fn without_shared_memory_it_is_tcp() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 4 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let off = site.agent("off").without_shm().peer(&publisher.address).agent();
    let file = site.path("file");
    fs::write(&file, "not a directory").expect("a file");
    let nowhere = site.agent("nowhere").shm_dir(file).peer(&publisher.address).agent();
    nowhere.process.until_logged("no chunks through shared memory");
    for (agent, name) in [(&off, "engine-1"), (&nowhere, "engine-2")] {
        let mut engine = agent.engine(&site, name);
        engine.until_serves(&publisher.manifest);
        engine.assert_holds(&checkpoint);
        let status = agent.status();
        assert!(!status.transports.contains_key("shm"), "{status:?}");
        assert_came_by_tcp(agent, checkpoint.tensor_bytes());
    }
}

fn assert_came_by_tcp(agent: &Agent, bytes: u64) {
    let status = agent.status();
    assert_eq!((moved(&status, "shm").0, moved(&status, "tcp").0), (0, bytes), "{status:?}");
    assert!(status.peers.iter().all(|p| !p.avoided && p.corrupt_chunks == 0), "{status:?}");
    assert_eq!(status.traffic.reads_failed, 0, "{status:?}");
}
