//! A checkpoint as a list of names: its files, its tensors, and the chunks they are made of.
//!
//! The manifest's bytes are canonical: files are sorted by path, tensors by name, packs by their
//! first tensor, and nothing in it depends on where or when it was made. Its BLAKE3 hash is its
//! name.
//!
//! A tensor is one or more chunks of its own, or lies in a *pack*: one chunk of several short
//! tensors, one after the other. A mixture of experts has hundreds of thousands of scales of a few
//! KiB, and a request each would take longer than their bytes.

use crate::codec::{self, CodecError, Kind};
use crate::dtype::Dtype;
use crate::hash::{ChunkHash, ManifestHash};
use crate::limits::{MANIFEST_BYTES_MAX, MANIFEST_CHUNKS_MAX};
use bincode::{Decode, Encode};
use thiserror::Error;

mod check;

pub use check::check_path;

/// A contiguous byte range of a tensor, of a file, or of several short tensors: its name and its
/// length in bytes.
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
    pub content: Content,
}

/// Where a tensor's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Content {
    /// In chunks of its own; none if it has no bytes.
    Chunks(Vec<Chunk>),
    Packed(Packed),
}

/// `len` bytes from `begin` on of the pack at this index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Packed {
    pub pack: u32,
    pub begin: u32,
    pub len: u32,
}

impl TensorEntry {
    pub fn bytes(&self) -> u64 {
        match &self.content {
            Content::Chunks(chunks) => chunks_bytes(chunks),
            Content::Packed(packed) => packed.len.into(),
        }
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
    /// All bytes of the tensor at this index, which is in no pack.
    Tensor(u32),
    /// The pack at this index, for all its tensors.
    Pack(u32),
}

/// A valid manifest. See the module for what that means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    files: Vec<FileEntry>,
    tensors: Vec<TensorEntry>,
    packs: Vec<Chunk>,
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
    /// Puts files, tensors and packs together, after checking every rule of the format.
    pub fn new(files: Vec<FileEntry>, tensors: Vec<TensorEntry>, packs: Vec<Chunk>) -> Result<Self, ManifestError> {
        let manifest = Manifest { files, tensors, packs };
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

    /// In the order of their first tensors.
    pub fn packs(&self) -> &[Chunk] {
        &self.packs
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
        codec::encode(Kind::Manifest, &(&self.files, &self.tensors, &self.packs))
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        type Fields = (Vec<FileEntry>, Vec<TensorEntry>, Vec<Chunk>);
        let (files, tensors, packs) = codec::decode::<Fields, MANIFEST_BYTES_MAX>(Kind::Manifest, bytes)?;
        Manifest::new(files, tensors, packs)
    }

    /// Decodes bytes that must be the manifest named `expected`.
    pub fn decode_named(bytes: &[u8], expected: ManifestHash) -> Result<Self, ManifestError> {
        let found = ManifestHash::of(bytes);
        if found != expected {
            return Err(ManifestError::Hash { expected, found });
        }
        Manifest::decode(bytes)
    }

    /// The chunks that a part of a file is made of, from the first byte to the last.
    pub(crate) fn part_chunks<'a>(&'a self, part: &'a Part) -> &'a [Chunk] {
        match part {
            Part::Bytes(chunks) => chunks,
            Part::Pack(index) => std::slice::from_ref(&self.packs[*index as usize]),
            Part::Tensor(index) => match &self.tensors[*index as usize].content {
                Content::Chunks(chunks) => chunks,
                Content::Packed(_) => unreachable!("`check` refuses a part that is a packed tensor"),
            },
        }
    }

    pub(crate) fn part_bytes(&self, part: &Part) -> u64 {
        chunks_bytes(self.part_chunks(part))
    }
}

fn chunks_bytes(chunks: &[Chunk]) -> u64 {
    chunks.iter().map(|c| u64::from(c.len)).sum()
}

#[cfg(test)]
mod tests;
