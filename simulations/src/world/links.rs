//! Control connections between nodes, as both ends see them.

use aquifer_core::Time;
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug, Default)]
pub(super) struct Links {
    links: BTreeMap<(u32, u32), Link>,
    /// Ended, and not yet noticed by both ends: a new one can be made after that.
    closing: BTreeMap<(u32, u32), Time>,
    next: u64,
}

/// One connection; what was sent on an earlier one of the same pair is not delivered on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) id: u64,
    pub(super) up_at: Time,
}

impl Links {
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
        Some(link)
    }

    /// Ends a connection; both ends notice within `noticed`. Returns it if it was up.
    pub(super) fn cut(&mut self, a: u32, b: u32, now: Time, noticed: Duration) -> Option<Link> {
        let link = self.links.remove(&pair(a, b))?;
        self.closing.insert(pair(a, b), now + noticed);
        (link.up_at <= now).then_some(link)
    }

    pub(super) fn of(&self, node: u32) -> Vec<u32> {
        self.links.keys().filter(|(a, b)| *a == node || *b == node).map(|(a, b)| a ^ b ^ node).collect()
    }

    pub(super) fn pairs(&self) -> Vec<(u32, u32)> {
        self.links.keys().copied().collect()
    }
}

fn pair(a: u32, b: u32) -> (u32, u32) {
    (a.min(b), a.max(b))
}
