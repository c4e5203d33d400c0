//! Where chunks begin and end.
//!
//! A cut never crosses a tensor. It falls on rows of the first dimension whose rows fit a chunk;
//! outer dimensions are cut apart first, so that a slice along dimension 0 is whole chunks. Among
//! the row counts between half a target and a target, the one that splits the tensor most evenly
//! by powers of two wins, because that is how tensor-parallel shards are made.

use crate::limits::CHUNK_BYTES_TARGET;

/// A tensor-parallel degree beyond which an even split is worth nothing more. Guess: the largest
/// common degree inside one node or NVLink domain of 16.
const EVEN_SPLIT_MAX: u64 = 16;

/// Lengths of the chunks of a tensor of `bytes` bytes and shape `shape`, in order. They add up
/// to `bytes`; an empty tensor has none.
pub fn tensor_cuts(shape: &[u64], bytes: u64) -> Vec<u32> {
    let mut cuts = Vec::new();
    cut_block(shape, bytes, &mut cuts);
    cuts
}

/// Lengths of the chunks of `bytes` bytes without structure.
pub fn plain_cuts(bytes: u64) -> Vec<u32> {
    let mut cuts = Vec::new();
    cut_every(bytes, u64::from(CHUNK_BYTES_TARGET), &mut cuts);
    cuts
}

fn cut_block(shape: &[u64], bytes: u64, cuts: &mut Vec<u32>) {
    let target = u64::from(CHUNK_BYTES_TARGET);
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
        (0..rows).for_each(|_| cut_block(inner, row, cuts));
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
        cuts.push(u32::try_from(len).expect("a step is at most CHUNK_BYTES_TARGET, which is a u32"));
        left -= len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_dim0_shard_is_whole_chunks() {
        // 4096 rows of 28 KiB: 146 rows would fit; 128 splits eight ways.
        let cuts = tensor_cuts(&[4096, 14336], 4096 * 14336 * 2);
        assert!(cuts.iter().all(|&c| c == 128 * 28672));
    }

    #[test]
    fn experts_are_cut_apart() {
        let cuts = tensor_cuts(&[3, 1000, 5000], 3 * 1000 * 5000);
        let expert = &cuts[..cuts.len() / 3];
        assert_eq!(expert.iter().map(|&c| u64::from(c)).sum::<u64>(), 5_000_000);
    }

    proptest! {
        #[test]
        fn cuts_cover_and_stay_in_bounds(shape in prop::collection::vec(0u64..3000, 0..4), elem in 1u64..9) {
            let bytes = shape.iter().product::<u64>() * elem % (1 << 33);
            let cuts = tensor_cuts(&shape, bytes);
            prop_assert_eq!(cuts.iter().map(|&c| u64::from(c)).sum::<u64>(), bytes);
            prop_assert!(cuts.iter().all(|&c| c > 0 && c <= CHUNK_BYTES_TARGET));
        }
    }
}
