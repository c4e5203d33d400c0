//! Chunks in an engine's memory, where they may lie in pieces: looking whether they are there, and
//! copying them in.

mod batches;

use super::regions::Regions;
use aquifer_core::{Chunk, ChunkHash, ChunkSet, Hash, Layout, Run};
use aquifer_cuda::{DeviceSpan, DeviceUuid, DeviceWorker, Goes};
use aquifer_memory::{DiskStore, Mapping, Span};
use aquifer_proto::Plan;
use batches::{ForGpu, ToStage};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Spans that a GPU hashes in one go.
const HASHED_AT_ONCE: usize = 4096;

/// Bytes that are held for a GPU at a time and are nowhere else, such as those read from a disk store; and those
/// that are staged together, so that a part is where not all of them fit. 20 ms of PCIe.
const HELD_BYTES_MAX: u64 = 1 << 30;

/// Bytes to copy into an engine's memory.
#[derive(Debug)]
pub(super) enum Source {
    /// The memory store's own: verified when they came, and nobody else's to write.
    Store(Span),
    /// What a disk gives back and what an engine has may have changed since it was verified: it
    /// is hashed on the way.
    Disk(DiskStore, ChunkHash),
    Region(Span, ChunkHash),
    /// Another engine's memory on a GPU, and who works there.
    Gpu(DeviceSpan, Arc<dyn DeviceWorker>, ChunkHash),
    /// It lies on every GPU it goes to, and goes nowhere else.
    Staged,
}

/// Why a copy failed, and whose fault it is.
#[derive(Debug)]
pub(super) enum CopyError {
    /// The source is not what it should be: it must be fetched again.
    Source {
        chunk: u32,
        reason: String,
    },
    /// The same of an engine's memory on a GPU; other places where the chunk lies are as good as they were.
    OnGpu {
        chunk: u32,
        from: DeviceSpan,
    },
    Region(String),
}

/// An engine's memory, and what goes there.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    pub(super) plan: Arc<Plan>,
    pub(super) layout: Arc<Layout>,
    pub(super) regions: Arc<Regions>,
}

/// Chunks, and the one place of each in a GPU's memory.
type Spots = Vec<(u32, DeviceSpan)>;

/// Chunks that lie verified in GPUs' memory, to be copied where they belong.
#[derive(Debug)]
pub(super) struct Staged {
    /// What says where they belong: of memory with another plan they are no part.
    plan: Arc<Plan>,
    moves: BTreeMap<u32, Vec<Move>>,
    /// Those that go nowhere but from there.
    complete: ChunkSet,
}

/// Bytes of a chunk on a GPU, and where they go on it.
#[derive(Clone, Debug)]
struct Move {
    worker: Arc<dyn DeviceWorker>,
    from: DeviceSpan,
    goes: Goes,
}

impl Staged {
    /// Whether a chunk can be applied to `memory` without any other source.
    pub(super) fn has_all_of(&self, chunk: u32, memory: &Memory) -> bool {
        self.is_for(memory) && self.complete.contains(chunk)
    }

    pub(super) fn is_for(&self, memory: &Memory) -> bool {
        Arc::ptr_eq(&self.plan, &memory.plan)
    }

    fn moves(&self, chunk: u32) -> &[Move] {
        self.moves.get(&chunk).map_or(&[], Vec::as_slice)
    }
}

