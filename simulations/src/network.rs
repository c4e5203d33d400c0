//! The modelled network: bytes as fluids that share links fairly, in virtual time.
//!
//! Every node has a NIC with a capacity up and one down. A node may belong to a rack, whose uplink
//! has a capacity out and one in; whatever leaves or enters a rack passes it. A *flow* is an
//! ordered pair of nodes with a queue of transfers of which the head moves. All flows with
//! something to move share the links max-min fairly: no flow can get more without taking from one
//! that has no more than it. That is what many long TCP or RDMA flows under a fair congestion
//! control come near to. See `share` for how the rates are found.
//!
//! A node may have a *landing* rate: what arrived passes one after the other through host or GPU
//! verification and is reported when that is done. The landing queue is unbounded; whoever drives
//! the network bounds what it asks for.
//!
//! Left out, and what that does to a figure:
//! - Latency and the cost of messages. The driver adds them; a transfer here starts at full rate
//!   the moment it is started.
//! - TCP's slow start and RDMA's rate increase, so short transfers look better than they are.
//! - Loss, retransmission, headers: capacities are those of useful bytes.
//! - Switch buffers, queueing delay and incast: a link that is asked for too much shares evenly
//!   and loses nothing.
//! - Congestion in the core other than at rack uplinks, ECMP collisions, and link failures.
//! - PCIe, memory and CPU limits other than the landing rate; NIC up and down do not disturb each
//!   other.
//! - Fairness is per flow, that is per pair of nodes, whatever number of connections it uses.
//!
//! Rates that change by less than the tolerance are not passed on, so a link may carry more than
//! its capacity by about that fraction. Nothing is drawn at random and no hash map is iterated:
//! the same calls give the same times.

mod flow;
mod heap;
mod landing;
mod share;
#[cfg(test)]
mod tests;

use aquifer_core::Time;
use flow::{Flows, Transfer};
use landing::Landings;
use share::{Links, PROPAGATION_VISITS_MAX};
use std::time::Duration;

/// A node's network card, in bytes per second, and what stands behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nic {
    pub up: f64,
    pub down: f64,
    /// What the node is willing to upload, if less than `up`.
    pub upload_cap: Option<f64>,
    pub rack: Option<u32>,
    /// Bytes per second that its host or GPU verifies and puts in place.
    pub landing: Option<f64>,
}

impl Nic {
    fn useful_up(&self) -> f64 {
        self.upload_cap.map_or(self.up, |cap| cap.min(self.up))
    }
}

/// A rack's uplink, in bytes per second: `up` leaves the rack.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RackLink {
    pub up: f64,
    pub down: f64,
}

/// A transfer that arrived and landed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub from: u32,
    pub to: u32,
    pub tag: u64,
    pub bytes: u64,
    pub at: Time,
}

/// Bytes moved, including the parts of transfers that were cancelled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub up: Vec<u64>,
    pub down: Vec<u64>,
    /// Between two nodes of one rack, or two nodes without a rack.
    pub same_rack: u64,
    pub across: u64,
    pub rack_out: Vec<u64>,
    pub rack_in: Vec<u64>,
}

#[derive(Debug)]
pub struct Network {
    nics: Vec<Nic>,
    stalled: Vec<bool>,
    links: Links,
    flows: Flows,
    landings: Landings,
    counters: Counters,
    /// Nanoseconds up to which rates are settled: changes at one instant are settled together.
    now: u64,
    visits_max: usize,
}

