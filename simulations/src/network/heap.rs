//! When flows' heads arrive: a heap whose entries may be out of date.
//!
//! A flow has at most one entry that counts, the one whose stamp it carries. When a rate falls
//! the entry stays: it is found to be early when it comes up, and is put back at its real time.

use crate::wheel::{Timed, Wheel};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    pub(super) at: u64,
    pub(super) flow: u32,
    pub(super) stamp: u32,
}

#[derive(Debug, Default)]
pub(super) struct Heap(Wheel<Entry>);

impl Timed for Entry {
    fn at_ns(&self) -> u64 {
        self.at
    }
}

impl Heap {
    pub(super) fn push(&mut self, entry: Entry) {
        self.0.push(entry);
    }

    pub(super) fn peek(&mut self) -> Option<Entry> {
        self.0.peek()
    }

    pub(super) fn pop(&mut self) {
        self.0.pop();
    }

    /// Forgets entries that no longer count once they outnumber those that do.
    pub(super) fn compact(&mut self, live: usize, counts: impl Fn(&Entry) -> bool) {
        if self.0.len() > 4 * live + 1024 {
            self.0.retain(counts);
        }
    }
}
