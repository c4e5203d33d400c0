//! What shared memory moves, beside what copying and hashing the same bytes costs on the same cores.
//!
//! ```text
//! cargo run --release -p aquifer-transport --example shm_speed [MiB] [rounds]
//! ```
//!
//! Chunks of 4 MiB. "least" is one thread that copies all and hashes all: 1 / (1/memcpy + 1/BLAKE3).
//! Every row is the best of the rounds, for a machine that does other things besides.

#![expect(clippy::print_stdout, reason = "it prints what it measured")]
#![expect(clippy::cast_precision_loss, reason = "three digits are shown")]

use aquifer_core::{Access, ChunkHash, NodeId};
use aquifer_memory::{Mapping, MemoryStore, Shared, Span};
use aquifer_transport::limits::RECEIVE_PIECE_BYTES;
use aquifer_transport::{Completion, Endpoint, Grants, Operation, ReadOp, Refusal, ShmConfig, ShmTransport, Transport};
use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const CHUNK: u64 = 4 << 20;
const READER: NodeId = NodeId([1; 32]);
const ACCESS: Access = Access { ticket: 1, secret: [7; 32] };

#[derive(Debug)]
struct All(Vec<Span>);

impl Grants for All {
    fn secret(&self, _: u64) -> Option<(NodeId, [u8; 32])> {
        Some((READER, ACCESS.secret))
    }
    fn open(&self, _: NodeId, _: u64, chunk: u32) -> Result<Span, Refusal> {
        self.0.get(chunk as usize).cloned().ok_or(Refusal::Unknown)
    }
    fn still_valid(&self, _: NodeId, _: u64, _: u32) -> bool {
        true
    }
    fn sent(&self, _: NodeId, _: u64, _: u64) {}
}

struct Bench {
    rounds: usize,
    bytes: u64,
    hashes: Vec<ChunkHash>,
    landing: Vec<Span>,
    directory: tempfile::TempDir,
}

fn main() {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u64>().expect("a number"));
    let bytes = (numbers.next().unwrap_or(1024) << 20).next_multiple_of(CHUNK);
    let rounds = usize::try_from(numbers.next().unwrap_or(5)).expect("a small number");
    let count = bytes / CHUNK;
    let directory = tempfile::tempdir().expect("a temporary directory");

    let store = MemoryStore::new(2 * bytes);
    let mut content = vec![0; usize::try_from(CHUNK).expect("it fits")];
    let (mut hashes, mut stored) = (Vec::new(), Vec::new());
    let mut file = File::create(directory.path().join("file")).expect("a file");
    for chunk in 0..count {
        blake3::Hasher::new().update(&chunk.to_le_bytes()).finalize_xof().fill(&mut content);
        let hash = ChunkHash::of(&content);
        let reservation = store.reserve(hash, CHUNK).expect("room");
        reservation.span().write(0, &content).expect("its room");
        stored.push(reservation.commit().expect("a store in memory"));
        file.write_all(&content).expect("room on the disk");
        hashes.push(hash);
    }
    let pieces = |span: &Span| (0..count).map(|i| span.slice(i * CHUNK..(i + 1) * CHUNK).expect("inside")).collect();
    let (region, _fd) = Mapping::memfd("landing", bytes).expect("memory");
    region.span().prefault();
    let landing: Vec<Span> = pieces(&region.span());
    let (source, _fd) = Mapping::memfd("source", bytes).expect("memory");
    let engine: Vec<Span> = pieces(&source.span());
    stored.iter().zip(&engine).for_each(|(from, to)| from.copy_to(0, to, 0, CHUNK).expect("both are memory"));
    let file: Vec<Span> = pieces(&Mapping::file(&directory.path().join("file")).expect("mapped").span());
    let bench = Bench { rounds, bytes, hashes, landing, directory };

    println!("{} chunks of 4 MiB, best of {rounds} rounds{:>24} {:>12}", count, "GB/s", "CPU s/GB");
    let copy = bench.best(|| {
        stored
            .iter()
            .zip(&bench.landing)
            .for_each(|(from, to)| from.copy_to(0, to, 0, CHUNK).expect("both are memory"));
    });
    bench.say("memcpy, store to region", copy, None);
    let hash = bench.best(|| bench.landing.iter().for_each(|span| consume(&span.hash().expect("memory"))));
    bench.say("BLAKE3 of a region, as it is hashed here", hash, None);
    let plain: Vec<u8> = vec![7; usize::try_from(bytes).expect("it fits")];
    let plain = bench.best(|| {
        plain.chunks(usize::try_from(CHUNK).expect("it fits")).for_each(|chunk| consume(&blake3::hash(chunk)));
    });
    bench.say("BLAKE3 of private memory", plain, None);
    let least = (copy.0 + plain.0, copy.1 + plain.1);
    bench.say("least: memcpy, then BLAKE3 of private memory", least, None);
    // As it would be without a window: memory of another process, whose pages are new to this one. A long
    // one is read by pread(2).
    for (name, len) in [("pread(2)", bytes), ("a mapping", CHUNK)] {
        let windows = (0..bytes / len).map(|_| Mapping::window("copy", len).expect("memory")).collect::<Vec<_>>();
        let place = |at: u64| (&windows[usize::try_from(at / len).expect("it fits")], at % len);
        for (at, span) in (0..).step_by(usize::try_from(CHUNK).expect("it fits")).zip(&stored) {
            let (window, begin) = place(at);
            span.copy_to(0, &window.span(), begin, CHUNK).expect("both are memory");
        }
        let moved = bench.best(|| {
            for (at, into) in (0..).step_by(usize::try_from(CHUNK).expect("it fits")).zip(&bench.landing) {
                let (window, begin) = place(at);
                let fd = window.share().expect("a descriptor").expect("this kernel has F_SEAL_FUTURE_WRITE");
                let (shared, mut hasher) = (Shared::receive(fd).expect("memory"), blake3::Hasher::new());
                let mut piece = vec![0; RECEIVE_PIECE_BYTES];
                for at in (0..CHUNK).step_by(RECEIVE_PIECE_BYTES) {
                    shared.read(begin + at, &mut piece).expect("it is as long");
                    hasher.update(&piece);
                    into.write_past_caches(at, &piece).expect("memory");
                }
                consume(&hasher.finalize());
            }
        });
        bench.say(&format!("pages new to the reader, by {name}"), moved, Some(least));
    }
    for threads in [1, 2] {
        for (name, source) in [("store", &stored), ("file", &file), ("an engine's region", &engine)] {
            let moved = bench.over_shm(source.clone(), threads);
            bench.say(&format!("shm, {threads} at once, {name}"), moved, Some(least));
        }
    }
}

