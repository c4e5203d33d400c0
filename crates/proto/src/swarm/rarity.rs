//! How many copies of each chunk a holder knows of, and the rarest of some chunks.
//!
//! Chunks that are here and have the same number of copies form a *level*. A chunk moves between
//! neighbouring levels, and the rarest of a set is found in the first level that has anything in
//! common with it. Chunks that are not here would only be in the way: they cannot be given, and
//! those that nobody has stay rare.

use super::bits::Bits;

/// Levels kept apart; chunks with more copies share the last. As many as a holder has askers
/// (`limits::ASKERS_MAX`), and one for what it gave itself.
const LEVELS: usize = 66;

#[derive(Debug)]
pub(crate) struct Rarity {
    len: u32,
    copies: Vec<u8>,
    here: Bits,
    /// Only as many as were ever needed.
    levels: Vec<Bits>,
}

impl Rarity {
    pub(crate) fn new(len: u32) -> Self {
        Rarity { len, copies: vec![0; len as usize], here: Bits::new(len), levels: Vec::new() }
    }

    /// The chunk is here now.
    pub(crate) fn hold(&mut self, chunk: u32) {
        if self.here.insert(chunk) {
            self.level_of(self.copies[chunk as usize]).insert(chunk);
        }
    }

    /// The chunk is here no more.
    pub(crate) fn lose(&mut self, chunk: u32) {
        if self.here.remove(chunk) {
            self.level_of(self.copies[chunk as usize]).remove(chunk);
        }
    }

    pub(crate) fn copies(&self, chunk: u32) -> u8 {
        self.copies[chunk as usize]
    }

    pub(crate) fn more(&mut self, chunk: u32) {
        let before = self.copies[chunk as usize];
        self.copies[chunk as usize] = before.saturating_add(1);
        self.shift(chunk, before);
    }

    pub(crate) fn fewer(&mut self, chunk: u32) {
        let before = self.copies[chunk as usize];
        self.copies[chunk as usize] = before.saturating_sub(1);
        self.shift(chunk, before);
    }

    /// The rarest chunk of `of` that is here and how many copies are known; among equals one near `from`.
    pub(crate) fn rarest(&self, of: &Bits, from: u32) -> Option<(u32, usize)> {
        self.levels.iter().enumerate().find_map(|(level, set)| set.common(of, from).map(|c| (c, level)))
    }

    /// Whether no copy is known of some chunk of `of` that is here.
    pub(crate) fn has_first(&self, of: &Bits) -> bool {
        self.levels.first().is_some_and(|set| set.common(of, 0).is_some())
    }

    fn shift(&mut self, chunk: u32, before: u8) {
        let (from, to) = (level(before), level(self.copies[chunk as usize]));
        if from != to && self.here.contains(chunk) {
            self.level_of(before).remove(chunk);
            self.level_of(self.copies[chunk as usize]).insert(chunk);
        }
    }

    fn level_of(&mut self, copies: u8) -> &mut Bits {
        let at = level(copies);
        if self.levels.len() <= at {
            self.levels.resize_with(at + 1, || Bits::new(self.len));
        }
        &mut self.levels[at]
    }
}

fn level(copies: u8) -> usize {
    usize::from(copies).min(LEVELS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rarest_of_what_is_asked_for() {
        let mut rarity = Rarity::new(100);
        (0..99).for_each(|c| rarity.hold(c));
        (0..90).for_each(|c| rarity.more(c));
        (0..50).for_each(|c| rarity.more(c));
        let mut of = Bits::new(100);
        assert!(of.insert(3) && of.insert(60));
        assert_eq!(rarity.rarest(&of, 0), Some((60, 1)));
        assert!(of.insert(95) && of.insert(99), "the last is not here");
        assert_eq!(rarity.rarest(&of, 10), Some((95, 0)));
        rarity.fewer(3);
        rarity.fewer(3);
        rarity.lose(95);
        assert_eq!(rarity.rarest(&of, 50), Some((3, 0)));
        (0..200).for_each(|_| rarity.more(3));
        assert_eq!(rarity.rarest(&of, 0), Some((60, 1)));
    }
}
