//! Bindings: "this slice of that tensor lives at this offset and stride of this region".
//!
//! Pure index arithmetic. It turns a byte range of a tensor into the runs of a region that hold
//! it, and is the only place that knows how.

use crate::dtype::Dtype;
use crate::limits::TENSOR_DIMS_MAX;
use crate::manifest::TensorEntry;
use std::ops::Range;
use thiserror::Error;

/// As an engine registers it, before it is checked against a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    pub tensor: String,
    pub dtype: Dtype,
    /// Shape of the whole tensor, not of the slice.
    pub shape: Vec<u64>,
    /// The slice: a half-open range for each dimension. Empty means all of it.
    pub index: Vec<(u64, u64)>,
    /// Which region, by the number the engine gave it.
    pub region: u32,
    /// Where in the region the slice's first element lies, in bytes.
    pub offset: u64,
    /// Bytes from one index to the next in the region, for each dimension. Empty means densely
    /// packed in row-major order.
    pub strides: Vec<u64>,
}

#[derive(Debug, Error, PartialEq, Eq)]
#[error("binding of tensor '{tensor}': {reason}")]
pub struct BindingError {
    pub tensor: String,
    pub reason: String,
}

/// A piece of a tensor and where it lies in the region; `tensor_offset` counts from the
/// tensor's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub tensor_offset: u64,
    pub region_offset: u64,
    pub bytes: u64,
}

/// A binding that fits its tensor and its region: every run it yields lies inside both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedBinding {
    pub region: u32,
    /// Outer dimensions, slowest first: how many indices are bound, bytes between them in the
    /// tensor, bytes between them in the region.
    outer: Vec<Dim>,
    runs: u64,
    run_bytes: u64,
    tensor_begin: u64,
    region_begin: u64,
    region_end: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dim {
    count: u64,
    tensor_stride: u64,
    region_stride: u64,
}

impl Binding {
    /// Checks the binding against the tensor of a manifest and the length of its region.
    pub fn check(&self, tensor: &TensorEntry, region_bytes: u64) -> Result<CheckedBinding, BindingError> {
        let refuse = |reason: String| BindingError { tensor: self.tensor.clone(), reason };
        check_kind(tensor, &self.dtype, &self.shape)?;
        let dims = self.dims(tensor).map_err(refuse)?;
        let checked = self.collapse(tensor, dims).ok_or_else(|| refuse("its extent does not fit 64 bits".into()))?;
        if checked.overlaps_itself() {
            return Err(refuse(format!("strides {:?} put two elements in one place", self.strides)));
        }
        check_end(&self.tensor, self.region, checked.region_end, region_bytes)?;
        Ok(checked)
    }

    /// One entry per dimension, fastest last, with a last one for the element's bytes; and the
    /// offset of the slice's first element in the tensor.
    fn dims(&self, tensor: &TensorEntry) -> Result<(Vec<Dim>, u64), String> {
        let n = tensor.shape.len();
        if n > TENSOR_DIMS_MAX {
            return Err(format!("{n} dimensions, allowed are {TENSOR_DIMS_MAX}"));
        }
        if (!self.index.is_empty() && self.index.len() != n) || (!self.strides.is_empty() && self.strides.len() != n) {
            return Err(format!("{} indices and {} strides for {n} dimensions", self.index.len(), self.strides.len()));
        }
        let Some(element) = tensor.dtype.bytes() else {
            // No byte boundary between elements is known: such a tensor is bound whole.
            return match self.covers_all(&tensor.shape) && self.strides.is_empty() {
                true => Ok((vec![Dim { count: tensor.bytes(), tensor_stride: 1, region_stride: 1 }], 0)),
                false => Err(format!("a tensor of dtype {} can only be bound whole and contiguous", tensor.dtype)),
            };
        };
        let overflow = || "its extent does not fit 64 bits".to_string();
        let mut dims = vec![Dim { count: element, tensor_stride: 1, region_stride: 1 }];
        let (mut tensor_stride, mut packed, mut begin) = (element, element, 0u64);
        for d in (0..n).rev() {
            let size = tensor.shape[d];
            let (from, to) = self.index.get(d).copied().unwrap_or((0, size));
            if from > to || to > size {
                return Err(format!("index {from}..{to} of dimension {d}, which has {size}"));
            }
            let region_stride = self.strides.get(d).copied().unwrap_or(packed);
            dims.push(Dim { count: to - from, tensor_stride, region_stride });
            begin = from.checked_mul(tensor_stride).and_then(|b| b.checked_add(begin)).ok_or_else(overflow)?;
            tensor_stride = tensor_stride.checked_mul(size).ok_or_else(overflow)?;
            packed = packed.checked_mul(to - from).ok_or_else(overflow)?;
        }
        dims.reverse();
        Ok((dims, begin))
    }

