//! Which descriptors a reader was given and keeps, as the holder knows it.

use super::wire::SlotSet;
use crate::limits::SHM_SLOTS;
use aquifer_memory::Mapping;
use std::sync::{Arc, Weak};

/// One connection's slots.
#[derive(Debug, Default)]
pub(super) struct Slots {
    kept: [Option<Kept>; SHM_SLOTS],
    clock: u64,
}

#[derive(Debug)]
struct Kept {
    mapping: Weak<Mapping>,
    used: u64,
}

impl Slots {
    /// The slot that the reader keeps `mapping` in.
    pub(super) fn find(&mut self, mapping: &Arc<Mapping>) -> Option<u8> {
        self.clock += 1;
        let is = |kept: &Option<Kept>| kept.as_ref().is_some_and(|k| k.mapping.as_ptr() == Arc::as_ptr(mapping));
        let slot = self.kept.iter().position(is)?;
        if let Some(kept) = &mut self.kept[slot] {
            kept.used = self.clock;
        }
        number(slot)
    }

    /// The slot that `mapping` is to go to: an empty one, or that which was not used for longest.
    pub(super) fn put(&mut self, mapping: &Arc<Mapping>) -> Option<u8> {
        self.clock += 1;
        let used = |slot: &usize| self.kept[*slot].as_ref().map_or(0, |kept| kept.used);
        let slot = (0..SHM_SLOTS).min_by_key(used)?;
        self.kept[slot] = Some(Kept { mapping: Arc::downgrade(mapping), used: self.clock });
        number(slot)
    }

    /// Empties the slots of memory that is gone here, and says which they were.
    pub(super) fn take_dropped(&mut self) -> SlotSet {
        let mut dropped = 0;
        for (slot, kept) in self.kept.iter_mut().enumerate() {
            if kept.as_ref().is_some_and(|k| k.mapping.strong_count() == 0) {
                *kept = None;
                dropped |= 1 << slot;
            }
        }
        dropped
    }
}

fn number(slot: usize) -> Option<u8> {
    u8::try_from(slot).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping() -> Arc<Mapping> {
        Mapping::anonymous(1).unwrap()
    }

    #[test]
    fn what_was_used_last_stays_longest() {
        let all: Vec<_> = (0..=SHM_SLOTS).map(|_| mapping()).collect();
        let mut slots = Slots::default();
        for (expected, mapping) in (0..).zip(&all[..SHM_SLOTS]) {
            assert_eq!((slots.find(mapping), slots.put(mapping)), (None, Some(expected)));
        }
        assert_eq!(slots.find(&all[0]), Some(0));
        assert_eq!(slots.put(&all[SHM_SLOTS]), Some(1));
        assert_eq!((slots.find(&all[1]), slots.find(&all[0]), slots.find(&all[SHM_SLOTS])), (None, Some(0), Some(1)));
    }

    #[test]
    fn what_is_gone_is_told_once_and_makes_room() {
        let (mut slots, first, second) = (Slots::default(), mapping(), mapping());
        assert_eq!((slots.put(&first), slots.put(&second)), (Some(0), Some(1)));
        assert_eq!(slots.take_dropped(), 0);
        drop(second);
        assert_eq!((slots.take_dropped(), slots.take_dropped()), (0b10, 0));
        assert_eq!(slots.put(&mapping()), Some(1));
    }
}
