//! The holder's half: whose ask to answer next, and with which chunks.

use super::Stock;
use crate::limits::{ASKERS_MAX, CREDITS_MAX, DECLINE_HOLD, GRANT_CHUNKS_MAX, LEASE_TTL, SPREAD_BYTES_MAX};
use crate::node::audit::ensure;
use aquifer_core::limits::CHUNK_BYTES_TARGET;
use aquifer_core::message::Outcome;
use aquifer_core::{ChunkSet, NodeId, Time};
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeMap;

#[derive(Debug)]
pub(crate) struct Serving {
    askers: BTreeMap<NodeId, Asker>,
    leases: BTreeMap<u64, Lease>,
    /// For each chunk, how many askers have it, and how many read it under a lease of ours: what
    /// this node knows of how rare it is.
    copies: Vec<u32>,
    leased: Vec<u32>,
}

/// A standing ask. Invariant: `wanted`, the leased and the deferred chunks of one asker are
/// disjoint.
#[derive(Debug)]
struct Asker {
    wanted: ChunkSet,
    have: ChunkSet,
    credit_bytes: u64,
    leased_bytes: u64,
    /// Granted to it in all: the tie-breaker between askers.
    served_bytes: u64,
    /// Declined lately; wanted again from then on.
    deferred: BTreeMap<u32, Time>,
}

#[derive(Debug)]
struct Lease {
    reader: NodeId,
    chunks: BTreeMap<u32, Kind>,
    expires: Time,
}

/// Whether the chunk was the swarm's first copy when it was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    First,
    Spread,
}

/// What one node lets be under lease, over all its swarms.
#[derive(Debug)]
pub(crate) struct Budget {
    pub(crate) leased_bytes: u64,
    pub(crate) leased_bytes_max: u64,
    /// The part of it that goes to chunks which others have or are getting.
    spread_bytes: u64,
    next_lease: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) to: NodeId,
    pub(crate) lease: u64,
    pub(crate) chunks: Vec<u32>,
}

impl Budget {
    pub(crate) fn new(leased_bytes_max: u64) -> Self {
        Budget { leased_bytes: 0, leased_bytes_max, spread_bytes: 0, next_lease: 1 }
    }

    fn take(&mut self, bytes: u64, kind: Kind) {
        self.leased_bytes += bytes;
        if kind == Kind::Spread {
            self.spread_bytes += bytes;
        }
    }

    fn put_back(&mut self, bytes: u64, kind: Kind) {
        self.leased_bytes -= bytes;
        if kind == Kind::Spread {
            self.spread_bytes -= bytes;
        }
    }

    /// A chunk fits if there is room for it, or if nothing is out: a chunk larger than the
    /// budget must move too.
    fn fits(&self, bytes: u64, kind: Kind) -> bool {
        let within = |used: u64, most: u64| used == 0 || used + bytes <= most;
        within(self.leased_bytes, self.leased_bytes_max)
            && (kind == Kind::First || within(self.spread_bytes, SPREAD_BYTES_MAX))
    }
}

impl Serving {
    pub(crate) fn new(len: u32) -> Self {
        let zeros = vec![0; len as usize];
        Serving { askers: BTreeMap::new(), leases: BTreeMap::new(), copies: zeros.clone(), leased: zeros }
    }

    /// Takes or replaces a standing ask. Sets over another number of chunks are a peer's mistake
    /// and are ignored.
    pub(crate) fn on_ask(&mut self, stock: &Stock, from: NodeId, wanted: ChunkSet, have: ChunkSet, credits: u16) {
        if wanted.len() != stock.len() || have.len() != stock.len() {
            return;
        }
        let before = self.askers.remove(&from);
        if let Some(asker) = &before {
            self.count_copies(&asker.have, -1);
        }
        let leased: Vec<u32> = self.leases_of(from).flat_map(|(_, l)| l.chunks.keys().copied()).collect();
        if (wanted.is_empty() && leased.is_empty()) || (before.is_none() && self.askers.len() >= ASKERS_MAX) {
            return;
        }
        self.count_copies(&have, 1);
        let mut asker = before.unwrap_or_else(|| Asker::new(stock.len()));
        asker.credit_bytes = credit_bytes(credits);
        asker.have = have;
        asker.deferred.retain(|c, _| wanted.contains(*c));
        asker.wanted = wanted;
        let not_now = leased.into_iter().chain(asker.deferred.keys().copied()).collect::<Vec<_>>();
        for chunk in not_now {
            asker.wanted.remove(chunk);
        }
        self.askers.insert(from, asker);
    }

