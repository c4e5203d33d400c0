//! What an engine needs of a manifest: its bindings, chunk by chunk.

use aquifer_core::{Binding, BindingError, CheckedBinding, ChunkSet, Extent, Layout, Manifest, Row, Run};
use std::collections::BTreeMap;
use std::ops::Range;

/// Where each needed chunk goes in an engine's regions. Derived once per engine and release.
#[derive(Clone, Debug)]
pub struct Plan {
    bindings: Vec<CheckedBinding>,
    homes: BTreeMap<u32, Home>,
    needs: ChunkSet,
}

/// A piece of a chunk in one binding: all of the chunk, but where the bound tensor lies in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spot {
    /// Where in the chunk the piece begins.
    chunk_begin: u32,
    bytes: u32,
    binding: usize,
    /// Where in the tensor the piece begins.
    tensor_offset: u64,
}

/// What becomes of one chunk.
#[derive(Clone, Debug, Default)]
struct Home {
    bytes: u32,
    /// Bytes that its spots fill in the regions, together.
    bound_bytes: u64,
    /// Sorted by where they begin in the chunk.
    spots: Vec<Spot>,
    place: Option<Place>,
}

/// All of a chunk in one piece of a region, made of so many spots.
#[derive(Clone, Debug)]
struct Place {
    region: u32,
    begin: u64,
    spots: usize,
}

impl Plan {
    /// Fails, naming the tensor, if a binding does not fit the manifest or its region. `regions`
    /// gives the length of each in bytes.
    pub fn of(
        manifest: &Manifest,
        layout: &Layout,
        bindings: &[Binding],
        rows: &[Row],
        regions: &BTreeMap<u32, u64>,
    ) -> Result<Self, BindingError> {
        let mut plan = Plan { bindings: Vec::new(), homes: BTreeMap::new(), needs: ChunkSet::empty(layout.len()) };
        let mut finder = Finder { manifest, regions, next: 0 };
        for binding in bindings {
            let (tensor, region_bytes) = finder.find(&binding.tensor, binding.region)?;
            let checked = binding.check(&manifest.tensors()[tensor], region_bytes)?;
            plan.bind(checked, &layout.tensors[tensor]);
        }
        for row in rows {
            let same = row.is_of(manifest);
            for (number, bound, at) in row.places() {
                if same {
                    finder.next = number as usize;
                }
                let (tensor, region_bytes) = finder.find(&bound.name, row.region())?;
                let entry = &manifest.tensors()[tensor];
                plan.bind(
                    CheckedBinding::whole(entry, bound, row.region(), at, region_bytes)?,
                    &layout.tensors[tensor],
                );
            }
        }
        plan.check_apart(bindings, rows)?;
        let bindings = &plan.bindings;
        for (chunk, home) in &mut plan.homes {
            home.settle(layout.chunk(*chunk).len, bindings);
        }
        Ok(plan)
    }

    /// Adds a binding of the tensor that is made of `extents`.
    fn bind(&mut self, binding: CheckedBinding, extents: &[Extent]) {
        for extent in extents {
            let spot = Spot {
                chunk_begin: extent.begin,
                bytes: extent.len,
                binding: self.bindings.len(),
                tensor_offset: extent.offset,
            };
            if binding.runs(spot.range()).next().is_some() {
                self.homes.entry(extent.chunk).or_default().spots.push(spot);
                self.needs.insert(extent.chunk);
            }
        }
        self.bindings.push(binding);
    }

    pub fn needs(&self) -> &ChunkSet {
        &self.needs
    }

    /// Where the chunk goes, in the order of its bytes.
    pub fn spots(&self, chunk: u32) -> &[Spot] {
        self.homes.get(&chunk).map_or(&[], |home| home.spots.as_slice())
    }

