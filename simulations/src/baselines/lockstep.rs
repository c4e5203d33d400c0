//! Bucketed lockstep broadcast, as checkpoint-engine's broadcast update does it.
//!
//! The checkpoint is cut into buckets. Each is broadcast to all ranks by a pipelined collective (a
//! chain of chunks here, what NCCL's ring does for a broadcast), and double buffering lets a
//! bucket start when all ranks have the one before the last. Every rank takes every bucket,
//! wanted or not, since the collective includes it. Ranks that have a part already take it again.
//!
//! checkpoint-engine's buckets are up to 2 GiB for checkpoints of about 1 TB; the bucket here is
//! the same share of the checkpoint, and at least one chunk.

use super::driver::{Driver, chunk_of, sides};
use crate::outcome::Outcome;
use crate::scenario::Expanded;
use anyhow::Result;
use aquifer_core::Time;

/// 1 TB in buckets of 2 GiB.
const BUCKETS: u32 = 480;
/// Buckets under way at once: double buffering.
const BUFFERS: u32 = 2;

pub(super) fn run(e: &Expanded) -> Result<Outcome> {
    let (holders, pullers) = sides(e);
    let mut driver = Driver::new(e);
    let size = (e.chunks / BUCKETS).max(1);
    let buckets = e.chunks.div_ceil(size);
    let range = |bucket: u32| bucket * size..((bucket + 1) * size).min(e.chunks);
    let ranks = pullers.len();
    let mut waiting: Vec<usize> = (0..buckets).map(|b| range(b).len() * ranks).collect();
    let mut after = vec![None; e.nodes.len()];
    pullers.windows(2).for_each(|pair| after[pair[0] as usize] = Some(pair[1]));
    let Some(&first) = pullers.first() else { return driver.finish("lockstep") };
    let mut complete = 0;
    let mut started = BUFFERS.min(buckets);
    for chunk in (0..started).flat_map(range) {
        driver.send(Time::ZERO, holders[0], first, chunk);
    }
    while let Some(done) = driver.next() {
        let chunk = chunk_of(done.tag);
        if let Some(next) = after[done.to as usize] {
            driver.send(done.at, done.to, next, chunk);
        }
        waiting[(chunk / size) as usize] -= 1;
        while complete < buckets && waiting[complete as usize] == 0 {
            complete += 1;
        }
        while started < buckets && started < complete + BUFFERS {
            for chunk in range(started) {
                driver.send(done.at, holders[0], first, chunk);
            }
            started += 1;
        }
    }
    driver.finish("lockstep")
}
