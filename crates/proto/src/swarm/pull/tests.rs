use super::*;
use crate::io::{Input, ReadOutcome};
use crate::limits::{DIAL_PATIENCE, NEWS_MAX};
use crate::node::{Config, Node};
use crate::testing::bare_status;
use aquifer_core::message::Refusal;
use aquifer_core::{
    Access, ChannelStatus, GossipMessage, NodeSecret, Policy, PublisherSecret, Release, SignedRelease, SignedStatus,
    Status,
};
use proptest::prelude::*;
use proptest::sample::Index;
use rand::SeedableRng;

const CHUNK: u32 = 1 << 20;

fn peer(n: usize) -> NodeId {
    NodeId([u8::try_from(n).expect("tests have few peers"); 32])
}

fn manifest() -> ManifestHash {
    ManifestHash::of(b"manifest")
}

/// This half alone, of a node that misses everything.
struct Half {
    stock: Stock,
    pulling: Pulling,
    now: Time,
    rng: SmallRng,
    out: VecDeque<Output>,
    next_op: OpId,
}

impl Half {
    fn new(chunks: u32) -> Self {
        let mut stock = Stock::new(vec![CHUNK; chunks as usize]);
        stock.wanted = ChunkSet::full(chunks);
        let (pulling, rng) = (Pulling::default(), SmallRng::seed_from_u64(1));
        let mut half = Half { stock, pulling, now: Time::ZERO, rng, out: VecDeque::new(), next_op: 1 };
        // All places are open to all from then on.
        half.review(&[]);
        half.now = half.pulling.open_at().expect("it has begun to look");
        half
    }

    fn review(&mut self, candidates: &[Candidate]) -> Vec<NodeId> {
        let Half { stock, pulling, now, rng, out, .. } = self;
        pulling.review(manifest(), stock, *now, candidates.to_vec(), rng, out)
    }

    /// Chunks are granted, read and verified at once.
    fn read(&mut self, from: NodeId, chunks: impl IntoIterator<Item = u32>) {
        for chunk in chunks {
            let op = self.begin(from, chunk);
            self.verify(from, op, chunk);
        }
    }

    /// A chunk is granted. The lease is named as the operation would be.
    fn begin(&mut self, from: NodeId, chunk: u32) -> OpId {
        let op = self.next_op;
        self.next_op += 1;
        let offer = Offer { from, lease: op, chunks: vec![chunk], welcome: true };
        let Half { stock, pulling, now, out, .. } = self;
        pulling.on_grant(manifest(), stock, *now, offer, |_, _, _| op, out);
        op
    }

    fn verify(&mut self, from: NodeId, op: OpId, chunk: u32) -> Option<(NodeId, u64)> {
        let Half { stock, pulling, now, out, .. } = self;
        let landed = pulling.land(stock, *now, op, chunk).expect("it flies");
        stock.have.insert(chunk);
        let returned = Returned { lease: op, chunk, outcome: Outcome::Verified };
        pulling.give_back(manifest(), stock, *now, from, returned, out);
        landed.successor
    }

    /// Looks over the flights.
    fn watch(&mut self) {
        let Half { stock, pulling, now, out, .. } = self;
        pulling.on_timeout(manifest(), stock, *now, out);
    }

    fn flush(&mut self) {
        let Half { stock, pulling, now, out, .. } = self;
        *now = *now + PROGRESS_INTERVAL_MAX;
        pulling.flush_news(manifest(), stock, *now, out);
    }

    /// What was said since the last call.
    fn said(&mut self) -> Vec<(NodeId, PeerMessage)> {
        let said = |output| if let Output::Send { to, message } = output { Some((to, message)) } else { None };
        self.out.drain(..).filter_map(said).collect()
    }
}

fn living(n: usize) -> Candidate {
    Candidate { node: peer(n), connected: true, distance: 0, asks_us: false, drains: false }
}

