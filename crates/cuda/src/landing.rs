//! Chunks from host memory to a device, hashed there while the next ones are on their way.

use crate::apply::runs;
use crate::device::{Device, DeviceSpan, HostSpan, Stream};
use crate::error::DeviceError;
use crate::limits::{BATCH_BYTES, BATCHES_AHEAD, STAGING_BUFFER_BYTES, STAGING_BUFFERS, STAGING_WORKERS, WORKERS};
use aquifer_core::ChunkHash;
use aquifer_memory::Mapping;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;

/// One chunk: where it is, where it goes, and what it must hash to there.
#[derive(Clone, Debug)]
pub struct Placement {
    pub from: HostSpan,
    pub to: DeviceSpan,
    pub hash: ChunkHash,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Landed {
    pub bytes: u64,
    /// Chunks whose bytes on the device are not what their names say, by their place in the list.
    pub wrong: Vec<usize>,
}

/// Streams and buffers for landing, which every load uses again.
#[derive(Debug)]
pub struct Landing<D: Device> {
    device: D,
    idle: Vec<Lane<D>>,
}

impl<D: Device> Landing<D> {
    pub fn new(device: D) -> Self {
        Landing { device, idle: Vec::new() }
    }

    /// Copies all chunks and hashes them on the device. Ends when all are there and hashed, or at the first error of
    /// the device; a chunk with a wrong hash is not one.
    pub fn land(&mut self, chunks: &[Placement]) -> Result<Landed, DeviceError> {
        let batches = Mutex::new(batches(chunks));
        let lanes = self.lanes(chunks)?;
        let results: Vec<Result<(Lane<D>, Landed), DeviceError>> = std::thread::scope(|scope| {
            let work = |lane| {
                let mut worker = Worker { chunks, lane, under_way: VecDeque::new(), landed: Landed::default() };
                loop {
                    let batch = batches.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(batch) = batch else { return worker.finish() };
                    worker.send(batch)?;
                }
            };
            let threads: Vec<_> = lanes.into_iter().map(|lane| scope.spawn(move || work(lane))).collect();
            threads.into_iter().map(|thread| thread.join().expect("landing does not panic")).collect()
        });
        let mut landed = Landed::default();
        for result in results {
            let (lane, Landed { bytes, wrong }) = result?;
            self.idle.push(lane);
            landed.bytes += bytes;
            landed.wrong.extend(wrong);
        }
        landed.wrong.sort_unstable();
        Ok(landed)
    }

    /// One for each thread.
    fn lanes(&mut self, chunks: &[Placement]) -> Result<Vec<Lane<D>>, DeviceError> {
        let count = match chunks.iter().all(|chunk| chunk.from.is_registered()) {
            true => WORKERS,
            false => STAGING_WORKERS,
        };
        while self.idle.len() < count {
            self.idle.push(Lane::new(&self.device)?);
        }
        Ok(self.idle.split_off(self.idle.len() - count))
    }
}

/// Runs of chunks of [`BATCH_BYTES`] or a little more.
fn batches(chunks: &[Placement]) -> VecDeque<Range<usize>> {
    let mut batches = VecDeque::new();
    let (mut begin, mut bytes) = (0, 0);
    for (at, chunk) in chunks.iter().enumerate() {
        bytes += chunk.from.len();
        if bytes >= BATCH_BYTES || at + 1 == chunks.len() {
            batches.push_back(begin..at + 1);
            (begin, bytes) = (at + 1, 0);
        }
    }
    batches
}

/// What one thread needs: copies go to one stream, the hashing of what has arrived to another.
#[derive(Debug)]
struct Lane<D: Device> {
    copies: D::Stream,
    hashes: D::Stream,
    staging: Staging<D>,
}

impl<D: Device> Lane<D> {
    fn new(device: &D) -> Result<Self, DeviceError> {
        let staging = Staging { device: device.clone(), buffers: VecDeque::new() };
        Ok(Lane { copies: device.stream()?, hashes: device.stream()?, staging })
    }
}

struct Worker<'a, D: Device> {
    chunks: &'a [Placement],
    lane: Lane<D>,
    under_way: VecDeque<Batch<D>>,
    landed: Landed,
}

struct Batch<D: Device> {
    chunks: Range<usize>,
    copied: <D::Stream as Stream>::Mark,
    hashing: <D::Stream as Stream>::Hashing,
}

impl<D: Device> Worker<'_, D> {
    fn send(&mut self, batch: Range<usize>) -> Result<(), DeviceError> {
        let chunks = &self.chunks[batch.clone()];
        let pairs = chunks.iter().map(|chunk| (chunk.from.clone(), chunk.to.clone()));
        let (registered, others): (Vec<_>, Vec<_>) =
            runs(pairs, HostSpan::joined, HostSpan::keeping).into_iter().partition(|(from, _)| from.is_registered());
        self.lane.copies.upload_all(&registered)?;
        for (from, to) in others {
            self.lane.staging.upload(&mut self.lane.copies, &from, &to)?;
        }
        let copied = self.lane.copies.mark()?;
        self.lane.hashes.after(&copied)?;
        let places: Vec<_> = chunks.iter().map(|chunk| chunk.to.clone()).collect();
        let hashing = self.lane.hashes.hash(&places)?;
        self.under_way.push_back(Batch { chunks: batch, copied, hashing });
        match self.under_way.len() > BATCHES_AHEAD {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Waits for the oldest batch.
    fn settle(&mut self) -> Result<(), DeviceError> {
        let Some(Batch { chunks, copied, hashing }) = self.under_way.pop_front() else { return Ok(()) };
        let digests = self.lane.hashes.digests(hashing)?;
        // Long done: this lets go of the spans.
        self.lane.copies.wait(&copied)?;
        for (at, digest) in chunks.zip(digests) {
            let chunk = &self.chunks[at];
            self.landed.bytes += chunk.to.len();
            if digest != chunk.hash {
                self.landed.wrong.push(at);
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(Lane<D>, Landed), DeviceError> {
        while !self.under_way.is_empty() {
            self.settle()?;
        }
        Ok((self.lane, self.landed))
    }
}

/// Registered buffers for what is not: filled and copied from in turn.
#[derive(Debug)]
struct Staging<D: Device> {
    device: D,
    /// The one to use next is first, with the mark after which it may be filled.
    buffers: VecDeque<(HostSpan, <D::Stream as Stream>::Mark)>,
}

impl<D: Device> Staging<D> {
    fn upload(&mut self, copies: &mut D::Stream, from: &HostSpan, to: &DeviceSpan) -> Result<(), DeviceError> {
        let mut at = 0;
        while at < from.len() {
            let len = STAGING_BUFFER_BYTES.min(from.len() - at);
            let buffer = self.next(copies)?;
            from.span().copy_to(at, buffer.span(), 0, len)?;
            copies.upload(&buffer.slice(0..len)?, &to.slice(at..at + len)?)?;
            self.buffers.push_back((buffer, copies.mark()?));
            at += len;
        }
        Ok(())
    }

    /// A buffer that nothing is copied from.
    fn next(&mut self, copies: &mut D::Stream) -> Result<HostSpan, DeviceError> {
        if self.buffers.len() < STAGING_BUFFERS {
            let memory = Mapping::anonymous(STAGING_BUFFER_BYTES)?.span();
            memory.prefault();
            return self.device.register(&memory);
        }
        let (buffer, free) = self.buffers.pop_front().expect("there are STAGING_BUFFERS, which is not zero");
        copies.wait(&free)?;
        Ok(buffer)
    }
}
