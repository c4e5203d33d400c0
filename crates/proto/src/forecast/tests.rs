use super::*;
use crate::io::{Input, Rates};
use crate::node::Config;
use crate::testing::bare_status;
use aquifer_core::{
    ChannelStatus, ChunkSet, GossipMessage, ManifestHash, NodeSecret, Policy, PublisherSecret, Release, SignedRelease,
    SignedStatus,
};
use proptest::prelude::*;

const GB: u64 = 1_000_000_000;
const SECOND: Duration = Duration::from_secs(1);

fn rates() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 1..1_000_000u64, Just(u64::MAX), any::<u64>()]
}

proptest! {
    #[test]
    fn more_nodes_and_more_bytes_take_no_less_time_and_faster_ones_no_more(
        (bytes, more_bytes) in (rates(), rates()),
        (seeds, peers, download) in (rates(), rates(), rates()),
        (k, more) in (0..u32::MAX / 2, 0..u32::MAX / 2),
    ) {
        let is_monotone = |less: Option<Duration>, more: Option<Duration>| match (less, more) {
            (Some(less), Some(more)) => less <= more,
            (Some(_), None) | (None, None) => true,
            (None, Some(_)) => false,
        };
        let time = |bytes, seeds, k| hydration_time(bytes, seeds, peers, download, k);
        let base = time(bytes, seeds, k);
        prop_assert!(is_monotone(base, time(bytes, seeds, k + more)));
        prop_assert!(is_monotone(base, time(bytes.saturating_add(more_bytes), seeds, k)));
        prop_assert!(is_monotone(time(bytes, seeds.saturating_add(more_bytes), k), base));
        if let Some(base) = base.filter(|_| k > 0 && bytes > 0) {
            let least = bytes as f64 / download as f64;
            prop_assert!(base.as_secs_f64() >= least * (1.0 - 1e-9), "{base:?} < {least}");
        }
    }

    #[test]
    fn an_estimate_is_bounded_and_right_for_a_steady_rate(
        steps in prop::collection::vec(1u64..400, 1..200),
        rate in 1u64..1_000_000,
    ) {
        let (mut eta, mut now) = (Eta::default(), Time::ZERO);
        let done = |now: Time| u64::try_from(now.since(Time::ZERO).as_millis()).unwrap() * rate;
        for ms in steps {
            eta.note(now, done(now));
            now = now + Duration::from_millis(ms);
            prop_assert!(eta.samples.len() <= 52);
        }
        eta.note(now, done(now));
        let estimate = eta.estimate(now, done(now) + 7 * rate * 1000).expect("it moves");
        prop_assert!((estimate.bytes_per_s / (rate as f64 * 1000.0) - 1.0).abs() < 1e-6, "{estimate:?}");
        prop_assert!(estimate.left.abs_diff(SECOND * 7) < Duration::from_micros(10));
    }
}

#[test]
fn the_narrowest_of_three_places_decides() {
    let seconds = |seeds, peers, download, k| hydration_time(8 * GB, seeds, peers, download, k).map(|t| t.as_secs());
    assert_eq!(seconds(GB, GB, GB, 0), Some(0));
    assert_eq!(seconds(GB, 9 * GB, 9 * GB, 100), Some(8), "one copy leaves the seeds");
    assert_eq!(seconds(9 * GB, 9 * GB, 2 * GB, 4), Some(4), "a node takes it in");
    assert_eq!(seconds(2 * GB, 0, 9 * GB, 4), Some(16), "the seeds send it to everybody");
    assert_eq!(seconds(2 * GB, GB, 9 * GB, 6), Some(6), "all of them send");
    assert_eq!(seconds(0, GB, GB, 1), None);
    assert_eq!(seconds(GB, GB, 0, 1), None);
}

fn standing(n: u8, have: u32) -> Standing {
    Standing {
        node: NodeId([n; 32]),
        name: format!("n{n}"),
        chunks_wanted: 10,
        chunks_have: have,
        ready: have == 10,
        draining: false,
        upload: 0,
        uploading: 0,
        download: 0,
    }
}

#[test]
fn what_is_not_known_is_as_usual_and_of_nothing_nothing_is_told() {
    let known = |n, have, upload, uploading| Standing { upload, uploading, download: GB, ..standing(n, have) };
    let blank = [standing(1, 10), standing(2, 10)];
    let of_blank = Forecast::among(&blank, Some(GB), 3);
    assert_eq!((of_blank.hydrated_replicas, of_blank.spare_upload_bytes_per_s, of_blank.predicted), (2, None, None));
    let draining = Standing { draining: true, ..known(9, 10, 9 * GB, 0) };
    let some = [known(1, 10, 2 * GB, GB), standing(2, 10), known(3, 10, 4 * GB, 5 * GB), draining];
    let forecast = Forecast::among(&some, Some(20 * GB), 1);
    assert_eq!((forecast.hydrated_replicas, forecast.ready_replicas), (3, 3), "who drains is none");
    assert_eq!(forecast.spare_upload_bytes_per_s, Some(GB + 4 * GB), "one is as most, one is busy");
    assert_eq!(forecast.predicted, Some(SECOND * 20), "its own link is the narrowest");
    assert_eq!(Forecast::among(&some, None, 1).predicted, None, "of no manifest");
}

