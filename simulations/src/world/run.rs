//! The driver: carries outputs of nodes to where they become inputs of others.

use super::checks::Checks;
use super::events::{Event, Events};
use super::faults::Fault;
use super::links::Links;
use super::mesh;
use super::peer::{Peer, channel, publisher};
use super::reads::Read;
use crate::network::{Network, Nic};
use crate::outcome::{Outcome, SAMPLES, Sample};
use crate::scenario::{Expanded, NodePlan, Role, lower_bound};
use crate::spread::SpreadMap;
use anyhow::Result;
use aquifer_core::{
    Access, ChunkSet, GossipMessage, ManifestHash, NodeId, PeerMessage, Policy, Release, SignedRelease, Time,
};
use aquifer_proto::limits::{CONNECTIONS_WANTED, READ_STALL};
use aquifer_proto::{Input, LocalStatus, Notice, OpId, Output, ReadOutcome};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Rates are within this fraction of max-min fair.
pub(super) const TOLERANCE: f64 = 0.01;

/// A run that takes this many times its lower bound, and this much longer, is stuck.
const STUCK_FACTOR: f64 = 20.0;
const STUCK_S: f64 = 120.0;

/// Those of the release that a run begins with, and of the one that supersedes it.
const MANIFESTS: [&[u8]; 2] = [b"manifest", b"manifest, second edition"];

/// A node is audited after this many events: often where that costs little.
const AUDIT_CHUNKS: usize = 1 << 13;
const AUDIT_EVENTS: [u64; 2] = [64, 4096];

/// The world's dice are thrown apart from the faults', so that a change of one node's decisions
/// changes nobody's faults.
const FAULTS_SEED: u64 = 0x0fa0_1750;

/// What a run may be told besides its scenario.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// Say on stderr how far a long run is.
    pub progress: bool,
    /// The node whose last life is recorded in [`Outcome::recording`].
    pub record_node: Option<u32>,
}

impl RunOptions {
    fn records(&self, node: u32) -> bool {
        self.record_node == Some(node)
    }
}

/// Runs one node of `aquifer_proto` for each node of the scenario.
pub fn run(expanded: &Expanded, options: &RunOptions) -> Result<Outcome> {
    let wall = Instant::now();
    let mut world = World::new(expanded, *options);
    world.form_mesh();
    world.plan_faults();
    world.drive();
    world.check_end();
    let mut outcome = world.into_outcome();
    outcome.wall_s = wall.elapsed().as_secs_f64();
    Ok(outcome)
}

pub(super) struct World<'a> {
    pub(super) e: &'a Expanded,
    options: RunOptions,
    rng: SmallRng,
    /// For what goes wrong.
    pub(super) dice: SmallRng,
    pub(super) now: Time,
    pub(super) peers: Vec<Peer>,
    pub(super) index: SpreadMap<NodeId, u32>,
    pub(super) links: Links,
    pub(super) net: Network,
    pub(super) reads: SpreadMap<u64, Read>,
    pub(super) by_op: SpreadMap<(u32, OpId), u64>,
    pub(super) next_tag: u64,
    pub(super) events: Events,
    pub(super) handled: u64,
    /// Measured nodes that have not finished.
    unfinished: usize,
    bound: f64,
    samples: Vec<Sample>,
    pub(super) checks: Checks,
    pub(super) duplicate_bytes: u64,
    pub(super) manifests: [ManifestHash; 2],
    /// Which release everybody is to have in the end.
    pub(super) newest: usize,
    pub(super) has_faults: bool,
    pub(super) parted: bool,
    /// Since when a node uploads nothing.
    pub(super) stalled: Vec<Option<Time>>,
    mishaps: BTreeMap<&'static str, u64>,
    /// When the events of one millisecond were begun to count, and at which of them.
    pub(super) lull: (Time, u64),
    /// Something changed that may end the run, and whether it may end.
    pub(super) unsettled: bool,
    pub(super) settled: bool,
}

