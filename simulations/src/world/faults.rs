//! What goes wrong: cut and reset connections, nodes that come and go, that are slow, silent or
//! lose what they held, and a release that supersedes another in the middle of it.

use super::events::Event;
use super::run::World;
use crate::scenario::Role;
use aquifer_core::{ChunkSet, Time};
use aquifer_proto::limits::READ_STALL;
use aquifer_proto::{Input, ReadOutcome};
use rand::Rng;
use rand::seq::IteratorRandom;
use std::time::Duration;

/// How long it takes, at most, until both ends notice that nothing comes through any more. A
/// keep-alive of a few seconds in reality; shorter here, so that a short run has time for it.
const SILENCE_NOTICED: Duration = Duration::from_secs(1);

/// Chunks that one overwriting hits at most, and how long until the agent finds out by itself.
const OVERWRITTEN_CHUNKS_MAX: u32 = 4;
const OVERWRITTEN_FOUND: Duration = Duration::from_millis(500);

/// How long an agent takes to hash a chunk again: 4 MiB at 4 GByte/s.
const RECHECK: Duration = Duration::from_millis(1);

/// As long as an agent gives itself unless told otherwise.
const DRAIN_GRACE: Duration = Duration::from_secs(25);

/// How often a node without any connection tries those it was told to start with.
const BOOTSTRAP_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) enum Fault {
    Partition {
        on: bool,
    },
    Slow {
        node: u32,
        on: bool,
    },
    Stall {
        node: u32,
        on: bool,
    },
    Mute {
        node: u32,
        on: bool,
    },
    Churn,
    /// Somebody is asked to leave; or this one.
    Drain {
        node: Option<u32>,
    },
    /// It hands nothing over any more: that is done, or takes too long.
    DrainEnds {
        node: u32,
        life: u32,
        done: bool,
    },
    Overwrite,
    Found {
        node: u32,
        life: u32,
        chunks: ChunkSet,
    },
    Update,
    Bootstrap {
        node: u32,
        life: u32,
    },
    /// A read ends without having brought anything.
    ReadEnds {
        tag: u64,
        revoked: bool,
    },
}

