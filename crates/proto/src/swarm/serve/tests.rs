use super::*;
use crate::limits::UPLOAD_BURST;
use crate::swarm::CostlyLimit;
use proptest::prelude::*;
use rand::SeedableRng;
use std::time::Duration;

const CHUNK: u64 = 4 << 20;

/// Much credit, nothing under way.
const AMPLE: Terms = Terms { credit_bytes: 8 * CHUNK, flight_bytes: 0 };

fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

/// A holder with chunks of these lengths, and who asks it.
struct Table {
    stock: Stock,
    serving: Serving,
    budget: Budget,
    rng: SmallRng,
    now: Time,
}

impl Table {
    /// Everything of so many equal chunks is here.
    fn seed(chunks: u32) -> Self {
        Self::seed_of(u32::try_from(CHUNK).expect("it is short"), chunks)
    }

    fn seed_of(bytes: u32, chunks: u32) -> Self {
        let mut stock = Stock::new(vec![bytes; chunks as usize]);
        stock.have = ChunkSet::full(chunks);
        let (mut serving, budget) = (Serving::new(chunks), Budget::new(64 * CHUNK, None, Time::ZERO));
        (0..chunks).for_each(|c| serving.on_held(c));
        Table { stock, serving, budget, rng: SmallRng::seed_from_u64(1), now: Time::ZERO }
    }

    fn ask(&mut self, n: u8, wanted: impl IntoIterator<Item = u32>, terms: Terms) -> Option<Refusal> {
        let wanted = ChunkSet::from_indices(self.stock.len(), wanted);
        let have = ChunkSet::empty(self.stock.len());
        self.serving.on_ask(&self.stock, node(n), wanted, have, (terms, false))
    }

    /// The same of one that has some already, where the holder drains. Whether the ask stands.
    fn ask_drainer(&mut self, n: u8, wanted: &[u32], have: &[u32]) -> bool {
        let set = |of: &[u32]| ChunkSet::from_indices(self.stock.len(), of.iter().copied());
        let (wanted, have) = (set(wanted), set(have));
        let refused = self.serving.on_ask(&self.stock, node(n), wanted, have, (AMPLE, false)).is_some();
        let dismissed = self.dismissed();
        !refused && !dismissed.contains(&n)
    }

    fn dismissed(&mut self) -> Vec<u8> {
        let idle = self.serving.dismiss(&self.stock);
        self.serving.assert_invariants(&self.stock);
        idle.into_iter().map(|n| n.0[0]).collect()
    }

    fn grant(&mut self) -> Option<Granted> {
        let granted = self.serving.grant(&self.stock, &mut self.budget, self.now, &mut self.rng);
        self.serving.assert_invariants(&self.stock);
        granted
    }

    fn returned(&mut self, by: u8, lease: u64, chunk: u32, outcome: Outcome) -> bool {
        let returned = Returned { lease, chunk, outcome };
        self.serving.on_return(&self.stock, &mut self.budget, self.now, node(by), returned)
    }
}

#[test]
fn nobody_returns_the_lease_of_another() {
    let mut table = Table::seed(1);
    table.ask(1, 0..1, AMPLE);
    let lease = table.grant().unwrap().lease;
    assert!(!table.returned(2, lease, 0, Outcome::Verified));
    assert!(!table.returned(1, lease, 7, Outcome::Verified));
    assert!(table.returned(1, lease, 0, Outcome::Verified));
    assert!(!table.returned(1, lease, 0, Outcome::Verified), "once is enough");
    assert_eq!(table.budget.leased_bytes, 0);
}

#[test]
fn a_seed_gives_every_chunk_once_before_any_twice() {
    let mut table = Table::seed(40);
    for n in 0..5 {
        table.ask(n, 0..40, AMPLE);
    }
    let mut given = Vec::new();
    while given.len() < 40 {
        let granted = table.grant().expect("what was granted is returned at once");
        for chunk in granted.chunks {
            assert!(table.returned(granted.to.0[0], granted.lease, chunk, Outcome::Verified));
            given.push(chunk);
        }
    }
    given.sort_unstable();
    assert_eq!(given, (0..40).collect::<Vec<_>>());
    assert!(table.grant().is_some(), "then second copies");
}