impl<'a> World<'a> {
    fn new(e: &'a Expanded, options: RunOptions) -> Self {
        // The cap is the node's own decision, see `Config`.
        let uncapped = |n: &NodePlan| Nic { upload_cap: None, ..n.nic };
        let peers: Vec<Peer> = e.nodes.iter().map(|plan| Peer::new(e, plan, options.records(plan.index))).collect();
        World {
            e,
            options,
            rng: SmallRng::seed_from_u64(e.seed),
            dice: SmallRng::seed_from_u64(e.seed ^ FAULTS_SEED),
            now: Time::ZERO,
            index: peers.iter().map(|p| (p.node.id(), p.plan.index)).collect(),
            unfinished: peers.iter().filter(|p| p.plan.is_measured()).count(),
            peers,
            links: Links::new(e.nodes.len()),
            net: Network::new(e.nodes.iter().map(uncapped).collect(), e.racks.clone(), TOLERANCE),
            reads: SpreadMap::default(),
            by_op: SpreadMap::default(),
            next_tag: 0,
            events: Events::default(),
            handled: 0,
            bound: lower_bound(e),
            samples: Vec::new(),
            checks: Checks::default(),
            duplicate_bytes: 0,
            manifests: MANIFESTS.map(ManifestHash::of),
            newest: 0,
            has_faults: e.has_faults() || e.network.message_loss > 0.0,
            parted: false,
            stalled: vec![None; e.nodes.len()],
            mishaps: BTreeMap::new(),
            lull: (Time::ZERO, 0),
            unsettled: true,
            settled: false,
        }
    }

