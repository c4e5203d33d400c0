//! What each command does.

mod agent;
pub(crate) mod bench;
mod demo;
mod demo_engine;
mod doctor;
mod drain;
mod keygen;
mod manifest;
mod publish;
mod pull;
mod release;
mod releases;
mod status;
mod tethered;

use crate::cli::{Cli, Command};
use anyhow::Result;
use std::process::ExitCode;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Not done in the time given.
pub(crate) const EXIT_TIMEOUT: u8 = 3;
/// A release was given up, because too few nodes could take it.
pub(crate) const EXIT_GIVEN_UP: u8 = 5;
/// What was compared or verified differs.
pub(crate) const EXIT_DIFFERENT: u8 = 4;

pub(crate) async fn run(cli: Cli) -> Result<ExitCode> {
    let config = cli.config.as_deref();
    match cli.command {
        Command::Agent { node, agent, operation } => agent::run(config, node, agent, operation).await,
        Command::Publish(args) => publish::run(config, args).await,
        Command::Pull(args) => pull::run(config, args).await,
        Command::Release { command } => release::run(config, command).await,
        Command::Rollback(args) => release::roll_back(config, args).await,
        Command::Releases { channel, socket, json } => releases::run(config, &channel, socket, json).await,
        Command::Drain { grace, socket, json } => drain::run(config, grace.as_deref(), socket, json).await,
        Command::Status { socket, watch, json } => status::run(config, socket, watch, json).await,
        Command::Manifest { command } => manifest::run(command),
        Command::Keygen { command } => keygen::run(command),
        Command::Doctor { json } => doctor::run(json),
        Command::Demo(args) => demo::run(args),
        Command::DemoEngine(args) => demo_engine::run(args),
        Command::Bench(args) => bench::run(args.command).await,
        Command::BenchPart { name } => bench::run_part(name).await,
        Command::Tethered { parent, args } => tethered::run(parent, &args),
    }
}

/// Ctrl-C, or a request to terminate. Made once: from then on neither ends the process by itself,
/// and one that comes while nobody waits is kept.
#[derive(Debug)]
struct StopSignal {
    interrupt: Signal,
    terminate: Signal,
    /// It was asked to terminate, and leaves well.
    drains: bool,
}

/// Which of both it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Interrupt,
    Terminate,
}

impl StopSignal {
    fn new() -> Result<Self> {
        Ok(StopSignal {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            drains: false,
        })
    }

    async fn wait(&mut self) {
        self.which().await;
    }

    async fn which(&mut self) -> Stop {
        tokio::select! {
            _ = self.interrupt.recv() => Stop::Interrupt,
            _ = self.terminate.recv() => Stop::Terminate,
        }
    }
}
