//! A queue by time, of which nothing is asked for a time that has passed: a calendar queue (Brown,
//! "Calendar queues: a fast O(1) priority queue implementation for the simulation event set
//! problem", CACM 31(10), 1988) with a heap for what is far off.
//!
//! A heap of all that a large run waits for lies in no cache. Here most entries are written to the
//! end of a short list, and sorted among the few of their microsecond when that comes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A slot is 2^10 ns long: some tens of entries in a run of thousands of nodes.
const SLOT_SHIFT: u32 = 10;

/// 17 ms: further off than most of what is planned.
const SLOTS: u64 = 1 << 14;

/// Entries come out in order of time, then of what else they say.
pub(crate) trait Timed: Copy + Ord {
    fn at_ns(&self) -> u64;
}

#[derive(Debug)]
pub(crate) struct Wheel<E> {
    /// The slot that is being emptied, counted from time zero; and its entries, and any before.
    slot: u64,
    current: BinaryHeap<Reverse<E>>,
    /// Entries of the slots after it.
    slots: Vec<Vec<E>>,
    /// Which slots have any, a bit each.
    taken: Vec<u64>,
    /// Entries of slots further off than there are slots.
    far: BinaryHeap<Reverse<E>>,
    len: usize,
    /// Empty lists to use again.
    spare: Vec<Vec<E>>,
}

impl<E: Timed> Default for Wheel<E> {
    fn default() -> Self {
        let slots = (0..SLOTS).map(|_| Vec::new()).collect::<Vec<_>>();
        Wheel {
            slot: 0,
            current: BinaryHeap::new(),
            taken: vec![0; slots.len().div_ceil(64)],
            slots,
            far: BinaryHeap::new(),
            len: 0,
            spare: Vec::new(),
        }
    }
}

impl<E: Timed> Wheel<E> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn push(&mut self, entry: E) {
        self.len += 1;
        self.put(entry);
    }

    /// The first entry.
    pub(crate) fn peek(&mut self) -> Option<E> {
        while self.current.is_empty() {
            self.advance()?;
        }
        self.current.peek().map(|Reverse(entry)| *entry)
    }

    pub(crate) fn pop(&mut self) -> Option<E> {
        self.peek()?;
        self.len -= 1;
        self.current.pop().map(|Reverse(entry)| entry)
    }

    pub(crate) fn retain(&mut self, keep: impl Fn(&E) -> bool) {
        self.current.retain(|e| keep(&e.0));
        self.far.retain(|e| keep(&e.0));
        self.slots.iter_mut().for_each(|s| s.retain(&keep));
        self.len = self.current.len() + self.far.len() + self.slots.iter().map(Vec::len).sum::<usize>();
    }

    fn put(&mut self, entry: E) {
        let slot = entry.at_ns() >> SLOT_SHIFT;
        if slot <= self.slot {
            self.current.push(Reverse(entry));
        } else if slot - self.slot < SLOTS {
            let at = place(slot);
            if self.slots[at].capacity() == 0 {
                self.slots[at] = self.spare.pop().unwrap_or_default();
            }
            self.slots[at].push(entry);
            self.taken[at / 64] |= 1 << (at % 64);
        } else {
            self.far.push(Reverse(entry));
        }
    }

    /// Goes to the next slot that has entries.
    fn advance(&mut self) -> Option<()> {
        let first_far = || self.far.peek().map(|e| e.0.at_ns() >> SLOT_SHIFT);
        self.slot = self.next_taken().or_else(first_far)?;
        let at = place(self.slot);
        self.taken[at / 64] &= !(1 << (at % 64));
        let mut due = std::mem::take(&mut self.slots[at]);
        self.current.extend(due.drain(..).map(Reverse));
        if due.capacity() > 0 {
            self.spare.push(due);
        }
        while let Some(Reverse(entry)) = self.far.peek().copied() {
            if (entry.at_ns() >> SLOT_SHIFT) - self.slot >= SLOTS {
                break;
            }
            self.far.pop();
            self.put(entry);
        }
        Some(())
    }

    fn next_taken(&self) -> Option<u64> {
        let begin = place(self.slot + 1);
        let words = self.taken.len();
        // The first word once more at the end, for its lower part.
        (0..=words).find_map(|k| {
            let word = (begin / 64 + k) % words;
            let mask = match k {
                0 => u64::MAX << (begin % 64),
                _ if k == words => !(u64::MAX << (begin % 64)),
                _ => u64::MAX,
            };
            let taken = self.taken[word] & mask;
            let at = (word * 64) as u64 + u64::from(taken.trailing_zeros());
            (taken != 0).then(|| self.slot + 1 + (at + SLOTS - begin as u64) % SLOTS)
        })
    }
}

fn place(slot: u64) -> usize {
    usize::try_from(slot % SLOTS).expect("slots are few")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Timed for (u64, u32) {
        fn at_ns(&self) -> u64 {
            self.0
        }
    }

    proptest! {
        #[test]
        fn comes_out_in_order(steps in prop::collection::vec((0u32..40, prop::bool::ANY), 1..400)) {
            let (mut wheel, mut model) = (Wheel::default(), BinaryHeap::new());
            let mut now = 0u64;
            for (turn, (bits, pops)) in (0u32..).zip(steps) {
                // Within the slot, the wheel, or far beyond it.
                let entry = (now + (1u64 << bits) - 1, turn);
                wheel.push(entry);
                model.push(Reverse(entry));
                if pops {
                    let entry = wheel.pop();
                    prop_assert_eq!(entry.map(Reverse), model.pop());
                    now = entry.map_or(now, |e| e.0);
                }
                prop_assert_eq!(wheel.len(), model.len());
            }
            wheel.retain(|e| e.1 % 3 > 0);
            model.retain(|e| e.0.1 % 3 > 0);
            while let Some(Reverse(entry)) = model.pop() {
                prop_assert_eq!(wheel.pop(), Some(entry));
            }
            prop_assert_eq!(wheel.pop(), None);
        }
    }
}