impl World<'_> {
    pub(super) fn plan_faults(&mut self) {
        let e = self.e;
        for plan in &e.nodes {
            let (node, f) = (plan.index, plan.fault);
            let stall = f.stall_at.map(|at| (at, f.stall_until));
            self.plan_span(stall, |on| Fault::Stall { node, on });
            self.plan_span(f.slow_span, |on| Fault::Slow { node, on });
            self.plan_span(f.mute, |on| Fault::Mute { node, on });
        }
        self.plan_span(e.partition.map(|p| (p.from, Some(p.until))), |on| Fault::Partition { on });
        self.plan_next(e.faults.churn_per_s, Fault::Churn);
        self.plan_next(e.faults.drains_per_s, Fault::Drain { node: None });
        if let Some(at_ms) = e.faults.seed_drains_ms {
            let at = Time::ZERO + Duration::from_secs_f64(at_ms / 1e3);
            self.events.plan(at, Event::Fault(Fault::Drain { node: Some(0) }));
        }
        self.plan_next(e.faults.overwrites_per_s, Fault::Overwrite);
        if let Some(update) = e.faults.update {
            let at = Time::ZERO + Duration::from_secs_f64(update.at_ms / 1e3);
            self.events.plan(at, Event::Fault(Fault::Update));
        }
    }

    fn plan_span(&mut self, span: Option<(Time, Option<Time>)>, fault: impl Fn(bool) -> Fault) {
        let Some((at, until)) = span else { return };
        self.events.plan(at, Event::Fault(fault(true)));
        until.into_iter().for_each(|until| self.events.plan(until, Event::Fault(fault(false))));
    }

    /// The next of events that come at random at this rate.
    fn plan_next(&mut self, per_s: f64, fault: Fault) {
        if per_s > 0.0 {
            let gap = -(1.0 - self.dice.random::<f64>()).ln() / per_s;
            self.plan_within(Duration::from_secs_f64(gap.min(1e6)), fault);
        }
    }

    fn plan_within(&mut self, after: Duration, fault: Fault) {
        let at = self.now + after;
        if at < self.e.faults_end {
            self.events.plan(at, Event::Fault(fault));
        }
    }

    pub(super) fn on_fault(&mut self, fault: Fault) {
        match fault {
            Fault::Partition { on } => self.partition(on),
            Fault::Slow { node, on } => {
                let factor = if on { self.e.faults.slow_factor } else { 1.0 };
                let nic = self.peers[node as usize].plan.nic;
                self.net.set_nic(self.now, node, nic.up * factor, nic.down * factor);
            }
            Fault::Stall { node, on } => self.stall(node, on),
            Fault::Mute { node, on } => self.peers[node as usize].mute = on,
            Fault::Churn => {
                self.churn();
                self.plan_next(self.e.faults.churn_per_s, Fault::Churn);
            }
            Fault::Drain { node: Some(node) } => self.begin_to_drain(node),
            Fault::Drain { node: None } => {
                if let Some(node) = self.who_comes_and_goes() {
                    self.begin_to_drain(node);
                }
                self.plan_next(self.e.faults.drains_per_s, Fault::Drain { node: None });
            }
            Fault::DrainEnds { node, life, done } => {
                if self.lives(node, life) && std::mem::take(&mut self.peers[node as usize].draining) {
                    self.mishap(if done { "drains" } else { "drains cut short" });
                    if !done && self.e.only_drains() {
                        self.violated(format!("node {node} drained for {} s without an end", DRAIN_GRACE.as_secs()));
                    }
                    self.say_goodbye(node);
                }
            }
            Fault::Overwrite => {
                self.overwrite();
                self.plan_next(self.e.faults.overwrites_per_s, Fault::Overwrite);
            }
            Fault::Found { node, life, chunks } => {
                if self.lives(node, life) {
                    self.lose(node, &chunks);
                }
            }
            Fault::Update => self.update(),
            Fault::Bootstrap { node, life } => {
                if self.lives(node, life) {
                    self.bootstrap(node);
                }
            }
            Fault::ReadEnds { tag, revoked } => {
                if self.reads.contains_key(&tag) {
                    self.stop_transfer(tag);
                    self.finish_read(tag, if revoked { ReadOutcome::Revoked } else { ReadOutcome::Failed });
                }
            }
        }
    }

    /// Whether anything sent by one can arrive at the other now.
    pub(super) fn reachable(&self, a: u32, b: u32) -> bool {
        let cut_off = |n: u32| self.peers[n as usize].plan.fault.cut_off;
        !self.parted || cut_off(a) == cut_off(b)
    }

    /// Whether faults at random still happen.
    pub(super) fn is_troubled(&self) -> bool {
        self.e.faults.until_ms.is_none() || self.now < self.e.faults_end
    }

    fn partition(&mut self, on: bool) {
        self.parted = on;
        if !on {
            return;
        }
        self.mishap("partitions");
        let lasts = self.e.partition.map_or(Duration::ZERO, |p| p.until.since(p.from));
        let noticed = SILENCE_NOTICED.min(lasts);
        for (a, b) in self.links.pairs() {
            if !self.reachable(a, b) {
                let after = noticed.mul_f64(self.dice.random());
                self.cut(a, b, after);
            }
        }
        let across = self.reads_where(|r| !self.reachable(r.holder, r.reader));
        across.into_iter().for_each(|tag| self.doom(tag, noticed, false));
    }

    /// Nothing more comes of this read; its reader notices after a while.
    pub(super) fn doom(&mut self, tag: u64, noticed: Duration, revoked: bool) {
        self.stop_transfer(tag);
        if let Some(read) = self.reads.get_mut(&tag) {
            (read.moving, read.doomed) = (false, true);
            self.events.plan(self.now + noticed, Event::Fault(Fault::ReadEnds { tag, revoked }));
        }
    }

    /// Ends the connection of two nodes; each end notices, at the latest after `noticed`.
    pub(super) fn cut(&mut self, a: u32, b: u32, noticed: Duration) {
        let noticed = noticed.max(self.latency());
        if self.links.cut(a, b, self.now, noticed).is_none() {
            return;
        }
        self.mishap("connections cut");
        for (to, other) in [(a, b), (b, a)] {
            let node = self.peers[other as usize].node.id();
            self.deliver(to, self.now + noticed, Input::Disconnected { node });
        }
    }

    fn stall(&mut self, node: u32, on: bool) {
        self.net.stall(self.now, node, on);
        self.stalled[node as usize] = on.then_some(self.now);
        for tag in self.reads_where(|r| on && r.holder == node) {
            self.events.plan(self.now + READ_STALL, Event::Stalled { tag });
        }
    }

    /// A puller crashes, or says goodbye and goes; it comes back with what it held or nothing.
    fn churn(&mut self) {
        let Some(node) = self.who_comes_and_goes() else { return };
        let away = self.time_away();
        if self.dice.random_bool(0.5) {
            self.say_goodbye_for(node, away);
        } else {
            self.go(node, self.now, away);
        }
    }

    fn who_comes_and_goes(&mut self) -> Option<u32> {
        let comes_and_goes = |n: &&u32| {
            let peer = &self.peers[**n as usize];
            peer.alive && !peer.draining && peer.plan.role == Role::Puller && !peer.plan.fault.crashes
        };
        let all: Vec<u32> = (0u32..).take(self.peers.len()).collect();
        all.iter().filter(comes_and_goes).choose(&mut self.dice).copied()
    }

    fn time_away(&mut self) -> Duration {
        Duration::from_secs_f64(self.e.faults.churn_away_ms * self.dice.random::<f64>() / 1e3)
    }

    fn begin_to_drain(&mut self, node: u32) {
        let peer = &mut self.peers[node as usize];
        if peer.alive {
            let life = peer.life;
            peer.draining = true;
            self.events.plan(self.now + DRAIN_GRACE, Event::Fault(Fault::DrainEnds { node, life, done: false }));
            self.input(node, Input::Drain);
        }
    }

    fn say_goodbye(&mut self, node: u32) {
        let away = self.time_away();
        self.say_goodbye_for(node, away);
    }

    fn say_goodbye_for(&mut self, node: u32, away: Duration) {
        self.input(node, Input::Leave);
        // Its last words are on their way before its connections close.
        self.go(node, self.now + self.latency() * 3, away);
    }

    /// Seeds do not come back.
    fn go(&mut self, node: u32, at: Time, away: Duration) {
        self.events.plan(at, Event::Crash { node });
        if self.peers[node as usize].plan.role == Role::Puller {
            self.events.plan(at + away + Duration::from_millis(1), Event::Start { node });
        }
    }

    /// An engine writes over some of what the node serves. Some engines say so, others do not.
    fn overwrite(&mut self) {
        let serves = |n: &&u32| {
            let peer = &self.peers[**n as usize];
            let honest = peer.plan.role != Role::Seed && !peer.plan.fault.corrupt;
            honest && peer.alive && peer.loaded && !peer.has.is_empty()
        };
        let all: Vec<u32> = (0u32..).take(self.peers.len()).collect();
        let Some(&node) = all.iter().filter(serves).choose(&mut self.dice) else { return };
        let announced = self.dice.random_bool(0.5);
        let count = self.dice.random_range(1..=OVERWRITTEN_CHUNKS_MAX) as usize;
        let peer = &mut self.peers[node as usize];
        let hit = peer.has.iter().choose_multiple(&mut self.dice, count);
        for &chunk in &hit {
            peer.wrong.insert(chunk, self.dice.random());
        }
        let chunks = ChunkSet::from_indices(self.e.chunks, hit);
        let (life, after) = (peer.life, OVERWRITTEN_FOUND.mul_f64(self.dice.random()));
        peer.overwritten |= !announced;
        self.mishap("overwritings");
        if announced {
            return self.lose(node, &chunks);
        }
        self.events.plan(self.now + after, Event::Fault(Fault::Found { node, life, chunks }));
    }

    /// A reader complained: the agent hashes the chunk, which takes a while.
    pub(super) fn recheck(&mut self, node: u32, chunk: u32) {
        let chunks = ChunkSet::from_indices(self.e.chunks, [chunk]);
        let life = self.peers[node as usize].life;
        self.events.plan(self.now + RECHECK, Event::Fault(Fault::Found { node, life, chunks }));
    }

    /// The agent has found that these chunks are not what they were.
    pub(super) fn lose(&mut self, i: u32, chunks: &ChunkSet) {
        let peer = &mut self.peers[i as usize];
        let lost: Vec<u32> = chunks.iter().filter(|c| peer.wrong.remove(c).is_some()).collect();
        if lost.is_empty() {
            return;
        }
        for chunk in &lost {
            peer.has.remove(*chunk);
        }
        peer.complete = peer.has.is_superset(&peer.plan.wants);
        self.unsettled = true;
        let manifest = self.manifests[peer.release];
        let chunks = ChunkSet::from_indices(self.e.chunks, lost);
        if peer.loaded {
            self.input(i, Input::Lost { manifest, chunks });
        }
    }

    /// The first seed there is publishes a second release.
    fn update(&mut self) {
        let publishes = |p: &super::peer::Peer| p.alive && p.plan.role == Role::Seed;
        let Some(i) = self.peers.iter().position(publishes) else { return };
        let i = u32::try_from(i).expect("nodes are numbered in u32");
        self.mishap("updates");
        self.newest = 1;
        self.take_up(i, 1);
        let peer = &mut self.peers[i as usize];
        peer.has = ChunkSet::full(self.e.chunks);
        peer.complete = true;
        self.publish(i);
    }

    /// Turns from the release it took part in to a newer one; what is equal in both stays.
    pub(super) fn take_up(&mut self, i: u32, release: usize) {
        let old = self.peers[i as usize].release;
        let same = (0..self.e.chunks).filter(|c| self.right(old, *c) == self.right(release, *c));
        let same = ChunkSet::from_indices(self.e.chunks, same);
        let peer = &mut self.peers[i as usize];
        peer.has = ChunkSet::from_indices(self.e.chunks, peer.has.intersection(&same));
        let has = &peer.has;
        peer.wrong.retain(|c, _| has.contains(*c));
        (peer.release, peer.loaded) = (release, false);
        peer.complete = peer.has.is_superset(&peer.plan.wants);
        self.unsettled = true;
        self.input(i, Input::Forget { manifest: self.manifests[old] });
    }

    /// Without a connection, a node dials somebody it was told to begin with, again and again.
    pub(super) fn bootstrap(&mut self, i: u32) {
        if self.links.count(i) == 0 {
            let others = (0u32..).take(self.peers.len()).filter(|o| *o != i && self.peers[*o as usize].alive);
            if let Some(other) = others.choose(&mut self.dice) {
                self.connect(i, other);
            }
        }
        if self.has_faults {
            let life = self.peers[i as usize].life;
            self.events.plan(self.now + BOOTSTRAP_INTERVAL, Event::Fault(Fault::Bootstrap { node: i, life }));
        }
    }
}
