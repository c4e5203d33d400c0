//! A node's life on record: all that it was told, in order, and a digest of all that it decided.
//!
//! A [`Recorded`] is a [`Node`] that may keep such a record; the driver writes the record's bytes
//! wherever it likes. A [`Replay`] reads them, tells a new node the same, and says at which event
//! it first decided something else: that, or nothing, since a node draws on nothing but what it is
//! told.
//!
//! No secret is in a record. The identity's key only signs the node's own status records, so the
//! replaying node goes by the same name and signs with a key that is everybody's; signatures are
//! left out of the digest, which loses nothing, because they follow from what they sign. The
//! secrets that come with grants are blanked: a node never looks at them. What a record does tell
//! is who is in the mesh, where they are, and which chunks went where.

mod frame;
mod replay;

pub use replay::{Difference, Replay, Report, replay, variant};

use crate::io::{Input, Output};
use crate::limits::RECORD_FRAME_BYTES_MAX;
use crate::node::{Config, Node};
use crate::rollout::{Override, Stand};
use crate::swarm::CostlyLimit;
use aquifer_core::codec::{self, CodecError, Kind};
use aquifer_core::{
    ChannelName, GossipMessage, Hash, NodeId, NodeSecret, PeerMessage, PublisherKey, SignedRelease, SignedStatement,
    Time,
};
use bincode::{Decode, Encode};
use frame::Writer;
use std::collections::VecDeque;
use std::ops::Deref;
use thiserror::Error;

/// Grows when the meaning of a recording's bytes changes.
const FORMAT: u16 = 3;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum RecordError {
    #[error("not a recording of a node: {0}")]
    Foreign(CodecError),
    #[error("a recording of format {found}; this build reads format {FORMAT}")]
    Format { found: u16 },
    #[error("the recording ends before the node's first moment")]
    Empty,
    #[error("the recording is damaged at byte {offset}")]
    Damaged { offset: u64 },
    #[error("the event at byte {offset} cannot be read: {reason}")]
    Malformed { offset: u64, reason: String },
}

/// A node, and its record if it keeps one. What the node shows of itself is the node's; its three
/// doors are here.
#[derive(Debug)]
pub struct Recorded {
    node: Node,
    tape: Option<Tape>,
}

#[derive(Debug)]
struct Tape {
    recorder: Recorder,
    /// Decided and not yet polled. A node on record is drained in the step that decided, so that
    /// each event is charged with its own decisions, however the driver interleaves the two.
    out: VecDeque<Output>,
}

impl Recorded {
    /// A node off the record. Costs nothing.
    pub fn new(config: Config, now: Time) -> Self {
        Recorded { node: Node::new(config, now), tape: None }
    }

    /// A node that keeps a record from its first moment.
    pub fn on_record(config: Config, now: Time) -> Self {
        let head = Head::of(&config, now);
        let mut node = Node::new(config, now);
        let mut out = VecDeque::new();
        let mut digest = Digest::default();
        let decided = digest.drain(&mut node, |output| out.push_back(output));
        let recorder = Recorder::new(&head, decided, digest);
        Recorded { node, tape: Some(Tape { recorder, out }) }
    }

    pub fn handle(&mut self, now: Time, input: Input) {
        match &mut self.tape {
            None => self.node.handle(now, input),
            Some(tape) => tape.step(&mut self.node, now, Event::Handle(input)),
        }
    }

    pub fn handle_timeout(&mut self, now: Time) {
        match &mut self.tape {
            None => self.node.handle_timeout(now),
            Some(tape) => tape.step(&mut self.node, now, Event::Timeout),
        }
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        match &mut self.tape {
            None => self.node.poll_output(),
            Some(tape) => tape.out.pop_front(),
        }
    }

    /// The record since the last call, to be appended to what earlier calls returned. Empty if
    /// there is nothing new.
    pub fn take_record(&mut self) -> Vec<u8> {
        self.tape.as_mut().map(|t| std::mem::take(&mut t.recorder.bytes)).unwrap_or_default()
    }
}

impl Deref for Recorded {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl Tape {
    fn step(&mut self, node: &mut Node, now: Time, event: Event) {
        let kept = event.without_secrets();
        event.happens_to(node, now);
        let decided = self.recorder.digest.drain(node, |output| self.out.push_back(output));
        self.recorder.keep(&Step { at: now, event: kept, decided });
    }
}

/// Turns a node's life into bytes.
#[derive(Debug)]
struct Recorder {
    /// Empty once an event was too long to be kept: what came after it could not be replayed.
    writer: Option<Writer>,
    digest: Digest,
    bytes: Vec<u8>,
}

impl Recorder {
    fn new(head: &Head, decided: Decided, digest: Digest) -> Self {
        let mut bytes = frame::header();
        let mut writer = Writer::after(&bytes);
        writer.seal(&codec::encode(Kind::RecordingFrame, &(head, decided)), &mut bytes);
        Recorder { writer: Some(writer), digest, bytes }
    }