#[test]
fn a_peer_that_cannot_be_reached_keeps_no_place_from_others() {
    let mut half = Half::new(4);
    let dead = Candidate { node: peer(200), connected: false, distance: 0, asks_us: false, drains: false };
    let few: Vec<Candidate> = (1..ASKS_MAX).map(living).chain([dead]).collect();
    assert_eq!((half.review(&few), half.pulling.asks.len()), (vec![peer(200)], ASKS_MAX - 1));
    half.now = half.now + Duration::from_millis(1);
    assert_eq!((half.review(&few), half.pulling.asks.len()), (vec![], ASKS_MAX - 1), "it is being dialled");
    let more: Vec<Candidate> = few.iter().copied().chain([living(100)]).collect();
    assert_eq!((half.review(&more), half.pulling.asks.len()), (vec![], ASKS_MAX));
    half.now = half.now + DIAL_PATIENCE;
    half.pulling.on_disconnected(&peer(100));
    assert_eq!((half.review(&few), half.pulling.asks.len()), (vec![peer(200)], ASKS_MAX - 1), "it is tried again");
}

#[test]
fn who_waits_for_the_last_chunk_alone_is_fed_unless_it_takes_too_long() {
    let mut half = Half::new(3);
    half.review(&[living(1), living(2)]);
    let quick = half.begin(peer(1), 0);
    half.now = half.now + Duration::from_millis(1);
    half.verify(peer(1), quick, 0);
    half.begin(peer(1), 1);
    half.now = half.now + HUNGER_PATIENCE;
    assert!(half.pulling.is_starving(half.now), "there is one more");
    let last = half.begin(peer(2), 2);
    half.verify(peer(2), last, 2);
    half.now = half.now + HUNGER_PATIENCE;
    assert!(!half.pulling.is_starving(half.now), "nothing is left to ask for");
    half.watch();
    half.now = half.now + HUNGER_PATIENCE;
    assert!(half.pulling.is_starving(half.now), "another may bring it");
}

#[test]
fn where_nobody_has_anything_others_are_asked_less_and_less_often() {
    let mut half = Half::new(4);
    let all: Vec<Candidate> = (1..100).map(living).collect();
    half.review(&all);
    let others_asked_until = |half: &mut Half, end: Time| {
        half.said();
        while let Some((at, _)) = half.pulling.next_timeout().filter(|(at, _)| *at <= end) {
            half.now = at;
            half.review(&all);
        }
        half.said().iter().filter(|(_, m)| matches!(m, PeerMessage::Ask { wanted, .. } if wanted.is_full())).count()
    };
    let end = half.now + ASK_REFRESH / 2;
    let asked = others_asked_until(&mut half, end);
    assert!((10..=20).contains(&asked), "{asked} in 5 s");
    half.read(half.pulling.asked()[0], [0]);
    half.now = half.now + HUNGER_PATIENCE;
    assert!(half.pulling.is_starving(half.now), "what comes gives hope");
}

/// Two reads from the first peer that take far longer than one before them.
fn two_slow_reads() -> (Half, [OpId; 2]) {
    let mut half = Half::new(4);
    half.review(&[living(1), living(2)]);
    let quick = half.begin(peer(1), 0);
    half.now = half.now + Duration::from_millis(1);
    half.verify(peer(1), quick, 0);
    let slow = [1, 2].map(|chunk| half.begin(peer(1), chunk));
    for _ in 0..3 {
        half.now = half.now + FLIGHT_WATCH;
        half.watch();
    }
    (half, slow)
}

#[test]
fn who_is_gone_takes_nothing_over() {
    let (mut half, slow) = two_slow_reads();
    half.begin(peer(2), 1);
    half.begin(peer(2), 2);
    half.pulling.on_disconnected(&peer(3));
    assert!(half.verify(peer(1), slow[0], 1).is_some());
    half.pulling.on_disconnected(&peer(2));
    assert_eq!(half.verify(peer(1), slow[1], 2), None);
}

#[test]
fn a_revoked_lease_is_returned_where_no_read_began() {
    let (mut half, slow) = two_slow_reads();
    let lease = 77;
    let offer = Offer { from: peer(2), lease, chunks: vec![1, 2], welcome: true };
    half.pulling.on_grant(manifest(), &half.stock, half.now, offer, |_, _, _| panic!("it waits"), &mut half.out);
    half.said();
    half.pulling.on_revoke(manifest(), &half.stock, half.now, (peer(2), lease), &mut half.out);
    let said = half.said();
    let [(to, PeerMessage::Progress { returned, .. })] = &said[..] else { panic!("{said:?}") };
    let back = |chunk| Returned { lease, chunk, outcome: Outcome::Declined };
    assert_eq!((*to, &returned[..]), (peer(2), &[back(1), back(2)][..]));
    assert_eq!(half.verify(peer(1), slow[0], 1), None);
}