impl Bench {
    /// Seconds, and CPU seconds of the whole process, of the quickest round.
    fn best(&self, mut work: impl FnMut()) -> (f64, f64) {
        let rounds = (0..self.rounds).map(|_| {
            let (cpu, started) = (cpu_seconds(), Instant::now());
            work();
            (started.elapsed().as_secs_f64(), cpu_seconds() - cpu)
        });
        rounds.min_by(|a, b| a.0.total_cmp(&b.0)).expect("a round")
    }

    fn say(&self, what: &str, (seconds, cpu): (f64, f64), least: Option<(f64, f64)>) {
        let gb = self.bytes as f64 / 1e9;
        let share = least.map_or(String::new(), |l| format!("   {:.2} of the least", l.0 / seconds));
        println!("{what:<48} {:>10.2} {:>12.3}{share}", gb / seconds, cpu / gb);
    }

    fn over_shm(&self, source: Vec<Span>, threads: usize) -> (f64, f64) {
        let config = ShmConfig { connections_per_peer: threads, ..ShmConfig::default() };
        let start = |grants: Arc<All>| -> (Arc<ShmTransport>, Receiver<Completion>) {
            let (sender, completions) = channel();
            let sender = Mutex::new(sender);
            let complete = move |completion| {
                let _ = sender.lock().expect("nobody panics").send(completion);
            };
            let started = ShmTransport::start(self.directory.path(), grants, complete, config.clone());
            (started.expect("a directory of our own"), completions)
        };
        let (holder, _) = start(Arc::new(All(source)));
        let (reader, completions) = start(Arc::new(All(Vec::new())));
        let endpoint = Endpoint::Shm(holder.path().to_path_buf());
        self.best(|| {
            for (chunk, into) in (0..).zip(&self.landing) {
                reader.submit(Operation::Read(ReadOp {
                    id: u64::from(chunk),
                    peer: NodeId([2; 32]),
                    endpoints: vec![endpoint.clone()],
                    access: ACCESS,
                    lease: 1,
                    chunk,
                    into: into.clone(),
                    adopts: false,
                    stall: Duration::from_secs(5),
                }));
            }
            for _ in &self.landing {
                let Completion { id, result } = completions.recv().expect("every read is completed");
                let at = usize::try_from(id).expect("a small number");
                assert_eq!(result.expect("it arrives").digest, self.hashes[at]);
            }
        })
    }
}

/// Keeps the compiler from leaving out what nobody looks at.
fn consume<T>(value: &T) {
    std::hint::black_box(value);
}

/// Of this process, in user mode and in the kernel.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