impl Memory {
    /// Chunks of which every spot holds its bytes. One of which not all bytes are bound cannot be
    /// checked and counts as wrong.
    pub(super) fn in_place(&self) -> ChunkSet {
        let mut found = ChunkSet::empty(self.layout.len());
        let mut on_gpus: BTreeMap<DeviceUuid, (Arc<dyn DeviceWorker>, Spots)> = BTreeMap::new();
        for chunk in self.plan.needs().iter() {
            match self.whole_on_gpu(chunk) {
                Some((span, worker)) => {
                    let entry = on_gpus.entry(worker.uuid()).or_insert_with(|| (worker.clone(), Vec::new()));
                    entry.1.push((chunk, span));
                }
                None if is_in_place(&self.plan, &self.regions, chunk, self.layout.chunk(chunk)) => {
                    found.insert(chunk);
                }
                None => {}
            }
        }
        for (worker, chunks) in on_gpus.into_values() {
            for some in chunks.chunks(HASHED_AT_ONCE) {
                let spans: Vec<DeviceSpan> = some.iter().map(|(_, span)| span.clone()).collect();
                match worker.hash(&spans) {
                    Ok(hashes) => {
                        let right = some.iter().zip(hashes).filter(|((c, _), h)| self.layout.chunk(*c).hash == *h);
                        found.union_with(&ChunkSet::from_indices(
                            self.layout.len(),
                            right.map(|((chunk, _), _)| *chunk),
                        ));
                    }
                    // Fetched again, like what was never there.
                    Err(error) => tracing::warn!("an engine's memory cannot be hashed: {error}"),
                }
            }
        }
        found
    }

    /// Copies chunks to all their spots: those in GPUs' memory from what was `staged` there, if it was. What
    /// became of each.
    pub(super) fn copy_all(
        &self,
        sources: &[(u32, Source)],
        staged: Option<&Staged>,
    ) -> Vec<(u32, Result<(), CopyError>)> {
        let staged = staged.filter(|staged| staged.is_for(self));
        let mut results: Vec<(u32, Result<(), CopyError>)> =
            sources.iter().map(|(chunk, _)| (*chunk, Ok(()))).collect();
        let mut gpus: BTreeMap<DeviceUuid, ForGpu> = BTreeMap::new();
        for (at, (chunk, source)) in sources.iter().enumerate() {
            let copied = self.copy(at, *chunk, source, staged, &mut gpus);
            if let Err(error) = copied {
                results[at].1 = Err(error);
            }
            for gpu in gpus.values_mut().filter(|gpu| gpu.held_bytes >= HELD_BYTES_MAX) {
                gpu.land(&mut results);
                gpu.land_across(&mut results);
            }
        }
        for gpu in gpus.values_mut() {
            gpu.apply(&mut results);
            gpu.land(&mut results);
            gpu.land_across(&mut results);
        }
        results
    }

    /// Copies a chunk from its spots. None if they do not hold all of its bytes, or cannot be read.
    pub(super) fn read_chunk(&self, chunk: u32, into: &Span) -> Option<()> {
        let mut bytes = Vec::new();
        for (region, run) in self.plan.gathered(chunk)? {
            bytes.resize(usize::try_from(run.bytes).ok()?, 0);
            self.regions.get(&region)?.read(run.region_offset, &mut bytes).ok()?;
            into.write(run.tensor_offset, &bytes).ok()?;
        }
        Some(())
    }

    /// Puts chunks beside an engine's memory, on the GPUs where they go. What does not fit stays where it is.
    pub(super) fn stage(&self, sources: &[(u32, Source)]) -> Staged {
        let mut moves: BTreeMap<u32, Vec<Move>> = BTreeMap::new();
        let mut gpus: BTreeMap<DeviceUuid, ToStage> = BTreeMap::new();
        for (chunk, source) in sources {
            let mut source = Loading::new(self, *chunk, source);
            for (worker, goes) in self.goes(*chunk).into_values() {
                let gpu = gpus.entry(worker.uuid()).or_insert_with(|| ToStage::new(worker));
                if let Source::Gpu(from, _, hash) = source.source {
                    gpu.bytes += from.len();
                    gpu.across.push((from.clone(), *hash));
                    gpu.go_across.push((*chunk, goes));
                    if gpu.bytes >= HELD_BYTES_MAX {
                        gpu.stage(&mut moves);
                    }
                    continue;
                }
                // What fails now is told when it is to be applied.
                let Ok(from) = source.span() else { break };
                gpu.bytes += from.len();
                gpu.chunks.push((from, self.layout.chunk(*chunk).hash));
                gpu.go.push((*chunk, goes));
                if gpu.bytes >= HELD_BYTES_MAX {
                    gpu.stage(&mut moves);
                }
            }
        }
        gpus.values_mut().for_each(|gpu| gpu.stage(&mut moves));
        let chunks = sources.iter().map(|(chunk, _)| *chunk);
        let all_of = |chunk: &u32| {
            self.goes_to_host(*chunk).next().is_none()
                && self.goes(*chunk).len() == moves.get(chunk).map_or(0, Vec::len)
        };
        let complete = ChunkSet::from_indices(self.layout.len(), chunks.filter(all_of));
        Staged { plan: self.plan.clone(), moves, complete }
    }

