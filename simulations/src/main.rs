//! Runs scenarios and reports them.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)] // The table is what the program is for.

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use simulations::baselines::Baseline;
use simulations::chaos::{self, Trial};
use simulations::outcome::{Outcome, growth_failures};
use simulations::replay::Replayed;
use simulations::report;
use simulations::scenario::{Case, Expanded, Scenario};
use simulations::world::{self, RunOptions};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Thousands of Aquifer nodes in one process, on a modelled network.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one scenario
    Run {
        scenario: PathBuf,
        /// Use this seed instead of the scenario's
        #[arg(long)]
        seed: Option<u64>,
        /// Use this number of pullers instead of the scenario's
        #[arg(long)]
        nodes: Option<u32>,
        /// Use this number of chunks instead of the scenario's; their length stays
        #[arg(long)]
        chunks: Option<u32>,
        /// Run the baselines too
        #[arg(long)]
        baselines: bool,
        /// Run the baselines without the swarm
        #[arg(long, conflicts_with = "baselines")]
        only_baselines: bool,
        /// Record all that node K is told and decides in FILE; of several runs, in the last one
        #[arg(long, num_args = 2, value_names = ["K", "FILE"])]
        record_node: Vec<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Run random small scenarios with random faults, and stop at nothing
    Chaos {
        /// How many to run
        #[arg(long, default_value_t = 1000)]
        seeds: u64,
        /// The first seed
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// Run this seed alone, and tell more of it
        #[arg(long, conflicts_with_all = ["seeds", "from"])]
        seed: Option<u64>,
    },
    /// Run every committed scenario
    All {
        /// Only check that the scenarios can be read and expanded
        #[arg(long)]
        check: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Replay what an agent (`aquifer agent --record`) or a simulated node recorded
    Replay { file: PathBuf },
}

#[derive(Debug, Args)]
struct Common {
    /// Write runs.csv, a CSV of nodes for each run, and a picture for each case here
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The smaller sizes that CI runs
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, Debug)]
struct Strategies {
    swarm: bool,
    baselines: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(failures) if failures.is_empty() => ExitCode::SUCCESS,
        Ok(failures) => {
            failures.iter().for_each(|f| eprintln!("not accepted: {f}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("simulations: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns what was not accepted.
fn run(cli: Cli) -> Result<Vec<String>> {
    match cli.command {
        Command::Run { scenario, seed, nodes, chunks, baselines, only_baselines, record_node, common } => {
            let mut scenario = read(&scenario, &common)?;
            scenario.seeds = seed.map_or(scenario.seeds, |s| vec![s]);
            scenario.sweep.nodes = nodes.map_or(scenario.sweep.nodes, |n| vec![n]);
            scenario.sweep.chunks = chunks.map_or(scenario.sweep.chunks, |c| vec![c]);
            let strategies = Strategies { swarm: !only_baselines, baselines: baselines || only_baselines };
            report_on(&[scenario], strategies, &common, record(&record_node)?)
        }
        Command::Chaos { seed: Some(seed), .. } => Ok(replay(seed)),
        Command::Chaos { seeds, from, seed: None } => Ok(chaos(from, seeds)),
        Command::All { check, common } => {
            let scenarios: Vec<_> = committed()?.iter().map(|path| read(path, &common)).collect::<Result<_>>()?;
            if check {
                return scenarios.iter().try_for_each(expand_all).map(|()| Vec::new());
            }
            report_on(&scenarios, Strategies { swarm: true, baselines: false }, &common, None)
        }
        Command::Replay { file } => {
            let replayed = Replayed::read(&file).with_context(|| file.display().to_string())?;
            // Whoever reads only the first lines has seen what he wanted.
            let _ = writeln!(std::io::stdout(), "{replayed}");
            Ok(replayed.failures())
        }
    }
}

/// Runs seeds, and says on the way which of them fail.
fn chaos(from: u64, seeds: u64) -> Vec<String> {
    let wall = Instant::now();
    let trials = chaos::trials(from, seeds, |trial| {
        for violation in trial.violations() {
            eprintln!("seed {}: {violation}", trial.seed);
        }
    });
    let failed: Vec<&Trial> = trials.iter().filter(|t| !t.violations().is_empty()).collect();
    let outcomes = || trials.iter().filter_map(|t| t.outcome.as_ref().ok());
    let seconds = wall.elapsed().as_secs_f64();
    println!(
        "{} seeds, {} failed; {} nodes, {} events, {} chunk bytes moved; {seconds:.1} s, {:.1} seeds/s",
        trials.len(),
        failed.len(),
        outcomes().map(|o| o.nodes.len()).sum::<usize>(),
        outcomes().map(|o| o.events).sum::<u64>(),
        outcomes().flat_map(|o| &o.nodes).map(|n| n.bytes_down).sum::<u64>(),
        trials.len() as f64 / seconds
    );
    let mut mishaps: BTreeMap<&str, u64> = BTreeMap::new();
    outcomes().flat_map(|o| &o.mishaps).for_each(|(what, count)| *mishaps.entry(*what).or_default() += count);
    let mishaps: Vec<String> = mishaps.iter().map(|(what, count)| format!("{count} {what}")).collect();
    println!("{}", mishaps.join(", "));
    let planted = if cfg!(feature = "planted-bug") { " --features planted-bug" } else { "" };
    let command = format!("cargo run -p simulations --release{planted} -- chaos --seed");
    failed.iter().map(|t| format!("seed {}, replayed by `{command} {}`", t.seed, t.seed)).collect()
}

/// Runs one seed and tells what it stands for and came to.
fn replay(seed: u64) -> Vec<String> {
    println!("{:#?}", chaos::scenario(seed));
    let trial = chaos::trial(seed);
    if let Ok(o) = &trial.outcome {
        let ends = o.last_healthy_s.map_or("never".to_string(), |s| format!("after {s:.6} s"));
        println!("{} nodes, {} events; the last measured node finishes {ends}", o.nodes.len(), o.events);
        println!("{:?}", o.mishaps);
        println!("digest {:016x}", o.digest);
    }
    trial.violations()
}

fn read(path: &Path, common: &Common) -> Result<Scenario> {
    let scenario = Scenario::read(path)?;
    Ok(if common.quick { scenario.quick() } else { scenario })
}

/// The scenarios beside this program's source, by name.
fn committed() -> Result<Vec<PathBuf>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let entries = std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    paths.retain(|p| p.extension().is_some_and(|e| e == "toml"));
    paths.sort();
    if paths.is_empty() {
        bail!("no scenario in {}", dir.display());
    }
    Ok(paths)
}

fn expand_all(scenario: &Scenario) -> Result<()> {
    for case in scenario.cases() {
        scenario.expand(scenario.seeds[0], case).with_context(|| scenario.name.clone())?;
    }
    Ok(())
}

/// Whom to record, and where to.
type Record<'a> = Option<(u32, &'a Path)>;

fn record(words: &[String]) -> Result<Record<'_>> {
    let [node, file] = words else { return Ok(None) };
    let node = node.parse().with_context(|| format!("--record-node {node}: it is a node's number"))?;
    Ok(Some((node, Path::new(file))))
}

fn report_on(
    scenarios: &[Scenario],
    strategies: Strategies,
    common: &Common,
    record: Record<'_>,
) -> Result<Vec<String>> {
    let (mut runs, mut failures) = (Vec::new(), Vec::new());
    for scenario in scenarios {
        let (swarm, others) = run_scenario(scenario, strategies, record)?;
        failures.extend(swarm.iter().flat_map(|r| r.failures(&scenario.accept)));
        failures.extend(growth_failures(&swarm, &scenario.accept).iter().map(|f| format!("{}: {f}", scenario.name)));
        runs.extend(swarm);
        runs.extend(others);
    }
    // A case's runs side by side, as they were run otherwise.
    runs.sort_by_key(|r| (place(scenarios, r), r.seed, r.pullers, r.chunks));
    println!("{}", report::table(&runs));
    if let Some(dir) = &common.out {
        report::write(dir, &runs)?;
    }
    Ok(failures)
}

fn place(scenarios: &[Scenario], run: &Outcome) -> Option<usize> {
    scenarios.iter().position(|s| s.name == run.scenario)
}

/// The swarm's runs and the baselines'.
fn run_scenario(
    scenario: &Scenario,
    strategies: Strategies,
    record: Record<'_>,
) -> Result<(Vec<Outcome>, Vec<Outcome>)> {
    let (mut swarm, mut others) = (Vec::new(), Vec::new());
    for &seed in &scenario.seeds {
        for case in scenario.cases() {
            let expanded = scenario.expand(seed, case).with_context(|| scenario.name.clone())?;
            if strategies.swarm {
                progress(&expanded, case, "swarm");
                let options = RunOptions { progress: true, record_node: record.map(|(node, _)| node) };
                let mut outcome = world::run(&expanded, &options)?;
                eprintln!("{}: digest {:016x}", expanded.scenario, outcome.digest);
                if let Some((node, file)) = record {
                    ensure!(!outcome.recording.is_empty(), "there is no node {node} to record");
                    std::fs::write(file, std::mem::take(&mut outcome.recording))
                        .with_context(|| file.display().to_string())?;
                }
                swarm.push(outcome);
            }
            for baseline in Baseline::ALL.into_iter().filter(|_| strategies.baselines) {
                progress(&expanded, case, baseline.name());
                let skipped = || Outcome::skipped(&expanded, baseline.name());
                others.push(baseline.run(&expanded)?.unwrap_or_else(skipped));
            }
        }
    }
    Ok((swarm, others))
}

fn progress(e: &Expanded, case: Case, strategy: &str) {
    let nodes = case.nodes.map_or_else(|| e.pullers().count().to_string(), |n| n.to_string());
    eprintln!("{}: {strategy}, N={nodes}, {} chunks, seed {}", e.scenario, e.chunks, e.seed);
}
