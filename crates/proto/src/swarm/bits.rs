//! Sets of chunks that are intersected all the time: one bit each, and one bit per word of those.
//!
//! A set over 250,000 chunks has 3,907 words and 62 words of summary, so that what two sets have
//! in common is found by looking at the summaries first.

use aquifer_core::ChunkSet;

/// A set of indices below a fixed length.
#[derive(Clone, Debug)]
pub(crate) struct Bits {
    words: Vec<u64>,
    /// Bit w says that word w is not zero.
    summary: Vec<u64>,
    count: u32,
}

impl Bits {
    pub(crate) fn new(len: u32) -> Self {
        let words = len.div_ceil(64) as usize;
        Bits { words: vec![0; words], summary: vec![0; words.div_ceil(64)], count: 0 }
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn contains(&self, index: u32) -> bool {
        let (word, bit) = place(index);
        self.words.get(word).is_some_and(|w| w & bit != 0)
    }

    /// False if it was there.
    pub(crate) fn insert(&mut self, index: u32) -> bool {
        let (word, bit) = place(index);
        if self.words[word] & bit != 0 {
            return false;
        }
        self.words[word] |= bit;
        self.summary[word / 64] |= 1 << (word % 64);
        self.count += 1;
        true
    }

    /// False if it was not there.
    pub(crate) fn remove(&mut self, index: u32) -> bool {
        let (word, bit) = place(index);
        if !self.contains(index) {
            return false;
        }
        self.words[word] &= !bit;
        if self.words[word] == 0 {
            self.summary[word / 64] &= !(1 << (word % 64));
        }
        self.count -= 1;
        true
    }

    /// What is not in `others`.
    pub(crate) fn without(&self, others: &ChunkSet) -> Bits {
        let mut rest = self.clone();
        for index in self.iter().filter(|index| others.contains(*index)) {
            rest.remove(index);
        }
        rest
    }

    /// The first member of both sets from `from` on, counting around; nearly uniform for a
    /// uniform `from` where the sets are spread evenly.
    pub(crate) fn common(&self, other: &Bits, from: u32) -> Option<u32> {
        if self.count == 0 || other.count == 0 {
            return None;
        }
        let (start, bit) = place(from);
        let shared = |w: usize| self.words[w] & other.words[w];
        // The starting word's upper part first, its lower part last.
        if let Some(&own) = self.words.get(start) {
            let upper = own & other.words[start] & !(bit - 1);
            if upper != 0 {
                return index(start, upper);
            }
        }
        let found = self.next_shared(other, start + 1).or_else(|| self.next_shared(other, 0));
        found.and_then(|w| index(w, shared(w)))
    }

    /// The first word at or after `from` that is not zero in the intersection.
    fn next_shared(&self, other: &Bits, from: usize) -> Option<usize> {
        let mut group = from / 64;
        let mut mask = u64::MAX << (from % 64);
        while let Some(&own) = self.summary.get(group) {
            let mut both = own & other.summary[group] & mask;
            while both != 0 {
                let word = group * 64 + both.trailing_zeros() as usize;
                if self.words[word] & other.words[word] != 0 {
                    return Some(word);
                }
                both &= both - 1;
            }
            mask = u64::MAX;
            group += 1;
        }
        None
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().filter(|(_, w)| **w != 0).flat_map(|(w, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let at = index(w, rest)?;
                rest &= rest - 1;
                Some(at)
            })
        })
    }
}

fn place(index: u32) -> (usize, u64) {
    ((index / 64) as usize, 1 << (index % 64))
}

fn index(word: usize, bits: u64) -> Option<u32> {
    let at = (bits != 0).then(|| word * 64 + bits.trailing_zeros() as usize)?;
    u32::try_from(at).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn what_two_sets_share_is_found_from_anywhere(
            a in prop::collection::btree_set(0u32..9000, 0..60),
            b in prop::collection::btree_set(0u32..9000, 0..60),
            from in 0u32..9000,
        ) {
            let set = |of: &BTreeSet<u32>| {
                let mut bits = Bits::new(9000);
                of.iter().for_each(|&i| assert!(bits.insert(i)));
                bits
            };
            let (x, mut y) = (set(&a), set(&b));
            let both: BTreeSet<u32> = a.intersection(&b).copied().collect();
            let want = both.range(from..).next().or(both.first()).copied();
            let got = x.common(&y, from);
            // Around the end the lower part of the starting word counts as last or first.
            prop_assert_eq!(got.is_some(), want.is_some());
            prop_assert!(got.is_none_or(|g| both.contains(&g)));
            prop_assert_eq!(x.iter().collect::<Vec<_>>(), a.iter().copied().collect::<Vec<_>>());
            b.iter().for_each(|&i| assert!(y.remove(i)));
            prop_assert_eq!((y.count(), y.common(&x, from)), (0, None));
        }
    }
}
