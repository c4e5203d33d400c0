//! What a GPU does with chunks, measured: the BLAKE3 kernel, copies from the host, loads that are verified, the
//! registration of host memory, and updates applied from shadow memory.
//!
//! `gpu_speed [--json FILE] [--gpu UUID] [--only kernel|loads|updates]`: prints a table, and writes it as JSON to a file.
//! Needs 34 GB of GPU memory and 17 GB of host memory. docs/measured/gpu.md has the results.
#![allow(clippy::print_stdout, reason = "it prints what it measures")]

mod shapes;
mod table;

use aquifer_core::ChunkHash;
use aquifer_cuda::apply::{apply, apply_from_host};
use aquifer_cuda::landing::{Landing, Placement};
use aquifer_cuda::{Device, DeviceError, DeviceSpan, Gpu, HostSpan, Stream};
use aquifer_memory::{Mapping, Span};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngCore, SeedableRng};
use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use table::Table;

const GIB: u64 = 1 << 30;
const BYTES: u64 = 16 * GIB;
const ROUNDS: usize = 7;
/// One chunk of so many is changed by an update of 2 %.
const ONE_OF: usize = 50;
/// `MADV_COLLAPSE` (Linux 6.1): large pages here and now, which `shmem_enabled` does not forbid.
const MADV_COLLAPSE: libc::c_int = 25;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let option = |name: &str| arguments.iter().skip_while(|word| *word != name).nth(1);
    let wanted = |part: &str| option("--only").is_none_or(|only| only == part);
    let uuid = match option("--gpu") {
        Some(text) => text.parse()?,
        None => Gpu::list()?.first().ok_or("no GPU is visible")?.0,
    };
    let started = Instant::now();
    let gpu = Gpu::open(uuid)?;
    let mut table = Table::default();
    table.note("GPU", format!("{} {}", gpu.name(), gpu.uuid()));
    table.add("opening the device, with its kernels", vec![started.elapsed().as_secs_f64()], None);
    let memory = registration(&gpu, wanted("registration"), &mut table)?;
    fill(memory.span());
    let region = gpu.allocate(BYTES)?;
    copy_limit(&gpu, &memory, &region, &mut table)?;
    let all = shapes::chunks();
    if wanted("kernel") {
        kernel(&gpu, &memory, &region, &mut table)?;
    }
    if wanted("loads") {
        loads(&gpu, &all, &memory, &region, &mut table)?;
    }
    if wanted("updates") {
        updates(&gpu, &all, &memory, &region, &mut table)?;
    }
    if let Some(path) = option("--json") {
        std::fs::write(path, table.json())?;
    }
    Ok(())
}

/// A memfd of 16 GiB, ready to be served to a GPU: with large pages, and before that, where it is wanted, with those of
/// 4 KiB. Answers one with large pages.
fn registration(gpu: &Gpu, wanted: bool, table: &mut Table) -> Outcome<HostSpan> {
    let mut last = None;
    for large in [false, true].into_iter().skip(usize::from(!wanted)) {
        let pages = if large { "2 MiB" } else { "4 KiB" };
        let (mut touched, mut registered) = (Vec::new(), Vec::new());
        for _ in 0..if wanted { 5 } else { 1 } {
            drop(last.take());
            let span = Mapping::memfd("gpu_speed", BYTES)?.0.span();
            let started = Instant::now();
            if large {
                collapse(&span);
            }
            span.prefault();
            touched.push(started.elapsed().as_secs_f64());
            let started = Instant::now();
            last = Some(gpu.register(&span)?);
            registered.push(started.elapsed().as_secs_f64());
        }
        table.add(&format!("first touch of a 16 GiB memfd, pages of {pages}"), touched, Some(BYTES));
        table.add(&format!("registering it, pages of {pages}"), registered, Some(BYTES));
    }
    Ok(last.ok_or("nothing was registered")?)
}

