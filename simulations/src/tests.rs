//! The committed scenarios, and the baselines against what arithmetic says of them.

use crate::baselines::Baseline;
use crate::chaos;
use crate::outcome::Outcome;
use crate::replay::Replayed;
use crate::report;
use crate::scenario::{Case, Expanded, Faults, PartitionModel, Scenario, Span, UpdateModel};
use crate::world::{self, RunOptions};
use std::path::Path;

fn committed(name: &str) -> Scenario {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios").join(name);
    Scenario::read(&path).unwrap().quick()
}

fn small() -> Expanded {
    committed("one-seed.toml").expand(1, Case { nodes: Some(8), chunks: Some(64) }).unwrap()
}

#[test]
fn every_committed_scenario_expands_the_same_way_twice() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    for name in names {
        let scenario = committed(name.to_str().unwrap());
        let expand = || format!("{:?}", scenario.expand(7, scenario.cases()[0]).unwrap());
        assert_eq!(expand(), expand(), "{name:?}");
    }
}

#[test]
fn faults_are_dealt_as_told() {
    let e = committed("adversarial.toml").expand(3, Case::default()).unwrap();
    let count = |is: fn(&crate::scenario::FaultPlan) -> bool| e.nodes.iter().filter(|n| is(&n.fault)).count();
    assert_eq!([count(|f| f.corrupt), count(|f| f.crash_at.is_some()), count(|f| f.slow)], [2, 10, 10]);
    assert_eq!(e.nodes.iter().filter(|n| n.is_measured()).count(), 178);
}

#[test]
fn baselines_take_what_arithmetic_says() {
    let e = small();
    let ratio = |b: Baseline| b.run(&e).unwrap().unwrap().ratio.unwrap();
    let close = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.01, "{got} instead of {want}");
    close(ratio(Baseline::OneHolder), 8.0);
    // The last of eight has the last of 64 chunks seven chunks after the first.
    close(ratio(Baseline::Chain), 71.0 / 64.0);
    // Three levels at half the rate; two chunks' time for each level after the first.
    assert!((2.0..2.2).contains(&ratio(Baseline::BinaryTree)));
    assert!((1.0..1.01).contains(&ratio(Baseline::Lockstep)));
    assert!((1.0..2.5).contains(&ratio(Baseline::Random)));
}

#[test]
fn baselines_repeat_and_lose_no_byte() {
    let e = small();
    for baseline in Baseline::ALL {
        let run = || baseline.run(&e).unwrap().unwrap();
        let (one, two) = (run(), run());
        assert_eq!((&one.nodes, &one.samples), (&two.nodes, &two.samples), "{}", baseline.name());
        assert!(one.nodes.iter().filter(|n| n.healthy).all(|n| n.bytes_down == e.checkpoint_bytes()));
        let svg = report::svg(&[one]);
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"));
    }
}

#[test]
fn a_swarm_of_real_nodes_finishes_and_replays_alike() {
    let e = small();
    let run = || world::run(&e, &RunOptions::default()).unwrap();
    let (one, two) = (run(), run());
    assert_eq!(one.violations, Vec::<String>::new());
    assert!(one.ratio.is_some_and(|r| r >= 1.0), "nobody is faster than the bound: {:?}", one.ratio);
    assert_eq!((&one.nodes, &one.samples, one.events), (&two.nodes, &two.samples, two.events));
}

#[test]
fn a_swarm_among_liars_and_crashes_finishes_whole() {
    let mut scenario = committed("adversarial.toml");
    scenario.faults.corrupt_fraction = 0.1;
    scenario.faults.crash_fraction = 0.1;
    let e = scenario.expand(2, Case { nodes: Some(20), chunks: Some(64) }).unwrap();
    let outcome = world::run(&e, &RunOptions::default()).unwrap();
    assert_eq!(outcome.violations, Vec::<String>::new());
    assert!(outcome.last_healthy_s.is_some());
}

#[test]
fn a_simulated_node_replays_alike_off_the_network() {
    let e = small();
    let outcome = world::run(&e, &RunOptions { record_node: Some(3), ..RunOptions::default() }).unwrap();
    let replayed = Replayed::of(&outcome.recording[..]).unwrap();
    assert_eq!(replayed.report.difference, None);
    assert_eq!((replayed.report.name.as_str(), replayed.kinds.get("Hydrated")), ("n3", Some(&1)));
    let reads: u64 = replayed.peers.values().map(|p| p.reads).sum();
    assert_eq!(reads, u64::from(e.chunks));
    assert!(replayed.to_string().contains("decisions are the same"));
    let off = world::run(&e, &RunOptions::default()).unwrap();
    assert_eq!((off.nodes, off.events), (outcome.nodes, outcome.events), "being recorded changes nothing");
}

/// 16 pullers, 64 chunks of 1 MiB, half a second for one upload of everything.
fn with(faults: Faults, change: impl FnOnce(&mut Scenario)) -> Expanded {
    let text = r#"
        name = "fault"
        description = "one kind of fault at a time"
        seeds = [1]
        checkpoint = { chunks = 64, chunk_kib = 1024 }
        network = { latency_us = 200, message_us = 2, gossip_hop_ms = 1 }
        [[nodes]]
        role = "seed"
        count = 1
        up_gbit_per_s = 1
        down_gbit_per_s = 1
        [[nodes]]
        role = "puller"
        count = 16
        up_gbit_per_s = 1
        down_gbit_per_s = 1
    "#;
    let mut scenario = Scenario::parse(text).unwrap();
    scenario.faults = faults;
    change(&mut scenario);
    scenario.expand(1, Case::default()).unwrap()
}

