use super::*;
use crate::io::{LocalStatus, OpId, Rates, ReadOutcome};
use crate::testing::bare_status;
use aquifer_core::message::{Outcome, Refusal, Returned, Terms};
use aquifer_core::{
    Access, ChannelStatus, ChunkSet, ManifestHash, Policy, PublisherSecret, Release, SignedStatus, Status,
};
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;

const CHUNKS: u32 = 40;
const SECRET: [u8; 32] = [0xa5; 32];
const IDENTITY: [u8; 32] = [0x5a; 32];
const TERMS: Terms = Terms { credit_bytes: 4 << 20, flight_bytes: 1 << 20 };

fn publisher() -> PublisherSecret {
    PublisherSecret::from_seed([7; 32])
}

fn peer(n: u8) -> NodeSecret {
    NodeSecret::from_seed([n + 1; 32])
}

fn config(seed: u64) -> Config {
    Config {
        identity: NodeSecret::from_seed(IDENTITY),
        incarnation: 1,
        name: "n".into(),
        version: "test".into(),
        labels: vec![("zone".into(), "a".into())],
        channels: vec![("c".parse().unwrap(), vec![publisher().public()])],
        accepted: vec![release(1)],
        said: Vec::new(),
        stands: Vec::new(),
        overrides: Vec::new(),
        leased_bytes_max: 16 << 20,
        upload_bytes_per_s: Some(100 << 20),
        costly: Default::default(),
        seed,
    }
}

fn release(seq: u64) -> SignedRelease {
    let release = Release {
        channel: "c".parse().unwrap(),
        seq,
        manifest: manifest(),
        manifest_bytes: 8,
        rolls_back_to: None,
        policy: Policy::default(),
        created_unix_ms: 0,
        note: String::new(),
    };
    SignedRelease::sign(&release, &publisher())
}

fn manifest() -> ManifestHash {
    ManifestHash::of(b"manifest")
}

fn status(n: u8, seq: u64) -> SignedStatus {
    let channel = ChannelStatus {
        channel: "c".parse().unwrap(),
        seq: 1,
        manifest: manifest(),
        chunks_wanted: 40,
        chunks_have: 9,
        also: Vec::new(),
        report: None,
    };
    let status = Status {
        seq,
        name: format!("p{n}"),
        addresses: vec![format!("a{n}")],
        channels: vec![channel],
        ..bare_status(peer(n).public())
    };
    SignedStatus::sign(&status, &peer(n))
}

/// Peers that say whatever comes to their mind, and a node that plays along: its reads end somehow,
/// its grants come back or not.
struct Life {
    node: Recorded,
    now: Time,
    rng: SmallRng,
    reads: Vec<OpId>,
    grants: Vec<(NodeId, u64, u32)>,
    polled: u64,
}

impl Life {
    fn begin(seed: u64) -> Self {
        let now = Time::ZERO + Duration::from_millis(3);
        let node = Recorded::on_record(config(seed), now);
        Life { node, now, rng: SmallRng::seed_from_u64(seed), reads: vec![], grants: vec![], polled: 0 }
    }

    /// A recording of a random life of that many steps, and the number of decisions in it.
    fn recorded(seed: u64, steps: usize) -> (Vec<u8>, u64) {
        let mut life = Life::begin(seed);
        let manifest = manifest();
        life.told(Input::Local(LocalStatus { addresses: vec!["here".into()], ..LocalStatus::default() }));
        life.told(Input::ManifestLoaded { manifest, chunk_bytes: vec![1 << 20; CHUNKS as usize] });
        life.told(Input::Held { manifest, chunks: ChunkSet::from_indices(CHUNKS, 0..9) });
        life.told(Input::Wanted { manifest, chunks: ChunkSet::full(CHUNKS) });
        for _ in 0..steps {
            life.step();
        }
        life.drain();
        (life.node.take_record(), life.polled)
    }

