//! What the BLAKE3 kernel is told of the chunks it is to hash, laid out as `kernels/blake3.cu` reads it.

use crate::device::DeviceSpan;
use crate::error::DeviceError;
use crate::limits::{CHUNK_BYTES_MAX, TILES_MAX};

/// Threads of one block of `hash_tiles`, and leaves of one tile.
pub(crate) const TILE_LEAVES: u32 = 256;
/// Threads of one block of `join_tiles`.
pub(crate) const JOINERS: u32 = 128;
pub(crate) const DIGEST_BYTES: usize = 32;

const TILE_BYTES: u64 = TILE_LEAVES as u64 * 1024;
const CHUNK_ARGUMENT_BYTES: u64 = 24;
const TILE_ARGUMENT_BYTES: u64 = 8;

/// The arguments of one launch. Everything lies in one piece of memory: the chunks, the tiles, then room for the
/// chaining values of the tiles and for the digests.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Chunks and tiles.
    pub(crate) arguments: Vec<u8>,
    pub(crate) chunks: u32,
    pub(crate) tiles: u32,
    /// Whether a chunk has more than one.
    pub(crate) joins: bool,
}

impl Plan {
    pub(crate) fn new(spans: &[DeviceSpan]) -> Result<Self, DeviceError> {
        let mut total = 0;
        for span in spans {
            if span.len() > CHUNK_BYTES_MAX {
                return Err(DeviceError::TooLong { len: span.len(), max: CHUNK_BYTES_MAX });
            }
            total += tiles_of(span.len());
        }
        if total > TILES_MAX {
            return Err(DeviceError::TooLong { len: spans.iter().map(DeviceSpan::len).sum(), max: TILES_MAX });
        }
        let bytes = spans.len() as u64 * CHUNK_ARGUMENT_BYTES + total * TILE_ARGUMENT_BYTES;
        let mut arguments = Vec::with_capacity(usize::try_from(bytes).expect("this is for machines of 64 bits"));
        let mut first: u32 = 0;
        for span in spans {
            let tiles = u32::try_from(tiles_of(span.len())).expect("all of them are fewer than 2^31");
            arguments.extend(span.address().to_le_bytes());
            arguments.extend(span.len().to_le_bytes());
            arguments.extend(first.to_le_bytes());
            arguments.extend(tiles.to_le_bytes());
            first += tiles;
        }
        for (chunk, span) in (0u32..).zip(spans) {
            for (tile, _) in (0u32..).zip(0..tiles_of(span.len())) {
                arguments.extend(chunk.to_le_bytes());
                arguments.extend(tile.to_le_bytes());
            }
        }
        let chunks = u32::try_from(spans.len()).expect("a chunk has a tile, and these are fewer than 2^31");
        Ok(Plan { arguments, chunks, tiles: first, joins: first > chunks })
    }

    /// Offset of the tiles.
    pub(crate) fn tiles_at(&self) -> u64 {
        u64::from(self.chunks) * CHUNK_ARGUMENT_BYTES
    }

    /// Offset of the chaining values of tiles.
    pub(crate) fn values_at(&self) -> u64 {
        self.arguments.len() as u64
    }

    /// Offset of the digests.
    pub(crate) fn digests_at(&self) -> u64 {
        self.values_at() + u64::from(self.tiles) * DIGEST_BYTES as u64
    }

    pub(crate) fn digests_bytes(&self) -> u64 {
        u64::from(self.chunks) * DIGEST_BYTES as u64
    }

    pub(crate) fn device_bytes(&self) -> u64 {
        self.digests_at() + self.digests_bytes()
    }
}

/// An empty chunk has one tile, of one empty leaf.
fn tiles_of(len: u64) -> u64 {
    len.div_ceil(TILE_BYTES).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uuid::DeviceUuid;
    use std::sync::Arc;

    fn span(address: u64, len: u64) -> DeviceSpan {
        DeviceSpan::new(DeviceUuid([0; 16]), Arc::new(()), address, len)
    }

    #[test]
    fn chunks_are_cut_into_tiles() {
        let plan = Plan::new(&[span(16, 0), span(32, TILE_BYTES), span(64, TILE_BYTES + 1)]).unwrap();
        assert_eq!((plan.chunks, plan.tiles, plan.joins), (3, 4, true));
        let words: Vec<u32> =
            plan.arguments.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        let len = u32::try_from(TILE_BYTES).unwrap();
        assert_eq!(words[..6], [16, 0, 0, 0, 0, 1]);
        assert_eq!(words[6..12], [32, 0, len, 0, 1, 1]);
        assert_eq!(words[12..18], [64, 0, len + 1, 0, 2, 2]);
        assert_eq!(words[18..], [0, 0, 1, 0, 2, 0, 2, 1]);
        assert_eq!(plan.tiles_at(), 18 * 4);
        // The kernel reads these as structures of 8-byte and 4-byte members.
        assert_eq!((plan.values_at() % 8, plan.digests_at() % 8), (0, 0));
    }

    #[test]
    fn what_the_kernel_cannot_count_is_refused() {
        assert!(matches!(Plan::new(&[span(0, CHUNK_BYTES_MAX + 1)]), Err(DeviceError::TooLong { .. })));
        assert!(!Plan::new(&[span(0, 1), span(1, 1)]).unwrap().joins);
    }
}
