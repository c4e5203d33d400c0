//! A manifest's distinct chunks, numbered, and where each of them lies.

use crate::hash::ChunkHash;
use crate::manifest::{Chunk, Content, Manifest, Packed};
use std::collections::BTreeMap;

/// A piece of a chunk at a byte offset of a file or tensor. It is the whole chunk, but where a
/// tensor lies in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    /// Index into [`Layout::chunks`].
    pub chunk: u32,
    /// Where in the chunk the piece begins, and its length.
    pub begin: u32,
    pub len: u32,
}

/// Derived from a manifest alone, so two nodes with the same manifest number its chunks alike:
/// in order of first appearance, tensors first.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Distinct chunks.
    pub chunks: Vec<Chunk>,
    /// For each tensor of the manifest, the pieces it is made of, in order.
    pub tensors: Vec<Vec<Extent>>,
    /// For each file of the manifest, its chunks in order, each of them whole.
    pub files: Vec<Vec<Extent>>,
    index: BTreeMap<ChunkHash, u32>,
}

impl Layout {
    pub fn of(manifest: &Manifest) -> Self {
        let mut layout = Layout { chunks: Vec::new(), tensors: Vec::new(), files: Vec::new(), index: BTreeMap::new() };
        let mut packs: Vec<Option<u32>> = vec![None; manifest.packs().len()];
        for tensor in manifest.tensors() {
            let extents = match &tensor.content {
                Content::Chunks(chunks) => layout.place(0, chunks),
                Content::Packed(Packed { pack, begin, len }) => {
                    let pack = *pack as usize;
                    let chunk = *packs[pack].get_or_insert_with(|| layout.number_of(&manifest.packs()[pack]));
                    vec![Extent { offset: 0, chunk, begin: *begin, len: *len }]
                }
            };
            layout.tensors.push(extents);
        }
        for file in manifest.files() {
            let mut extents = Vec::new();
            let mut offset = 0;
            for part in &file.parts {
                extents.extend(layout.place(offset, manifest.part_chunks(part)));
                offset += manifest.part_bytes(part);
            }
            layout.files.push(extents);
        }
        layout
    }

    /// Number of distinct chunks.
    pub fn len(&self) -> u32 {
        number(self.chunks.len())
    }

    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub fn index_of(&self, hash: &ChunkHash) -> Option<u32> {
        self.index.get(hash).copied()
    }

    /// The chunk numbered `index`. Panics if there is none: indices from outside are checked
    /// where they come in.
    pub fn chunk(&self, index: u32) -> Chunk {
        self.chunks[index as usize]
    }

    /// Bytes of the distinct chunks.
    pub fn bytes(&self) -> u64 {
        self.chunks.iter().map(|c| u64::from(c.len)).sum()
    }

    fn place(&mut self, mut offset: u64, chunks: &[Chunk]) -> Vec<Extent> {
        let mut extents = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            extents.push(Extent { offset, chunk: self.number_of(chunk), begin: 0, len: chunk.len });
            offset += u64::from(chunk.len);
        }
        extents
    }

    fn number_of(&mut self, chunk: &Chunk) -> u32 {
        let next = number(self.chunks.len());
        let known = *self.index.entry(chunk.hash).or_insert(next);
        if known == next {
            self.chunks.push(*chunk);
        }
        known
    }
}

fn number(n: usize) -> u32 {
    u32::try_from(n).expect("a manifest has at most MANIFEST_CHUNKS_MAX chunks, which fits 32 bits")
}
