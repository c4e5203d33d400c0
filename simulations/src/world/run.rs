//! The driver: carries outputs of nodes to where they become inputs of others.

use super::events::{Event, Events};
use super::mesh;
use super::peer::{Peer, channel, publisher};
use crate::network::{Done, Network, Nic};
use crate::outcome::{Outcome, SAMPLES, Sample};
use crate::scenario::{Expanded, Role, lower_bound};
use anyhow::{Result, ensure};
use aquifer_core::{Access, ChunkSet, GossipMessage, ManifestHash, NodeId, PeerMessage, Release, SignedRelease, Time};
use aquifer_proto::limits::{CONNECTIONS_WANTED, READ_STALL};
use aquifer_proto::{Input, LocalStatus, Notice, OpId, Output, ReadOutcome};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Rates are within this fraction of max-min fair.
const TOLERANCE: f64 = 0.01;

/// A run that takes this many times its lower bound, and this much longer, is stuck.
const STUCK_FACTOR: f64 = 20.0;
const STUCK_S: f64 = 120.0;

const MANIFEST: &[u8] = b"manifest";

/// What a run may be told besides its scenario.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// Say on stderr how far a long run is.
    pub progress: bool,
}

/// Runs one node of `aquifer_proto` for each node of the scenario.
pub fn run(expanded: &Expanded, options: &RunOptions) -> Result<Outcome> {
    let modelled = expanded.partition.is_none() && expanded.churn_per_s <= 0.0;
    ensure!(modelled, "partitions and churn are not simulated yet");
    let wall = Instant::now();
    let mut world = World::new(expanded, *options);
    world.form_mesh();
    world.drive();
    let mut outcome = world.into_outcome();
    outcome.wall_s = wall.elapsed().as_secs_f64();
    Ok(outcome)
}

struct World<'a> {
    e: &'a Expanded,
    options: RunOptions,
    rng: SmallRng,
    now: Time,
    peers: Vec<Peer>,
    index: HashMap<NodeId, u32>,
    links: BTreeSet<(u32, u32)>,
    net: Network,
    reads: BTreeMap<u64, Read>,
    by_op: HashMap<(u32, OpId), u64>,
    next_tag: u64,
    events: Events,
    handled: u64,
    /// Measured nodes that have not finished.
    unfinished: usize,
    bound: f64,
    samples: Vec<Sample>,
    violations: Vec<String>,
    duplicate_bytes: u64,
    manifest: ManifestHash,
}

/// A read under way: asked for, moving or landing.
#[derive(Clone, Copy, Debug)]
struct Read {
    reader: u32,
    holder: u32,
    op: OpId,
    chunk: u32,
    moving: bool,
}

impl<'a> World<'a> {
    fn new(e: &'a Expanded, options: RunOptions) -> Self {
        let peers: Vec<Peer> = e.nodes.iter().map(|plan| Peer::new(e, plan, 0, Time::ZERO)).collect();
        World {
            e,
            options,
            rng: SmallRng::seed_from_u64(e.seed),
            now: Time::ZERO,
            index: peers.iter().map(|p| (p.node.id(), p.plan.index)).collect(),
            unfinished: peers.iter().filter(|p| p.plan.is_measured()).count(),
            peers,
            links: BTreeSet::new(),
            net: Network::new(e.nodes.iter().map(|n| Nic { upload_cap: None, ..n.nic }).collect(), e.racks.clone(), TOLERANCE),
            reads: BTreeMap::new(),
            by_op: HashMap::new(),
            next_tag: 0,
            events: Events::default(),
            handled: 0,
            bound: lower_bound(e),
            samples: Vec::new(),
            violations: Vec::new(),
            duplicate_bytes: 0,
            manifest: ManifestHash::of(MANIFEST),
        }
    }