    /// The asker has these chunks now.
    pub(crate) fn on_progress(&mut self, from: NodeId, got: &[u32], credits: u16) {
        let Some(asker) = self.askers.get_mut(&from) else { return };
        asker.credit_bytes = credit_bytes(credits);
        for &chunk in got {
            if asker.note_has(chunk) {
                self.copies[chunk as usize] += 1;
            }
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
        (lease, chunk, outcome): (u64, u32, Outcome),
    ) -> bool {
        if self.leases.get(&lease).is_none_or(|l| l.reader != from) || !self.close(stock, budget, lease, chunk) {
            return false;
        }
        let Some(asker) = self.askers.get_mut(&from) else { return true };
        match outcome {
            Outcome::Verified => {
                if asker.note_has(chunk) {
                    self.copies[chunk as usize] += 1;
                }
            }
            Outcome::Declined | Outcome::Corrupt | Outcome::Failed => {
                if !asker.have.contains(chunk) {
                    asker.deferred.insert(chunk, now + DECLINE_HOLD);
                }
            }
        }
        true
    }

    /// The asker is gone. Returns its leased chunks, now free.
    pub(crate) fn on_gone(&mut self, stock: &Stock, budget: &mut Budget, node: &NodeId) -> Vec<(u64, u32)> {
        if let Some(asker) = self.askers.remove(node) {
            self.count_copies(&asker.have, -1);
        }
        let open = |(id, l): (&u64, &Lease)| l.chunks.keys().map(|c| (*id, *c)).collect::<Vec<_>>();
        let freed: Vec<_> = self.leases_of(*node).flat_map(open).collect();
        for &(lease, chunk) in &freed {
            self.close(stock, budget, lease, chunk);
        }
        freed
    }

    /// Closes leases that ran out, and wants again what was declined a while ago. Returns what
    /// was closed, and for whom.
    pub(crate) fn on_timeout(&mut self, stock: &Stock, budget: &mut Budget, now: Time) -> Vec<(NodeId, u64, u32)> {
        let expired = self.leases.iter().filter(|(_, l)| l.expires <= now);
        let expired: Vec<_> =
            expired.flat_map(|(id, l)| l.chunks.keys().map(|c| (l.reader, *id, *c)).collect::<Vec<_>>()).collect();
        for &(reader, lease, chunk) in &expired {
            self.close(stock, budget, lease, chunk);
            if let Some(asker) = self.askers.get_mut(&reader) {
                asker.want_again(chunk);
            }
        }
        for asker in self.askers.values_mut() {
            let due: Vec<u32> = asker.deferred.iter().filter(|(_, at)| **at <= now).map(|(c, _)| *c).collect();
            for chunk in due {
                asker.deferred.remove(&chunk);
                asker.want_again(chunk);
            }
        }
        self.forget_idle();
        expired
    }

    /// Drops asks that were withdrawn while a lease was open, so that they take nobody's place.
    fn forget_idle(&mut self) {
        let idle = |a: &Asker| a.credit_bytes == 0 && a.leased_bytes == 0;
        let idle: Vec<NodeId> = self.askers.iter().filter(|(_, a)| idle(a)).map(|(n, _)| *n).collect();
        for node in idle {
            if let Some(asker) = self.askers.remove(&node) {
                self.count_copies(&asker.have, -1);
            }
        }
    }

    /// Takes back every lease over `chunk`. Returns them, with their readers.
    pub(crate) fn revoke(&mut self, stock: &Stock, budget: &mut Budget, chunk: u32) -> Vec<(NodeId, u64)> {
        let over = self.leases.iter().filter(|(_, l)| l.chunks.contains_key(&chunk));
        let over: Vec<_> = over.map(|(id, l)| (l.reader, *id)).collect();
        for &(reader, lease) in &over {
            self.close(stock, budget, lease, chunk);
            if let Some(asker) = self.askers.get_mut(&reader) {
                asker.want_again(chunk);
            }
        }
        over
    }

    pub(crate) fn next_timeout(&self) -> Option<Time> {
        let leases = self.leases.values().map(|l| l.expires);
        let deferred = self.askers.values().flat_map(|a| a.deferred.values().copied());
        leases.chain(deferred).min()
    }

    /// The next grant worth making, if the budget allows one: to the asker that has been served
    /// least, the chunks the swarm has least of.
    pub(crate) fn grant(
        &mut self,
        stock: &Stock,
        budget: &mut Budget,
        now: Time,
        rng: &mut SmallRng,
    ) -> Option<Granted> {
        let mut order: Vec<_> = self.askers.iter().filter(|(_, a)| a.leased_bytes < a.credit_bytes).collect();
        order.sort_by_key(|(node, a)| (a.leased_bytes, a.served_bytes, **node));
        let order: Vec<NodeId> = order.into_iter().map(|(node, _)| *node).collect();
        order.into_iter().find_map(|to| {
            let chunks = self.choose(stock, budget, &to, rng);
            (!chunks.is_empty()).then(|| self.lease(stock, budget, now, to, chunks))
        })
    }

    #[cfg(test)]
    pub(crate) fn assert_invariants(&self, stock: &Stock) {
        assert_eq!(self.audit(stock).err(), None);
    }

    pub(crate) fn askers(&self) -> impl Iterator<Item = &NodeId> {
        self.askers.keys()
    }

    /// The bytes under lease, or what is wrong with this half.
    pub(crate) fn audit(&self, stock: &Stock) -> Result<u64, String> {
        ensure(self.askers.len() <= ASKERS_MAX, || format!("{} asks are kept", self.askers.len()))?;
        let (mut copies, mut leased) = (vec![0; self.copies.len()], vec![0; self.leased.len()]);
        let mut reads: BTreeMap<NodeId, u64> = BTreeMap::new();
        for lease in self.leases.values() {
            for &chunk in lease.chunks.keys() {
                leased[chunk as usize] += 1;
                *reads.entry(lease.reader).or_default() += stock.bytes_of(chunk);
                let wanted = self.askers.get(&lease.reader).is_some_and(|a| a.wanted.contains(chunk));
                ensure(!wanted, || format!("{} would be granted chunk {chunk}, which it reads", lease.reader))?;
                ensure(stock.have.contains(chunk), || format!("chunk {chunk} is read, and not here"))?;
            }
        }
        for (node, asker) in &self.askers {
            asker.have.iter().for_each(|c| copies[c as usize] += 1);
            let (bytes, counted) = (reads.get(node).copied().unwrap_or(0), asker.leased_bytes);
            ensure(bytes == counted, || format!("{node} reads {bytes} bytes, {counted} are counted"))?;
            let disjoint = asker.deferred.keys().all(|c| !asker.wanted.contains(*c));
            ensure(disjoint, || format!("{node} would be granted what it declined"))?;
        }
        ensure(copies == self.copies, || "copies of chunks are miscounted".to_string())?;
        ensure(leased == self.leased, || "reads of chunks are miscounted".to_string())?;
        let open = self.leases.values().flat_map(|l| l.chunks.keys());
        Ok(open.map(|c| stock.bytes_of(*c)).sum())
    }

    fn choose(&self, stock: &Stock, budget: &Budget, to: &NodeId, rng: &mut SmallRng) -> Vec<(u32, Kind)> {
        let Some(asker) = self.askers.get(to) else { return Vec::new() };
        if !budget.fits(1, Kind::First) {
            return Vec::new();
        }
        let room = asker.credit_bytes - asker.leased_bytes;
        let rarity = |c: u32| self.copies[c as usize] + self.leased[c as usize];
        let salt: u32 = rng.random();
        let mut candidates: Vec<(u32, u32, u32)> =
            asker.wanted.intersection(&stock.have).map(|c| (rarity(c), scramble(c, salt), c)).collect();
        if candidates.len() > GRANT_CHUNKS_MAX {
            candidates.select_nth_unstable(GRANT_CHUNKS_MAX);
            candidates.truncate(GRANT_CHUNKS_MAX);
        }
        candidates.sort_unstable();
        let mut trial = Budget { next_lease: 0, ..*budget };
        let mut chosen = Vec::new();
        let mut used = 0;
        for (rarity, _, chunk) in candidates {
            let kind = if rarity == 0 { Kind::First } else { Kind::Spread };
            let bytes = stock.bytes_of(chunk);
            if (used > 0 && used + bytes > room) || !trial.fits(bytes, kind) {
                break;
            }
            trial.take(bytes, kind);
            used += bytes;
            chosen.push((chunk, kind));
        }
        chosen
    }

    fn lease(
        &mut self,
        stock: &Stock,
        budget: &mut Budget,
        now: Time,
        to: NodeId,
        chunks: Vec<(u32, Kind)>,
    ) -> Granted {
        let id = budget.next_lease;
        budget.next_lease += 1;
        let asker = self.askers.get_mut(&to).expect("`grant` chose it among the askers");
        for &(chunk, kind) in &chunks {
            let bytes = stock.bytes_of(chunk);
            budget.take(bytes, kind);
            asker.wanted.remove(chunk);
            asker.leased_bytes += bytes;
            asker.served_bytes += bytes;
            self.leased[chunk as usize] += 1;
        }
        let granted = Granted { to, lease: id, chunks: chunks.iter().map(|(c, _)| *c).collect() };
        let lease = Lease { reader: to, chunks: chunks.into_iter().collect(), expires: now + LEASE_TTL };
        self.leases.insert(id, lease);
        granted
    }

    fn close(&mut self, stock: &Stock, budget: &mut Budget, lease: u64, chunk: u32) -> bool {
        let Some(open) = self.leases.get_mut(&lease) else { return false };
        let Some(kind) = open.chunks.remove(&chunk) else { return false };
        let reader = open.reader;
        if open.chunks.is_empty() {
            self.leases.remove(&lease);
        }
        let bytes = stock.bytes_of(chunk);
        budget.put_back(bytes, kind);
        self.leased[chunk as usize] -= 1;
        if let Some(asker) = self.askers.get_mut(&reader) {
            asker.leased_bytes -= bytes;
        }
        true
    }

    fn leases_of(&self, node: NodeId) -> impl Iterator<Item = (&u64, &Lease)> {
        self.leases.iter().filter(move |(_, l)| l.reader == node)
    }

    fn count_copies(&mut self, have: &ChunkSet, by: i32) {
        have.iter().for_each(|c| {
            let copies = &mut self.copies[c as usize];
            *copies = copies.saturating_add_signed(by);
        });
    }
}

impl Asker {
    fn new(len: u32) -> Self {
        Asker {
            wanted: ChunkSet::empty(len),
            have: ChunkSet::empty(len),
            credit_bytes: 0,
            leased_bytes: 0,
            served_bytes: 0,
            deferred: BTreeMap::new(),
        }
    }