    fn step(&mut self) {
        self.now = self.now + Duration::from_micros(self.rng.random_range(0..50_000));
        let n = self.rng.random_range(0..6);
        let (from, manifest) = (peer(n).public(), manifest());
        let set = |rng: &mut SmallRng| ChunkSet::from_indices(CHUNKS, (0..CHUNKS).filter(|_| rng.random()));
        let chunk = self.rng.random_range(0..CHUNKS);
        let message = |message| Input::Message { from, message };
        let input = match self.rng.random_range(0..14) {
            0 => Input::Connected { node: from },
            1 if self.rng.random_range(0..4) == 0 => Input::Disconnected { node: from },
            2 => Input::Gossip {
                via: from,
                token: 7,
                message: GossipMessage::Status(status(n, self.rng.random_range(0..99))),
            },
            3 => {
                let (wanted, have) = (set(&mut self.rng), set(&mut self.rng));
                message(PeerMessage::Ask { manifest, wanted, have, terms: TERMS })
            }
            4 => {
                let (taken, again) = (vec![chunk], vec![(chunk + 1) % CHUNKS]);
                message(PeerMessage::Progress { manifest, returned: vec![], taken, again, terms: TERMS })
            }
            5 | 6 => {
                let access = Access { ticket: 1, secret: SECRET };
                let lease = self.rng.random_range(0..99);
                message(PeerMessage::Grant { manifest, lease, ttl_ms: 1000, chunks: vec![chunk], access })
            }
            7 | 8 if !self.reads.is_empty() => {
                let op = self.reads.swap_remove(self.rng.random_range(0..self.reads.len()));
                let outcome = match self.rng.random_range(0..8) {
                    0 => ReadOutcome::Corrupt,
                    1 => ReadOutcome::Failed,
                    _ => ReadOutcome::Verified,
                };
                Input::ReadDone { op, outcome }
            }
            9 if !self.grants.is_empty() => {
                let (to, lease, chunk) = self.grants.swap_remove(self.rng.random_range(0..self.grants.len()));
                let returned = vec![Returned { lease, chunk, outcome: Outcome::Verified }];
                let (taken, again) = (vec![], vec![]);
                let message = PeerMessage::Progress { manifest, returned, taken, again, terms: TERMS };
                Input::Message { from: to, message }
            }
            10 => message(PeerMessage::Refuse { manifest, refusal: Refusal::Full }),
            // Most lives end before.
            11 if self.rng.random_range(0..40) == 0 => Input::Drain,
            12 => Input::Rates(Rates { uploading_bytes_per_s: self.rng.random(), ..Rates::default() }),
            _ => {
                self.node.handle_timeout(self.now);
                return self.drain();
            }
        };
        self.told(input);
    }

    /// Polls what was decided, but not always all of it before the next event.
    fn told(&mut self, input: Input) {
        self.node.handle(self.now, input);
        if self.rng.random() {
            self.drain();
        }
    }

    fn drain(&mut self) {
        while let Some(output) = self.node.poll_output() {
            self.polled += 1;
            if let Output::Read { op, .. } = output {
                self.reads.push(op);
            } else if let Output::Grant { to, lease, chunks, .. } = output {
                self.grants.extend(chunks.into_iter().map(|c| (to, lease, c)));
            }
        }
    }
}

/// The frames' bodies of a recording.
fn bodies(recording: &[u8]) -> Vec<Vec<u8>> {
    let mut reader = frame::Reader::default();
    reader.push(recording);
    std::iter::from_fn(|| reader.next().unwrap().map(|(_, body)| body.to_vec())).collect()
}

/// A recording of these frames, as its writer would have made it.
fn sealed(bodies: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = frame::header();
    let mut writer = Writer::after(&bytes);
    bodies.iter().for_each(|body| writer.seal(body, &mut bytes));
    bytes
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|w| w == part)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_recorded_life_is_lived_again(seed: u64, steps in 0usize..300) {
        let (recording, polled) = Life::recorded(seed, steps);
        let report = replay(&recording).unwrap();
        prop_assert_eq!(&report.difference, &None);
        prop_assert_eq!((report.events, report.decisions), (4 + steps as u64, polled));
        prop_assert_eq!((report.name.as_str(), report.torn_bytes), ("n", 0));
        prop_assert_eq!(report.node, config(0).identity.public());
    }

    #[test]
    fn a_flipped_bit_is_found(seed: u64, at: prop::sample::Index, bit in 0u8..8) {
        let (mut recording, _) = Life::recorded(seed, 60);
        let at = at.index(recording.len());
        recording[at] ^= 1 << bit;
        prop_assert!(replay(&recording).is_err());
    }

    #[test]
    fn a_torn_end_loses_one_event_at_most(seed: u64, at: prop::sample::Index) {
        let (recording, _) = Life::recorded(seed, 60);
        let whole = bodies(&recording);
        let cut = at.index(recording.len());
        match replay(&recording[..cut]) {
            Ok(report) => {
                prop_assert_eq!(&report.difference, &None);
                let kept = usize::try_from(report.events).unwrap() + 1;
                prop_assert_eq!(sealed(&whole[..kept]).len() + report.torn_bytes, cut);
            }
            Err(error) => prop_assert!(error == RecordError::Empty && cut < sealed(&whole[..1]).len()),
        }
    }

    #[test]
    fn a_stream_may_come_in_any_pieces(seed: u64, piece in 1usize..700) {
        let (recording, polled) = Life::recorded(seed, 40);
        let (mut replay, mut seen) = (Replay::default(), 0);
        for piece in recording.chunks(piece) {
            replay.feed(piece, &mut |_, _| seen += 1).unwrap();
        }
        prop_assert_eq!(replay.finish().unwrap().difference, None);
        prop_assert_eq!(seen, polled);
    }

    #[test]
    fn whatever_is_in_a_frame_is_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at: prop::sample::Index) {
        let mut frames = bodies(&Life::recorded(1, 8).0);
        let at = at.index(frames.len());
        frames[at].truncate(6);
        frames[at].extend(bytes);
        // It may be an event by accident; then the node did not decide this then.
        let replayed = replay(&sealed(&frames));
        prop_assert!(replayed.is_err() || replayed.unwrap().difference.is_some());
    }
}

