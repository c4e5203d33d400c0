//! The holder's half while its node drains.
//!
//! It gives only *sole* chunks: those of which no other copy is known. Nobody who asks has it or is getting it, nobody
//! who is still there read it here, and no whole holder is near. Who wants none of them is sent away at once, and what
//! it said to have still counts: else its chunks would look like sole ones.

use super::{Asker, Serving, Stock};
use crate::limits::ASKERS_MAX;
use aquifer_core::{ChunkSet, NodeId};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Default)]
pub(super) struct Drain {
    /// Somebody else has all of the manifest.
    whole_elsewhere: bool,
    /// What those have or were getting who ask no more, without what they still read here. It is counted as copies.
    away: BTreeMap<NodeId, ChunkSet>,
}

impl Drain {
    pub(super) fn gives(&self) -> bool {
        !self.whole_elsewhere
    }

    pub(super) fn away(&self) -> impl Iterator<Item = &ChunkSet> {
        self.away.values()
    }
}

impl Serving {
    pub(crate) fn drain(&mut self) {
        self.drain.get_or_insert_default();
    }

    /// Who holds what elsewhere: whether somebody has all of it, and of whom it counts what they have. Those who
    /// drain too do not count: each would leave it to the other.
    pub(crate) fn on_holders(&mut self, whole_elsewhere: bool, stays: impl Fn(&NodeId) -> bool) {
        let Some(drain) = &mut self.drain else { return };
        drain.whole_elsewhere = whole_elsewhere;
        let left: Vec<NodeId> = drain.away.keys().filter(|n| !stays(n)).copied().collect();
        left.iter().for_each(|node| self.recall(node));
        self.given.retain(stays).into_iter().for_each(|chunk| self.rarity.fewer(chunk));
    }

    /// Drops the asks of those who want no sole chunk, and returns whose they were. Who is reading here stays: it may
    /// fail. So does who wants what another is just reading: that one may fail.
    pub(crate) fn dismiss(&mut self, stock: &Stock) -> Vec<NodeId> {
        let Some(drain) = &self.drain else { return Vec::new() };
        let reading: BTreeSet<NodeId> = self.leases.values().map(|l| l.reader).collect();
        let leased = self.leases.values().flat_map(|l| l.chunks.iter().copied());
        let first: Vec<u32> = leased.filter(|c| self.rarity.copies(*c) <= 1 && !self.given.contains(*c)).collect();
        let wants = |a: &Asker| {
            let awaits = |c: &u32| a.offer.contains(*c) || a.deferred.contains_key(c);
            self.wants_sole(stock, a) || first.iter().any(awaits)
        };
        let stays = |node: &NodeId, a: &Asker| reading.contains(node) || (drain.gives() && wants(a));
        let idle: Vec<NodeId> = self.askers.iter().filter(|(node, a)| !stays(node, a)).map(|(node, _)| *node).collect();
        idle.iter().for_each(|node| self.forget(node));
        idle
    }

    /// Nobody wants anything of what it would give, and nobody reads.
    pub(crate) fn is_quiet(&self) -> bool {
        self.askers.is_empty() && self.leases.is_empty()
    }

    /// How many sole chunks are wanted.
    pub(crate) fn sole_chunks(&self, stock: &Stock) -> u64 {
        let wanted = |c: &u32| self.askers.values().any(|a| a.offer.contains(*c) || a.deferred.contains_key(c));
        let gives = self.drain.as_ref().is_some_and(Drain::gives);
        if gives { stock.have.iter().filter(|c| self.is_sole(stock, *c)).filter(wanted).count() as u64 } else { 0 }
    }

    /// It asks no more: what it has counts while it is there.
    pub(super) fn remember(&mut self, node: NodeId, mut have: ChunkSet) {
        self.recall(&node);
        self.leased_to(node).into_iter().for_each(|c| {
            have.remove(c);
        });
        let Some(drain) = self.drain.as_mut().filter(|d| d.away.len() < ASKERS_MAX) else { return };
        have.iter().for_each(|c| self.rarity.more(c));
        drain.away.insert(node, have);
    }

    /// It is gone, or asks again: what it had counts no more, or is counted there.
    pub(super) fn recall(&mut self, node: &NodeId) {
        let have = self.drain.as_mut().and_then(|d| d.away.remove(node));
        have.iter().flat_map(ChunkSet::iter).for_each(|c| self.rarity.fewer(c));
    }

    /// News of one who does not know yet that it was sent away.
    pub(super) fn on_late_progress(&mut self, from: &NodeId, taken: &[u32], again: &[u32]) {
        let Some(have) = self.drain.as_mut().and_then(|d| d.away.get_mut(from)) else { return };
        let within = |c: &&u32| **c < have.len();
        let (taken, again): (Vec<&u32>, Vec<&u32>) =
            (taken.iter().filter(within).collect(), again.iter().filter(within).collect());
        taken.into_iter().filter(|c| have.insert(**c)).for_each(|c| self.rarity.more(*c));
        again.into_iter().filter(|c| have.remove(**c)).for_each(|c| self.rarity.fewer(*c));
    }

    fn wants_sole(&self, stock: &Stock, asker: &Asker) -> bool {
        let never = (!self.gives_costly && !stock.costly.is_empty()).then_some(&stock.costly);
        self.rarity.has_first(&asker.offered(never)) || asker.deferred.keys().any(|c| self.is_sole(stock, *c))
    }

    fn is_sole(&self, stock: &Stock, chunk: u32) -> bool {
        let is_given = self.gives_costly || !stock.costly.contains(chunk);
        stock.have.contains(chunk) && self.rarity.copies(chunk) == 0 && is_given
    }
}
