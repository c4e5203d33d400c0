//! Bytes to move and to hash, in memory that was touched before.

use anyhow::Result;
use aquifer_memory::Span;
use std::io::Write;

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

/// Writes `bytes` bytes to `to`.
pub(super) fn write(to: &mut impl Write, bytes: u64) -> Result<()> {
    let mut pieces = Pieces::new();
    each_piece(bytes, |offset, len| Ok(to.write_all(pieces.at(offset, len))?))
}

fn each_piece(bytes: u64, mut each: impl FnMut(u64, usize) -> Result<()>) -> Result<()> {
    for offset in (0..bytes).step_by(PIECE_BYTES) {
        each(offset, usize::try_from(bytes - offset).unwrap_or(usize::MAX).min(PIECE_BYTES))?;
    }
    Ok(())
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
        let memory = memory(file.len());
        assert_ne!(memory[..PIECE_BYTES], memory[PIECE_BYTES..2 * PIECE_BYTES]);
    }
}
