//! Bytes that went in and out: by which way, across which boundary, for which channel, and from and to whom.

use super::grants::Sent;
use super::transports::Way;
use super::view::Traffic;
use aquifer_core::{ChannelName, NodeId};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// A rate is that of so long. Long enough to be steady with chunks of 4 MiB, short enough to follow.
const RATE_WINDOW: Duration = Duration::from_secs(5);
/// What a node can do shows in so long: a small release is over after that.
const PEAK_WINDOW: Duration = Duration::from_secs(1);
/// Most points kept of a window: one in each view.
const POINTS_MAX: usize = 64;

/// What bytes are counted by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Lane {
    pub(crate) way: Way,
    /// The outermost boundary that they crossed, as far as labels tell: `host`, `rack`, `zone`, or `none`.
    pub(crate) boundary: &'static str,
    /// None: a manifest of no channel.
    pub(crate) channel: Option<ChannelName>,
}

#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) received: BTreeMap<Lane, u64>,
    pub(super) sent: BTreeMap<Lane, u64>,
    /// Verified bytes of each peer, and the ways they came; and what went to each.
    from: BTreeMap<NodeId, BTreeMap<Way, u64>>,
    to: BTreeMap<NodeId, u64>,
    /// Peers that bytes came from and that are gone.
    sources_gone: u64,
    rate_in: Rate,
    rate_out: Rate,
}

impl Tally {
    /// `is_member`: it is still there. Of those that left, nothing is kept.
    pub(super) fn receive(&mut self, from: NodeId, is_member: bool, lane: Lane, bytes: u64) {
        if is_member {
            *self.from.entry(from).or_default().entry(lane.way).or_default() += bytes;
        }
        *self.received.entry(lane).or_default() += bytes;
    }

    pub(super) fn send(&mut self, sent: Sent, is_member: impl Fn(&NodeId) -> bool) {
        for ((node, way, (channel, boundary)), bytes) in sent {
            let lane = Lane { way, boundary, channel: channel.map(|c| (*c).clone()) };
            *self.sent.entry(lane).or_default() += bytes;
            if is_member(&node) {
                *self.to.entry(node).or_default() += bytes;
            }
        }
    }

    /// Peers come and go for months, so who left is not kept.
    pub(super) fn forget(&mut self, node: &NodeId) {
        self.sources_gone += u64::from(self.from.remove(node).is_some());
        self.to.remove(node);
    }

    pub(super) fn from(&self, node: &NodeId) -> impl Iterator<Item = (Way, u64)> {
        self.from.get(node).into_iter().flatten().map(|(way, bytes)| (*way, *bytes))
    }

    pub(super) fn to(&self, node: &NodeId) -> u64 {
        self.to.get(node).copied().unwrap_or(0)
    }

    /// Takes the time, for the rates; and says what they are.
    pub(super) fn clock(&mut self, now: Instant) -> (u64, u64) {
        self.rate_in.reach(now, self.received.values().sum());
        self.rate_out.reach(now, self.sent.values().sum());
        self.rates()
    }

    /// The most that came, and went, within a second.
    pub(super) fn peaks(&self) -> (u64, u64) {
        (self.rate_in.peak, self.rate_out.peak)
    }

    pub(super) fn rates(&self) -> (u64, u64) {
        (self.rate_in.bytes_per_s, self.rate_out.bytes_per_s)
    }

    pub(super) fn fill(&self, traffic: &mut Traffic) {
        traffic.sources = self.from.len() as u64 + self.sources_gone;
        traffic.bytes_out = self.sent.values().sum();
    }
}

/// Bytes per second, of a total that only grows.
#[derive(Debug, Default)]
struct Rate {
    points: VecDeque<(Instant, u64)>,
    bytes_per_s: u64,
    /// The most in any [`PEAK_WINDOW`].
    peak: u64,
}

impl Rate {
    fn reach(&mut self, now: Instant, total: u64) {
        self.points.push_back((now, total));
        let old = |at: &Instant| now.duration_since(*at) > RATE_WINDOW;
        while self.points.len() > POINTS_MAX || (self.points.len() > 2 && self.points.get(1).is_some_and(|p| old(&p.0)))
        {
            self.points.pop_front();
        }
        // Of less time it would be a guess.
        let since = |(at, before): &(Instant, u64), least: Duration| {
            let time = now.duration_since(*at);
            (time >= least).then(|| per_second(total.saturating_sub(*before), time))
        };
        if let Some(rate) = self.points.front().and_then(|point| since(point, PEAK_WINDOW / 2)) {
            self.bytes_per_s = rate;
        }
        if let Some(rate) = self.points.iter().rev().find_map(|point| since(point, PEAK_WINDOW)) {
            self.peak = self.peak.max(rate);
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
fn per_second(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_follows_and_ends() {
        let (mut rate, start) = (Rate::default(), Instant::now());
        let at = |ms: u64| start + Duration::from_millis(ms);
        for step in 0..100 {
            rate.reach(at(step * 200), step * 200);
        }
        assert_eq!(rate.bytes_per_s, 1000);
        for step in 100..200 {
            rate.reach(at(step * 200), 19_800);
        }
        assert_eq!((rate.bytes_per_s, rate.peak), (0, 1000));
        assert!(rate.points.len() <= POINTS_MAX);
    }

    #[test]
    fn who_left_still_counts_in_the_sums() {
        let mut tally = Tally::default();
        let lane = Lane { way: Way::Tcp, boundary: "rack", channel: None };
        tally.receive(NodeId([1; 32]), true, lane.clone(), 8);
        tally.send(Sent::from([((NodeId([1; 32]), Way::Tcp, (None, "rack")), 3)]), |_| true);
        tally.forget(&NodeId([1; 32]));
        tally.receive(NodeId([1; 32]), false, lane.clone(), 2);
        tally.send(Sent::from([((NodeId([1; 32]), Way::Tcp, (None, "rack")), 1)]), |_| false);
        let mut traffic = Traffic::default();
        tally.fill(&mut traffic);
        assert_eq!((traffic.sources, traffic.bytes_out), (1, 4));
        assert_eq!((tally.received.get(&lane), tally.sent.get(&lane)), (Some(&10), Some(&4)));
        assert_eq!((tally.to(&NodeId([1; 32])), tally.from(&NodeId([1; 32])).count()), (0, 0));
    }
}
