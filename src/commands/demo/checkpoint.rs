//! What the checkpoint's files say, read without the manifest that was made of them.

use anyhow::{Context, Result};
use aquifer_core::{ChunkHash, Hash};
use aquifer_memory::Source;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// The BLAKE3 hash of each tensor's bytes.
#[derive(Debug)]
pub(super) struct TensorHashes {
    hashes: BTreeMap<String, ChunkHash>,
    bytes: u64,
}

impl TensorHashes {
    pub(super) fn of(checkpoint: &Path) -> Result<Self> {
        let source = Source::open(checkpoint, &[])?;
        let mut hashes = BTreeMap::new();
        let mut bytes = 0;
        for file in source.files() {
            let Some(header) = &file.header else { continue };
            let path = if checkpoint.is_dir() { checkpoint.join(&file.path) } else { checkpoint.to_path_buf() };
            let mut open = File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
            for tensor in &header.tensors {
                open.seek(SeekFrom::Start(tensor.begin))?;
                let mut hasher = blake3::Hasher::new();
                let len = tensor.end - tensor.begin;
                std::io::copy(&mut (&mut open).take(len), &mut hasher)?;
                bytes += len;
                let hash = ChunkHash(Hash(*hasher.finalize().as_bytes()));
                hashes.insert(format!("{}{}", file.prefix, tensor.name), hash);
            }
        }
        Ok(TensorHashes { hashes, bytes })
    }

    pub(super) fn len(&self) -> usize {
        self.hashes.len()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// In what an engine's memory differs, a line for each tensor.
    pub(super) fn differences(&self, memory: &BTreeMap<String, String>) -> Vec<String> {
        let missing = self.hashes.keys().filter(|n| !memory.contains_key(*n)).map(|n| format!("'{n}' is missing"));
        let wrong = memory.iter().filter_map(|(name, found)| match self.hashes.get(name) {
            None => Some(format!("'{name}' is not in the checkpoint")),
            Some(expected) if expected.to_string() == *found => None,
            Some(expected) => Some(format!("'{name}' hashes to {found}, not to {expected}")),
        });
        missing.chain(wrong).collect()
    }
}