    fn form_mesh(&mut self) {
        let there: Vec<u32> = self.e.nodes.iter().filter(|p| p.join == Time::ZERO).map(|p| p.index).collect();
        mesh::form(&mut self.peers, &there, &mut self.links, &mut self.rng);
        for plan in &self.e.nodes {
            let node = plan.index;
            let begin = if plan.join == Time::ZERO { Event::Begin { node } } else { Event::Start { node } };
            self.events.plan(plan.join, begin);
            let crash = plan.fault.crash_at.map(|at| (at, Event::Crash { node }));
            crash.into_iter().for_each(|(at, event)| self.events.plan(at, event));
        }
        self.events.plan(Time::ZERO, Event::Sample);
    }

    fn drive(&mut self) {
        let limit = Time::ZERO + Duration::from_secs_f64(self.bound * STUCK_FACTOR + STUCK_S);
        let mut said = Instant::now();
        while self.unfinished > 0 {
            let next = [self.events.next_at(), self.net.next_completion()].into_iter().flatten().min();
            let Some(at) = next.filter(|at| *at < limit) else {
                return self.violations.push(format!("{} healthy nodes never finish", self.unfinished));
            };
            self.now = at;
            self.step(at);
            if self.options.progress && said.elapsed() > Duration::from_secs(10) {
                said = Instant::now();
                let held: u64 = self.peers.iter().map(|p| u64::from(p.has.count())).sum();
                let all: u64 = self.peers.iter().map(|p| u64::from(p.plan.wants.count())).sum();
                eprintln!(
                    "{}: {at:?} of at least {:.2} s, {}% held",
                    self.e.scenario,
                    self.bound,
                    held * 100 / all.max(1)
                );
            }
        }
        self.sample();
    }

    fn step(&mut self, at: Time) {
        while let Some(done) = self.net.pop_completion(at) {
            self.on_transferred(done);
        }
        if self.events.next_at().is_some_and(|t| t <= at)
            && let Some((_, event)) = self.events.pop()
        {
            self.handled += 1;
            self.on_event(event);
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Start { node } => self.start(node),
            Event::Begin { node } => self.begin(node),
            Event::Deliver { to, life, input } => {
                if self.lives(to, life) {
                    self.input(to, *input);
                }
            }
            Event::Gossip { to, from, message } => {
                if self.peers[to as usize].alive {
                    let via = self.peers[from as usize].node.id();
                    self.input(to, Input::Gossip { via, token: 0, message: (*message).clone() });
                }
            }
            Event::Transfer { tag } => self.transfer(tag),
            Event::Stalled { tag } => {
                if self.reads.get(&tag).is_some_and(|r| r.moving) {
                    self.stop_transfer(tag);
                    self.finish_read(tag, ReadOutcome::Failed);
                }
            }
            Event::Wake { node, life } => self.wake(node, life),
            Event::Crash { node } => self.crash(node),
            Event::Sample => {
                self.sample();
                let pause = Duration::from_secs_f64(self.bound * 1.2 / f64::from(SAMPLES));
                self.events.plan(self.now + pause, Event::Sample);
            }
        }
    }

    /// A node begins: it knows all that are there, and has links to a few.
    fn start(&mut self, i: u32) {
        let now = self.now;
        let peer = &mut self.peers[i as usize];
        if peer.life > 0 || peer.plan.join > Time::ZERO {
            *peer = Peer::new(self.e, &peer.plan.clone(), peer.life, now);
        }
        peer.alive = true;
        self.input(i, Input::Local(LocalStatus { addresses: vec![format!("{i}")], ..LocalStatus::default() }));
        let others: Vec<u32> = (0..i).filter(|o| self.peers[*o as usize].alive).collect();
        for _ in 0..CONNECTIONS_WANTED.min(others.len()) {
            let other = others[self.rng.random_range(0..others.len())];
            self.connect(i, other);
        }
        self.begin(i);
    }

