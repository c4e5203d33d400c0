//! Whole meshes of `Node`s in one thread: virtual time, a seeded network, real decisions.
//!
//! The network is the least that shows behaviour: every message takes a random delay, every
//! node uploads one chunk at a time. The simulations room has the model that gives figures.

#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

use aquifer_core::message::Outcome;
use aquifer_core::{
    ChunkSet, GossipMessage, ManifestHash, NodeId, NodeSecret, PeerMessage, Policy, PublisherSecret, Release,
    SignedRelease, Time,
};
use aquifer_proto::{Config, Input, LocalStatus, Node, Notice, OpId, Output, ReadOutcome, Verdict};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

const CHUNK: u32 = 4 << 20;
const READ: Duration = Duration::from_millis(3);
/// A node that has everything says so within this (`limits::STATUS_SPACING`).
const TOLD_AFTER: Duration = Duration::from_millis(250);

struct World {
    rng: SmallRng,
    now: Time,
    nodes: BTreeMap<NodeId, Peer>,
    events: BTreeMap<(Time, u64), Event>,
    next: u64,
    manifest: ManifestHash,
    chunks: u32,
    links: BTreeSet<(NodeId, NodeId)>,
    blamed: BTreeSet<(NodeId, NodeId)>,
    /// What each was told that another has.
    told: BTreeMap<(NodeId, NodeId), BTreeSet<u32>>,
    /// What nodes gave while they drained though they knew of others that have it.
    needless: Vec<(usize, u32)>,
}

struct Peer {
    node: Node,
    index: usize,
    liar: bool,
    dead: bool,
    hydrated_at: Option<Time>,
    fetched: Vec<u32>,
    uploads: usize,
    /// When its uplink is free again.
    free_at: Time,
    gossip_seen: BTreeSet<Vec<u8>>,
    /// Wants and begins with these alone.
    part: Option<ChunkSet>,
    held_at: BTreeMap<u32, Time>,
    draining: bool,
    drained: usize,
    cancelled: BTreeSet<OpId>,
}

enum Event {
    Deliver { to: NodeId, input: Input },
    Read { reader: NodeId, op: OpId, chunk: u32, holder: NodeId },
    Wake { node: NodeId },
    End { node: NodeId },
}

impl World {
    fn new(seed: u64, chunks: u32) -> Self {
        World {
            rng: SmallRng::seed_from_u64(seed),
            now: Time::ZERO,
            nodes: BTreeMap::new(),
            events: BTreeMap::new(),
            next: 0,
            manifest: ManifestHash::of(b"manifest"),
            chunks,
            links: BTreeSet::new(),
            blamed: BTreeSet::new(),
            told: BTreeMap::new(),
            needless: vec![],
        }
    }

    fn publisher() -> PublisherSecret {
        PublisherSecret::from_seed([7; 32])
    }

    /// Starts a node that knows only `bootstrap`.
    fn start(&mut self, bootstrap: Option<NodeId>) -> NodeId {
        self.start_again(self.nodes.len(), bootstrap)
    }

