//! What one hook has still to deliver: in the order it was sent, and never more than its bounds. Pure.

use crate::event::Event;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Events by their number, which grows with each that is sent.
#[derive(Debug)]
pub(crate) struct Outbox {
    entries: BTreeMap<u64, Entry>,
    /// Of each kind and what it is about, the one that the next replaces.
    newest: BTreeMap<(String, String), u64>,
    replaceable: BTreeSet<u64>,
    cost_bytes: usize,
    /// The number of the next one.
    next: u64,
    /// Being delivered just now: neither replaced nor dropped, since it may have arrived already.
    held: Option<u64>,
    events_max: usize,
    bytes_max: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) event: Arc<Event>,
    /// When it was sent, in ms since 1970.
    pub(crate) sent_unix_ms: u64,
}

impl Outbox {
    pub(crate) fn new(events_max: usize, bytes_max: usize) -> Outbox {
        let entries = BTreeMap::new();
        Outbox {
            entries,
            newest: BTreeMap::new(),
            replaceable: BTreeSet::new(),
            cost_bytes: 0,
            next: 1,
            held: None,
            events_max,
            bytes_max,
        }
    }

    /// Puts an event last. Returns how many were dropped to keep the bounds: those that can be replaced
    /// first, then the oldest; the event itself if it alone is beyond them.
    pub(crate) fn push(&mut self, entry: Entry) -> u64 {
        let cost = entry.event.cost_bytes();
        if cost > self.bytes_max {
            return 1;
        }
        let number = self.next;
        self.next += 1;
        if let Some(about) = topic(&entry.event) {
            self.replace(about, number);
        }
        self.cost_bytes += cost;
        self.entries.insert(number, entry);
        let dropped = self.shrink();
        self.assert_invariants();
        dropped
    }

    fn replace(&mut self, about: (String, String), number: u64) {
        if let Some(old) = self.newest.get(&about).copied().filter(|old| self.held != Some(*old)) {
            self.remove(old);
        }
        self.newest.insert(about, number);
        self.replaceable.insert(number);
    }

    fn shrink(&mut self) -> u64 {
        let mut dropped = 0;
        while self.entries.len() > self.events_max || self.cost_bytes > self.bytes_max {
            let free = |number: &&u64| self.held != Some(**number);
            let victim = self.replaceable.iter().find(free).or_else(|| self.entries.keys().find(free));
            let Some(victim) = victim.copied() else { break };
            self.remove(victim);
            dropped += 1;
        }
        dropped
    }

    /// The oldest, which then stays until [`Outbox::settle`].
    pub(crate) fn hold(&mut self) -> Option<Arc<Event>> {
        let (number, entry) = self.entries.first_key_value()?;
        self.held = Some(*number);
        Some(entry.event.clone())
    }

    /// The end of what [`Outbox::hold`] began. If it was delivered it is taken off, and its number returned.
    pub(crate) fn settle(&mut self, delivered: bool) -> Option<u64> {
        let held = self.held.take()?;
        if !delivered {
            return None;
        }
        self.remove(held);
        self.assert_invariants();
        Some(held)
    }

    /// Takes off all up to a number, as delivered by an earlier process.
    pub(crate) fn forget_to(&mut self, number: u64) {
        while let Some(first) = self.entries.keys().next().copied().filter(|first| *first <= number) {
            self.remove(first);
        }
        self.assert_invariants();
    }

    /// Drops all; returns how many.
    pub(crate) fn clear(&mut self) -> u64 {
        let dropped = self.entries.len() as u64;
        let (next, held) = (self.next, self.held);
        *self = Outbox { next, held, ..Outbox::new(self.events_max, self.bytes_max) };
        dropped
    }