    fn begin(&mut self, i: u32) {
        if self.peers[i as usize].plan.fault.stall_at.is_some() {
            self.net.stall(self.now, i, true);
        }
        self.drain(i);
        match self.peers[i as usize].plan.role {
            _ if Some(i) == self.announcer() && self.peers[i as usize].life == 0 => self.publish(i),
            Role::Seed | Role::Holder => self.load(i),
            // What it has already is of the release that is to come.
            Role::Puller => {}
        }
    }

    /// Who tells the mesh of the release: the first seed, or the first node where there is none.
    fn announcer(&self) -> Option<u32> {
        let seed = self.e.nodes.iter().find(|n| n.role == Role::Seed);
        seed.or(self.e.nodes.first()).map(|n| n.index)
    }

    fn publish(&mut self, i: u32) {
        let release = Release {
            channel: channel(),
            seq: 1,
            manifest: self.manifest,
            manifest_bytes: MANIFEST.len() as u64,
            rollback: false,
            created_unix_ms: 0,
            note: String::new(),
        };
        self.input(i, Input::Publish { release: SignedRelease::sign(&release, &publisher()) });
        self.load(i);
    }

    fn load(&mut self, i: u32) {
        let (manifest, peer) = (self.manifest, &self.peers[i as usize]);
        let (wants, has) = (peer.plan.wants.clone(), peer.has.clone());
        let chunk_bytes = u32::try_from(self.e.chunk_bytes).unwrap_or(u32::MAX);
        self.input(i, Input::ManifestLoaded { manifest, chunk_bytes: vec![chunk_bytes; self.e.chunks as usize] });
        self.input(i, Input::Held { manifest, chunks: has });
        self.input(i, Input::Wanted { manifest, chunks: wants });
    }

    fn input(&mut self, i: u32, input: Input) {
        self.peers[i as usize].node.handle(self.now, input);
        self.drain(i);
    }

    fn wake(&mut self, i: u32, life: u32) {
        if self.lives(i, life) && self.peers[i as usize].wake_at.is_some_and(|at| at <= self.now) {
            self.peers[i as usize].wake_at = None;
            self.peers[i as usize].node.handle_timeout(self.now);
            self.drain(i);
        }
    }

    fn drain(&mut self, i: u32) {
        while let Some(output) = self.peers[i as usize].node.poll_output() {
            self.apply(i, output);
        }
        let peer = &mut self.peers[i as usize];
        let Some((at, _)) = peer.node.poll_timeout() else { return };
        let at = at.max(self.now);
        if peer.wake_at.is_none_or(|planned| at < planned) {
            peer.wake_at = Some(at);
            self.events.plan(at, Event::Wake { node: i, life: peer.life });
        }
    }

