//! The holder's half: whose ask to answer next, and with which chunks.
//!
//! The hungriest asker is served first, among equals the one that misses most, with the chunk of
//! which the fewest copies are known; a chunk of which none is known goes before everything else,
//! whoever wants it. So a lone seed sends every chunk once before it sends any twice, and nothing
//! waits for the slowest.

mod drain;

use super::asker::Asker;
use super::budget::Budget;
use super::given::Given;
use super::rarity::Rarity;
use super::{Stock, bits::Bits};
use crate::limits::{
    ASKERS_MAX, DECLINE_HOLD, FAR_SERVE_UNITS, FIRST_AT_ONCE, GRANT_BYTES_MIN, GRANT_CHUNKS_MAX, LEASE_TTL,
};
use crate::node::audit::ensure;
use aquifer_core::message::{Outcome, Refusal, Returned, Terms};
use aquifer_core::{ChunkSet, NodeId, Time};
use drain::Drain;
use rand::Rng;
use rand::rngs::SmallRng;
use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug)]
pub(crate) struct Serving {
    askers: BTreeMap<NodeId, Asker>,
    leases: BTreeMap<u64, Lease>,
    rarity: Rarity,
    given: Given,
    /// Some asker may have deferred chunks: where none has, which is nearly always, nobody looks.
    has_deferred: bool,
    /// Costly chunks are given at times.
    pub(crate) gives_costly: bool,
    /// This node is about to leave.
    drain: Option<Drain>,
}

#[derive(Debug)]
struct Lease {
    reader: NodeId,
    chunks: Vec<u32>,
    /// Those that were costly when they were granted.
    costly: BTreeSet<u32>,
    expires: Time,
}

/// Whose turn it is first. Who asks from afar fetches what its own rack has none of, but a rack's
/// own nodes are not kept waiting for all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    First,
    Far,
    Near,
    FarLater,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) to: NodeId,
    pub(crate) lease: u64,
    pub(crate) chunks: Vec<u32>,
}

impl Serving {
    pub(crate) fn new(len: u32) -> Self {
        Serving {
            askers: BTreeMap::new(),
            leases: BTreeMap::new(),
            rarity: Rarity::new(len),
            given: Given::new(len),
            has_deferred: false,
            gives_costly: true,
            drain: None,
        }
    }

    /// Takes, replaces or ends a standing ask. Sets over another number of chunks are a peer's
    /// mistake and are ignored.
    pub(crate) fn on_ask(
        &mut self,
        stock: &Stock,
        from: NodeId,
        wanted: ChunkSet,
        have: ChunkSet,
        (terms, is_far): (Terms, bool),
    ) -> Option<Refusal> {
        if wanted.len() != stock.len() || have.len() != stock.len() {
            return None;
        }
        if wanted.is_empty() {
            self.forget(&from);
            return None;
        }
        let is_given = |chunk| self.gives_costly || !stock.costly.contains(chunk);
        let useful = wanted.intersection(&stock.have).any(is_given) || wanted.intersection(&stock.wanted).any(is_given);
        let full = !self.askers.contains_key(&from) && self.askers.len() >= ASKERS_MAX;
        if !useful || full {
            self.forget(&from);
            self.remember(from, have);
            return Some(if full { Refusal::Full } else { Refusal::Nothing });
        }
        self.recall(&from);
        let leased = self.leased_to(from);
        let asker = self.askers.entry(from).or_insert_with(|| Asker::new(stock.len()));
        asker.agree(terms);
        asker.is_far = is_far;
        asker.replace(stock, &mut self.rarity, wanted, have, &leased);
        asker.leased_bytes = leased.iter().map(|c| stock.bytes_of(*c)).sum();
        None
    }

    /// The asker takes some chunks from somebody, or has them, and wants others after all.
    pub(crate) fn on_progress(&mut self, stock: &Stock, from: NodeId, taken: &[u32], again: &[u32], terms: Terms) {
        let leased = match again {
            [] => BTreeSet::new(),
            _ => self.leased_to(from).into_iter().collect(),
        };
        let Some(asker) = self.askers.get_mut(&from) else { return self.on_late_progress(&from, taken, again) };
        asker.agree(terms);
        for &chunk in taken.iter().filter(|c| **c < stock.len()) {
            asker.takes(&mut self.rarity, chunk);
        }
        for &chunk in again.iter().filter(|c| **c < stock.len() && !leased.contains(c)) {
            asker.wants(stock, &mut self.rarity, chunk);
        }
    }