#[test]
fn who_is_hydrating_needs_its_part_too() {
    let known = |n, have, uploading| Standing { upload: GB, uploading, download: 9 * GB, ..standing(n, have) };
    let idle = [known(1, 10, 0)];
    let busy = [known(1, 10, GB), known(2, 4, 0), known(3, 0, 0)];
    assert_eq!(Forecast::among(&idle, Some(8 * GB), 2).predicted, Some(SECOND * 8));
    let forecast = Forecast::among(&busy, Some(8 * GB), 2);
    assert_eq!(forecast.spare_upload_bytes_per_s, Some(0));
    let fractions: Vec<f64> = forecast.hydrating.iter().map(|h| h.fraction).collect();
    assert_eq!(fractions, [0.4, 0.0]);
    assert_eq!(forecast.predicted, Some(SECOND * 8), "four share five links");
}

#[test]
fn what_does_not_move_has_no_end() {
    let mut eta = Eta::default();
    let at = |s: u64| Time::ZERO + SECOND * u32::try_from(s).unwrap();
    assert_eq!(eta.estimate(at(0), 9), None);
    eta.note(at(0), 0);
    assert_eq!(eta.estimate(at(0), 9), None);
    eta.note(at(1), 100);
    assert_eq!(eta.estimate(at(1), 300).map(|e| (e.bytes_per_s, e.left)), Some((100.0, SECOND * 2)));
    assert_eq!(eta.estimate(at(2), 300).map(|e| e.left), Some(SECOND * 4), "it went slower since");
    assert_eq!(eta.estimate(at(6), 300), None);
    assert_eq!(eta.estimate(at(6), 100).map(|e| e.left), Some(Duration::ZERO), "it is done");
    eta.note(at(7), 10);
    eta.note(at(8), 30);
    assert_eq!(eta.estimate(at(8), 70).map(|e| e.left), Some(SECOND * 2), "it began anew");
}

#[test]
fn a_node_reckons_with_itself_and_its_members() {
    let (manifest, channel): (ManifestHash, ChannelName) = (ManifestHash::of(b"m"), "c".parse().unwrap());
    let publisher = PublisherSecret::from_seed([7; 32]);
    let release = Release {
        channel: channel.clone(),
        seq: 1,
        manifest,
        manifest_bytes: 8,
        rolls_back_to: None,
        policy: Policy::default(),
        created_unix_ms: 0,
        note: String::new(),
    };
    let config = Config {
        identity: NodeSecret::from_seed([1; 32]),
        incarnation: 1,
        name: "me".into(),
        version: String::new(),
        labels: vec![],
        channels: vec![(channel.clone(), vec![publisher.public()])],
        accepted: vec![SignedRelease::sign(&release, &publisher)],
        said: vec![],
        stands: vec![],
        overrides: vec![],
        leased_bytes_max: 1 << 20,
        upload_bytes_per_s: None,
        costly: Default::default(),
        seed: 1,
    };
    let mut node = Node::new(config, Time::ZERO);
    assert_eq!(Forecast::of(&node, &channel, 1).predicted, None);
    node.handle(Time::ZERO, Input::ManifestLoaded { manifest, chunk_bytes: vec![100; 10] });
    node.handle(Time::ZERO, Input::Wanted { manifest, chunks: ChunkSet::from_indices(10, 0..8) });
    node.handle(Time::ZERO, Input::Held { manifest, chunks: ChunkSet::from_indices(10, 0..2) });
    let rates = Rates { upload_bytes_per_s: 100, uploading_bytes_per_s: 0, download_bytes_per_s: 400 };
    node.handle(Time::ZERO, Input::Rates(rates));
    let secret = NodeSecret::from_seed([2; 32]);
    let has = ChannelStatus {
        channel: channel.clone(),
        seq: 1,
        manifest,
        chunks_wanted: 10,
        chunks_have: 10,
        also: vec![],
        report: None,
    };
    let status = Status { channels: vec![has], upload_bytes_per_s: 200, ..bare_status(secret.public()) };
    let message = GossipMessage::Status(SignedStatus::sign(&status, &secret));
    node.handle(Time::ZERO, Input::Gossip { via: secret.public(), token: 0, message });
    let forecast = Forecast::of(&node, &channel, 1);
    assert_eq!((forecast.hydrated_replicas, forecast.spare_upload_bytes_per_s), (1, Some(200)));
    let hydrating = Hydrating { node: node.id(), name: "me".into(), fraction: 0.25 };
    assert_eq!(forecast.hydrating, [hydrating]);
    assert_eq!(forecast.predicted, Some(SECOND * 4), "800 bytes each, to two, of a seed's 200 and their own 100");
    assert_eq!(Forecast::of(&node, &"d".parse().unwrap(), 1).hydrated_replicas, 0);
}