    /// The pieces of a spot: `tensor_offset` of each counts from the *chunk's* first byte.
    pub fn runs(&self, spot: &Spot) -> impl Iterator<Item = (u32, Run)> + '_ {
        let binding = &self.bindings[spot.binding];
        let (begin, chunk_begin) = (spot.tensor_offset, u64::from(spot.chunk_begin));
        binding
            .runs(spot.range())
            .map(move |run| (binding.region, Run { tensor_offset: run.tensor_offset - begin + chunk_begin, ..run }))
    }

    /// A place that holds all of the chunk in one piece: where it can land, be verified and be served
    /// from. `(region, bytes of it)`.
    pub fn place(&self, chunk: u32) -> Option<(u32, Range<u64>)> {
        let home = self.homes.get(&chunk)?;
        home.place.as_ref().map(|place| (place.region, place.begin..place.begin + u64::from(home.bytes)))
    }

    /// Whether the chunk has a place and goes nowhere else.
    pub fn has_one_spot(&self, chunk: u32) -> bool {
        let home = self.homes.get(&chunk);
        home.is_some_and(|home| home.place.as_ref().is_some_and(|place| place.spots == home.spots.len()))
    }

    /// Whether a spot alone holds all bytes of its chunk, so that it can be verified where it lies.
    pub fn covers(&self, chunk: u32, spot: &Spot) -> bool {
        self.homes.get(&chunk).is_some_and(|home| home.bytes == spot.bytes) && self.is_whole(spot)
    }

    /// What its spots hold of the chunk, in the order of the chunk's bytes; None if that is fewer bytes
    /// than it has, however they lie.
    pub fn gathered(&self, chunk: u32) -> Option<Vec<(u32, Run)>> {
        let home = self.homes.get(&chunk)?;
        if home.bound_bytes < home.bytes.into() {
            return None;
        }
        let mut runs: Vec<(u32, Run)> = home.spots.iter().flat_map(|spot| self.runs(spot)).collect();
        runs.sort_by_key(|(_, run)| run.tensor_offset);
        Some(runs)
    }

    /// Bytes of the regions that these chunks fill.
    pub fn bytes_of(&self, chunks: &ChunkSet) -> u64 {
        chunks.iter().filter_map(|c| self.homes.get(&c)).map(|home| home.bound_bytes).sum()
    }

    /// Chunks of this plan whose every spot holds the right bytes already, given what had landed
    /// of an older plan for the same bindings.
    pub fn carried_over(&self, layout: &Layout, old: &Plan, old_layout: &Layout, landed: &ChunkSet) -> ChunkSet {
        let mut before = BTreeMap::new();
        for (chunk, home) in old.homes.iter().filter(|(c, _)| landed.contains(**c)) {
            for spot in &home.spots {
                before.insert(*spot, old_layout.chunk(*chunk).hash);
            }
        }
        let same = |chunk: u32, spot: &Spot| before.get(spot) == Some(&layout.chunk(chunk).hash);
        let kept = self.homes.iter().filter(|(c, home)| home.spots.iter().all(|s| same(**c, s)));
        ChunkSet::from_indices(layout.len(), kept.map(|(c, _)| *c))
    }

    fn is_whole(&self, spot: &Spot) -> bool {
        self.bindings[spot.binding].bytes_in(spot.range()) == u64::from(spot.bytes)
    }

    /// Two tensors bound to the same dense bytes would overwrite each other.
    fn check_apart(&self, bindings: &[Binding], rows: &[Row]) -> Result<(), BindingError> {
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
                let names = || {
                    let in_rows = rows.iter().flat_map(Row::places).map(|(_, tensor, _)| &tensor.name);
                    bindings.iter().map(|binding| &binding.tensor).chain(in_rows)
                };
                let name = |binding: usize| names().nth(binding).cloned().unwrap_or_default();
                let reason = format!("overlaps '{}' in region {region}", name(a));
                return Err(BindingError { tensor: name(b), reason });
            }
        }
        Ok(())
    }
}

/// Finds tensors by name, and regions by number.
struct Finder<'a> {
    manifest: &'a Manifest,
    regions: &'a BTreeMap<u32, u64>,
    /// Where the next is looked for first: most engines bind tensors in the order of the manifest.
    next: usize,
}

impl Finder<'_> {
    /// The number of the tensor, and the length of the region in bytes.
    fn find(&mut self, tensor: &str, region: u32) -> Result<(usize, u64), BindingError> {
        let refuse = |reason: String| BindingError { tensor: tensor.into(), reason };
        let follows = self.manifest.tensors().get(self.next).is_some_and(|t| t.name == tensor);
        let found = if follows { Some(self.next) } else { self.manifest.tensor_index(tensor) };
        let found = found.ok_or_else(|| refuse("the release has no such tensor".into()))?;
        self.next = found + 1;
        let bytes = self.regions.get(&region).ok_or_else(|| refuse(format!("region {region} was never registered")))?;
        Ok((found, *bytes))
    }
}

impl Spot {
    /// In bytes of the tensor.
    fn range(&self) -> Range<u64> {
        self.tensor_offset..self.tensor_offset + u64::from(self.bytes)
    }
}