#[test]
fn first_copies_go_out_before_second_ones_whoever_wants_them() {
    let mut table = Table::seed(10);
    // Node 1 starves and wants what node 2 has; node 3 is well fed and wants what nobody has.
    table.serving.on_ask(
        &table.stock,
        node(2),
        ChunkSet::from_indices(10, [9]),
        ChunkSet::from_indices(10, 0..9),
        (Terms { credit_bytes: 0, flight_bytes: 0 }, false),
    );
    table.ask(1, 0..9, AMPLE);
    table.ask(3, 9..10, Terms { flight_bytes: 100 * CHUNK, ..AMPLE });
    let first = table.grant().unwrap();
    assert_eq!((first.to, first.chunks), (node(3), vec![9]));
    assert_eq!(table.grant().unwrap().to, node(1));
}

#[test]
fn who_takes_nothing_keeps_no_second_copies_back() {
    let mut table = Table::seed(30);
    table.ask(1, 0..1, AMPLE);
    let first = table.grant().unwrap();
    assert!(table.returned(1, first.lease, 0, Outcome::Verified));
    table.ask(1, [], AMPLE);
    // Node 2 wants first copies and gives no credit; node 3 wants what was given once.
    table.ask(2, 10..30, Terms { credit_bytes: 0, flight_bytes: 0 });
    table.ask(3, 0..1, AMPLE);
    // Elsewhere much is under lease.
    table.budget.take(FIRST_AT_ONCE * 8 * CHUNK);
    assert_eq!(table.grant().map(|g| g.to), Some(node(3)));
}

#[test]
fn the_hungriest_is_served_first_and_no_further_than_its_credit() {
    let mut table = Table::seed(30);
    for (n, flight) in [(1, 3), (2, 0), (3, 1)] {
        table.ask(n, 0..30, Terms { credit_bytes: 2 * CHUNK, flight_bytes: flight * CHUNK });
    }
    let order: Vec<u8> = std::iter::from_fn(|| table.grant()).map(|g| g.to.0[0]).collect();
    // Grants count as being under way; among equals goes first who was given least.
    assert_eq!(order, [2, 3, 2, 3, 1, 1]);
}

#[test]
fn who_cannot_be_served_is_refused() {
    let mut table = Table::seed(10);
    table.serving.on_lost(&table.stock, &mut table.budget, 9);
    table.stock.have.remove(9);
    let most = u8::try_from(ASKERS_MAX).unwrap();
    assert_eq!(table.ask(200, 9..10, AMPLE), Some(Refusal::Nothing), "it is not here, nor to come");
    table.stock.wanted = ChunkSet::full(10);
    assert_eq!(table.ask(200, 9..10, AMPLE), None, "it is to come");
    for n in 1..most {
        assert_eq!(table.ask(n, 0..10, AMPLE), None);
    }
    assert_eq!(table.ask(201, 0..10, AMPLE), Some(Refusal::Full));
    assert_eq!(table.ask(200, 0..10, AMPLE), None, "who asks already may ask for something else");
    assert_eq!(table.ask(1, [], AMPLE), None, "a withdrawal makes room");
    assert_eq!(table.ask(201, 0..10, AMPLE), None);
}

#[test]
fn what_an_asker_takes_elsewhere_is_not_offered_until_it_wants_it_again() {
    let mut table = Table::seed(2);
    table.ask(1, 0..2, AMPLE);
    table.serving.on_progress(&table.stock, node(1), &[0], &[], AMPLE);
    assert_eq!(table.grant().map(|g| g.chunks), Some(vec![1]));
    assert_eq!(table.grant(), None);
    table.serving.on_progress(&table.stock, node(1), &[], &[0, 1], AMPLE);
    assert_eq!(table.grant().map(|g| g.chunks), Some(vec![0]), "the other is under lease");
    assert_eq!(table.grant(), None);
    table.serving.on_progress(&table.stock, node(1), &[7], &[7], AMPLE);
    table.serving.on_progress(&table.stock, node(2), &[0], &[1], AMPLE);
    assert_eq!(table.grant(), None, "there is no chunk 7, and no ask of the other");
}

