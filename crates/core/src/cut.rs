//! Where chunks begin and end.
//!
//! A cut never crosses a tensor, but for packs: short tensors that stand one after the other in a file
//! are one chunk together, and none of them is cut. Elsewhere a cut falls on rows of the first dimension whose rows fit a chunk;
//! outer dimensions are cut apart first, so that a slice along dimension 0 is whole chunks. Among
//! the row counts between half a target and a target, the one that splits the tensor most evenly
//! by powers of two wins, because that is how tensor-parallel shards are made.
//!
//! How long a chunk may be follows from how much there is to distribute: a swarm fills its pipeline
//! with chunks, and a small checkpoint in long ones has too few of them.

use crate::limits::{CHUNK_BYTES_TARGET, CHUNK_BYTES_TARGET_MIN, CHUNKS_WANTED, PACK_BYTES_TARGET, PACK_TENSORS_MIN};

/// A tensor-parallel degree beyond which an even split is worth nothing more. Guess: the largest
/// common degree inside one node or NVLink domain of 16.
const EVEN_SPLIT_MAX: u64 = 16;

/// The length that chunks of one checkpoint have at most: a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkTarget(u32);

impl ChunkTarget {
    /// For a checkpoint of `total` bytes: such that it has about [`CHUNKS_WANTED`] chunks, from three
    /// quarters as many to half as many again, where that is within the limits.
    pub fn of(total: u64) -> Self {
        // Rounding `total / CHUNKS_WANTED` to the nearest power of two puts the steps half-way
        // between two of them, where fewer models lie than at round sizes.
        let least = total.div_ceil(CHUNKS_WANTED + CHUNKS_WANTED / 2);
        let most = u64::from(CHUNK_BYTES_TARGET);
        let bytes = least.min(most).next_power_of_two().clamp(CHUNK_BYTES_TARGET_MIN.into(), most);
        ChunkTarget(u32::try_from(bytes).unwrap_or(CHUNK_BYTES_TARGET))
    }

    pub fn bytes(self) -> u32 {
        self.0
    }

    /// The length that packs of short tensors have at most.
    pub fn pack_bytes(self) -> u32 {
        self.0.min(PACK_BYTES_TARGET)
    }

    /// Whether a tensor of `bytes` bytes is gathered with its neighbours into a pack.
    pub fn is_short(self, bytes: u64) -> bool {
        bytes < u64::from(self.pack_bytes() / PACK_TENSORS_MIN)
    }
}

/// Lengths of the chunks of a tensor of `bytes` bytes and shape `shape`, in order. They add up
/// to `bytes`; an empty tensor has none.
pub fn tensor_cuts(shape: &[u64], bytes: u64, target: ChunkTarget) -> Vec<u32> {
    let mut cuts = Vec::new();
    cut_block(shape, bytes, target, &mut cuts);
    cuts
}

/// Lengths of the chunks of `bytes` bytes without structure.
pub fn plain_cuts(bytes: u64, target: ChunkTarget) -> Vec<u32> {
    let mut cuts = Vec::new();
    cut_every(bytes, target.0.into(), &mut cuts);
    cuts
}

fn cut_block(shape: &[u64], bytes: u64, chunk: ChunkTarget, cuts: &mut Vec<u32>) {
    let target = u64::from(chunk.0);
    if bytes <= target {
        return cut_every(bytes, target, cuts);
    }
    let Some((&rows, inner)) = shape.split_first() else {
        return cut_every(bytes, target, cuts);
    };
    if rows == 0 || !bytes.is_multiple_of(rows) {
        // A dtype of unknown or fractional size: no row boundary falls on a byte for certain.
        return cut_every(bytes, target, cuts);
    }
    let row = bytes / rows;
    if row > target {
        (0..rows).for_each(|_| cut_block(inner, row, chunk, cuts));
    } else {
        cut_every(bytes, rows_per_chunk(rows, target / row) * row, cuts);
    }
}

