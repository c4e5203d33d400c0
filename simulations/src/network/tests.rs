//! The sharing against a textbook, and the bookkeeping against itself.

use super::*;
use proptest::prelude::*;

const EXACT: f64 = 1e-9;

fn nic(up: f64, down: f64, rack: Option<u32>) -> Nic {
    Nic { up, down, upload_cap: None, rack, landing: None }
}

fn secs(s: f64) -> Time {
    Time::from_origin(Duration::from_secs_f64(s))
}

/// Progressive filling (Bertsekas and Gallager, Data Networks, 6.5.2): raise all rates together,
/// freezing those that pass a link which has become full.
fn textbook(capacity: &[f64], ways: &[Vec<usize>]) -> Vec<f64> {
    let mut rates = vec![0.0; ways.len()];
    let mut frozen = vec![false; ways.len()];
    while frozen.iter().any(|f| !f) {
        let mut left = capacity.to_vec();
        let mut free = vec![0u32; capacity.len()];
        for (i, way) in ways.iter().enumerate() {
            for &link in way {
                left[link] -= if frozen[i] { rates[i] } else { 0.0 };
                free[link] += u32::from(!frozen[i]);
            }
        }
        let share = |l: usize| if free[l] == 0 { f64::INFINITY } else { left[l].max(0.0) / f64::from(free[l]) };
        let level = (0..capacity.len()).map(share).fold(f64::INFINITY, f64::min);
        for (i, way) in ways.iter().enumerate() {
            if !frozen[i] && way.iter().any(|&l| share(l) <= level * (1.0 + 1e-12)) {
                (rates[i], frozen[i]) = (level, true);
            }
        }
    }
    rates
}

fn compare(network: &mut Network, pairs: &[(u32, u32)]) -> Result<(), TestCaseError> {
    let n = network.nics.len();
    let mut capacity: Vec<f64> = (0..network.links.unlimited()).map(|l| network.links.capacity(l)).collect();
    capacity.push(f64::INFINITY);
    let ways: Vec<Vec<usize>> =
        pairs.iter().map(|&(f, t)| network.route(f, t).iter().map(|&l| l as usize).collect()).collect();
    let want = textbook(&capacity, &ways);
    for (&(from, to), want) in pairs.iter().zip(want) {
        let got = network.rate(from, to).unwrap();
        prop_assert!((got - want).abs() <= 1e-6 * want, "{from}->{to} of {n}: {got} instead of {want}");
    }
    prop_assert!(network.excess() <= 1e-6, "excess {}", network.excess());
    Ok(())
}

#[derive(Clone, Debug)]
enum Op {
    Toggle(u32, u32),
    Nic(u32, u32, u32),
    Stall(u32, bool),
}

fn op(nodes: u32) -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..nodes, 0..nodes).prop_map(|(a, b)| Op::Toggle(a, b)),
        1 => (0..nodes, 1u32..50, 1u32..50).prop_map(|(n, u, d)| Op::Nic(n, u, d)),
        1 => (0..nodes, any::<bool>()).prop_map(|(n, s)| Op::Stall(n, s)),
    ]
}

