//! One simulated node: the brain, and the little of its hands that the model needs.

use super::clock::Clock;
use crate::scenario::{Expanded, NodePlan};
use aquifer_core::{ChannelName, ChunkSet, NodeSecret, PublisherSecret, SignedRelease, Time};
use aquifer_proto::{Config, Recorded};
use std::collections::BTreeMap;

/// Chunks a node lets others read at once: the agent's own default.
const LEASED_CHUNKS_MAX: u64 = 64;

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) node: Recorded,
    /// Each life begins a record.
    on_record: bool,
    pub(super) plan: NodePlan,
    /// Counts starts; what was planned for an earlier life is void.
    pub(super) life: u32,
    pub(super) alive: bool,
    /// Dead, and not to be started again.
    pub(super) gone: bool,
    pub(super) clock: Clock,
    /// Which release it takes part in, and whether it has read that one's manifest.
    pub(super) release: usize,
    pub(super) loaded: bool,
    /// Chunks of the release that were verified here.
    pub(super) has: ChunkSet,
    /// Those of them whose bytes are others by now, which it does not know yet.
    pub(super) wrong: BTreeMap<u32, u64>,
    /// Its engine wrote over something without saying so: it may be blamed.
    pub(super) overwritten: bool,
    /// Holds all it wants, as far as it knows.
    pub(super) complete: bool,
    pub(super) finished: Option<Time>,
    /// Was asked to leave, and hands over first.
    pub(super) draining: bool,
    /// Hears no ask.
    pub(super) mute: bool,
    /// What its disk remembers.
    pub(super) accepted: Vec<SignedRelease>,
    /// Chunks it keeps in place for readers, by lease, and the reads of them that have begun.
    pub(super) leases: BTreeMap<(u64, u32), Option<u64>>,
    /// The lives that the peers who granted something to it were in.
    pub(super) tickets: BTreeMap<u32, u32>,
    /// Until when it is busy with control messages.
    pub(super) busy_until: Time,
    pub(super) wake_at: Option<Time>,
}

impl Peer {
    pub(super) fn new(e: &Expanded, plan: &NodePlan, on_record: bool) -> Self {
        let clock = Clock::new(e, plan);
        Peer {
            node: node(config(e, plan, 0, Vec::new()), clock.local(Time::ZERO), on_record),
            on_record,
            plan: plan.clone(),
            life: 0,
            alive: false,
            gone: false,
            clock,
            release: 0,
            loaded: false,
            has: plan.has.clone(),
            wrong: BTreeMap::new(),
            overwritten: false,
            complete: plan.missing().is_empty(),
            finished: None,
            draining: false,
            mute: false,
            accepted: Vec::new(),
            leases: BTreeMap::new(),
            tickets: BTreeMap::new(),
            busy_until: Time::ZERO,
            wake_at: None,
        }
    }

    /// The agent starts: it hashes what is in memory, and begins with what is right of that.
    pub(super) fn begin(&mut self, e: &Expanded, now: Time) {
        for chunk in std::mem::take(&mut self.wrong).into_keys() {
            self.has.remove(chunk);
        }
        let config = config(e, &self.plan, self.life, self.accepted.clone());
        self.node = node(config, self.clock.local(now), self.on_record);
        self.alive = true;
        self.loaded = false;
        self.draining = false;
        self.complete = self.has.is_superset(&self.plan.wants);
        self.leases.clear();
        self.tickets.clear();
        self.busy_until = now;
        self.wake_at = None;
    }

    /// Its machine is replaced: memory and disk are empty.
    pub(super) fn lose_everything(&mut self) {
        self.has = ChunkSet::empty(self.has.len());
        self.release = 0;
        self.wrong.clear();
        self.accepted.clear();
    }
}

fn node(config: Config, now: Time, on_record: bool) -> Recorded {
    if on_record { Recorded::on_record(config, now) } else { Recorded::new(config, now) }
}

fn config(e: &Expanded, plan: &NodePlan, life: u32, accepted: Vec<SignedRelease>) -> Config {
    let mut seed = [0; 32];
    seed[..4].copy_from_slice(&plan.index.to_le_bytes());
    seed[4] = 1;
    Config {
        identity: NodeSecret::from_seed(seed),
        incarnation: u64::from(life) + 1,
        name: format!("n{}", plan.index),
        version: String::new(),
        labels: plan.nic.rack.map(|r| ("rack".to_string(), r.to_string())).into_iter().collect(),
        channels: vec![(channel(), vec![publisher().public()])],
        accepted,
        said: Vec::new(),
        stands: Vec::new(),
        overrides: Vec::new(),
        leased_bytes_max: LEASED_CHUNKS_MAX * e.chunk_bytes,
        upload_bytes_per_s: plan.nic.upload_cap.map(whole),
        costly: Default::default(),
        seed: e.seed << 32 | u64::from(plan.index) << 8 | u64::from(life),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "`as` saturates")]
fn whole(value: f64) -> u64 {
    value as u64
}

pub(super) fn channel() -> ChannelName {
    "c".parse().expect("it is a channel name")
}

pub(super) fn publisher() -> PublisherSecret {
    PublisherSecret::from_seed([7; 32])
}
