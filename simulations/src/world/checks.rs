//! What must hold in every run, whatever goes wrong in it.

use super::digest::Digest;
use super::run::{TOLERANCE, World};
use crate::spread::SpreadSet;
use aquifer_core::{NodeId, Time};
use aquifer_proto::limits::{GRANT_BYTES_MIN, UPLOAD_BURST};
use std::collections::BTreeMap;
use std::time::Duration;

/// Violations that are told; one cause often shows many times.
const TOLD_MAX: usize = 20;

/// Events per node in one millisecond that no work explains: a message takes a microsecond or more
/// to receive. Guess.
const FRANTIC_EVENTS: u64 = 2000;

#[derive(Debug, Default)]
pub(super) struct Checks {
    violations: Vec<String>,
    untold: u64,
    /// Until when, by its own clock, a node said it avoids a peer.
    avoided: BTreeMap<(u32, u32), Time>,
    /// Chunks of a release that a node is reading now.
    under_way: SpreadSet<(u32, usize, u32)>,
    pub(super) digest: Digest,
    /// Largest excess over a link's capacity that was seen.
    pub(super) excess: f64,
}

impl Checks {
    pub(super) fn violated(&mut self, at: Time, what: impl AsRef<str>) {
        if self.violations.len() < TOLD_MAX {
            self.violations.push(format!("at {:.6} s {}", at.since(Time::ZERO).as_secs_f64(), what.as_ref()));
        } else {
            self.untold += 1;
        }
    }

    pub(super) fn on_avoided(&mut self, i: u32, peer: u32, until: Time) {
        let entry = self.avoided.entry((i, peer)).or_default();
        *entry = until.max(*entry);
    }

    /// A node starts over: what its earlier life knew is gone.
    pub(super) fn on_end_of_life(&mut self, i: u32) {
        self.avoided.retain(|(node, _), _| *node != i);
        self.under_way.retain(|(node, ..)| *node != i);
    }

    pub(super) fn on_read_end(&mut self, i: u32, release: usize, chunk: u32) {
        self.under_way.remove(&(i, release, chunk));
    }

    pub(super) fn into_violations(mut self) -> Vec<String> {
        if self.untold > 0 {
            self.violations.push(format!("and {} more", self.untold));
        }
        self.violations
    }
}