/// Runs twice: all checks are silent, everybody finishes, and both runs decide alike.
fn passes(e: &Expanded) -> Outcome {
    let run = || world::run(e, &RunOptions::default()).unwrap();
    let (one, two) = (run(), run());
    assert_eq!(one.violations, Vec::<String>::new());
    assert!(one.last_healthy_s.is_some());
    assert_eq!((one.digest, one.events), (two.digest, two.events), "a run replays");
    one
}

fn span(at_ms: f64, for_ms: f64) -> Option<Span> {
    Some(Span { at_ms, for_ms: Some(for_ms) })
}

#[test]
fn a_partition_holds_the_smaller_side_up_until_it_heals() {
    let calm = passes(&with(Faults::default(), |_| {}));
    let cut = PartitionModel { at_ms: 100.0, for_ms: 3000.0, fraction: 0.4 };
    let e = with(Faults { partition: Some(cut), ..Faults::default() }, |_| {});
    let parted = passes(&e);
    let last = |o: &Outcome, cut_off: bool| {
        let side = e.nodes.iter().filter(|n| n.fault.cut_off == cut_off).map(|n| o.nodes[n.index as usize].finished_s);
        side.flatten().fold(0.0, f64::max)
    };
    assert!(calm.last_healthy_s.unwrap() < 2.0);
    assert!(last(&parted, false) < 3.1, "the side with the seed goes on");
    assert!(last(&parted, true) > 3.1, "the other side lacks what only the seed has");
}

#[test]
fn pullers_that_come_and_go_finish_in_the_end() {
    for restart_loses in [0.0, 1.0] {
        let faults = Faults {
            churn_per_s: 10.0,
            churn_away_ms: 500.0,
            until_ms: Some(1000.0),
            restart_loses,
            ..Faults::default()
        };
        passes(&with(faults, |_| {}));
    }
}

#[test]
fn a_restart_begins_with_what_is_left_in_memory() {
    let crash = |restart_loses| {
        let restart_after_ms = Some(100.0);
        Faults { crash_fraction: 0.3, crash_at: [0.9, 1.0], restart_after_ms, restart_loses, ..Faults::default() }
    };
    let fetched = |e: &Expanded| {
        let outcome = passes(e);
        let crashed = e.nodes.iter().filter(|n| n.fault.crashes);
        crashed.map(|n| outcome.nodes[n.index as usize].bytes_down).sum::<u64>()
    };
    let (kept, lost) = (fetched(&with(crash(0.0), |_| {})), fetched(&with(crash(1.0), |_| {})));
    assert!(kept < lost, "{kept} bytes with what was kept, {lost} without");
}

#[test]
fn lost_messages_reset_connections_and_stop_nobody() {
    let calm = with(Faults::default(), |_| {});
    let lossy = with(Faults { until_ms: Some(1500.0), ..Faults::default() }, |s| {
        s.network.message_loss = 0.01;
        s.network.gossip_loss = 0.3;
    });
    assert_ne!(passes(&calm).digest, passes(&lossy).digest);
}

#[test]
fn clocks_that_disagree_change_nothing() {
    passes(&with(Faults { clock_skew_ms: 3.6e6, clock_drift_ppm: 100.0, ..Faults::default() }, |_| {}));
}

#[test]
fn peers_that_stall_slow_down_or_fall_silent_are_done_without() {
    let stall = Faults { stall_fraction: 0.2, stall: span(200.0, 8000.0), ..Faults::default() };
    let slow = Faults { slow_fraction: 0.2, slow_factor: 0.05, slow: span(200.0, 2000.0), ..Faults::default() };
    let mute = Faults { mute_fraction: 0.2, mute: span(0.0, 3000.0), ..Faults::default() };
    for faults in [stall, slow, mute] {
        let outcome = passes(&with(faults, |_| {}));
        assert!(outcome.last_healthy_s.unwrap() < 10.0, "{faults:?}");
    }
}

#[test]
fn overwritten_chunks_are_fetched_again() {
    let e = with(Faults { overwrites_per_s: 20.0, until_ms: Some(2000.0), ..Faults::default() }, |_| {});
    let outcome = passes(&e);
    let down: u64 = outcome.nodes.iter().map(|n| n.bytes_down).sum();
    assert!(down > 16 * e.checkpoint_bytes(), "somebody lost something that it had");
}

#[test]
fn a_newer_release_is_what_everybody_ends_with() {
    let update = |changed_fraction| Some(UpdateModel { at_ms: 2000.0, changed_fraction });
    let down = |changed| {
        let outcome = passes(&with(Faults { update: update(changed), ..Faults::default() }, |_| {}));
        outcome.nodes.iter().map(|n| n.bytes_down).sum::<u64>()
    };
    let (little, all) = (down(0.1), down(1.0));
    assert!(little < all, "only what changed moves: {little}, {all}");
}

#[test]
fn chaos_is_silent_and_repeats() {
    let digests = |from| chaos::trials(from, 4, |t| assert_eq!(t.violations(), Vec::<String>::new(), "{}", t.seed));
    let digest = |t: chaos::Trial| t.outcome.unwrap().digest;
    let run = || digests(0).into_iter().map(digest).collect::<Vec<_>>();
    assert_eq!(run(), run());
}