#[test]
fn what_failed_is_not_offered_again_at_once() {
    let mut table = Table::seed(1);
    for outcome in [Outcome::Postponed, Outcome::Corrupt, Outcome::Failed] {
        table.ask(1, 0..1, AMPLE);
        let lease = table.grant().unwrap().lease;
        assert!(table.returned(1, lease, 0, outcome));
        assert_eq!(table.grant(), None);
        table.now = table.serving.next_timeout().expect("it is wanted again then");
        assert_eq!(table.serving.on_timeout(&table.stock, &mut table.budget, table.now), []);
        let lease = table.grant().unwrap().lease;
        assert!(table.returned(1, lease, 0, Outcome::Verified));
    }
}

#[test]
fn a_lease_runs_out_and_its_chunk_is_granted_again() {
    let mut table = Table::seed(1);
    table.ask(1, 0..1, AMPLE);
    let first = table.grant().unwrap();
    assert_eq!(table.serving.next_timeout(), Some(Time::ZERO + LEASE_TTL));
    table.now = Time::ZERO + LEASE_TTL;
    let closed = table.serving.on_timeout(&table.stock, &mut table.budget, table.now);
    assert_eq!(closed, [(node(1), first.lease, 0)]);
    assert!(!table.returned(1, first.lease, 0, Outcome::Verified));
    assert_eq!(table.budget.leased_bytes, 0);
    assert!(table.grant().is_some());
}

#[test]
fn those_from_afar_go_first_up_to_their_share() {
    let mut table = Table::seed(30);
    // Everything has been given once: no chunk is a first copy.
    table.ask(9, 0..30, AMPLE);
    for _ in 0..30 {
        let granted = table.grant().unwrap();
        assert!(granted.chunks.into_iter().all(|c| table.returned(9, granted.lease, c, Outcome::Verified)));
    }
    table.serving.on_gone(&table.stock, &mut table.budget, &node(9));
    let (all, none) = (ChunkSet::full(30), ChunkSet::empty(30));
    table.serving.on_ask(&table.stock, node(1), all, none, (Terms { flight_bytes: 50 * CHUNK, ..AMPLE }, true));
    table.ask(2, 0..30, AMPLE);
    let order: Vec<u8> = (0..5).map(|_| table.grant().unwrap().to.0[0]).collect();
    let share = usize::try_from(FAR_SERVE_UNITS).unwrap();
    assert!(order[..share].iter().all(|n| *n == 1) && order[share..].iter().all(|n| *n == 2), "{order:?}");
}

#[derive(Clone, Debug)]
enum Step {
    Ask(u8, Vec<u32>, Vec<u32>, Terms, bool),
    Progress(u8, Vec<u32>, Vec<u32>, Terms),
    Return(u8, prop::sample::Index, Outcome),
    Gone(u8),
    Held(u32),
    Lost(u32),
    Costly(Vec<u32>),
    Later(u64),
    Grant,
}

const COSTLY: CostlyLimit = CostlyLimit { bytes_per_s: 64 << 20, leased_bytes_max: 3 * CHUNK };
const CHUNKS: u32 = 20;
const PEERS: u8 = 5;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let chunks = || prop::collection::vec(0..CHUNKS + 2, 0..20);
    let terms = || {
        let bytes = || prop_oneof![Just(0), 0..4 * CHUNK, Just(u64::MAX)];
        (bytes(), bytes()).prop_map(|(credit_bytes, flight_bytes)| Terms { credit_bytes, flight_bytes })
    };
    let outcome = prop_oneof![
        Just(Outcome::Verified),
        Just(Outcome::Declined),
        Just(Outcome::Postponed),
        Just(Outcome::Corrupt),
        Just(Outcome::Failed)
    ];
    let step = prop_oneof![
        3 => (0..PEERS, chunks(), chunks(), terms(), any::<bool>()).prop_map(|(n, w, h, t, f)| Step::Ask(n, w, h, t, f)),
        2 => (0..PEERS, chunks(), chunks(), terms()).prop_map(|(n, t, a, terms)| Step::Progress(n, t, a, terms)),
        4 => (0..PEERS, any::<prop::sample::Index>(), outcome).prop_map(|(n, l, o)| Step::Return(n, l, o)),
        1 => (0..PEERS).prop_map(Step::Gone),
        1 => (0..CHUNKS).prop_map(Step::Held),
        1 => (0..CHUNKS).prop_map(Step::Lost),
        1 => prop::collection::vec(0..CHUNKS, 0..20).prop_map(Step::Costly),
        1 => (0u64..40_000).prop_map(Step::Later),
        8 => Just(Step::Grant),
    ];
    prop::collection::vec(step, 0..120)
}