    /// The same for one that may have been there before.
    fn start_again(&mut self, index: usize, bootstrap: Option<NodeId>) -> NodeId {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&(index as u64 + 1).to_le_bytes());
        let config = Config {
            identity: NodeSecret::from_seed(seed),
            incarnation: 1 + self.next,
            name: format!("n{index}"),
            version: "test".into(),
            labels: vec![],
            channels: vec![("c".parse().unwrap(), vec![Self::publisher().public()])],
            accepted: vec![],
            said: Vec::new(),
            stands: Vec::new(),
            overrides: Vec::new(),
            leased_bytes_max: 64 * u64::from(CHUNK),
            upload_bytes_per_s: None,
            costly: Default::default(),
            seed: self.rng.random(),
        };
        let node = Node::new(config, self.now);
        let id = node.id();
        let peer = Peer {
            node,
            index,
            liar: false,
            dead: false,
            hydrated_at: None,
            fetched: vec![],
            uploads: 0,
            free_at: Time::ZERO,
            gossip_seen: BTreeSet::new(),
            part: None,
            held_at: BTreeMap::new(),
            draining: false,
            drained: 0,
            cancelled: BTreeSet::new(),
        };
        self.nodes.insert(id, peer);
        let local = LocalStatus { addresses: vec![format!("addr{index}")], ..LocalStatus::default() };
        self.input(id, Input::Local(local));
        if let Some(other) = bootstrap {
            self.connect(id, other);
        }
        id
    }

    fn publish(&mut self, id: NodeId) {
        let release = Release {
            channel: "c".parse().unwrap(),
            seq: 1,
            manifest: self.manifest,
            manifest_bytes: 8,
            rolls_back_to: None,
            policy: Policy::default(),
            created_unix_ms: 0,
            note: String::new(),
        };
        let signed = SignedRelease::sign(&release, &Self::publisher());
        self.input(id, Input::Publish { release: signed });
        self.begin_with(id, ChunkSet::full(self.chunks));
        self.load(id);
    }

    /// It has these chunks before it has heard of a release, and wants no others.
    fn begin_with(&mut self, id: NodeId, chunks: ChunkSet) {
        let now = self.now;
        let peer = self.nodes.get_mut(&id).unwrap();
        peer.held_at.extend(chunks.iter().map(|c| (c, now)));
        peer.part = Some(chunks);
    }

    fn load(&mut self, id: NodeId) {
        let (manifest, chunks) = (self.manifest, self.chunks);
        let chunk_bytes = vec![CHUNK; chunks as usize];
        self.input(id, Input::ManifestLoaded { manifest, chunk_bytes });
        let part = self.nodes[&id].part.clone();
        let wanted = part.clone().unwrap_or(ChunkSet::full(chunks));
        self.input(id, Input::Wanted { manifest, chunks: wanted });
        if let Some(chunks) = part {
            self.input(id, Input::Held { manifest, chunks });
        }
    }

    fn drain_node(&mut self, id: NodeId) {
        self.nodes.get_mut(&id).unwrap().draining = true;
        self.input(id, Input::Drain);
    }

    /// What `to` hears of what `from` has.
    fn listen(&mut self, to: NodeId, from: NodeId, message: &PeerMessage) {
        let told = self.told.entry((to, from)).or_default();
        if let PeerMessage::Ask { wanted, have, .. } = message {
            if !wanted.is_empty() {
                *told = have.iter().collect();
            }
        } else if let PeerMessage::Progress { returned, taken, again, .. } = message {
            told.extend(taken);
            told.retain(|c| !again.contains(c));
            let verified = returned.iter().filter(|r| r.outcome == Outcome::Verified);
            told.extend(verified.map(|r| r.chunk));
        }
    }

    /// Whoever drains gives nothing that others have who are there, as far as it was told.
    fn check_grant(&mut self, by: NodeId, chunks: &[u32]) {
        let is_told = |id: &NodeId, p: &Peer, c: &u32| {
            let whole = p.part.is_none() && p.hydrated_at.is_some_and(|at| self.now.since(at) > TOLD_AFTER);
            let told = self.told.get(&(by, *id)).is_some_and(|told| told.contains(c));
            p.held_at.contains_key(c) && (whole || told)
        };
        let others = || self.nodes.iter().filter(|(id, p)| **id != by && !p.dead && !p.draining);
        let needless = chunks.iter().filter(|c| others().any(|(id, p)| is_told(id, p, c)));
        let needless: Vec<_> = needless.map(|c| (self.nodes[&by].index, *c)).collect();
        self.needless.extend(needless);
    }

    fn connect(&mut self, a: NodeId, b: NodeId) {
        if self.links.insert((a.min(b), a.max(b))) {
            for (to, node) in [(a, b), (b, a)] {
                self.later(Duration::ZERO, Event::Deliver { to, input: Input::Connected { node } });
            }
        }
    }

    fn kill(&mut self, id: NodeId) {
        self.nodes.get_mut(&id).unwrap().dead = true;
        let links: Vec<_> = self.links.iter().filter(|(a, b)| *a == id || *b == id).copied().collect();
        for (a, b) in links {
            self.links.remove(&(a, b));
            let other = if a == id { b } else { a };
            self.later(Duration::from_millis(1), Event::Deliver { to: other, input: Input::Disconnected { node: id } });
        }
    }

    fn later(&mut self, after: Duration, event: Event) {
        self.next += 1;
        self.events.insert((self.now + after, self.next), event);
    }

    fn input(&mut self, id: NodeId, input: Input) {
        let peer = self.nodes.get_mut(&id).unwrap();
        if !peer.dead {
            peer.node.handle(self.now, input);
            self.drain(id);
        }
    }

    fn drain(&mut self, id: NodeId) {
        let mut outputs = VecDeque::new();
        let peer = self.nodes.get_mut(&id).unwrap();
        while let Some(output) = peer.node.poll_output() {
            outputs.push_back(output);
        }
        let wake = peer.node.poll_timeout().map(|(at, _)| at);
        for output in outputs {
            self.apply(id, output);
        }
        if let Some(at) = wake {
            self.later(at.since(self.now), Event::Wake { node: id });
        }
    }

    fn apply(&mut self, id: NodeId, output: Output) {
        let delay = Duration::from_micros(self.rng.random_range(200..800));
        match output {
            Output::Send { to, message } => self.send(id, to, message),
            Output::Grant { to, manifest, lease, ttl: _, chunks } => {
                if self.nodes[&id].draining {
                    self.check_grant(id, &chunks);
                }
                let access = aquifer_core::Access { ticket: 0, secret: [0; 32] };
                self.send(id, to, PeerMessage::Grant { manifest, lease, ttl_ms: 30_000, chunks, access });
            }
            Output::Gossip(message) => self.flood(id, message),
            Output::Verdict { .. }
            | Output::LeaseClosed { .. }
            | Output::StatementAccepted { .. }
            | Output::Stand { .. }
            | Output::Order { .. } => {}
            Output::Dial { node, .. } => {
                if self.nodes.get(&node).is_some_and(|p| !p.dead) {
                    self.connect(id, node);
                }
            }
            Output::Read { op, peer, chunk, .. } => {
                let holder = self.nodes.get_mut(&peer).unwrap();
                holder.uploads += 1;
                holder.free_at = holder.free_at.max(self.now) + READ;
                let after = holder.free_at.since(self.now) + delay;
                self.later(after, Event::Read { reader: id, op, chunk, holder: peer });
            }
            Output::CancelRead { op } => drop(self.nodes.get_mut(&id).unwrap().cancelled.insert(op)),
            Output::ReleaseAccepted { release, .. } => {
                let wanted = Input::ManifestWanted { manifest: release.manifest, bytes: release.manifest_bytes };
                if self.nodes[&id].node.progress(&release.manifest).is_none() && self.nodes[&id].index != 0 {
                    self.later(Duration::ZERO, Event::Deliver { to: id, input: wanted });
                }
            }
            Output::ManifestAsked { to, manifest, offset } => {
                let has = self.nodes[&id].node.progress(&manifest).is_some();
                let (total, bytes) = if has { (8, b"manifest".to_vec()) } else { (0, vec![]) };
                self.send(id, to, PeerMessage::ManifestPiece { manifest, offset, total, bytes });
            }
            Output::ManifestFetched { .. } => self.load(id),
            Output::Hydrated { .. } => {
                let now = self.now;
                self.nodes.get_mut(&id).unwrap().hydrated_at.get_or_insert(now);
            }
            Output::Recheck { .. } => {}
            Output::Drained => {
                self.nodes.get_mut(&id).unwrap().drained += 1;
                self.input(id, Input::Leave);
                self.later(Duration::from_millis(5), Event::End { node: id });
            }
            Output::Notice(Notice::PeerBlamed { node, .. }) => drop(self.blamed.insert((id, node))),
            Output::Notice(_) => {}
        }
    }

    fn send(&mut self, from: NodeId, to: NodeId, message: PeerMessage) {
        if self.links.contains(&(from.min(to), from.max(to))) {
            // Fixed delay per message keeps the order of a pair, as a connection does.
            self.later(Duration::from_micros(500), Event::Deliver { to, input: Input::Message { from, message } });
        }
    }

    fn flood(&mut self, from: NodeId, message: GossipMessage) {
        if !self.nodes.get_mut(&from).unwrap().gossip_seen.insert(message.encode()) {
            return;
        }
        let links: Vec<_> = self.links.iter().filter(|(a, b)| *a == from || *b == from).copied().collect();
        for (a, b) in links {
            let to = if a == from { b } else { a };
            let input = Input::Gossip { via: from, token: 0, message: message.clone() };
            self.later(Duration::from_millis(1), Event::Deliver { to, input });
        }
    }

    fn step(&mut self) -> bool {
        let Some(((at, _), event)) = self.events.pop_first() else { return false };
        self.now = at;
        match event {
            Event::Deliver { to, input } => {
                if self.nodes[&to].dead {
                    return true;
                }
                if let Input::Gossip { message, .. } = &input {
                    let peer = self.nodes.get_mut(&to).unwrap();
                    if peer.gossip_seen.contains(&message.encode()) {
                        return true;
                    }
                    let copy = message.clone();
                    peer.node.handle(at, input);
                    let verdict = std::iter::from_fn(|| peer.node.poll_output()).collect::<Vec<_>>();
                    let accepted =
                        verdict.iter().any(|o| matches!(o, Output::Verdict { verdict: Verdict::Accept, .. }));
                    verdict.into_iter().for_each(|o| self.apply(to, o));
                    if accepted {
                        self.flood(to, copy);
                    }
                    self.drain(to);
                } else {
                    if let Input::Message { from, message } = &input {
                        self.listen(to, *from, message);
                    }
                    self.input(to, input);
                }
            }
            Event::Read { reader, op, chunk, holder } => {
                let (liar, dead) = (self.nodes[&holder].liar, self.nodes[&holder].dead);
                let me = self.nodes.get_mut(&reader).unwrap();
                let outcome = match (me.cancelled.remove(&op), dead, liar) {
                    (true, ..) => ReadOutcome::Declined,
                    (_, true, _) => ReadOutcome::Failed,
                    (_, _, true) => ReadOutcome::Corrupt,
                    _ => ReadOutcome::Verified,
                };
                if outcome == ReadOutcome::Verified {
                    me.fetched.push(chunk);
                    me.held_at.insert(chunk, at);
                }
                self.input(reader, Input::ReadDone { op, outcome });
            }
            Event::End { node } => self.kill(node),
            Event::Wake { node } => {
                let peer = self.nodes.get_mut(&node).unwrap();
                if !peer.dead && peer.node.poll_timeout().is_some_and(|(due, _)| due <= at) {
                    peer.node.handle_timeout(at);
                    self.drain(node);
                }
            }
        }
        true
    }

    fn run_until(&mut self, what: &str, done: impl Fn(&World) -> bool) {
        let limit = self.now + Duration::from_secs(120);
        while !done(self) {
            assert!(self.step() && self.now < limit, "not within two minutes: {what}");
        }
    }

    /// For so long, whatever happens; every node's bounds hold.
    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end && self.step() {
            self.audit();
        }
    }

    fn audit(&self) {
        let sound = |p: &&Peer| p.dead || p.node.audit(self.now).is_ok();
        let unsound = self.nodes.values().find(|p| !sound(p));
        assert!(unsound.is_none(), "{:?}", unsound.map(|p| p.node.audit(self.now)));
    }

    fn all_hydrated(&self) -> bool {
        self.nodes.values().filter(|p| !p.dead).all(|p| p.hydrated_at.is_some())
    }

    fn assert_nothing_was_fetched_twice(&self) {
        for peer in self.nodes.values() {
            let distinct: BTreeSet<_> = peer.fetched.iter().collect();
            assert_eq!(distinct.len(), peer.fetched.len(), "node {}", peer.index);
        }
    }
}

