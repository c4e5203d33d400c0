//! What agents say to each other.
//!
//! These types live here because the brain decides them and the mesh carries them, and the two do
//! not know each other.

use crate::chunkset::ChunkSet;
use crate::codec::{self, CodecError, Kind};
use crate::hash::ManifestHash;
use crate::limits::MESSAGE_BYTES_MAX;
use crate::release::SignedRelease;
use crate::statement::SignedStatement;
use crate::status::SignedStatus;
use bincode::{Decode, Encode};
use std::fmt;

/// Said to everybody, passed on by everybody.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum GossipMessage {
    Status(SignedStatus),
    Release(SignedRelease),
    Statement(SignedStatement),
}

/// Said by one agent to another, over their authenticated control connection. Delivered in
/// order while the connection lasts; lost with it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum PeerMessage {
    /// The first words on a new connection: all the sender knows of the mesh. Each status comes
    /// with its age in milliseconds, counted by the sender. Releases are the last few of each channel,
    /// oldest first.
    Snapshot { statuses: Vec<(SignedStatus, u32)>, releases: Vec<SignedRelease>, statements: Vec<SignedStatement> },
    /// "Send me the manifest's bytes from `offset` on."
    ManifestAsk { manifest: ManifestHash, offset: u64 },
    /// Bytes of a manifest from `offset` on. `total` is its whole length; zero says that the
    /// sender does not have it.
    ManifestPiece { manifest: ManifestHash, offset: u64, total: u64, bytes: Vec<u8> },
    /// "I want these chunks, and have or am getting those; grant me what the terms allow." Stands
    /// until it is replaced, withdrawn with an empty `wanted`, refused, or the connection ends.
    Ask { manifest: ManifestHash, wanted: ChunkSet, have: ChunkSet, terms: Terms },
    /// Corrects a standing ask and gives leases back. `taken` are chunks the sender has or is
    /// getting since it last spoke, `again` those it wants after all.
    Progress { manifest: ManifestHash, returned: Vec<Returned>, taken: Vec<u32>, again: Vec<u32>, terms: Terms },
    /// The ask does not stand: look elsewhere.
    Refuse { manifest: ManifestHash, refusal: Refusal },
    /// Permission to read `chunks` until `ttl_ms` from now.
    Grant { manifest: ManifestHash, lease: u64, ttl_ms: u32, chunks: Vec<u32>, access: Access },
    /// The holder takes a lease back: what is read under it from now on may be anything.
    Revoke { manifest: ManifestHash, lease: u64 },
}

/// What an asker accepts of one holder, and how well it is fed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Terms {
    /// Most bytes under lease from this holder at a time; one chunk may always exceed it.
    pub credit_bytes: u64,
    /// Bytes the asker has under way from everybody: a holder serves the hungriest first.
    pub flight_bytes: u64,
}

/// The reader is done with one chunk of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Returned {
    pub lease: u64,
    pub chunk: u32,
    pub outcome: Outcome,
}

/// How reading one granted chunk ended, as told to its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Outcome {
    /// Read and verified.
    Verified,
    /// Not read: it came, or is coming, from somewhere else.
    Declined,
    /// Not read, and still wanted later.
    Postponed,
    /// Read, and the bytes do not hash to the chunk's name.
    Corrupt,
    /// Could not be read.
    Failed,
}

/// Why an ask does not stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Refusal {
    /// The holder serves as many as it can.
    Full,
    /// The holder has nothing the asker wants, and does not expect to.
    Nothing,
    /// The holder is about to leave, and others have what the asker wants. No ask stands, however many were on their
    /// way. Who finds a chunk nowhere else may ask again.
    Draining,
}

/// How to open the data plane to a holder: a secret shared over the control connection.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct Access {
    pub ticket: u64,
    pub secret: [u8; 32],
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Access(ticket {})", self.ticket)
    }
}

impl GossipMessage {
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(Kind::Gossip, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        codec::decode::<_, MESSAGE_BYTES_MAX>(Kind::Gossip, bytes)
    }
}

impl PeerMessage {
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(Kind::Peer, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        codec::decode::<_, MESSAGE_BYTES_MAX>(Kind::Peer, bytes)
    }
}