/// What an asker may be granted, by its own words.
type Wants = BTreeMap<NodeId, BTreeSet<u32>>;

/// The table, a model of what each asker wants, and every lease that was ever made.
struct Books {
    table: Table,
    wants: Wants,
    open: Vec<(NodeId, u64, u32)>,
}

impl Books {
    fn step(&mut self, step: Step) {
        let Table { stock, serving, budget, now, .. } = &mut self.table;
        match step {
            Step::Ask(n, wanted, have, terms, is_far) => {
                let have = ChunkSet::from_indices(CHUNKS, have.into_iter().filter(|c| *c < CHUNKS));
                let mut wanted = ChunkSet::from_indices(CHUNKS, wanted.into_iter().filter(|c| *c < CHUNKS));
                wanted.subtract(&have);
                let stands = !wanted.is_empty();
                let asked = wanted.iter().collect();
                let refusal = serving.on_ask(stock, node(n), wanted, have, (terms, is_far));
                match stands && refusal.is_none() {
                    true => drop(self.wants.insert(node(n), asked)),
                    false => drop(self.wants.remove(&node(n))),
                }
            }
            Step::Progress(n, taken, again, terms) => {
                serving.on_progress(stock, node(n), &taken, &again, terms);
                if let Some(wants) = self.wants.get_mut(&node(n)) {
                    wants.retain(|c| !taken.contains(c));
                    wants.extend(again);
                }
            }
            Step::Return(n, at, outcome) if !self.open.is_empty() => {
                let (reader, lease, chunk) = self.open[at.index(self.open.len())];
                let returned = Returned { lease, chunk, outcome };
                let closed = serving.on_return(stock, budget, *now, node(n), returned);
                assert!(!closed || reader == node(n));
                let failed = !matches!(outcome, Outcome::Verified | Outcome::Declined);
                if let Some(wants) = self.wants.get_mut(&reader).filter(|_| closed && failed) {
                    wants.insert(chunk);
                }
            }
            Step::Return(..) => {}
            Step::Gone(n) => {
                serving.on_gone(stock, budget, &node(n));
                self.wants.remove(&node(n));
            }
            Step::Held(c) => {
                stock.have.insert(c);
                serving.on_held(c);
            }
            Step::Lost(c) => {
                stock.have.remove(c);
                for (reader, _) in serving.on_lost(stock, budget, c) {
                    self.wants.entry(reader).and_modify(|w| w.extend([c]));
                }
            }
            Step::Costly(chunks) => stock.costly = ChunkSet::from_indices(CHUNKS, chunks),
            Step::Later(ms) => {
                *now = *now + Duration::from_millis(ms);
                for (reader, _, chunk) in serving.on_timeout(stock, budget, *now) {
                    self.wants.entry(reader).and_modify(|w| w.extend([chunk]));
                }
                assert!(serving.next_timeout().is_none_or(|at| at > *now), "what was due is done");
            }
            Step::Grant => self.grant(),
        }
        self.table.serving.assert_invariants(&self.table.stock);
        let Table { stock, serving, budget, .. } = &self.table;
        assert_eq!(serving.audit(stock), Ok(budget.leased_bytes));
        assert_eq!(serving.costly_leased_bytes(stock), budget.costly_leased_bytes());
        assert!(serving.asking().eq(self.wants.keys()));
    }

