//! One read that its holder was asked for, from the asking to its end.

use super::peer::Queued;
use crate::verbs::{Region, RemoteRegion};
use aquifer_core::ChunkHash;
use aquifer_transport::{OpId, ReadDone, ReadError};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Flight {
    /// Taken when the read was completed, while the holder still owes a word about it.
    pub(super) read: Option<Queued>,
    pub(super) asked: Instant,
    /// The registered landing place.
    pub(super) region: Option<Arc<Region>>,
    pub(super) grant: Option<RemoteRegion>,
    /// Bytes that READs were posted for, and that have come.
    pub(super) posted: u32,
    pub(super) landed: u32,
    /// READs posted and not completed: while there are any, the landing place is the device's.
    pub(super) under_way: u32,
    /// How long the holder was busy with it.
    pub(super) elapsed: Duration,
    pub(super) hash: Option<ChunkHash>,
    /// The holder was told that it is read.
    pub(super) told: bool,
    pub(super) valid: Option<bool>,
    /// How it is to end when nothing of it is under way any more.
    pub(super) fate: Option<ReadError>,
    /// Since when nobody waits for it.
    pub(super) stale: Option<Instant>,
}

impl Flight {
    pub(super) fn new(read: Queued, now: Instant) -> Self {
        Flight {
            read: Some(read),
            asked: now,
            region: None,
            grant: None,
            posted: 0,
            landed: 0,
            under_way: 0,
            elapsed: Duration::ZERO,
            hash: None,
            told: false,
            valid: None,
            fate: None,
            stale: None,
        }
    }

    pub(super) fn id(&self) -> Option<OpId> {
        self.read.as_ref().map(|read| read.op.id)
    }

    pub(super) fn len(&self) -> u32 {
        self.read.as_ref().map_or(0, |read| u32::try_from(read.op.into.len()).unwrap_or(u32::MAX))
    }

    /// Whether READs can be posted for it, and there are any left to post.
    pub(super) fn can_post(&self) -> bool {
        self.fate.is_none() && self.region.is_some() && self.grant.is_some() && self.posted < self.len()
    }

    pub(super) fn is_landed(&self) -> bool {
        self.read.is_some() && self.grant.is_some() && self.landed == self.len()
    }

    /// Whether the holder, or the way to it, owes the next step.
    pub(super) fn waits_for_holder(&self) -> bool {
        self.grant.is_none() || self.under_way > 0 || (self.told && self.valid.is_none())
    }

    /// The outcome, if all of it is known.
    pub(super) fn outcome(&self) -> Option<Result<ReadDone, ReadError>> {
        match (self.valid?, self.hash) {
            (false, _) if self.under_way == 0 => Some(Err(ReadError::Revoked)),
            (true, Some(digest)) => {
                Some(Ok(ReadDone { digest, bytes: u64::from(self.landed), elapsed: self.elapsed, adopted: None }))
            }
            _ => None,
        }
    }
}
