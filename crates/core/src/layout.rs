//! A manifest's distinct chunks, numbered, and where each of them lies.

use crate::hash::ChunkHash;
use crate::manifest::{Chunk, Manifest, Part};
use std::collections::BTreeMap;

/// One appearance of a chunk at a byte offset of a file or tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    /// Index into [`Layout::chunks`].
    pub chunk: u32,
}

/// Derived from a manifest alone, so two nodes with the same manifest number its chunks alike:
/// in order of first appearance, tensors first.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Distinct chunks.
    pub chunks: Vec<Chunk>,
    /// For each tensor of the manifest, its chunks in order.
    pub tensors: Vec<Vec<Extent>>,
    /// For each file of the manifest, its chunks in order.
    pub files: Vec<Vec<Extent>>,
    index: BTreeMap<ChunkHash, u32>,
}

impl Layout {
    pub fn of(manifest: &Manifest) -> Self {
        let mut layout = Layout { chunks: Vec::new(), tensors: Vec::new(), files: Vec::new(), index: BTreeMap::new() };
        for tensor in manifest.tensors() {
            let extents = layout.place(0, &tensor.chunks);
            layout.tensors.push(extents);
        }
        for file in manifest.files() {
            let mut extents = Vec::new();
            let mut offset = 0;
            for part in &file.parts {
                let placed = match part {
                    Part::Bytes(chunks) => layout.place(offset, chunks),
                    Part::Tensor(t) => shifted(&layout.tensors[*t as usize], offset),
                };
                offset += manifest.part_chunks(part).iter().map(|c| u64::from(c.len)).sum::<u64>();
                extents.extend(placed);
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
            extents.push(Extent { offset, chunk: self.number_of(chunk) });
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

fn shifted(extents: &[Extent], by: u64) -> Vec<Extent> {
    extents.iter().map(|e| Extent { offset: e.offset + by, chunk: e.chunk }).collect()
}

fn number(n: usize) -> u32 {
    u32::try_from(n).expect("a manifest has at most MANIFEST_CHUNKS_MAX chunks, which fits 32 bits")
}
