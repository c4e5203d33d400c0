//! The tensors of Llama 3 8B, in bfloat16: 16.06 GB.

const HIDDEN: u64 = 4096;
const INTERMEDIATE: u64 = 14336;
const KEYS: u64 = 1024;
const WORDS: u64 = 128_256;
const LAYERS: usize = 32;
const ELEMENT_BYTES: u64 = 2;
const CHUNK_BYTES: u64 = 4 << 20;

/// The length in bytes of every chunk, in the order of the checkpoint: each tensor is cut for itself.
pub(crate) fn chunks() -> Vec<u64> {
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
    let mut tensors = vec![WORDS * HIDDEN];
    (0..LAYERS).for_each(|_| tensors.extend(layer));
    tensors.extend([HIDDEN, WORDS * HIDDEN]);
    tensors.into_iter().flat_map(|elements| cut(elements * ELEMENT_BYTES)).collect()
}

fn cut(len: u64) -> impl Iterator<Item = u64> {
    (0..len.div_ceil(CHUNK_BYTES)).map(move |at| CHUNK_BYTES.min(len - at * CHUNK_BYTES))
}
