//! What one run of one strategy came to.

use crate::network::Counters;
use crate::scenario::{Accept, Expanded, Role, lower_bound};
use std::collections::{BTreeMap, BTreeSet};

/// Samples of chunks held that a run keeps; a guess that makes a smooth curve.
pub const SAMPLES: u32 = 200;

#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub scenario: String,
    pub strategy: String,
    pub seed: u64,
    /// Nodes that want something.
    pub pullers: usize,
    pub chunks: u32,
    /// F.
    pub checkpoint_bytes: u64,
    pub lower_bound_s: f64,
    pub nodes: Vec<NodeOutcome>,
    /// None if a healthy node never finished.
    pub last_healthy_s: Option<f64>,
    /// `last_healthy_s` over `lower_bound_s`.
    pub ratio: Option<f64>,
    /// Bytes that seeds and holders uploaded, over F.
    pub seed_uploads: f64,
    /// Bytes that arrived at a node which had them.
    pub duplicate_bytes: u64,
    pub from_seed_bytes: u64,
    pub same_rack_bytes: u64,
    pub across_bytes: u64,
    /// Bytes into racks, over racks times F.
    pub uplink_ratio: Option<f64>,
    /// By which fraction the most crowded link was ever above its capacity: how exact the model's
    /// rates are. That uploads keep to their caps is checked, and a violation if not.
    pub cap_excess: f64,
    pub violations: Vec<String>,
    pub samples: Vec<Sample>,
    pub events: u64,
    /// How often each kind of mishap came about.
    pub mishaps: BTreeMap<&'static str, u64>,
    /// Of all decisions, in order: a run of the same seed has the same.
    pub digest: u64,
    pub wall_s: f64,
    /// What [`RunOptions::record_node`](crate::world::RunOptions::record_node) asked for.
    pub recording: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NodeOutcome {
    pub finished_s: Option<f64>,
    /// Counts for the time of the last node.
    pub healthy: bool,
    pub bytes_down: u64,
    pub bytes_up: u64,
    /// What it wanted and did not have at the start.
    pub wanted_bytes: u64,
}

/// Wanted chunks held by the measured nodes at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    pub at_s: f64,
    pub held: u64,
    pub min: u32,
    pub median: u32,
    pub max: u32,
}

impl Sample {
    /// `held` has one count per node and is sorted on the way.
    pub fn new(at_s: f64, held: &mut [u32]) -> Self {
        held.sort_unstable();
        let at = |i: usize| held.get(i).copied().unwrap_or(0);
        let total = held.iter().map(|&h| u64::from(h)).sum();
        Sample { at_s, held: total, min: at(0), median: at(held.len() / 2), max: at(held.len().saturating_sub(1)) }
    }
}

impl Outcome {
    /// Names the run and fills what follows from the network's counters and the nodes' finish times
    /// (seconds, by node index). The strategy adds samples, violations and costs.
    pub fn new(e: &Expanded, strategy: &str, finished: &[Option<f64>], counters: &Counters) -> Self {
        let node = |n: &crate::scenario::NodePlan| {
            let i = n.index as usize;
            NodeOutcome {
                finished_s: finished[i],
                healthy: n.is_measured(),
                bytes_down: counters.down[i],
                bytes_up: counters.up[i],
                wanted_bytes: e.bytes(&n.missing()),
            }
        };
        let nodes: Vec<NodeOutcome> = e.nodes.iter().map(node).collect();
        let healthy = nodes.iter().filter(|n| n.healthy).map(|n| n.finished_s);
        let last = healthy.collect::<Option<Vec<f64>>>().map(|all| all.into_iter().fold(0.0, f64::max));
        let bound = lower_bound(e);
        let total = e.checkpoint_bytes();
        let sources = e.nodes.iter().filter(|n| n.role != Role::Puller);
        let from_seed: u64 = sources.map(|n| counters.up[n.index as usize]).sum();
        let racked = e.racks.len() as f64 * total as f64;
        Outcome {
            scenario: e.scenario.clone(),
            strategy: strategy.to_string(),
            seed: e.seed,
            pullers: e.pullers().count(),
            chunks: e.chunks,
            checkpoint_bytes: total,
            lower_bound_s: bound,
            last_healthy_s: last,
            ratio: last.map(|l| l / bound),
            seed_uploads: from_seed as f64 / total as f64,
            from_seed_bytes: from_seed,
            same_rack_bytes: counters.same_rack,
            across_bytes: counters.across,
            uplink_ratio: (racked > 0.0).then(|| counters.rack_in.iter().sum::<u64>() as f64 / racked),
            nodes,
            ..Outcome::default()
        }
    }

    /// A strategy that was not run here: a row without figures.
    pub fn skipped(e: &Expanded, strategy: &str) -> Self {
        Outcome {
            scenario: e.scenario.clone(),
            strategy: strategy.to_string(),
            seed: e.seed,
            pullers: e.pullers().count(),
            chunks: e.chunks,
            checkpoint_bytes: e.checkpoint_bytes(),
            lower_bound_s: lower_bound(e),
            ..Outcome::default()
        }
    }

    /// Bytes that measured nodes downloaded over those they needed.
    pub fn bytes_ratio(&self) -> f64 {
        let healthy = || self.nodes.iter().filter(|n| n.healthy);
        let wanted: u64 = healthy().map(|n| n.wanted_bytes).sum();
        healthy().map(|n| n.bytes_down).sum::<u64>() as f64 / wanted.max(1) as f64
    }

    /// What keeps this run from being accepted, one sentence each.
    pub fn failures(&self, accept: &Accept) -> Vec<String> {
        let run = format!("{} N={} chunks={} seed={}", self.scenario, self.pullers, self.chunks, self.seed);
        let mut failures: Vec<String> = self.violations.iter().map(|v| format!("{run}: {v}")).collect();
        let Some((ratio, last)) = self.ratio.zip(self.last_healthy_s) else {
            failures.push(format!("{run}: a healthy node never finished"));
            return failures;
        };
        let bounds = [
            ("ratio", Some(ratio), accept.ratio_max),
            ("uplink ratio", self.uplink_ratio, accept.uplink_ratio_max),
            ("bytes ratio", Some(self.bytes_ratio()), accept.bytes_ratio_max),
            ("cap excess", Some(self.cap_excess), accept.cap_excess_max),
            ("seconds", Some(last), accept.seconds_max),
        ];
        for (what, value, max) in bounds {
            if let (Some(value), Some(max)) = (value, max)
                && value > max
            {
                failures.push(format!("{run}: {what} is {value:.4}, accepted is {max}"));
            }
        }
        failures
    }
}

/// Whether the ratio grows along a sweep: compares, for each seed, the first case with the worst.
pub fn growth_failures(runs: &[Outcome], accept: &Accept) -> Vec<String> {
    let Some(max) = accept.growth_max else { return Vec::new() };
    let seeds: BTreeSet<u64> = runs.iter().map(|r| r.seed).collect();
    let growth = |seed: u64| {
        let mut ratios = runs.iter().filter(|r| r.seed == seed).filter_map(|r| r.ratio);
        let first = ratios.next()?;
        Some((seed, ratios.fold(first, f64::max) / first - 1.0))
    };
    let grown = seeds.into_iter().filter_map(growth).filter(|&(_, g)| g > max);
    grown.map(|(seed, g)| format!("seed {seed}: the ratio grows by {g:.4}, accepted is {max}")).collect()
}
