//! The agent's own decisions on the modelled network.

use crate::outcome::Outcome;
use crate::scenario::Expanded;
use anyhow::{Result, bail};

/// What a run may be told besides its scenario.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// Say on stderr how far a long run is.
    pub progress: bool,
}

/// Runs one node of `aquifer_proto` for each node of the scenario.
pub fn run(_expanded: &Expanded, _options: &RunOptions) -> Result<Outcome> {
    bail!("the swarm is not simulated yet")
}
