//! What agents say to each other.
//!
//! These types live here because the brain decides them and the mesh carries them, and the two do
//! not know each other.

use crate::chunkset::ChunkSet;
use crate::codec::{self, CodecError, Kind};
use crate::hash::ManifestHash;
use crate::limits::MESSAGE_BYTES_MAX;
use crate::release::SignedRelease;
use crate::status::SignedStatus;
use bincode::{Decode, Encode};
use std::fmt;

/// Said to everybody, passed on by everybody.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum GossipMessage {
    Status(SignedStatus),
    Release(SignedRelease),
}

/// Said by one agent to another, over their authenticated control connection. Delivered in
/// order while the connection lasts; lost with it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum PeerMessage {
    /// The first words on a new connection: all the sender knows of the mesh. Each status comes
    /// with its age in milliseconds, counted by the sender.
    Snapshot { statuses: Vec<(SignedStatus, u32)>, releases: Vec<SignedRelease> },
    /// "Send me the manifest's bytes from `offset` on."
    ManifestAsk { manifest: ManifestHash, offset: u64 },
    /// Bytes of a manifest from `offset` on. `total` is its whole length; zero says that the
    /// sender does not have it.
    ManifestPiece { manifest: ManifestHash, offset: u64, total: u64, bytes: Vec<u8> },
    /// "I want these chunks and have those; grant me up to `credits` at a time." Stands until it
    /// is replaced, withdrawn with an empty `wanted`, or the connection ends.
    Ask { manifest: ManifestHash, wanted: ChunkSet, have: ChunkSet, credits: u16 },
    /// Corrects a standing ask: the sender has verified these chunks since, and wants them no more.
    Progress { manifest: ManifestHash, got: Vec<u32>, credits: u16 },
    /// Permission to read `chunks` until `ttl_ms` from now.
    Grant { manifest: ManifestHash, lease: u64, ttl_ms: u32, chunks: Vec<u32>, access: Access },
    /// The reader is done with one chunk of a lease.
    Return { manifest: ManifestHash, lease: u64, chunk: u32, outcome: Outcome },
    /// The holder takes a lease back: what is read under it from now on may be anything.
    Revoke { manifest: ManifestHash, lease: u64 },
}

/// How reading one granted chunk ended, as told to its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Outcome {
    /// Read and verified.
    Verified,
    /// Not read: it came, or is coming, from somewhere else.
    Declined,
    /// Read, and the bytes do not hash to the chunk's name.
    Corrupt,
    /// Could not be read.
    Failed,
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
