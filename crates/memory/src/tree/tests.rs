use super::*;
use aquifer_core::{ChunkHash, FileEntry, Part};
use std::path::PathBuf;

/// A checkpoint of plain files, each given as the chunks it is made of.
struct Checkpoint {
    manifest: Manifest,
    layout: Layout,
    files: Vec<(String, Vec<Vec<u8>>)>,
}

fn checkpoint(files: &[(&str, &[&[u8]])]) -> Checkpoint {
    let chunk = |bytes: &&[u8]| Chunk { hash: ChunkHash::of(bytes), len: u32::try_from(bytes.len()).unwrap() };
    let entry = |(path, chunks): &(&str, &[&[u8]])| FileEntry {
        path: (*path).into(),
        parts: vec![Part::Bytes(chunks.iter().map(chunk).collect())],
    };
    let manifest = Manifest::new(files.iter().map(entry).collect(), vec![], vec![]).unwrap();
    let layout = Layout::of(&manifest);
    let own = |(path, chunks): &(&str, &[&[u8]])| (path.to_string(), chunks.iter().map(|c| c.to_vec()).collect());
    Checkpoint { manifest, layout, files: files.iter().map(own).collect() }
}

impl Checkpoint {
    fn open(&self, dir: &Path) -> FileTree {
        FileTree::open(dir, &self.manifest, &self.layout).unwrap()
    }

    fn bytes_of(&self, index: u32) -> &[u8] {
        let hash = self.layout.chunk(index).hash;
        self.files.iter().flat_map(|f| &f.1).find(|bytes| ChunkHash::of(bytes) == hash).unwrap()
    }

    fn land(&self, tree: &FileTree, index: u32) {
        let reservation = tree.reserve(index).unwrap();
        reservation.span().write(0, self.bytes_of(index)).unwrap();
        let span = reservation.commit().unwrap();
        assert_eq!(span.hash().unwrap(), self.layout.chunk(index).hash);
    }

    /// Fetches what a scan does not find, and returns how many chunks that were.
    fn complete(&self, tree: &FileTree) -> u32 {
        let mut missing = tree.wanted();
        missing.subtract(&tree.scan(2, &mut |_, _| {}).unwrap());
        missing.iter().for_each(|index| self.land(tree, index));
        tree.finish().unwrap();
        missing.count()
    }

    fn assert_in(&self, dir: &Path) {
        for (path, chunks) in &self.files {
            assert_eq!(fs::read(dir.join(path)).unwrap(), chunks.concat(), "{path}");
        }
        assert!(!dir.join(PARTIAL_DIR).exists());
    }

    fn inode(&self, dir: &Path, file: usize) -> u64 {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(dir.join(&self.files[file].0)).unwrap().ino()
    }
}

const A: &[u8] = &[1; 300_000];
const B: &[u8] = &[2; 5000];
const C: &[u8] = &[3; 5000];

fn one() -> Checkpoint {
    checkpoint(&[("config.json", &[b"{}"]), ("empty", &[]), ("sub/model", &[A, B, A, C])])
}

fn two() -> Checkpoint {
    checkpoint(&[("config.json", &[b"{}"]), ("sub/model", &[A, C, A, C])])
}

#[test]
fn files_are_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let tree = one().open(dir.path());
    assert!(matches!(tree.finish(), Err(StoreError::Incomplete { missing: 4 })));
    assert!(!dir.path().join("sub").exists());
    assert_eq!(one().complete(&tree), 4);
    one().assert_in(dir.path());
    let a = one().layout.index_of(&ChunkHash::of(A)).unwrap();
    assert_eq!(tree.get(a).unwrap().hash().unwrap(), ChunkHash::of(A), "served on after the end");
    tree.finish().unwrap();
}

#[test]
fn a_restart_refetches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let tree = one().open(dir.path());
    let landed = [0, 2];
    landed.iter().for_each(|&index| one().land(&tree, index));
    drop(tree);
    let tree = one().open(dir.path());
    let mut told = Vec::new();
    let found = tree.scan(3, &mut |index, len| told.push((index, len))).unwrap();
    told.sort_unstable();
    assert_eq!(found.iter().collect::<Vec<_>>(), landed);
    assert_eq!(told, landed.map(|i| (i, u64::from(one().layout.chunk(i).len))));
    assert_eq!(one().complete(&tree), 2);
    one().assert_in(dir.path());
}