#[test]
fn who_refuses_or_stays_silent_loses_its_place_to_others() {
    let mut half = Half::new(4);
    half.review(&[living(1)]);
    half.pulling.on_refused(peer(1), Refusal::Full, half.now);
    half.review(&[living(1), living(2)]);
    assert_eq!(half.pulling.asked(), [peer(2)], "who refused is passed over");
    half.now = half.now + ASK_RETRY;
    half.review(&[living(1), living(2)]);
    assert_eq!(half.pulling.asked(), [peer(1), peer(2)], "for a while");
    let all: Vec<Candidate> = (1..ASKS_MAX + 2).map(living).collect();
    half.review(&all[..ASKS_MAX]);
    half.read(peer(1), [0]);
    half.now = half.now + HUNGER_PATIENCE;
    half.read(peer(2), [1]);
    half.review(&all);
    let asked = half.pulling.asked();
    assert!(asked.contains(&peer(ASKS_MAX + 1)) && asked.contains(&peer(2)) && asked.len() == ASKS_MAX);
}

#[test]
fn a_refusal_that_crossed_another_ask_ends_only_its_own() {
    let mut half = Half::new(4);
    half.stock.wanted = ChunkSet::from_indices(4, 0..1);
    half.review(&[living(1)]);
    let want_more = |half: &mut Half| {
        half.stock.wanted.insert(half.stock.wanted.count());
        let Half { stock, pulling, now, out, .. } = half;
        pulling.on_wants_changed(manifest(), stock, *now, out);
    };
    want_more(&mut half);
    half.pulling.on_refused(peer(1), Refusal::Full, half.now);
    assert_eq!(half.pulling.asked(), [peer(1)], "that was about the one chunk");
    half.pulling.on_refused(peer(1), Refusal::Full, half.now);
    assert_eq!(half.pulling.asked(), [], "that about both");
    half.now = half.now + ASK_RETRY;
    half.review(&[living(1)]);
    half.now = half.now + ASK_RETRY;
    want_more(&mut half);
    half.pulling.on_refused(peer(1), Refusal::Full, half.now);
    assert_eq!(half.pulling.asked(), [], "no answer to an old one takes so long");
}

#[test]
fn the_news_reach_who_is_not_spoken_to_and_nobody_twice() {
    let mut half = Half::new(8);
    half.review(&[living(1), living(2)]);
    half.said();
    half.read(peer(1), [3, 4]);
    half.said();
    half.flush();
    let said = half.said();
    let [(to, PeerMessage::Progress { taken, again, .. })] = &said[..] else { panic!("{said:?}") };
    assert_eq!((*to, &taken[..], &again[..]), (peer(2), &[3, 4][..], &[][..]));
    half.flush();
    assert_eq!(half.said(), []);
}

/// Peers 1 and 2 are asked, and a read from peer 1 takes far longer than another did.
fn with_an_overdue_read() -> (Half, OpId) {
    let mut half = Half::new(8);
    half.review(&[living(1), living(2)]);
    let quick = half.begin(peer(1), 0);
    half.now = half.now + Duration::from_millis(1);
    half.verify(peer(1), quick, 0);
    let slow = half.begin(peer(1), 1);
    half.flush();
    half.said();
    half.now = half.now + FLIGHT_WATCH * 2;
    half.watch();
    half.flush();
    (half, slow)
}

#[test]
fn others_may_bring_what_takes_too_long_until_it_is_here() {
    let (mut half, slow) = with_an_overdue_read();
    let news = |half: &mut Half| {
        let told = |(to, m)| {
            let PeerMessage::Progress { taken, again, .. } = m else { return None };
            (to == peer(2)).then_some((taken, again))
        };
        half.said().into_iter().find_map(told)
    };
    assert_eq!(news(&mut half), Some((vec![], vec![1])));
    assert_eq!(half.verify(peer(1), slow, 1), None);
    half.flush();
    assert_eq!(news(&mut half), Some((vec![1], vec![])), "it is not to be granted any more");
}