impl Network {
    /// `tolerance` is the relative change of a flow's rate below which it is not passed on.
    pub fn new(nics: Vec<Nic>, racks: Vec<RackLink>, tolerance: f64) -> Self {
        let nodes = nics.len();
        let caps = nics.iter().flat_map(|n| [n.useful_up(), n.down]);
        let caps: Vec<f64> = caps.chain(racks.iter().flat_map(|r| [r.up, r.down])).collect();
        Network {
            stalled: vec![false; nodes],
            links: Links::new(caps, tolerance),
            flows: Flows::default(),
            landings: Landings::new(nics.iter().map(|n| n.landing).collect()),
            counters: Counters {
                up: vec![0; nodes],
                down: vec![0; nodes],
                rack_out: vec![0; racks.len()],
                rack_in: vec![0; racks.len()],
                ..Counters::default()
            },
            now: 0,
            visits_max: PROPAGATION_VISITS_MAX,
            nics,
        }
    }

    /// Queues a transfer behind the others of its pair.
    pub fn start(&mut self, now: Time, from: u32, to: u32, tag: u64, bytes: u64) {
        self.advance(now);
        let flow = self.flows.open(from, to, self.route(from, to), &mut self.links);
        self.flows.push(flow, Transfer { tag, bytes }, self.now);
    }

    /// Ends a transfer that has not arrived; false if there is none such.
    pub fn cancel(&mut self, now: Time, from: u32, to: u32, tag: u64) -> bool {
        self.advance(now);
        let Some(flow) = self.flows.find(from, to) else { return false };
        let Some(moved) = self.flows.remove(flow, tag, self.now) else { return false };
        self.count(from, to, moved);
        true
    }

    /// Ends everything between `from` and `to`, in this direction; returns the tags.
    pub fn cancel_pair(&mut self, now: Time, from: u32, to: u32) -> Vec<u64> {
        self.advance(now);
        let Some(flow) = self.flows.find(from, to) else { return Vec::new() };
        let (moved, tags) = self.flows.clear(flow, self.now);
        self.count(from, to, moved);
        tags
    }

    /// Ends everything to and from a node that crashed, what it was landing included.
    pub fn cancel_all(&mut self, now: Time, node: u32) -> Vec<(u32, u32, u64)> {
        self.advance(now);
        let mut pairs: Vec<(u32, u32)> = Vec::new();
        for link in [up(node), down(node)] {
            pairs.extend(self.links.flows(link).map(|f| self.flows.pair(f)));
        }
        let mut ended = Vec::new();
        for (from, to) in pairs {
            ended.extend(self.cancel_pair(now, from, to).into_iter().map(|tag| (from, to, tag)));
        }
        ended.extend(self.landings.clear(node).map(|done| (done.from, done.to, done.tag)));
        ended
    }

    /// Changes a node's capacities, in bytes per second; its upload cap stays.
    pub fn set_nic(&mut self, now: Time, node: u32, up_rate: f64, down_rate: f64) {
        self.advance(now);
        let nic = &mut self.nics[node as usize];
        (nic.up, nic.down) = (up_rate, down_rate);
        self.links.set_capacity(down(node), down_rate);
        self.refresh_up(node);
    }

    /// A stalled node keeps its flows, but nothing it uploads moves.
    pub fn stall(&mut self, now: Time, node: u32, stalled: bool) {
        self.advance(now);
        self.stalled[node as usize] = stalled;
        self.refresh_up(node);
    }

    /// When to call [`Self::pop_completion`] next. With landing rates it may then have nothing to
    /// report: something arrived and began to land.
    pub fn next_completion(&mut self) -> Option<Time> {
        self.settle();
        let arrival = self.flows.next_arrival().map(|(at, _)| at);
        let landed = self.landings.next();
        arrival.into_iter().chain(landed).min().map(time)
    }