    fn grant(&mut self) {
        let before = self.table.budget.costly_leased_bytes();
        let Some(Granted { to, lease, chunks }) = self.table.grant() else { return };
        let costly = self.table.budget.costly_leased_bytes() - before;
        assert!(costly == 0 || before == 0 || before + costly <= COSTLY.leased_bytes_max, "{before} and {costly}");
        let Table { stock, serving, budget, .. } = &self.table;
        let bytes: u64 = chunks.iter().map(|c| stock.bytes_of(*c)).sum();
        let asker = &serving.askers[&to];
        assert!(!chunks.is_empty() && chunks.len() <= GRANT_CHUNKS_MAX);
        assert!(chunks.len() == 1 || asker.leased_bytes <= asker.credit_bytes, "beyond its credit");
        assert!(bytes <= stock.unit_bytes().max(GRANT_BYTES_MIN));
        assert!(budget.leased_bytes <= budget.leased_bytes_max || budget.leased_bytes == bytes);
        for chunk in chunks {
            assert!(stock.have.contains(chunk), "{chunk} is not here");
            let wanted = self.wants.get_mut(&to).is_some_and(|w| w.remove(&chunk));
            assert!(wanted, "{chunk} is not wanted");
            assert!(!self.open.contains(&(to, lease, chunk)));
            self.open.push((to, lease, chunk));
        }
    }
}

/// Chunks up to `costly` are costly.
fn half_costly(costly: u32, limit: CostlyLimit) -> Table {
    let mut table = Table::seed(40);
    table.stock.costly = ChunkSet::from_indices(40, 0..costly);
    table.budget = Budget::new(64 * CHUNK, None, Time::ZERO).with_costly(limit, Time::ZERO);
    table.serving.gives_costly = table.budget.gives_costly();
    table
}

#[test]
fn what_is_costly_waits_for_its_turn_and_the_rest_does_not_wait_for_it() {
    let mut table = half_costly(20, CostlyLimit { bytes_per_s: 100 * CHUNK, leased_bytes_max: 64 * CHUNK });
    assert_eq!(table.ask(1, 0..40, Terms { credit_bytes: 64 * CHUNK, flight_bytes: 0 }), None);
    let mut given = BTreeSet::new();
    // All that is not costly at once, and one that is: that overdraws.
    while let Some(granted) = table.grant() {
        given.extend(granted.chunks);
    }
    assert_eq!(given.iter().filter(|c| **c < 20).count(), 1, "{given:?}");
    assert_eq!(given.len(), 21, "all of the others");
    table.now = table.budget.next_timeout().expect("it says when more is allowed");
    assert!(table.budget.on_timeout(table.now));
    assert!(table.budget.fits_costly(table.now, CHUNK));
}

#[test]
fn what_is_costly_takes_no_more_room_than_there_is() {
    let mut table = half_costly(40, CostlyLimit { bytes_per_s: u64::MAX, leased_bytes_max: 2 * CHUNK });
    table.ask(1, 0..40, AMPLE);
    let first = table.grant().unwrap();
    assert!(table.grant().is_some() && table.grant().is_none());
    assert_eq!(table.budget.next_timeout(), None, "that is no matter of time");
    assert!(table.returned(1, first.lease, first.chunks[0], Outcome::Verified));
    assert!(table.grant().is_some() && table.grant().is_none());
}

#[test]
fn what_costs_too_much_is_never_given() {
    let mut table = half_costly(39, CostlyLimit::default());
    table.stock.wanted = ChunkSet::full(40);
    assert_eq!(table.ask(1, 0..39, AMPLE), Some(Refusal::Nothing));
    assert_eq!(table.ask(1, 0..40, AMPLE), None);
    assert_eq!(table.grant().unwrap().chunks, [39]);
    assert!(table.grant().is_none());
}