/// How many of `rows` rows make a chunk that may hold at most `most`.
fn rows_per_chunk(rows: u64, most: u64) -> u64 {
    let evenness = |n: u64| match rows % n {
        0 => 1 + (rows / n).trailing_zeros().min(EVEN_SPLIT_MAX.trailing_zeros()),
        _ => 0,
    };
    // Divisors near `most` are what matters; a flat vector has millions of candidates.
    let least = (most / 2).max(most.saturating_sub(4096)) + 1;
    let powers = (0..u64::BITS).map(|p| 1u64 << p).filter(|n| *n > most / 2 && *n <= most);
    (least..=most).chain(powers).max_by_key(|&n| (evenness(n), n)).unwrap_or(most)
}

fn cut_every(bytes: u64, step: u64, cuts: &mut Vec<u32>) {
    let mut left = bytes;
    while left > 0 {
        let len = left.min(step);
        cuts.push(u32::try_from(len).expect("a step is at most a ChunkTarget, which is a u32"));
        left -= len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn longest() -> ChunkTarget {
        ChunkTarget::of(u64::MAX)
    }

    #[test]
    fn a_dim0_shard_is_whole_chunks() {
        // 4096 rows of 28 KiB: 146 rows would fit; 128 splits eight ways.
        let cuts = tensor_cuts(&[4096, 14336], 4096 * 14336 * 2, longest());
        assert!(cuts.iter().all(|&c| c == 128 * 28672));
        // A row that fits no chunk is cut by itself: a shard still ends where a chunk does.
        let cuts = tensor_cuts(&[64, 35_000], 64 * 70_000, ChunkTarget::of(64 * 70_000));
        assert_eq!(cuts, [64 * 1024, 70_000 - 64 * 1024].repeat(64));
    }

    #[test]
    fn experts_are_cut_apart() {
        let cuts = tensor_cuts(&[3, 1000, 5000], 3 * 1000 * 5000, longest());
        let expert = &cuts[..cuts.len() / 3];
        assert_eq!(expert.iter().map(|&c| u64::from(c)).sum::<u64>(), 5_000_000);
    }

    #[test]
    fn a_small_checkpoint_has_short_chunks() {
        let cases = [
            (0, 64 * KIB),
            (10 * MIB, 64 * KIB),
            (64 * MIB, 64 * KIB),
            (65 * MIB, 64 * KIB),
            (128 * MIB, 128 * KIB),
            (256 * MIB, 256 * KIB),
            (GIB, MIB),
            (GIB + 20 * MIB, MIB),
            (2 * GIB, 2 * MIB),
            (4 * GIB, 4 * MIB),
            (1 << 40, 4 * MIB),
        ];
        for (total, expected) in cases {
            assert_eq!(u64::from(ChunkTarget::of(total).bytes()), expected, "for {total} bytes");
        }
    }

    proptest! {
        #[test]
        fn cuts_cover_and_stay_in_bounds(
            shape in prop::collection::vec(0u64..3000, 0..4),
            elem in 1u64..9,
            total in (0u32..40).prop_map(|p| 1u64 << p),
        ) {
            let target = ChunkTarget::of(total);
            let bytes = shape.iter().product::<u64>() * elem % (u64::from(target.bytes()) << 11);
            for cuts in [tensor_cuts(&shape, bytes, target), plain_cuts(bytes, target)] {
                prop_assert_eq!(cuts.iter().map(|&c| u64::from(c)).sum::<u64>(), bytes);
                prop_assert!(cuts.iter().all(|&c| c > 0 && c <= target.bytes()));
            }
        }

        #[test]
        fn a_target_is_a_power_of_two_and_makes_about_as_many_chunks_as_wanted(total in any::<u64>(), shift in 0u32..64) {
            let total = total >> shift;
            let target = ChunkTarget::of(total);
            prop_assert!(target.bytes().is_power_of_two());
            prop_assert!((CHUNK_BYTES_TARGET_MIN..=CHUNK_BYTES_TARGET).contains(&target.bytes()));
            prop_assert!(target.bytes() <= ChunkTarget::of(total.saturating_mul(2)).bytes());
            let chunks = total.div_ceil(target.bytes().into());
            let (fewest, most) = (CHUNKS_WANTED * 3 / 4, CHUNKS_WANTED * 3 / 2);
            prop_assert!(chunks <= most || target.bytes() == CHUNK_BYTES_TARGET);
            prop_assert!(chunks >= fewest || target.bytes() == CHUNK_BYTES_TARGET_MIN);
        }
    }
}
