//! How long to wait before trying again.

use crate::limits::{BACKOFF_FIRST, BACKOFF_LAST};
use rand::Rng;
use std::time::Duration;

/// The wait after so many failures in a row: doubled each time, and shortened at random by up to
/// a half, so that nodes that failed together do not come back together.
pub(crate) fn wait(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let whole = BACKOFF_FIRST.saturating_mul(1 << doublings).min(BACKOFF_LAST);
    shortened(whole)
}

pub(crate) fn shortened(whole: Duration) -> Duration {
    whole.mul_f64(rand::rng().random_range(0.5..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_cap() {
        for (failures, whole) in [(1, 0.2), (2, 0.4), (3, 0.8), (6, 6.4), (7, 10.0), (u32::MAX, 10.0)] {
            let wait = wait(failures).as_secs_f64();
            assert!((whole / 2.0 - 1e-6..=whole + 1e-6).contains(&wait), "{failures}: {wait}");
        }
    }
}