#[test]
fn a_slow_read_hands_its_chunk_to_one_other_that_counts_on_it() {
    let (mut half, slow) = with_an_overdue_read();
    half.review(&[living(3)]);
    half.said();
    let next = half.begin(peer(2), 1);
    assert!(half.out.iter().any(|o| matches!(o, Output::CancelRead { op } if *op == slow)));
    half.begin(peer(3), 1);
    assert!(
        matches!(&half.said()[..], [(to, PeerMessage::Progress { returned, .. })]
        if *to == peer(3) && returned[0].outcome == Outcome::Declined),
        "one is enough"
    );
    let mut revoked = with_an_overdue_read().0;
    let also_next = revoked.begin(peer(2), 1);
    revoked.pulling.on_revoke(manifest(), &revoked.stock, revoked.now, (peer(2), also_next), &mut revoked.out);
    assert_eq!(revoked.verify(peer(1), slow, 1), None, "nothing is read under a lease that was taken back");
    assert_eq!(half.verify(peer(1), slow, 1), Some((peer(2), next)));
}

#[test]
fn news_that_are_too_old_lead_to_a_whole_ask() {
    let chunks = u32::try_from(NEWS_MAX).unwrap() + 9;
    let mut half = Half::new(chunks);
    half.review(&[living(1), living(2)]);
    half.said();
    half.read(peer(1), 0..chunks - 1);
    half.said();
    half.flush();
    let said: Vec<_> = half.said().into_iter().filter(|(to, _)| *to == peer(2)).map(|(_, m)| m).collect();
    let asks = |m: &PeerMessage| {
        if let PeerMessage::Ask { wanted, have, .. } = m { Some((wanted.clone(), have.clone())) } else { None }
    };
    let (wanted, have) = said.iter().find_map(asks).expect("it is told everything");
    assert_eq!((wanted.iter().collect::<Vec<_>>(), have.count()), (vec![chunks - 1], chunks - 1));
}

#[test]
fn from_afar_only_its_own_share_is_asked_for_and_more_in_hunger() {
    let mut half = Half::new(256);
    let beyond = |n| Candidate { node: peer(n), connected: true, distance: 2, asks_us: false, drains: false };
    // Three more stand behind the same boundary.
    let me = peer(9);
    half.pulling.on_neighbours(&me, &[(peer(1), 2), (peer(11), 0), (peer(12), 0), (peer(13), 1)]);
    half.review(&[beyond(1), living(11)]);
    let wants = |half: &mut Half, n: usize| {
        let asks =
            |(to, m)| if let PeerMessage::Ask { wanted, .. } = m { (to == peer(n)).then_some(wanted) } else { None };
        half.said().into_iter().find_map(asks)
    };
    let narrow = wants(&mut half, 1).expect("it is asked");
    assert!((20..120).contains(&narrow.count()), "{} of 64 on average", narrow.count());
    half.review(&[beyond(1), living(11)]);
    half.now = half.now + HUNGER_PATIENCE;
    half.review(&[beyond(1), living(11)]);
    let wide = wants(&mut half, 1).expect("it is asked again");
    assert!(wide.is_superset(&narrow) && wide.count() > narrow.count());
    half.now = half.now + HUNGER_PATIENCE;
    half.review(&[beyond(1), living(11)]);
    assert!(wants(&mut half, 1).is_some_and(|w| w.is_full()), "in the end all of it");
}