    /// What changes in host memory when these chunks are copied there.
    pub(super) fn changes_on_host(&self, chunks: impl Iterator<Item = u32>) -> Vec<Span> {
        let places = chunks.flat_map(|chunk| self.goes_to_host(chunk));
        places
            .filter_map(|(region, run)| region?.slice(run.region_offset..run.region_offset + run.bytes).ok())
            .collect()
    }

    /// Copies a chunk to its spots in host memory, and lists what is to be done on GPUs.
    fn copy(
        &self,
        at: usize,
        chunk: u32,
        source: &Source,
        staged: Option<&Staged>,
        gpus: &mut BTreeMap<DeviceUuid, ForGpu>,
    ) -> Result<(), CopyError> {
        let moves = staged.map_or(&[][..], |staged| staged.moves(chunk));
        for Move { worker, from, goes } in moves {
            let gpu = gpus.entry(worker.uuid()).or_insert_with(|| ForGpu::new(worker.clone()));
            gpu.apply.push((from.clone(), goes.clone()));
            gpu.applied.push(at);
        }
        if staged.is_some_and(|staged| staged.complete.contains(chunk)) {
            return Ok(());
        }
        let is_private = !matches!(source, Source::Store(_));
        let on_gpu = match source {
            Source::Gpu(from, _, hash) => Some((from.clone(), *hash)),
            Source::Store(_) | Source::Disk(..) | Source::Region(..) | Source::Staged => None,
        };
        let mut source = Loading::new(self, chunk, source);
        for (uuid, (worker, goes)) in self.goes(chunk) {
            if moves.iter().any(|there| there.worker.uuid() == uuid) {
                continue;
            }
            if let Some((from, hash)) = &on_gpu {
                let gpu = gpus.entry(uuid).or_insert_with(|| ForGpu::new(worker));
                gpu.held_bytes += from.len();
                gpu.across.push((from.clone(), *hash, goes));
                gpu.went_across.push((at, chunk));
                continue;
            }
            let from = source.span()?;
            let gpu = gpus.entry(uuid).or_insert_with(|| ForGpu::new(worker));
            gpu.held_bytes += if is_private { from.len() } else { 0 };
            gpu.land.push((from, self.layout.chunk(chunk).hash, goes));
            gpu.landed.push(at);
        }
        for (region, run) in self.goes_to_host(chunk) {
            let region = region.ok_or_else(|| CopyError::Region("a region is gone".into()))?;
            let copied = source.span()?.copy_to(run.tensor_offset, region, run.region_offset, run.bytes);
            copied.map_err(|e| CopyError::Region(e.to_string()))?;
        }
        Ok(())
    }

    /// A chunk that goes to a single place, and whole, if that is on a GPU: where that is.
    fn whole_on_gpu(&self, chunk: u32) -> Option<(DeviceSpan, &Arc<dyn DeviceWorker>)> {
        let (region, range) = self.plan.place(chunk).filter(|_| self.plan.has_one_spot(chunk))?;
        self.regions.get(&region)?.gpu(range)
    }

