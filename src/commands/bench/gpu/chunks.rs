//! Chunks in a GPU's memory: copied there and verified, applied from other places, hashed. Everything that is timed is
//! checked afterwards, against digests that the CPU made.

use super::super::cores::Took;
use super::super::machine;
use super::super::part::Part;
use super::chosen::Chosen;
use super::copies::{self, Memory, finish};
use super::shapes;
use anyhow::{Context, Result, bail, ensure};
use aquifer_core::ChunkHash;
use aquifer_cuda::apply::{apply, apply_from_host};
use aquifer_cuda::landing::{Landing, Placement};
use aquifer_cuda::{Device, DeviceSpan, Gpu, HostSpan, Stream, Twin};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

/// Chunks of these lengths are hashed: what checkpoints are cut to, and shorter ones.
pub(super) const LONG: u64 = 4 << 20;
pub(super) const MIDDLE: u64 = 1 << 20;
pub(super) const SHORT: u64 = 256 << 10;
/// No multiple of 16: of 16 such chunks 15 lie at addresses that are none either.
pub(super) const UNALIGNED: u64 = 5_000_001;
/// One chunk of so many is changed by an update of 2 %.
const ONE_OF: usize = 50;
/// What was there before is as wrong as it can be: every byte this far from its place.
const SPOILT_BYTES: u64 = 256;

#[derive(Debug)]
pub(in super::super) struct Chunks(Box<dyn Measures>);

