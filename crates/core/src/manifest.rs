//! A checkpoint as a list of names: its files, its tensors, and the chunks they are made of.
//!
//! The manifest's bytes are canonical: files are sorted by path, tensors by name, offsets are not
//! stored but follow from lengths, and nothing in it depends on where or when it was made. Its
//! BLAKE3 hash is its name.

use crate::codec::{self, CodecError, Kind};
use crate::dtype::Dtype;
use crate::hash::{ChunkHash, ManifestHash};
use crate::limits::{CHUNK_BYTES_MAX, MANIFEST_BYTES_MAX, MANIFEST_CHUNKS_MAX, NAME_BYTES_MAX, TENSOR_DIMS_MAX};
use bincode::{Decode, Encode};
use std::collections::BTreeMap;
use thiserror::Error;

/// A contiguous byte range of one tensor or file: its name and its length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Chunk {
    pub hash: ChunkHash,
    pub len: u32,
}

/// A tensor in row-major order.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TensorEntry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub chunks: Vec<Chunk>,
}

impl TensorEntry {
    pub fn bytes(&self) -> u64 {
        chunks_bytes(&self.chunks)
    }
}

/// A file, as the concatenation of its parts.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct FileEntry {
    /// Relative, `/`-separated, inside the checkpoint's directory.
    pub path: String,
    pub parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Part {
    /// Bytes of the file's own: a safetensors header, or a whole file of another kind.
    Bytes(Vec<Chunk>),
    /// All bytes of the tensor at this index.
    Tensor(u32),
}

/// A valid manifest. See the module for what that means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    files: Vec<FileEntry>,
    tensors: Vec<TensorEntry>,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ManifestError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("{what} '{name}' stands after '{before}': names must be unique and sorted")]
    Order { what: &'static str, name: String, before: String },
    #[error("{what} '{name}': {reason}")]
    Entry { what: &'static str, name: String, reason: String },
    #[error("more than {MANIFEST_CHUNKS_MAX} chunks")]
    TooManyChunks,
    #[error("its bytes hash to {found}, not to {expected}")]
    Hash { expected: ManifestHash, found: ManifestHash },
}

impl Manifest {
    /// Puts files and tensors together, after checking every rule of the format.
    pub fn new(files: Vec<FileEntry>, tensors: Vec<TensorEntry>) -> Result<Self, ManifestError> {
        let manifest = Manifest { files, tensors };
        manifest.check()?;
        Ok(manifest)
    }

    pub fn files(&self) -> &[FileEntry] {
        &self.files
    }

    /// Sorted by name.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensor_index(name).map(|i| &self.tensors[i])
    }

    pub fn tensor_index(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()
    }

    /// Length of a file, in bytes.
    pub fn file_bytes(&self, file: &FileEntry) -> u64 {
        file.parts.iter().map(|part| self.part_bytes(part)).sum()
    }

    /// Bytes of all files, or of all tensors where there are no files. Shared chunks count as
    /// often as they appear.
    pub fn bytes(&self) -> u64 {
        match self.files.is_empty() {
            true => self.tensors.iter().map(TensorEntry::bytes).sum(),
            false => self.files.iter().map(|f| self.file_bytes(f)).sum(),
        }
    }

    /// The canonical bytes.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(Kind::Manifest, &(&self.files, &self.tensors))
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        type Fields = (Vec<FileEntry>, Vec<TensorEntry>);
        let (files, tensors) = codec::decode::<Fields, MANIFEST_BYTES_MAX>(Kind::Manifest, bytes)?;
        Manifest::new(files, tensors)
    }

    /// Decodes bytes that must be the manifest named `expected`.
    pub fn decode_named(bytes: &[u8], expected: ManifestHash) -> Result<Self, ManifestError> {
        let found = ManifestHash::of(bytes);
        if found != expected {
            return Err(ManifestError::Hash { expected, found });
        }
        Manifest::decode(bytes)
    }

    pub(crate) fn part_chunks<'a>(&'a self, part: &'a Part) -> &'a [Chunk] {
        match part {
            Part::Bytes(chunks) => chunks,
            Part::Tensor(index) => &self.tensors[*index as usize].chunks,
        }
    }

    fn part_bytes(&self, part: &Part) -> u64 {
        chunks_bytes(self.part_chunks(part))
    }

    fn check(&self) -> Result<(), ManifestError> {
        check_order("file", self.files.iter().map(|f| f.path.as_str()))?;
        check_order("tensor", self.tensors.iter().map(|t| t.name.as_str()))?;
        let mut lengths = Lengths::default();
        for tensor in &self.tensors {
            let refuse = |reason: String| entry_error("tensor", &tensor.name, reason);
            check_name(&tensor.name).map_err(refuse)?;
            lengths.admit(&tensor.chunks).map_err(|e| e.at("tensor", &tensor.name))?;
            check_tensor(tensor).map_err(refuse)?;
        }
        let mut owned = vec![false; self.tensors.len()];
        for file in &self.files {
            let refuse = |reason: String| entry_error("file", &file.path, reason);
            check_path(&file.path).map_err(refuse)?;
            for part in &file.parts {
                match part {
                    Part::Bytes(chunks) => lengths.admit(chunks).map_err(|e| e.at("file", &file.path))?,
                    Part::Tensor(index) => match owned.get_mut(*index as usize) {
                        None => return Err(refuse(format!("names tensor {index} of {}", self.tensors.len()))),
                        Some(true) => return Err(refuse(format!("names tensor {index}, which is in a file already"))),
                        Some(free) => *free = true,
                    },
                }
            }
        }
        check_directories(&self.files)
    }
}