proptest! {
    #[test]
    fn shares_like_the_textbook(
        nics in prop::collection::vec((1u32..50, 1u32..50, prop::option::of(0u32..3)), 7),
        racks in prop::collection::vec((1u32..60, 1u32..60), 3),
        ops in prop::collection::vec(op(7), 1..60),
    ) {
        let nics = nics.into_iter().map(|(u, d, r)| nic(f64::from(u), f64::from(d), r)).collect();
        let racks = racks.into_iter().map(|(u, d)| RackLink { up: f64::from(u), down: f64::from(d) }).collect();
        let mut network = Network::new(nics, racks, EXACT);
        let mut pairs: Vec<(u32, u32)> = Vec::new();
        for op in ops {
            match op {
                Op::Toggle(a, b) if a == b => {}
                Op::Toggle(a, b) => match pairs.iter().position(|&p| p == (a, b)) {
                    Some(i) => {
                        pairs.swap_remove(i);
                        prop_assert!(network.cancel(Time::ZERO, a, b, 1));
                    }
                    None => {
                        pairs.push((a, b));
                        network.start(Time::ZERO, a, b, 1, 1000);
                    }
                },
                Op::Nic(n, u, d) => network.set_nic(Time::ZERO, n, f64::from(u), f64::from(d)),
                Op::Stall(n, s) => network.stall(Time::ZERO, n, s),
            }
            compare(&mut network, &pairs)?;
        }
    }

    #[test]
    fn every_byte_arrives_once_and_runs_repeat(
        transfers in prop::collection::vec((0u32..6, 0u32..6, 1u64..5000, 0u32..20), 1..80),
        tolerance in prop_oneof![Just(EXACT), Just(0.01)],
    ) {
        let run = || {
            let nics = (0u32..6).map(|i| nic(100.0 + f64::from(i), 150.0, Some(i % 2)));
            let nics = nics.map(|n| Nic { landing: Some(400.0), ..n }).collect();
            let mut network = Network::new(nics, vec![RackLink { up: 120.0, down: 120.0 }; 2], tolerance);
            let mut seen = Vec::new();
            let mut sorted = transfers.clone();
            sorted.sort_by_key(|t| t.3);
            for (tag, (from, to, bytes, at)) in (0u64..).zip(sorted).filter(|(_, t)| t.0 != t.1) {
                let at = secs(f64::from(at));
                seen.extend(std::iter::from_fn(|| network.pop_completion(at)));
                network.start(at, from, to, tag, bytes);
            }
            while let Some(at) = network.next_completion() {
                assert!(network.excess() <= 2.0 * tolerance + 1e-9, "{}", network.excess());
                seen.extend(std::iter::from_fn(|| network.pop_completion(at)));
            }
            (seen, network.counters().clone())
        };
        let (seen, counters) = run();
        let sent: Vec<_> = transfers.iter().filter(|t| t.0 != t.1).collect();
        let total: u64 = sent.iter().map(|t| t.2).sum();
        prop_assert_eq!(seen.len(), sent.len());
        prop_assert_eq!(counters.up.iter().sum::<u64>(), total);
        prop_assert_eq!(counters.down.iter().sum::<u64>(), total);
        prop_assert_eq!(counters.same_rack + counters.across, total);
        prop_assert_eq!(counters.rack_in.iter().sum::<u64>(), counters.across);
        prop_assert_eq!(run(), (seen, counters));
    }
}

fn pair_of_nodes() -> Network {
    Network::new(vec![nic(100.0, 100.0, None), nic(100.0, 100.0, None)], vec![], EXACT)
}

#[test]
fn a_capacity_change_counts_from_when_it_happens() {
    let mut network = pair_of_nodes();
    network.start(Time::ZERO, 0, 1, 7, 1000);
    assert_eq!(network.next_completion(), Some(secs(10.0)));
    network.set_nic(secs(5.0), 0, 50.0, 100.0);
    assert_eq!(network.next_completion(), Some(secs(15.0)));
    network.stall(secs(6.0), 0, true);
    assert_eq!(network.next_completion(), None);
    network.stall(secs(8.0), 0, false);
    assert_eq!(network.pop_completion(secs(17.0)).unwrap().at, secs(17.0));
}

#[test]
fn cancelling_frees_the_link_and_counts_what_moved() {
    let mut network = pair_of_nodes();
    network.start(Time::ZERO, 0, 1, 1, 1000);
    network.start(Time::ZERO, 0, 1, 2, 1000);
    network.start(Time::ZERO, 0, 1, 3, 1000);
    assert!(network.cancel(secs(4.0), 0, 1, 1) && network.cancel(secs(4.0), 0, 1, 3));
    assert!(!network.cancel(secs(4.0), 0, 1, 3));
    assert_eq!(network.pop_completion(secs(14.0)).map(|d| (d.tag, d.at)), Some((2, secs(14.0))));
    assert_eq!((network.next_completion(), network.counters().up[0]), (None, 1400));
}

#[test]
fn a_crash_ends_all_flows_both_ways_and_what_was_landing() {
    let landing = |n: Nic| Nic { landing: Some(10.0), ..n };
    let mut network = Network::new(vec![landing(nic(100.0, 100.0, None)); 3], vec![], EXACT);
    network.start(Time::ZERO, 0, 1, 1, 100);
    network.start(Time::ZERO, 1, 2, 2, 1000);
    assert_eq!(network.pop_completion(secs(1.0)), None);
    assert_eq!(network.cancel_all(secs(1.0), 1), vec![(1, 2, 2), (0, 1, 1)]);
    assert_eq!(network.next_completion(), None);
}

#[test]
fn landing_is_serial() {
    let mut nics = vec![nic(100.0, 100.0, None); 2];
    nics[1].landing = Some(50.0);
    let mut network = Network::new(nics, vec![], EXACT);
    (0..2).for_each(|tag| network.start(Time::ZERO, 0, 1, tag, 100));
    let at: Vec<_> = std::iter::from_fn(|| network.pop_completion(secs(9.0)).map(|d| d.at)).collect();
    assert_eq!(at, [secs(3.0), secs(5.0)]);
}
