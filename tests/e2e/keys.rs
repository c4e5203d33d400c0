//! A mesh is private, and says so plainly to who has not its key.

use crate::site::{CHANNEL, Ended, Site, until};
use std::fs;

const MIB: u64 = 1 << 20;

/// A node with another mesh's key gets nowhere, and is told why, as is whoever it knocked at; nodes
/// with the right key are none the worse.
#[test]
fn a_wrong_mesh_key() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", 4 * MIB, 1);
    let publisher = site.publish("publisher", &checkpoint.dir).publisher();
    let other_key = site.new_mesh_key("other-mesh.key");
    let outsider = site.agent("outsider").mesh_key(other_key.clone()).flag("--hold", "all").peer(&publisher.address);
    let outsider = outsider.agent();
    outsider.process.until_logged("most likely its mesh key is not ours");
    publisher.process.until_logged("most likely its mesh key is not ours");

    let insider = site.agent("insider").flag("--hold", "all").peer(&publisher.address).agent();
    insider.until_holds(&publisher.manifest);
    assert!(insider.status().peer("outsider").is_none());
    let status = outsider.status();
    assert!(status.peers.is_empty(), "{status:?}");
    assert_eq!((status.channel().state.as_str(), status.traffic.bytes_in), ("waiting", 0));
    let lines = outsider.process.log_lines_with("mesh key is not ours");
    assert_eq!(lines.len(), 1, "said once, not at every attempt: {lines:#?}");

    let to = site.path("pulled");
    let pull = site.pull("pull", &to).mesh_key(other_key).peer(&publisher.address).flag("--timeout", "3").run();
    assert_eq!(pull.code, Some(3), "{pull:?}");
    assert!(pull.errors.contains("mesh key"), "{pull:?}");
    assert!(!to.exists());
}

/// No key, a key that is not there, a file that is no key: each command says what to do.
#[test]
fn a_missing_mesh_key() {
    let site = Site::new();
    let checkpoint = site.checkpoint("model", MIB, 1);
    let trust = site.publisher_secret().public().to_string();
    let (secret, to) = (site.publisher_key().to_path_buf(), site.path("pulled"));
    let assert_says = |ended: Ended, words: &[&str]| {
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(words.iter().all(|word| ended.errors.contains(word)), "{words:?} not in {ended:?}");
    };
    let what_to_do = ["no mesh key", "aquifer keygen mesh", "--mesh-key"];
    assert_says(site.run(|c| c.args(["agent", "--channel", CHANNEL, "--trust", &trust])), &what_to_do);
    let pull = site.run(|c| c.args(["pull", CHANNEL, "--trust", &trust, "--peer", "127.0.0.1:1", "--to"]).arg(&to));
    assert_says(pull, &what_to_do);
    let publish = |extra: &[&str]| {
        site.run(|c| {
            let c = c.arg("publish").arg(&checkpoint.dir).args(["--channel", CHANNEL, "--publisher-key"]);
            c.arg(&secret).args(extra)
        })
    };
    assert_says(publish(&[]), &what_to_do);
    assert_says(publish(&["--mesh-key", "/nowhere/mesh.key"]), &["cannot read the mesh key /nowhere/mesh.key"]);
    let empty = site.path("empty.key");
    fs::write(&empty, "").expect("a file");
    let empty = empty.display().to_string();
    assert_says(publish(&["--mesh-key", &empty]), &[&empty, "is not a mesh key", "aquifer keygen mesh"]);
}

/// A channel without anybody trusted for it is a mistake that is told, not a node that waits.
#[test]
fn nobody_trusted() {
    let site = Site::new();
    let ended = site.agent("a").distrustful().run();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.errors.contains(CHANNEL) && ended.errors.contains("--trust"), "{ended:?}");
    until("nothing is left behind", || (!site.path("a.sock").exists()).then_some(()));
}
