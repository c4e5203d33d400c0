//! The time below which no schedule can finish, whatever it knows.

use super::{Expanded, NodePlan};
use aquifer_core::{ChunkSet, Time};

/// Seconds from the start of the run to the last healthy puller, at best: the largest of the
/// terms below. None counts latency, message costs or the filling of the pipeline.
///
/// - A puller cannot finish before it joined and took in what it misses at the rate of its NIC or
///   its landing, whichever is lower.
/// - Each distinct missing chunk must leave one of the nodes that have it at the start at least
///   once: all of them over the sum of those nodes' uploads, and for each node what only it has
///   (with one seed, F over its upload). A corrupt or stalled node uploads nothing useful.
/// - All that is missed, over the uploads of all nodes. Nodes that crash count as if they did not.
/// - What a rack misses and does not have must come in over its uplink at least once; what only a
///   rack has and others miss must go out.
///
/// Only healthy pullers' needs count. Upload terms begin when the first of them joins.
pub fn lower_bound(e: &Expanded) -> f64 {
    let pullers: Vec<(&NodePlan, ChunkSet)> =
        e.nodes.iter().filter(|n| n.is_measured()).map(|n| (n, n.missing())).collect();
    let Some(begin) = pullers.iter().map(|(n, _)| n.join).min() else { return 0.0 };
    let own = pullers.iter().map(|(n, missing)| secs(n.join) + e.bytes(missing) as f64 / n.useful_down());
    let uploads = [distinct(e, &pullers), alone(e, &pullers), demand(e, &pullers), racks(e, &pullers)];
    own.fold(secs(begin) + uploads.into_iter().fold(0.0, f64::max), f64::max)
}

fn missing_anywhere<'a>(e: &Expanded, sets: impl Iterator<Item = &'a ChunkSet>) -> ChunkSet {
    let mut all = ChunkSet::empty(e.chunks);
    let mut last: Option<&ChunkSet> = None;
    // Neighbours often miss the same; a union costs as much as a comparison, so compare first.
    for set in sets.filter(|s| last.replace(s) != Some(s)) {
        all.union_with(set);
    }
    all
}

fn distinct(e: &Expanded, pullers: &[(&NodePlan, ChunkSet)]) -> f64 {
    let all = missing_anywhere(e, pullers.iter().map(|p| &p.1));
    let sources = e.nodes.iter().filter(|n| all.intersection(&n.has).next().is_some());
    ratio(e.bytes(&all) as f64, sources.map(NodePlan::useful_up).sum())
}

fn alone(e: &Expanded, pullers: &[(&NodePlan, ChunkSet)]) -> f64 {
    let all = missing_anywhere(e, pullers.iter().map(|p| &p.1));
    let (mut once, mut twice) = (ChunkSet::empty(e.chunks), ChunkSet::empty(e.chunks));
    for n in e.nodes.iter().filter(|n| n.useful_up() > 0.0 && !n.has.is_empty()) {
        let again: Vec<u32> = once.intersection(&n.has).collect();
        again.into_iter().for_each(|i| {
            twice.insert(i);
        });
        once.union_with(&n.has);
    }
    once.subtract(&twice);
    let only = |n: &NodePlan| {
        let count = all.intersection(&n.has).filter(|&i| once.contains(i)).count();
        ratio(count as f64 * e.chunk_bytes as f64, n.useful_up())
    };
    let holders = e.nodes.iter().filter(|n| n.useful_up() > 0.0 && !n.has.is_empty());
    if once.is_empty() { 0.0 } else { holders.map(only).fold(0.0, f64::max) }
}

fn demand(e: &Expanded, pullers: &[(&NodePlan, ChunkSet)]) -> f64 {
    let missed: f64 = pullers.iter().map(|(_, m)| e.bytes(m) as f64).sum();
    ratio(missed, e.nodes.iter().map(NodePlan::useful_up).sum())
}

fn racks(e: &Expanded, pullers: &[(&NodePlan, ChunkSet)]) -> f64 {
    let mut worst: f64 = 0.0;
    for (r, link) in (0u32..).zip(&e.racks) {
        let inside = |n: &NodePlan| n.nic.rack == Some(r);
        let held = |inner: bool| {
            let nodes = e.nodes.iter().filter(|n| inside(n) == inner);
            missing_anywhere(e, nodes.map(|n| &n.has))
        };
        let missed = |inner: bool| {
            let nodes = pullers.iter().filter(|(n, _)| inside(n) == inner);
            missing_anywhere(e, nodes.map(|p| &p.1))
        };
        let (here, elsewhere) = (held(true), held(false));
        let (mut inward, mut outward) = (missed(true), missed(false));
        inward.subtract(&here);
        outward.subtract(&elsewhere);
        worst = worst.max(ratio(e.bytes(&inward) as f64, link.down)).max(ratio(e.bytes(&outward) as f64, link.up));
    }
    worst
}

fn ratio(bytes: f64, rate: f64) -> f64 {
    if bytes > 0.0 { bytes / rate } else { 0.0 }
}