/// Large pages where the kernel gives them, made by all cores.
fn collapse(span: &Span) {
    const PART: usize = 64 << 20;
    let next = AtomicUsize::new(0);
    let refused = AtomicUsize::new(0);
    each_core(|| {
        loop {
            let at = next.fetch_add(PART, Ordering::Relaxed);
            if at as u64 >= span.len() {
                break;
            }
            // Large pages are made of ranges that are in use: of one byte each.
            for page in (at..at + PART).step_by(2 << 20) {
                let _ = span.write(page as u64, &[0]);
            }
            // SAFETY: the range lies in the span. Which pages its bytes lie in changes nothing else.
            let code = unsafe { libc::madvise(span.as_ptr().wrapping_add(at).cast_mut().cast(), PART, MADV_COLLAPSE) };
            if code != 0 {
                refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let refused = refused.into_inner();
    if refused > 0 {
        println!("large pages were refused for {refused} ranges of 64 MiB: {}", std::io::Error::last_os_error());
    }
}

fn fill(span: &Span) {
    const PART: u64 = 16 << 20;
    let next = AtomicUsize::new(0);
    each_core(|| {
        let mut bytes = vec![0; 16 << 20];
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed) as u64;
            if part * PART >= span.len() {
                break;
            }
            SmallRng::seed_from_u64(part).fill_bytes(&mut bytes);
            span.write(part * PART, &bytes).expect("a span of memory, and the part lies in it");
        }
    });
}

fn each_core(work: impl Fn() + Sync) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(&work))));
}

/// How fast registered memory is copied at all: in one piece.
fn copy_limit(gpu: &Gpu, memory: &HostSpan, region: &DeviceSpan, table: &mut Table) -> Outcome<()> {
    let mut stream = gpu.stream()?;
    let rounds = timed(ROUNDS, || {
        stream.upload(memory, region)?;
        finish(&mut stream)
    })?;
    table.add("pinned copy limit: 16 GiB to the GPU, one stream", rounds, Some(BYTES));
    let rounds = timed(3, || {
        stream.download(region, memory)?;
        finish(&mut stream)
    })?;
    table.add("and back", rounds, Some(BYTES));
    Ok(())
}

fn kernel(gpu: &Gpu, memory: &HostSpan, region: &DeviceSpan, table: &mut Table) -> Outcome<()> {
    for (name, len) in [("4 MiB", 4 << 20), ("1 MiB", 1 << 20), ("256 KiB", 256 << 10), ("5 MB + 1", 5_000_001)] {
        let chunks = (0..BYTES / len).map(|at| region.slice(at * len..(at + 1) * len));
        let chunks = chunks.collect::<Result<Vec<_>, DeviceError>>()?;
        let bytes = chunks.len() as u64 * len;
        let mut stream = gpu.stream()?;
        let prepared = stream.prepare(&chunks)?;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS + 2 {
            let before = stream.mark()?;
            stream.launch(&prepared)?;
            let after = stream.mark()?;
            stream.wait(&after)?;
            rounds.push(f64::from(after.ms_since(&before)?) / 1e3);
        }
        table.add(&format!("BLAKE3 of 16 GiB in chunks of {name}"), rounds, Some(bytes));
        let mut digests = Vec::new();
        let rounds = timed(ROUNDS, || {
            let hashing = stream.hash(&chunks)?;
            digests = stream.digests(hashing)?;
            Ok(())
        })?;
        table.add("  the same, from the call to digests on the host", rounds, Some(bytes));
        for at in [0, chunks.len() / 3, chunks.len() - 1] {
            let right = memory.slice(at as u64 * len..(at as u64 + 1) * len)?.span().hash()?;
            assert_eq!(digests[at], right, "chunk {at}");
        }
    }
    Ok(())
}

/// A checkpoint from the host to where an engine reads it, every chunk hashed on the GPU.
fn loads(gpu: &Gpu, all: &[u64], memory: &HostSpan, region: &DeviceSpan, table: &mut Table) -> Outcome<()> {
    let mut stream = gpu.stream()?;
    let pageable = HostSpan::pageable(memory.span().clone());
    for (name, shuffled, from) in [
        ("in order, registered", false, memory),
        ("in any order, registered", true, memory),
        ("in any order, not registered", true, &pageable),
    ] {
        let mut chunks = placed(all, shuffled, from, region)?;
        let bytes = chunks.iter().map(|chunk| chunk.to.len()).sum();
        hash(&mut chunks)?;
        let mut landing = Landing::new(gpu.clone());
        // The first round allocates what the others find.
        let mut wrong = landing.land(&chunks)?.wrong;
        // In turn with plain copies of as many bytes: on a busy host both take now longer, now less.
        let (mut rounds, mut copies) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            copies.extend(timed(1, || {
                stream.upload(&memory.slice(0..bytes)?, &region.slice(0..bytes)?)?;
                finish(&mut stream)
            })?);
            rounds.extend(timed(1, || {
                wrong.extend(landing.land(&chunks)?.wrong);
                Ok(())
            })?);
        }
        assert!(wrong.is_empty(), "wrong chunks: {wrong:?}");
        let mut ratios: Vec<f64> = copies.iter().zip(&rounds).map(|(copy, load)| copy / load).collect();
        ratios.sort_by(f64::total_cmp);
        let best = |rounds: &[f64]| rounds.iter().copied().fold(f64::INFINITY, f64::min);
        let of_best = best(&copies) / best(&rounds);
        table.add("a plain copy of as many bytes, in turn with", copies, Some(bytes));
        table.add(&format!("Llama 8B, verified on the GPU; chunks lie {name}"), rounds, Some(bytes));
        table.note("  of the pinned copy limit: median of the rounds' ratios", ratios[ROUNDS / 2]);
        table.note("  of the pinned copy limit: best round to best round", of_best);
        let mut bit = [0];
        chunks[1234].from.span().read(77, &mut bit)?;
        chunks[1234].from.span().write(77, &[bit[0] ^ 4])?;
        assert_eq!(landing.land(&chunks)?.wrong, [1234], "a flipped bit is found");
        chunks[1234].from.span().write(77, &bit)?;
    }
    Ok(())
}