proptest! {
    /// Whatever peers say and whatever is lost, the books balance and no bound is exceeded.
    #[test]
    fn books_balance(
        steps in steps(),
        sizes in prop::collection::vec(prop_oneof![1u32..4 << 20, 1u32..9000], CHUNKS as usize),
        cap in prop::option::of(1u64 << 10..1 << 30),
    ) {
        let stock = Stock::new(sizes);
        let budget = Budget::new(5 * CHUNK, cap, Time::ZERO).with_costly(COSTLY, Time::ZERO);
        let (serving, rng) = (Serving::new(CHUNKS), SmallRng::seed_from_u64(2));
        let table = Table { stock, serving, budget, rng, now: Time::ZERO };
        let mut books = Books { table, wants: Wants::new(), open: Vec::new() };
        (0..CHUNKS).filter(|c| c % 3 != 0).for_each(|c| books.step(Step::Held(c)));
        steps.into_iter().for_each(|step| books.step(step));
        (0..PEERS).for_each(|n| books.step(Step::Gone(n)));
        prop_assert_eq!(books.table.budget.leased_bytes, 0);
        prop_assert_eq!(books.table.budget.costly_leased_bytes(), 0);
        prop_assert_eq!(books.table.serving.leases.len(), 0);
    }

    /// The same of what is costly, and never more of it at once than there is room for.
    #[test]
    fn the_cap_on_what_is_costly_holds_within_any_window(
        rate in 1u64 << 20..1 << 32,
        room in 1u64..8,
        pauses_us in prop::collection::vec(0u64..30_000, 1..60),
    ) {
        let mut table = half_costly(40, CostlyLimit { bytes_per_s: rate, leased_bytes_max: room * CHUNK });
        for n in 1..4 {
            table.ask(n, 0..40, AMPLE);
        }
        let mut granted: Vec<(Time, u64)> = Vec::new();
        for pause in pauses_us {
            let mut open = Vec::new();
            while let Some(Granted { to, lease, chunks }) = table.grant() {
                granted.push((table.now, chunks.len() as u64 * CHUNK));
                prop_assert!(table.budget.costly_leased_bytes() <= room * CHUNK);
                open.extend(chunks.into_iter().map(|c| (to.0[0], lease, c)));
            }
            for (reader, lease, chunk) in open {
                prop_assert!(table.returned(reader, lease, chunk, Outcome::Verified));
            }
            if let Some(at) = table.budget.next_timeout() {
                prop_assert!(at > table.now);
                table.now = if pause % 2 == 0 { at } else { table.now };
                prop_assert_eq!(table.budget.on_timeout(table.now), pause % 2 == 0);
            }
            table.now = table.now + Duration::from_micros(pause);
        }
        let burst = rate as f64 * UPLOAD_BURST.as_secs_f64();
        for (i, (begin, _)) in granted.iter().enumerate() {
            let mut sum = 0;
            for (end, bytes) in &granted[i..] {
                sum += bytes;
                let most = rate as f64 * end.since(*begin).as_secs_f64() + burst + CHUNK as f64;
                prop_assert!(sum as f64 <= most * 1.000_001, "{sum} bytes, {most} at most");
            }
        }
    }

    /// Within any time no more is granted than the cap's rate, its burst and one grant.
    #[test]
    fn the_upload_cap_holds_within_any_window(
        rate in 1u64 << 20..1 << 32,
        pauses_us in prop::collection::vec(0u64..30_000, 1..60),
    ) {
        let mut table = Table::seed(200);
        table.budget = Budget::new(64 * CHUNK, Some(rate), Time::ZERO);
        for n in 1..4 {
            table.ask(n, 0..200, AMPLE);
        }
        let mut granted: Vec<(Time, u64)> = Vec::new();
        for pause in pauses_us {
            while let Some(Granted { to, lease, chunks }) = table.grant() {
                granted.push((table.now, chunks.len() as u64 * CHUNK));
                assert!(chunks.into_iter().all(|c| table.returned(to.0[0], lease, c, Outcome::Verified)));
            }
            if let Some(at) = table.budget.next_timeout() {
                prop_assert!(at > table.now);
                // Half of the time it is exactly when more is allowed.
                table.now = if pause % 2 == 0 { at } else { table.now };
                prop_assert_eq!(table.budget.on_timeout(table.now), pause % 2 == 0);
            }
            table.now = table.now + Duration::from_micros(pause);
        }
        let burst = rate as f64 * UPLOAD_BURST.as_secs_f64();
        for (i, (begin, _)) in granted.iter().enumerate() {
            let mut sum = 0;
            for (end, bytes) in &granted[i..] {
                sum += bytes;
                let most = rate as f64 * end.since(*begin).as_secs_f64() + burst + CHUNK as f64;
                prop_assert!(sum as f64 <= most * 1.000_001, "{sum} bytes, {most} at most");
            }
        }
    }
}