    fn form_mesh(&mut self) {
        let there: Vec<u32> = self.e.nodes.iter().filter(|p| p.join == Time::ZERO).map(|p| p.index).collect();
        for i in &there {
            self.peers[*i as usize].begin(self.e, Time::ZERO);
        }
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
        let limit = self.e.faults_end + Duration::from_secs_f64(self.bound * STUCK_FACTOR + STUCK_S);
        let mut said = Instant::now();
        while self.unfinished > 0 || !self.is_settled() {
            let next = [self.events.next_at(), self.net.next_completion()].into_iter().flatten().min();
            let Some(at) = next.filter(|at| *at < limit) else {
                return self.report_stuck();
            };
            self.now = at;
            self.step(at);
            if self.is_frantic() {
                return self.report_frantic();
            }
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
            && let Some(event) = self.events.pop()
        {
            self.handled += 1;
            self.on_event(event);
            let small = self.peers.len() * self.e.chunks as usize <= AUDIT_CHUNKS;
            if self.handled.is_multiple_of(AUDIT_EVENTS[usize::from(!small)]) {
                let turn = self.handled / AUDIT_EVENTS[usize::from(!small)] % self.peers.len() as u64;
                let i = u32::try_from(turn).expect("nodes are numbered in u32");
                if self.peers[i as usize].alive {
                    self.audit(i);
                }
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Start { node } => self.start(node),
            Event::Begin { node } => self.begin(node),
            Event::Deliver { to, life, link, input } => {
                let open = |(other, id)| self.links.find(to, other).is_some_and(|l| l.id == id);
                if self.lives(to, life) && link.is_none_or(open) {
                    self.receive(to, input);
                }
            }
            Event::Gossip { to, from, message } => {
                if self.peers[to as usize].alive && self.reachable(from, to) {
                    let via = self.peers[from as usize].node.id();
                    self.input(to, Input::Gossip { via, token: 0, message: (*message).clone() });
                }
            }
            Event::Transfer { tag } => self.transfer(tag),
            Event::Stalled { tag } => {
                let long = |since: Time| self.now.since(since) >= READ_STALL;
                let silent = |r: &Read| r.moving && self.stalled[r.holder as usize].is_some_and(long);
                if self.reads.get(&tag).is_some_and(silent) {
                    self.stop_transfer(tag);
                    self.finish_read(tag, ReadOutcome::Failed);
                }
            }
            Event::Wake { node, life } => self.wake(node, life),
            Event::Crash { node } => self.crash(node),
            Event::Fault(fault) => self.on_fault(fault),
            Event::Sample => {
                self.check_network();
                if self.unfinished == 0 {
                    return; // The measured nodes' story is told.
                }
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
        if peer.alive {
            return; // Two faults had it start again.
        }
        peer.begin(self.e, now);
        self.unsettled = true;
        self.input(i, Input::Local(LocalStatus { addresses: vec![format!("{i}")], ..LocalStatus::default() }));
        let others: Vec<u32> = (0..i).filter(|o| self.peers[*o as usize].alive).collect();
        for _ in 0..CONNECTIONS_WANTED.min(others.len()) {
            let other = others[self.rng.random_range(0..others.len())];
            self.connect(i, other);
        }
        self.begin(i);
    }

    fn begin(&mut self, i: u32) {
        self.drain(i);
        match self.peers[i as usize].plan.role {
            _ if Some(i) == self.announcer() && self.peers[i as usize].life == 0 => self.publish(i),
            Role::Seed | Role::Holder => self.load(i),
            // What it has already is of the release that is to come.
            Role::Puller => {}
        }
        self.bootstrap(i);
    }

    /// Who tells the mesh of the release: the first seed, or the first node where there is none.
    fn announcer(&self) -> Option<u32> {
        let seed = self.e.nodes.iter().find(|n| n.role == Role::Seed);
        seed.or(self.e.nodes.first()).map(|n| n.index)
    }

    pub(super) fn publish(&mut self, i: u32) {
        let current = self.peers[i as usize].release;
        let release = Release {
            channel: channel(),
            seq: current as u64 + 1,
            manifest: self.manifests[current],
            manifest_bytes: MANIFESTS[current].len() as u64,
            rolls_back_to: None,
            policy: Policy::default(),
            created_unix_ms: 0,
            note: String::new(),
        };
        self.peers[i as usize].loaded = true;
        self.input(i, Input::Publish { release: SignedRelease::sign(&release, &publisher()) });
        self.load(i);
    }

    fn load(&mut self, i: u32) {
        let peer = &mut self.peers[i as usize];
        peer.loaded = true;
        let manifest = self.manifests[peer.release];
        let (wants, has) = (peer.plan.wants.clone(), peer.has.clone());
        let chunk_bytes = u32::try_from(self.e.chunk_bytes).unwrap_or(u32::MAX);
        self.input(i, Input::ManifestLoaded { manifest, chunk_bytes: vec![chunk_bytes; self.e.chunks as usize] });
        self.input(i, Input::Held { manifest, chunks: has });
        self.input(i, Input::Wanted { manifest, chunks: wants });
    }

    /// Something arrives at a node's door.
    fn receive(&mut self, i: u32, input: Input) {
        let peer = &mut self.peers[i as usize];
        if let Input::Message { from, message } = &input {
            let asks = matches!(message, PeerMessage::Ask { .. } | PeerMessage::Progress { .. });
            if asks && peer.mute {
                return;
            }
            if let PeerMessage::Grant { access, .. } = message {
                let from = self.index.get(from).copied().unwrap_or(u32::MAX);
                peer.tickets.insert(from, u32::try_from(access.ticket).unwrap_or(u32::MAX));
            }
        }
        self.input(i, input);
    }

    pub(super) fn input(&mut self, i: u32, input: Input) {
        let peer = &mut self.peers[i as usize];
        peer.node.handle(peer.clock.local(self.now), input);
        self.drain(i);
    }

    fn wake(&mut self, i: u32, life: u32) {
        if self.lives(i, life) && self.peers[i as usize].wake_at.is_some_and(|at| at <= self.now) {
            let peer = &mut self.peers[i as usize];
            peer.wake_at = None;
            peer.node.handle_timeout(peer.clock.local(self.now));
            self.drain(i);
        }
    }

    fn drain(&mut self, i: u32) {
        while let Some(output) = self.peers[i as usize].node.poll_output() {
            self.checks.digest.add(self.now, i, &output);
            self.apply(i, output);
        }
        let peer = &mut self.peers[i as usize];
        let Some((at, _)) = peer.node.poll_timeout() else { return };
        let at = peer.clock.world(at).max(self.now);
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
                let peer = &mut self.peers[i as usize];
                let access = Access { ticket: peer.life.into(), secret: [0; 32] };
                peer.leases.extend(chunks.iter().map(|c| ((lease, *c), None)));
                if let Some(release) = self.release_of(&manifest) {
                    self.check_grant(i, release, &chunks);
                }
                self.send(i, to, PeerMessage::Grant { manifest, lease, ttl_ms, chunks, access });
            }
            Output::Gossip(message) => self.gossip(i, message),
            Output::Dial { node, .. } => {
                if let Some(&other) = self.index.get(&node) {
                    self.connect(i, other);
                }
            }
            Output::Read { op, peer, manifest, lease, chunk } => self.read(i, op, peer, (manifest, lease, chunk)),
            Output::CancelRead { op } => self.cancel(i, op),
            Output::ReleaseAccepted { signed, release } => self.on_accepted(i, signed, &release),
            Output::ManifestAsked { to, manifest, offset } => {
                let known = self.peers[i as usize].node.progress(&manifest).and(self.release_of(&manifest));
                let bytes = known.map_or(vec![], |r| MANIFESTS[r].to_vec());
                let total = bytes.len() as u64;
                self.send(i, to, PeerMessage::ManifestPiece { manifest, offset, total, bytes });
            }
            Output::ManifestFetched { manifest, .. } => {
                if self.release_of(&manifest) == Some(self.peers[i as usize].release) {
                    self.load(i);
                }
            }
            Output::Hydrated { manifest } => {
                if self.release_of(&manifest) == Some(self.peers[i as usize].release) {
                    self.on_hydrated(i);
                }
            }
            Output::LeaseClosed { lease, chunk } => self.on_lease_closed(i, lease, chunk),
            Output::Recheck { manifest, chunk, .. } => {
                if self.release_of(&manifest) == Some(self.peers[i as usize].release) {
                    self.recheck(i, chunk);
                }
            }
            Output::Notice(Notice::PeerBlamed { node, avoid, .. }) => self.check_blame(i, node, avoid),
            Output::Notice(Notice::PeerFailing { node, avoid }) => self.check_failing(i, node, avoid),
            // Its nodes have no engines.
            Output::Drained => {
                let life = self.peers[i as usize].life;
                self.events.plan(self.now, Event::Fault(Fault::DrainEnds { node: i, life, done: true }));
            }
            Output::StatementAccepted { .. } | Output::Stand { .. } | Output::Order { .. } => {}
            Output::Notice(_) | Output::Verdict { .. } => {}
        }
    }

    pub(super) fn release_of(&self, manifest: &ManifestHash) -> Option<usize> {
        self.manifests.iter().position(|m| m == manifest)
    }

    fn on_accepted(&mut self, i: u32, signed: SignedRelease, release: &Release) {
        let Some(accepted) = self.release_of(&release.manifest) else { return };
        let peer = &mut self.peers[i as usize];
        peer.accepted = vec![signed];
        let current = peer.release;
        if accepted > current {
            self.take_up(i, accepted);
        }
        if accepted >= current && !self.peers[i as usize].loaded {
            let (manifest, bytes) = (release.manifest, release.manifest_bytes);
            self.deliver(i, self.now, Input::ManifestWanted { manifest, bytes });
        }
    }

    /// The holder may move the chunk now: who still reads it is told so.
    fn on_lease_closed(&mut self, i: u32, lease: u64, chunk: u32) {
        let under_way = self.peers[i as usize].leases.remove(&(lease, chunk)).flatten();
        if let Some(tag) = under_way.filter(|tag| self.reads.get(tag).is_some_and(|r| !r.doomed)) {
            self.doom(tag, self.latency(), true);
        }
    }

    fn on_hydrated(&mut self, i: u32) {
        let peer = &mut self.peers[i as usize];
        if !peer.has.is_superset(&peer.plan.wants) {
            return self.violated(format!("node {i} says it is hydrated, and lacks chunks"));
        }
        peer.complete = true;
        self.unsettled = true;
        if peer.finished.is_none() {
            peer.finished = Some(self.now);
            self.unfinished -= usize::from(peer.plan.is_measured());
        }
    }

    pub(super) fn latency(&self) -> Duration {
        Duration::from_secs_f64(self.e.network.latency_us / 1e6)
    }

    fn send(&mut self, from: u32, to: NodeId, message: PeerMessage) {
        let Some(&to) = self.index.get(&to) else { return };
        let Some(link) = self.links.find(from, to) else { return };
        let loss = self.e.network.message_loss;
        if loss > 0.0 && self.is_troubled() && self.dice.random_bool(loss) {
            return self.cut(from, to, Duration::ZERO);
        }
        let message = Input::Message { from: self.peers[from as usize].node.id(), message };
        let cost = Duration::from_secs_f64(self.e.network.message_us / 1e6);
        let receiver = &mut self.peers[to as usize];
        let arrives = self.now + Duration::from_secs_f64(self.e.network.latency_us / 1e6);
        receiver.busy_until = receiver.busy_until.max(arrives) + cost;
        let at = receiver.busy_until;
        self.deliver_over(Some((from, link.id)), to, at, message);
    }

    pub(super) fn deliver(&mut self, to: u32, at: Time, input: Input) {
        self.deliver_over(None, to, at, input);
    }

    fn deliver_over(&mut self, link: Option<(u32, u64)>, to: u32, at: Time, input: Input) {
        let life = self.peers[to as usize].life;
        self.events.plan(at, Event::Deliver { to, life, link, input });
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

    pub(super) fn connect(&mut self, a: u32, b: u32) {
        let both = self.peers[a as usize].alive && self.peers[b as usize].alive;
        if a == b || !both || !self.reachable(a, b) {
            return;
        }
        let at = self.now + self.latency() * 3;
        let Some(link) = self.links.open(a, b, self.now, at) else { return };
        for (to, other) in [(a, b), (b, a)] {
            let node = self.peers[other as usize].node.id();
            self.deliver_over(Some((other, link.id)), to, at, Input::Connected { node });
        }
    }

    pub(super) fn crash(&mut self, i: u32) {
        let restart = self.peers[i as usize].plan.fault.restart_at;
        let loses = self.has_faults && self.dice.random_bool(self.e.faults.restart_loses);
        let peer = &mut self.peers[i as usize];
        if !peer.alive {
            return;
        }
        (peer.alive, peer.wake_at) = (false, None);
        peer.life += 1;
        peer.gone = restart.is_none() && (peer.plan.fault.crashes || peer.plan.role == Role::Seed);
        if loses {
            peer.lose_everything();
        }
        self.mishap("crashes and goodbyes");
        self.checks.on_end_of_life(i);
        self.unsettled = true;
        self.net.cancel_all(self.now, i);
        for tag in self.reads_where(|r| r.holder == i || r.reader == i) {
            self.finish_read(tag, ReadOutcome::Failed);
        }
        for other in self.links.of(i) {
            self.cut(i, other, Duration::ZERO);
        }
        if self.peers[i as usize].plan.fault.crashes {
            restart.into_iter().for_each(|at| self.events.plan(at, Event::Start { node: i }));
        }
    }

    pub(super) fn mishap(&mut self, what: &'static str) {
        *self.mishaps.entry(what).or_default() += 1;
    }

    pub(super) fn lives(&self, i: u32, life: u32) -> bool {
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

    fn into_outcome(mut self) -> Outcome {
        let seconds = |p: &Peer| p.finished.map(|at| at.since(p.plan.join).as_secs_f64());
        let finished: Vec<Option<f64>> = self.peers.iter().map(seconds).collect();
        let mut outcome = Outcome::new(self.e, "swarm", &finished, self.net.counters());
        outcome.recording = self.peers.iter_mut().flat_map(|p| p.node.take_record()).collect();
        outcome.samples = self.samples;
        outcome.cap_excess = self.checks.excess;
        outcome.mishaps = self.mishaps;
        outcome.digest = self.checks.digest.value();
        outcome.violations = self.checks.into_violations();
        outcome.duplicate_bytes = self.duplicate_bytes;
        outcome.events = self.handled;
        outcome
    }
}