    fn covers_all(&self, shape: &[u64]) -> bool {
        self.index.is_empty() || self.index.iter().zip(shape).all(|(&(from, to), &size)| from == 0 && to == size)
    }

    /// Merges inner dimensions that are dense on both sides into one run.
    fn collapse(&self, tensor: &TensorEntry, (mut dims, begin): (Vec<Dim>, u64)) -> Option<CheckedBinding> {
        let mut run_bytes = 1u64;
        while let Some(dim) = dims.last() {
            if dim.count != 1 && (dim.tensor_stride != run_bytes || dim.region_stride != run_bytes) {
                break;
            }
            run_bytes = run_bytes.checked_mul(dim.count)?;
            dims.pop();
        }
        let runs = dims.iter().try_fold(1u64, |n, d| n.checked_mul(d.count))?;
        let runs = if run_bytes == 0 || tensor.bytes() == 0 { 0 } else { runs };
        let reach = |stride: fn(&Dim) -> u64| {
            dims.iter()
                .try_fold(run_bytes, |end, d| (d.count.saturating_sub(1)).checked_mul(stride(d))?.checked_add(end))
        };
        reach(|d| d.tensor_stride)?.checked_add(begin)?;
        let region_end = match runs {
            0 => self.offset,
            _ => reach(|d| d.region_stride)?.checked_add(self.offset)?,
        };
        Some(CheckedBinding {
            region: self.region,
            outer: dims,
            runs,
            run_bytes,
            tensor_begin: begin,
            region_begin: self.offset,
            region_end,
        })
    }
}

fn check_kind(tensor: &TensorEntry, dtype: &Dtype, shape: &[u64]) -> Result<(), BindingError> {
    if tensor.dtype == *dtype && tensor.shape == shape {
        return Ok(());
    }
    let reason = format!("bound as {dtype} {shape:?}, the release has {} {:?}", tensor.dtype, tensor.shape);
    Err(BindingError { tensor: tensor.name.clone(), reason })
}

fn check_end(tensor: &str, region: u32, end: u64, region_bytes: u64) -> Result<(), BindingError> {
    if end <= region_bytes {
        return Ok(());
    }
    let reason = format!("reaches byte {end} of region {region}, which has {region_bytes}");
    Err(BindingError { tensor: tensor.into(), reason })
}

impl CheckedBinding {
    /// All of `tensor`, packed, at an offset of a region of `region_bytes`, where the engine knows it as
    /// what `bound` says.
    pub fn whole(
        tensor: &TensorEntry,
        bound: &TensorEntry,
        region: u32,
        offset: u64,
        region_bytes: u64,
    ) -> Result<Self, BindingError> {
        check_kind(tensor, &bound.dtype, &bound.shape)?;
        let bytes = tensor.bytes();
        let end = offset.saturating_add(bytes);
        check_end(&tensor.name, region, end, region_bytes)?;
        Ok(CheckedBinding {
            region,
            outer: Vec::new(),
            runs: u64::from(bytes > 0),
            run_bytes: bytes,
            tensor_begin: 0,
            region_begin: offset,
            region_end: end,
        })
    }

