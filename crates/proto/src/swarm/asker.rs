//! A standing ask, as its holder keeps it.

use super::Stock;
use super::bits::Bits;
use super::rarity::Rarity;
use crate::limits::FLIGHT_BYTES_MAX;
use aquifer_core::message::Terms;
use aquifer_core::{ChunkSet, Time};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Invariants: `wanted` and `have` are disjoint, a deferred chunk is in neither, and `offer` is
/// what `wanted` and the holder's stock have in common.
#[derive(Debug)]
pub(super) struct Asker {
    pub(super) wanted: ChunkSet,
    /// What it has or is getting, ours under lease included.
    pub(super) have: ChunkSet,
    pub(super) offer: Bits,
    /// It stands in another rack or zone, and wants only what it is to bring there.
    pub(super) is_far: bool,
    pub(super) credit_bytes: u64,
    /// What it has under way from everybody, by its own word and our grants since.
    pub(super) flight_bytes: u64,
    pub(super) leased_bytes: u64,
    /// Granted to it in all: the tie-breaker between askers.
    pub(super) served_bytes: u64,
    /// Failed or postponed lately; wanted again from then on.
    pub(super) deferred: BTreeMap<u32, Time>,
}

impl Asker {
    pub(super) fn new(len: u32) -> Self {
        Asker {
            wanted: ChunkSet::empty(len),
            have: ChunkSet::empty(len),
            offer: Bits::new(len),
            is_far: false,
            credit_bytes: 0,
            flight_bytes: 0,
            leased_bytes: 0,
            served_bytes: 0,
            deferred: BTreeMap::new(),
        }
    }

    pub(super) fn agree(&mut self, terms: Terms) {
        // More than a puller ever lets be under way is a mistake, or worse.
        self.credit_bytes = terms.credit_bytes.min(FLIGHT_BYTES_MAX);
        self.flight_bytes = terms.flight_bytes;
    }

    /// Replaces what it wants and has; `leased` are chunks under lease from us.
    pub(super) fn replace(
        &mut self,
        stock: &Stock,
        rarity: &mut Rarity,
        wanted: ChunkSet,
        have: ChunkSet,
        leased: &[u32],
    ) {
        let mut have = have;
        for &chunk in leased {
            have.insert(chunk);
        }
        have.difference(&self.have).for_each(|c| rarity.more(c));
        self.have.difference(&have).for_each(|c| rarity.fewer(c));
        self.deferred.retain(|c, _| wanted.contains(*c) && !have.contains(*c));
        let mut wanted = wanted;
        wanted.subtract(&have);
        for chunk in self.deferred.keys() {
            wanted.remove(*chunk);
        }
        (self.wanted, self.have) = (wanted, have);
        self.offer = Bits::new(self.wanted.len());
        for chunk in self.wanted.intersection(&stock.have) {
            self.offer.insert(chunk);
        }
    }

    /// What it may be granted now, if costly chunks may not.
    pub(super) fn offered(&self, shut: Option<&ChunkSet>) -> Cow<'_, Bits> {
        shut.map_or(Cow::Borrowed(&self.offer), |costly| Cow::Owned(self.offer.without(costly)))
    }

    /// It has the chunk, or is getting it.
    pub(super) fn takes(&mut self, rarity: &mut Rarity, chunk: u32) {
        self.wanted.remove(chunk);
        self.offer.remove(chunk);
        self.deferred.remove(&chunk);
        if self.have.insert(chunk) {
            rarity.more(chunk);
        }
    }

    /// It does not get the chunk after all.
    pub(super) fn lacks(&mut self, rarity: &mut Rarity, chunk: u32) {
        if self.have.remove(chunk) {
            rarity.fewer(chunk);
        }
    }

    pub(super) fn wants(&mut self, stock: &Stock, rarity: &mut Rarity, chunk: u32) {
        self.lacks(rarity, chunk);
        self.deferred.remove(&chunk);
        self.wanted.insert(chunk);
        if stock.have.contains(chunk) {
            self.offer.insert(chunk);
        }
    }

    pub(super) fn defer(&mut self, rarity: &mut Rarity, chunk: u32, until: Time) {
        self.lacks(rarity, chunk);
        self.wanted.remove(chunk);
        self.offer.remove(chunk);
        self.deferred.insert(chunk, until);
    }

    /// It goes: nothing of what it has counts any longer.
    pub(super) fn discount(&self, rarity: &mut Rarity) {
        self.have.iter().for_each(|c| rarity.fewer(c));
    }
}