impl Home {
    /// All spots are there: finds the place, if there is one.
    fn settle(&mut self, bytes: u32, bindings: &[CheckedBinding]) {
        self.bytes = bytes;
        self.bound_bytes = self.spots.iter().map(|spot| bindings[spot.binding].bytes_in(spot.range())).sum();
        self.spots.sort_unstable();
        // Pieces that lie in a region as they do in the chunk have one origin: where its first byte would be.
        let origin = |spot: &Spot| {
            let binding = &bindings[spot.binding];
            let run = binding.runs(spot.range()).next().filter(|run| run.bytes == u64::from(spot.bytes))?;
            Some((binding.region, run.region_offset.checked_sub(spot.chunk_begin.into())?))
        };
        let mut reached: BTreeMap<(u32, u64), (u32, usize)> = BTreeMap::new();
        for (spot, at) in self.spots.iter().filter_map(|spot| Some((spot, origin(spot)?))) {
            let (end, spots) = reached.entry(at).or_default();
            if *end == spot.chunk_begin {
                *end += spot.bytes;
                *spots += 1;
            }
        }
        let whole = reached.into_iter().find(|(_, (end, _))| *end == bytes);
        self.place = whole.map(|((region, begin), (_, spots))| Place { region, begin, spots });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use aquifer_core::{Chunk, ChunkHash, Content, Dtype, Packed, TensorEntry};
    use std::sync::Arc;

    /// Tensors of eight-byte U8 chunks: `name -> the byte each chunk is named by`.
    pub(crate) fn manifest(tensors: &[(&str, &[u8])]) -> (Manifest, Layout) {
        let entry = |(name, chunks): &(&str, &[u8])| TensorEntry {
            name: (*name).into(),
            dtype: Dtype::new("U8"),
            shape: vec![chunks.len() as u64, 8],
            content: Content::Chunks(chunks.iter().map(|b| Chunk { hash: ChunkHash::of(&[*b]), len: 8 }).collect()),
        };
        let manifest = Manifest::new(vec![], tensors.iter().map(entry).collect(), vec![]).unwrap();
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
        let plan = Plan::of(&m, &layout, &[bind("a", 4, vec![(1, 3), (0, 8)], 16)], &[], &regions()).unwrap();
        assert_eq!(plan.needs().iter().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(plan.place(1), Some((0, 16..24)));
        assert_eq!(plan.place(2), Some((0, 24..32)));
        assert_eq!(plan.bytes_of(plan.needs()), 16);
    }

    #[test]
    fn half_a_chunk_has_no_place() {
        let (m, layout) = manifest(&[("a", &[1, 2])]);
        let plan = Plan::of(&m, &layout, &[bind("a", 2, vec![(0, 2), (0, 4)], 0)], &[], &regions()).unwrap();
        assert_eq!((plan.place(0), plan.covers(0, &plan.spots(0)[0])), (None, false));
        assert_eq!(plan.runs(&plan.spots(1)[0]).next().unwrap().1.region_offset, 4);
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let (m, layout) = manifest(&[("a", &[1, 2]), ("b", &[3])]);
        let refused = |bindings: &[Binding], why: &str| {
            let error = Plan::of(&m, &layout, bindings, &[], &regions()).unwrap_err().to_string();
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
        let old = Plan::of(&m1, &l1, &bindings, &[], &regions()).unwrap();
        let new = Plan::of(&m2, &l2, &bindings, &[], &regions()).unwrap();
        let kept = new.carried_over(&l2, &old, &l1, &ChunkSet::full(3));
        assert_eq!(kept.iter().collect::<Vec<_>>(), [0], "chunk 2 lies elsewhere now");
        assert!(new.carried_over(&l2, &old, &l1, &ChunkSet::empty(3)).is_empty());
    }

    /// `a`, `b` and `c` of eight bytes each in one pack, in this order; then `d`, a chunk of its own.
    fn packed(bytes: u8) -> (Manifest, Layout) {
        let entry = |name: &str, content| TensorEntry {
            name: name.into(),
            dtype: Dtype::new("U8"),
            shape: vec![1, 8],
            content,
        };
        let in_pack = |begin| Content::Packed(Packed { pack: 0, begin, len: 8 });
        let own = Content::Chunks(vec![Chunk { hash: ChunkHash::of(b"d"), len: 8 }]);
        let tensors = vec![entry("a", in_pack(0)), entry("b", in_pack(8)), entry("c", in_pack(16)), entry("d", own)];
        let pack = Chunk { hash: ChunkHash::of(&[bytes]), len: 24 };
        let manifest = Manifest::new(vec![], tensors, vec![pack]).unwrap();
        let layout = Layout::of(&manifest);
        (manifest, layout)
    }

    fn packed_plan(offsets: &[(&str, u64)]) -> Plan {
        let (m, layout) = packed(0);
        let bindings: Vec<Binding> = offsets.iter().map(|(name, at)| bind(name, 1, vec![], *at)).collect();
        Plan::of(&m, &layout, &bindings, &[], &regions()).unwrap()
    }

    #[test]
    fn a_pack_has_a_place_where_its_tensors_lie_as_in_it() {
        let plan = packed_plan(&[("c", 48), ("d", 56), ("a", 32), ("b", 40)]);
        assert_eq!(plan.place(0), Some((0, 32..56)));
        assert!(plan.has_one_spot(0));
        assert_eq!(plan.bytes_of(plan.needs()), 32);
        let gathered: Vec<_> =
            plan.gathered(0).unwrap().iter().map(|(_, r)| (r.tensor_offset, r.region_offset)).collect();
        assert_eq!(gathered, [(0, 32), (8, 40), (16, 48)]);

        let twice = packed_plan(&[("c", 48), ("a", 32), ("b", 40), ("b", 0)]);
        assert_eq!(twice.place(0), Some((0, 32..56)));
        assert!(!twice.has_one_spot(0), "it must also be copied to 0");

        for elsewhere in [[("a", 32), ("b", 40), ("c", 56)], [("b", 32), ("a", 40), ("c", 48)]] {
            let plan = packed_plan(&elsewhere);
            assert_eq!((plan.place(0), plan.has_one_spot(0)), (None, false));
            assert!(!plan.covers(0, &plan.spots(0)[0]));
        }
    }

    #[test]
    fn a_part_of_a_pack_is_needed_whole_and_has_no_place() {
        let plan = packed_plan(&[("b", 8), ("c", 16)]);
        assert_eq!(plan.needs().iter().collect::<Vec<_>>(), [0]);
        assert_eq!((plan.place(0), plan.gathered(0)), (None, None));
        assert_eq!(plan.bytes_of(plan.needs()), 16);
        let run = plan.runs(&plan.spots(0)[0]).next().unwrap().1;
        assert_eq!((run.tensor_offset, run.region_offset, run.bytes), (8, 8, 8));
    }

    #[test]
    fn an_unchanged_pack_is_carried_over() {
        let ((m1, l1), (m2, l2)) = (packed(0), packed(1));
        let bindings = [bind("b", 1, vec![], 8), bind("d", 1, vec![], 0)];
        let old = Plan::of(&m1, &l1, &bindings, &[], &regions()).unwrap();
        let new = Plan::of(&m2, &l2, &bindings, &[], &regions()).unwrap();
        assert_eq!(old.carried_over(&l1, &old, &l1, &ChunkSet::full(2)).iter().collect::<Vec<_>>(), [0, 1]);
        assert_eq!(new.carried_over(&l2, &old, &l1, &ChunkSet::full(2)).iter().collect::<Vec<_>>(), [1]);
    }
    #[test]
    #[expect(clippy::single_range_in_vec_init)]
    fn a_row_is_the_bindings_it_stands_for() {
        let (m, layout) = packed(0);
        let manifest = Arc::new(m);
        let row = |tensors, begin| Row::new(manifest.clone(), tensors, 0, begin, 8).unwrap();
        let plan_of = |bindings: &[Binding], rows: &[Row], m: &Manifest, layout: &Layout| {
            Plan::of(m, layout, bindings, rows, &regions())
        };
        let bindings: Vec<Binding> =
            ["a", "b", "c", "d"].iter().zip([32, 40, 48, 56]).map(|(name, at)| bind(name, 1, vec![], at)).collect();
        let one_by_one = plan_of(&bindings, &[], &manifest, &layout).unwrap();
        let first = [bindings[0].clone()];
        for (bindings, rows) in [(&[][..], vec![row(vec![0..4], 32)]), (&first[..], vec![row(vec![1..4], 40)])] {
            let plan = plan_of(bindings, &rows, &manifest, &layout).unwrap();
            assert_eq!((plan.place(0), plan.place(1)), (one_by_one.place(0), one_by_one.place(1)));
            assert_eq!(plan.spots(0), one_by_one.spots(0));
            // Of another release, the tensors are found by name.
            let (newer, newer_layout) = packed(1);
            let newer = plan_of(bindings, &rows, &newer, &newer_layout).unwrap();
            let kept = newer.carried_over(&newer_layout, &plan, &layout, &ChunkSet::full(2));
            assert_eq!(kept.iter().collect::<Vec<_>>(), [1]);
        }

        let refused = |rows: &[Row], m: &Manifest, layout: &Layout, why: &str| {
            let error = plan_of(&bindings[..1], rows, m, layout).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(&[row(vec![1..4], 32)], &manifest, &layout, "tensor 'b': overlaps 'a'");
        refused(&[row(vec![1..4], 240)], &manifest, &layout, "tensor 'd': reaches byte 264");
        let (other, other_layout) = super::tests::manifest(&[("a", &[1]), ("b", &[2]), ("c", &[3, 4])]);
        refused(&[row(vec![1..3], 40)], &other, &other_layout, "tensor 'c': bound as");
        refused(&[row(vec![3..4], 40)], &other, &other_layout, "no such tensor");
    }
}
