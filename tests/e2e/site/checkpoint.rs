//! Checkpoints to publish, and what is right about the copies of them that a mesh made.

use super::Site;
use aquifer_core::ChunkHash;
use aquifer_memory::{Published, Source, generate_checkpoint, modify_checkpoint};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A checkpoint on disk.
pub(crate) struct Checkpoint {
    pub(crate) dir: PathBuf,
}

impl Site {
    /// A new checkpoint of about `bytes`; its content depends on `seed`.
    pub(crate) fn checkpoint(&self, name: &str, bytes: u64, seed: u64) -> Checkpoint {
        let dir = self.path(name);
        generate_checkpoint(&dir, bytes, seed).expect("a checkpoint");
        Checkpoint { dir }
    }

    /// A checkpoint of `count` tensors of `bytes` bytes each in one file.
    pub(crate) fn short_tensors(&self, name: &str, count: u64, bytes: u64) -> Checkpoint {
        let dir = self.path(name);
        fs::create_dir_all(&dir).expect("a directory");
        let entry = |i: u64| {
            let tensor = json!({"dtype": "U8", "shape": [bytes], "data_offsets": [i * bytes, (i + 1) * bytes]});
            (format!("experts.{i:05}.scale"), tensor)
        };
        let header = Value::Object((0..count).map(entry).collect()).to_string();
        let mut file = u64::try_from(header.len()).expect("short").to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        let data = file.len();
        file.resize(data + usize::try_from(count * bytes).expect("it fits memory"), 0);
        blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut file[data..]);
        fs::write(dir.join("model.safetensors"), file).expect("a file");
        Checkpoint { dir }
    }
}

impl Checkpoint {
    /// A copy with `tensors` of its tensors changed, and the bytes of those.
    pub(crate) fn changed(&self, site: &Site, name: &str, tensors: usize) -> (Checkpoint, u64) {
        let dir = site.path(name);
        let modified = modify_checkpoint(&self.dir, &dir, 7, tensors).expect("a changed checkpoint");
        (Checkpoint { dir }, modified.bytes)
    }

    /// The hash of each tensor, read from the files with as little machinery as will do.
    pub(crate) fn tensors(&self) -> BTreeMap<String, String> {
        let files = files_in(&self.dir).into_iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors"));
        files.flat_map(|path| tensors_of(&fs::read(path).expect("a shard"))).collect()
    }

    /// Its safetensors files, sorted.
    pub(crate) fn shards(&self) -> Vec<PathBuf> {
        let mut shards = files_in(&self.dir);
        shards.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
        shards
    }

    /// Checks that `dir` holds its files, bit for bit, and nothing else.
    pub(crate) fn assert_equals(&self, dir: &Path) {
        let names = |root: &Path| -> Vec<PathBuf> {
            files_in(root).iter().map(|p| p.strip_prefix(root).expect("below it").to_path_buf()).collect()
        };
        assert_eq!(names(&self.dir), names(dir));
        for name in names(dir) {
            let same = fs::read(self.dir.join(&name)).expect("a file") == fs::read(dir.join(&name)).expect("a file");
            assert!(same, "{} differs", name.display());
        }
    }

    /// Chunks of it that lie whole in the files growing under `dir`, and their bytes. Those that
    /// a pull had written when it was killed, whether it had come to count them or not.
    pub(crate) fn chunks_growing_in(&self, dir: &Path) -> (u64, u64) {
        let published = self.published();
        let partial = dir.join(aquifer_memory::tree::PARTIAL_DIR).join(published.hash.to_string());
        let mut right = vec![true; published.layout.chunks.len()];
        for (file, extents) in published.manifest.files().iter().zip(&published.layout.files) {
            let open = File::open(partial.join(&file.path));
            for extent in extents {
                let chunk = &published.layout.chunks[extent.chunk as usize];
                let mut bytes = vec![0; chunk.len as usize];
                let read = open.as_ref().is_ok_and(|f| f.read_exact_at(&mut bytes, extent.offset).is_ok());
                right[extent.chunk as usize] &= read && ChunkHash::of(&bytes) == chunk.hash;
            }
        }
        let found = published.layout.chunks.iter().zip(&right).filter(|(_, right)| **right);
        found.fold((0, 0), |(count, bytes), (chunk, _)| (count + 1, bytes + u64::from(chunk.len)))
    }

    /// Its distinct chunks, and the length of each.
    pub(crate) fn chunks(&self) -> BTreeMap<String, u64> {
        let layout = self.published().layout;
        layout.chunks.iter().map(|c| (c.hash.to_string(), u64::from(c.len))).collect()
    }

    /// Bytes of its distinct chunks: what a node that has nothing must fetch.
    pub(crate) fn distinct_bytes(&self) -> u64 {
        self.chunks().values().sum()
    }

    /// How many of them do not lie in the file of that name alone.
    pub(crate) fn chunks_outside(&self, name: &str) -> u64 {
        let published = self.published();
        let files = published.manifest.files().iter().zip(&published.layout.files);
        let others = files.filter(|(file, _)| file.path != name);
        let chunks: BTreeSet<u32> = others.flat_map(|(_, extents)| extents).map(|e| e.chunk).collect();
        chunks.len() as u64
    }

    /// Bytes of the distinct chunks of its tensors: what an engine that has nothing must be given.
    pub(crate) fn tensor_bytes(&self) -> u64 {
        self.tensor_chunks().values().sum()
    }

    /// The distinct chunks of its tensors, and the length of each.
    pub(crate) fn tensor_chunks(&self) -> BTreeMap<String, u64> {
        self.tensor_chunks_of(|_| true)
    }

    /// The same, of the tensors that `wanted` picks by name.
    pub(crate) fn tensor_chunks_of(&self, wanted: impl Fn(&str) -> bool) -> BTreeMap<String, u64> {
        let Published { manifest, layout, .. } = self.published();
        let tensors = manifest.tensors().iter().zip(&layout.tensors);
        let extents = tensors.filter(|(tensor, _)| wanted(&tensor.name)).flat_map(|(_, extents)| extents);
        let chunks = extents.map(|extent| layout.chunk(extent.chunk));
        chunks.map(|c| (c.hash.to_string(), u64::from(c.len))).collect()
    }

    fn published(&self) -> Published {
        Source::open(&self.dir, &[]).and_then(|source| source.hash(1, &|_| {})).expect("a checkpoint")
    }
}

/// Chunks in a store on disk and their bytes, each checked against its name.
pub(crate) fn stored_chunks(store: &Path) -> (u64, u64) {
    let mut total = (0, 0);
    for path in files_in(&store.join("chunks")) {
        let bytes = fs::read(&path).expect("a chunk");
        let name = path.file_name().expect("a name").to_string_lossy();
        assert_eq!(ChunkHash::of(&bytes).to_string(), name, "a stored chunk is not what its name says");
        total = (total.0 + 1, total.1 + bytes.len() as u64);
    }
    total
}

/// All files below a directory, sorted; none if it is not there.
pub(crate) fn files_in(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => found.extend(files_in(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

fn tensors_of(shard: &[u8]) -> Vec<(String, String)> {
    let (length, rest) = shard.split_first_chunk::<8>().expect("a length");
    let length = usize::try_from(u64::from_le_bytes(*length)).expect("a short header");
    let (header, data) = rest.split_at(length);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).expect("a header");
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
    let hash = |(name, tensor): (String, Value)| {
        let at = |i: usize| usize::try_from(tensor["data_offsets"][i].as_u64().expect("an offset")).expect("in memory");
        (name, blake3::hash(&data[at(0)..at(1)]).to_hex().to_string())
    };
    tensors.map(hash).collect()
}