#[test]
fn those_far_away_are_asked_anew_for_another_share_and_not_at_all_for_none() {
    let mut half = Half::new(8);
    let beyond = |n| Candidate { node: peer(n), connected: true, distance: 2, asks_us: false, drains: false };
    let (me, far) = (peer(9), [beyond(1), living(11)]);
    let neighbours: Vec<(NodeId, u8)> = (11..15).map(|n| (peer(n), 0)).chain([(peer(1), 2)]).collect();
    half.pulling.on_neighbours(&me, &neighbours);
    half.stock.wanted = ChunkSet::from_indices(8, (0..8).filter(|c| half.pulling.reach.allows(2, *c)));
    let (mine, all) = (half.stock.wanted.clone(), ChunkSet::full(8));
    assert!(!mine.is_empty() && !mine.is_full(), "a share is some of it");
    half.review(&far);
    assert_eq!(half.pulling.asked(), [peer(1), peer(11)]);
    half.said();
    // One more stands beyond: that changes nothing.
    half.pulling.on_neighbours(&me, &[&neighbours[..], &[(peer(2), 2)]].concat());
    half.review(&far);
    assert_eq!(half.said(), []);
    half.stock.wanted = all;
    half.stock.have = mine;
    half.review(&far);
    let said = half.said();
    let [(to, PeerMessage::Ask { wanted, .. })] = &said[..] else { panic!("{said:?}") };
    assert!(*to == peer(1) && wanted.is_empty(), "others of its rack bring the rest");
    half.review(&far);
    assert_eq!((half.pulling.asked(), half.said()), (vec![peer(11)], vec![]));
    while !half.pulling.asked().contains(&peer(1)) {
        half.now = half.pulling.next_timeout().expect("it is hungry").0;
        half.review(&far);
    }
}

#[test]
fn what_nobody_asked_for_is_given_back() {
    let mut half = Half::new(4);
    half.review(&[living(1), living(2)]);
    half.pulling.withdraw(manifest(), &half.stock, peer(2), &mut half.out);
    half.said();
    for stranger in [2, 3] {
        let lease = half.begin(peer(stranger), 0);
        let returned = vec![Returned { lease, chunk: 0, outcome: Outcome::Postponed }];
        let (taken, again, terms) = (vec![], vec![], Terms::default());
        let message = PeerMessage::Progress { manifest: manifest(), returned, taken, again, terms };
        assert_eq!(half.said(), [(peer(stranger), message)], "it is still missing");
    }
    assert_eq!(half.pulling.flights().count(), 0);
    half.begin(peer(1), 0);
    assert_eq!(half.pulling.flights().count(), 1);
}

const CHUNKS: u32 = 12;
const PEERS: u8 = 6;

#[derive(Clone, Debug)]
enum Step {
    Connected(u8),
    Disconnected(u8),
    Grant(u8, Vec<u32>),
    End(Index, ReadOutcome),
    Revoke(Index),
    Refuse(u8),
    Wanted(Vec<u32>),
    Held(u32),
    Lost(u32),
    Later(u64),
    Forget,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let outcome = prop_oneof![
        6 => Just(ReadOutcome::Verified),
        1 => Just(ReadOutcome::Corrupt),
        1 => Just(ReadOutcome::Failed),
        1 => Just(ReadOutcome::Revoked),
        1 => Just(ReadOutcome::Declined)
    ];
    let step = prop_oneof![
        3 => (0..PEERS).prop_map(Step::Connected),
        1 => (0..PEERS).prop_map(Step::Disconnected),
        9 => (0..PEERS, prop::collection::btree_set(0..=CHUNKS, 1..3))
            .prop_map(|(n, c)| Step::Grant(n, c.into_iter().collect())),
        6 => (any::<Index>(), outcome).prop_map(|(at, o)| Step::End(at, o)),
        1 => any::<Index>().prop_map(Step::Revoke),
        1 => (0..PEERS).prop_map(Step::Refuse),
        1 => prop::collection::vec(0..CHUNKS, 0..12).prop_map(Step::Wanted),
        1 => (0..CHUNKS).prop_map(Step::Held),
        1 => (0..CHUNKS).prop_map(Step::Lost),
        5 => prop_oneof![0u64..100, 0u64..100, 0u64..40_000].prop_map(Step::Later),
        1 => Just(Step::Forget),
    ];
    prop::collection::vec(step, 0..120)
}

/// A node whose peers grant whatever they like, and whose reads end somehow.
struct Puller {
    node: Node,
    now: Time,
    wanted: ChunkSet,
    have: ChunkSet,
    /// Reads under way: of which lease, and whether they are to stop.
    reads: BTreeMap<OpId, (NodeId, u64, u32, bool)>,
    /// Operations up to this one are of an earlier time, before the manifest was forgotten.
    forgotten: OpId,
    ops: OpId,
    /// Chunks under lease to the node, and whether their holder still counts on them.
    leased: BTreeMap<(NodeId, u64, u32), bool>,
    leases: u64,
}

