//! Memory that chunks of files are copied to, so that a device can read them: a bounded number of
//! bytes, used again and again, so that it is registered once.

use aquifer_memory::{Span, StagingPool};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Staging {
    pool: StagingPool,
    returned: Arc<Returned>,
}

/// Counts buffers that came back, and wakes who waits for one.
#[derive(Debug, Default)]
struct Returned {
    count: Mutex<u64>,
    changed: Condvar,
}

/// A lent buffer. Its fields are dropped in order: when the return is told, the buffer is back.
struct Lent {
    _buffer: Span,
    _notice: Notice,
}

struct Notice(Arc<Returned>);

impl Drop for Notice {
    fn drop(&mut self) {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.changed.notify_all();
    }
}

impl Staging {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Staging { pool: StagingPool::new(limit_bytes), returned: Arc::default() }
    }

    /// A span of `len` bytes, as soon as there is room for it; `None` if there is none in time.
    pub(crate) fn take(&self, len: u64, patience: Duration) -> Option<Span> {
        let deadline = Instant::now() + patience;
        loop {
            let seen = *self.returned.count.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(buffer) = self.pool.try_take(len) {
                return self.lend(buffer);
            }
            let mut count = self.returned.count.lock().unwrap_or_else(PoisonError::into_inner);
            while *count == seen {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                count = self.returned.changed.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    fn lend(&self, buffer: Span) -> Option<Span> {
        let (mapping, offset) = buffer.mapping();
        let span = mapping.span().slice(offset..offset + buffer.len()).ok()?;
        Some(span.guarded(Arc::new(Lent { _buffer: buffer, _notice: Notice(self.returned.clone()) })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_gets_what_comes_back() {
        let staging = Arc::new(Staging::new(16 << 20));
        let first = staging.take(16 << 20, Duration::ZERO).expect("room for one");
        assert!(staging.take(1 << 20, Duration::ZERO).is_none());
        let waiting = {
            let staging = staging.clone();
            std::thread::spawn(move || staging.take(16 << 20, Duration::from_secs(60)).map(|s| s.len()))
        };
        drop(first);
        assert_eq!(waiting.join().expect("no panic"), Some(16 << 20));
    }
}