    /// The next transfer that has arrived and landed by `now`. Call until `None`.
    pub fn pop_completion(&mut self, now: Time) -> Option<Done> {
        let until = nanos(now);
        loop {
            self.settle();
            let arrival = self.flows.next_arrival().filter(|&(at, _)| at <= until);
            let landed = self.landings.next().filter(|&at| at <= until);
            match (arrival, landed) {
                (arrival, Some(at)) if arrival.is_none_or(|(a, _)| at <= a) => return self.landings.pop(),
                (Some((at, flow)), _) => {
                    if let Some(done) = self.arrive(at, flow) {
                        return Some(done);
                    }
                }
                (None, _) => return None,
            }
        }
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Bytes per second that the head of the pair's queue moves at.
    pub fn rate(&mut self, from: u32, to: u32) -> Option<f64> {
        self.settle();
        let flow = self.flows.find(from, to)?;
        Some(self.links.rate(flow))
    }

    /// What a node uploads now and what it may, in bytes per second.
    pub fn up_utilisation(&mut self, node: u32) -> (f64, f64) {
        self.settle();
        (self.links.load(up(node)), self.links.capacity(up(node)))
    }

    /// What a node downloads now and what it can, in bytes per second.
    pub fn down_utilisation(&mut self, node: u32) -> (f64, f64) {
        self.settle();
        (self.links.load(down(node)), self.links.capacity(down(node)))
    }

    /// By which fraction the most overloaded link exceeds its capacity now; zero if none does.
    pub fn excess(&mut self) -> f64 {
        self.settle();
        self.links.excess()
    }

    /// Levels computed so far: the cost of sharing.
    pub fn visits(&self) -> u64 {
        self.links.visits()
    }

    fn arrive(&mut self, at: u64, flow: u32) -> Option<Done> {
        self.now = self.now.max(at);
        let (from, to) = self.flows.pair(flow);
        let transfer = self.flows.finish_head(flow, at)?;
        self.count(from, to, transfer.bytes);
        let done = Done { from, to, tag: transfer.tag, bytes: transfer.bytes, at: time(at) };
        self.landings.land(at, done)
    }

    fn count(&mut self, from: u32, to: u32, bytes: u64) {
        let (rack_from, rack_to) = (self.nics[from as usize].rack, self.nics[to as usize].rack);
        let c = &mut self.counters;
        c.up[from as usize] += bytes;
        c.down[to as usize] += bytes;
        if rack_from == rack_to {
            c.same_rack += bytes;
            return;
        }
        c.across += bytes;
        if let Some(rack) = rack_from {
            c.rack_out[rack as usize] += bytes;
        }
        if let Some(rack) = rack_to {
            c.rack_in[rack as usize] += bytes;
        }
    }

    fn route(&self, from: u32, to: u32) -> [u32; 4] {
        let (rack_from, rack_to) = (self.nics[from as usize].rack, self.nics[to as usize].rack);
        let base = 2 * u32::try_from(self.nics.len()).expect("nodes are numbered in u32");
        let crossing = |rack: Option<u32>, side| match rack {
            Some(rack) if rack_from != rack_to => base + 2 * rack + side,
            Some(_) | None => self.links.unlimited(),
        };
        [up(from), down(to), crossing(rack_from, 0), crossing(rack_to, 1)]
    }

    fn refresh_up(&mut self, node: u32) {
        let useful = self.nics[node as usize].useful_up();
        self.links.set_capacity(up(node), if self.stalled[node as usize] { 0.0 } else { useful });
    }

    fn advance(&mut self, now: Time) {
        let now = nanos(now);
        if now > self.now {
            self.settle();
            self.now = now;
        }
    }

    fn settle(&mut self) {
        self.flows.close_idle(&mut self.links);
        self.links.settle(&mut self.flows, self.now, self.visits_max);
    }
}

fn up(node: u32) -> u32 {
    2 * node
}

fn down(node: u32) -> u32 {
    2 * node + 1
}

fn time(nanos: u64) -> Time {
    Time::from_origin(Duration::from_nanos(nanos))
}

/// Virtual runs are far shorter than the 584 years that fit.
fn nanos(time: Time) -> u64 {
    u64::try_from(time.since(Time::ZERO).as_nanos()).unwrap_or(u64::MAX)
}

#[expect(clippy::cast_possible_truncation, reason = "`as` saturates, which is what a rounded byte or nanosecond needs")]
fn whole(value: f64) -> u64 {
    value as u64
}
