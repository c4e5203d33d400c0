//! What a puller's holders have yet to hear: chunks taken, and chunks wanted after all.
//!
//! One log for all holders, and a cursor for each: whatever is sent to a holder carries what is
//! new to it, and who was not spoken to for a while is told by itself.

use crate::limits::NEWS_MAX;
use aquifer_core::NodeId;
use std::collections::{BTreeMap, VecDeque};

#[derive(Debug, Default)]
pub(super) struct News {
    log: VecDeque<Entry>,
    /// Number of the log's first entry since the beginning.
    first: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    chunk: u32,
    taken: bool,
    /// The holder that knows already.
    known_to: NodeId,
}

/// What one holder is told.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) taken: Vec<u32>,
    pub(super) again: Vec<u32>,
}

impl News {
    /// Where a holder stands that has heard everything.
    pub(super) fn end(&self) -> u64 {
        self.first + self.log.len() as u64
    }

    pub(super) fn taken(&mut self, chunk: u32, known_to: NodeId) {
        self.push(Entry { chunk, taken: true, known_to });
    }

    pub(super) fn again(&mut self, chunk: u32, known_to: NodeId) {
        self.push(Entry { chunk, taken: false, known_to });
    }

    /// What `to` has not heard since `cursor`; None if that is forgotten, so that it must be told
    /// everything anew. The last word on a chunk counts.
    pub(super) fn since(&self, cursor: u64, to: NodeId) -> Option<Told> {
        let from = usize::try_from(cursor.checked_sub(self.first)?).ok()?;
        let mut last: BTreeMap<u32, bool> = BTreeMap::new();
        for entry in self.log.iter().skip(from) {
            if entry.known_to == to {
                last.remove(&entry.chunk);
            } else {
                last.insert(entry.chunk, entry.taken);
            }
        }
        let of = |taken: bool| last.iter().filter(|(_, t)| **t == taken).map(|(c, _)| *c).collect();
        Some(Told { taken: of(true), again: of(false) })
    }

    /// Forgets what everybody has heard: nobody stands before `cursor`.
    pub(super) fn trim(&mut self, cursor: u64) {
        while self.first < cursor && self.log.pop_front().is_some() {
            self.first += 1;
        }
    }

    fn push(&mut self, entry: Entry) {
        self.log.push_back(entry);
        if self.log.len() > NEWS_MAX {
            self.log.pop_front();
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_hears_what_is_new_to_it_and_the_last_word_counts() {
        let (a, b, me) = (NodeId([1; 32]), NodeId([2; 32]), NodeId([9; 32]));
        let mut news = News::default();
        news.taken(1, a);
        news.taken(2, me);
        news.again(1, a);
        news.taken(3, b);
        assert_eq!(news.since(0, a), Some(Told { taken: vec![2, 3], again: vec![] }));
        assert_eq!(news.since(0, b), Some(Told { taken: vec![2], again: vec![1] }));
        assert_eq!(news.since(news.end(), b), Some(Told::default()));
        news.trim(2);
        assert_eq!(news.since(0, b), None);
        assert_eq!(news.since(2, b), Some(Told { taken: vec![], again: vec![1] }));
    }
}
