//! The tensors of a release, told in pages and kept as columns.
//!
//! A mixture of experts has a million tensors of a dozen dtypes and shapes: these are said once, and a
//! tensor is a name and a number.

use crate::limits::{PAGE_BYTES, TENSOR_ALIGN_BYTES};
use crate::protocol::{BindingSpec, ReleaseInfo};
use aquifer_core::{Manifest, TensorEntry};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Answers `manifest` with `from`: some of a release's tensors, which are sorted by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestPage<Name = String> {
    pub release: ReleaseInfo,
    /// Tensors of the release.
    pub count: u32,
    /// Number of the first that is told here.
    pub from: u32,
    pub names: Vec<Name>,
    /// For each name, which of the kinds it is.
    pub kind_of: Vec<u32>,
    pub kinds: Vec<Kind>,
}

/// What many tensors have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Kind {
    /// As in safetensors.
    pub dtype: String,
    pub shape: Vec<u64>,
    pub bytes: u64,
}

impl<'a> ManifestPage<&'a str> {
    /// As many as go into a page, from that number on.
    pub fn of(release: ReleaseInfo, manifest: &'a Manifest, from: u32) -> Self {
        let tensors = manifest.tensors();
        let count = u32::try_from(tensors.len()).unwrap_or(u32::MAX);
        let mut page = ManifestPage { release, count, from, names: Vec::new(), kind_of: Vec::new(), kinds: Vec::new() };
        let mut numbers: BTreeMap<Kind, u32> = BTreeMap::new();
        let mut bytes = 0;
        let mut before: Option<(&TensorEntry, u32)> = None;
        for tensor in tensors.iter().skip(from as usize) {
            let alike = before.filter(|(t, _)| t.dtype == tensor.dtype && t.shape == tensor.shape);
            let number = match alike.filter(|(t, _)| t.bytes() == tensor.bytes()) {
                Some((_, number)) => number,
                None => {
                    let kind = Kind::of(tensor);
                    bytes += kind.dtype.len() + 20 * (2 + kind.shape.len());
                    let next = u32::try_from(numbers.len()).unwrap_or(u32::MAX);
                    *numbers.entry(kind).or_insert(next)
                }
            };
            bytes += tensor.name.len() + 3 + 6;
            if bytes > PAGE_BYTES && !page.names.is_empty() {
                break;
            }
            page.names.push(tensor.name.as_str());
            page.kind_of.push(number);
            before = Some((tensor, number));
        }
        let mut kinds: Vec<(Kind, u32)> = numbers.into_iter().collect();
        kinds.sort_unstable_by_key(|(_, number)| *number);
        page.kinds = kinds.into_iter().map(|(kind, _)| kind).collect();
        page
    }
}

impl Kind {
    fn of(tensor: &TensorEntry) -> Self {
        Kind { dtype: tensor.dtype.name().to_string(), shape: tensor.shape.clone(), bytes: tensor.bytes() }
    }
}

/// All tensors of a release, by their numbers.
#[derive(Clone, Debug)]
pub struct TensorTable {
    pub release: ReleaseInfo,
    names: Vec<String>,
    kind_of: Vec<usize>,
    kinds: Vec<Kind>,
    count: usize,
}

impl TensorTable {
    /// From the first page. The error says what is wrong with it.
    pub(crate) fn begin(page: ManifestPage) -> Result<Self, String> {
        let mut table = TensorTable {
            release: page.release.clone(),
            names: Vec::new(),
            kind_of: Vec::new(),
            kinds: Vec::new(),
            count: page.count as usize,
        };
        table.add(page)?;
        Ok(table)
    }

    /// The number to go on from; None if this is all.
    pub(crate) fn next(&self) -> Option<u32> {
        (self.names.len() < self.count).then(|| u32::try_from(self.names.len()).unwrap_or(u32::MAX))
    }

    /// Adds a page of the same release.
    pub(crate) fn add(&mut self, page: ManifestPage) -> Result<(), String> {
        let ManifestPage { from, names, kind_of, kinds, count, .. } = page;
        let fits = from as usize == self.names.len() && count as usize == self.count;
        if !fits || names.len() != kind_of.len() || kind_of.iter().any(|kind| *kind as usize >= kinds.len()) {
            return Err(format!("{} tensors from {from} of {count} on do not fit {}", names.len(), self.names.len()));
        }
        if names.is_empty() && self.next().is_some() {
            return Err(format!("no tensors from {from} of {count} on"));
        }
        let known = self.kinds.len();
        self.kind_of.extend(kind_of.iter().map(|kind| known + *kind as usize));
        self.kinds.extend(kinds);
        self.names.extend(names);
        Ok(())
    }

    /// Each tensor, by name, and where it begins in a region where they all stand one behind the other, at
    /// multiples of [`TENSOR_ALIGN_BYTES`]. None where that does not fit 64 bits.
    pub fn places(&self) -> impl Iterator<Item = Option<(&str, &Kind, u64)>> {
        let mut end = Some(0u64);
        self.names.iter().zip(&self.kind_of).map(move |(name, kind)| {
            let kind = &self.kinds[*kind];
            let at = end.and_then(|end| end.checked_next_multiple_of(TENSOR_ALIGN_BYTES));
            end = at.and_then(|at| at.checked_add(kind.bytes));
            end.and(at).map(|at| (name.as_str(), kind, at))
        })
    }

