//! Chunks in an engine's memory, where they may lie in pieces: looking whether they are there, and
//! copying them in.

use aquifer_core::{Chunk, ChunkHash, Hash, Run};
use aquifer_memory::{DiskStore, Span};
use aquifer_proto::Plan;
use std::collections::BTreeMap;
use std::io;

/// Bytes to copy into an engine's memory.
#[derive(Debug)]
pub(super) enum Source {
    /// The memory store's own: verified when they came, and nobody else's to write.
    Store(Span),
    /// What a disk gives back and what an engine has may have changed since it was verified: it
    /// is hashed on the way.
    Disk(DiskStore, ChunkHash),
    Region(Span, ChunkHash),
}

/// Why a copy failed, and whose fault it is.
#[derive(Debug)]
pub(super) enum CopyError {
    /// The source is not what it should be: it must be fetched again.
    Source {
        chunk: u32,
        reason: String,
    },
    Region(String),
}

/// Whether every spot of the chunk holds its bytes. A chunk of which not all bytes are bound cannot be
/// checked and counts as wrong.
pub(super) fn is_in_place(plan: &Plan, regions: &BTreeMap<u32, Span>, chunk: u32, expected: Chunk) -> bool {
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
fn gathered_hash(runs: &[(u32, Run)], regions: &BTreeMap<u32, Span>, len: u32) -> Option<ChunkHash> {
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

/// Copies a chunk to all its spots.
pub(super) fn copy(plan: &Plan, regions: &BTreeMap<u32, Span>, chunk: u32, source: &Source) -> Result<(), CopyError> {
    let bad = |reason: String| CopyError::Source { chunk, reason };
    let checked = |span: &Span, hash: &ChunkHash| -> Result<Bytes, CopyError> {
        let mut bytes = vec![0; usize::try_from(span.len()).map_err(|e| bad(e.to_string()))?];
        span.read(0, &mut bytes).map_err(|e| bad(format!("it cannot be read: {e}")))?;
        match ChunkHash::of(&bytes) == *hash {
            true => Ok(Bytes::Private(bytes)),
            false => Err(bad("its bytes are not what they were".into())),
        }
    };
    let bytes = match source {
        Source::Store(span) => Bytes::Shared(span.clone()),
        Source::Region(span, hash) => checked(span, hash)?,
        Source::Disk(disk, hash) => {
            checked(&disk.get(hash).ok_or_else(|| bad("it is gone from the store".into()))?, hash)?
        }
    };
    for spot in plan.spots(chunk) {
        for (region, run) in plan.runs(spot) {
            let region = regions.get(&region).ok_or_else(|| CopyError::Region("a region is gone".into()))?;
            bytes.copy_to(&run, region).map_err(|e| CopyError::Region(e.to_string()))?;
        }
    }
    Ok(())
}

enum Bytes {
    Shared(Span),
    Private(Vec<u8>),
}

impl Bytes {
    fn copy_to(&self, run: &Run, region: &Span) -> io::Result<()> {
        match self {
            Bytes::Shared(span) => span.copy_to(run.tensor_offset, region, run.region_offset, run.bytes),
            Bytes::Private(bytes) => {
                let at = |offset: u64| usize::try_from(offset).map_err(io::Error::other);
                let piece = bytes.get(at(run.tensor_offset)?..at(run.tensor_offset + run.bytes)?);
                region.write(run.region_offset, piece.ok_or_else(|| io::Error::other("a run beyond its chunk"))?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_core::{Binding, Content, Dtype, Layout, Manifest, Packed, TensorEntry};
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

    struct Engine {
        plan: Plan,
        regions: BTreeMap<u32, Span>,
        chunk: Chunk,
    }

    impl Engine {
        fn new(bindings: &[Binding]) -> Self {
            let (manifest, layout, _) = pack();
            let regions = BTreeMap::from([0, 1].map(|region| (region, Mapping::anonymous(64).unwrap().span())));
            let lens = regions.iter().map(|(region, span)| (*region, span.len())).collect();
            let plan = Plan::of(&manifest, &layout, bindings, &[], &lens).unwrap();
            Engine { plan, regions, chunk: layout.chunk(0) }
        }

        fn is_right(&self) -> bool {
            is_in_place(&self.plan, &self.regions, 0, self.chunk)
        }

        fn fill(&self) {
            let source = Mapping::anonymous(12).unwrap().span();
            source.write(0, &pack().2).unwrap();
            copy(&self.plan, &self.regions, 0, &Source::Store(source)).unwrap();
        }

        fn read(&self, region: u32, at: u64) -> [u8; 4] {
            let mut bytes = [0; 4];
            self.regions[&region].read(at, &mut bytes).unwrap();
            bytes
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
        engine.regions[&1].write(8, b"x").unwrap();
        assert!(!engine.is_right());
    }

    #[test]
    fn every_copy_of_a_piece_counts() {
        let all = [bind("a", (0, 4), 0, 0), bind("b", (0, 4), 0, 4), bind("c", (0, 4), 0, 8)];
        let halves = [bind("b", (0, 2), 1, 0), bind("b", (2, 4), 1, 8), bind("b", (1, 3), 1, 16)];
        let engine = Engine::new(&[all.as_slice(), &halves].concat());
        engine.fill();
        assert!(engine.is_right());
        engine.regions[&1].write(17, b"x").unwrap();
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
}
