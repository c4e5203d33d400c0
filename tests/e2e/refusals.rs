//! Bad input, and machines that lack what is needed: a sentence that says what is wrong and where.

use crate::site::{Checkpoint, Ended, Process, Site, stored_chunks, until};
use serde_json::json;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

/// `publish` of this ends at once, with a sentence that holds all of `words`.
fn assert_unpublishable(site: &Site, path: &Path, words: &[&str]) {
    let ended = site.publish("publisher", path).run();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(ended.output, "", "{ended:?}");
    assert!(words.iter().all(|word| ended.errors.contains(word)), "{words:?} not in {ended:?}");
    assert!(!ended.errors.contains("panicked"), "{ended:?}");
}

fn shard_of(checkpoint: &Checkpoint) -> (PathBuf, String) {
    let shard = checkpoint.shards().pop().expect("a shard");
    let name = shard.file_name().expect("a name").to_string_lossy().into_owned();
    (shard, name)
}

/// A file of the safetensors format with this header and `data` bytes of zeros.
fn safetensors(path: &Path, header: &serde_json::Value, data: usize) {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(path, bytes).expect("a file");
}

#[test]
fn checkpoints_that_cannot_be_published() {
    let site = Site::new();
    let nowhere = site.path("nowhere");
    assert_unpublishable(&site, &nowhere, &["cannot publish", "nowhere"]);
    let empty = site.path("empty");
    fs::create_dir(&empty).expect("a directory");
    assert_unpublishable(&site, &empty, &["there is no file to publish"]);

    let loops = site.checkpoint("loops", MIB, 1);
    let (shard, name) = shard_of(&loops);
    fs::remove_file(&shard).expect("its shard");
    symlink(&name, &shard).expect("a link to itself");
    assert_unpublishable(&site, &loops.dir, &[&name]);

    let truncated = site.checkpoint("truncated", MIB, 1);
    let (shard, name) = shard_of(&truncated);
    let len = fs::metadata(&shard).expect("its length").len();
    for cut in [len - 1, len / 2, 100, 7, 0] {
        fs::File::options().write(true).open(&shard).and_then(|f| f.set_len(cut)).expect("it can be cut");
        assert_unpublishable(&site, &truncated.dir, &[&name]);
    }

    let missing = site.checkpoint("missing", MIB, 1);
    let (shard, name) = shard_of(&missing);
    fs::remove_file(&shard).expect("its shard");
    assert_unpublishable(&site, &missing.dir, &[&name, "model.safetensors.index.json"]);
}

