//! What others do, on the same network: strategies to compare the swarm with.
//!
//! They know everything at once and exchange messages for free, except where a module says
//! otherwise; both favour them. None reacts to faults, so scenarios with faults have no
//! baselines and the table shows "-". They also ignore join times: everyone is there at the start.

mod driver;
mod lockstep;
mod random;
mod trees;

use crate::outcome::Outcome;
use crate::scenario::{Expanded, Role};
use anyhow::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// Every node pulls everything from a complete holder.
    OneHolder,
    /// Seed to first, first to second and so on, each chunk passed on when it has arrived whole.
    Chain,
    /// As the chain, each node passing on to two.
    BinaryTree,
    /// BitTorrent-style: random neighbours, pullers that choose.
    Random,
    /// Bucket after bucket to all ranks, as checkpoint-engine's broadcast.
    Lockstep,
}

impl Baseline {
    pub const ALL: [Baseline; 5] =
        [Baseline::OneHolder, Baseline::Chain, Baseline::BinaryTree, Baseline::Random, Baseline::Lockstep];

    pub fn name(self) -> &'static str {
        match self {
            Baseline::OneHolder => "one-holder",
            Baseline::Chain => "chain",
            Baseline::BinaryTree => "tree-2",
            Baseline::Random => "random",
            Baseline::Lockstep => "lockstep",
        }
    }

    /// None where the strategy makes no sense: faults, or no complete holder.
    pub fn run(self, e: &Expanded) -> Result<Option<Outcome>> {
        let complete = e.nodes.iter().any(|n| n.role != Role::Puller);
        if e.has_faults() || !complete {
            return Ok(None);
        }
        let wall = std::time::Instant::now();
        let mut outcome = match self {
            Baseline::OneHolder => trees::one_holder(e),
            Baseline::Chain => trees::tree(e, 1, self.name()),
            Baseline::BinaryTree => trees::tree(e, 2, self.name()),
            Baseline::Random => random::run(e),
            Baseline::Lockstep => lockstep::run(e),
        }?;
        outcome.wall_s = wall.elapsed().as_secs_f64();
        Ok(Some(outcome))
    }
}