    fn remove(&mut self, number: u64) {
        let Some(entry) = self.entries.remove(&number) else { return };
        self.cost_bytes -= entry.event.cost_bytes();
        self.replaceable.remove(&number);
        if let Some(about) = topic(&entry.event)
            && self.newest.get(&about) == Some(&number)
        {
            self.newest.remove(&about);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn cost_bytes(&self) -> usize {
        self.cost_bytes
    }

    /// The highest number given so far, 0 if none.
    pub(crate) fn last(&self) -> u64 {
        self.next - 1
    }

    /// The next event's number, at least: as an earlier process gave them.
    pub(crate) fn continue_from(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    /// When the oldest was sent, in ms since 1970.
    pub(crate) fn oldest_unix_ms(&self) -> Option<u64> {
        self.entries.first_key_value().map(|(_, entry)| entry.sent_unix_ms)
    }

    /// All with a higher number, in order.
    pub(crate) fn after(&self, number: u64) -> Vec<(u64, Entry)> {
        self.entries.range(number.saturating_add(1)..).map(|(number, entry)| (*number, entry.clone())).collect()
    }

    fn assert_invariants(&self) {
        debug_assert!(self.newest.len() <= self.replaceable.len());
        debug_assert!(self.replaceable.len() <= self.entries.len());
        debug_assert!(self.entries.last_key_value().is_none_or(|(last, _)| *last < self.next));
        debug_assert!(self.entries.len() <= self.events_max + 1);
    }
}

fn topic(event: &Event) -> Option<(String, String)> {
    event.replaceable.as_ref().map(|about| (event.kind.clone(), about.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: u32, about: Option<&str>) -> Entry {
        let kind = if about.is_some() { "hydrating" } else { "joined" }.to_string();
        let event = Event { id: id.to_string(), kind, body: "{}".to_string(), replaceable: about.map(str::to_string) };
        Entry { event: Arc::new(event), sent_unix_ms: 0 }
    }

    fn ids(outbox: &Outbox) -> Vec<u32> {
        outbox.after(0).iter().map(|(_, e)| e.event.id.parse().unwrap()).collect()
    }

    #[test]
    fn the_newest_of_its_kind_replaces_the_one_before() {
        let mut outbox = Outbox::new(10, 1 << 20);
        for (id, about) in [(1, Some("a")), (2, None), (3, Some("b")), (4, Some("a"))] {
            assert_eq!(outbox.push(entry(id, about)), 0);
        }
        assert_eq!(ids(&outbox), [2, 3, 4]);
    }

    #[test]
    fn what_is_being_delivered_is_not_replaced() {
        let mut outbox = Outbox::new(10, 1 << 20);
        outbox.push(entry(1, Some("a")));
        assert_eq!(outbox.hold().unwrap().id, "1");
        outbox.push(entry(2, Some("a")));
        outbox.push(entry(3, Some("a")));
        assert_eq!(ids(&outbox), [1, 3]);
        assert_eq!(outbox.settle(true), Some(1));
        outbox.push(entry(4, Some("a")));
        assert_eq!(ids(&outbox), [4]);
    }

    #[test]
    fn the_replaceable_go_first_then_the_oldest() {
        let mut outbox = Outbox::new(3, 1 << 20);
        for (id, about) in [(1, None), (2, None), (3, Some("a"))] {
            outbox.push(entry(id, about));
        }
        assert_eq!(outbox.push(entry(4, None)), 1);
        assert_eq!(ids(&outbox), [1, 2, 4]);
        assert_eq!(outbox.hold().unwrap().id, "1");
        assert_eq!(outbox.push(entry(5, None)), 1);
        assert_eq!(ids(&outbox), [1, 4, 5]);
        assert_eq!(outbox.settle(false), None);
        assert_eq!(outbox.push(entry(6, None)), 1);
        assert_eq!(ids(&outbox), [4, 5, 6]);
    }

    #[test]
    fn bytes_are_bounded_too() {
        let one = entry(1, None).event.cost_bytes();
        let mut outbox = Outbox::new(100, 3 * one);
        let dropped: u64 = (1..=5).map(|id| outbox.push(entry(id, None))).sum();
        assert_eq!((dropped, ids(&outbox)), (2, vec![3, 4, 5]));
        let mut long = entry(6, None);
        Arc::make_mut(&mut long.event).body = "x".repeat(3 * one);
        assert_eq!(outbox.push(long), 1);
        assert_eq!(ids(&outbox), [3, 4, 5]);
        assert_eq!(outbox.clear(), 3);
        assert_eq!(outbox.cost_bytes(), 0);
    }
}
