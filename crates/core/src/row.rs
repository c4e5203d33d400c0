//! Very many bindings in one: tensors of a release, whole, one after the other in a region.
//!
//! An engine that lets its tensors lie as they come says so in one sentence. Hundreds of thousands of
//! [`Binding`](crate::Binding)s that say the same take longer than their tensors' bytes do.

use crate::manifest::{Manifest, TensorEntry};
use std::ops::Range;
use std::sync::Arc;

/// Tensors of a manifest, each beginning at the next multiple of `align` bytes of a region behind the one
/// before.
#[derive(Clone, Debug)]
pub struct Row {
    manifest: Arc<Manifest>,
    /// Numbers of tensors. Ascending, so that none lies in two places.
    tensors: Vec<Range<u32>>,
    region: u32,
    begin: u64,
    align: u64,
    end: u64,
    len: usize,
}

impl Row {
    /// `begin` is where in the region the first may lie, in bytes. The error says what is wrong.
    pub fn new(
        manifest: Arc<Manifest>,
        tensors: Vec<Range<u32>>,
        region: u32,
        begin: u64,
        align: u64,
    ) -> Result<Self, String> {
        let count = manifest.tensors().len();
        let mut next = 0;
        for Range { start, end } in &tensors {
            if start < &next || end < start || *end as usize > count {
                return Err(format!("tensors {start} to {end} of {count}, where {next} was next"));
            }
            next = *end;
        }
        if align == 0 {
            return Err("no number is a multiple of 0".into());
        }
        let mut row = Row { manifest, tensors, region, begin, align, end: begin, len: 0 };
        let (mut end, mut len) = (begin, 0);
        for (_, tensor) in row.entries() {
            let place = end.checked_next_multiple_of(align).and_then(|at| at.checked_add(tensor.bytes()));
            end = place.ok_or("its tensors do not fit 64 bits")?;
            len += 1;
        }
        (row.end, row.len) = (end, len);
        Ok(row)
    }

    pub fn region(&self) -> u32 {
        self.region
    }

    /// Behind its last byte, in bytes of the region.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// How many tensors.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether its tensors are numbered as in this very manifest.
    pub fn is_of(&self, manifest: &Manifest) -> bool {
        std::ptr::eq(&raw const *self.manifest, manifest)
    }

    /// Each tensor: its number, what its manifest says of it, and where in the region it begins.
    pub fn places(&self) -> impl Iterator<Item = (u32, &TensorEntry, u64)> {
        let mut end = self.begin;
        self.entries().map(move |(number, tensor)| {
            // `new` has seen that all of these sums fit.
            let at = end.next_multiple_of(self.align);
            end = at + tensor.bytes();
            (number, tensor, at)
        })
    }

    fn entries(&self) -> impl Iterator<Item = (u32, &TensorEntry)> {
        self.tensors.iter().cloned().flatten().map(|number| (number, &self.manifest.tensors()[number as usize]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::hash::ChunkHash;
    use crate::manifest::{Chunk, Content};

    fn manifest(bytes: &[u32]) -> Arc<Manifest> {
        let entry = |(i, bytes): (usize, &u32)| TensorEntry {
            name: format!("t{i}"),
            dtype: Dtype::new("U8"),
            shape: vec![u64::from(*bytes)],
            content: Content::Chunks(match bytes {
                0 => vec![],
                len => vec![Chunk { hash: ChunkHash::of(&len.to_le_bytes()), len: *len }],
            }),
        };
        Arc::new(Manifest::new(vec![], bytes.iter().enumerate().map(entry).collect(), vec![]).unwrap())
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init)]
    fn tensors_stand_one_behind_the_other() {
        let manifest = manifest(&[1, 0, 257, 3]);
        let places = |tensors: Vec<Range<u32>>| {
            let row = Row::new(manifest.clone(), tensors, 4, 8, 256).unwrap();
            assert_eq!(row.len(), row.places().count());
            (row.places().map(|(number, _, at)| (number, at)).collect::<Vec<_>>(), row.end())
        };
        assert_eq!(places(vec![0..4]), (vec![(0, 256), (1, 512), (2, 512), (3, 1024)], 1027));
        assert_eq!(places(vec![0..1, 3..4]), (vec![(0, 256), (3, 512)], 515));
        assert_eq!(places(vec![]), (vec![], 8));
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, clippy::reversed_empty_ranges)]
    fn what_cannot_be_is_refused() {
        let refused = |tensors, begin, align, why: &str| {
            let error = Row::new(manifest(&[1, 2]), tensors, 0, begin, align).unwrap_err();
            assert!(error.contains(why), "{error}");
        };
        refused(vec![0..3], 0, 1, "0 to 3 of 2");
        refused(vec![0..1, 0..2], 0, 1, "where 1 was next");
        refused(vec![1..0], 0, 1, "1 to 0");
        refused(vec![0..2], 0, 0, "multiple of 0");
        refused(vec![0..2], u64::MAX, 2, "64 bits");
        refused(vec![0..2], u64::MAX - 1, 1, "64 bits");
    }
}
