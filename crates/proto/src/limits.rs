//! Every bound and interval of this crate, with its unit and where it comes from.

use aquifer_core::limits::{CHUNK_BYTES_TARGET, MANIFEST_CHUNKS_MAX, MESSAGE_BYTES_MAX};
use std::time::Duration;

/// How often a node tells the mesh of itself when nothing changed. Guess: a third of a minute's
/// twentieth, so that one lost record is no news.
pub const STATUS_INTERVAL: Duration = Duration::from_secs(3);

/// Least time between two records of one node. Guess: progress is for people and for choosing
/// holders, neither of which needs more.
pub const STATUS_SPACING: Duration = Duration::from_millis(200);

/// A node not heard of for this long is gone: five records lost in a row.
pub const MEMBER_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a gone node's last record is remembered, so that an old copy of it is not news.
pub const TOMBSTONE: Duration = Duration::from_secs(600);

/// Most nodes known at once. 4,096 is the design's largest swarm, twice that for churn.
pub const MEMBERS_MAX: usize = 8192;

/// Control connections a node keeps beyond those its swarms need. Guess: gossip stays connected
/// with high probability from 5 random links on.
pub const CONNECTIONS_WANTED: usize = 8;

/// How often links, asks and fetches are looked over.
pub const REVIEW_INTERVAL: Duration = Duration::from_millis(500);

/// Status records in a snapshot, at most, and their bytes: half of a message, so that releases fit
/// beside them.
pub const SNAPSHOT_STATUSES_MAX: usize = 512;
pub const SNAPSHOT_BYTES_MAX: usize = MESSAGE_BYTES_MAX / 2;

/// Least time between two reminders of a release to one peer that seems to have missed it.
pub const REMIND_INTERVAL: Duration = Duration::from_secs(3);

/// Peers a puller asks at once for one manifest. Guess, to be settled by simulation: twice the
/// neighbours BitTorrent unchokes by default, few enough to keep messages linear.
pub const ASKS_MAX: usize = 16;

/// A peer that granted nothing for this long gives its place to another, if there is one.
pub const ASK_PATIENCE: Duration = Duration::from_millis(500);

/// A peer that a link was wanted to is not counted on again for this long, unless it comes up.
/// Guess: a TCP connection over a lossy path takes a second or three.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(5);

/// A standing ask is repeated whole this often, in case a correction was lost with a connection.
pub const ASK_REFRESH: Duration = Duration::from_secs(10);

/// Chunk data a puller lets be under way for one manifest: it bounds landing memory, and 128 MiB
/// covers 400 Gbit/s for 2.7 ms.
pub const FLIGHT_BYTES_MAX: u64 = 128 << 20;

/// Most credits (of one target chunk each) one holder is given. 32 MiB cover a round trip of
/// 0.6 ms at 400 Gbit/s, or 2.7 ms at 100.
pub const CREDITS_MAX: u16 = 8;

/// Chunks in one grant, at most: bounds a message about tiny chunks.
pub const GRANT_CHUNKS_MAX: usize = 256;

/// Verified chunks are told to the other holders this often, or when there are many.
pub const PROGRESS_INTERVAL: Duration = Duration::from_millis(20);
pub const PROGRESS_CHUNKS_MAX: usize = 1024;

/// A read that brings no byte for this long is given up by the transport.
pub const READ_STALL: Duration = Duration::from_secs(5);

/// How long a granted chunk stays where it is. A reader gives up long before.
pub const LEASE_TTL: Duration = Duration::from_secs(30);

/// A chunk a puller declined is not offered to it again for this long: it has it under way.
pub const DECLINE_HOLD: Duration = Duration::from_secs(1);

/// Bytes a holder lets be under lease for chunks that others have or are getting too. Small, so
/// that a seed's upload goes to what only it has; large enough to keep a link busy.
pub const SPREAD_BYTES_MAX: u64 = 4 * CHUNK_BYTES_TARGET as u64;

/// Most standing asks a holder keeps per manifest. Guess: four times what a balanced swarm gives.
pub const ASKERS_MAX: usize = 64;

/// A manifest piece not answered for this long is asked of another peer.
pub const MANIFEST_TIMEOUT: Duration = Duration::from_secs(3);
/// A peer that had not the manifest is asked again after this long.
pub const MANIFEST_RETRY: Duration = Duration::from_millis(300);

/// How long a peer is avoided after a failed read; doubles each time, a good read forgives.
pub const AVOID_FAILED: Duration = Duration::from_millis(500);
pub const AVOID_FAILED_MAX: Duration = Duration::from_secs(30);
/// How long a peer is avoided after bytes that do not hash to their name; doubles each time.
pub const AVOID_CORRUPT: Duration = Duration::from_secs(30);
pub const AVOID_CORRUPT_MAX: Duration = Duration::from_secs(3600);
/// Peers whose behaviour is remembered. As many as members.
pub const TRUST_MAX: usize = MEMBERS_MAX;

/// Peers for which refused releases are counted one by one; the rest are counted together.
pub const REJECTION_PEERS_MAX: usize = 1024;

/// Longest event in a recording: a manifest's chunk lengths are four bytes each, and everything
/// else that a node is told fits into a message.
pub const RECORD_FRAME_BYTES_MAX: usize = 4 * MANIFEST_CHUNKS_MAX + MESSAGE_BYTES_MAX;
