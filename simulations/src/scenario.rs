//! Scenarios: what a TOML file says, read strictly.
//!
//! Units are in the names; one Gbit/s is 10^9 bits per second, one GByte/s 10^9 bytes.
//! [`Scenario::cases`] gives the sizes to run, [`Scenario::expand`] the nodes of one of them.

mod bound;
mod expand;

pub use bound::lower_bound;
pub use expand::{Expanded, FaultPlan, NodePlan, Partition};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::path::Path;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub name: String,
    pub description: String,
    pub seeds: Vec<u64>,
    pub checkpoint: Checkpoint,
    pub nodes: Vec<Group>,
    #[serde(default)]
    pub network: NetworkModel,
    pub racks: Option<Racks>,
    #[serde(default)]
    pub faults: Faults,
    #[serde(default)]
    pub sweep: Sweep,
    #[serde(default)]
    pub accept: Accept,
    pub quick: Option<Quick>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    pub chunks: u32,
    pub chunk_kib: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Publishes: has everything at the start.
    Seed,
    /// Serves an engine and has everything at the start.
    Holder,
    Puller,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    pub count: u32,
    pub role: Role,
    pub up_gbit_per_s: f64,
    pub down_gbit_per_s: f64,
    pub landing_gbyte_per_s: Option<f64>,
    pub upload_cap_gbit_per_s: Option<f64>,
    #[serde(default)]
    pub join_ms: f64,
    /// Joins are spread evenly at random over this long after `join_ms`.
    #[serde(default)]
    pub join_spread_ms: f64,
    #[serde(default)]
    pub wants: Wants,
    /// The same chunks, spread evenly over the checkpoint, that each node of the group has already.
    #[serde(default)]
    pub has_fraction: f64,
    /// Node k of the group has slice k modulo this of the checkpoint.
    pub has_slices: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wants {
    #[default]
    All,
    /// The first `common` of the chunks, and slice k modulo `of` of the rest for the group's node k.
    #[serde(untagged)]
    Slice(Slice),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    pub of: u32,
    #[serde(default)]
    pub common: f64,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkModel {
    pub latency_us: f64,
    /// CPU time that a message costs its receiver.
    pub message_us: f64,
    pub message_loss: f64,
    pub gossip_loss: f64,
    pub gossip_hop_ms: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Racks {
    pub count: u32,
    pub uplink_gbit_per_s: f64,
    pub placement: Placement,
}

/// How nodes that are not seeds are dealt to racks. Seeds stand in the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    Blocks,
    RoundRobin,
}

/// Fractions are of the pullers.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    pub corrupt_fraction: f64,
    pub crash_fraction: f64,
    /// From and to, as fractions of the lower bound.
    pub crash_at: [f64; 2],
    pub restart_after_ms: Option<f64>,
    /// How often, of its restarts, a node finds nothing of what it held.
    pub restart_loses: f64,
    pub slow_fraction: f64,
    /// What is left of a slow node's rates.
    pub slow_factor: f64,
    /// When slow nodes become slow and for how long; from the start and for ever if absent.
    pub slow: Option<Span>,
    pub stall_fraction: f64,
    /// When stalling nodes stop uploading and for how long; as `slow`.
    pub stall: Option<Span>,
    /// Nodes that hear asks and grant nothing.
    pub mute_fraction: f64,
    pub mute: Option<Span>,
    pub partition: Option<PartitionModel>,
    /// The first seed dies when it has uploaded this many times the checkpoint.
    pub seed_dies_after_uploads: Option<f64>,
    /// Pullers that crash or leave, and come back later with what they held or nothing.
    pub churn_per_s: f64,
    /// How long a puller that left stays away, at most.
    pub churn_away_ms: f64,
    /// Pullers that drain, leave when that is over, and come back as those that churn.
    pub drains_per_s: f64,
    /// The first node, a seed, drains then and leaves for good when that is over.
    pub seed_drains_ms: Option<f64>,
    /// Nodes, seeds excepted, whose engine writes over chunks that they serve.
    pub overwrites_per_s: f64,
    /// Rates (churn, drains, overwrites, lost messages and lost gossip) are those of faults until then;
    /// lost messages and gossip for ever if absent.
    pub until_ms: Option<f64>,
    /// Each node's clock is off by up to this, either way.
    pub clock_skew_ms: f64,
    /// Each node's clock runs fast or slow by up to this, in millionths.
    pub clock_drift_ppm: f64,
    /// A second release, which supersedes the first.
    pub update: Option<UpdateModel>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    pub at_ms: f64,
    /// For ever if absent.
    pub for_ms: Option<f64>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateModel {
    pub at_ms: f64,
    /// Chunks that differ from the first release's.
    pub changed_fraction: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionModel {
    pub at_ms: f64,
    pub for_ms: f64,
    pub fraction: f64,
}

/// Sizes that replace the first puller group's count and the checkpoint's chunks, each by each.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sweep {
    pub nodes: Vec<u32>,
    pub chunks: Vec<u32>,
}

/// What a run must reach. A bound that is absent is not checked.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Accept {
    /// Last healthy node, over the lower bound.
    pub ratio_max: Option<f64>,
    /// By which fraction the ratio may grow from the sweep's first case to its worst.
    pub growth_max: Option<f64>,
    /// Bytes into racks, over racks times checkpoint.
    pub uplink_ratio_max: Option<f64>,
    /// Bytes that healthy nodes downloaded, over what they needed.
    pub bytes_ratio_max: Option<f64>,
    pub cap_excess_max: Option<f64>,
    /// Seconds to the last healthy node.
    pub seconds_max: Option<f64>,
}