    /// Pieces of a chunk that belong in host memory, each with its region, unless that is gone.
    fn goes_to_host(&self, chunk: u32) -> impl Iterator<Item = (Option<&Span>, Run)> {
        let runs = self.plan.spots(chunk).iter().flat_map(|spot| self.plan.runs(spot));
        runs.filter_map(|(region, run)| match self.regions.get(&region) {
            Some(region) => region.host().map(|host| (Some(host), run)),
            None => Some((None, run)),
        })
    }

    /// Where a chunk goes on each GPU.
    fn goes(&self, chunk: u32) -> BTreeMap<DeviceUuid, (Arc<dyn DeviceWorker>, Goes)> {
        let mut all: BTreeMap<DeviceUuid, (Arc<dyn DeviceWorker>, Goes)> = BTreeMap::new();
        if let Some((span, worker)) = self.whole_on_gpu(chunk) {
            all.insert(worker.uuid(), (worker.clone(), Goes::Whole(span)));
            return all;
        }
        for (region, run) in self.plan.spots(chunk).iter().flat_map(|spot| self.plan.runs(spot)) {
            let range = run.region_offset..run.region_offset + run.bytes;
            let Some((span, worker)) = self.regions.get(&region).and_then(|region| region.gpu(range)) else { continue };
            let entry = all.entry(worker.uuid()).or_insert_with(|| (worker.clone(), Goes::Parts(Vec::new())));
            if let Goes::Parts(parts) = &mut entry.1 {
                parts.push((run.tensor_offset, span));
            }
        }
        all
    }

    /// A chunk's bytes, right for sure, in memory that nobody else writes to.
    fn load(&self, chunk: u32, source: &Source) -> Result<Span, CopyError> {
        let bad = |reason: String| CopyError::Source { chunk, reason };
        let (span, hash) = match source {
            Source::Store(span) => return Ok(span.clone()),
            Source::Staged => return Err(bad("it is not staged after all".into())),
            Source::Gpu(from, worker, hash) => return out_of_gpu(chunk, from, worker, *hash),
            Source::Region(span, hash) => (span.clone(), hash),
            Source::Disk(disk, hash) => (disk.get(hash).ok_or_else(|| bad("it is gone from the store".into()))?, hash),
        };
        let copy = Mapping::anonymous(span.len()).map_err(|e| CopyError::Region(e.to_string()))?.span();
        span.copy_to(0, &copy, 0, span.len()).map_err(|e| bad(format!("it cannot be read: {e}")))?;
        match copy.hash() {
            Ok(found) if found == *hash => Ok(copy),
            Ok(_) => Err(bad("its bytes are not what they were".into())),
            Err(error) => Err(bad(error.to_string())),
        }
    }
}

/// A chunk's bytes from another engine's memory on a GPU.
fn out_of_gpu(
    chunk: u32,
    from: &DeviceSpan,
    worker: &Arc<dyn DeviceWorker>,
    hash: ChunkHash,
) -> Result<Span, CopyError> {
    let copy = Mapping::anonymous(from.len()).map_err(|e| CopyError::Region(e.to_string()))?.span();
    let brought = worker.bring_out(&[(from.clone(), copy.clone())]).is_ok_and(|()| copy.hash().ok() == Some(hash));
    brought.then_some(copy).ok_or_else(|| CopyError::OnGpu { chunk, from: from.clone() })
}

/// A chunk's bytes, got when they are first asked for.
struct Loading<'a> {
    memory: &'a Memory,
    chunk: u32,
    source: &'a Source,
    loaded: Option<Span>,
}

impl<'a> Loading<'a> {
    fn new(memory: &'a Memory, chunk: u32, source: &'a Source) -> Self {
        Loading { memory, chunk, source, loaded: None }
    }

    fn span(&mut self) -> Result<Span, CopyError> {
        if let Some(loaded) = &self.loaded {
            return Ok(loaded.clone());
        }
        Ok(self.loaded.insert(self.memory.load(self.chunk, self.source)?).clone())
    }
}

