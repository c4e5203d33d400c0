//! From a scenario, a size and a seed to a concrete list of nodes.

use super::{Case, Faults, Group, NetworkModel, Placement, Racks, Role, Scenario, Span, Wants, lower_bound};
use crate::network::{Nic, RackLink};
use anyhow::{Result, ensure};
use aquifer_core::{ChunkSet, Time};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::time::Duration;

const BYTES_PER_GBIT: f64 = 1e9 / 8.0;

#[derive(Clone, Debug)]
pub struct Expanded {
    pub scenario: String,
    pub seed: u64,
    pub case: Case,
    pub chunks: u32,
    pub chunk_bytes: u64,
    pub nodes: Vec<NodePlan>,
    pub racks: Vec<RackLink>,
    pub network: NetworkModel,
    pub partition: Option<Partition>,
    /// Bytes after which the first seed dies.
    pub seed_dies_after_bytes: Option<u64>,
    /// What happens at random while the run lasts is drawn from these.
    pub faults: Faults,
    /// From then on nothing goes wrong any more, except for what is wrong for ever.
    pub faults_end: Time,
}

#[derive(Clone, Debug)]
pub struct NodePlan {
    pub index: u32,
    pub role: Role,
    /// With its rates already lowered if the node is slow from the start.
    pub nic: Nic,
    pub join: Time,
    /// Everything the node is to have in the end, what it has already included.
    pub wants: ChunkSet,
    pub has: ChunkSet,
    pub fault: FaultPlan,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FaultPlan {
    pub corrupt: bool,
    pub slow: bool,
    /// When it becomes slow, if not at the start.
    pub slow_span: Option<(Time, Option<Time>)>,
    /// Crashes at some time; `crash_at` says when.
    pub crashes: bool,
    pub crash_at: Option<Time>,
    pub restart_at: Option<Time>,
    pub stall_at: Option<Time>,
    pub stall_until: Option<Time>,
    pub mute: Option<(Time, Option<Time>)>,
    /// On the small side of the partition.
    pub cut_off: bool,
    pub clock_skew_ms: f64,
    pub clock_drift_ppm: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    pub from: Time,
    pub until: Time,
}

impl NodePlan {
    /// Nothing is wrong with it, so it must finish in time.
    pub fn is_healthy(&self) -> bool {
        let FaultPlan { corrupt, slow, crashes, stall_at, mute, .. } = self.fault;
        !corrupt && !slow && !crashes && stall_at.is_none() && mute.is_none()
    }

    /// A node that others' time is measured by: a healthy one that needs something.
    pub fn is_measured(&self) -> bool {
        self.is_healthy() && !self.missing().is_empty()
    }

    pub fn missing(&self) -> ChunkSet {
        let mut missing = self.wants.clone();
        missing.subtract(&self.has);
        missing
    }

    /// Bytes per second of good data it can add to the swarm.
    pub fn useful_up(&self) -> f64 {
        let useful = !self.fault.corrupt && self.fault.stall_at.is_none();
        if useful { self.nic.upload_cap.map_or(self.nic.up, |c| c.min(self.nic.up)) } else { 0.0 }
    }

    /// Bytes per second it can take in and put in place.
    pub fn useful_down(&self) -> f64 {
        self.nic.landing.map_or(self.nic.down, |l| l.min(self.nic.down))
    }
}

impl Expanded {
    pub fn checkpoint_bytes(&self) -> u64 {
        u64::from(self.chunks) * self.chunk_bytes
    }

    pub fn bytes(&self, set: &ChunkSet) -> u64 {
        u64::from(set.count()) * self.chunk_bytes
    }

    pub fn pullers(&self) -> impl Iterator<Item = &NodePlan> {
        self.nodes.iter().filter(|n| n.role == Role::Puller)
    }

    pub fn has_faults(&self) -> bool {
        let leaves = self.seed_dies_after_bytes.is_some() || self.faults.seed_drains_ms.is_some();
        let dies = leaves || self.partition.is_some();
        let faults = &self.faults;
        let at_random =
            [faults.churn_per_s, faults.drains_per_s, faults.overwrites_per_s].iter().any(|rate| *rate > 0.0);
        dies || at_random || self.nodes.iter().any(|n| !n.is_healthy())
    }