    fn apply(&mut self, i: u32, output: Output) {
        match output {
            Output::Send { to, message } => self.send(i, to, message),
            Output::Grant { to, manifest, lease, ttl, chunks } => {
                let ttl_ms = u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX);
                let access = Access { ticket: 0, secret: [0; 32] };
                self.send(i, to, PeerMessage::Grant { manifest, lease, ttl_ms, chunks, access });
            }
            Output::Gossip(message) => self.gossip(i, message),
            Output::Dial { node, .. } => {
                if let Some(&other) = self.index.get(&node) {
                    self.connect(i, other);
                }
            }
            Output::Read { op, peer, chunk, .. } => self.read(i, op, peer, chunk),
            Output::CancelRead { op } => self.cancel(i, op),
            Output::ReleaseAccepted { release, .. } => {
                let peer = &self.peers[i as usize];
                if peer.plan.role == Role::Puller && Some(i) != self.announcer() {
                    let (manifest, bytes) = (release.manifest, release.manifest_bytes);
                    self.deliver(i, self.now, Input::ManifestWanted { manifest, bytes });
                }
            }
            Output::ManifestAsked { to, manifest, offset } => {
                let has = self.peers[i as usize].node.progress(&manifest).is_some();
                let (total, bytes) = if has { (MANIFEST.len() as u64, MANIFEST.to_vec()) } else { (0, vec![]) };
                self.send(i, to, PeerMessage::ManifestPiece { manifest, offset, total, bytes });
            }
            Output::ManifestFetched { .. } => self.load(i),
            Output::Hydrated { .. } => self.on_hydrated(i),
            Output::Notice(Notice::PeerBlamed { node, .. }) => {
                let liar = self.index.get(&node).is_some_and(|n| self.peers[*n as usize].plan.fault.corrupt);
                if !liar {
                    self.violations.push(format!("node {i} blames an honest node"));
                }
            }
            Output::Notice(_) | Output::Verdict { .. } | Output::LeaseClosed { .. } | Output::Recheck { .. } => {}
        }
    }

    fn on_hydrated(&mut self, i: u32) {
        let peer = &mut self.peers[i as usize];
        if !peer.has.is_superset(&peer.plan.wants) {
            return self.violations.push(format!("node {i} says it is hydrated, and lacks chunks"));
        }
        if peer.finished.is_none() {
            peer.finished = Some(self.now);
            self.unfinished -= usize::from(peer.plan.is_measured());
        }
    }

    fn latency(&self) -> Duration {
        Duration::from_secs_f64(self.e.network.latency_us / 1e6)
    }

    fn send(&mut self, from: u32, to: NodeId, message: PeerMessage) {
        let Some(&to) = self.index.get(&to) else { return };
        if !self.links.contains(&(from.min(to), from.max(to))) {
            return;
        }
        let message = Input::Message { from: self.peers[from as usize].node.id(), message };
        let cost = Duration::from_secs_f64(self.e.network.message_us / 1e6);
        let receiver = &mut self.peers[to as usize];
        let arrives = self.now + Duration::from_secs_f64(self.e.network.latency_us / 1e6);
        receiver.busy_until = receiver.busy_until.max(arrives) + cost;
        let at = receiver.busy_until;
        self.deliver(to, at, message);
    }

    fn deliver(&mut self, to: u32, at: Time, input: Input) {
        let life = self.peers[to as usize].life;
        self.events.plan(at, Event::Deliver { to, life, input: Box::new(input) });
    }

    /// Everybody hears it after one to as many hops as a tree of eight needs.
    fn gossip(&mut self, from: u32, message: GossipMessage) {
        let message = Rc::new(message);
        let count = u32::try_from(self.peers.len()).expect("nodes are numbered in u32");
        let hops = f64::from(count).log(CONNECTIONS_WANTED as f64).max(1.0);
        for to in (0..count).filter(|to| *to != from) {
            if self.rng.random::<f64>() < self.e.network.gossip_loss {
                continue;
            }
            let hops = self.rng.random_range(1.0..=hops + 1.0);
            let after = Duration::from_secs_f64(hops * self.e.network.gossip_hop_ms / 1e3);
            self.events.plan(self.now + after, Event::Gossip { to, from, message: message.clone() });
        }
    }

    fn connect(&mut self, a: u32, b: u32) {
        let both = self.peers[a as usize].alive && self.peers[b as usize].alive;
        if a == b || !both || !self.links.insert((a.min(b), a.max(b))) {
            return;
        }
        let at = self.now + self.latency() * 3;
        for (to, other) in [(a, b), (b, a)] {
            let node = self.peers[other as usize].node.id();
            self.deliver(to, at, Input::Connected { node });
        }
    }

    fn read(&mut self, reader: u32, op: OpId, peer: NodeId, chunk: u32) {
        let Some(&holder) = self.index.get(&peer) else { return };
        let tag = self.next_tag;
        self.next_tag += 1;
        self.reads.insert(tag, Read { reader, holder, op, chunk, moving: false });
        self.by_op.insert((reader, op), tag);
        self.events.plan(self.now + self.latency(), Event::Transfer { tag });
        if self.peers[holder as usize].plan.fault.stall_at.is_some() {
            self.events.plan(self.now + READ_STALL, Event::Stalled { tag });
        }
    }

    fn transfer(&mut self, tag: u64) {
        let Some(read) = self.reads.get_mut(&tag) else { return };
        if !self.peers[read.holder as usize].alive {
            return self.finish_read(tag, ReadOutcome::Failed);
        }
        read.moving = true;
        self.net.start(self.now, read.holder, read.reader, tag, self.e.chunk_bytes);
    }

    fn cancel(&mut self, reader: u32, op: OpId) {
        if let Some(&tag) = self.by_op.get(&(reader, op)) {
            self.stop_transfer(tag);
            self.finish_read(tag, ReadOutcome::Declined);
        }
    }

    fn stop_transfer(&mut self, tag: u64) {
        if let Some(r) = self.reads.get(&tag).filter(|r| r.moving) {
            self.net.cancel(self.now, r.holder, r.reader, tag);
        }
    }

    fn on_transferred(&mut self, done: Done) {
        let Some(read) = self.reads.get(&done.tag).copied() else { return };
        let honest = !self.peers[read.holder as usize].plan.fault.corrupt;
        if honest && !self.peers[read.reader as usize].has.insert(read.chunk) {
            self.duplicate_bytes += done.bytes;
            self.violations.push(format!("node {} fetched chunk {} again", read.reader, read.chunk));
        }
        self.finish_read(done.tag, if honest { ReadOutcome::Verified } else { ReadOutcome::Corrupt });
        let dies = self.e.seed_dies_after_bytes.is_some_and(|most| self.net.counters().up[0] >= most);
        if dies && self.peers[0].alive {
            self.crash(0);
        }
    }

    fn finish_read(&mut self, tag: u64, outcome: ReadOutcome) {
        let Some(read) = self.reads.remove(&tag) else { return };
        self.by_op.remove(&(read.reader, read.op));
        self.deliver(read.reader, self.now, Input::ReadDone { op: read.op, outcome });
    }

    fn crash(&mut self, i: u32) {
        let peer = &mut self.peers[i as usize];
        peer.alive = false;
        peer.life += 1;
        peer.wake_at = None;
        let restart = peer.plan.fault.restart_at;
        self.net.cancel_all(self.now, i);
        let gone: Vec<u64> =
            self.reads.iter().filter(|(_, r)| r.holder == i || r.reader == i).map(|(t, _)| *t).collect();
        for tag in gone {
            self.finish_read(tag, ReadOutcome::Failed);
        }
        let id = self.peers[i as usize].node.id();
        let links: Vec<(u32, u32)> = self.links.iter().filter(|(a, b)| *a == i || *b == i).copied().collect();
        for (a, b) in links {
            self.links.remove(&(a, b));
            let other = if a == i { b } else { a };
            self.deliver(other, self.now + self.latency(), Input::Disconnected { node: id });
        }
        restart.into_iter().for_each(|at| self.events.plan(at, Event::Start { node: i }));
    }

    fn lives(&self, i: u32, life: u32) -> bool {
        let peer = &self.peers[i as usize];
        peer.alive && peer.life == life
    }

    fn sample(&mut self) {
        let held = |p: &Peer| {
            let wants: &ChunkSet = &p.plan.wants;
            u32::try_from(p.has.intersection(wants).count()).unwrap_or(u32::MAX)
        };
        let mut held: Vec<u32> = self.peers.iter().filter(|p| p.plan.is_measured()).map(held).collect();
        self.samples.push(Sample::new(self.now.since(Time::ZERO).as_secs_f64(), &mut held));
    }

    fn into_outcome(self) -> Outcome {
        let seconds = |p: &Peer| p.finished.map(|at| at.since(p.plan.join).as_secs_f64());
        let finished: Vec<Option<f64>> = self.peers.iter().map(seconds).collect();
        let mut outcome = Outcome::new(self.e, "swarm", &finished, self.net.counters());
        outcome.samples = self.samples;
        outcome.violations = self.violations;
        outcome.duplicate_bytes = self.duplicate_bytes;
        outcome.events = self.handled;
        outcome
    }
}