#[test]
fn everybody_hydrates_and_the_seed_uploads_little() {
    for seed in 0..4 {
        let mut world = World::new(seed, 48);
        let first = world.start(None);
        for _ in 0..24 {
            world.start(Some(first));
        }
        world.publish(first);
        world.run_until("all hydrated", World::all_hydrated);
        world.assert_nothing_was_fetched_twice();
        let uploads = world.nodes[&first].uploads;
        assert!(uploads <= 48 * 3, "seed {seed}: {uploads} uploads of 48 chunks for 24 peers");
        // Lower bound: the seed uploads every chunk once, 48 reads.
        let last = world.nodes.values().filter_map(|p| p.hydrated_at).max().unwrap();
        println!(
            "seed {seed}: last at {:?}, the seed's own uploads alone take {:?}, {uploads} uploads",
            last,
            READ * 48
        );
    }
}

#[test]
fn a_late_joiner_needs_no_publisher() {
    let mut world = World::new(1, 32);
    let publisher = world.start(None);
    let others: Vec<_> = (0..4).map(|_| world.start(Some(publisher))).collect();
    world.publish(publisher);
    world.run_until("all hydrated", World::all_hydrated);
    world.kill(publisher);
    let late = world.start(Some(others[2]));
    world.run_until("the late one hydrated", |w| w.nodes[&late].hydrated_at.is_some());
    world.assert_nothing_was_fetched_twice();
}

