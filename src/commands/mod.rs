//! What each command does.

mod agent;
mod demo;
mod demo_engine;
mod keygen;
mod manifest;
mod publish;
mod pull;
mod status;

use crate::cli::{Cli, Command};
use anyhow::Result;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Not done in the time given.
pub(crate) const EXIT_TIMEOUT: u8 = 3;
/// What was compared or verified differs.
pub(crate) const EXIT_DIFFERENT: u8 = 4;

pub(crate) async fn run(cli: Cli) -> Result<ExitCode> {
    let config = cli.config.as_deref();
    match cli.command {
        Command::Agent { node, agent } => agent::run(config, node, agent).await,
        Command::Publish(args) => publish::run(config, args).await,
        Command::Pull(args) => pull::run(config, args).await,
        Command::Status { socket, watch, json } => status::run(config, socket, watch, json).await,
        Command::Manifest { command } => manifest::run(command),
        Command::Keygen { command } => keygen::run(command),
        Command::Demo(args) => demo::run(args),
        Command::DemoEngine(args) => demo_engine::run(args),
    }
}

/// Waits for Ctrl-C or a request to terminate.
async fn stop_signal() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result?,
        _ = terminate.recv() => {}
    }
    Ok(())
}
