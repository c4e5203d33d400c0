//! What cores and memory can do: copying and hashing, in one process.
//!
//! BLAKE3 is given chunks of 4 MiB, as the transports give it. Everything is in private memory,
//! handled as ordinary slices.

use super::content::{self, PIECE_BYTES};
use super::figures::Run;
use super::lab::Heard;
use super::machine;
use super::part::Part;
use anyhow::Result;
use aquifer_memory::Mapping;
use serde::{Deserialize, Serialize};
use std::hint::black_box;
use std::time::Instant;

/// Chunks that are hashed by themselves: what checkpoints are cut to.
pub(super) const CHUNK_BYTES: usize = 4 << 20;

#[derive(Debug)]
pub(super) struct Cores {
    source: Vec<u8>,
    destination: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Setup {
    /// Of the source and of the destination, each.
    pub(super) bytes: usize,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Task {
    Copy(Threads),
    /// Chunks that are in cache.
    HashHot(Threads),
    /// Chunks that are not.
    HashMemory(Threads),
    /// Piece by piece, each hashed while it is in cache.
    CopyHashPieces,
    /// All of it, one after the other.
    CopyThenHash,
    /// So many bytes of fresh shared memory made present, so many times, by all cores.
    Touch {
        bytes: u64,
        times: u16,
    },
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Threads {
    One,
    All,
}

/// How long a task took.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Took {
    pub(super) bytes: u64,
    pub(super) seconds: f64,
}

impl Took {
    pub(super) fn since(start: Instant, bytes: u64) -> Self {
        Took { bytes, seconds: start.elapsed().as_secs_f64() }
    }
}

impl Heard<Took> {
    /// A run of one process.
    pub(super) fn alone(&self) -> Run {
        let Took { bytes, seconds } = self.reply;
        Run { bytes, seconds, processes: vec![self.usage("alone")] }
    }
}

impl Part for Cores {
    const NAME: &'static str = "cores";
    type Setup = Setup;
    type Ready = ();
    type Task = Task;
    type Reply = Took;

    fn set_up(setup: Setup) -> Result<(Self, ())> {
        let source = content::memory(setup.bytes);
        let destination = source.clone();
        Ok((Cores { source, destination }, ()))
    }

    fn work(&mut self, task: Task) -> Result<Took> {
        let start = Instant::now();
        match task {
            Task::Touch { bytes, times } => return touch(bytes, times),
            Task::Copy(threads) => {
                let share = self.share(threads);
                let pairs = self.source.chunks(share).zip(self.destination.chunks_mut(share));
                in_parallel(pairs, |(from, to)| to.copy_from_slice(from));
            }
            Task::HashHot(threads) => {
                let share = self.share(threads);
                let chunk = &self.source[..CHUNK_BYTES.min(self.source.len())];
                in_parallel(self.source.chunks(share).map(<[u8]>::len), |bytes| hash_hot(chunk, bytes));
            }
            Task::HashMemory(threads) => {
                let share = self.share(threads);
                in_parallel(self.source.chunks(share), hash_chunks);
            }
            Task::CopyHashPieces => {
                for (from, to) in self.source.chunks(CHUNK_BYTES).zip(self.destination.chunks_mut(CHUNK_BYTES)) {
                    copy_and_hash(from, to);
                }
            }
            Task::CopyThenHash => {
                self.destination.copy_from_slice(&self.source);
                hash_chunks(&self.destination);
            }
        }
        Ok(Took::since(start, self.source.len() as u64))
    }
}

impl Cores {
    /// What each thread gets: whole chunks.
    fn share(&self, threads: Threads) -> usize {
        let threads = match threads {
            Threads::One => 1,
            Threads::All => machine::cores(),
        };
        self.source.len().div_ceil(threads).next_multiple_of(CHUNK_BYTES)
    }
}

/// Works on each item, on a thread of its own if there are several.
fn in_parallel<T: Send>(items: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let mut items = items.peekable();
    let work = &work;
    std::thread::scope(|scope| {
        while let Some(item) = items.next() {
            match items.peek() {
                Some(_) => {
                    scope.spawn(move || work(item));
                }
                None => work(item),
            }
        }
    });
}

fn touch(bytes: u64, times: u16) -> Result<Took> {
    let mut seconds = 0.0;
    for _ in 0..times {
        let (mapping, _) = Mapping::memfd("aquifer-bench-fresh", bytes)?;
        let start = Instant::now();
        mapping.span().prefault();
        seconds += start.elapsed().as_secs_f64();
    }
    Ok(Took { bytes: bytes * u64::from(times), seconds })
}

fn hash_hot(chunk: &[u8], bytes: usize) {
    let mut done = 0;
    while done < bytes {
        let n = chunk.len().min(bytes - done);
        black_box(blake3::hash(black_box(&chunk[..n])));
        done += n;
    }
}

/// Hashes chunk after chunk.
pub(super) fn hash_chunks(bytes: &[u8]) {
    bytes.chunks(CHUNK_BYTES).for_each(|chunk| {
        black_box(blake3::hash(chunk));
    });
}

fn copy_and_hash(from: &[u8], to: &mut [u8]) {
    let mut hasher = blake3::Hasher::new();
    for (from, to) in from.chunks(PIECE_BYTES).zip(to.chunks_mut(PIECE_BYTES)) {
        to.copy_from_slice(from);
        hasher.update(to);
    }
    black_box(hasher.finalize());
}