/// Chunk lengths seen so far: one hash has one length, and all of them together have a bound.
#[derive(Default)]
struct Lengths {
    by_hash: BTreeMap<ChunkHash, u32>,
    total: usize,
    bytes: u64,
}

enum LengthError {
    TooMany,
    Bad(String),
}

impl LengthError {
    fn at(self, what: &'static str, name: &str) -> ManifestError {
        match self {
            LengthError::TooMany => ManifestError::TooManyChunks,
            LengthError::Bad(reason) => entry_error(what, name, reason),
        }
    }
}

impl Lengths {
    fn admit(&mut self, chunks: &[Chunk]) -> Result<(), LengthError> {
        for chunk in chunks {
            if chunk.len == 0 || chunk.len > CHUNK_BYTES_MAX {
                return Err(LengthError::Bad(format!(
                    "chunk {:?} has length {}, allowed are 1 to {CHUNK_BYTES_MAX}",
                    chunk.hash, chunk.len
                )));
            }
            if *self.by_hash.entry(chunk.hash).or_insert(chunk.len) != chunk.len {
                return Err(LengthError::Bad(format!("chunk {:?} is given two lengths", chunk.hash)));
            }
        }
        self.total += chunks.len();
        self.bytes = self.bytes.saturating_add(chunks_bytes(chunks));
        match self.total > MANIFEST_CHUNKS_MAX {
            true => Err(LengthError::TooMany),
            false => Ok(()),
        }
    }
}

fn chunks_bytes(chunks: &[Chunk]) -> u64 {
    chunks.iter().map(|c| u64::from(c.len)).sum()
}

fn entry_error(what: &'static str, name: &str, reason: String) -> ManifestError {
    ManifestError::Entry { what, name: name.chars().take(256).collect(), reason }
}

fn check_order<'a>(what: &'static str, names: impl Iterator<Item = &'a str>) -> Result<(), ManifestError> {
    let mut before: Option<&str> = None;
    for name in names {
        if let Some(b) = before.filter(|b| *b >= name) {
            return Err(ManifestError::Order { what, name: name.into(), before: b.into() });
        }
        before = Some(name);
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), String> {
    match name.len() {
        0 => Err("the name is empty".into()),
        n if n > NAME_BYTES_MAX => Err(format!("the name has {n} bytes, allowed are {NAME_BYTES_MAX}")),
        _ => Ok(()),
    }
}

fn check_tensor(tensor: &TensorEntry) -> Result<(), String> {
    if tensor.shape.len() > TENSOR_DIMS_MAX {
        return Err(format!("{} dimensions, allowed are {TENSOR_DIMS_MAX}", tensor.shape.len()));
    }
    check_name(tensor.dtype.name()).map_err(|e| format!("dtype: {e}"))?;
    match tensor.dtype.tensor_bytes(&tensor.shape) {
        Some(Ok(bytes)) if bytes != tensor.bytes() => Err(format!(
            "{} of shape {:?} is {bytes} bytes, its chunks are {}",
            tensor.dtype,
            tensor.shape,
            tensor.bytes()
        )),
        Some(Err(reason)) => Err(reason.into()),
        _ => Ok(()),
    }
}

