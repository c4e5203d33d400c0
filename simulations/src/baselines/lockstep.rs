//! Bucketed lockstep broadcast, as checkpoint-engine's broadcast update does it.
//!
//! The checkpoint is cut into buckets. Each goes to all ranks by a pipelined chain, as NCCL's ring
//! does a broadcast: every rank passes on what it receives while it receives it, in pieces that
//! are small against the bucket. So all links of the chain carry the bucket at once, and the rank
//! at place i has it i pieces later than the first. Double buffering lets a bucket start when all
//! ranks have the one before the last. Every rank takes every bucket, wanted or not, since the
//! collective includes it; what it had already it takes again.
//!
//! checkpoint-engine's buckets are up to 2 GiB for checkpoints of about 1 TB; the bucket here is
//! the same share of the checkpoint, and at least one chunk; pieces are scaled with it. Two things
//! favour this baseline: a link of the chain may run ahead of the one before it within a bucket,
//! and copying to the device, opening handles and the ranks' own loading cost nothing.

use super::driver::{Driver, chunk_of, sides};
use crate::outcome::Outcome;
use crate::scenario::Expanded;
use anyhow::Result;
use aquifer_core::Time;
use std::time::Duration;

/// 1 TB in buckets of 2 GiB.
const BUCKETS: u32 = 480;
/// Buckets under way at once: double buffering.
const BUFFERS: u32 = 2;
/// Pieces of 1 MiB in a bucket of 2 GiB; the piece is a guess at NCCL's pipelining step.
const PIECES: f64 = 2048.0;

pub(super) fn run(e: &Expanded) -> Result<Outcome> {
    let (holders, pullers) = sides(e);
    let mut driver = Driver::new(e);
    driver.chunks_per_tag = (e.chunks / BUCKETS).max(1);
    let buckets = e.chunks.div_ceil(driver.chunks_per_tag);
    let line: Vec<u32> = holders.iter().take(1).chain(&pullers).copied().collect();
    let piece_s = piece_s(e, &line, driver.chunks_per_tag);
    for (place, &node) in line.iter().skip(1).enumerate() {
        driver.lag_s[node as usize] = place as f64 * piece_s;
    }
    let fill = Duration::from_secs_f64(pullers.len().saturating_sub(1) as f64 * piece_s);
    let mut waiting = vec![pullers.len(); buckets as usize];
    // When each bucket may start; buckets are complete in order, so these times are too.
    let mut ready = vec![None; buckets as usize];
    ready.iter_mut().take(BUFFERS as usize).for_each(|r| *r = Some(Time::ZERO));
    let mut next = 0;
    loop {
        let start = ready.get(next as usize).copied().flatten();
        if let Some(done) = driver.next_until(start) {
            let bucket = chunk_of(done.tag);
            waiting[bucket as usize] -= 1;
            let later = (bucket + BUFFERS) as usize;
            if waiting[bucket as usize] == 0 && later < ready.len() {
                ready[later] = Some(done.at + fill);
            }
        } else if let Some(now) = start {
            line.windows(2).for_each(|pair| driver.send(now, pair[0], pair[1], next));
            next += 1;
        } else {
            return driver.finish("lockstep");
        }
    }
}

/// Seconds that a piece takes over the chain's slowest link.
fn piece_s(e: &Expanded, line: &[u32], chunks: u32) -> f64 {
    let nodes = || line.iter().map(|&n| &e.nodes[n as usize]);
    let up = nodes().map(|n| n.useful_up()).fold(f64::INFINITY, f64::min);
    let rate = nodes().map(|n| n.useful_down()).fold(up, f64::min);
    f64::from(chunks) * e.chunk_bytes as f64 / PIECES / rate
}