/// Smaller sizes for CI.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quick {
    pub chunks: Option<u32>,
    pub sweep: Option<Sweep>,
    pub seeds: Option<Vec<u64>>,
    /// A small run is further from the bound: its own limits.
    pub accept: Option<Accept>,
}

/// One size of a scenario's sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Case {
    pub nodes: Option<u32>,
    pub chunks: Option<u32>,
}

impl Scenario {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{}", path.display()))
    }

    pub fn parse(text: &str) -> Result<Self> {
        let scenario: Scenario = toml::from_str(text)?;
        scenario.check()?;
        Ok(scenario)
    }

    /// The scenario with its `quick` table applied.
    pub fn quick(mut self) -> Self {
        let quick = self.quick.take().unwrap_or_default();
        self.checkpoint.chunks = quick.chunks.unwrap_or(self.checkpoint.chunks);
        self.sweep = quick.sweep.unwrap_or(self.sweep);
        self.seeds = quick.seeds.unwrap_or(self.seeds);
        self.accept = quick.accept.unwrap_or(self.accept);
        self
    }

    pub fn cases(&self) -> Vec<Case> {
        let each = |sizes: &[u32]| match sizes {
            [] => vec![None],
            sizes => sizes.iter().copied().map(Some).collect(),
        };
        let chunks = each(&self.sweep.chunks);
        each(&self.sweep.nodes)
            .into_iter()
            .flat_map(|n| chunks.iter().map(move |&c| Case { nodes: n, chunks: c }))
            .collect()
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.seeds.is_empty(), "seeds: at least one");
        ensure!(self.checkpoint.chunks > 0 && self.checkpoint.chunk_kib > 0, "checkpoint: must have bytes");
        ensure!(!self.sweep.nodes.contains(&0) && !self.sweep.chunks.contains(&0), "sweep: sizes are above zero");
        self.nodes.iter().enumerate().try_for_each(|(i, g)| g.check().with_context(|| format!("nodes[{i}]")))?;
        ensure!(self.racks.is_none_or(|r| r.count > 0 && r.uplink_gbit_per_s > 0.0), "racks: must be above zero");
        self.faults.check().context("faults")?;
        fraction("network.message_loss", self.network.message_loss)?;
        fraction("network.gossip_loss", self.network.gossip_loss)
    }
}

impl Group {
    fn check(&self) -> Result<()> {
        ensure!(self.up_gbit_per_s > 0.0 && self.down_gbit_per_s > 0.0, "up_ and down_gbit_per_s: above zero");
        ensure!(self.landing_gbyte_per_s.is_none_or(|l| l > 0.0), "landing_gbyte_per_s: above zero");
        ensure!(self.upload_cap_gbit_per_s.is_none_or(|c| c > 0.0), "upload_cap_gbit_per_s: above zero");
        ensure!(self.join_ms >= 0.0 && self.join_spread_ms >= 0.0, "join_ms, join_spread_ms: not negative");
        ensure!(self.has_slices != Some(0), "has_slices: above zero");
        if let Wants::Slice(slice) = &self.wants {
            ensure!(slice.of > 0, "wants.of: above zero");
            fraction("wants.common", slice.common)?;
        }
        fraction("has_fraction", self.has_fraction)
    }
}

impl Faults {
    fn check(&self) -> Result<()> {
        let all = [
            ("corrupt_fraction", self.corrupt_fraction),
            ("crash_fraction", self.crash_fraction),
            ("slow_fraction", self.slow_fraction),
            ("slow_factor", self.slow_factor),
            ("stall_fraction", self.stall_fraction),
            ("mute_fraction", self.mute_fraction),
            ("restart_loses", self.restart_loses),
            ("update.changed_fraction", self.update.map_or(0.0, |u| u.changed_fraction)),
            ("partition.fraction", self.partition.map_or(0.0, |p| p.fraction)),
        ];
        all.into_iter().try_for_each(|(name, value)| fraction(name, value))?;
        ensure!(self.slow_fraction == 0.0 || self.slow_factor > 0.0, "slow_factor: missing");
        ensure!(0.0 <= self.crash_at[0] && self.crash_at[0] <= self.crash_at[1], "crash_at: from, to");
        let kinds = self.corrupt_fraction + self.crash_fraction + self.slow_fraction + self.stall_fraction;
        ensure!(kinds + self.mute_fraction <= 1.0, "more faulty nodes than nodes");
        let ends = self.until_ms.is_some() || (self.churn_per_s == 0.0 && self.overwrites_per_s == 0.0);
        ensure!(ends, "until_ms: missing; churn and overwrites must end");
        ensure!(self.clock_drift_ppm.abs() < 1e5, "clock_drift_ppm: a clock that is off by a tenth is broken");
        Ok(())
    }
}

fn fraction(name: &str, value: f64) -> Result<()> {
    ensure!((0.0..=1.0).contains(&value), "{name}: {value} is not between 0 and 1");
    Ok(())
}