    fn note_has(&mut self, chunk: u32) -> bool {
        self.wanted.remove(chunk);
        self.deferred.remove(&chunk);
        self.have.insert(chunk)
    }

    fn want_again(&mut self, chunk: u32) {
        if !self.have.contains(chunk) {
            self.wanted.insert(chunk);
        }
    }
}

fn credit_bytes(credits: u16) -> u64 {
    u64::from(credits.min(CREDITS_MAX)) * u64::from(CHUNK_BYTES_TARGET)
}

/// A different order of the chunks for every salt (a multiplicative hash).
fn scramble(chunk: u32, salt: u32) -> u32 {
    (chunk ^ salt).wrapping_mul(0x9E37_79B1).rotate_left(15).wrapping_mul(0x85EB_CA77)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;

    const CHUNK: u32 = CHUNK_BYTES_TARGET;

    fn node(n: u8) -> NodeId {
        NodeId([n; 32])
    }

    fn seed(chunks: usize) -> (Stock, Serving, Budget, SmallRng) {
        let mut stock = Stock::new(vec![CHUNK; chunks]);
        stock.have = ChunkSet::full(stock.len());
        let serving = Serving::new(stock.len());
        (stock, serving, Budget::new(64 * u64::from(CHUNK)), SmallRng::seed_from_u64(1))
    }

    #[test]
    fn a_seed_gives_each_asker_something_else() {
        let (stock, mut serving, mut budget, mut rng) = seed(8);
        for n in 0..4 {
            serving.on_ask(&stock, node(n), ChunkSet::full(8), ChunkSet::empty(8), 2);
        }
        let mut given = Vec::new();
        for _ in 0..4 {
            given.extend(serving.grant(&stock, &mut budget, Time::ZERO, &mut rng).unwrap().chunks);
        }
        given.sort_unstable();
        assert_eq!(given, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(serving.grant(&stock, &mut budget, Time::ZERO, &mut rng), None, "all credits are used");
    }

    #[test]
    fn what_others_have_goes_out_slowly() {
        let (stock, mut serving, mut budget, mut rng) = seed(16);
        serving.on_ask(&stock, node(1), ChunkSet::empty(16), ChunkSet::full(16), 8);
        serving.on_ask(&stock, node(2), ChunkSet::full(16), ChunkSet::empty(16), 8);
        // Node 1 wants nothing, so it is no asker and its copies are not known: first copies all.
        assert_eq!(serving.grant(&stock, &mut budget, Time::ZERO, &mut rng).unwrap().chunks.len(), 8);
        serving.on_ask(&stock, node(3), ChunkSet::full(16), ChunkSet::empty(16), 8);
        serving.on_ask(&stock, node(4), ChunkSet::full(16), ChunkSet::empty(16), 8);
        assert_eq!(serving.grant(&stock, &mut budget, Time::ZERO, &mut rng).unwrap().chunks.len(), 8);
        let spread = serving.grant(&stock, &mut budget, Time::ZERO, &mut rng).unwrap();
        assert_eq!(spread.chunks.len(), 4, "SPREAD_BYTES_MAX");
        serving.assert_invariants(&stock);
    }

    #[test]
    fn a_lease_runs_out_and_its_chunk_is_granted_again() {
        let (stock, mut serving, mut budget, mut rng) = seed(1);
        serving.on_ask(&stock, node(1), ChunkSet::full(1), ChunkSet::empty(1), 1);
        let first = serving.grant(&stock, &mut budget, Time::ZERO, &mut rng).unwrap();
        let later = Time::ZERO + LEASE_TTL;
        assert_eq!(serving.on_timeout(&stock, &mut budget, later), [(node(1), first.lease, 0)]);
        assert!(!serving.on_return(&stock, &mut budget, later, node(1), (first.lease, 0, Outcome::Verified)));
        assert_eq!(budget.leased_bytes, 0);
        assert!(serving.grant(&stock, &mut budget, later, &mut rng).is_some());
    }

    #[test]
    fn nobody_returns_the_lease_of_another() {
        let (stock, mut serving, mut budget, mut rng) = seed(1);
        serving.on_ask(&stock, node(1), ChunkSet::full(1), ChunkSet::empty(1), 1);
        let lease = serving.grant(&stock, &mut budget, Time::ZERO, &mut rng).unwrap().lease;
        assert!(!serving.on_return(&stock, &mut budget, Time::ZERO, node(2), (lease, 0, Outcome::Verified)));
        assert!(!serving.on_return(&stock, &mut budget, Time::ZERO, node(1), (lease, 7, Outcome::Verified)));
        assert!(serving.on_return(&stock, &mut budget, Time::ZERO, node(1), (lease, 0, Outcome::Verified)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Ask(u8, Vec<u32>, Vec<u32>, u16),
        Progress(u8, Vec<u32>),
        Return(u8, usize, u8),
        Gone(u8),
        Revoke(u32),
        Later(u64),
        Grant,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let chunks = || prop::collection::vec(0u32..22, 0..20);
        let step = prop_oneof![
            (0u8..5, chunks(), chunks(), 0u16..20).prop_map(|(n, w, h, c)| Step::Ask(n, w, h, c)),
            (0u8..5, chunks()).prop_map(|(n, g)| Step::Progress(n, g)),
            (0u8..5, 0usize..8, 0u8..4).prop_map(|(n, l, o)| Step::Return(n, l, o)),
            (0u8..5).prop_map(Step::Gone),
            (0u32..22).prop_map(Step::Revoke),
            (0u64..40_000).prop_map(Step::Later),
            Just(Step::Grant),
            Just(Step::Grant),
        ];
        prop::collection::vec(step, 0..120)
    }

    proptest! {
        /// Whatever peers say, the books balance and no budget is exceeded.
        #[test]
        fn books_balance(steps in steps(), sizes in prop::collection::vec(1u32..CHUNK, 20)) {
            let mut stock = Stock::new(sizes);
            stock.have = ChunkSet::from_indices(20, (0..20).filter(|c| c % 3 != 0));
            let (mut serving, mut budget) = (Serving::new(20), Budget::new(5 * u64::from(CHUNK)));
            let (mut rng, mut now) = (SmallRng::seed_from_u64(2), Time::ZERO);
            let mut open: Vec<(NodeId, u64, u32)> = Vec::new();
            for step in steps {
                match step {
                    Step::Ask(n, wanted, have, credits) => {
                        let have = ChunkSet::from_indices(20, have);
                        let mut wanted = ChunkSet::from_indices(20, wanted);
                        wanted.subtract(&have);
                        serving.on_ask(&stock, node(n), wanted, have, credits);
                    }
                    Step::Progress(n, got) => serving.on_progress(node(n), &got, 3),
                    Step::Return(n, i, o) => {
                        let outcome = [Outcome::Verified, Outcome::Declined, Outcome::Corrupt, Outcome::Failed][usize::from(o)];
                        if let Some(&(_, lease, chunk)) = open.get(i) {
                            serving.on_return(&stock, &mut budget, now, node(n), (lease, chunk, outcome));
                        }
                    }
                    Step::Gone(n) => drop(serving.on_gone(&stock, &mut budget, &node(n))),
                    Step::Revoke(c) => drop(serving.revoke(&stock, &mut budget, c)),
                    Step::Later(ms) => {
                        now = now + std::time::Duration::from_millis(ms);
                        serving.on_timeout(&stock, &mut budget, now);
                    }
                    Step::Grant => {
                        if let Some(granted) = serving.grant(&stock, &mut budget, now, &mut rng) {
                            prop_assert!(granted.chunks.iter().all(|c| stock.have.contains(*c)));
                            open.extend(granted.chunks.iter().map(|c| (granted.to, granted.lease, *c)));
                        }
                    }
                }
                serving.assert_invariants(&stock);
                prop_assert!(budget.leased_bytes <= budget.leased_bytes_max);
                prop_assert!(budget.spread_bytes <= budget.leased_bytes);
            }
            (0..5).for_each(|n| drop(serving.on_gone(&stock, &mut budget, &node(n))));
            prop_assert_eq!(budget.leased_bytes, 0);
        }
    }
}
