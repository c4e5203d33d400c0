//! Random small scenarios with random faults, each from one seed: where everything may go wrong at
//! once, every check of `world` must stay silent, and everybody must finish once the faults end.

use crate::outcome::Outcome;
use crate::scenario::{
    Accept, Case, Checkpoint, Faults, Group, NetworkModel, PartitionModel, Placement, Racks, Role, Scenario, Slice,
    Span, Sweep, UpdateModel, Wants,
};
use crate::world::{self, RunOptions};
use anyhow::Result;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What one seed came to: its run, or the panic or error that ended it.
#[derive(Debug)]
pub struct Trial {
    pub seed: u64,
    pub outcome: Result<Outcome, String>,
}

impl Trial {
    pub fn violations(&self) -> Vec<String> {
        match &self.outcome {
            Ok(outcome) => outcome.violations.clone(),
            Err(error) => vec![error.clone()],
        }
    }
}

/// Runs one seed.
pub fn trial(seed: u64) -> Trial {
    let run =
        || -> Result<Outcome> { world::run(&scenario(seed).expand(seed, Case::default())?, &RunOptions::default()) };
    let outcome = match std::panic::catch_unwind(run) {
        Ok(outcome) => outcome.map_err(|e| format!("{e:#}")),
        Err(panic) => Err(format!("panics: {}", words(panic.as_ref()))),
    };
    Trial { seed, outcome }
}

