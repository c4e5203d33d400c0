//! What an engine needs of a manifest: its bindings, chunk by chunk.

use aquifer_core::{Binding, BindingError, CheckedBinding, ChunkSet, Layout, Manifest, Run};
use std::collections::BTreeMap;
use std::ops::Range;

/// Where each needed chunk goes in an engine's regions. Derived once per engine and release.
#[derive(Clone, Debug)]
pub struct Plan {
    bindings: Vec<CheckedBinding>,
    spots: BTreeMap<u32, Vec<Spot>>,
    needs: ChunkSet,
}

/// One appearance of a chunk in one binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    binding: usize,
    /// Where in the tensor the chunk begins, and its length.
    tensor_offset: u64,
    chunk_bytes: u64,
}

impl Plan {
    /// Fails, naming the tensor, if a binding does not fit the manifest or its region. `regions`
    /// gives the length of each in bytes.
    pub fn of(
        manifest: &Manifest,
        layout: &Layout,
        bindings: &[Binding],
        regions: &BTreeMap<u32, u64>,
    ) -> Result<Self, BindingError> {
        let mut plan = Plan { bindings: Vec::new(), spots: BTreeMap::new(), needs: ChunkSet::empty(layout.len()) };
        for binding in bindings {
            let refuse = |reason: String| BindingError { tensor: binding.tensor.clone(), reason };
            let tensor = manifest
                .tensor_index(&binding.tensor)
                .ok_or_else(|| refuse("the release has no such tensor".into()))?;
            let region = regions
                .get(&binding.region)
                .ok_or_else(|| refuse(format!("region {} was never registered", binding.region)))?;
            let checked = binding.check(&manifest.tensors()[tensor], *region)?;
            for extent in &layout.tensors[tensor] {
                let chunk_bytes = u64::from(layout.chunk(extent.chunk).len);
                if checked.runs(extent.offset..extent.offset + chunk_bytes).next().is_some() {
                    let spot = Spot { binding: plan.bindings.len(), tensor_offset: extent.offset, chunk_bytes };
                    plan.spots.entry(extent.chunk).or_default().push(spot);
                    plan.needs.insert(extent.chunk);
                }
            }
            plan.bindings.push(checked);
        }
        plan.check_apart(bindings)?;
        Ok(plan)
    }

    pub fn needs(&self) -> &ChunkSet {
        &self.needs
    }

    pub fn spots(&self, chunk: u32) -> &[Spot] {
        self.spots.get(&chunk).map_or(&[], Vec::as_slice)
    }

