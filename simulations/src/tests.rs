//! The committed scenarios, and the baselines against what arithmetic says of them.

use crate::baselines::Baseline;
use crate::replay::Replayed;
use crate::report;
use crate::scenario::{Case, Expanded, Scenario};
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