    /// Nothing goes wrong but that nodes are asked to leave.
    pub fn only_drains(&self) -> bool {
        let calm = Faults { drains_per_s: 0.0, seed_drains_ms: None, until_ms: None, ..self.faults };
        let calm = Expanded { faults: calm, ..self.clone() };
        !calm.has_faults() && self.network.message_loss == 0.0
    }
}

impl Scenario {
    pub fn expand(&self, seed: u64, case: Case) -> Result<Expanded> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let chunks = case.chunks.unwrap_or(self.checkpoint.chunks);
        let mut nodes = Vec::new();
        let sweep_group = self.nodes.iter().position(|g| g.role == Role::Puller);
        for (g, group) in self.nodes.iter().enumerate() {
            let count = case.nodes.filter(|_| Some(g) == sweep_group).unwrap_or(group.count);
            for k in 0..count {
                nodes.push(node(group, k, u32::try_from(nodes.len())?, chunks, &mut rng));
            }
        }
        ensure!(nodes.iter().any(|n| !n.has.is_empty()), "nodes: nobody has anything at the start");
        let racks = self.racks.map_or(Vec::new(), |racks| place(&mut nodes, racks));
        let faults = &self.faults;
        deal_faults(&mut nodes, faults, &mut rng);
        let partition = faults.partition.map(|p| Partition { from: ms(p.at_ms), until: ms(p.at_ms + p.for_ms) });
        let chunk_bytes = self.checkpoint.chunk_kib * 1024;
        let total = u64::from(chunks) as f64 * chunk_bytes as f64;
        let mut expanded = Expanded {
            scenario: self.name.clone(),
            seed,
            case,
            chunks,
            chunk_bytes,
            nodes,
            racks,
            network: self.network,
            partition,
            seed_dies_after_bytes: faults.seed_dies_after_uploads.map(|f| whole(f * total)),
            faults: *faults,
            faults_end: Time::ZERO,
        };
        let bound = lower_bound(&expanded);
        time_crashes(&mut expanded.nodes, faults, bound, &mut rng);
        expanded.faults_end = faults_end(&expanded);
        Ok(expanded)
    }
}

fn node(group: &Group, k: u32, index: u32, chunks: u32, rng: &mut SmallRng) -> NodePlan {
    let nic = Nic {
        up: group.up_gbit_per_s * BYTES_PER_GBIT,
        down: group.down_gbit_per_s * BYTES_PER_GBIT,
        upload_cap: group.upload_cap_gbit_per_s.map(|c| c * BYTES_PER_GBIT),
        rack: None,
        landing: group.landing_gbyte_per_s.map(|l| l * 1e9),
    };
    let join = group.join_ms + rng.random::<f64>() * group.join_spread_ms;
    let (wants, has) = match group.role {
        Role::Seed | Role::Holder => (ChunkSet::full(chunks), ChunkSet::full(chunks)),
        Role::Puller => (wanted(&group.wants, k, chunks), held(group, k, chunks)),
    };
    NodePlan { index, role: group.role, nic, join: ms(join), wants, has, fault: FaultPlan::default() }
}

fn wanted(wants: &Wants, k: u32, chunks: u32) -> ChunkSet {
    let slice = match wants {
        Wants::All => return ChunkSet::full(chunks),
        Wants::Slice(slice) => slice,
    };
    let common = part(chunks, slice.common);
    let (from, until) = slice_of(chunks - common, k % slice.of, slice.of);
    ChunkSet::from_indices(chunks, (0..common).chain(common + from..common + until))
}

/// What a group's node has at the start. Held chunks are spread evenly over the checkpoint.
fn held(group: &Group, k: u32, chunks: u32) -> ChunkSet {
    let kept = |i: u32| part(i + 1, group.has_fraction) > part(i, group.has_fraction);
    let mut has = ChunkSet::from_indices(chunks, (0..chunks).filter(|&i| kept(i)));
    if let Some(of) = group.has_slices {
        let (from, until) = slice_of(chunks, k % of, of);
        has.union_with(&ChunkSet::from_indices(chunks, from..until));
    }
    has
}

fn slice_of(chunks: u32, k: u32, of: u32) -> (u32, u32) {
    let edge = |k: u32| u32::try_from(u64::from(chunks) * u64::from(k) / u64::from(of)).expect("below chunks");
    (edge(k), edge(k + 1))
}

fn place(nodes: &mut [NodePlan], racks: Racks) -> Vec<RackLink> {
    let others = nodes.iter().filter(|n| n.role != Role::Seed).count();
    let per_rack = u32::try_from(others).expect("nodes are numbered in u32").div_ceil(racks.count).max(1);
    for n in nodes.iter_mut().filter(|n| n.role == Role::Seed) {
        n.nic.rack = Some(0);
    }
    for (i, n) in (0u32..).zip(nodes.iter_mut().filter(|n| n.role != Role::Seed)) {
        n.nic.rack = Some(match racks.placement {
            Placement::Blocks => i / per_rack,
            Placement::RoundRobin => i % racks.count,
        });
    }
    let rate = racks.uplink_gbit_per_s * BYTES_PER_GBIT;
    vec![RackLink { up: rate, down: rate }; racks.count as usize]
}

