//! `aquifer drain`: this machine's agent hands over and leaves.

use crate::agent::draining::GRACE_MAX;
use crate::output::{print_json, print_line};
use crate::units;
use anyhow::{Context, Result};
use aquifer_engine::operator::Drain;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Beyond its grace an agent takes some seconds to say goodbye. Guess: long enough for a busy machine.
const GOODBYE: Duration = Duration::from_secs(30);
pub(crate) async fn run(
    config: Option<&Path>,
    grace: Option<&str>,
    socket: Option<PathBuf>,
    json: bool,
) -> Result<ExitCode> {
    let socket = super::release::socket(config, socket)?;
    let grace = grace.map(units::parse_duration).transpose().context("--grace")?;
    let drain = Drain { grace_ms: grace.map(|g| u64::try_from(g.as_millis()).unwrap_or(u64::MAX)) };
    let most = grace.unwrap_or(GRACE_MAX).min(GRACE_MAX) + GOODBYE;
    let asked = tokio::task::spawn_blocking(move || aquifer_engine::request_drain(&socket, &drain, most));
    let drained = asked.await??;
    let whole = drained.as_ref().is_some_and(|drained| drained.whole);
    let sole_chunks = drained.as_ref().map(|drained| drained.sole_chunks);
    let text = match sole_chunks {
        _ if json => {
            return print_json(&json!({"event": "drained", "whole": whole, "sole_chunks": sole_chunks}))
                .map(|_| ExitCode::SUCCESS);
        }
        _ if whole => "drained: others have all that they want of this node".to_string(),
        Some(sole) => format!(
            "left before all was handed over: {sole} chunks that others want have no other copy that is known. \
             Nothing is lost if the publisher or another holder comes back"
        ),
        None => {
            "the agent ended before it had drained, without a word: was it killed, or asked to leave at once?".into()
        }
    };
    print_line(&text)?;
    Ok(ExitCode::SUCCESS)
}