impl Puller {
    fn new() -> Self {
        let config = Config {
            identity: NodeSecret::from_seed([99; 32]),
            incarnation: 1,
            name: String::new(),
            version: String::new(),
            labels: vec![],
            channels: vec![("c".parse().unwrap(), vec![publisher().public()])],
            accepted: vec![release()],
            said: Vec::new(),
            stands: Vec::new(),
            overrides: Vec::new(),
            leased_bytes_max: 1 << 30,
            upload_bytes_per_s: None,
            costly: Default::default(),
            seed: 1,
        };
        let empty = || ChunkSet::empty(CHUNKS);
        let mut puller = Puller {
            node: Node::new(config, Time::ZERO),
            now: Time::ZERO,
            wanted: empty(),
            have: empty(),
            reads: BTreeMap::new(),
            forgotten: 0,
            ops: 0,
            leased: BTreeMap::new(),
            leases: 0,
        };
        for n in 0..PEERS {
            let message = GossipMessage::Status(status(n));
            puller.told(Input::Gossip { via: named(0).public(), token: 0, message });
        }
        puller.begin();
        puller
    }

    fn begin(&mut self) {
        let (manifest, full) = (manifest(), ChunkSet::full(CHUNKS));
        self.told(Input::ManifestLoaded { manifest, chunk_bytes: vec![CHUNK; CHUNKS as usize] });
        self.wanted = full.clone();
        self.told(Input::Wanted { manifest, chunks: full });
    }

    fn step(&mut self, step: Step) {
        let manifest = manifest();
        let message = |n: u8, message| Input::Message { from: named(n).public(), message };
        match step {
            Step::Connected(n) => self.told(Input::Connected { node: named(n).public() }),
            Step::Disconnected(n) => {
                let gone = named(n).public();
                // It closes what was open, and hears no more of it.
                self.leased.iter_mut().filter(|((node, ..), _)| *node == gone).for_each(|(_, counts)| *counts = false);
                self.told(Input::Disconnected { node: gone });
            }
            Step::Grant(n, chunks) => {
                self.leases += 1;
                let lease = self.leases;
                self.leased.extend(chunks.iter().map(|c| ((named(n).public(), lease, *c), true)));
                let access = Access { ticket: 0, secret: [0; 32] };
                self.told(message(n, PeerMessage::Grant { manifest, lease, ttl_ms: 30_000, chunks, access }));
            }
            Step::End(at, outcome) if !self.reads.is_empty() => {
                let ops: Vec<OpId> = self.reads.keys().copied().collect();
                self.end(ops[at.index(ops.len())], outcome);
            }
            Step::End(..) => {}
            Step::Revoke(at) if !self.leased.is_empty() => {
                let keys: Vec<_> = self.leased.keys().copied().collect();
                let (from, lease, chunk) = keys[at.index(keys.len())];
                // Only one of its chunks is gone, it may be.
                self.leased.insert((from, lease, chunk), false);
                self.told(Input::Message { from, message: PeerMessage::Revoke { manifest, lease } });
            }
            Step::Revoke(_) => {}
            Step::Refuse(n) => self.told(message(n, PeerMessage::Refuse { manifest, refusal: Refusal::Full })),
            Step::Wanted(chunks) => {
                self.wanted = ChunkSet::from_indices(CHUNKS, chunks);
                self.told(Input::Wanted { manifest, chunks: self.wanted.clone() });
            }
            Step::Held(c) => {
                self.have.insert(c);
                self.told(Input::Held { manifest, chunks: ChunkSet::from_indices(CHUNKS, [c]) });
            }
            Step::Lost(c) => {
                self.have.remove(c);
                self.told(Input::Lost { manifest, chunks: ChunkSet::from_indices(CHUNKS, [c]) });
            }
            Step::Later(ms) => self.later(Duration::from_millis(ms)),
            Step::Forget => {
                self.have = ChunkSet::empty(CHUNKS);
                self.wanted = ChunkSet::empty(CHUNKS);
                self.told(Input::Forget { manifest });
                self.forgotten = self.ops;
                assert!(self.reads.values().all(|r| r.3), "nothing is read for its sake");
                self.begin();
            }
        }
        self.node.audit(self.now).expect("the node agrees with itself");
    }