#[test]
fn another_node_is_told_apart_by_what_it_decides() {
    let (recording, _) = Life::recorded(3, 200);
    let mut frames = bodies(&recording);
    let (mut head, then) =
        codec::decode::<(Head, Decided), RECORD_FRAME_BYTES_MAX>(Kind::RecordingFrame, &frames[0]).unwrap();
    head.name = "m".into();
    frames[0] = codec::encode(Kind::RecordingFrame, &(head, then));
    let difference = replay(&sealed(&frames)).unwrap().difference.expect("it says another name of itself");
    assert!(difference.event > 0 && !difference.outputs.is_empty(), "{difference:?}");
    assert!(difference.told.len() <= 250, "{}", difference.told.len());
}

#[test]
fn an_event_left_out_is_missed() {
    let mut frames = bodies(&Life::recorded(3, 200).0);
    // The node is never told that it holds something.
    frames.remove(3);
    let report = replay(&sealed(&frames)).unwrap();
    assert!(report.difference.is_some_and(|d| d.event == 3), "its wants are asked for at once");
    assert_eq!(report.events, 203);
}

#[test]
fn no_secret_is_in_a_recording() {
    let mut life = Life::begin(1);
    let access = Access { ticket: 1, secret: SECRET };
    let message = PeerMessage::Grant { manifest: manifest(), lease: 1, ttl_ms: 1, chunks: vec![1], access };
    life.told(Input::Message { from: peer(1).public(), message });
    let recording = life.node.take_record();
    assert!(contains(&recording, &peer(1).public().0), "the grant is there");
    assert!(!contains(&recording, &SECRET) && !contains(&recording, &IDENTITY));
}

#[test]
fn what_is_no_recording_is_refused() {
    assert_eq!(replay(b""), Err(RecordError::Empty));
    assert_eq!(replay(&frame::header()), Err(RecordError::Empty));
    assert!(matches!(replay(b"some other file"), Err(RecordError::Foreign(_))));
    let newer = codec::encode(Kind::Recording, &(FORMAT + 1));
    assert_eq!(replay(&newer), Err(RecordError::Format { found: FORMAT + 1 }));
}

#[test]
fn a_node_off_the_record_decides_the_same() {
    let now = Time::ZERO;
    let (mut off, mut on) = (Recorded::new(config(5), now), Recorded::on_record(config(5), now));
    for node in [&mut off, &mut on] {
        node.handle(now, Input::Connected { node: peer(1).public() });
        node.handle_timeout(now);
    }
    let outputs = |node: &mut Recorded| std::iter::from_fn(|| node.poll_output()).map(|o| format!("{o:?}")).collect();
    let (off_outputs, on_outputs): (Vec<_>, Vec<_>) = (outputs(&mut off), outputs(&mut on));
    assert_eq!(off_outputs, on_outputs);
    assert!(off.take_record().is_empty() && !on.take_record().is_empty() && on.take_record().is_empty());
}

#[test]
fn a_variant_is_named() {
    assert_eq!(variant(&Event::Timeout), "Timeout");
    assert_eq!(variant(&Event::Handle(Input::Leave)), "Handle");
    assert_eq!(variant(&Input::Connected { node: peer(1).public() }), "Connected");
}