    /// The pieces of `range` (bytes of the tensor) that are bound, in ascending order.
    pub fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Run> + '_ {
        let first = self.first_reaching(range.start);
        (first..self.runs).map_while(move |i| {
            let (tensor, region) = self.run_at(i);
            let from = tensor.max(range.start);
            let to = (tensor + self.run_bytes).min(range.end);
            (from < to).then(|| Run { tensor_offset: from, region_offset: region + (from - tensor), bytes: to - from })
        })
    }

    /// How many bytes of `range` (bytes of the tensor) are bound.
    pub fn bytes_in(&self, range: Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let (first, behind) = (self.first_reaching(range.start), self.first_reaching(range.end));
        let cut_off = |run: u64, at: u64| match run < self.runs {
            true => at.saturating_sub(self.run_at(run).0),
            false => 0,
        };
        // All of `first` up to `behind`, less what lies before the range, and what of `behind` lies in it.
        (behind.saturating_sub(first) * self.run_bytes + cut_off(behind, range.end))
            .saturating_sub(cut_off(first, range.start))
    }

    /// Bytes of the slice.
    pub fn bytes(&self) -> u64 {
        self.runs * self.run_bytes
    }

    /// The bytes of the region it may touch.
    pub fn region_range(&self) -> Range<u64> {
        self.region_begin..self.region_end
    }

    /// Whether two runs may share a byte of the region: each dimension, from the densest on, must
    /// step over all that lies within it.
    fn overlaps_itself(&self) -> bool {
        let mut dims: Vec<&Dim> = self.outer.iter().filter(|d| d.count > 1).collect();
        dims.sort_by_key(|d| d.region_stride);
        let mut reach = self.run_bytes;
        self.runs > 1
            && dims.into_iter().any(|d| {
                let overlaps = d.region_stride < reach;
                reach = (d.count - 1).saturating_mul(d.region_stride).saturating_add(reach);
                overlaps
            })
    }

    /// The first run that ends after `offset`. Runs ascend in the tensor, so bisection finds it.
    fn first_reaching(&self, offset: u64) -> u64 {
        let (mut low, mut high) = (0, self.runs);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.run_at(middle).0 + self.run_bytes <= offset {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    }

    /// Offsets of the `i`-th run in tensor and region. `check` proved that they fit.
    fn run_at(&self, i: u64) -> (u64, u64) {
        let mut rest = i;
        let (mut tensor, mut region) = (self.tensor_begin, self.region_begin);
        for dim in self.outer.iter().rev() {
            let at = rest % dim.count;
            rest /= dim.count;
            tensor += at * dim.tensor_stride;
            region += at * dim.region_stride;
        }
        (tensor, region)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::ChunkHash;
    use crate::manifest::{Chunk, Content};
    use proptest::prelude::*;

    fn tensor(dtype: &str, shape: &[u64]) -> TensorEntry {
        let bytes = Dtype::new(dtype).tensor_bytes(shape).unwrap().unwrap();
        let chunks = (bytes > 0).then(|| Chunk { hash: ChunkHash::of(b""), len: u32::try_from(bytes).unwrap() });
        TensorEntry {
            name: "t".into(),
            dtype: Dtype::new(dtype),
            shape: shape.into(),
            content: Content::Chunks(chunks.into_iter().collect()),
        }
    }

    fn bind(t: &TensorEntry) -> Binding {
        Binding {
            tensor: t.name.clone(),
            dtype: t.dtype.clone(),
            shape: t.shape.clone(),
            index: vec![],
            region: 0,
            offset: 0,
            strides: vec![],
        }
    }

    #[test]
    fn a_whole_tensor_is_one_run() {
        let t = tensor("F32", &[3, 4]);
        let b = bind(&t).check(&t, 48).unwrap();
        let runs: Vec<_> = b.runs(10..40).collect();
        assert_eq!(runs, [Run { tensor_offset: 10, region_offset: 10, bytes: 30 }]);
        assert!(bind(&t).check(&t, 47).unwrap_err().reason.contains("reaches byte 48"));
    }

    #[test]
    fn a_whole_tensor_is_bound_as_by_a_binding_that_says_so() {
        for t in [tensor("F32", &[3, 4]), tensor("F32", &[0, 4]), tensor("F4", &[4, 4]), tensor("U8", &[])] {
            let by_binding = Binding { offset: 8, ..bind(&t) }.check(&t, 56).unwrap();
            assert_eq!(CheckedBinding::whole(&t, &t, 0, 8, 56).unwrap(), by_binding);
        }
        let t = tensor("F32", &[3, 4]);
        let refused = |bound: &TensorEntry, at| CheckedBinding::whole(&t, bound, 0, at, 56).unwrap_err().reason;
        assert!(refused(&t, 9).contains("reaches byte 57"));
        assert!(refused(&t, u64::MAX).contains("reaches byte"));
        assert!(refused(&tensor("F32", &[4, 3]), 0).contains("the release has"));
    }

    #[test]
    fn another_shape_or_dtype_is_refused() {
        let t = tensor("F32", &[3, 4]);
        assert!(bind(&tensor("F32", &[4, 3])).check(&t, 48).is_err());
        assert!(bind(&tensor("I32", &[3, 4])).check(&t, 48).is_err());
    }

    #[test]
    fn packed_elements_are_bound_whole_or_not_at_all() {
        let t = tensor("F4", &[4, 4]);
        assert_eq!(bind(&t).check(&t, 8).unwrap().bytes(), 8);
        let sliced = Binding { index: vec![(0, 2), (0, 4)], ..bind(&t) };
        assert!(sliced.check(&t, 8).unwrap_err().reason.contains("whole"));
    }

    #[test]
    fn hostile_numbers_are_refused() {
        let t = tensor("F32", &[3, 4]);
        for strides in [vec![u64::MAX, 4], vec![u64::MAX / 2, u64::MAX / 2]] {
            assert!(Binding { strides, ..bind(&t) }.check(&t, 48).is_err());
        }
        for strides in [vec![0, 4], vec![12, 4], vec![16, 0], vec![2, 4]] {
            let error = Binding { strides, ..bind(&t) }.check(&t, 1 << 20).unwrap_err();
            assert!(error.reason.contains("one place"), "{error}");
        }
        assert!(Binding { offset: u64::MAX, ..bind(&t) }.check(&t, 48).is_err());
        assert!(Binding { index: vec![(2, 1), (0, 4)], ..bind(&t) }.check(&t, 48).is_err());
        assert!(Binding { index: vec![(0, 4), (0, 4)], ..bind(&t) }.check(&t, 48).is_err());
    }

    prop_compose! {
        fn slices()(dims in prop::collection::vec((1u64..6, 0u64..6, 0u64..6, 0u64..3), 0..4)) -> Vec<(u64, u64, u64, u64)> {
            dims.into_iter().map(|(size, a, b, pad)| (size, a.min(b).min(size), a.max(b).min(size), pad)).collect()
        }
    }

    proptest! {
        /// Against the definition: element by element.
        #[test]
        fn runs_place_every_element(dims in slices(), offset in 0u64..9, begin in 0u64..400, len in 0u64..400) {
            let shape: Vec<u64> = dims.iter().map(|d| d.0).collect();
            let t = tensor("I16", &shape);
            let mut strides = vec![0; dims.len()];
            let mut stride = 2;
            for (d, &(_, from, to, pad)) in dims.iter().enumerate().rev() {
                strides[d] = stride;
                stride *= (to - from).max(1) + pad;
            }
            let binding = Binding {
                index: dims.iter().map(|d| (d.1, d.2)).collect(), strides: strides.clone(), offset, ..bind(&t)
            };
            let checked = binding.check(&t, 1 << 20).unwrap();
            let range = begin..(begin + len).min(t.bytes());

            let mut expected = Vec::new();
            let elements: u64 = shape.iter().product();
            for e in 0..elements {
                let (mut rest, mut at, mut inside) = (e, offset, true);
                for d in (0..dims.len()).rev() {
                    let i = rest % shape[d];
                    rest /= shape[d];
                    inside &= dims[d].1 <= i && i < dims[d].2;
                    at += i.wrapping_sub(dims[d].1).wrapping_mul(strides[d]) * u64::from(inside);
                }
                for byte in 0..2 {
                    if inside && range.contains(&(e * 2 + byte)) {
                        expected.push((e * 2 + byte, at + byte));
                    }
                }
            }
            let found: Vec<(u64, u64)> = checked
                .runs(range.clone())
                .flat_map(|r| (0..r.bytes).map(move |b| (r.tensor_offset + b, r.region_offset + b)))
                .collect();
            prop_assert_eq!(checked.bytes_in(range), expected.len() as u64);
            prop_assert_eq!(found, expected);
        }
    }
}