#[test]
fn who_drains_gives_sole_chunks_and_keeps_those_who_may_need_them() {
    let mut table = Table::seed_of(16, 4);
    table.serving.drain();
    assert!(table.ask_drainer(1, &[2, 3], &[0, 1]) && table.ask_drainer(2, &[0, 1, 2, 3], &[]));
    assert_eq!(table.serving.sole_chunks(&table.stock), 2);
    let first = table.grant().expect("there are sole chunks");
    assert_eq!(BTreeSet::from_iter(first.chunks.clone()), BTreeSet::from([2, 3]));
    assert_eq!(table.grant(), None, "others have the rest, or are getting it");
    let by = first.to.0[0];
    assert!(table.dismissed().is_empty(), "the reader may fail");
    assert!(table.returned(by, first.lease, 2, Outcome::Verified));
    assert!(table.returned(by, first.lease, 3, Outcome::Failed));
    let second = table.grant().expect("it did not come there");
    assert_eq!(second.chunks, [3]);
    assert_ne!(second.to, first.to, "who failed waits");
    assert!(!table.dismissed().contains(&by), "and may yet get it");
    assert!(table.returned(second.to.0[0], second.lease, 3, Outcome::Verified));
    assert_eq!(table.dismissed(), [1, 2]);
    assert!(table.serving.is_quiet());
}

#[test]
fn what_those_have_who_were_sent_away_counts_while_they_are_there() {
    for leaves in [false, true] {
        let mut table = Table::seed(3);
        table.serving.drain();
        // Chunk 2 is not here, and 1 is with both: the first has nothing to get.
        table.serving.on_lost(&table.stock, &mut table.budget, 2);
        table.stock.have.remove(2);
        assert!(!table.ask_drainer(1, &[2], &[0, 1]), "it is not here");
        assert!(!table.ask_drainer(2, &[0], &[1]), "the first has it");
        table.serving.on_progress(&table.stock, node(1), &[], &[1], AMPLE);
        assert!(!table.ask_drainer(3, &[1], &[]), "one has it still");
        if leaves {
            table.serving.on_holders(false, |n| *n != node(1));
        } else {
            table.serving.on_gone(&table.stock, &mut table.budget, &node(1));
        }
        assert!(table.ask_drainer(2, &[0], &[1]));
        assert_eq!(table.grant().map(|g| g.chunks), Some(vec![0]));
    }
}

#[test]
fn what_was_given_to_who_left_is_a_sole_chunk_again() {
    let mut table = Table::seed(1);
    table.ask(1, 0..1, AMPLE);
    let lease = table.grant().unwrap().lease;
    assert!(table.returned(1, lease, 0, Outcome::Verified));
    table.ask(1, [], AMPLE);
    table.serving.drain();
    table.serving.on_holders(false, |_| true);
    assert!(!table.ask_drainer(2, &[0], &[]));
    table.serving.on_holders(false, |n| *n != node(1));
    assert!(table.ask_drainer(2, &[0], &[]));
    table.serving.on_holders(true, |_| true);
    assert_eq!(table.grant(), None);
    assert_eq!(table.dismissed(), [2], "somebody has everything");
}

#[test]
fn costly_chunks_that_are_never_given_keep_nobody() {
    let mut table = Table::seed(2);
    table.serving.gives_costly = false;
    table.stock.costly = ChunkSet::from_indices(2, [0]);
    table.serving.drain();
    assert!(table.ask_drainer(1, &[0, 1], &[]));
    assert!(!table.ask_drainer(2, &[0], &[1]));
    assert!(table.serving.is_quiet(), "the other chunk is with the second now");
}
