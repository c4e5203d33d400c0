//! Which chunks somebody read here and verified, and who was the last to do so.
//!
//! They count as a copy more: their reader may have left the table and still be in the swarm. As long as a node
//! stays that is near enough to the truth; who leaves asks whether the reader is still there.

use aquifer_core::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// Not given to anybody.
const NOBODY: u16 = 0;
/// Given to one of more readers than there are numbers for.
const SOMEBODY: u16 = u16::MAX;

#[derive(Debug)]
pub(super) struct Given {
    /// For each chunk the number of its last reader.
    to: Vec<u16>,
    readers: BTreeMap<NodeId, u16>,
    last: u16,
}

impl Given {
    pub(super) fn new(len: u32) -> Self {
        Given { to: vec![NOBODY; len as usize], readers: BTreeMap::new(), last: NOBODY }
    }

    pub(super) fn contains(&self, chunk: u32) -> bool {
        self.to.get(chunk as usize).is_some_and(|to| *to != NOBODY)
    }

    /// Returns whether nobody had read it before.
    pub(super) fn insert(&mut self, chunk: u32, reader: NodeId) -> bool {
        let number = self.number(reader);
        let Some(to) = self.to.get_mut(chunk as usize) else { return false };
        std::mem::replace(to, number) == NOBODY
    }

    /// Forgets what was given to those who do not stay, and returns it.
    pub(super) fn retain(&mut self, stays: impl Fn(&NodeId) -> bool) -> Vec<u32> {
        let before = self.readers.len();
        self.readers.retain(|node, _| stays(node));
        if self.readers.len() == before && self.last < SOMEBODY {
            return Vec::new();
        }
        let there: BTreeSet<u16> = self.readers.values().copied().filter(|n| *n != SOMEBODY).collect();
        let lost = (0u32..).zip(&self.to).filter(|(_, to)| **to != NOBODY && !there.contains(to));
        let lost: Vec<u32> = lost.map(|(chunk, _)| chunk).collect();
        for &chunk in &lost {
            self.to[chunk as usize] = NOBODY;
        }
        lost
    }

    fn number(&mut self, reader: NodeId) -> u16 {
        if self.last == SOMEBODY {
            return self.readers.get(&reader).copied().unwrap_or(SOMEBODY);
        }
        *self.readers.entry(reader).or_insert_with(|| {
            self.last += 1;
            self.last
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: u32) -> NodeId {
        let mut id = [0; 32];
        id[..4].copy_from_slice(&n.to_le_bytes());
        NodeId(id)
    }

    #[test]
    fn what_was_given_to_who_left_is_not_given() {
        let mut given = Given::new(4);
        assert!(given.insert(0, node(1)) && given.insert(1, node(1)) && given.insert(2, node(2)));
        assert!(!given.insert(1, node(2)), "once more");
        assert!(!given.insert(9, node(1)), "there is none");
        assert!(given.retain(|_| true).is_empty());
        assert_eq!(given.retain(|n| *n != node(1)), [0]);
        assert!(!given.contains(0) && given.contains(1) && given.contains(2));
        assert!(given.insert(0, node(1)), "it is back");
    }

    #[test]
    fn of_very_many_readers_the_last_are_not_told_apart() {
        let mut given = Given::new(2);
        for n in 0..=u32::from(u16::MAX) {
            given.insert(0, node(n));
        }
        assert!(given.insert(1, node(3)));
        assert_eq!(given.retain(|_| true), [0], "nobody knows whether they are there");
        assert!(given.contains(1));
    }
}