#[test]
fn safetensors_headers_that_lie() {
    let site = Site::new();
    let path = site.path("lying.safetensors");
    let tensor = |begin: u64, end: u64| json!({"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]});
    let assert_refused = |header: serde_json::Value, data: usize| {
        safetensors(&path, &header, data);
        assert_unpublishable(&site, &path, &["lying.safetensors"]);
    };
    assert_refused(json!({"a": tensor(0, 64), "b": tensor(32, 96)}), 96);
    assert_refused(json!({"a": tensor(0, 64), "b": tensor(96, 128)}), 128);
    assert_refused(json!({"a": tensor(0, 1 << 40)}), 128);
    assert_refused(json!({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}), 16);
    assert_refused(json!({"a": {"dtype": "F32", "shape": [u64::MAX, 4], "data_offsets": [0, 16]}}), 16);
    assert_refused(json!({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}), 16);
    assert_refused(json!([1, 2, 3]), 16);

    // A header said to be longer than anything.
    fs::write(&path, [0xff; 64]).expect("a file");
    assert_unpublishable(&site, &path, &["lying.safetensors"]);
    fs::write(&path, [&1_000_000_u64.to_le_bytes()[..], b"{}"].concat()).expect("a file");
    assert_unpublishable(&site, &path, &["lying.safetensors"]);
}

/// A second agent on what a first one uses ends with a sentence that says what; the first does not
/// notice.
#[test]
fn two_agents_on_one_socket_state_or_store() {
    let site = Site::new();
    let store = site.path("store");
    let first = site.agent("first").flag("--store", &store).agent();
    let assert_refused = |ended: &Ended, words: &[&str]| {
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(words.iter().all(|word| ended.errors.contains(word)), "{words:?} not in {ended:?}");
    };
    let pid = first.process.pid().to_string();
    let on_socket = site.agent("second").socket(first.socket.clone()).run();
    assert_refused(&on_socket, &["another agent is listening on", "first.sock", &pid]);
    let on_state = site.agent("second").state(site.path("first.state")).run();
    assert_refused(&on_state, &["state directory", "first.state", "--state"]);
    let on_store = site.agent("second").flag("--store", &store).run();
    assert_refused(&on_store, &["is in use by another aquifer process", "store", &pid]);
    assert!(first.status().peers.is_empty());

    // What a dead agent left behind is no reason.
    first.process.kill();
    site.agent("second").socket(first.socket.clone()).state(site.path("first.state")).flag("--store", &store).agent();
}

/// Two pulls into one directory: the second ends, the first goes on.
#[test]
fn two_pulls_into_one_directory() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 8 * MIB, 1);
    let proxy = crate::site::Proxy::new();
    proxy.allow(2 * MIB);
    let publisher = site.publish("publisher", &checkpoint.dir).behind(&proxy).publisher();
    let dir = site.path("pulled");
    let first = site.pull("first", &dir).peer(&publisher.address).process();
    proxy.until_stopped();
    let second = site.pull("second", &dir).peer(&publisher.address).run();
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(second.errors.contains("in use by another aquifer process"), "{second:?}");
    proxy.allow_all();
    first.next_event(&["pulled"]);
    checkpoint.assert_equals(&dir);
}

/// The disk of a store fills up. Status says so; what is there stays right; once there is room, the
/// release completes.
#[test]
fn a_full_disk() {
    let site = Site::new();
    let store = site.path("store");
    fs::create_dir(&store).expect("a directory");
    // A file system of its own that vanishes with its process: nothing to clean up.
    let own_mounts = ["--user", "--map-root-user", "--mount"];
    let possible = Command::new("unshare").args(own_mounts).args(["mount", "-t", "tmpfs", "none"]).arg(&store).output();
    if !possible.as_ref().is_ok_and(|output| output.status.success()) {
        eprintln!("not run: a full disk needs a small file system, and this machine lets us mount none ({possible:?})");
        return;
    }
    let checkpoint = site.checkpoint("model", 16 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let script = "mount -t tmpfs -o size=32m none \"$0\" && head -c 26m /dev/zero > \"$0/ballast\" && exec \"$@\"";
    let mut wrapper: Vec<_> = ["unshare"].iter().chain(&own_mounts).map(Into::into).collect();
    wrapper.extend(["sh".into(), "-c".into(), script.into(), store.clone().into_os_string()]);
    let agent = site.agent("a").flag("--store", &store).peer(&publisher.address).inside(wrapper).agent();

    let status = agent.until("says that its disk is full", |s| s.channel().problem.is_some());
    let problem = status.channel().problem.clone().unwrap_or_default();
    assert!(problem.contains("no space left on the disk of"), "{problem}");
    assert_eq!(status.channel().state, "fetching");
    let inside = inside_of(&agent.process, &store);
    let (count, bytes) = until("it holds what fits", || Some(stored_chunks(&inside)).filter(|(count, _)| *count > 0));
    assert!(count < publisher.chunks && bytes < 6 * MIB, "{count} chunks, {bytes} bytes");

    fs::remove_file(inside.join("ballast")).expect("the ballast");
    let status = agent.until_holds(&publisher.manifest);
    assert_eq!(status.channel().problem, None);
    assert_eq!(stored_chunks(&inside), (publisher.chunks, checkpoint.distinct_bytes()));
    assert_eq!(status.traffic.chunks_corrupt, 0);
}

/// A path as the process sees it.
fn inside_of(process: &Process, path: &Path) -> PathBuf {
    let root = PathBuf::from(format!("/proc/{}/root", process.pid()));
    root.join(path.strip_prefix("/").expect("an absolute path"))
}