    /// The pieces of a spot: `tensor_offset` of each counts from the *chunk's* first byte.
    pub fn runs(&self, spot: &Spot) -> impl Iterator<Item = (u32, Run)> + '_ {
        let binding = &self.bindings[spot.binding];
        let begin = spot.tensor_offset;
        binding
            .runs(begin..begin + spot.chunk_bytes)
            .map(move |run| (binding.region, Run { tensor_offset: run.tensor_offset - begin, ..run }))
    }

    /// The first place that holds all of the chunk in one piece: where it can land, be verified
    /// and be served from. `(region, bytes of it)`.
    pub fn place(&self, chunk: u32) -> Option<(u32, Range<u64>)> {
        self.spots(chunk).iter().find_map(|spot| {
            let (region, run) = self.runs(spot).next()?;
            (run.bytes == spot.chunk_bytes).then(|| (region, run.region_offset..run.region_offset + run.bytes))
        })
    }

    /// Whether the chunk has no other spot than its place.
    pub fn has_one_spot(&self, chunk: u32) -> bool {
        self.spots(chunk).len() == 1
    }

    /// Whether all bytes of a spot's chunk are bound, so that it can be verified where it lies.
    pub fn covers(&self, spot: &Spot) -> bool {
        self.runs(spot).map(|(_, run)| run.bytes).sum::<u64>() == spot.chunk_bytes
    }

    /// Bytes of the regions that these chunks fill.
    pub fn bytes_of(&self, chunks: &ChunkSet) -> u64 {
        let spot_bytes = |spot: &Spot| self.runs(spot).map(|(_, run)| run.bytes).sum::<u64>();
        chunks.iter().flat_map(|c| self.spots(c)).map(spot_bytes).sum()
    }

    /// Chunks of this plan whose every spot holds the right bytes already, given what had landed
    /// of an older plan for the same bindings.
    pub fn carried_over(&self, layout: &Layout, old: &Plan, old_layout: &Layout, landed: &ChunkSet) -> ChunkSet {
        let mut before = BTreeMap::new();
        for (chunk, spots) in old.spots.iter().filter(|(c, _)| landed.contains(**c)) {
            for spot in spots {
                before.insert((spot.binding, spot.tensor_offset), old_layout.chunk(*chunk).hash);
            }
        }
        let same = |chunk: u32, spot: &Spot| {
            before.get(&(spot.binding, spot.tensor_offset)) == Some(&layout.chunk(chunk).hash)
        };
        let kept = self.spots.iter().filter(|(c, spots)| spots.iter().all(|s| same(**c, s)));
        ChunkSet::from_indices(layout.len(), kept.map(|(c, _)| *c))
    }

    /// Two tensors bound to the same dense bytes would overwrite each other.
    fn check_apart(&self, bindings: &[Binding]) -> Result<(), BindingError> {
        let mut dense: Vec<_> = self
            .bindings
            .iter()
            .enumerate()
            .filter(|(_, b)| b.bytes() > 0 && b.bytes() == b.region_range().end - b.region_range().start)
            .map(|(i, b)| (b.region, b.region_range().start, b.region_range().end, i))
            .collect();
        dense.sort_unstable();
        for pair in dense.windows(2) {
            let ((region, _, end, a), (next_region, start, _, b)) = (pair[0], pair[1]);
            if region == next_region && start < end {
                let reason = format!("overlaps '{}' in region {region}", bindings[a].tensor);
                return Err(BindingError { tensor: bindings[b].tensor.clone(), reason });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use aquifer_core::{Chunk, ChunkHash, Dtype, TensorEntry};

    /// Tensors of eight-byte U8 chunks: `name -> the byte each chunk is named by`.
    pub(crate) fn manifest(tensors: &[(&str, &[u8])]) -> (Manifest, Layout) {
        let entry = |(name, chunks): &(&str, &[u8])| TensorEntry {
            name: (*name).into(),
            dtype: Dtype::new("U8"),
            shape: vec![chunks.len() as u64, 8],
            chunks: chunks.iter().map(|b| Chunk { hash: ChunkHash::of(&[*b]), len: 8 }).collect(),
        };
        let manifest = Manifest::new(vec![], tensors.iter().map(entry).collect()).unwrap();
        let layout = Layout::of(&manifest);
        (manifest, layout)
    }

    pub(crate) fn bind(tensor: &str, rows: u64, index: Vec<(u64, u64)>, offset: u64) -> Binding {
        Binding {
            tensor: tensor.into(),
            dtype: Dtype::new("U8"),
            shape: vec![rows, 8],
            index,
            region: 0,
            offset,
            strides: vec![],
        }
    }

    fn regions() -> BTreeMap<u32, u64> {
        BTreeMap::from([(0, 256)])
    }

    #[test]
    fn a_slice_needs_its_own_chunks_only() {
        let (m, layout) = manifest(&[("a", &[1, 2, 3, 4]), ("b", &[5])]);
        let plan = Plan::of(&m, &layout, &[bind("a", 4, vec![(1, 3), (0, 8)], 16)], &regions()).unwrap();
        assert_eq!(plan.needs().iter().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(plan.place(1), Some((0, 16..24)));
        assert_eq!(plan.place(2), Some((0, 24..32)));
        assert_eq!(plan.bytes_of(plan.needs()), 16);
    }

    #[test]
    fn half_a_chunk_has_no_place() {
        let (m, layout) = manifest(&[("a", &[1, 2])]);
        let plan = Plan::of(&m, &layout, &[bind("a", 2, vec![(0, 2), (0, 4)], 0)], &regions()).unwrap();
        assert_eq!((plan.place(0), plan.covers(&plan.spots(0)[0])), (None, false));
        assert_eq!(plan.runs(&plan.spots(1)[0]).next().unwrap().1.region_offset, 4);
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let (m, layout) = manifest(&[("a", &[1, 2]), ("b", &[3])]);
        let refused = |bindings: &[Binding], why: &str| {
            let error = Plan::of(&m, &layout, bindings, &regions()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(&[bind("x", 2, vec![], 0)], "no such tensor");
        refused(&[bind("a", 3, vec![], 0)], "the release has");
        refused(&[bind("a", 2, vec![], 250)], "reaches byte");
        refused(&[Binding { region: 4, ..bind("a", 2, vec![], 0) }], "never registered");
        refused(&[bind("a", 2, vec![], 0), bind("b", 1, vec![], 8)], "overlaps 'a'");
    }

    #[test]
    fn what_did_not_change_is_carried_over() {
        let (m1, l1) = manifest(&[("a", &[1, 2]), ("b", &[3])]);
        let (m2, l2) = manifest(&[("a", &[1, 9]), ("b", &[2])]);
        let bindings = [bind("a", 2, vec![], 0), bind("b", 1, vec![], 32)];
        let old = Plan::of(&m1, &l1, &bindings, &regions()).unwrap();
        let new = Plan::of(&m2, &l2, &bindings, &regions()).unwrap();
        let kept = new.carried_over(&l2, &old, &l1, &ChunkSet::full(3));
        assert_eq!(kept.iter().collect::<Vec<_>>(), [0], "chunk 2 lies elsewhere now");
        assert!(new.carried_over(&l2, &old, &l1, &ChunkSet::empty(3)).is_empty());
    }
}