#[test]
fn a_liar_is_blamed_alone_and_everybody_completes() {
    for seed in 0..4 {
        let mut world = World::new(seed, 32);
        let first = world.start(None);
        let others: Vec<_> = (0..8).map(|_| world.start(Some(first))).collect();
        world.nodes.get_mut(&others[3]).unwrap().liar = true;
        world.publish(first);
        world.run_until("all hydrated", World::all_hydrated);
        assert!(world.blamed.iter().all(|(_, liar)| *liar == others[3]), "{:?}", world.blamed);
    }
}

#[test]
fn nodes_that_die_midway_hold_nobody_up() {
    for seed in 0..4 {
        let mut world = World::new(seed, 64);
        let first = world.start(None);
        let others: Vec<_> = (0..12).map(|_| world.start(Some(first))).collect();
        world.publish(first);
        world.run_until("half way", |w| w.nodes[&others[0]].fetched.len() > 20);
        world.kill(others[1]);
        world.kill(others[2]);
        world.run_until("the rest hydrated", World::all_hydrated);
        world.assert_nothing_was_fetched_twice();
    }
}

#[test]
fn one_seed_replays_alike() {
    let run = || {
        let mut world = World::new(5, 32);
        let first = world.start(None);
        for _ in 0..6 {
            world.start(Some(first));
        }
        world.publish(first);
        world.run_until("all hydrated", World::all_hydrated);
        world.nodes.values().map(|p| (p.hydrated_at, p.fetched.clone())).collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
}

/// Eight pullers midway, of a publisher that has all of 64 chunks, and a node that has the first `part`.
fn midway(seed: u64, part: u32) -> (World, NodeId, NodeId) {
    let mut world = World::new(seed, 64);
    let publisher = world.start(None);
    let half = world.start(Some(publisher));
    world.begin_with(half, ChunkSet::from_indices(64, 0..part));
    for _ in 0..8 {
        world.start(Some(half));
    }
    world.publish(publisher);
    let begun = world.rng.random_range(1..24);
    world.run_until("midway", |w| w.nodes.values().map(|p| p.fetched.len()).sum::<usize>() > 8 * begun);
    (world, publisher, half)
}

fn every_node_drained_once(world: &World) -> bool {
    world.nodes.values().filter(|p| p.draining).all(|p| p.drained == 1 && p.dead)
}

#[test]
fn who_drains_hands_over_what_nobody_else_has_and_nothing_else() {
    for seed in 0..24 {
        let (mut world, publisher, _) = midway(seed, 32);
        world.drain_node(publisher);
        assert!(world.nodes[&publisher].node.drain_progress().is_some());
        world.run_until("drained", every_node_drained_once);
        world.run_until("all hydrated", World::all_hydrated);
        world.run_for(Duration::from_secs(5));
        assert!(every_node_drained_once(&world), "once");
        assert_eq!(world.needless, [], "seed {seed}");
        world.assert_nothing_was_fetched_twice();
    }
}

#[test]
fn two_who_drain_at_once_do_not_leave_it_to_each_other() {
    for seed in 0..24 {
        let (mut world, publisher, other) = midway(seed, if seed % 2 == 0 { 64 } else { 32 });
        world.drain_node(publisher);
        let apart = Duration::from_micros(world.rng.random_range(0..20_000));
        world.run_for(apart);
        world.drain_node(other);
        world.run_until("drained", every_node_drained_once);
        world.run_until("all hydrated", World::all_hydrated);
    }
}

#[test]
fn who_dies_while_another_drains_had_no_last_copy() {
    for seed in 0..24 {
        let (mut world, publisher, half) = midway(seed, 32);
        world.drain_node(publisher);
        let apart = Duration::from_micros(world.rng.random_range(0..200_000));
        world.run_for(apart);
        let pullers = world.nodes.iter().filter(|(id, p)| **id != half && !p.draining).map(|(id, _)| *id);
        let pullers: Vec<NodeId> = pullers.collect();
        // Whoever completed could have gone to sleep; of the others each may be the only reader of some chunk.
        let dies = pullers[world.rng.random_range(0..pullers.len())];
        world.kill(dies);
        world.run_until("drained", every_node_drained_once);
        world.run_until("the rest hydrated", World::all_hydrated);
    }
}

#[test]
fn killed_in_its_place_it_costs_time_until_another_holder_comes() {
    for seed in 0..12 {
        let (mut world, publisher, half) = midway(seed, 32);
        world.kill(publisher);
        world.run_for(Duration::from_secs(if seed < 6 { 4 } else { 30 }));
        let held: BTreeSet<u32> =
            world.nodes.values().filter(|p| !p.dead).flat_map(|p| p.held_at.keys().copied()).collect();
        assert!(held.len() == 64 || !world.all_hydrated());
        let back = if seed % 2 == 0 { world.start(Some(half)) } else { world.start_again(0, Some(half)) };
        world.begin_with(back, ChunkSet::full(64));
        world.load(back);
        world.run_until("all hydrated", World::all_hydrated);
    }
}
