use super::*;
use crate::io::ReadOutcome;
use crate::limits::{DRAIN_SETTLE, GRANT_CHUNKS_MAX};
use crate::limits::{EARLY_ASK_PATIENCE, EXCUSE_SPACING, EXCUSES_MAX};
use crate::testing::bare_status;
use aquifer_core::Access;
use aquifer_core::message::Terms;

fn peer() -> NodeId {
    NodeSecret::from_seed([2; 32]).public()
}

fn manifest() -> ManifestHash {
    ManifestHash::of(b"manifest")
}

fn node() -> Node {
    let config = Config {
        identity: NodeSecret::from_seed([1; 32]),
        incarnation: 1,
        name: "n".into(),
        version: String::new(),
        labels: vec![],
        channels: vec![],
        accepted: vec![],
        said: Vec::new(),
        stands: Vec::new(),
        overrides: Vec::new(),
        leased_bytes_max: 1 << 20,
        upload_bytes_per_s: None,
        costly: Default::default(),
        seed: 1,
    };
    let mut node = Node::new(config, Time::ZERO);
    node.handle(Time::ZERO, Input::Connected { node: peer() });
    let message = GossipMessage::Status(status_of_peer());
    node.handle(Time::ZERO, Input::Gossip { via: peer(), token: 0, message });
    node
}

fn status_of_peer() -> SignedStatus {
    SignedStatus::sign(&bare_status(peer()), &NodeSecret::from_seed([2; 32]))
}

fn ask(node: &mut Node, now: Time) {
    let (wanted, have) = (ChunkSet::full(4), ChunkSet::empty(4));
    let terms = Terms { credit_bytes: 1 << 20, flight_bytes: 0 };
    let message = PeerMessage::Ask { manifest: manifest(), wanted, have, terms };
    node.handle(now, Input::Message { from: peer(), message });
}

/// Whether an ask was refused since the last call.
fn refused(node: &mut Node) -> bool {
    let refusal = |o| matches!(o, Output::Send { to, message: PeerMessage::Refuse { .. } } if to == peer());
    std::iter::from_fn(|| node.poll_output()).filter(|o| refusal(o.clone())).count() > 0
}

#[test]
fn who_asks_for_what_is_forgotten_is_told() {
    let mut node = node();
    let chunk_bytes = vec![9; 4];
    node.handle(Time::ZERO, Input::ManifestLoaded { manifest: manifest(), chunk_bytes });
    node.handle(Time::ZERO, Input::Wanted { manifest: manifest(), chunks: ChunkSet::full(4) });
    ask(&mut node, Time::ZERO);
    assert!(!refused(&mut node));
    node.handle(Time::ZERO, Input::Forget { manifest: manifest() });
    assert!(refused(&mut node));
    ask(&mut node, Time::ZERO);
    assert!(!refused(&mut node), "it may come again");
    node.handle(Time::ZERO, Input::Forget { manifest: manifest() });
    assert!(refused(&mut node));
}

#[test]
fn an_early_ask_for_what_does_not_come_is_refused_at_last() {
    let mut node = node();
    ask(&mut node, Time::ZERO);
    let mut now = Time::ZERO;
    while now.since(Time::ZERO) < EARLY_ASK_PATIENCE {
        assert!(!refused(&mut node), "at {now:?}");
        now = now + REVIEW_INTERVAL;
        node.handle_timeout(now);
        node.audit(now).unwrap();
    }
    assert!(refused(&mut node));
}

#[test]
fn a_grant_of_a_million_chunks_has_a_short_answer() {
    let mut node = node();
    let chunks = vec![0; 1 << 20];
    for loaded in [false, true] {
        if loaded {
            node.handle(Time::ZERO, Input::ManifestLoaded { manifest: manifest(), chunk_bytes: vec![9; 4] });
        }
        let access = Access { ticket: 0, secret: [0; 32] };
        let grant = PeerMessage::Grant { manifest: manifest(), lease: 1, ttl_ms: 1, chunks: chunks.clone(), access };
        node.handle(Time::ZERO, Input::Message { from: peer(), message: grant });
        let returned = |o| {
            if let Output::Send { message: PeerMessage::Progress { returned, .. }, .. } = o {
                returned.len()
            } else {
                0
            }
        };
        let count: usize = std::iter::from_fn(|| node.poll_output()).map(returned).sum();
        assert_eq!(count, GRANT_CHUNKS_MAX);
    }
}