    /// The reader is done with a chunk of a lease. Returns whether it was: a second return, or
    /// one of somebody else's lease, changes nothing.
    pub(crate) fn on_return(
        &mut self,
        stock: &Stock,
        budget: &mut Budget,
        now: Time,
        from: NodeId,
        Returned { lease, chunk, outcome }: Returned,
    ) -> bool {
        if self.leases.get(&lease).is_none_or(|l| l.reader != from) || !self.close(stock, budget, lease, chunk) {
            return false;
        }
        if outcome == Outcome::Verified && self.given.insert(chunk, from) {
            self.rarity.more(chunk);
        }
        let Some(asker) = self.askers.get_mut(&from) else { return true };
        match outcome {
            Outcome::Verified | Outcome::Declined => {}
            Outcome::Postponed | Outcome::Corrupt | Outcome::Failed => {
                asker.defer(&mut self.rarity, chunk, now + DECLINE_HOLD);
                self.has_deferred = true;
            }
        }
        true
    }

    /// The asker is gone. Returns its leased chunks, now free.
    pub(crate) fn on_gone(&mut self, stock: &Stock, budget: &mut Budget, node: &NodeId) -> Vec<(u64, u32)> {
        self.forget(node);
        self.recall(node);
        let open = |(id, l): (&u64, &Lease)| l.chunks.iter().map(|c| (*id, *c)).collect::<Vec<_>>();
        let freed: Vec<_> = self.leases_of(*node).flat_map(open).collect();
        for &(lease, chunk) in &freed {
            self.close(stock, budget, lease, chunk);
        }
        freed
    }

    /// This node has the chunk now.
    pub(crate) fn on_held(&mut self, chunk: u32) {
        self.rarity.hold(chunk);
        for asker in self.askers.values_mut().filter(|a| a.wanted.contains(chunk)) {
            asker.offer.insert(chunk);
        }
    }

    /// This node has the chunk no more. Returns the leases over it, with their readers.
    pub(crate) fn on_lost(&mut self, stock: &Stock, budget: &mut Budget, chunk: u32) -> Vec<(NodeId, u64)> {
        let over = self.leases.iter().filter(|(_, l)| l.chunks.contains(&chunk));
        let over: Vec<_> = over.map(|(id, l)| (l.reader, *id)).collect();
        for &(reader, lease) in &over {
            self.close(stock, budget, lease, chunk);
            if let Some(asker) = self.askers.get_mut(&reader) {
                asker.wants(stock, &mut self.rarity, chunk);
            }
        }
        self.rarity.lose(chunk);
        for asker in self.askers.values_mut() {
            asker.offer.remove(chunk);
        }
        over
    }

    /// Closes leases that ran out, and wants again what was deferred a while ago. Returns what
    /// was closed, and for whom.
    pub(crate) fn on_timeout(&mut self, stock: &Stock, budget: &mut Budget, now: Time) -> Vec<(NodeId, u64, u32)> {
        let expired = self.leases.iter().filter(|(_, l)| l.expires <= now);
        let expired: Vec<_> =
            expired.flat_map(|(id, l)| l.chunks.iter().map(|c| (l.reader, *id, *c)).collect::<Vec<_>>()).collect();
        for &(reader, lease, chunk) in &expired {
            self.close(stock, budget, lease, chunk);
            if let Some(asker) = self.askers.get_mut(&reader) {
                asker.wants(stock, &mut self.rarity, chunk);
            }
        }
        if std::mem::take(&mut self.has_deferred) {
            self.want_deferred(stock, now);
        }
        expired
    }

    fn want_deferred(&mut self, stock: &Stock, now: Time) {
        for asker in self.askers.values_mut().filter(|a| !a.deferred.is_empty()) {
            let due: Vec<u32> = asker.deferred.iter().filter(|(_, at)| **at <= now).map(|(c, _)| *c).collect();
            for chunk in due {
                asker.wants(stock, &mut self.rarity, chunk);
            }
            self.has_deferred |= !asker.deferred.is_empty();
        }
    }

    pub(crate) fn next_timeout(&self) -> Option<Time> {
        // Leases are made in order of time and all last equally long.
        let lease = self.leases.values().next().map(|l| l.expires);
        let askers = self.has_deferred.then(|| self.askers.values()).into_iter().flatten();
        askers.flat_map(|a| a.deferred.values().copied()).chain(lease).min()
    }