/// Whether every spot of the chunk holds its bytes.
fn is_in_place(plan: &Plan, regions: &Regions, chunk: u32, expected: Chunk) -> bool {
    let spots = plan.spots(chunk);
    if !spots.iter().all(|spot| plan.covers(chunk, spot)) {
        return plan.gathered(chunk).and_then(|runs| gathered_hash(&runs, regions, expected.len))
            == Some(expected.hash);
    }
    spots.iter().all(|spot| {
        let hash = || -> Option<ChunkHash> {
            let mut hasher = blake3::Hasher::new();
            for (region, run) in plan.runs(spot) {
                regions.get(&region)?.hash_into(run.region_offset, run.bytes, &mut hasher).ok()?;
            }
            Some(ChunkHash(Hash(*hasher.finalize().as_bytes())))
        };
        hash() == Some(expected.hash)
    })
}

/// The hash of a chunk of `len` bytes that is put together from `runs`, which are in the order of its
/// bytes. None if some of them are missing, or lie in two places and differ.
fn gathered_hash(runs: &[(u32, Run)], regions: &Regions, len: u32) -> Option<ChunkHash> {
    let mut bytes = vec![0; len as usize];
    let mut again = Vec::new();
    let mut reached = 0;
    for (region, run) in runs {
        let begin = usize::try_from(run.tensor_offset).ok()?;
        let end = begin.checked_add(usize::try_from(run.bytes).ok()?).filter(|end| *end <= bytes.len())?;
        if begin > reached {
            return None;
        }
        let region = regions.get(region)?;
        // Bytes up to `reached` are there already, from elsewhere.
        let known = reached.min(end);
        again.resize(known - begin, 0);
        region.read(run.region_offset, &mut again).ok()?;
        if again != bytes[begin..known] {
            return None;
        }
        region.read(run.region_offset + (known - begin) as u64, &mut bytes[known..end]).ok()?;
        reached = reached.max(end);
    }
    (reached == bytes.len()).then(|| ChunkHash::of(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::regions::Region;
    use aquifer_core::{Binding, Content, Dtype, Layout, Manifest, Packed, TensorEntry};
    use aquifer_cuda::{Twin, worker};
    use aquifer_memory::Mapping;

    /// Tensors `a`, `b` and `c` of four bytes each, in one pack.
    fn pack() -> (Manifest, Layout, Vec<u8>) {
        let bytes: Vec<u8> = (1..=12).collect();
        let entry = |(name, begin): (&str, u32)| TensorEntry {
            name: name.into(),
            dtype: Dtype::new("U8"),
            shape: vec![4],
            content: Content::Packed(Packed { pack: 0, begin, len: 4 }),
        };
        let tensors = [("a", 8), ("b", 0), ("c", 4)].map(entry).to_vec();
        let manifest = Manifest::new(vec![], tensors, vec![Chunk { hash: ChunkHash::of(&bytes), len: 12 }]).unwrap();
        let layout = Layout::of(&manifest);
        (manifest, layout, bytes)
    }

    fn bind(tensor: &str, index: (u64, u64), region: u32, offset: u64) -> Binding {
        let (dtype, strides) = (Dtype::new("U8"), vec![]);
        Binding { tensor: tensor.into(), dtype, shape: vec![4], index: vec![index], region, offset, strides }
    }

    const GPU: DeviceUuid = DeviceUuid([5; 16]);

    struct Engine(Memory);

    impl Engine {
        /// Its second region is on a GPU, or rather on a twin.
        fn new(bindings: &[Binding]) -> Self {
            let (manifest, layout, _) = pack();
            let memory = || Mapping::anonymous(64).unwrap().span();
            let gpu = Region::Gpu(Twin::of_host(GPU, memory()), worker(Twin::new(GPU)));
            let regions = BTreeMap::from([(0, Region::Host(memory())), (1, gpu)]);
            let lens = regions.iter().map(|(region, memory)| (*region, memory.len())).collect();
            let plan = Plan::of(&manifest, &layout, bindings, &[], &lens).unwrap();
            Engine(Memory { plan: Arc::new(plan), layout: Arc::new(layout), regions: Arc::new(regions) })
        }

        fn is_right(&self) -> bool {
            self.0.in_place().contains(0)
        }

        fn source() -> Vec<(u32, Source)> {
            let source = Mapping::anonymous(12).unwrap().span();
            source.write(0, &pack().2).unwrap();
            vec![(0, Source::Store(source))]
        }

        fn fill(&self) {
            self.fill_from(None);
        }

        fn fill_from(&self, staged: Option<&Staged>) {
            let results = self.0.copy_all(&Self::source(), staged);
            assert!(matches!(results[..], [(0, Ok(()))]), "{results:?}");
        }

        fn read(&self, region: u32, at: u64) -> [u8; 4] {
            let mut bytes = [0; 4];
            self.0.regions[&region].read(at, &mut bytes).unwrap();
            bytes
        }

        fn write(&self, region: u32, at: u64, bytes: &[u8]) {
            let chunk = Mapping::anonymous(bytes.len() as u64).unwrap().span();
            chunk.write(0, bytes).unwrap();
            match &self.0.regions[&region] {
                Region::Host(span) => span.write(at, bytes).unwrap(),
                Region::Gpu(span, worker) => {
                    let to = span.slice(at..at + bytes.len() as u64).unwrap();
                    worker.land(&[(chunk, ChunkHash::of(bytes), Goes::Whole(to))]).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_scattered_pack_is_copied_and_checked() {
        let engine = Engine::new(&[bind("a", (0, 4), 0, 32), bind("b", (0, 4), 1, 7), bind("c", (0, 4), 0, 0)]);
        assert!(!engine.is_right());
        engine.fill();
        assert!(engine.is_right());
        assert_eq!(
            [engine.read(0, 32), engine.read(1, 7), engine.read(0, 0)],
            [[9, 10, 11, 12], [1, 2, 3, 4], [5, 6, 7, 8]]
        );
        engine.write(1, 8, b"x");
        assert!(!engine.is_right());
    }

    #[test]
    fn what_lies_in_pieces_is_put_together_again() {
        let engine = Engine::new(&[bind("a", (0, 4), 0, 32), bind("b", (0, 4), 1, 7), bind("c", (0, 4), 0, 0)]);
        engine.fill();
        let copy = Mapping::anonymous(12).unwrap().span();
        assert_eq!(engine.0.read_chunk(0, &copy), Some(()));
        assert_eq!(copy.hash().unwrap(), engine.0.layout.chunk(0).hash);
        let part = Engine::new(&[bind("a", (0, 4), 0, 32), bind("b", (0, 4), 1, 7)]);
        assert_eq!(part.0.read_chunk(0, &copy), None);
    }

    #[test]
    fn every_copy_of_a_piece_counts() {
        let all = [bind("a", (0, 4), 0, 0), bind("b", (0, 4), 0, 4), bind("c", (0, 4), 0, 8)];
        let halves = [bind("b", (0, 2), 1, 0), bind("b", (2, 4), 1, 8), bind("b", (1, 3), 1, 16)];
        let engine = Engine::new(&[all.as_slice(), &halves].concat());
        engine.fill();
        assert!(engine.is_right());
        engine.write(1, 17, b"x");
        assert!(!engine.is_right(), "the third copy of a byte is wrong");
    }

    #[test]
    fn a_pack_that_is_partly_bound_cannot_be_checked() {
        for slice in [(0, 3), (1, 4), (0, 0)] {
            let engine = Engine::new(&[bind("a", (0, 4), 0, 0), bind("b", (0, 4), 0, 4), bind("c", slice, 0, 8)]);
            engine.fill();
            assert!(!engine.is_right(), "{slice:?} of 'c'");
        }
    }

    #[test]
    fn a_gpu_has_chunks_whole_and_from_what_was_staged() {
        let whole = [bind("a", (0, 4), 1, 8), bind("b", (0, 4), 1, 0), bind("c", (0, 4), 1, 4)];
        let parts =
            [bind("a", (0, 4), 1, 32), bind("b", (0, 4), 1, 7), bind("c", (1, 3), 0, 0), bind("c", (0, 4), 1, 0)];
        for bindings in [&whole[..], &parts] {
            let engine = Engine::new(bindings);
            let staged = engine.0.stage(&Engine::source());
            assert_eq!(staged.moves[&0].len(), 1);
            // The second has a byte or two in host memory as well.
            assert_eq!(staged.has_all_of(0, &engine.0), bindings == whole);
            assert!(!engine.is_right(), "nothing is there before it is applied");
            engine.fill_from(Some(&staged));
            assert!(engine.is_right());
            let again = Engine::new(bindings);
            again.fill();
            assert!(again.is_right());
            again.write(1, 8, b"xx");
            assert!(!again.is_right());
        }
    }

    #[test]
    fn a_gpu_has_chunks_from_another_and_wrong_ones_are_told() {
        const OTHER: DeviceUuid = DeviceUuid([6; 16]);
        let whole = [bind("a", (0, 4), 1, 8), bind("b", (0, 4), 1, 0), bind("c", (0, 4), 1, 4)];
        let parts =
            [bind("a", (0, 4), 1, 32), bind("b", (0, 4), 0, 7), bind("c", (1, 3), 0, 0), bind("c", (0, 4), 1, 0)];
        let hash = pack().1.chunk(0).hash;
        for bindings in [&whole[..], &parts] {
            let (there, other) = (Mapping::anonymous(12).unwrap().span(), worker(Twin::new(OTHER)));
            let source = || [(0, Source::Gpu(Twin::of_host(OTHER, there.clone()), other.clone(), hash))];
            let engine = Engine::new(bindings);
            let results = engine.0.copy_all(&source(), None);
            assert!(matches!(&results[..], [(0, Err(CopyError::OnGpu { chunk: 0, .. }))]), "{results:?}");
            assert!(engine.0.stage(&source()).moves[&0].is_empty());
            there.write(0, &pack().2).unwrap();
            let staged = engine.0.stage(&source());
            assert_eq!(staged.has_all_of(0, &engine.0), bindings == whole);
            assert!(!engine.is_right(), "nothing is there before it is applied");
            assert!(engine.0.copy_all(&source(), Some(&staged)).iter().all(|(_, result)| result.is_ok()));
            assert!(engine.is_right());
            let again = Engine::new(bindings);
            assert!(again.0.copy_all(&source(), None).iter().all(|(_, result)| result.is_ok()));
            assert!(again.is_right());
        }
    }

    #[test]
    fn wrong_bytes_do_not_reach_a_gpu() {
        let engine = Engine::new(&[bind("a", (0, 4), 1, 8), bind("b", (0, 4), 1, 0), bind("c", (0, 4), 1, 4)]);
        let wrong = Mapping::anonymous(12).unwrap().span();
        let staged = engine.0.stage(&[(0, Source::Store(wrong.clone()))]);
        assert!(staged.moves[&0].is_empty() && !staged.has_all_of(0, &engine.0));
        let results = engine.0.copy_all(&[(0, Source::Store(wrong.clone()))], None);
        assert!(matches!(&results[..], [(0, Err(CopyError::Region(reason)))] if reason.contains("other bytes")));
        let results = engine.0.copy_all(&[(0, Source::Region(wrong, engine.0.layout.chunk(0).hash))], None);
        assert!(matches!(&results[..], [(0, Err(CopyError::Source { chunk: 0, .. }))]), "{results:?}");
    }
}
