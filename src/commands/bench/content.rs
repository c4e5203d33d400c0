//! Bytes to move and to hash, in memory that was touched before.

use super::machine;
use anyhow::Result;
use aquifer_memory::Span;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes are made and moved in pieces of this size: one stays in a core's L2 cache.
pub(super) const PIECE_BYTES: usize = 256 << 10;

/// Bytes without a pattern, that differ wherever they lie: a piece repeated, each time with its
/// place written in front.
#[derive(Debug)]
struct Pieces {
    piece: Vec<u8>,
}

impl Pieces {
    fn new() -> Self {
        let mut piece = vec![0; PIECE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut piece);
        Pieces { piece }
    }

    fn at(&mut self, offset: u64, len: usize) -> &[u8] {
        self.piece[..8].copy_from_slice(&offset.to_le_bytes());
        &self.piece[..len]
    }
}

/// Private memory full of bytes.
pub(super) fn memory(bytes: usize) -> Vec<u8> {
    let mut memory = vec![0; bytes];
    let mut pieces = Pieces::new();
    for (at, piece) in (0..).zip(memory.chunks_mut(PIECE_BYTES)) {
        piece.copy_from_slice(pieces.at(at, piece.len()));
    }
    memory
}

/// Fills a span with bytes.
pub(super) fn fill(span: &Span) -> Result<()> {
    let mut pieces = Pieces::new();
    each_piece(span.len(), |offset, len| Ok(span.write(offset, pieces.at(offset, len))?))
}

/// The same bytes, on all cores.
pub(super) fn fill_on_all_cores(span: &Span) -> Result<()> {
    let next = AtomicU64::new(0);
    let work = |_| {
        let mut pieces = Pieces::new();
        loop {
            let offset = next.fetch_add(PIECE_BYTES as u64, Ordering::Relaxed);
            if offset >= span.len() {
                return Ok(());
            }
            span.write(offset, pieces.at(offset, piece_len(span.len() - offset)))?;
        }
    };
    machine::each(0..machine::cores(), work).map(drop)
}

/// Writes `bytes` bytes to `to`.
pub(super) fn write(to: &mut impl Write, bytes: u64) -> Result<()> {
    let mut pieces = Pieces::new();
    each_piece(bytes, |offset, len| Ok(to.write_all(pieces.at(offset, len))?))
}

fn each_piece(bytes: u64, mut each: impl FnMut(u64, usize) -> Result<()>) -> Result<()> {
    for offset in (0..bytes).step_by(PIECE_BYTES) {
        each(offset, piece_len(bytes - offset))?;
    }
    Ok(())
}

/// Of the next piece, where `left` bytes are to come.
fn piece_len(left: u64) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(PIECE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_memory::Mapping;

    #[test]
    fn bytes_differ_wherever_they_lie() {
        let (bytes, mut file) = (3 * PIECE_BYTES as u64 + 100, Vec::new());
        let span = Mapping::anonymous(bytes).unwrap().span();
        fill(&span).unwrap();
        write(&mut file, bytes).unwrap();
        assert_eq!(span.hash().unwrap(), aquifer_core::ChunkHash::of(&file));
        assert_ne!(file[..PIECE_BYTES], file[PIECE_BYTES..2 * PIECE_BYTES]);
        let by_all = Mapping::anonymous(bytes).unwrap().span();
        fill_on_all_cores(&by_all).unwrap();
        assert_eq!(by_all.hash().unwrap(), span.hash().unwrap());
        let memory = memory(file.len());
        assert_ne!(memory[..PIECE_BYTES], memory[PIECE_BYTES..2 * PIECE_BYTES]);
    }
}
