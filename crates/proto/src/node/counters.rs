//! What a node has done since it began, in numbers: for people and their dashboards. Nothing is decided by it.

/// Each only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages that granted something.
    pub grants: u64,
    /// Chunks put under lease.
    pub leases_granted: u64,
    /// Chunks whose lease this node took back, because they had to move.
    pub leases_revoked: u64,
    /// Chunks whose lease ran out before the reader gave it back.
    pub leases_expired: u64,
    /// Asks that came, without withdrawals.
    pub asks_received: u64,
    /// Asks that were told not to stand.
    pub refusals_sent: u64,
    /// Reads of a chunk whose read before brought nothing of use: it was corrupt, revoked or failed.
    pub chunks_refetched: u64,
}