#[test]
fn a_torn_write_is_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let tree = one().open(dir.path());
    let a = one().layout.index_of(&ChunkHash::of(A)).unwrap();
    one().land(&tree, a);
    let path = tree.0.partial.path_of("sub/model");
    drop(tree);
    // As if the process had been killed in the middle of the second place.
    let model = fs::OpenOptions::new().write(true).open(path).unwrap();
    model.write_all_at(&[0; 1000], 305_000 + 299_000).unwrap();
    let tree = one().open(dir.path());
    assert!(tree.scan(2, &mut |_, _| {}).unwrap().contains(a), "the first place is right, and mends the second");
    assert_eq!(one().complete(&tree), 3);
    one().assert_in(dir.path());
}

#[test]
fn a_finished_file_changed_later_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let tree = one().open(dir.path());
    one().complete(&tree);
    let (a, config) =
        (one().layout.index_of(&ChunkHash::of(A)).unwrap(), one().layout.index_of(&ChunkHash::of(b"{}")).unwrap());
    assert!(tree.get(a).is_some());
    fs::OpenOptions::new().write(true).open(dir.path().join("sub/model")).unwrap().set_len(10).unwrap();
    assert!(tree.get(a).is_none());
    assert!(tree.get(config).is_some());
}

#[test]
fn a_finished_release_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    one().complete(&one().open(dir.path()));
    let before = one().inode(dir.path(), 2);
    assert_eq!(one().complete(&one().open(dir.path())), 0);
    assert_eq!(one().inode(dir.path(), 2), before);
    one().assert_in(dir.path());
}

#[test]
fn an_update_fetches_only_what_changed() {
    let dir = tempfile::tempdir().unwrap();
    one().complete(&one().open(dir.path()));
    let config = one().inode(dir.path(), 0);
    // `C` is there, at another place: it is found at one offset and copied to the other.
    assert_eq!(two().complete(&two().open(dir.path())), 0);
    two().assert_in(dir.path());
    assert_eq!(two().inode(dir.path(), 0), config);
    assert_eq!(one().complete(&one().open(dir.path())), 1);
    one().assert_in(dir.path());
}

#[test]
fn a_pull_that_was_given_up_helps_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let tree = one().open(dir.path());
    one().land(&tree, one().layout.index_of(&ChunkHash::of(A)).unwrap());
    drop(tree);
    assert_eq!(two().complete(&two().open(dir.path())), 2);
    two().assert_in(dir.path());
}

#[test]
fn damage_is_not_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    one().complete(&one().open(dir.path()));
    let model = fs::OpenOptions::new().write(true).open(dir.path().join("sub/model")).unwrap();
    model.write_all_at(b"x", 7).unwrap();
    model.set_len(model.metadata().unwrap().len() - 1).unwrap();
    // One copy of `A` is still right; `C` was cut short.
    assert_eq!(one().complete(&one().open(dir.path())), 1);
    one().assert_in(dir.path());
    // A file that is right but for something behind its end is not right.
    fs::write(dir.path().join("config.json"), b"{} ").unwrap();
    assert_eq!(one().complete(&one().open(dir.path())), 0);
    one().assert_in(dir.path());
}

#[test]
fn links_do_not_lead_out() {
    let outside = tempfile::tempdir().unwrap();
    let victim: PathBuf = outside.path().join("victim");
    fs::write(&victim, b"precious").unwrap();

    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), dir.path().join("sub")).unwrap();
    let error = one().open(dir.path()).scan(1, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("is a link"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(&victim, dir.path().join("config.json")).unwrap();
    one().complete(&one().open(dir.path()));
    one().assert_in(dir.path());
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn a_directory_in_the_way_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("config.json")).unwrap();
    let error = one().open(dir.path()).scan(1, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("is a directory"), "{error}");
}

#[test]
fn two_pulls_cannot_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let tree = one().open(dir.path());
    let second = FileTree::open(dir.path(), &two().manifest, &two().layout);
    assert!(matches!(second, Err(StoreError::Locked { .. })));
    drop(tree);
    two().open(dir.path());
}
