//! What one node lets others read at once, and how fast, over all its swarms.

use crate::limits::{SERVED_AT_ONCE, UPLOAD_BURST};
use aquifer_core::Time;
use bincode::{Decode, Encode};
use std::time::Duration;

/// How much may be given of what costs others something to get out, such as chunks that lie only in the GPU
/// memory of an engine. By default nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct CostlyLimit {
    /// On average; zero: none of it is given.
    pub bytes_per_s: u64,
    /// Under lease at once: what there is room for where it is got out to.
    pub leased_bytes_max: u64,
}

#[derive(Debug)]
pub(crate) struct Budget {
    pub(crate) leased_bytes: u64,
    /// Never exceeded, but by a single chunk that is larger.
    pub(crate) leased_bytes_max: u64,
    pace: Option<Pace>,
    costly: Costly,
    next_lease: u64,
}

/// The part of the budget that costly chunks are given from, besides the whole.
#[derive(Debug)]
struct Costly {
    leased_bytes: u64,
    /// Never exceeded, but by a single chunk that is larger.
    leased_bytes_max: u64,
    /// None: none are given.
    pace: Option<Pace>,
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
        let pace = upload_bytes_per_s.map(|rate| Pace::new(rate, now));
        let costly = Costly { leased_bytes: 0, leased_bytes_max: 0, pace: None };
        Budget { leased_bytes: 0, leased_bytes_max, pace, costly, next_lease: 1 }
    }

    pub(crate) fn with_costly(mut self, limit: CostlyLimit, now: Time) -> Self {
        self.costly.leased_bytes_max = limit.leased_bytes_max;
        self.costly.pace = (limit.bytes_per_s > 0).then(|| Pace::new(limit.bytes_per_s, now));
        self
    }

    /// Whether `bytes` more may be read now. A chunk fits if nothing is out: one that is larger
    /// than the budget must move too. `credit` is what an asker of the swarm takes at a time: with
    /// so many askers' worth under lease the link is busy.
    pub(crate) fn fits(&mut self, now: Time, bytes: u64, credit: u64) -> bool {
        let most = self.leased_bytes_max.min(SERVED_AT_ONCE.saturating_mul(credit));
        let room = self.leased_bytes == 0 || self.leased_bytes + bytes <= most;
        room && self.pace.as_mut().is_none_or(|pace| pace.tokens_at(now) >= 0.0)
    }

    /// The same for the part of them that is costly; both must fit.
    pub(crate) fn fits_costly(&mut self, now: Time, bytes: u64) -> bool {
        let Costly { leased_bytes, leased_bytes_max, pace } = &mut self.costly;
        let room = *leased_bytes == 0 || *leased_bytes + bytes <= *leased_bytes_max;
        room && pace.as_mut().is_some_and(|pace| pace.tokens_at(now) >= 0.0)
    }

    /// Whether costly chunks are ever given.
    pub(crate) fn gives_costly(&self) -> bool {
        self.costly.pace.is_some()
    }

    pub(crate) fn costly_leased_bytes(&self) -> u64 {
        self.costly.leased_bytes
    }

    /// When a cap allows more, if it is what holds grants back.
    pub(crate) fn next_timeout(&self) -> Option<Time> {
        self.pace.iter().chain(&self.costly.pace).filter_map(Pace::due).min()
    }

    /// Whether a cap held grants back and allows more now. It is asked for no time that has
    /// passed again, also when nobody is there to be granted anything.
    pub(crate) fn on_timeout(&mut self, now: Time) -> bool {
        let paces = self.pace.iter_mut().chain(&mut self.costly.pace);
        let due = paces.filter(|pace| pace.due().is_some_and(|at| at <= now));
        // All of them, so that none is due twice.
        due.filter_map(|pace| (pace.tokens_at(now) >= 0.0).then_some(())).count() > 0
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

    /// Of what is taken, so much is costly.
    pub(super) fn take_costly(&mut self, bytes: u64) {
        self.costly.leased_bytes += bytes;
        if let Some(pace) = &mut self.costly.pace {
            pace.tokens -= bytes as f64;
        }
    }

    pub(super) fn put_back_costly(&mut self, bytes: u64) {
        self.costly.leased_bytes -= bytes;
    }

    pub(super) fn lease_id(&mut self) -> u64 {
        let id = self.next_lease;
        self.next_lease += 1;
        id
    }
}

impl Pace {
    fn new(bytes_per_s: u64, now: Time) -> Self {
        let bytes_per_s = bytes_per_s.max(1) as f64;
        let burst = bytes_per_s * UPLOAD_BURST.as_secs_f64();
        Pace { bytes_per_s, burst, tokens: burst, at: now }
    }

    /// When it allows more, if it allows nothing now.
    fn due(&self) -> Option<Time> {
        let wait = || Duration::from_secs_f64(-self.tokens / self.bytes_per_s) + Duration::from_nanos(1);
        (self.tokens < 0.0).then(|| self.at + wait())
    }

    fn tokens_at(&mut self, now: Time) -> f64 {
        let passed = now.since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * self.bytes_per_s).min(self.burst);
        self.at = self.at.max(now);
        self.tokens
    }
}

#[cfg(test)]
mod tests;