/// A path that stays inside its directory whatever is done with it.
pub fn check_path(path: &str) -> Result<(), String> {
    check_name(path)?;
    let bad = |c: &str| c.is_empty() || c == "." || c == "..";
    if path.split('/').any(bad) || path.contains(['\\', '\0']) {
        return Err("a path must be relative, without '.', '..', empty parts, backslash or NUL".into());
    }
    Ok(())
}

/// No path may be both a file and a directory.
fn check_directories(files: &[FileEntry]) -> Result<(), ManifestError> {
    let is_file = |path: &str| files.binary_search_by(|f| f.path.as_str().cmp(path)).is_ok();
    for file in files {
        for (end, _) in file.path.match_indices('/') {
            if is_file(&file.path[..end]) {
                let reason = format!("'{}' is a file and cannot hold it", &file.path[..end]);
                return Err(entry_error("file", &file.path, reason));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(byte: u8, len: u32) -> Chunk {
        Chunk { hash: ChunkHash::of(&[byte]), len }
    }

    fn tensor(name: &str, chunks: Vec<Chunk>, shape: &[u64]) -> TensorEntry {
        TensorEntry { name: name.into(), dtype: Dtype::new("U8"), shape: shape.into(), chunks }
    }

    fn file(path: &str, parts: Vec<Part>) -> FileEntry {
        FileEntry { path: path.into(), parts }
    }

    fn good() -> Manifest {
        Manifest::new(
            vec![
                file("a/b.safetensors", vec![Part::Bytes(vec![chunk(0, 8)]), Part::Tensor(0)]),
                file("c.json", vec![Part::Bytes(vec![chunk(1, 3)])]),
            ],
            vec![tensor("w", vec![chunk(2, 4), chunk(3, 2)], &[2, 3])],
        )
        .unwrap()
    }

    #[test]
    fn survives_its_bytes() {
        let bytes = good().encode();
        assert_eq!(Manifest::decode_named(&bytes, ManifestHash::of(&bytes)), Ok(good()));
        assert_eq!(good().bytes(), 8 + 6 + 3);
    }

    #[test]
    fn another_hash_is_refused() {
        let error = Manifest::decode_named(&good().encode(), ManifestHash::of(b"x")).unwrap_err();
        assert!(matches!(error, ManifestError::Hash { .. }));
    }

    #[test]
    fn lies_are_refused() {
        let refused = |files: Vec<FileEntry>, tensors: Vec<TensorEntry>, why: &str| {
            let error = Manifest::new(files, tensors).unwrap_err().to_string();
            assert!(error.contains(why), "{error} does not say {why}");
        };
        let w = || tensor("w", vec![chunk(2, 6)], &[2, 3]);
        refused(vec![], vec![tensor("w", vec![chunk(2, 5)], &[2, 3])], "its chunks are 5");
        refused(vec![], vec![w(), w()], "unique and sorted");
        refused(vec![], vec![tensor("w", vec![chunk(2, 0)], &[0])], "length 0");
        refused(vec![], vec![tensor("w", vec![chunk(2, u32::MAX)], &[1])], "length 4294967295");
        refused(vec![], vec![tensor("w", vec![], &[u64::MAX, 2, 1 << 40])], "64 bits");
        refused(vec![file("../x", vec![])], vec![], "relative");
        refused(vec![file("/x", vec![])], vec![], "relative");
        refused(vec![file("x", vec![Part::Tensor(0)])], vec![], "tensor 0 of 0");
        refused(vec![file("x", vec![Part::Tensor(0), Part::Tensor(0)])], vec![w()], "already");
        refused(vec![file("x", vec![]), file("x/y", vec![])], vec![], "cannot hold it");
        refused(vec![file("x", vec![Part::Bytes(vec![chunk(1, 3), chunk(1, 4)])])], vec![], "two lengths");
    }
}
