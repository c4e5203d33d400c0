//! Control connections between nodes, as both ends see them.

use crate::spread::SpreadMap;
use aquifer_core::Time;
use std::collections::BTreeSet;
use std::time::Duration;

#[derive(Debug)]
pub(super) struct Links {
    links: SpreadMap<(u32, u32), Link>,
    /// By node, the other ends of its links.
    ends: Vec<BTreeSet<u32>>,
    /// Ended, and not yet noticed by both ends: a new one can be made after that.
    closing: SpreadMap<(u32, u32), Time>,
    next: u64,
}

/// One connection; what was sent on an earlier one of the same pair is not delivered on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) id: u64,
    pub(super) up_at: Time,
}

impl Links {
    pub(super) fn new(nodes: usize) -> Self {
        Links {
            links: SpreadMap::default(),
            ends: vec![BTreeSet::new(); nodes],
            closing: SpreadMap::default(),
            next: 0,
        }
    }

    pub(super) fn find(&self, a: u32, b: u32) -> Option<Link> {
        self.links.get(&pair(a, b)).copied()
    }

    /// Makes a connection that is up at `up_at`, unless there is one or one is still closing.
    pub(super) fn open(&mut self, a: u32, b: u32, now: Time, up_at: Time) -> Option<Link> {
        let pair = pair(a, b);
        if self.links.contains_key(&pair) || self.closing.get(&pair).is_some_and(|until| *until > now) {
            return None;
        }
        self.closing.remove(&pair);
        let link = Link { id: self.next, up_at };
        self.next += 1;
        self.links.insert(pair, link);
        self.ends[a as usize].insert(b);
        self.ends[b as usize].insert(a);
        Some(link)
    }

    /// Ends a connection; both ends notice within `noticed`. Returns it if it was up.
    pub(super) fn cut(&mut self, a: u32, b: u32, now: Time, noticed: Duration) -> Option<Link> {
        let link = self.links.remove(&pair(a, b))?;
        self.ends[a as usize].remove(&b);
        self.ends[b as usize].remove(&a);
        self.closing.insert(pair(a, b), now + noticed);
        (link.up_at <= now).then_some(link)
    }

    pub(super) fn of(&self, node: u32) -> Vec<u32> {
        self.ends[node as usize].iter().copied().collect()
    }

    pub(super) fn count(&self, node: u32) -> usize {
        self.ends[node as usize].len()
    }

    pub(super) fn pairs(&self) -> Vec<(u32, u32)> {
        let above = |(a, ends): (u32, &BTreeSet<u32>)| ends.range(a..).map(|b| (a, *b)).collect::<Vec<_>>();
        (0..).zip(&self.ends).flat_map(above).collect()
    }
}

fn pair(a: u32, b: u32) -> (u32, u32) {
    (a.min(b), a.max(b))
}
