//! Whether a connection's thread is what is slow, or what it waits for.

use crate::limits::{BUSY_AFTER_BYTES, BUSY_SHARE};
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// From a moment on: what was received, and how long the thread was at work for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    bytes: u64,
    at: Instant,
    worked: Duration,
}

impl Pace {
    /// `bytes`: all that this thread has received so far. Called, as [`Pace::busy`] is, by that thread.
    pub(super) fn begin(bytes: u64) -> Self {
        Pace { bytes, at: Instant::now(), worked: worked() }
    }

    /// `None` before enough has been received to tell.
    pub(super) fn busy(&self, bytes: u64) -> Option<bool> {
        (bytes - self.bytes >= BUSY_AFTER_BYTES).then(|| is_busy(worked() - self.worked, self.at.elapsed()))
    }
}

fn is_busy(worked: Duration, of: Duration) -> bool {
    worked.as_secs_f64() >= BUSY_SHARE * of.as_secs_f64()
}

/// Processor time of this thread.
fn worked() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_not_busy() {
        let ms = Duration::from_millis;
        assert!(is_busy(ms(90), ms(100)));
        assert!(!is_busy(ms(50), ms(100)));
    }

    #[test]
    fn it_is_told_of_so_many_bytes_and_of_this_thread() {
        let pace = Pace::begin(10);
        assert_eq!(pace.busy(10 + BUSY_AFTER_BYTES - 1), None);
        assert!(pace.busy(10 + BUSY_AFTER_BYTES).is_some());
        let before = worked();
        while worked() < before + Duration::from_millis(1) {} // a clock that stood still would hang here
    }
}