#[test]
fn what_was_read_for_a_forgotten_manifest_is_held_if_it_is_of_interest_again() {
    let mut node = node();
    let take_in = |node: &mut Node| {
        node.handle(Time::ZERO, Input::ManifestLoaded { manifest: manifest(), chunk_bytes: vec![9; 4] });
        node.handle(Time::ZERO, Input::Wanted { manifest: manifest(), chunks: ChunkSet::full(4) });
    };
    take_in(&mut node);
    let access = Access { ticket: 0, secret: [0; 32] };
    let grant = PeerMessage::Grant { manifest: manifest(), lease: 1, ttl_ms: 30_000, chunks: vec![2], access };
    node.handle(Time::ZERO, Input::Message { from: peer(), message: grant });
    let read = |o| if let Output::Read { op, .. } = o { Some(op) } else { None };
    let op = std::iter::from_fn(|| node.poll_output()).find_map(read).expect("it is read");
    node.handle(Time::ZERO, Input::Forget { manifest: manifest() });
    take_in(&mut node);
    node.handle(Time::ZERO, Input::ReadDone { op, outcome: ReadOutcome::Verified });
    assert_eq!(node.progress(&manifest()).map(|p| p.chunks_have), Some(1));
    node.audit(Time::ZERO).unwrap();
}

#[test]
fn who_takes_back_what_it_lied_about_is_found_out() {
    let mut node = node();
    node.handle(Time::ZERO, Input::ManifestLoaded { manifest: manifest(), chunk_bytes: vec![9; 4] });
    node.handle(Time::ZERO, Input::Wanted { manifest: manifest(), chunks: ChunkSet::full(4) });
    let mut now = Time::ZERO;
    for lease in 0..=EXCUSES_MAX.into() {
        assert!(!node.trust_of(&peer(), now).0, "it may be bad luck");
        let access = Access { ticket: 0, secret: [0; 32] };
        let grant = PeerMessage::Grant { manifest: manifest(), lease, ttl_ms: 30_000, chunks: vec![2], access };
        node.handle(now, Input::Message { from: peer(), message: grant });
        let read = |o| if let Output::Read { op, .. } = o { Some(op) } else { None };
        let op = std::iter::from_fn(|| node.poll_output()).find_map(read).expect("it is read");
        let message = PeerMessage::Revoke { manifest: manifest(), lease };
        node.handle(now, Input::Message { from: peer(), message });
        node.handle(now, Input::ReadDone { op, outcome: ReadOutcome::Corrupt });
        now = now + EXCUSE_SPACING;
    }
    assert!(node.trust_of(&peer(), now).0);
}

/// The last status record that it sent since the last call.
fn told(node: &mut Node) -> Option<std::sync::Arc<aquifer_core::Status>> {
    let record = |o| if let Output::Gossip(GossipMessage::Status(signed)) = o { signed.open().ok() } else { None };
    std::iter::from_fn(|| node.poll_output()).filter_map(record).last()
}

#[test]
fn rates_go_out_with_the_next_record_and_call_for_none() {
    let mut node = node();
    node.handle_timeout(Time::ZERO);
    assert_eq!(told(&mut node).map(|s| s.upload_bytes_per_s), Some(0));
    let due = node.poll_timeout();
    let rates = Rates { upload_bytes_per_s: 9, uploading_bytes_per_s: 8, download_bytes_per_s: 7 };
    node.handle(Time::ZERO, Input::Rates(rates));
    assert_eq!(node.poll_timeout(), due);
    assert!(told(&mut node).is_none());
    node.handle_timeout(Time::ZERO + STATUS_INTERVAL * 2);
    let said = told(&mut node).expect("it speaks now and then");
    assert_eq!((said.upload_bytes_per_s, said.uploading_bytes_per_s, said.download_bytes_per_s), (9, 8, 7));
}

#[test]
fn who_drains_says_so_asks_nobody_and_is_done_once() {
    let mut node = node();
    node.handle(Time::ZERO, Input::ManifestLoaded { manifest: manifest(), chunk_bytes: vec![9; 4] });
    node.handle(Time::ZERO, Input::Wanted { manifest: manifest(), chunks: ChunkSet::full(4) });
    node.handle(Time::ZERO, Input::Held { manifest: manifest(), chunks: ChunkSet::from_indices(4, [0]) });
    std::iter::from_fn(|| node.poll_output()).for_each(drop);
    assert_eq!(node.drain_progress(), None);
    node.handle(Time::ZERO, Input::Drain);
    node.handle(Time::ZERO, Input::Drain);
    let outputs: Vec<Output> = std::iter::from_fn(|| node.poll_output()).collect();
    let says = |o: &Output| {
        let Output::Gossip(GossipMessage::Status(signed)) = o else { return false };
        signed.open().is_ok_and(|s| s.draining)
    };
    assert_eq!(outputs.iter().filter(|o| says(o)).count(), 1, "{outputs:?}");
    ask(&mut node, Time::ZERO);
    assert!(!refused(&mut node), "nobody else has the first");
    assert_eq!(node.drain_progress().map(|p| p.leased_bytes), Some(9), "it was granted at once");
    let other = ManifestHash::of(b"other");
    for (wanted, is_refused) in [(ChunkSet::full(4), true), (ChunkSet::empty(4), false)] {
        let (have, terms) = (ChunkSet::empty(4), Terms::default());
        let message = PeerMessage::Ask { manifest: other, wanted, have, terms };
        node.handle(Time::ZERO, Input::Message { from: peer(), message });
        assert_eq!(refused(&mut node), is_refused, "what is not here does not come");
    }
    node.handle(Time::ZERO, Input::Disconnected { node: peer() });
    let (mut now, mut done) = (Time::ZERO, vec![]);
    while now < Time::ZERO + DRAIN_SETTLE * 3 {
        for output in std::iter::from_fn(|| node.poll_output()) {
            let asks =
                matches!(&output, Output::Send { message: PeerMessage::Ask { wanted, .. }, .. } if !wanted.is_empty());
            assert!(!asks, "{output:?}");
            done.extend(matches!(output, Output::Drained).then_some(now));
        }
        now = node.poll_timeout().expect("it speaks now and then").0;
        node.handle_timeout(now);
        node.audit(now).unwrap();
    }
    assert_eq!(done, [Time::ZERO + DRAIN_SETTLE]);
}