    fn end(&mut self, op: OpId, outcome: ReadOutcome) {
        let (.., chunk, cancelled) = self.reads.remove(&op).expect("it is one of them");
        if outcome == ReadOutcome::Verified && op > self.forgotten {
            self.have.insert(chunk);
        }
        let outcome = if cancelled && outcome != ReadOutcome::Verified { ReadOutcome::Declined } else { outcome };
        self.told(Input::ReadDone { op, outcome });
    }

    fn later(&mut self, time: Duration) {
        let then = self.now + time;
        while let Some((at, why)) = self.node.poll_timeout().filter(|(at, _)| *at <= then) {
            self.now = self.now.max(at);
            self.node.handle_timeout(self.now);
            self.drain();
            assert!(self.node.poll_timeout().is_none_or(|(at, _)| at > self.now), "{why} is still due");
        }
        self.now = then;
    }

    fn told(&mut self, input: Input) {
        self.node.handle(self.now, input);
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(output) = self.node.poll_output() {
            if let Output::Read { op, peer, lease, chunk, .. } = output {
                assert!(op > self.ops, "an operation's name is used once");
                self.ops = op;
                assert!(self.leased.contains_key(&(peer, lease, chunk)), "chunk {chunk} is not under lease");
                let now = self.reads.range(self.forgotten + 1..);
                assert!(now.clone().all(|(_, r)| r.2 != chunk), "chunk {chunk} is read twice at once");
                assert!(self.wanted.contains(chunk) && !self.have.contains(chunk), "chunk {chunk} is not missing");
                self.reads.insert(op, (peer, lease, chunk, false));
            } else if let Output::CancelRead { op } = output {
                let read = self.reads.get_mut(&op).expect("only what is read can be stopped");
                assert!(!std::mem::replace(&mut read.3, true), "once is enough");
            } else if let Output::Send { to, message: PeerMessage::Progress { returned, .. } } = output {
                for Returned { lease, chunk, .. } in returned {
                    assert!(self.leased.remove(&(to, lease, chunk)).is_some(), "returned twice: {chunk}");
                    let reads = self.reads.values().any(|r| (r.0, r.1, r.2) == (to, lease, chunk));
                    assert!(!reads, "chunk {chunk} is returned and read on");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever comes, no chunk is read twice at once, each read ends once, and each lease that its
    /// holder counts on is returned once.
    #[test]
    fn every_lease_comes_back(steps in steps()) {
        let mut puller = Puller::new();
        steps.into_iter().for_each(|step| puller.step(step));
        // Another read may begin where one ends, from a holder that waited for its turn.
        while let Some(op) = puller.reads.keys().next().copied() {
            puller.end(op, ReadOutcome::Failed);
        }
        prop_assert_eq!(puller.reads.len(), 0);
        let owed: Vec<_> = puller.leased.iter().filter(|(_, counts)| **counts).collect();
        prop_assert!(owed.is_empty(), "never returned: {:?}", owed);
    }
}

fn named(n: u8) -> NodeSecret {
    NodeSecret::from_seed([n + 1; 32])
}

fn publisher() -> PublisherSecret {
    PublisherSecret::from_seed([7; 32])
}

fn release() -> SignedRelease {
    let (channel, manifest) = ("c".parse().unwrap(), manifest());
    let (note, policy) = (String::new(), Policy::default());
    let release =
        Release { channel, seq: 1, manifest, manifest_bytes: 8, rolls_back_to: None, policy, created_unix_ms: 0, note };
    SignedRelease::sign(&release, &publisher())
}

fn status(n: u8) -> SignedStatus {
    let channel = ChannelStatus {
        channel: "c".parse().unwrap(),
        seq: 1,
        manifest: manifest(),
        chunks_wanted: CHUNKS,
        chunks_have: CHUNKS,
        also: Vec::new(),
        report: None,
    };
    let status = Status { addresses: vec!["there".into()], channels: vec![channel], ..bare_status(named(n).public()) };
    SignedStatus::sign(&status, &named(n))
}