/// Chunks one after the other in the region; on the host as well, or in any order.
fn placed(all: &[u64], shuffled: bool, from: &HostSpan, to: &DeviceSpan) -> Outcome<Vec<Placement>> {
    let mut order: Vec<_> = (0..all.len()).collect();
    if shuffled {
        order.shuffle(&mut SmallRng::seed_from_u64(1));
    }
    let mut places = vec![0; all.len()];
    let mut at = 0;
    for chunk in order {
        places[chunk] = at;
        at += all[chunk];
    }
    let mut at = 0;
    let place = |(len, place): (&u64, &u64)| {
        let to = to.slice(at..at + len)?;
        at += len;
        Ok(Placement { from: from.slice(*place..place + len)?, to, hash: ChunkHash::NONE })
    };
    all.iter().zip(&places).map(place).collect()
}

/// Names the chunks by what they are on the host.
fn hash(chunks: &mut [Placement]) -> Outcome<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = chunks.len().div_ceil(cores);
    std::thread::scope(|scope| {
        for part in chunks.chunks_mut(share) {
            scope.spawn(|| part.iter_mut().for_each(|c| c.hash = c.from.span().hash().expect("it is memory")));
        }
    });
    Ok(())
}

/// What an engine waits for.
fn updates(gpu: &Gpu, all: &[u64], memory: &HostSpan, region: &DeviceSpan, table: &mut Table) -> Outcome<()> {
    let shadow = gpu.allocate(BYTES)?;
    let mut stream = gpu.stream()?;
    for (name, shuffled, step) in
        [("all, in order", false, 1), ("all, in any order", true, 1), ("2 % of the chunks", true, ONE_OF)]
    {
        let chunks: Vec<_> = placed(all, shuffled, memory, region)?.into_iter().step_by(step).collect();
        let bytes = chunks.iter().map(|chunk| chunk.to.len()).sum();
        let from_shadow = |chunk: &Placement| {
            let at = chunk.from.span().mapping().1;
            Ok((shadow.slice(at..at + chunk.to.len())?, chunk.to.clone()))
        };
        let pairs = chunks.iter().map(from_shadow).collect::<Result<Vec<_>, DeviceError>>()?;
        let rounds = timed(ROUNDS, || {
            apply(&mut stream, &pairs)?;
            finish(&mut stream)
        })?;
        table.add(&format!("applied from shadow memory: {name}"), rounds, Some(bytes));
        let pairs: Vec<_> = chunks.iter().map(|chunk| (chunk.from.clone(), chunk.to.clone())).collect();
        let rounds = timed(ROUNDS, || {
            apply_from_host(&mut stream, &pairs)?;
            finish(&mut stream)
        })?;
        table.add(&format!("applied from registered host memory: {name}"), rounds, Some(bytes));
    }
    Ok(())
}

fn finish<S: Stream>(stream: &mut S) -> Result<(), DeviceError> {
    let mark = stream.mark()?;
    stream.wait(&mark)
}

fn timed(rounds: usize, mut work: impl FnMut() -> Result<(), DeviceError>) -> Result<Vec<f64>, DeviceError> {
    let round = |_| {
        let started = Instant::now();
        work()?;
        Ok(started.elapsed().as_secs_f64())
    };
    (0..rounds).map(round).collect()
}
