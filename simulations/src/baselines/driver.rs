//! What all baselines share: the network, who holds what, who has finished, and the samples.

use crate::network::{Done, Network};
use crate::outcome::{Outcome, SAMPLES, Sample};
use crate::scenario::{Expanded, Role, lower_bound};
use anyhow::{Result, ensure};
use aquifer_core::{ChunkSet, Time};
use std::ops::Range;

/// The relative change of a rate that the network passes on; a guess.
const TOLERANCE: f64 = 0.01;

#[derive(Debug)]
pub(super) struct Driver<'a> {
    pub(super) e: &'a Expanded,
    pub(super) network: Network,
    pub(super) has: Vec<ChunkSet>,
    /// A transfer's tag t stands for chunks t times this, and so many from there on.
    pub(super) chunks_per_tag: u32,
    /// Seconds that a node's arrivals come later than the network says.
    pub(super) lag_s: Vec<f64>,
    missing: Vec<u32>,
    finished: Vec<Option<f64>>,
    samples: Vec<Sample>,
    next_sample_s: f64,
    sample_every_s: f64,
    events: u64,
    duplicates: u64,
}

impl<'a> Driver<'a> {
    pub(super) fn new(e: &'a Expanded) -> Self {
        let missing: Vec<u32> = e.nodes.iter().map(|n| n.missing().count()).collect();
        Driver {
            e,
            network: Network::new(e.nodes.iter().map(|n| n.nic).collect(), e.racks.clone(), TOLERANCE),
            chunks_per_tag: 1,
            lag_s: vec![0.0; e.nodes.len()],
            has: e.nodes.iter().map(|n| n.has.clone()).collect(),
            finished: missing.iter().map(|&m| (m == 0).then_some(0.0)).collect(),
            missing,
            samples: Vec::new(),
            next_sample_s: 0.0,
            sample_every_s: lower_bound(e) / f64::from(SAMPLES),
            events: 0,
            duplicates: 0,
        }
    }

    /// The next transfer that arrived, already counted as held.
    pub(super) fn next(&mut self) -> Option<Done> {
        self.next_until(None)
    }

    /// As `next`, but none that arrives after `limit`.
    pub(super) fn next_until(&mut self, limit: Option<Time>) -> Option<Done> {
        let done = loop {
            let at = self.network.next_completion().filter(|&at| limit.is_none_or(|l| at <= l))?;
            if let Some(done) = self.network.pop_completion(at) {
                break done;
            }
        };
        let at_s = done.at.since(Time::ZERO).as_secs_f64();
        self.sample(at_s);
        self.events += 1;
        self.chunks(chunk_of(done.tag)).for_each(|chunk| self.hold(done.to as usize, chunk, at_s));
        Some(done)
    }

    /// Starts the transfer of what `tag` stands for.
    pub(super) fn send(&mut self, now: Time, from: u32, to: u32, tag: u32) {
        let chunks = u64::from(self.chunks(tag).end - self.chunks(tag).start);
        self.network.start(now, from, to, u64::from(tag), chunks * self.e.chunk_bytes);
    }

    fn chunks(&self, tag: u32) -> Range<u32> {
        tag * self.chunks_per_tag..((tag + 1) * self.chunks_per_tag).min(self.e.chunks)
    }

    fn hold(&mut self, node: usize, chunk: u32, at_s: f64) {
        if !self.has[node].insert(chunk) {
            self.duplicates += 1;
        } else if self.e.nodes[node].wants.contains(chunk) {
            self.missing[node] -= 1;
            if self.missing[node] == 0 {
                self.finished[node] = Some(at_s + self.lag_s[node]);
            }
        }
    }

    pub(super) fn finish(mut self, strategy: &str) -> Result<Outcome> {
        let mut outcome = Outcome::new(self.e, strategy, &self.finished, self.network.counters());
        ensure!(outcome.last_healthy_s.is_some(), "{strategy} stopped before all had what they want");
        self.sample(outcome.last_healthy_s.unwrap_or(0.0) + self.sample_every_s);
        outcome.duplicate_bytes = self.duplicates * self.e.chunk_bytes;
        (outcome.samples, outcome.events) = (self.samples, self.events);
        Ok(outcome)
    }

    fn sample(&mut self, now_s: f64) {
        if now_s < self.next_sample_s {
            return;
        }
        let nodes = self.e.nodes.iter().filter(|n| n.is_measured());
        let held = nodes.map(|n| n.wants.count() - self.missing[n.index as usize]);
        self.samples.push(Sample::new(now_s, &mut held.collect::<Vec<_>>()));
        // Late strategies take many times the bound: fewer samples as time goes on.
        self.next_sample_s = now_s + self.sample_every_s.max(now_s / f64::from(SAMPLES));
    }
}

pub(super) fn chunk_of(tag: u64) -> u32 {
    u32::try_from(tag).expect("tags are chunk numbers")
}

/// Nodes that have everything at the start, and those that want something.
pub(super) fn sides(e: &Expanded) -> (Vec<u32>, Vec<u32>) {
    let (have, want): (Vec<_>, Vec<_>) = e.nodes.iter().partition(|n| n.role != Role::Puller);
    (have.iter().map(|n| n.index).collect(), want.iter().map(|n| n.index).collect())
}
