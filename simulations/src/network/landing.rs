//! What arrived passes through its node's verification, one transfer after the other.

use super::{Done, nanos, time, whole};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

#[derive(Debug)]
pub(super) struct Landings {
    rate: Vec<Option<f64>>,
    free_at: Vec<u64>,
    queue: Vec<VecDeque<Done>>,
    /// One entry for each transfer in a queue; an entry whose time is not its queue's front is old.
    heap: BinaryHeap<Reverse<(u64, u32)>>,
}

impl Landings {
    pub(super) fn new(rate: Vec<Option<f64>>) -> Self {
        let nodes = rate.len();
        Landings { rate, free_at: vec![0; nodes], queue: vec![VecDeque::new(); nodes], heap: BinaryHeap::new() }
    }

    /// Gives the transfer back if its node lands at once.
    pub(super) fn land(&mut self, at: u64, done: Done) -> Option<Done> {
        let node = done.to as usize;
        let Some(rate) = self.rate[node] else { return Some(done) };
        let takes = whole((done.bytes as f64 * 1e9 / rate).ceil());
        self.free_at[node] = self.free_at[node].max(at).saturating_add(takes);
        self.queue[node].push_back(Done { at: time(self.free_at[node]), ..done });
        self.heap.push(Reverse((self.free_at[node], done.to)));
        None
    }

    pub(super) fn next(&mut self) -> Option<u64> {
        loop {
            let &Reverse((at, node)) = self.heap.peek()?;
            if self.queue[node as usize].front().is_some_and(|d| nanos(d.at) == at) {
                return Some(at);
            }
            self.heap.pop();
        }
    }

    pub(super) fn pop(&mut self) -> Option<Done> {
        self.next()?;
        let Reverse((_, node)) = self.heap.pop()?;
        self.queue[node as usize].pop_front()
    }

    pub(super) fn clear(&mut self, node: u32) -> impl Iterator<Item = Done> {
        self.free_at[node as usize] = 0;
        std::mem::take(&mut self.queue[node as usize]).into_iter()
    }
}