    fn keep(&mut self, step: &Step) {
        let Some(writer) = &mut self.writer else { return };
        let body = codec::encode(Kind::RecordingFrame, step);
        if body.len() > RECORD_FRAME_BYTES_MAX {
            self.writer = None;
            return;
        }
        writer.seal(&body, &mut self.bytes);
    }
}

/// What a node is made of, but for its key.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct Head {
    me: NodeId,
    incarnation: u64,
    name: String,
    version: String,
    labels: Vec<(String, String)>,
    channels: Vec<(ChannelName, Vec<PublisherKey>)>,
    accepted: Vec<SignedRelease>,
    said: Vec<SignedStatement>,
    stands: Vec<(ChannelName, Stand)>,
    overrides: Vec<(ChannelName, Override)>,
    leased_bytes_max: u64,
    upload_bytes_per_s: Option<u64>,
    costly: CostlyLimit,
    seed: u64,
    at: Time,
}

impl Head {
    fn of(config: &Config, at: Time) -> Self {
        // No `..`: what a node is made of must not be forgotten here.
        let Config {
            identity,
            incarnation,
            name,
            version,
            labels,
            channels,
            accepted,
            said,
            stands,
            overrides,
            leased_bytes_max,
            upload_bytes_per_s,
            costly,
            seed,
        } = config.clone();
        Head {
            me: identity.public(),
            incarnation,
            name,
            version,
            labels,
            channels,
            accepted,
            said,
            stands,
            overrides,
            leased_bytes_max,
            upload_bytes_per_s,
            costly,
            seed,
            at,
        }
    }

    fn node(self) -> Node {
        let config = Config {
            identity: NodeSecret::from_seed(EVERYBODYS_KEY),
            incarnation: self.incarnation,
            name: self.name,
            version: self.version,
            labels: self.labels,
            channels: self.channels,
            accepted: self.accepted,
            said: self.said,
            stands: self.stands,
            overrides: self.overrides,
            leased_bytes_max: self.leased_bytes_max,
            upload_bytes_per_s: self.upload_bytes_per_s,
            costly: self.costly,
            seed: self.seed,
        };
        Node::known_as(self.me, config, self.at)
    }
}

/// What a replaying node signs with, for nobody to check.
const EVERYBODYS_KEY: [u8; 32] = [0; 32];

/// One thing that a node was told, and what it came to.
#[derive(Debug, Encode, Decode)]
struct Step {
    at: Time,
    event: Event,
    decided: Decided,
}

#[derive(Debug, Encode, Decode)]
enum Event {
    Handle(Input),
    Timeout,
}

impl Event {
    fn happens_to(self, node: &mut Node, now: Time) {
        match self {
            Event::Handle(input) => node.handle(now, input),
            Event::Timeout => node.handle_timeout(now),
        }
    }

    fn without_secrets(&self) -> Self {
        let mut kept = match self {
            Event::Handle(input) => Event::Handle(input.clone()),
            Event::Timeout => Event::Timeout,
        };
        if let Event::Handle(Input::Message { message: PeerMessage::Grant { access, .. }, .. }) = &mut kept {
            access.secret = [0; 32];
        }
        kept
    }
}

/// How many outputs an event led to, and what they and all before them come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Decided {
    outputs: u32,
    digest: [u8; 16],
}

/// BLAKE3 over the digest before it, each output, and when the node wants to be woken and why.
#[derive(Clone, Debug)]
struct Digest(Hash);

impl Default for Digest {
    fn default() -> Self {
        Digest(Hash::of(b"aquifer decisions v1"))
    }
}

impl Digest {
    /// Polls everything that the node has decided, and hands it on.
    fn drain(&mut self, node: &mut Node, mut each: impl FnMut(Output)) -> Decided {
        let mut bytes = self.0.0.to_vec();
        let mut outputs = 0;
        while let Some(output) = node.poll_output() {
            append_unsigned(&mut bytes, &output);
            outputs += 1;
            each(output);
        }
        codec::append(&mut bytes, &node.poll_timeout());
        self.0 = Hash::of(&bytes);
        let mut digest = [0; 16];
        digest.copy_from_slice(&self.0.0[..16]);
        Decided { outputs, digest }
    }
}

/// An output without the signatures of status records.
fn append_unsigned(bytes: &mut Vec<u8>, output: &Output) {
    if let Output::Gossip(GossipMessage::Status(signed)) = output {
        codec::append(bytes, &signed.body());
    } else if let Output::Send { to, message: PeerMessage::Snapshot { statuses, releases, statements } } = output {
        let unsigned: Vec<(&[u8], u32)> = statuses.iter().map(|(signed, age)| (signed.body(), *age)).collect();
        codec::append(bytes, &(to, unsigned, releases, statements));
    } else {
        codec::append(bytes, output);
    }
}

#[cfg(test)]
mod tests;