    /// The next grant worth making, if the budget allows one.
    pub(crate) fn grant(
        &mut self,
        stock: &Stock,
        budget: &mut Budget,
        now: Time,
        rng: &mut SmallRng,
    ) -> Option<Granted> {
        let credit = self.typical_credit(stock);
        if self.drain.as_ref().is_some_and(|d| !d.gives()) {
            return None;
        }
        if stock.have.is_empty() || !budget.fits(now, stock.unit_bytes(), credit) {
            return None;
        }
        let is_shut = !stock.costly.is_empty() && !budget.fits_costly(now, stock.unit_bytes());
        let shut = is_shut.then_some(&stock.costly);
        if shut.is_some_and(|costly| costly.is_superset(&stock.have)) {
            return None;
        }
        let from = rng.random_range(0..stock.len());
        let far: u64 = self.askers.values().filter(|a| a.is_far).map(|a| a.leased_bytes).sum();
        let far_is_open = far < FAR_SERVE_UNITS * stock.unit_bytes();
        let served = |a: &Asker| a.offer.count() > 0 && (a.leased_bytes == 0 || a.leased_bytes < a.credit_bytes);
        let hungry = |(node, a, offer): (&NodeId, &Asker, Cow<Bits>)| {
            let class = match a.is_far {
                _ if self.rarity.has_first(&offer) => Class::First,
                true if far_is_open => Class::Far,
                true => Class::FarLater,
                false => Class::Near,
            };
            (class, a.flight_bytes, Reverse(a.wanted.count()), a.served_bytes, *node)
        };
        let waiting = self.askers.iter().filter(|(_, a)| a.credit_bytes > 0 && served(a));
        let waiting = waiting.map(|(node, a)| (node, a, a.offered(shut))).filter(|(_, _, offer)| match self.drain {
            Some(_) => self.rarity.has_first(offer),
            None => offer.count() > 0,
        });
        let (class, _, _, _, to) = waiting.map(hungry).min()?;
        if class != Class::First
            && budget.leased_bytes >= FIRST_AT_ONCE.saturating_mul(credit)
            && self.has_first_copies(shut)
        {
            return None;
        }
        let chunks = self.choose(stock, (budget, credit), now, &to, (from, shut));
        (!chunks.is_empty()).then(|| self.lease(stock, budget, now, to, chunks))
    }

    /// Whether a chunk of which no copy is known waits for an asker that has its hands full.
    fn has_first_copies(&self, shut: Option<&ChunkSet>) -> bool {
        self.askers.values().filter(|a| a.credit_bytes > 0).any(|a| self.rarity.has_first(&a.offered(shut)))
    }

    /// Of the chunk, that this node knows of.
    pub(crate) fn copies(&self, chunk: u32) -> u32 {
        self.rarity.copies(chunk).into()
    }

    pub(crate) fn is_asked_by(&self, node: &NodeId) -> bool {
        self.askers.contains_key(node)
    }

    /// What one asker takes at a time, on average, less the chunk that only bridges the gap.
    fn typical_credit(&self, stock: &Stock) -> u64 {
        let credits = self.askers.values().map(|a| a.credit_bytes).filter(|c| *c > 0);
        let (count, sum) = credits.fold((0u64, 0u64), |(n, sum), c| (n + 1, sum.saturating_add(c)));
        (sum / count.max(1)).max(stock.unit_bytes())
    }

    #[cfg(test)]
    pub(crate) fn assert_invariants(&self, stock: &Stock) {
        assert_eq!(self.audit(stock).err(), None);
    }

    pub(crate) fn asking(&self) -> impl Iterator<Item = &NodeId> {
        self.askers.keys()
    }

    /// The bytes under lease, or what is wrong with this half.
    pub(crate) fn audit(&self, stock: &Stock) -> Result<u64, String> {
        ensure(self.askers.len() <= ASKERS_MAX, || format!("{} asks are kept", self.askers.len()))?;
        let mut copies = vec![0usize; stock.len() as usize];
        let mut reads: BTreeMap<NodeId, u64> = BTreeMap::new();
        for lease in self.leases.values() {
            for &chunk in &lease.chunks {
                *reads.entry(lease.reader).or_default() += stock.bytes_of(chunk);
                let known = self.askers.get(&lease.reader).is_none_or(|a| a.have.contains(chunk));
                ensure(known, || format!("{} would be granted chunk {chunk}, which it reads", lease.reader))?;
                ensure(stock.have.contains(chunk), || format!("chunk {chunk} is read, and not here"))?;
            }
        }
        for (node, asker) in &self.askers {
            asker.have.iter().for_each(|c| copies[c as usize] += 1);
            let (bytes, counted) = (reads.get(node).copied().unwrap_or(0), asker.leased_bytes);
            ensure(bytes == counted, || format!("{node} reads {bytes} bytes, {counted} are counted"))?;
            ensure(!asker.wanted.intersects(&asker.have), || format!("{node} wants what it has"))?;
            let apart = asker.deferred.keys().all(|c| !asker.wanted.contains(*c) && !asker.have.contains(*c));
            ensure(apart, || format!("{node} would be granted what it deferred"))?;
            let offered = asker.offer.iter().eq(asker.wanted.intersection(&stock.have));
            ensure(offered, || format!("what {node} is offered is not what it wants of what is here"))?;
        }
        let away = self.drain.iter().flat_map(Drain::away);
        away.flat_map(ChunkSet::iter).for_each(|c| copies[c as usize] += 1);
        for chunk in 0..stock.len() {
            let has = copies[chunk as usize] + usize::from(self.given.contains(chunk));
            let counted = usize::from(self.rarity.copies(chunk));
            ensure(has == counted, || format!("{has} have chunk {chunk}, {counted} are counted"))?;
        }
        let open = self.leases.values().flat_map(|l| &l.chunks);
        Ok(open.map(|c| stock.bytes_of(*c)).sum())
    }