/// Runs seeds on all cores; each run is one thread's own. Returns the trials in order.
pub fn trials(from: u64, seeds: u64, each: impl Fn(&Trial) + Sync) -> Vec<Trial> {
    let (next, done) = (AtomicU64::new(from), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= from + seeds {
                return;
            }
            let trial = trial(seed);
            each(&trial);
            done.lock().unwrap_or_else(|e| e.into_inner()).push(trial);
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    let mut trials = done.into_inner().unwrap_or_else(|e| e.into_inner());
    trials.sort_by_key(|t| t.seed);
    trials
}

fn words(panic: &(dyn std::any::Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a word")
}

/// The scenario that a seed stands for.
pub fn scenario(seed: u64) -> Scenario {
    let mut dice = Dice(SmallRng::seed_from_u64(seed ^ 0xc4a0_5c4a));
    let checkpoint = Checkpoint { chunks: dice.0.random_range(16..=256), chunk_kib: dice.log_whole(64, 8192).into() };
    let bytes = f64::from(checkpoint.chunks) * checkpoint.chunk_kib as f64 * 1024.0;
    // One seed's upload of everything takes from a blink to long enough for much to happen.
    let alone_s = dice.log(0.05, 3.0);
    let gbit_per_s = bytes * 8.0 / alone_s / 1e9;
    let faults_ms = 1e3 * alone_s * dice.between(0.5, 4.0);
    let seeds = dice.0.random_range(1..=2);
    let mut nodes = vec![dice.group(Role::Seed, seeds, gbit_per_s, faults_ms)];
    if dice.chance(0.3) {
        let count = dice.0.random_range(1..=2);
        nodes.push(dice.group(Role::Holder, count, gbit_per_s, faults_ms));
    }
    let pullers = dice.log_whole(4, 40);
    let first = if dice.chance(0.5) { pullers } else { dice.0.random_range(1..pullers) };
    for count in [first, pullers - first].into_iter().filter(|c| *c > 0) {
        nodes.push(dice.group(Role::Puller, count, gbit_per_s, faults_ms));
    }
    let racks = dice.chance(0.3).then(|| Racks {
        count: dice.0.random_range(2..=4),
        uplink_gbit_per_s: gbit_per_s * dice.log(0.3, 4.0),
        placement: if dice.chance(0.5) { Placement::Blocks } else { Placement::RoundRobin },
    });
    Scenario {
        name: "chaos".to_string(),
        description: format!("drawn from seed {seed}"),
        seeds: vec![seed],
        checkpoint,
        nodes,
        network: dice.network(),
        racks,
        faults: dice.faults(faults_ms, seeds),
        sweep: Sweep::default(),
        accept: Accept::default(),
        quick: None,
    }
}

struct Dice(SmallRng);

impl Dice {
    fn chance(&mut self, p: f64) -> bool {
        self.0.random_bool(p)
    }

    fn between(&mut self, from: f64, to: f64) -> f64 {
        from + (to - from) * self.0.random::<f64>()
    }

    /// Small values are as likely as large ones.
    fn log(&mut self, from: f64, to: f64) -> f64 {
        (self.between(from.ln(), to.ln())).exp()
    }

    #[expect(clippy::cast_possible_truncation, reason = "it lies between two of its kind")]
    fn log_whole(&mut self, from: u32, to: u32) -> u32 {
        self.log(f64::from(from), f64::from(to) + 1.0) as u32
    }

    /// Zero with one chance in two.
    fn maybe(&mut self, from: f64, to: f64) -> f64 {
        if self.chance(0.5) { self.log(from, to) } else { 0.0 }
    }

    fn group(&mut self, role: Role, count: u32, gbit_per_s: f64, within_ms: f64) -> Group {
        let wild = self.chance(0.4);
        let mut rate = || if wild { gbit_per_s * self.log(0.1, 10.0) } else { gbit_per_s };
        let (up, down) = (rate(), rate());
        let puller = role == Role::Puller;
        let slice = Slice { of: self.0.random_range(2..=4), common: self.between(0.0, 0.5) };
        Group {
            count,
            role,
            up_gbit_per_s: up,
            down_gbit_per_s: down,
            landing_gbyte_per_s: self.chance(0.2).then(|| down / 8.0 * self.log(0.3, 3.0)),
            upload_cap_gbit_per_s: (puller && self.chance(0.2)).then(|| up * self.between(0.1, 1.0)),
            join_ms: if puller && self.chance(0.3) { self.between(0.0, within_ms) } else { 0.0 },
            join_spread_ms: if puller { self.maybe(1.0, within_ms) } else { 0.0 },
            wants: if puller && self.chance(0.3) { Wants::Slice(slice) } else { Wants::All },
            has_fraction: if puller && self.chance(0.3) { self.between(0.0, 0.9) } else { 0.0 },
            has_slices: (puller && self.chance(0.1)).then(|| self.0.random_range(2..=4)),
        }
    }

    fn network(&mut self) -> NetworkModel {
        NetworkModel {
            latency_us: self.log(10.0, 20_000.0),
            message_us: self.maybe(0.1, 20.0),
            message_loss: self.maybe(1e-4, 1e-2),
            gossip_loss: self.maybe(0.01, 0.5),
            gossip_hop_ms: self.log(0.1, 50.0),
        }
    }

    /// All of them end by `until_ms`, but for the nodes that are wrong for ever.
    fn faults(&mut self, until_ms: f64, seeds: u32) -> Faults {
        let faults = self.mishaps(until_ms, seeds);
        // Whoever publishes has to stay, as above; and of two seeds one.
        let may_leave = seeds > 1 && faults.update.is_none() && faults.seed_dies_after_uploads.is_none();
        Faults {
            drains_per_s: self.maybe(0.2, 5.0),
            seed_drains_ms: (may_leave && self.chance(0.5)).then(|| self.between(0.0, until_ms)),
            ..faults
        }
    }

    fn mishaps(&mut self, until_ms: f64, seeds: u32) -> Faults {
        let crash_from = self.between(0.0, 1.0);
        let dies = seeds > 1 && self.chance(0.3);
        let partition = self.chance(0.3).then(|| {
            let at_ms = self.between(0.0, until_ms);
            let for_ms = self.between(0.0, until_ms - at_ms);
            PartitionModel { at_ms, for_ms, fraction: self.between(0.1, 0.6) }
        });
        Faults {
            corrupt_fraction: self.maybe(0.03, 0.25),
            crash_fraction: self.maybe(0.03, 0.2),
            crash_at: [crash_from, crash_from + 1.0],
            restart_after_ms: self.chance(0.5).then(|| self.between(1.0, until_ms)),
            restart_loses: self.between(0.0, 1.0),
            slow_fraction: self.maybe(0.03, 0.2),
            slow_factor: self.between(0.02, 0.5),
            slow: Some(self.span(until_ms)),
            stall_fraction: self.maybe(0.03, 0.15),
            stall: Some(self.span(until_ms)).filter(|_| self.chance(0.8)),
            mute_fraction: self.maybe(0.03, 0.15),
            mute: Some(self.span(until_ms)).filter(|_| self.chance(0.8)),
            partition,
            seed_dies_after_uploads: dies.then(|| self.between(0.1, 2.0)),
            churn_per_s: self.maybe(0.2, 10.0),
            churn_away_ms: self.between(0.0, until_ms),
            overwrites_per_s: self.maybe(0.2, 10.0),
            until_ms: Some(until_ms),
            clock_skew_ms: self.maybe(1.0, 1e7),
            clock_drift_ppm: self.maybe(1.0, 200.0),
            // Whoever publishes and dies at once leaves nobody who has the release.
            update: (!dies && self.chance(0.2))
                .then(|| UpdateModel { at_ms: self.between(0.0, until_ms), changed_fraction: self.between(0.0, 1.0) }),
            ..Faults::default()
        }
    }

    fn span(&mut self, until_ms: f64) -> Span {
        let at_ms = self.between(0.0, until_ms);
        Span { at_ms, for_ms: Some(self.between(0.0, until_ms - at_ms)) }
    }
}
