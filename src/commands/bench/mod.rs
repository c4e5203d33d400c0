//! `aquifer bench`: what this machine can do and how near Aquifer comes to it, in one run.
//!
//! The command starts this program again for every process that a bench consists of (see `part`),
//! tells them what to do and what to measure by turns (`lab`), and reports (`report`). Nothing is
//! measured in the process that people started. Limits are measured by code that shares nothing
//! with what they are the limits of.

pub(crate) mod args;
mod content;
mod cores;
mod disk;
mod echo;
mod ends;
mod figures;
mod files;
mod gossip;
mod gpu;
mod lab;
mod limits;
mod machine;
mod part;
mod publish;
mod report;
mod swarm;
mod transfer;
mod wire;

use super::StopSignal;
use crate::errors::reasons;
use crate::output::{print_json, print_line, tell};
use anyhow::{Context, Result};
use args::{BenchCommand, Card, Common, Size};
use lab::{Lab, Stop};
use machine::Machine;
use report::Report;
use std::process::ExitCode;
use transfer::{Destination, Kind, Origin};

pub(crate) async fn run(command: BenchCommand) -> Result<ExitCode> {
    let mut signal = StopSignal::new()?;
    let stop = Stop::default();
    let asked = stop.clone();
    let mut bench = tokio::task::spawn_blocking(move || run_all(&command, &asked));
    let ended = tokio::select! {
        ended = &mut bench => ended,
        () = signal.wait() => {
            stop.now();
            bench.await
        }
    };
    ended.context("a bench panicked")?
}

/// One process of a bench.
pub(crate) async fn run_part(name: String) -> Result<ExitCode> {
    tokio::task::spawn_blocking(move || part::run(&name)).await.context("a part of a bench panicked")?
}

fn run_all(command: &BenchCommand, stop: &Stop) -> Result<ExitCode> {
    let common = command.common();
    let machine = Machine::here();
    if !common.json {
        print_line(&machine.text())?;
    }
    if cfg!(debug_assertions) {
        tell("this is a debug build: its figures say nothing");
    }
    let (mut reports, mut failures) = (Vec::new(), Vec::new());
    for (name, bench) in command.benches() {
        // A lab for each, so that nothing of one bench is there when the next is measured.
        let result = Lab::open(common.dir.as_deref(), common.runs, stop.clone()).and_then(|lab| bench(&lab));
        stop.check()?;
        match result {
            Ok(report) => {
                if !common.json {
                    print_line(&format!("\n{}", report.text()))?;
                }
                reports.push(report);
            }
            Err(error) => {
                let failure = format!("{name}: {}", reasons(&error));
                tell(&format!("aquifer: bench {failure}"));
                failures.push(failure);
            }
        }
    }
    if common.json {
        print_json(&report::document(&machine, &reports, &failures))?;
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

type Bench<'a> = (&'static str, Box<dyn Fn(&Lab) -> Result<Report> + 'a>);

impl BenchCommand {
    fn common(&self) -> &Common {
        match self {
            BenchCommand::Limits { common, .. }
            | BenchCommand::Publish { common, .. }
            | BenchCommand::Swarm { common, .. }
            | BenchCommand::Gossip { common, .. }
            | BenchCommand::Gpu { common, .. }
            | BenchCommand::All { common, .. } => common,
            BenchCommand::Transfer(transfer) => &transfer.common,
        }
    }

    fn benches(&self) -> Vec<Bench<'_>> {
        match self {
            BenchCommand::Limits { card, size, .. } => vec![limits_of(*card, *size)],
            BenchCommand::Transfer(args) => vec![("transfer", Box::new(|lab: &Lab| transfer::run(lab, args)))],
            BenchCommand::Publish { path, size, .. } => {
                vec![("publish", Box::new(|lab: &Lab| publish::run(lab, path.as_deref(), *size)))]
            }
            BenchCommand::Swarm { nodes, size, .. } => vec![swarm_of(*nodes, *size)],
            BenchCommand::Gossip { seconds, .. } => vec![gossip_of(*seconds)],
            BenchCommand::Gpu { card, size, .. } => vec![gpu_of(*card, *size)],
            BenchCommand::All { card, seconds, size, common } => [
                limits_of(*card, *size),
                transfer_of(Kind::Tcp, common, *size),
                transfer_of(Kind::Tls, common, *size),
                transfer_of(Kind::Shm, common, *size),
                ("transfer", Box::new(|lab: &Lab| transfer::run(lab, &between_stores(common, *size)))),
                ("publish", Box::new(|lab: &Lab| publish::run(lab, None, *size))),
                swarm_of(args::NODES, *size),
                gossip_of(*seconds),
            ]
            .into_iter()
            .chain(gpu_if_there(*card, *size))
            .collect(),
        }
    }
}

fn limits_of<'a>(card: Card, size: Size) -> Bench<'a> {
    ("limits", Box::new(move |lab: &Lab| limits::run(lab, &card, size)))
}

fn gpu_of<'a>(card: Card, size: Size) -> Bench<'a> {
    ("gpu", Box::new(move |lab: &Lab| gpu::run(lab, &card, size)))
}

/// Whoever asks for all asks for what there is, and by name for that.
fn gpu_if_there<'a>(card: Card, size: Size) -> Option<Bench<'a>> {
    match gpu::Chosen::of(&card) {
        Err(reason) if !card.is_named() => {
            tell(&format!("gpu is left out: {reason}"));
            None
        }
        _ => Some(gpu_of(card, size)),
    }
}

fn transfer_of(kind: Kind, common: &Common, size: Size) -> Bench<'_> {
    let args = args::Transfer::of(kind, Origin::Memory, Destination::Region, common.clone(), size);
    ("transfer", Box::new(move |lab: &Lab| transfer::run(lab, &args)))
}

fn between_stores(common: &Common, size: Size) -> args::Transfer {
    args::Transfer::of(Kind::Shm, Origin::Store, Destination::Store, common.clone(), size)
}

fn swarm_of<'a>(nodes: u16, size: Size) -> Bench<'a> {
    ("swarm", Box::new(move |lab: &Lab| swarm::run(lab, nodes, size)))
}

fn gossip_of<'a>(seconds: u64) -> Bench<'a> {
    ("gossip", Box::new(move |lab: &Lab| gossip::run(lab, seconds)))
}