    /// The bytes under lease that were costly when they were granted.
    pub(crate) fn costly_leased_bytes(&self, stock: &Stock) -> u64 {
        self.leases.values().flat_map(|l| &l.costly).map(|c| stock.bytes_of(*c)).sum()
    }

    /// One chunk, or as many small ones as make a grant worth its message.
    fn choose(
        &mut self,
        stock: &Stock,
        (budget, credit): (&mut Budget, u64),
        now: Time,
        to: &NodeId,
        (from, shut): (u32, Option<&ChunkSet>),
    ) -> Vec<u32> {
        let Some(asker) = self.askers.get_mut(to) else { return Vec::new() };
        let most = stock.unit_bytes().max(GRANT_BYTES_MIN);
        let mut chosen = Vec::new();
        let (mut bytes, mut costly_bytes) = (0, 0);
        let mut open = shut.map(|costly| asker.offer.without(costly));
        while let Some((chunk, copies)) = self.rarity.rarest(open.as_ref().unwrap_or(&asker.offer), from) {
            if self.drain.is_some() && copies > 0 {
                break;
            }
            let more = stock.bytes_of(chunk);
            let all = bytes + more;
            let costly = costly_bytes + if stock.costly.contains(chunk) { more } else { 0 };
            let more_fits = all <= most
                && asker.leased_bytes + all <= asker.credit_bytes
                && chosen.len() < GRANT_CHUNKS_MAX
                && budget.fits(now, all, credit)
                && (costly == costly_bytes || budget.fits_costly(now, costly));
            if !chosen.is_empty() && !more_fits {
                break;
            }
            (bytes, costly_bytes) = (all, costly);
            if let Some(open) = &mut open {
                open.remove(chunk);
            }
            asker.takes(&mut self.rarity, chunk);
            chosen.push(chunk);
        }
        chosen
    }

    fn lease(&mut self, stock: &Stock, budget: &mut Budget, now: Time, to: NodeId, chunks: Vec<u32>) -> Granted {
        let lease = budget.lease_id();
        let bytes: u64 = chunks.iter().map(|c| stock.bytes_of(*c)).sum();
        budget.take(bytes);
        let costly: BTreeSet<u32> = chunks.iter().copied().filter(|c| stock.costly.contains(*c)).collect();
        budget.take_costly(costly.iter().map(|c| stock.bytes_of(*c)).sum());
        if let Some(asker) = self.askers.get_mut(&to) {
            asker.leased_bytes += bytes;
            asker.served_bytes += bytes;
            asker.flight_bytes = asker.flight_bytes.saturating_add(bytes);
        }
        self.leases.insert(lease, Lease { reader: to, chunks: chunks.clone(), costly, expires: now + LEASE_TTL });
        Granted { to, lease, chunks }
    }

    fn close(&mut self, stock: &Stock, budget: &mut Budget, lease: u64, chunk: u32) -> bool {
        let Some(open) = self.leases.get_mut(&lease) else { return false };
        let Some(at) = open.chunks.iter().position(|c| *c == chunk) else { return false };
        open.chunks.swap_remove(at);
        if open.costly.remove(&chunk) {
            budget.put_back_costly(stock.bytes_of(chunk));
        }
        let reader = open.reader;
        if open.chunks.is_empty() {
            self.leases.remove(&lease);
        }
        let bytes = stock.bytes_of(chunk);
        budget.put_back(bytes);
        if let Some(asker) = self.askers.get_mut(&reader) {
            asker.leased_bytes = asker.leased_bytes.saturating_sub(bytes);
        }
        true
    }

    /// Drops an ask. Its leases stay open until they are returned or run out.
    fn forget(&mut self, node: &NodeId) {
        let Some(asker) = self.askers.remove(node) else { return };
        asker.discount(&mut self.rarity);
        self.remember(*node, asker.have);
    }

    fn leased_to(&self, node: NodeId) -> Vec<u32> {
        self.leases_of(node).flat_map(|(_, l)| l.chunks.iter().copied()).collect()
    }

    fn leases_of(&self, node: NodeId) -> impl Iterator<Item = (&u64, &Lease)> {
        self.leases.iter().filter(move |(_, l)| l.reader == node)
    }
}

#[cfg(test)]
mod tests;
