//! A node's own clock: off by a constant, and a little fast or slow.

use crate::scenario::{Expanded, NodePlan};
use aquifer_core::Time;
use std::time::Duration;

const BILLION: i128 = 1_000_000_000;

#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    offset_ns: i128,
    drift_ppb: i128,
}

impl Clock {
    /// The clock that is furthest behind shows zero at the start of the run, as none can show less.
    pub(super) fn new(e: &Expanded, plan: &NodePlan) -> Self {
        let offset_ms = e.faults.clock_skew_ms + plan.fault.clock_skew_ms;
        Clock { offset_ns: whole(offset_ms * 1e6).max(0), drift_ppb: whole(plan.fault.clock_drift_ppm * 1e3) }
    }

    /// What the clock shows.
    pub(super) fn local(&self, at: Time) -> Time {
        let at = nanos(at);
        time(self.offset_ns + at + (at * self.drift_ppb).div_euclid(BILLION))
    }

    /// The first moment at which the clock shows `local` or later.
    pub(super) fn world(&self, local: Time) -> Time {
        let shown = (nanos(local) - self.offset_ns).max(0);
        let rate = BILLION + self.drift_ppb;
        // Rounded down it may be a nanosecond early, and a second look is cheaper than a proof.
        let guess = (shown * BILLION).div_euclid(rate);
        (0..3).map(|more| time(guess + more)).find(|at| self.local(*at) >= local).unwrap_or(time(guess + 3))
    }
}

fn nanos(time: Time) -> i128 {
    i128::try_from(time.since(Time::ZERO).as_nanos()).unwrap_or(i128::MAX)
}

fn time(nanos: i128) -> Time {
    Time::from_origin(Duration::from_nanos(u64::try_from(nanos).unwrap_or(0)))
}

#[expect(clippy::cast_possible_truncation, reason = "`as` saturates")]
fn whole(value: f64) -> i128 {
    value as i128
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_due_when_its_own_clock_says_so() {
        for drift_ppb in [-100_000, 0, 7, 100_000] {
            let clock = Clock { offset_ns: 5_000_000_123, drift_ppb };
            for at in [0, 1, 999, 1_000_000_007, 86_400 * BILLION] {
                let local = time(at + clock.offset_ns);
                let due = clock.world(local);
                assert!(clock.local(due) >= local, "{drift_ppb} {at}");
                assert!(due == Time::ZERO || clock.local(due - Duration::from_nanos(1)) < local, "{drift_ppb} {at}");
            }
        }
    }

    #[test]
    fn a_clock_without_faults_is_the_worlds() {
        let clock = Clock { offset_ns: 0, drift_ppb: 0 };
        let at = Time::from_origin(Duration::from_nanos(123_456_789));
        assert_eq!((clock.local(at), clock.world(at)), (at, at));
    }
}