fn secs(time: Time) -> f64 {
    time.since(Time::ZERO).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use crate::scenario::{Case, Scenario, lower_bound};

    /// 100 chunks of 1000 KiB; one Gbit/s carries 122.07 of these chunks per second.
    const CHUNKS_PER_S: f64 = 1e9 / 8.0 / 1_024_000.0;

    fn bound(rest: &str) -> f64 {
        let head = "name = 'x'\ndescription = ''\nseeds = [1]\n[checkpoint]\nchunks = 100\nchunk_kib = 1000\n";
        let scenario = Scenario::parse(&format!("{head}{rest}")).unwrap();
        lower_bound(&scenario.expand(1, Case::default()).unwrap()) * CHUNKS_PER_S
    }

    fn group(role: &str, count: u32, up: f64, down: f64, more: &str) -> String {
        format!("[[nodes]]\nrole = '{role}'\ncount = {count}\nup_gbit_per_s = {up}\ndown_gbit_per_s = {down}\n{more}\n")
    }

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-6 * want, "{got} instead of {want}");
    }

    #[test]
    fn one_seed() {
        close(bound(&(group("seed", 1, 1.0, 1.0, "") + &group("puller", 9, 1.0, 1.0, ""))), 100.0);
        close(bound(&(group("seed", 1, 0.5, 1.0, "") + &group("puller", 9, 9.0, 9.0, ""))), 200.0);
        close(bound(&(group("seed", 1, 1.0, 1.0, "") + &group("puller", 9, 1.0, 0.25, ""))), 400.0);
        // 900 chunks over 1 + 9 * 0.5.
        close(bound(&(group("seed", 1, 1.0, 1.0, "") + &group("puller", 9, 0.5, 1.0, ""))), 900.0 / 5.5);
    }

    #[test]
    fn holders_with_a_cap_and_landing() {
        let holders = group("holder", 4, 1.0, 1.0, "upload_cap_gbit_per_s = 0.05");
        // Each chunk must leave the four holders, at 0.2 together.
        close(bound(&(holders.clone() + &group("puller", 2, 9.0, 9.0, ""))), 500.0);
        let late = group("puller", 2, 9.0, 9.0, "join_ms = 1000");
        close(bound(&(holders + &late)), 500.0 + CHUNKS_PER_S);
        let landing = group("puller", 1, 9.0, 9.0, "landing_gbyte_per_s = 0.0125");
        close(bound(&(group("seed", 1, 1.0, 1.0, "") + &landing)), 1000.0);
    }

    #[test]
    fn slices_delta_and_own_parts() {
        let sliced = group("puller", 8, 1.0, 1.0, "wants = { of = 4, common = 0.2 }");
        // 100 distinct chunks from the seed; each node wants 40, all 320 over 9.
        close(bound(&(group("seed", 1, 1.0, 1.0, "") + &sliced)), 100.0);
        close(bound(&(group("seed", 1, 10.0, 1.0, "") + &sliced)), 40.0);
        let delta = group("puller", 8, 1.0, 1.0, "has_fraction = 0.98");
        close(bound(&(group("seed", 1, 0.5, 1.0, "") + &delta)), 4.0);
        // Four nodes with a quarter each: 75 to fetch, 25 that only it has to send, 300 over 4.
        close(bound(&group("puller", 4, 1.0, 1.0, "has_slices = 4")), 75.0);
        close(bound(&group("puller", 4, 0.25, 1.0, "has_slices = 4")), 300.0);
    }

    #[test]
    fn racks_and_faults() {
        let nodes = group("seed", 1, 1.0, 1.0, "") + &group("puller", 8, 1.0, 1.0, "");
        let racks = "[racks]\ncount = 2\nuplink_gbit_per_s = 0.25\nplacement = 'blocks'\n";
        close(bound(&(nodes.clone() + racks)), 400.0);
        // Half of the pullers lie: four need 400 chunks from five, the seed is the limit.
        close(bound(&(nodes.clone() + "[faults]\ncorrupt_fraction = 0.5\n")), 100.0);
        // Slow nodes neither count nor add much: four healthy at 0.5 up would be 400 / (1 + 2 + 0.2).
        let halves = group("seed", 1, 1.0, 1.0, "") + &group("puller", 8, 0.5, 1.0, "");
        close(bound(&(halves + "[faults]\nslow_fraction = 0.5\nslow_factor = 0.1\n")), 400.0 / 3.2);
    }

    #[test]
    fn a_wrong_field_is_named() {
        let error = Scenario::parse("name = 'x'\nfoo = 1").unwrap_err();
        assert!(format!("{error:#}").contains("foo"));
        let nodes = group("seed", 1, 1.0, 1.0, "has_fraction = 2.0");
        let head = "name = 'x'\ndescription = ''\nseeds = [1]\n[checkpoint]\nchunks = 1\nchunk_kib = 1\n";
        let error = Scenario::parse(&format!("{head}{nodes}")).unwrap_err();
        assert!(format!("{error:#}").contains("has_fraction"), "{error:#}");
    }
}
