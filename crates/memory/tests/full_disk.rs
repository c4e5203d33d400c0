//! Stores on a disk that fills up. The disk is a small tmpfs, mounted in a user and mount
//! namespace of its own, in which this program runs itself again.

#![allow(clippy::unwrap_used, reason = "a test may")]

use aquifer_core::{Chunk, ChunkHash, FileEntry, Layout, Manifest, Part};
use aquifer_memory::{DiskStore, FileTree, Reservation, StoreError};
use std::path::Path;
use std::process::Command;

const SMALL_DISK: &str = "AQUIFER_TEST_SMALL_DISK";
const TEST: &str = "a_full_disk_is_said_plainly_and_leaves_nothing_half_written";

#[test]
fn a_full_disk_is_said_plainly_and_leaves_nothing_half_written() {
    if let Some(disk) = std::env::var_os(SMALL_DISK) {
        disk_store(&Path::new(&disk).join("store"));
        return file_tree(&Path::new(&disk).join("tree"));
    }
    let dir = tempfile::tempdir().unwrap();
    let unshared = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh"]);
        command.arg(dir.path()).arg(std::env::current_exe().unwrap()).arg(TEST).env(SMALL_DISK, dir.path());
        command.output()
    };
    let mount = r#"mount -t tmpfs -o size=3m none "$1""#;
    if !unshared(mount).is_ok_and(|probe| probe.status.success()) {
        return println!("not run: this machine does not let us mount a tmpfs in a namespace");
    }
    let run = unshared(&format!(r#"{mount}; exec "$2" --exact "$3" --nocapture"#)).unwrap();
    let output = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && output.contains("1 passed"), "{output}");
}

fn chunk(byte: u8) -> Vec<u8> {
    vec![byte; 1 << 20]
}

fn land(reservation: Reservation, bytes: &[u8]) -> Result<(), StoreError> {
    reservation.span().write(0, bytes).unwrap();
    reservation.commit().map(drop)
}

fn disk_store(dir: &Path) {
    let store = DiskStore::open(dir, None).unwrap();
    let put = |byte| land(store.reserve(ChunkHash::of(&chunk(byte)), 1 << 20).unwrap(), &chunk(byte));
    let error = (0..9).find_map(|byte| put(byte).err()).expect("nine chunks do not fit");
    assert!(matches!(&error, StoreError::DiskFull { needed, path } if *needed == 1 << 20 && path.starts_with(dir)));
    let held = store.hashes_with_len();
    assert!(!held.is_empty() && held.iter().all(|(hash, _)| store.verify(hash).unwrap()));
    assert_eq!(store.used_bytes(), (held.len() as u64) << 20);
    drop(store);
    assert_eq!(DiskStore::open(dir, None).unwrap().hashes_with_len(), held);
    std::fs::remove_dir_all(dir).unwrap();
}

fn file_tree(dir: &Path) {
    let chunks = (0..9).map(|byte| Chunk { hash: ChunkHash::of(&chunk(byte)), len: 1 << 20 }).collect();
    let file = FileEntry { path: "model".into(), parts: vec![Part::Bytes(chunks)] };
    let manifest = Manifest::new(vec![file], vec![], vec![]).unwrap();
    let tree = FileTree::open(dir, &manifest, &Layout::of(&manifest)).unwrap();
    let put = |index: u32| land(tree.reserve(index).unwrap(), &chunk(u8::try_from(index).unwrap()));
    let full = (0..9).find(|&index| match put(index) {
        Ok(()) => false,
        Err(error) => {
            let needed = u64::from(9 - index) << 20;
            assert!(matches!(&error, StoreError::DiskFull { needed: n, .. } if *n == needed), "{error}");
            true
        }
    });
    let full = full.expect("nine chunks do not fit");
    assert!(tree.get(full).is_none() && !tree.have().contains(full));
    drop(tree);
    let tree = FileTree::open(dir, &manifest, &Layout::of(&manifest)).unwrap();
    assert_eq!(tree.scan(1, &mut |_, _| {}).unwrap().iter().collect::<Vec<_>>(), (0..full).collect::<Vec<_>>());
}