    /// How long that region is. Memory of no bytes cannot be mapped, so it has some in any case.
    pub fn region_bytes(&self) -> Option<u64> {
        let ends =
            |end: Option<u64>, place: Option<(&str, &Kind, u64)>| end.and(place).map(|(_, kind, at)| at + kind.bytes);
        self.places().fold(Some(0), ends).map(|end| end.max(TENSOR_ALIGN_BYTES))
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }

    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// What a row of all of them stands for, for an agent that does not have its release.
    pub(crate) fn bindings(&self, region: u32) -> Vec<BindingSpec> {
        let spec = |(tensor, kind, offset): (&str, &Kind, u64)| BindingSpec {
            tensor: tensor.to_string(),
            dtype: kind.dtype.clone(),
            shape: kind.shape.clone(),
            index: Vec::new(),
            region,
            offset,
            strides: Vec::new(),
        };
        self.places().flatten().map(spec).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol;
    use aquifer_core::{Chunk, ChunkHash, Content, Dtype, ManifestHash, PublisherKey};

    fn release() -> ReleaseInfo {
        ReleaseInfo {
            channel: "a/b".parse().unwrap(),
            seq: 1,
            manifest: ManifestHash::of(b"m"),
            rollback: false,
            note: String::new(),
            created_unix_ms: 2,
            publisher: PublisherKey([3; 32]),
        }
    }

    fn manifest(count: u32, name: impl Fn(u32) -> String) -> Manifest {
        let entry = |i: u32| {
            let len: u32 = if i.is_multiple_of(3) { 4 } else { 300 };
            TensorEntry {
                name: name(i),
                dtype: Dtype::new("U8"),
                shape: vec![len.into()],
                content: Content::Chunks(vec![Chunk { hash: ChunkHash::of(&len.to_le_bytes()), len }]),
            }
        };
        Manifest::new(vec![], (0..count).map(entry).collect(), vec![]).unwrap()
    }

    fn received(page: &ManifestPage<&str>) -> ManifestPage {
        let frame = protocol::encode_answer(1, Ok(page));
        let protocol::FromAgent::Reply { result, .. } = protocol::FromAgent::decode(&frame[4..]).unwrap() else {
            panic!("a reply")
        };
        serde_json::from_str(&result.unwrap()).unwrap()
    }

    #[test]
    fn pages_make_a_table() {
        // Each of these characters is six in JSON: the worst that a frame must hold.
        let name = |i: u32| format!("{i:05}{}", "\u{1}".repeat(4000));
        let manifest = manifest(6000, name);
        let page = |from| received(&ManifestPage::of(release(), &manifest, from));
        let mut table = TensorTable::begin(page(0)).unwrap();
        let mut pages = 1;
        while let Some(from) = table.next() {
            table.add(page(from)).unwrap();
            pages += 1;
        }
        assert!(pages > 1);
        let places: Vec<_> = table.places().map(Option::unwrap).collect();
        assert_eq!(places.len(), 6000);
        for (i, (found, kind, at)) in (0u32..).zip(&places) {
            assert_eq!((*found, kind.bytes), (name(i).as_str(), if i % 3 == 0 { 4 } else { 300 }));
            assert_eq!(*at, u64::from(i / 3 * 5 + [0, 1, 3][i as usize % 3]) * 256);
        }
        assert_eq!(table.region_bytes(), Some(10_000 * 256 - 512 + 300));
        let specs = table.bindings(7);
        assert_eq!(specs[1..3].iter().map(|s| (s.region, s.offset)).collect::<Vec<_>>(), [(7, 256), (7, 768)]);
    }

    #[test]
    fn pages_that_do_not_fit_are_refused() {
        let manifest = manifest(4, |i| i.to_string());
        let page = received(&ManifestPage::of(release(), &manifest, 0));
        let mut table = TensorTable::begin(page.clone()).unwrap();
        assert!(table.add(page.clone()).is_err(), "twice");
        let begin = |change: fn(&mut ManifestPage)| {
            let mut page = page.clone();
            change(&mut page);
            TensorTable::begin(page).is_err()
        };
        assert!(!begin(|_| ()));
        assert!(begin(|p| p.from = 1));
        assert!(begin(|p| drop(p.names.pop())));
        assert!(begin(|p| p.kind_of[1] = 2));
        assert!(begin(|p| (p.names, p.kind_of) = (vec![], vec![])));
        let none = received(&ManifestPage::of(release(), &manifest, 9));
        assert_eq!((none.names.len(), none.count), (0, 4));
    }

    #[test]
    fn what_does_not_fit_64_bits_has_no_place() {
        let kind = Kind { dtype: "U8".into(), shape: vec![u64::MAX], bytes: u64::MAX };
        let page = ManifestPage {
            release: release(),
            count: 2,
            from: 0,
            names: vec!["a".to_string(), "b".to_string()],
            kind_of: vec![0, 0],
            kinds: vec![kind],
        };
        let table = TensorTable::begin(page).unwrap();
        assert_eq!(table.region_bytes(), None);
    }
}
