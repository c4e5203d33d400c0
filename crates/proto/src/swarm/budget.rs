//! What one node lets others read at once, and how fast, over all its swarms.

use crate::limits::{SERVED_AT_ONCE, UPLOAD_BURST};
use aquifer_core::Time;
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Budget {
    pub(crate) leased_bytes: u64,
    /// Never exceeded, but by a single chunk that is larger.
    pub(crate) leased_bytes_max: u64,
    pace: Option<Pace>,
    next_lease: u64,
}

/// A token bucket: what is granted within any time is at most the rate times the time, and the
/// burst. Reads follow grants, so uploads keep to it too, later.
#[derive(Debug)]
struct Pace {
    bytes_per_s: f64,
    burst: f64,
    tokens: f64,
    at: Time,
}

impl Budget {
    pub(crate) fn new(leased_bytes_max: u64, upload_bytes_per_s: Option<u64>, now: Time) -> Self {
        let pace = upload_bytes_per_s.map(|rate| {
            let bytes_per_s = rate.max(1) as f64;
            let burst = bytes_per_s * UPLOAD_BURST.as_secs_f64();
            Pace { bytes_per_s, burst, tokens: burst, at: now }
        });
        Budget { leased_bytes: 0, leased_bytes_max, pace, next_lease: 1 }
    }

    /// Whether `bytes` more may be read now. A chunk fits if nothing is out: one that is larger
    /// than the budget must move too. `credit` is what an asker of the swarm takes at a time: with
    /// so many askers' worth under lease the link is busy.
    pub(crate) fn fits(&mut self, now: Time, bytes: u64, credit: u64) -> bool {
        let most = self.leased_bytes_max.min(SERVED_AT_ONCE.saturating_mul(credit));
        let room = self.leased_bytes == 0 || self.leased_bytes + bytes <= most;
        room && self.pace.as_mut().is_none_or(|pace| pace.tokens_at(now) >= 0.0)
    }

    /// When the cap allows more, if it is what holds grants back.
    pub(crate) fn next_timeout(&self) -> Option<Time> {
        let pace = self.pace.as_ref().filter(|p| p.tokens < 0.0)?;
        Some(pace.at + Duration::from_secs_f64(-pace.tokens / pace.bytes_per_s) + Duration::from_nanos(1))
    }

    /// Whether the cap held grants back and allows more now. It is asked for no time that has
    /// passed again, also when nobody is there to be granted anything.
    pub(crate) fn on_timeout(&mut self, now: Time) -> bool {
        let due = self.next_timeout().is_some_and(|at| at <= now);
        due && self.pace.as_mut().is_some_and(|pace| pace.tokens_at(now) >= 0.0)
    }

    pub(super) fn take(&mut self, bytes: u64) {
        self.leased_bytes += bytes;
        if let Some(pace) = &mut self.pace {
            pace.tokens -= bytes as f64;
        }
    }

    pub(super) fn put_back(&mut self, bytes: u64) {
        self.leased_bytes -= bytes;
    }

    pub(super) fn lease_id(&mut self) -> u64 {
        let id = self.next_lease;
        self.next_lease += 1;
        id
    }
}

impl Pace {
    fn tokens_at(&mut self, now: Time) -> f64 {
        let passed = now.since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * self.bytes_per_s).min(self.burst);
        self.at = self.at.max(now);
        self.tokens
    }
}

#[cfg(test)]
mod tests;
