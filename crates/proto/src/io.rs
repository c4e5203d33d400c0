//! The doors of the machine: all that can come in, all that can go out.

use crate::releases::Rejection;
use crate::rollout::{EngineId, Facts, Order, Stand};
use aquifer_core::{
    ChannelName, ChunkSet, GossipMessage, ManifestHash, NodeId, PeerMessage, Release, Selector, SignedRelease,
    SignedStatement,
};
use bincode::{Decode, Encode};
use std::time::Duration;

/// A read the node has started; the driver owes exactly one [`Input::ReadDone`] for it.
pub type OpId = u64;

/// What happened.
#[derive(Clone, Debug, Encode, Decode)]
pub enum Input {
    /// A control connection to `node` is up, or the last one to it is gone.
    Connected {
        node: NodeId,
    },
    Disconnected {
        node: NodeId,
    },
    Message {
        from: NodeId,
        message: PeerMessage,
    },
    /// `token` is handed back in [`Output::Verdict`].
    Gossip {
        via: NodeId,
        token: u64,
        message: GossipMessage,
    },
    /// What this node says of itself changed.
    Local(LocalStatus),
    /// How fast chunks come and go here.
    Rates(Rates),
    /// This node's own publisher made a release.
    Publish {
        release: SignedRelease,
    },
    /// The driver lacks this manifest: get it from somebody. `bytes` is its length, zero if no
    /// release told it.
    ManifestWanted {
        manifest: ManifestHash,
        bytes: u64,
    },
    /// A manifest is known; its distinct chunks have these lengths, in their numbering.
    ManifestLoaded {
        manifest: ManifestHash,
        chunk_bytes: Vec<u32>,
    },
    /// Which chunks of the manifest this node is to hold, whether it has them already or not.
    Wanted {
        manifest: ManifestHash,
        chunks: ChunkSet,
    },
    /// Chunks that lie here verified, and may be served.
    Held {
        manifest: ManifestHash,
        chunks: ChunkSet,
    },
    /// Which chunks of the manifest are given as [`CostlyLimit`](crate::CostlyLimit) allows, of those that are
    /// held and to be held: all of them. To be told before they are held.
    Costly {
        manifest: ManifestHash,
        chunks: ChunkSet,
    },
    /// Chunks that lie here no more.
    Lost {
        manifest: ManifestHash,
        chunks: ChunkSet,
    },
    /// The manifest is of no more interest: neither pull nor serve it.
    Forget {
        manifest: ManifestHash,
    },
    ReadDone {
        op: OpId,
        outcome: ReadOutcome,
    },
    /// How an engine that follows the channel is; and that it is gone.
    Engine {
        channel: ChannelName,
        engine: EngineId,
        facts: Facts,
    },
    EngineGone {
        channel: ChannelName,
        engine: EngineId,
    },
    /// Watch the nodes of the channel that releases for this selector are for, to name them and to say when they
    /// are prepared: see [`crate::rollout::Rollout::onlooker`]. Asked again, it changes nothing.
    LookOn {
        channel: ChannelName,
        selector: Selector,
    },
    /// A word about a release, signed here.
    Say {
        statement: SignedStatement,
    },
    /// Get ready to leave: give only what nobody else has, ask for nothing. [`Output::Drained`] follows, once.
    Drain,
    /// Say goodbye.
    Leave,
}

/// The part of the status record that only the driver knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct LocalStatus {
    pub addresses: Vec<String>,
    pub data_endpoints: Vec<String>,
    pub engines: u32,
    pub engines_ready: u32,
}

/// What the status record says for others to reckon with. It changes all the time, so no record is sent for it: it goes
/// out with the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Rates {
    /// Chunk bytes this node can upload in a second: its limit, or the most that it has been seen to send. Zero: not
    /// known.
    pub upload_bytes_per_s: u64,
    /// What it sends in a second now.
    pub uploading_bytes_per_s: u64,
    /// The most that it has been seen to get in a second. Zero: not known.
    pub download_bytes_per_s: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum ReadOutcome {
    /// The bytes landed and hash to their name. The chunk counts as held.
    Verified,
    /// The bytes landed and do not hash to their name.
    Corrupt,
    /// The holder took the lease back.
    Revoked,
    /// Nothing came: refused, unreachable, stalled or cut off.
    Failed,
    /// This node had no room, or cancelled the read.
    Declined,
}

/// What to do.
#[derive(Clone, Debug, Encode)]
pub enum Output {
    Send {
        to: NodeId,
        message: PeerMessage,
    },
    Gossip(GossipMessage),
    Verdict {
        token: u64,
        verdict: Verdict,
    },
    Dial {
        node: NodeId,
        addresses: Vec<String>,
    },
    /// Tell `to` that it may read `chunks` under `lease`: the driver adds how to reach its data
    /// plane, and keeps the chunks where they are until [`Output::LeaseClosed`].
    Grant {
        to: NodeId,
        manifest: ManifestHash,
        lease: u64,
        ttl: Duration,
        chunks: Vec<u32>,
    },
    /// One chunk of a lease is free to move again.
    LeaseClosed {
        lease: u64,
        chunk: u32,
    },
    /// Read `chunk` from `peer`. See [`OpId`].
    Read {
        op: OpId,
        peer: NodeId,
        manifest: ManifestHash,
        lease: u64,
        chunk: u32,
    },
    CancelRead {
        op: OpId,
    },
    /// A release of a followed channel that was not known: persist what is known of the channel. It need not be
    /// the newest, nor for this node.
    ReleaseAccepted {
        signed: SignedRelease,
        release: Box<Release>,
    },
    /// The same of a word about a release.
    StatementAccepted {
        signed: SignedStatement,
    },
    /// Where this node stands in the channel: which release is for it, and which it goes back to. Persist it
    /// before anything else is done, have the manifests of both, and no others.
    Stand {
        channel: ChannelName,
        stand: Stand,
    },
    /// What an engine is to do.
    Order {
        channel: ChannelName,
        engine: EngineId,
        order: Order,
    },
    /// The bytes of a manifest that was wanted; they hash to its name.
    ManifestFetched {
        manifest: ManifestHash,
        bytes: Vec<u8>,
    },
    /// `to` wants the manifest's bytes from `offset` on.
    ManifestAsked {
        to: NodeId,
        manifest: ManifestHash,
        offset: u64,
    },
    /// Every wanted chunk of the manifest is held.
    Hydrated {
        manifest: ManifestHash,
    },
    /// Nobody is known to need this node any more: it may leave.
    Drained,
    /// A reader says that a chunk it got from here was wrong: look at it again.
    Recheck {
        manifest: ManifestHash,
        chunk: u32,
        reader: NodeId,
    },
    Notice(Notice),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode)]
pub enum Verdict {
    /// Believe it and pass it on.
    Accept,
    /// Old news.
    Ignore,
    /// A lie; whoever passed it on should not have.
    Reject,
}

/// Worth telling a person once.
#[derive(Clone, Debug, PartialEq, Eq, Encode)]
pub enum Notice {
    MemberJoined {
        node: NodeId,
        name: String,
    },
    MemberLeft {
        node: NodeId,
        name: String,
        said_goodbye: bool,
    },
    /// The first release of this kind that this peer brought.
    ReleaseRejected {
        via: NodeId,
        rejection: Rejection,
        detail: String,
    },
    StatusRejected {
        via: NodeId,
        detail: String,
    },
    PeerBlamed {
        node: NodeId,
        manifest: ManifestHash,
        chunk: u32,
        avoid: Duration,
    },
    PeerFailing {
        node: NodeId,
        avoid: Duration,
    },
}
