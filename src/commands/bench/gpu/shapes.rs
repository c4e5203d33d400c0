//! The tensors of Llama 3 8B, in bfloat16: 16.06 GB, in chunks.

const HIDDEN: u64 = 4096;
const INTERMEDIATE: u64 = 14336;
const KEYS: u64 = 1024;
const WORDS: u64 = 128_256;
const LAYERS: usize = 32;
const ELEMENT_BYTES: u64 = 2;
const CHUNK_BYTES: u64 = 4 << 20;

/// The length in bytes of every chunk, in the order of the checkpoint, each tensor cut for itself; of the first ones
/// that `size` has room for.
pub(super) fn chunks(size: u64) -> Vec<u64> {
    let mut end = 0;
    let fits = |len: &u64| {
        end += len;
        end <= size
    };
    all().take_while(fits).collect()
}

/// Whether `size` has room for all of it.
pub(super) fn fit(size: u64) -> bool {
    all().sum::<u64>() <= size
}

fn all() -> impl Iterator<Item = u64> {
    let layer = [
        HIDDEN,
        HIDDEN * HIDDEN,
        KEYS * HIDDEN,
        KEYS * HIDDEN,
        HIDDEN * HIDDEN,
        HIDDEN,
        INTERMEDIATE * HIDDEN,
        INTERMEDIATE * HIDDEN,
        HIDDEN * INTERMEDIATE,
    ];
    let layers = std::iter::repeat_n(layer, LAYERS).flatten();
    let tensors = std::iter::once(WORDS * HIDDEN).chain(layers).chain([HIDDEN, WORDS * HIDDEN]);
    tensors.flat_map(|elements| cut(elements * ELEMENT_BYTES))
}

fn cut(len: u64) -> impl Iterator<Item = u64> {
    (0..len.div_ceil(CHUNK_BYTES)).map(move |at| CHUNK_BYTES.min(len - at * CHUNK_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_llama_8b() {
        let all = chunks(16 << 30);
        assert_eq!((all.len(), all.iter().sum::<u64>()), (3895, 16_060_522_496));
        assert!(fit(16_060_522_496) && !fit(16_060_522_495));
        assert_eq!(chunks(9 << 20), [CHUNK_BYTES, CHUNK_BYTES]);
    }
}