#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) struct Setup {
    pub(super) device: Chosen,
    pub(super) size_bytes: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) struct Ready {
    pub(super) name: String,
    /// What is hashed.
    pub(super) size_bytes: u64,
    /// What is loaded and applied, and in how many chunks.
    pub(super) checkpoint_bytes: u64,
    pub(super) chunks: usize,
    /// Whether that is all of Llama 8B.
    pub(super) is_whole: bool,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(in super::super) enum Task {
    /// As many bytes as are loaded, in one piece.
    Copy(copies::Task),
    /// Every chunk to its place, and hashed there.
    Load(Source),
    /// What is there already, or on the host, to where an engine reads it.
    Apply(Origin, Changed),
    /// Chunks of that length: the time on the GPU alone.
    HashThere(u64),
    /// From the call until the digests are on the host.
    HashCalled(u64),
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(in super::super) enum Source {
    /// Registered host memory, in the order in which they lie on the GPU.
    InOrder,
    /// Registered host memory, in any order.
    AnyOrder,
    /// The same, and not registered.
    Pageable,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(in super::super) enum Origin {
    Shadow,
    Host,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(in super::super) enum Changed {
    AllInOrder,
    AllAnyOrder,
    /// 2 % of the chunks.
    Some,
}

impl Part for Chunks {
    const NAME: &'static str = "gpu";
    type Setup = Setup;
    type Ready = Ready;
    type Task = Task;
    type Reply = Took;

    fn set_up(setup: Setup) -> Result<(Self, Ready)> {
        let (chosen, uuid) = (&setup.device, setup.device.uuid()?);
        if chosen.is_twin {
            let size = chosen.size(setup.size_bytes, u64::MAX)?;
            return Self::on(Twin::new(uuid), format!("twin {uuid}"), size);
        }
        let gpu = Gpu::open(uuid)?;
        let size = chosen.size(setup.size_bytes, gpu.memory()?.0)?;
        let name = format!("{} {uuid}", gpu.name());
        Self::on(gpu, name, size)
    }

    fn work(&mut self, task: Task) -> Result<Took> {
        self.0.measure(task)
    }
}

impl Chunks {
    fn on<D: Device>(device: D, name: String, size_bytes: u64) -> Result<(Self, Ready)> {
        let mut bench = OnDevice::new(device, size_bytes)?;
        bench.check_that_faults_are_found()?;
        let ready = Ready {
            name,
            size_bytes,
            checkpoint_bytes: bench.checkpoint_bytes,
            chunks: bench.in_order.len(),
            is_whole: shapes::fit(size_bytes),
        };
        Ok((Chunks(Box::new(bench)), ready))
    }
}

trait Measures: fmt::Debug {
    fn measure(&mut self, task: Task) -> Result<Took>;
}

#[derive(Debug)]
struct OnDevice<D: Device> {
    memory: Memory<D>,
    landing: Landing<D>,
    checkpoint_bytes: u64,
    in_order: Vec<Placement>,
    any_order: Vec<Placement>,
    pageable: Vec<Placement>,
    /// By the length of a chunk: where each is, and its digest.
    hashed: BTreeMap<u64, (Vec<DeviceSpan>, Vec<ChunkHash>)>,
}

impl<D: Device> OnDevice<D> {
    fn new(device: D, size_bytes: u64) -> Result<Self> {
        let memory = Memory::new(&device, size_bytes)?;
        let lens = shapes::chunks(size_bytes);
        let (in_order, any_order) = (placed(&lens, false, &memory)?, placed(&lens, true, &memory)?);
        let unregistered =
            |placed: &Placement| Placement { from: HostSpan::pageable(placed.from.span().clone()), ..placed.clone() };
        let pageable = any_order.iter().map(unregistered).collect();
        let hashed = [LONG, MIDDLE, SHORT, UNALIGNED]
            .into_iter()
            .map(|len| Ok((len, cut(len, &memory)?)))
            .collect::<Result<_>>()?;
        let landing = Landing::new(device);
        Ok(OnDevice { memory, landing, checkpoint_bytes: lens.iter().sum(), in_order, any_order, pageable, hashed })
    }

    /// A check that never fails is none.
    fn check_that_faults_are_found(&mut self) -> Result<()> {
        let wrong = self.any_order.len() / 2;
        let span = self.any_order[wrong].from.span();
        let mut byte = [0];
        span.read(77, &mut byte)?;
        span.write(77, &[byte[0] ^ 4])?;
        let found = self.landing.land(&self.any_order)?.wrong;
        span.write(77, &byte)?;
        ensure!(found == [wrong], "one bit of chunk {wrong} was flipped, and these were found wrong: {found:?}");
        Ok(())
    }

    fn load(&mut self, source: Source) -> Result<Took> {
        self.spoil()?;
        let chunks = match source {
            Source::InOrder => &self.in_order,
            Source::AnyOrder => &self.any_order,
            Source::Pageable => &self.pageable,
        };
        let start = Instant::now();
        let landed = self.landing.land(chunks)?;
        let took = Took::since(start, landed.bytes);
        ensure!(landed.wrong.is_empty(), "{} of {} chunks came out wrong", landed.wrong.len(), chunks.len());
        Ok(took)
    }

    fn apply(&mut self, origin: Origin, changed: Changed) -> Result<Took> {
        self.spoil()?;
        let (chunks, step) = match changed {
            Changed::AllInOrder => (&self.in_order, 1),
            Changed::AllAnyOrder => (&self.any_order, 1),
            Changed::Some => (&self.any_order, ONE_OF),
        };
        let chunks: Vec<_> = chunks.iter().step_by(step).collect();
        let bytes = chunks.iter().map(|chunk| chunk.to.len()).sum();
        let stream = &mut self.memory.stream;
        let took = match origin {
            Origin::Shadow => {
                let shadow = |chunk: &&Placement| {
                    let begin = chunk.from.span().mapping().1;
                    Ok((self.memory.shadow.slice(begin..begin + chunk.to.len())?, chunk.to.clone()))
                };
                let pairs = chunks.iter().map(shadow).collect::<Result<Vec<_>>>()?;
                let start = Instant::now();
                apply(stream, &pairs)?;
                finish(stream)?;
                Took::since(start, bytes)
            }
            Origin::Host => {
                let pairs: Vec<_> = chunks.iter().map(|chunk| (chunk.from.clone(), chunk.to.clone())).collect();
                let start = Instant::now();
                apply_from_host(stream, &pairs)?;
                finish(stream)?;
                Took::since(start, bytes)
            }
        };
        let places: Vec<_> = chunks.iter().map(|chunk| chunk.to.clone()).collect();
        let hashing = stream.hash(&places)?;
        let digests = stream.digests(hashing)?;
        let wrong = chunks.iter().zip(digests).filter(|(chunk, digest)| chunk.hash != *digest).count();
        ensure!(wrong == 0, "{wrong} of {} chunks came out wrong", chunks.len());
        Ok(took)
    }

    fn hash(&mut self, len: u64, is_called: bool) -> Result<Took> {
        let (spans, expected) = self.hashed.get(&len).context("chunks of this length were not made")?;
        let stream = &mut self.memory.stream;
        let start = Instant::now();
        let hashing = stream.hash(spans)?;
        let digests = stream.digests(hashing)?;
        let took = Took::since(start, len * spans.len() as u64);
        if digests != *expected {
            bail!("chunks of {len} bytes do not have the digests that the CPU finds");
        }
        Ok(match is_called {
            true => took,
            false => Took { seconds: stream.hash_seconds(spans)?, ..took },
        })
    }

    /// Where an engine reads, nothing is right any more.
    fn spoil(&mut self) -> Result<()> {
        let Memory { stream, shadow, region, .. } = &mut self.memory;
        let len = region.len();
        stream.copy(&shadow.slice(SPOILT_BYTES..len)?, &region.slice(0..len - SPOILT_BYTES)?)?;
        finish(stream)?;
        Ok(())
    }
}

impl<D: Device> Measures for OnDevice<D> {
    fn measure(&mut self, task: Task) -> Result<Took> {
        match task {
            Task::Copy(task) => Ok(self.memory.plain(task, self.checkpoint_bytes)?),
            Task::Load(source) => self.load(source),
            Task::Apply(origin, changed) => self.apply(origin, changed),
            Task::HashThere(len) => self.hash(len, false),
            Task::HashCalled(len) => self.hash(len, true),
        }
    }
}

/// Chunks one after the other where an engine reads them; on the host as well, or in any order.
fn placed<D: Device>(lens: &[u64], shuffled: bool, memory: &Memory<D>) -> Result<Vec<Placement>> {
    let mut order: Vec<_> = (0..lens.len()).collect();
    if shuffled {
        order.shuffle(&mut SmallRng::seed_from_u64(1));
    }
    let mut begins = vec![0; lens.len()];
    let mut end = 0;
    for chunk in order {
        begins[chunk] = end;
        end += lens[chunk];
    }
    let from = begins.iter().zip(lens).map(|(begin, len)| Ok(memory.host.slice(*begin..begin + len)?));
    let from = from.collect::<Result<Vec<_>>>()?;
    let mut at = 0;
    let place = |((from, hash), len): ((HostSpan, ChunkHash), &u64)| {
        let to = memory.region.slice(at..at + len)?;
        at += len;
        Ok(Placement { from, to, hash })
    };
    let hashes = digests(&from)?;
    from.into_iter().zip(hashes).zip(lens).map(place).collect()
}

/// What is hashed: whole chunks of `len` bytes of the shadow, which nothing writes to any more.
fn cut<D: Device>(len: u64, memory: &Memory<D>) -> Result<(Vec<DeviceSpan>, Vec<ChunkHash>)> {
    let ranges = (0..memory.host.len() / len).map(|at| at * len..(at + 1) * len);
    let there = ranges.clone().map(|range| Ok(memory.shadow.slice(range)?)).collect::<Result<_>>()?;
    let here = ranges.map(|range| Ok(memory.host.slice(range)?)).collect::<Result<Vec<_>>>()?;
    Ok((there, digests(&here)?))
}

/// By the CPU, on all cores.
fn digests(spans: &[HostSpan]) -> Result<Vec<ChunkHash>> {
    let share = spans.len().div_ceil(machine::cores()).max(1);
    let hash = |part: &[HostSpan]| part.iter().map(|span| Ok(span.span().hash()?)).collect::<Result<Vec<_>>>();
    Ok(machine::each(spans.chunks(share), hash)?.concat())
}
