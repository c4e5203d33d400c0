//! The options of a node: one table, from flags, environment and a TOML file, in that order.

mod agent;
mod defaults;
mod file;
mod node;
mod operation;

pub(crate) use agent::AgentOptions;
pub(crate) use defaults::{default_socket, default_state};
pub(crate) use file::{of_agent, of_passing};
pub(crate) use node::NodeOptions;
pub(crate) use operation::OperationOptions;

use crate::units;
use anyhow::{Context, Result};
use std::time::Duration;

/// Kubernetes kills a pod after 30 s unless told otherwise.
const DRAIN_GRACE: Duration = Duration::from_secs(25);

fn duration(flag: &'static str, text: &str) -> Result<Duration> {
    units::parse_duration(text).context(flag)
}

fn size(flag: &'static str, text: Option<&str>) -> Result<Option<u64>> {
    text.map(units::parse).transpose().context(flag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::reasons;

    #[test]
    fn a_size_that_is_none_names_its_flag() {
        let error = size("--store-limit", Some("4 parsecs")).expect_err("parsecs are long");
        assert!(reasons(&error).starts_with("--store-limit: '4 parsecs'"), "{error:#}");
    }
}
