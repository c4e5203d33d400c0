//! Flows and their queues, in a slab: a slot is used again, with its allocations, by a later flow.

use super::heap::{Entry, Heap};
use super::share::Links;
use super::whole;
use crate::spread::SpreadMap;
use std::collections::VecDeque;

/// Less than a byte is nothing left: arrivals are rounded up to a nanosecond, so what remains
/// below this is a rounding error of the subtraction.
const REST_BYTES: f64 = 1e-3;
const NANOS: f64 = 1e9;

#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) tag: u64,
    pub(super) bytes: u64,
}

#[derive(Debug, Default)]
pub(super) struct Flows {
    slots: Vec<Flow>,
    /// How the heads move, apart from the queues: rates change often.
    heads: Vec<Head>,
    free: Vec<u32>,
    /// Flows that have just run dry. They leave at the end of the instant, unless refilled.
    idle: Vec<u32>,
    pairs: SpreadMap<u64, u32>,
    heap: Heap,
}

#[derive(Debug, Default)]
struct Flow {
    from: u32,
    to: u32,
    queue: VecDeque<Transfer>,
    is_idle: bool,
}

#[derive(Debug, Default)]
struct Head {
    /// Bytes of it that were still to move at `since`.
    rest: f64,
    since: u64,
    rate: f64,
    /// The heap entry that counts; `scheduled` is `u64::MAX` if there is none.
    scheduled: u64,
    stamp: u32,
    /// There is something to move.
    is_there: bool,
}

impl Flows {
    pub(super) fn find(&self, from: u32, to: u32) -> Option<u32> {
        self.pairs.get(&key(from, to)).copied()
    }

    pub(super) fn pair(&self, flow: u32) -> (u32, u32) {
        let flow = &self.slots[flow as usize];
        (flow.from, flow.to)
    }

    /// The pair's flow, new on its links if it had none.
    pub(super) fn open(&mut self, from: u32, to: u32, way: [u32; 4], links: &mut Links) -> u32 {
        if let Some(flow) = self.find(from, to) {
            return flow;
        }
        let flow = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Flow::default());
            self.heads.push(Head::default());
            u32::try_from(self.slots.len() - 1).expect("flows are numbered in u32")
        });
        let slot = &mut self.slots[flow as usize];
        (slot.from, slot.to, slot.is_idle) = (from, to, false);
        let head = &mut self.heads[flow as usize];
        (head.rate, head.scheduled, head.is_there) = (0.0, u64::MAX, false);
        self.pairs.insert(key(from, to), flow);
        links.join(flow, way);
        flow
    }

    pub(super) fn push(&mut self, flow: u32, transfer: Transfer, now: u64) {
        self.slots[flow as usize].queue.push_back(transfer);
        if self.slots[flow as usize].queue.len() == 1 {
            self.begin_head(flow, now);
        }
    }

    /// Takes a transfer out; returns the bytes of it that had moved.
    pub(super) fn remove(&mut self, flow: u32, tag: u64, now: u64) -> Option<u64> {
        let slot = &mut self.slots[flow as usize];
        let place = slot.queue.iter().position(|t| t.tag == tag)?;
        let moved = if place == 0 { slot.moved(&self.heads[flow as usize], now) } else { 0 };
        slot.queue.remove(place);
        if place == 0 {
            self.begin_head(flow, now);
        }
        Some(moved)
    }

    /// Takes everything out; returns the bytes of the head that had moved, and the tags.
    pub(super) fn clear(&mut self, flow: u32, now: u64) -> (u64, Vec<u64>) {
        let slot = &mut self.slots[flow as usize];
        let moved = slot.moved(&self.heads[flow as usize], now);
        let tags = slot.queue.drain(..).map(|t| t.tag).collect();
        self.begin_head(flow, now);
        (moved, tags)
    }

    pub(super) fn finish_head(&mut self, flow: u32, at: u64) -> Option<Transfer> {
        let transfer = self.slots[flow as usize].queue.pop_front();
        self.begin_head(flow, at);
        transfer
    }

    pub(super) fn change_rate(&mut self, flow: u32, old: f64, new: f64, now: u64) {
        let head = &mut self.heads[flow as usize];
        debug_assert!((head.rate - old).abs() <= f64::EPSILON * old);
        head.rest = head.rest_at(now);
        head.since = now;
        head.rate = new;
        self.schedule(flow);
    }

    /// When the next head arrives, and of which flow.
    pub(super) fn next_arrival(&mut self) -> Option<(u64, u32)> {
        loop {
            let entry = self.heap.peek()?;
            let head = &mut self.heads[entry.flow as usize];
            if head.stamp != entry.stamp || head.scheduled != entry.at {
                self.heap.pop();
                continue;
            }
            let arrival = head.arrival();
            if arrival <= entry.at {
                return Some((entry.at, entry.flow));
            }
            self.heap.pop();
            head.scheduled = u64::MAX;
            self.schedule(entry.flow);
        }
    }

    /// Takes flows that ran dry and were not refilled off their links.
    pub(super) fn close_idle(&mut self, links: &mut Links) {
        while let Some(flow) = self.idle.pop() {
            let slot = &mut self.slots[flow as usize];
            slot.is_idle = false;
            if !slot.queue.is_empty() {
                continue;
            }
            self.heads[flow as usize].scheduled = u64::MAX;
            self.pairs.remove(&key(slot.from, slot.to));
            self.free.push(flow);
            links.leave(flow);
        }
    }

    fn begin_head(&mut self, flow: u32, now: u64) {
        let slot = &mut self.slots[flow as usize];
        let head = &mut self.heads[flow as usize];
        (head.since, head.scheduled, head.is_there) = (now, u64::MAX, !slot.queue.is_empty());
        let Some(transfer) = slot.queue.front() else {
            if !std::mem::replace(&mut slot.is_idle, true) {
                self.idle.push(flow);
            }
            return;
        };
        head.rest = transfer.bytes as f64;
        self.schedule(flow);
    }

    fn schedule(&mut self, flow: u32) {
        let head = &mut self.heads[flow as usize];
        let at = head.arrival();
        if !head.is_there || at >= head.scheduled {
            return;
        }
        head.stamp = head.stamp.wrapping_add(1);
        head.scheduled = at;
        self.heap.push(Entry { at, flow, stamp: head.stamp });
        let heads = &self.heads;
        self.heap.compact(heads.len(), |e| heads[e.flow as usize].stamp == e.stamp);
    }
}

impl Flow {
    fn moved(&self, head: &Head, now: u64) -> u64 {
        let Some(transfer) = self.queue.front() else { return 0 };
        transfer.bytes.saturating_sub(whole(head.rest_at(now).ceil()))
    }
}

impl Head {
    fn rest_at(&self, now: u64) -> f64 {
        (self.rest - self.rate * now.saturating_sub(self.since) as f64 / NANOS).max(0.0)
    }

    /// Rounded up, so that the bytes have moved by then; never if nothing moves.
    fn arrival(&self) -> u64 {
        if self.rest <= REST_BYTES {
            return self.since;
        }
        if self.rate <= 0.0 {
            return u64::MAX;
        }
        self.since.saturating_add(whole((self.rest * NANOS / self.rate).ceil()))
    }
}

fn key(from: u32, to: u32) -> u64 {
    u64::from(from) << 32 | u64::from(to)
}