/// Some look for ever for a manifest that nobody has any more.
#[test]
fn who_drains_waits_for_those_who_fetch_what_it_has_and_no_others() {
    for (manifest_asked, ends) in [(manifest(), DRAIN_SETTLE * 3 / 2), (ManifestHash::of(b"other"), DRAIN_SETTLE)] {
        let mut node = node();
        node.handle(Time::ZERO, Input::ManifestLoaded { manifest: manifest(), chunk_bytes: vec![9; 4] });
        node.handle(Time::ZERO, Input::Drain);
        let asked = PeerMessage::ManifestAsk { manifest: manifest_asked, offset: 0 };
        node.handle(Time::ZERO + DRAIN_SETTLE / 2, Input::Message { from: peer(), message: asked });
        let (mut now, mut done) = (Time::ZERO + DRAIN_SETTLE / 2, vec![]);
        while now < Time::ZERO + DRAIN_SETTLE * 3 {
            done.extend(
                std::iter::from_fn(|| node.poll_output()).filter(|o| matches!(o, Output::Drained)).map(|_| now),
            );
            now = node.poll_timeout().expect("it speaks now and then").0;
            node.handle_timeout(now);
        }
        assert_eq!(done, [Time::ZERO + ends]);
    }
}

#[test]
fn what_it_did_is_counted() {
    let mut node = node();
    node.handle(Time::ZERO, Input::ManifestLoaded { manifest: manifest(), chunk_bytes: vec![9; 4] });
    node.handle(Time::ZERO, Input::Wanted { manifest: manifest(), chunks: ChunkSet::full(4) });
    node.handle(Time::ZERO, Input::Held { manifest: manifest(), chunks: ChunkSet::from_indices(4, [0, 1]) });
    ask(&mut node, Time::ZERO);
    let Counters { grants, leases_granted, asks_received, .. } = node.counters();
    assert_eq!((grants, leases_granted, asks_received), (1, 2, 1), "small chunks go together");
    node.handle(Time::ZERO, Input::Lost { manifest: manifest(), chunks: ChunkSet::from_indices(4, [0]) });
    let later = Time::ZERO + crate::limits::LEASE_TTL;
    node.handle_timeout(later);
    assert_eq!((node.counters().leases_revoked, node.counters().leases_expired), (1, 1));
    for (n, outcome) in [ReadOutcome::Failed, ReadOutcome::Declined, ReadOutcome::Revoked].into_iter().enumerate() {
        let access = Access { ticket: 0, secret: [0; 32] };
        let now = later + Duration::from_secs(10 * (n as u64 + 1));
        let status = aquifer_core::Status { seq: n as u64 + 2, ..bare_status(peer()) };
        let message = GossipMessage::Status(SignedStatus::sign(&status, &NodeSecret::from_seed([2; 32])));
        node.handle(now, Input::Gossip { via: peer(), token: 0, message });
        node.handle_timeout(now);
        let grant = PeerMessage::Grant { manifest: manifest(), lease: 1, ttl_ms: 30_000, chunks: vec![2], access };
        node.handle(now, Input::Message { from: peer(), message: grant });
        let read = |o| if let Output::Read { op, .. } = o { Some(op) } else { None };
        let op = std::iter::from_fn(|| node.poll_output()).find_map(read).expect("it is read");
        node.handle(now, Input::ReadDone { op, outcome });
    }
    assert_eq!(node.counters().chunks_refetched, 1, "who declined had no bad read");
    assert_eq!(node.counters().refusals_sent, 0);
    node.handle(later, Input::Forget { manifest: manifest() });
    assert!(node.spoiled.is_empty() && node.counters().refusals_sent == 1);
}
