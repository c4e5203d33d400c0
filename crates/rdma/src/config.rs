//! What may be tuned, and what is counted.

use crate::limits;
use crate::verbs::QueuePairConfig;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The defaults are those of [`limits`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaConfig {
    /// The devices to use; all that can be used, if none are named.
    pub devices: Option<Vec<String>>,
    /// The entry of the ports' address tables to use; if none is named, RoCE v2 on IPv4 before others.
    pub gid_index: Option<u32>,
    pub queue_pair: QueuePairConfig,
    /// Whether chunks are shown where they lie, through memory windows, where the device has them.
    pub windows: bool,
    /// Bytes of one READ at most.
    pub piece_bytes: u32,
    /// Memory is registered in pieces of so many bytes, and the longest chunk.
    pub region_bytes: u64,
    pub connect_timeout: Duration,
    pub handshake_timeout: Duration,
    /// A reader closes a connection unused for so long.
    pub idle_timeout: Duration,
    /// A holder closes a connection without a request for so long.
    pub accepted_idle_timeout: Duration,
    /// Registered memory for chunks that cannot be shown where they lie.
    pub staging_bytes: u64,
    /// Connections accepted in all, and those of them without a valid ticket yet.
    pub accepted_max: usize,
    pub unauthenticated_max: usize,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        RdmaConfig {
            devices: None,
            gid_index: None,
            queue_pair: QueuePairConfig {
                ack_timeout_exponent: limits::ACK_TIMEOUT_EXPONENT,
                retry_count: limits::RETRY_COUNT_MAX,
                traffic_class: 0,
            },
            windows: true,
            piece_bytes: limits::PIECE_BYTES,
            region_bytes: limits::REGION_BYTES,
            connect_timeout: limits::CONNECT_TIMEOUT,
            handshake_timeout: limits::HANDSHAKE_TIMEOUT,
            idle_timeout: limits::IDLE_TIMEOUT,
            accepted_idle_timeout: limits::ACCEPTED_IDLE_TIMEOUT,
            staging_bytes: limits::STAGING_BYTES,
            accepted_max: limits::ACCEPTED_MAX,
            unauthenticated_max: limits::UNAUTHENTICATED_MAX,
        }
    }
}

/// Counts since the start, and what is registered now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RdmaStats {
    /// Payload that READs of this node brought, whole chunks or not.
    pub received_bytes: u64,
    /// Payload that readers said they have read here.
    pub served_bytes: u64,
    /// Bytes that this node's CPU copied first, since they cannot be shown where they lie.
    pub staged_bytes: u64,
    /// Connections opened to peers, up to connected queue pairs.
    pub connected: u64,
    /// Connections accepted from peers, up to the end of the handshake.
    pub accepted: u64,
    /// Connections turned away or ended for what the other side did.
    pub rejected: u64,
    pub regions: u64,
    pub registered_bytes: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) received: AtomicU64,
    pub(crate) served: AtomicU64,
    pub(crate) staged: AtomicU64,
    pub(crate) connected: AtomicU64,
}

impl Counters {
    /// What is counted here, of all there is to tell.
    pub(crate) fn read(&self) -> RdmaStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RdmaStats {
            received_bytes: of(&self.received),
            served_bytes: of(&self.served),
            staged_bytes: of(&self.staged),
            connected: of(&self.connected),
            ..RdmaStats::default()
        }
    }
}

pub(crate) fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