/// Each faulty puller has one fault; who is cut off by a partition is drawn apart from that.
fn deal_faults(nodes: &mut [NodePlan], faults: &Faults, rng: &mut SmallRng) {
    let mut pullers: Vec<usize> = (0..nodes.len()).filter(|&i| nodes[i].role == Role::Puller).collect();
    pullers.shuffle(rng);
    let count = |fraction: f64| part(u32::try_from(pullers.len()).expect("nodes are numbered in u32"), fraction);
    let mut order = pullers.iter().copied();
    for i in order.by_ref().take(count(faults.corrupt_fraction) as usize) {
        nodes[i].fault.corrupt = true;
    }
    for i in order.by_ref().take(count(faults.crash_fraction) as usize) {
        nodes[i].fault.crashes = true;
    }
    for i in order.by_ref().take(count(faults.slow_fraction) as usize) {
        nodes[i].fault.slow = true;
        nodes[i].fault.slow_span = faults.slow.map(times);
        if faults.slow.is_none() {
            nodes[i].nic.up *= faults.slow_factor;
            nodes[i].nic.down *= faults.slow_factor;
        }
    }
    for i in order.by_ref().take(count(faults.stall_fraction) as usize) {
        let (at, until) = faults.stall.map_or((nodes[i].join, None), times);
        (nodes[i].fault.stall_at, nodes[i].fault.stall_until) = (Some(at), until);
    }
    for i in order.take(count(faults.mute_fraction) as usize) {
        nodes[i].fault.mute = Some(faults.mute.map_or((nodes[i].join, None), times));
    }
    let cut = faults.partition.map_or(0, |p| count(p.fraction) as usize);
    for &i in pullers.iter().rev().take(cut) {
        nodes[i].fault.cut_off = true;
    }
    for n in nodes {
        let off = 2.0 * rng.random::<f64>() - 1.0;
        n.fault.clock_skew_ms = off * faults.clock_skew_ms;
        // Neighbours in the list run apart: who is ahead is not who is fast.
        n.fault.clock_drift_ppm = if n.index % 2 == 0 { off } else { -off } * faults.clock_drift_ppm;
    }
}

fn times(span: Span) -> (Time, Option<Time>) {
    (ms(span.at_ms), span.for_ms.map(|f| ms(span.at_ms + f)))
}

/// The last moment at which something that ends or happens once ends or happens.
fn faults_end(e: &Expanded) -> Time {
    let of = |n: &NodePlan| {
        let f = n.fault;
        let begins = [f.crash_at, f.restart_at, f.stall_at, f.slow_span.map(|s| s.0), f.mute.map(|s| s.0)];
        let ends = [f.stall_until, f.slow_span.and_then(|s| s.1), f.mute.and_then(|s| s.1)];
        begins.into_iter().chain(ends).flatten().max()
    };
    let rates = e.faults.until_ms.map(ms);
    let update = e.faults.update.map(|u| ms(u.at_ms));
    let drain = e.faults.seed_drains_ms.map(ms);
    let whole = [e.partition.map(|p| p.until), rates, update, drain].into_iter().flatten();
    e.nodes.iter().filter_map(of).chain(whole).max().unwrap_or_default()
}

fn time_crashes(nodes: &mut [NodePlan], faults: &Faults, bound: f64, rng: &mut SmallRng) {
    let [from, to] = faults.crash_at;
    for n in nodes.iter_mut().filter(|n| n.fault.crashes) {
        let at = ms(1e3 * bound * (from + (to - from) * rng.random::<f64>())).max(n.join);
        n.fault.crash_at = Some(at);
        n.fault.restart_at = faults.restart_after_ms.map(|after| at + ms(after).since(Time::ZERO));
    }
}

/// Rounded down; a float's product may be a hair below the whole number that is meant.
fn part(count: u32, fraction: f64) -> u32 {
    u32::try_from(whole(f64::from(count) * fraction + 1e-9)).unwrap_or(u32::MAX)
}

fn ms(value: f64) -> Time {
    Time::from_origin(Duration::from_secs_f64(value / 1e3))
}

#[expect(clippy::cast_possible_truncation, reason = "`as` saturates")]
fn whole(value: f64) -> u64 {
    value as u64
}