impl World<'_> {
    pub(super) fn violated(&mut self, what: impl AsRef<str>) {
        self.checks.violated(self.now, what);
    }

    /// A node begins to read: something it needs, does not have and is not reading already, from
    /// somebody it does not avoid.
    pub(super) fn check_read(&mut self, i: u32, holder: u32, release: usize, chunk: u32) {
        let peer = &self.peers[i as usize];
        let current = release == peer.release;
        if current && peer.has.contains(chunk) {
            self.violated(format!("node {i} reads chunk {chunk}, which it has"));
        } else if current && !peer.plan.wants.contains(chunk) {
            self.violated(format!("node {i} reads chunk {chunk}, which it does not want"));
        }
        if !self.checks.under_way.insert((i, release, chunk)) {
            self.violated(format!("node {i} reads chunk {chunk} twice at once"));
        }
        let local = self.peers[i as usize].clock.local(self.now);
        if self.checks.avoided.get(&(i, holder)).is_some_and(|until| local < *until) {
            self.violated(format!("node {i} reads chunk {chunk} from node {holder}, which it avoids"));
        }
    }

    /// A holder may give what it holds, and no more at once than it was told.
    pub(super) fn check_grant(&mut self, i: u32, release: usize, chunks: &[u32]) {
        let peer = &self.peers[i as usize];
        if release != peer.release {
            return;
        }
        let lacks = chunks.iter().find(|c| !peer.has.contains(**c)).copied();
        if let Some(chunk) = lacks {
            self.violated(format!("node {i} grants chunk {chunk}, which it does not have"));
        }
    }

    pub(super) fn check_blame(&mut self, i: u32, node: NodeId, avoid: Duration) {
        let Some(&peer) = self.index.get(&node) else { return };
        let until = self.peers[i as usize].clock.local(self.now) + avoid;
        self.checks.on_avoided(i, peer, until);
        let blamed = &self.peers[peer as usize];
        if !blamed.plan.fault.corrupt && !blamed.overwritten {
            self.violated(format!("node {i} blames node {peer}, which is honest"));
        }
    }

    pub(super) fn check_failing(&mut self, i: u32, node: NodeId, avoid: Duration) {
        if let Some(&peer) = self.index.get(&node) {
            let until = self.peers[i as usize].clock.local(self.now) + avoid;
            self.checks.on_avoided(i, peer, until);
        }
    }

    pub(super) fn audit(&mut self, i: u32) {
        let peer = &self.peers[i as usize];
        if let Err(what) = peer.node.audit(peer.clock.local(self.now)) {
            self.violated(format!("node {i}: {what}"));
        }
    }

    /// Links carry what they can, and no node has uploaded more than its cap allows by now.
    pub(super) fn check_network(&mut self) {
        let excess = self.net.excess();
        self.checks.excess = self.checks.excess.max(excess);
        let elapsed = self.now.since(Time::ZERO).as_secs_f64();
        // What a life begins with, and the last grant, which may overdraw.
        let burst = |cap: f64| cap * UPLOAD_BURST.as_secs_f64() + self.e.chunk_bytes.max(GRANT_BYTES_MIN) as f64;
        let over = self.peers.iter().find(|p| {
            let sent = self.net.counters().up[p.plan.index as usize] as f64;
            let allowed = |cap: f64| cap * elapsed * (1.0 + TOLERANCE) + burst(cap) * f64::from(p.life + 1);
            p.plan.nic.upload_cap.is_some_and(|cap| sent > allowed(cap))
        });
        if let Some(node) = over.map(|p| p.plan.index) {
            self.violated(format!("node {node} has uploaded more than its cap"));
        }
    }

    /// Whether everything that is still to come has come: every node there is has all it wants.
    pub(super) fn is_settled(&mut self) -> bool {
        if self.now < self.e.faults_end {
            return false;
        }
        if std::mem::take(&mut self.unsettled) {
            let newest = self.newest;
            self.settled = self
                .peers
                .iter()
                .all(|p| p.gone || (p.alive && !p.draining && p.complete && p.wrong.is_empty() && p.release == newest));
        }
        self.settled
    }

    /// At the end every byte of every node is right, and nothing is left over in any of them.
    pub(super) fn check_end(&mut self) {
        self.check_network();
        for i in 0..u32::try_from(self.peers.len()).expect("nodes are numbered in u32") {
            if !self.peers[i as usize].alive {
                continue;
            }
            self.audit(i);
            let peer = &self.peers[i as usize];
            let lacking = peer.plan.wants.iter().filter(|c| !peer.has.contains(*c) || peer.wrong.contains_key(c));
            let lacking = lacking.count();
            if self.settled && lacking > 0 {
                self.violated(format!("node {i} ends with {lacking} chunks missing or wrong"));
            }
        }
    }

    /// Whether more happens in a millisecond than can mean anything: nodes that wake each other or
    /// themselves without end.
    pub(super) fn is_frantic(&mut self) -> bool {
        let (since, from) = self.lull;
        if self.now.since(since) >= Duration::from_millis(1) {
            self.lull = (self.now, self.handled);
            return false;
        }
        self.handled - from > FRANTIC_EVENTS * self.peers.len() as u64
    }

    pub(super) fn report_frantic(&mut self) {
        let due = |p: &super::peer::Peer| {
            let (at, why) = p.node.poll_timeout()?;
            let due = p.alive && p.clock.world(at) <= self.now + Duration::from_millis(1);
            due.then(|| format!("node {} wakes for {why}", p.plan.index))
        };
        let told: Vec<String> = self.peers.iter().filter_map(due).take(4).collect();
        self.violated(format!("nothing but events happens: {}", told.join(", ")));
    }

    pub(super) fn report_stuck(&mut self) {
        let stuck = |p: &&super::peer::Peer| p.alive && !(p.complete && p.release == self.newest);
        let told: Vec<String> = self.peers.iter().filter(stuck).map(|p| self.why_stuck(p.plan.index)).collect();
        if told.is_empty() {
            self.violated("the run does not end, and nobody is stuck");
        }
        told.into_iter().for_each(|t| self.violated(t));
    }

    fn why_stuck(&self, i: u32) -> String {
        let peer = &self.peers[i as usize];
        if peer.release != self.newest {
            return format!("node {i} never hears of the newest release");
        }
        if !peer.loaded {
            return format!("node {i} never gets the manifest; it has {} links", self.links.count(i));
        }
        let lacks = |c: &u32| !peer.has.contains(*c);
        let missing: Vec<u32> = peer.plan.wants.iter().filter(lacks).collect();
        let holds = |o: &&super::peer::Peer| {
            o.alive && o.release == peer.release && missing.first().is_some_and(|c| o.has.contains(*c))
        };
        let local = peer.clock.local(self.now);
        let holder = |o: &super::peer::Peer| {
            let linked = if peer.node.is_connected(&o.node.id()) { "" } else { " without a link" };
            let avoided = if peer.node.trust_of(&o.node.id(), local).0 { " avoided" } else { "" };
            let known = if peer.node.members().any(|m| m.status.node == o.node.id()) { "" } else { " unknown" };
            format!("{}{linked}{avoided}{known}", o.plan.index)
        };
        let holders: Vec<String> = self.peers.iter().filter(holds).take(6).map(holder).collect();
        let reads = self.reads.values().filter(|r| r.reader == i).count();
        format!(
            "node {i} is stuck: it lacks {} of {} chunks, first {:?}; {reads} reads under way, {}; held by [{}]",
            missing.len(),
            peer.plan.wants.count(),
            missing.first(),
            peer.node.progress(&self.manifests[peer.release]).map_or(0, |p| p.sources),
            holders.join(", ")
        )
    }

    /// What the bytes of a chunk of a release are: a number stands for them.
    pub(super) fn right(&self, release: usize, chunk: u32) -> u64 {
        let fraction = self.e.faults.update.map_or(0.0, |u| u.changed_fraction);
        let changed = mix(u64::from(chunk)) as f64 / u64::MAX as f64 <= fraction;
        let version = if release > 0 && changed { 1 } else { 0 };
        mix(u64::from(chunk) << 8 | version | 1 << 60)
    }
}

/// Sebastiano Vigna's finalizer of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
