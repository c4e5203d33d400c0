//! Landing memory for what goes to disk: a bounded number of buffers, used again and again so
//! that their pages are present.

use crate::error::MemoryError;
use crate::limits::STAGING_CLASSES_BYTES;
use crate::mapping::Mapping;
use crate::span::Span;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Cheap to clone; clones are the same pool.
#[derive(Clone, Debug)]
pub struct StagingPool(Arc<Mutex<Buffers>>);

struct Buffers {
    limit: u64,
    /// Bytes of all buffers, lent or idle.
    allocated: u64,
    /// One list for each of [`STAGING_CLASSES_BYTES`].
    idle: [Vec<Arc<Mapping>>; STAGING_CLASSES_BYTES.len()],
}

impl StagingPool {
    /// A pool of at most `limit_bytes`, or of one buffer of the longest chunk if that is more.
    pub fn new(limit_bytes: u64) -> Self {
        let largest = STAGING_CLASSES_BYTES[STAGING_CLASSES_BYTES.len() - 1];
        StagingPool(Arc::new(Mutex::new(Buffers {
            limit: limit_bytes.max(largest),
            allocated: 0,
            idle: Default::default(),
        })))
    }

    pub fn limit_bytes(&self) -> u64 {
        self.lock().limit
    }

    /// A span of `len` bytes with arbitrary content, if the limit allows. Its memory comes back
    /// with the drop of the last span made from it.
    pub fn try_take(&self, len: u64) -> Option<Span> {
        let class = STAGING_CLASSES_BYTES.iter().position(|&bytes| len <= bytes)?;
        let mapping = self.lock().take(class).unwrap_or_else(|error| {
            tracing::warn!("no staging memory: {error}");
            None
        })?;
        let lent = Lent { pool: self.clone(), class, mapping: mapping.clone() };
        mapping.span().guarded(Arc::new(lent)).slice(0..len).ok()
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        // Every mutation is a single push, pop or addition: a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffers {
    fn take(&mut self, class: usize) -> Result<Option<Arc<Mapping>>, MemoryError> {
        if let Some(mapping) = self.idle[class].pop() {
            return Ok(Some(mapping));
        }
        let bytes = STAGING_CLASSES_BYTES[class];
        while self.allocated + bytes > self.limit {
            let Some((victim, list)) = self.idle.iter_mut().enumerate().rev().find(|(_, list)| !list.is_empty()) else {
                return Ok(None);
            };
            list.pop();
            self.allocated -= STAGING_CLASSES_BYTES[victim];
        }
        let mapping = Mapping::anonymous(bytes)?;
        self.allocated += bytes;
        Ok(Some(mapping))
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes", self.allocated, self.limit)
    }
}

/// One buffer while spans of it exist.
struct Lent {
    pool: StagingPool,
    class: usize,
    mapping: Arc<Mapping>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.pool.lock().idle[self.class].push(self.mapping.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn buffers_are_bounded_and_reused() {
        let pool = StagingPool::new(16 * MIB);
        let spans: Vec<_> = (0..4).map(|_| pool.try_take(4 * MIB - 5).unwrap()).collect();
        assert!(pool.try_take(1).is_none());
        let address = spans[0].as_ptr();
        let slice = spans[0].slice(0..1).unwrap();
        drop(spans);
        assert_eq!(pool.lock().idle.iter().map(Vec::len).sum::<usize>(), 3);
        drop(slice);
        let again: Vec<_> = (0..4).map(|_| pool.try_take(3 * MIB).unwrap()).collect();
        assert!(again.iter().any(|s| s.as_ptr() == address));
    }

    #[test]
    fn idle_buffers_of_one_size_make_room_for_another() {
        let pool = StagingPool::new(0);
        drop((0..4).map(|_| pool.try_take(4 * MIB).unwrap()).collect::<Vec<_>>());
        assert_eq!(pool.try_take(16 * MIB).unwrap().len(), 16 * MIB);
        assert!(pool.try_take(16 * MIB + 1).is_none());
        assert!(pool.try_take(0).is_some());
    }
}
