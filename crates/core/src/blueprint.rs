//! A manifest in the making: what to hash, in what pieces, before any byte is read.
//!
//! The publisher fills a blueprint from headers and lengths, hashes the ranges it asks for in
//! whatever order and on however many cores, and gets the manifest back.

use crate::cut::{self, ChunkTarget};
use crate::dtype::Dtype;
use crate::hash::ChunkHash;
use crate::manifest::{Chunk, FileEntry, Manifest, ManifestError, Part, TensorEntry};
use crate::safetensors::Header;
use std::collections::BTreeMap;
use thiserror::Error;

/// A byte range to hash: one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Index of the file, in the order files were added.
    pub file: usize,
    /// From the start of the file.
    pub offset: u64,
    pub len: u32,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum BlueprintError {
    #[error("tensor '{name}' is in both '{a}' and '{b}': leave one of the files out")]
    TensorTwice { name: String, a: String, b: String },
    #[error("{found} hashes for {expected} cuts")]
    HashCount { expected: usize, found: usize },
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

#[derive(Clone, Debug)]
pub struct Blueprint {
    target: ChunkTarget,
    files: Vec<PlannedFile>,
    /// Tensor name to the file that has it.
    tensors: BTreeMap<String, usize>,
    cuts: Vec<Cut>,
}

#[derive(Clone, Debug)]
struct PlannedFile {
    path: String,
    parts: Vec<PlannedPart>,
}

#[derive(Clone, Debug)]
struct PlannedPart {
    /// How many cuts it has.
    cuts: usize,
    tensor: Option<(String, Dtype, Vec<u64>)>,
}

impl Blueprint {
    /// An empty one, for a checkpoint whose files have `total` bytes together.
    pub fn new(total: u64) -> Self {
        Blueprint { target: ChunkTarget::of(total), files: Vec::new(), tensors: BTreeMap::new(), cuts: Vec::new() }
    }

    /// Adds a file of `bytes` bytes without structure. Returns its index.
    pub fn add_file(&mut self, path: &str, bytes: u64) -> usize {
        let file = self.begin(path);
        self.add_part(file, 0, cut::plain_cuts(bytes, self.target), None);
        file
    }

    /// Adds a safetensors file. With `prefix`, its tensors are named `prefix` + name: that is how
    /// a file that is not one of the model's own shards keeps out of the model's names.
    pub fn add_safetensors(&mut self, path: &str, header: &Header, prefix: &str) -> Result<usize, BlueprintError> {
        let file = self.begin(path);
        self.add_part(file, 0, cut::plain_cuts(header.data_begin, self.target), None);
        for t in &header.tensors {
            let name = format!("{prefix}{}", t.name);
            if let Some(other) = self.tensors.insert(name.clone(), file) {
                let (a, b) = (self.files[other].path.clone(), path.to_string());
                return Err(BlueprintError::TensorTwice { name, a, b });
            }
            let cuts = cut::tensor_cuts(&t.shape, t.end - t.begin, self.target);
            self.add_part(file, t.begin, cuts, Some((name, t.dtype.clone(), t.shape.clone())));
        }
        Ok(file)
    }

    /// Every range to hash, file by file, in the order of their bytes.
    pub fn cuts(&self) -> &[Cut] {
        &self.cuts
    }

    /// The manifest, given the hash of every cut, in the order of [`Blueprint::cuts`].
    pub fn finish(self, hashes: &[ChunkHash]) -> Result<Manifest, BlueprintError> {
        if hashes.len() != self.cuts.len() {
            return Err(BlueprintError::HashCount { expected: self.cuts.len(), found: hashes.len() });
        }
        let mut chunks = self.cuts.iter().zip(hashes).map(|(cut, hash)| Chunk { hash: *hash, len: cut.len });
        let mut tensors = Vec::new();
        let mut drafts = Vec::new();
        for file in self.files {
            let mut parts = Vec::new();
            for part in file.parts {
                let own: Vec<Chunk> = chunks.by_ref().take(part.cuts).collect();
                parts.push(match part.tensor {
                    None => Draft::Bytes(own),
                    Some((name, dtype, shape)) => {
                        tensors.push(TensorEntry { name: name.clone(), dtype, shape, chunks: own });
                        Draft::Tensor(name)
                    }
                });
            }
            drafts.push((file.path, parts));
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        drafts.sort_by(|a, b| a.0.cmp(&b.0));
        let files = drafts.into_iter().map(|(path, parts)| settle(path, parts, &tensors)).collect();
        Ok(Manifest::new(files, tensors)?)
    }

    fn begin(&mut self, path: &str) -> usize {
        self.files.push(PlannedFile { path: path.to_string(), parts: Vec::new() });
        self.files.len() - 1
    }

    fn add_part(&mut self, file: usize, at: u64, cuts: Vec<u32>, tensor: Option<(String, Dtype, Vec<u64>)>) {
        if cuts.is_empty() && tensor.is_none() {
            return;
        }
        self.files[file].parts.push(PlannedPart { cuts: cuts.len(), tensor });
        let mut offset = at;
        for len in cuts {
            self.cuts.push(Cut { file, offset, len });
            offset += u64::from(len);
        }
    }
}

enum Draft {
    Bytes(Vec<Chunk>),
    Tensor(String),
}

fn settle(path: String, parts: Vec<Draft>, tensors: &[TensorEntry]) -> FileEntry {
    let index = |name: &str| {
        let i = tensors.binary_search_by(|t| t.name.as_str().cmp(name));
        let i = i.expect("every drafted tensor was put into `tensors`, which is sorted by name");
        u32::try_from(i).expect("add_safetensors is bounded by header length: under 2^32 tensors")
    };
    let parts = parts.into_iter().map(|part| match part {
        Draft::Bytes(chunks) => Part::Bytes(chunks),
        Draft::Tensor(name) => Part::Tensor(index(&name)),
    });
    FileEntry { path, parts: parts.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::safetensors;

    fn safetensors_file(tensors: &[(&str, u64)]) -> (Header, Vec<u8>) {
        let mut at = 0;
        let mut entries = Vec::new();
        for (name, bytes) in tensors {
            entries
                .push(format!(r#""{name}":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{at},{}]}}"#, at + bytes));
            at += bytes;
        }
        let json = format!("{{{}}}", entries.join(","));
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        let header_len = file.len();
        file.extend((0..at).map(|i| (i % 251) as u8));
        (safetensors::parse(&file[..header_len], file.len() as u64).unwrap(), file)
    }

    fn hash(files: &[Vec<u8>], blueprint: &Blueprint) -> Vec<ChunkHash> {
        let of = |c: &Cut| {
            let begin = usize::try_from(c.offset).unwrap();
            ChunkHash::of(&files[c.file][begin..begin + c.len as usize])
        };
        blueprint.cuts().iter().map(of).collect()
    }

    #[test]
    fn files_can_be_rebuilt_and_order_does_not_matter() {
        let (header, bytes) = safetensors_file(&[("b", 5_000_000), ("none", 0), ("a", 10)]);
        let note = b"hello".to_vec();

        let mut one = Blueprint::new(5_000_015);
        one.add_safetensors("m.safetensors", &header, "").unwrap();
        one.add_file("config.json", 5);
        let hashes = hash(&[bytes.clone(), note.clone()], &one);
        let one = one.finish(&hashes).unwrap();

        let mut two = Blueprint::new(5_000_015);
        two.add_file("config.json", 5);
        two.add_safetensors("m.safetensors", &header, "").unwrap();
        let hashes = hash(&[note.clone(), bytes.clone()], &two);
        let two = two.finish(&hashes).unwrap();
        assert_eq!(one.encode(), two.encode());

        let layout = Layout::of(&one);
        let rebuilt = |f: usize| -> Vec<(u64, ChunkHash)> {
            layout.files[f].iter().map(|e| (e.offset, layout.chunk(e.chunk).hash)).collect()
        };
        assert_eq!(rebuilt(0), [(0, ChunkHash::of(b"hello"))]);
        for (offset, hash) in rebuilt(1) {
            let begin = usize::try_from(offset).unwrap();
            let len = layout.chunk(layout.index_of(&hash).unwrap()).len as usize;
            assert_eq!(ChunkHash::of(&bytes[begin..begin + len]), hash);
        }
        assert_eq!(one.file_bytes(&one.files()[1]), bytes.len() as u64);
        assert_eq!(one.tensor("none").unwrap().chunks, []);
    }

    #[test]
    fn a_tensor_in_two_files_is_refused() {
        let (header, _) = safetensors_file(&[("a", 10)]);
        let mut blueprint = Blueprint::new(5_000_015);
        blueprint.add_safetensors("x.safetensors", &header, "").unwrap();
        assert!(blueprint.clone().add_safetensors("sub/x.safetensors", &header, "sub/x.safetensors#").is_ok());
        let error = blueprint.add_safetensors("y.safetensors", &header, "").unwrap_err();
        assert!(error.to_string().contains("both 'x.safetensors' and 'y.safetensors'"));
    }
}
