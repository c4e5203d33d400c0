//! Sets of chunks of one manifest, by index in its [`crate::Layout`].

use crate::limits::MANIFEST_CHUNKS_MAX;
use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};
use std::fmt;

/// A set of indices below a fixed length. One bit each: 31 KiB for a 1 TB manifest.
#[derive(Clone, PartialEq, Eq)]
pub struct ChunkSet {
    len: u32,
    count: u32,
    words: Vec<u64>,
}

impl ChunkSet {
    pub fn empty(len: u32) -> Self {
        ChunkSet { len, count: 0, words: vec![0; words_for(len)] }
    }

    pub fn full(len: u32) -> Self {
        let mut set = ChunkSet { len, count: len, words: vec![u64::MAX; words_for(len)] };
        set.clear_tail();
        set
    }

    pub fn from_indices(len: u32, indices: impl IntoIterator<Item = u32>) -> Self {
        let mut set = ChunkSet::empty(len);
        indices.into_iter().for_each(|i| {
            set.insert(i);
        });
        set
    }

    /// Number of chunks the manifest has, in the set or not.
    pub fn len(&self) -> u32 {
        self.len
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of memory it takes.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u64>()
    }

    pub fn is_full(&self) -> bool {
        self.count == self.len
    }

    pub fn contains(&self, index: u32) -> bool {
        index < self.len && self.words[word(index)] & bit(index) != 0
    }

    /// Adds `index`; false if it was there, or lies beyond the manifest.
    pub fn insert(&mut self, index: u32) -> bool {
        let new = index < self.len && !self.contains(index);
        if new {
            self.words[word(index)] |= bit(index);
            self.count += 1;
        }
        new
    }

    /// Removes `index`; false if it was not there.
    pub fn remove(&mut self, index: u32) -> bool {
        let there = self.contains(index);
        if there {
            self.words[word(index)] &= !bit(index);
            self.count -= 1;
        }
        there
    }

    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        members(self.words.iter().copied())
    }

    /// Indices in both sets. Sets of different manifests share none.
    pub fn intersection<'a>(&'a self, other: &'a ChunkSet) -> impl Iterator<Item = u32> + 'a {
        let same = self.len == other.len;
        self.iter().filter(move |&i| same && other.contains(i))
    }

    /// Indices in this set and not in the other, a set of the same manifest.
    pub fn difference<'a>(&'a self, other: &'a ChunkSet) -> impl Iterator<Item = u32> + 'a {
        let without = |(w, &word): (usize, &u64)| word & !other.words.get(w).copied().unwrap_or(0);
        members(self.words.iter().enumerate().map(without))
    }

    /// Whether the two sets, of the same manifest, have anything in common.
    pub fn intersects(&self, other: &ChunkSet) -> bool {
        self.len == other.len && self.words.iter().zip(&other.words).any(|(a, b)| a & b != 0)
    }

    /// Adds every member of `other`, a set of the same manifest.
    pub fn union_with(&mut self, other: &ChunkSet) {
        self.combine(other, |a, b| a | b);
    }

    /// Removes every member of `other`, a set of the same manifest.
    pub fn subtract(&mut self, other: &ChunkSet) {
        self.combine(other, |a, b| a & !b);
    }

    pub fn is_superset(&self, other: &ChunkSet) -> bool {
        self.len == other.len && self.words.iter().zip(&other.words).all(|(a, b)| b & !a == 0)
    }

    fn combine(&mut self, other: &ChunkSet, with: impl Fn(u64, u64) -> u64) {
        if self.len != other.len {
            return;
        }
        self.words.iter_mut().zip(&other.words).for_each(|(a, b)| *a = with(*a, *b));
        self.recount();
    }

    fn recount(&mut self) {
        self.count = self.words.iter().map(|w| w.count_ones()).sum();
    }

    fn clear_tail(&mut self) {
        if let (Some(last), used) = (self.words.last_mut(), self.len % 64)
            && used != 0
        {
            *last &= (1 << used) - 1;
        }
    }
}

impl fmt::Debug for ChunkSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} chunks", self.count, self.len)
    }
}

/// Full and empty sets, the common ones, cost a few bytes.
#[derive(Encode, Decode)]
enum Wire {
    Empty,
    Full,
    Bits(Vec<u64>),
}

impl Encode for ChunkSet {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.len.encode(encoder)?;
        match self.count {
            0 => Wire::Empty,
            n if n == self.len => Wire::Full,
            _ => Wire::Bits(self.words.clone()),
        }
        .encode(encoder)
    }
}

impl<C> Decode<C> for ChunkSet {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let len = u32::decode(decoder)?;
        if len as usize > MANIFEST_CHUNKS_MAX {
            return Err(DecodeError::OtherString(format!("a set over {len} chunks")));
        }
        let words = match Wire::decode(decoder)? {
            Wire::Empty => return Ok(ChunkSet::empty(len)),
            Wire::Full => return Ok(ChunkSet::full(len)),
            Wire::Bits(words) => words,
        };
        if words.len() != words_for(len) {
            return Err(DecodeError::OtherString(format!("{} words for {len} chunks", words.len())));
        }
        let mut set = ChunkSet { len, count: 0, words };
        set.clear_tail();
        set.recount();
        Ok(set)
    }
}

impl<'de, C> BorrowDecode<'de, C> for ChunkSet {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Self::decode(decoder)
    }
}

/// The indices that a sequence of words stands for.
fn members(words: impl Iterator<Item = u64>) -> impl Iterator<Item = u32> {
    words.zip(0u32..).flat_map(|(word, w)| {
        let mut rest = word;
        std::iter::from_fn(move || {
            let b = (rest != 0).then(|| rest.trailing_zeros())?;
            rest &= rest - 1;
            Some(w * 64 + b)
        })
    })
}

fn words_for(len: u32) -> usize {
    len.div_ceil(64) as usize
}

fn word(index: u32) -> usize {
    (index / 64) as usize
}

fn bit(index: u32) -> u64 {
    1 << (index % 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Kind, decode, encode};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set(len in 0u32..300, ops in prop::collection::vec((any::<bool>(), 0u32..320), 0..200)) {
            let mut set = ChunkSet::empty(len);
            let mut model = BTreeSet::new();
            for (add, i) in ops {
                if add {
                    prop_assert_eq!(set.insert(i), i < len && model.insert(i));
                } else {
                    prop_assert_eq!(set.remove(i), model.remove(&i));
                }
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.count() as usize, model.len());
            let bytes = encode(Kind::Peer, &set);
            prop_assert_eq!(decode::<ChunkSet, 4096>(Kind::Peer, &bytes).unwrap(), set.clone());
            let mut rest = ChunkSet::full(len);
            rest.subtract(&set);
            prop_assert_eq!(rest.count(), len - set.count());
            rest.union_with(&set);
            prop_assert!(rest.is_full() && rest.is_superset(&set));
        }
    }
}
