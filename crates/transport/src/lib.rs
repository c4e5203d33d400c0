//! Moving bytes between nodes: operations go in as data, completions come out.
//!
//! A transport is handed where to land and whom to read from, and reports what arrived. It knows
//! leases and chunk numbers only as numbers to repeat to the holder: what a manifest, a swarm or
//! a release is, it does not know. It verifies nothing but says what the bytes hash to.

use aquifer_core::{Access, ChunkHash, NodeId};
use aquifer_memory::Span;
use std::fmt::Debug;
use std::time::Duration;
use thiserror::Error;

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod endpoint;
mod handshake;
pub mod limits;
mod pieces;
pub mod room;
pub mod shm;
pub mod side;
mod socket;
pub mod tcp;
mod tls;

pub use endpoint::Endpoint;
pub use shm::{ShmConfig, ShmStats, ShmTransport};
pub use tcp::{Encryption, TcpConfig, TcpStats, TcpTransport};

/// Names one read, from submission to completion. The submitter never uses one twice.
pub type OpId = u64;

/// A way to read from other nodes' memory.
pub trait Transport: Send + Sync + Debug {
    /// For logs and metrics: `tcp`, `shm`, `rdma`.
    fn name(&self) -> &'static str;

    /// Starts an operation and returns at once. Each [`Operation::Read`] is owed exactly one
    /// [`Completion`], whatever happens, possibly before this returns and from any thread; after
    /// it, nothing writes to the landing place any more.
    fn submit(&self, operation: Operation);
}

#[derive(Debug)]
pub enum Operation {
    Read(ReadOp),
    /// Ends a read early. It completes as [`ReadError::Cancelled`], unless it ended otherwise
    /// before that.
    Cancel(OpId),
    /// Ends every read from a node and closes all connections to it.
    Disconnect(NodeId),
}

/// "Read this chunk under that lease, into there."
#[derive(Clone, Debug)]
pub struct ReadOp {
    pub id: OpId,
    pub peer: NodeId,
    /// Where the peer's data plane listens, best first. A transport takes those of its own kind.
    pub endpoints: Vec<Endpoint>,
    /// As the peer granted it.
    pub access: Access,
    pub lease: u64,
    pub chunk: u32,
    /// As long as the chunk, writable.
    pub into: Span,
    /// The bytes need not go there if they lie somewhere on this machine where nobody can change them any
    /// more: [`ReadDone::adopted`] then.
    pub adopts: bool,
    /// Give up when no byte has come for so long.
    pub stall: Duration,
}

#[derive(Debug)]
pub struct Completion {
    pub id: OpId,
    pub result: Result<ReadDone, ReadError>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadDone {
    /// BLAKE3 of the bytes that were put into `into`, or of those in `adopted`.
    pub digest: ChunkHash,
    pub bytes: u64,
    /// Where the bytes are, if they were left where they lay and `into` was not touched.
    pub adopted: Option<Span>,
    /// How long the holder was busy with this read: since it was asked, or since the read before
    /// it on the same connection ended, if that was later.
    pub elapsed: Duration,
}

/// Why a read failed. Only the holder's own words or silence are held against it by the caller.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ReadError {
    #[error("unreachable: {0}")]
    Unreachable(String),
    #[error("refused: {0}")]
    Refused(Refusal),
    #[error("the lease was revoked while it was read")]
    Revoked,
    #[error("no byte came in time")]
    Stalled,
    #[error("disconnected: {0}")]
    Disconnected(String),
    #[error("cancelled")]
    Cancelled,
    /// The caller's mistake, or this machine's trouble: nothing about the peer.
    #[error("cannot land: {0}")]
    Landing(String),
}

/// Why a holder does not let something be read.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    #[error("the lease has expired")]
    Expired,
    #[error("there is no such lease, or it does not cover this chunk")]
    Unknown,
    #[error("the chunk is not there any more")]
    Gone,
    /// Never an answer of [`Grants::open`].
    #[error("the ticket is not known, or the secret is wrong")]
    Ticket,
}

/// The holder's side of every transport: what may be read, by whom. Implemented by the agent;
/// called from transport threads, so it must be quick.
pub trait Grants: Send + Sync + Debug {
    /// Whom a ticket was given to, and the secret that went with it.
    fn secret(&self, ticket: u64) -> Option<(NodeId, [u8; 32])>;
    /// The bytes of a chunk, if `peer` may read it under `lease`.
    fn open(&self, peer: NodeId, lease: u64, chunk: u32) -> Result<Span, Refusal>;
    /// Asked when the bytes were sent: whether they were what they should be all the while.
    fn still_valid(&self, peer: NodeId, lease: u64, chunk: u32) -> bool;
    /// Told of bytes handed to the network, or copied by a reader here, under `lease`.
    fn sent(&self, peer: NodeId, lease: u64, bytes: u64);
}

/// What every transport asks of a read's landing place.
pub(crate) fn check_landing(op: &ReadOp) -> Result<(), String> {
    match u32::try_from(op.into.len()) {
        _ if !op.into.is_writable() => Err("the landing place is read-only".into()),
        Ok(0) | Err(_) => Err(format!("a chunk has no {} bytes", op.into.len())),
        Ok(_) => Ok(()),
    }
}

/// A chunk whose file is too short by now is gone: better said before its first byte than after.
pub(crate) fn still_whole(span: Span) -> Result<Span, Refusal> {
    match span.is_backed() {
        Ok(true) => Ok(span),
        Ok(false) | Err(_) => Err(Refusal::Gone),
    }
}
