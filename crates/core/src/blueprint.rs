//! A manifest in the making: what to hash, in what pieces, before any byte is read.
//!
//! The publisher fills a blueprint from headers and lengths, hashes the ranges it asks for in
//! whatever order and on however many cores, and gets the manifest back.

use crate::cut::{self, ChunkTarget};
use crate::dtype::Dtype;
use crate::hash::ChunkHash;
use crate::manifest::{Chunk, Content, FileEntry, Manifest, ManifestError, Packed, Part, TensorEntry};
use crate::safetensors::{Header, TensorSpan};
use std::collections::BTreeMap;
use thiserror::Error;

/// A byte range to hash: one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Index of the file, in the order files were added.
    pub file: usize,
    /// From the start of the file.
    pub offset: u64,
    pub len: u32,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum BlueprintError {
    #[error("tensor '{name}' is in both '{a}' and '{b}': leave one of the files out")]
    TensorTwice { name: String, a: String, b: String },
    #[error("{found} hashes for {expected} cuts")]
    HashCount { expected: usize, found: usize },
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

#[derive(Clone, Debug)]
pub struct Blueprint {
    target: ChunkTarget,
    files: Vec<PlannedFile>,
    /// Tensor name to the file that has it.
    tensors: BTreeMap<String, usize>,
    cuts: Vec<Cut>,
}

#[derive(Clone, Debug)]
struct PlannedFile {
    path: String,
    parts: Vec<PlannedPart>,
}

#[derive(Clone, Debug)]
enum PlannedPart {
    /// Each of so many cuts.
    Bytes(usize),
    Tensor(PlannedTensor, usize),
    /// One cut.
    Pack(Vec<PlannedTensor>),
}

#[derive(Clone, Debug)]
struct PlannedTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    bytes: u64,
}

impl Blueprint {
    /// An empty one, for a checkpoint whose files have `total` bytes together.
    pub fn new(total: u64) -> Self {
        Blueprint { target: ChunkTarget::of(total), files: Vec::new(), tensors: BTreeMap::new(), cuts: Vec::new() }
    }

    /// Adds a file of `bytes` bytes without structure. Returns its index.
    pub fn add_file(&mut self, path: &str, bytes: u64) -> usize {
        let file = self.begin(path);
        self.add_bytes(file, bytes);
        file
    }

    /// Adds a safetensors file. With `prefix`, its tensors are named `prefix` + name: that is how
    /// a file that is not one of the model's own shards keeps out of the model's names.
    pub fn add_safetensors(&mut self, path: &str, header: &Header, prefix: &str) -> Result<usize, BlueprintError> {
        let file = self.begin(path);
        self.add_bytes(file, header.data_begin);
        let mut pack = Gathered::default();
        for span in &header.tensors {
            let tensor = self.admit(file, span, prefix)?;
            if tensor.bytes == 0 {
                // Where it stands makes no difference: it does not end a pack.
                self.add_tensor(file, span.begin, tensor);
                continue;
            }
            let short = self.target.is_short(tensor.bytes);
            if !short || pack.bytes + tensor.bytes > self.target.pack_bytes().into() {
                self.add_pack(file, std::mem::take(&mut pack));
            }
            match short {
                true => pack.push(span.begin, tensor),
                false => self.add_tensor(file, span.begin, tensor),
            }
        }
        self.add_pack(file, pack);
        Ok(file)
    }

    /// Every range to hash, file by file, in the order of their bytes.
    pub fn cuts(&self) -> &[Cut] {
        &self.cuts
    }

    /// The manifest, given the hash of every cut, in the order of [`Blueprint::cuts`].
    pub fn finish(self, hashes: &[ChunkHash]) -> Result<Manifest, BlueprintError> {
        if hashes.len() != self.cuts.len() {
            return Err(BlueprintError::HashCount { expected: self.cuts.len(), found: hashes.len() });
        }
        let chunks = self.cuts.iter().zip(hashes).map(|(cut, hash)| Chunk { hash: *hash, len: cut.len });
        let mut draft = Draft::default();
        let files = draft.add_files(self.files, chunks);
        draft.sort();
        let mut files: Vec<FileEntry> = files.into_iter().map(|(path, parts)| draft.settle(path, parts)).collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Manifest::new(files, draft.tensors, draft.packs)?)
    }

    fn begin(&mut self, path: &str) -> usize {
        self.files.push(PlannedFile { path: path.to_string(), parts: Vec::new() });
        self.files.len() - 1
    }

    /// A tensor whose name no other has.
    fn admit(&mut self, file: usize, span: &TensorSpan, prefix: &str) -> Result<PlannedTensor, BlueprintError> {
        let name = format!("{prefix}{}", span.name);
        if let Some(other) = self.tensors.insert(name.clone(), file) {
            let (a, b) = (self.files[other].path.clone(), self.files[file].path.clone());
            return Err(BlueprintError::TensorTwice { name, a, b });
        }
        let (dtype, shape) = (span.dtype.clone(), span.shape.clone());
        Ok(PlannedTensor { name, dtype, shape, bytes: span.end - span.begin })
    }

    /// The first `bytes` of a file, which belong to no tensor.
    fn add_bytes(&mut self, file: usize, bytes: u64) {
        match self.add_cuts(file, 0, cut::plain_cuts(bytes, self.target)) {
            0 => {}
            cuts => self.files[file].parts.push(PlannedPart::Bytes(cuts)),
        }
    }

    fn add_tensor(&mut self, file: usize, at: u64, tensor: PlannedTensor) {
        let cuts = cut::tensor_cuts(&tensor.shape, tensor.bytes, self.target);
        let cuts = self.add_cuts(file, at, cuts);
        self.files[file].parts.push(PlannedPart::Tensor(tensor, cuts));
    }

    /// What was gathered is a pack, or a tensor like any other if it is alone.
    fn add_pack(&mut self, file: usize, mut pack: Gathered) {
        match pack.tensors.len() {
            0 => {}
            1 => pack.tensors.drain(..).for_each(|tensor| self.add_tensor(file, pack.begin, tensor)),
            _ => {
                let len = u32::try_from(pack.bytes).expect("at most `ChunkTarget::pack_bytes`, which is a u32");
                self.add_cuts(file, pack.begin, vec![len]);
                self.files[file].parts.push(PlannedPart::Pack(pack.tensors));
            }
        }
    }

    /// Returns how many there are.
    fn add_cuts(&mut self, file: usize, at: u64, cuts: Vec<u32>) -> usize {
        let mut offset = at;
        for len in &cuts {
            self.cuts.push(Cut { file, offset, len: *len });
            offset += u64::from(*len);
        }
        cuts.len()
    }
}

/// Short tensors that stand one after the other.
#[derive(Default)]
struct Gathered {
    tensors: Vec<PlannedTensor>,
    begin: u64,
    bytes: u64,
}

impl Gathered {
    fn push(&mut self, begin: u64, tensor: PlannedTensor) {
        if self.tensors.is_empty() {
            self.begin = begin;
        }
        self.bytes += tensor.bytes;
        self.tensors.push(tensor);
    }
}

/// Tensors and packs of all files: first in the order of the files, then in that of a manifest.
#[derive(Default)]
struct Draft {
    tensors: Vec<TensorEntry>,
    packs: Vec<Chunk>,
    /// For each pack as it was numbered at first, its number in the manifest.
    renumbered: Vec<u32>,
}

/// A part that names a tensor by its name and a pack by its first number.
enum DraftPart {
    Bytes(Vec<Chunk>),
    Tensor(String),
    Pack(usize),
}

impl Draft {
    fn add_files(
        &mut self,
        files: Vec<PlannedFile>,
        mut chunks: impl Iterator<Item = Chunk>,
    ) -> Vec<(String, Vec<DraftPart>)> {
        let mut own = |count: usize| -> Vec<Chunk> { chunks.by_ref().take(count).collect() };
        let mut add = |part: PlannedPart| match part {
            PlannedPart::Bytes(cuts) => DraftPart::Bytes(own(cuts)),
            PlannedPart::Tensor(tensor, cuts) => {
                let name = tensor.name.clone();
                self.tensors.push(tensor.entry(Content::Chunks(own(cuts))));
                DraftPart::Tensor(name)
            }
            PlannedPart::Pack(tensors) => {
                self.packs.extend(own(1));
                self.add_packed(tensors);
                DraftPart::Pack(self.packs.len() - 1)
            }
        };
        files.into_iter().map(|file| (file.path, file.parts.into_iter().map(&mut add).collect())).collect()
    }

    /// The tensors of the last pack.
    fn add_packed(&mut self, tensors: Vec<PlannedTensor>) {
        let pack = number(self.packs.len() - 1);
        let mut begin = 0;
        for tensor in tensors {
            let len = u32::try_from(tensor.bytes).expect("a short tensor is no longer than a pack");
            self.tensors.push(tensor.entry(Content::Packed(Packed { pack, begin, len })));
            begin += len;
        }
    }

    fn sort(&mut self) {
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        self.renumbered = vec![0; self.packs.len()];
        let mut packs = Vec::with_capacity(self.packs.len());
        for tensor in &self.tensors {
            if let Content::Packed(Packed { pack, begin: 0, .. }) = tensor.content {
                self.renumbered[pack as usize] = number(packs.len());
                packs.push(self.packs[pack as usize]);
            }
        }
        self.packs = packs;
        for tensor in &mut self.tensors {
            if let Content::Packed(packed) = &mut tensor.content {
                packed.pack = self.renumbered[packed.pack as usize];
            }
        }
    }

    fn settle(&self, path: String, parts: Vec<DraftPart>) -> FileEntry {
        let index = |name: &str| {
            let i = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name));
            number(i.expect("every drafted tensor was put into `tensors`, which is sorted by name"))
        };
        let parts = parts.into_iter().map(|part| match part {
            DraftPart::Bytes(chunks) => Part::Bytes(chunks),
            DraftPart::Tensor(name) => Part::Tensor(index(&name)),
            DraftPart::Pack(pack) => Part::Pack(self.renumbered[pack]),
        });
        FileEntry { path, parts: parts.collect() }
    }
}

impl PlannedTensor {
    fn entry(self, content: Content) -> TensorEntry {
        TensorEntry { name: self.name, dtype: self.dtype, shape: self.shape, content }
    }
}

fn number(n: usize) -> u32 {
    u32::try_from(n).expect("add_safetensors is bounded by header length: under 2^32 tensors")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::safetensors;
    use proptest::prelude::*;

    fn safetensors_file(tensors: &[(&str, u64)]) -> (Header, Vec<u8>) {
        let mut at = 0;
        let mut entries = Vec::new();
        for (name, bytes) in tensors {
            entries
                .push(format!(r#""{name}":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{at},{}]}}"#, at + bytes));
            at += bytes;
        }
        let json = format!("{{{}}}", entries.join(","));
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        let header_len = file.len();
        file.extend((0..at).map(|i| (i % 251) as u8));
        (safetensors::parse(&file[..header_len], file.len() as u64).unwrap(), file)
    }

    fn hash(files: &[Vec<u8>], blueprint: &Blueprint) -> Vec<ChunkHash> {
        let of = |c: &Cut| {
            let begin = usize::try_from(c.offset).unwrap();
            ChunkHash::of(&files[c.file][begin..begin + c.len as usize])
        };
        blueprint.cuts().iter().map(of).collect()
    }

    #[test]
    fn files_can_be_rebuilt_and_order_does_not_matter() {
        let (header, bytes) = safetensors_file(&[("b", 5_000_000), ("none", 0), ("a", 10)]);
        let note = b"hello".to_vec();

        let mut one = Blueprint::new(5_000_015);
        one.add_safetensors("m.safetensors", &header, "").unwrap();
        one.add_file("config.json", 5);
        let hashes = hash(&[bytes.clone(), note.clone()], &one);
        let one = one.finish(&hashes).unwrap();

        let mut two = Blueprint::new(5_000_015);
        two.add_file("config.json", 5);
        two.add_safetensors("m.safetensors", &header, "").unwrap();
        let hashes = hash(&[note.clone(), bytes.clone()], &two);
        let two = two.finish(&hashes).unwrap();
        assert_eq!(one.encode(), two.encode());

        let layout = Layout::of(&one);
        let rebuilt = |f: usize| -> Vec<(u64, ChunkHash)> {
            layout.files[f].iter().map(|e| (e.offset, layout.chunk(e.chunk).hash)).collect()
        };
        assert_eq!(rebuilt(0), [(0, ChunkHash::of(b"hello"))]);
        for (offset, hash) in rebuilt(1) {
            let begin = usize::try_from(offset).unwrap();
            let len = layout.chunk(layout.index_of(&hash).unwrap()).len as usize;
            assert_eq!(ChunkHash::of(&bytes[begin..begin + len]), hash);
        }
        assert_eq!(one.file_bytes(&one.files()[1]), bytes.len() as u64);
        assert_eq!(one.tensor("none").unwrap().content, Content::Chunks(vec![]));
    }

    /// What each tensor of the manifest reads from the files, by way of the layout.
    fn assert_tensors_are_where_the_layout_says(manifest: &Manifest, header: &Header, bytes: &[u8]) {
        let layout = Layout::of(manifest);
        let chunk_bytes = |chunk: u32| {
            let extent = layout.files.iter().flatten().find(|e| e.chunk == chunk).unwrap();
            let begin = usize::try_from(extent.offset).unwrap();
            &bytes[begin..begin + extent.len as usize]
        };
        for span in &header.tensors {
            let index = manifest.tensor_index(&span.name).unwrap();
            let pieces = layout.tensors[index].iter();
            let found: Vec<u8> = pieces
                .flat_map(|e| &chunk_bytes(e.chunk)[e.begin as usize..(e.begin + e.len) as usize])
                .copied()
                .collect();
            let range = usize::try_from(span.begin).unwrap()..usize::try_from(span.end).unwrap();
            assert!(found == bytes[range], "{}", span.name);
        }
    }

    fn manifest_of(tensors: &[(&str, u64)], total: u64) -> Manifest {
        let (header, bytes) = safetensors_file(tensors);
        let mut blueprint = Blueprint::new(total);
        blueprint.add_safetensors("m.safetensors", &header, "").unwrap();
        let hashes = hash(std::slice::from_ref(&bytes), &blueprint);
        let manifest = blueprint.finish(&hashes).unwrap();
        assert_tensors_are_where_the_layout_says(&manifest, &header, &bytes);
        manifest
    }

    #[test]
    fn short_neighbours_share_a_pack() {
        // With chunks of 64 KiB a tensor below 16 KiB is short.
        let manifest = manifest_of(&[("d", 9), ("none", 0), ("a", 16383), ("long", 16384), ("c", 7), ("b", 8)], 0);
        let packs: Vec<u32> = manifest.packs().iter().map(|p| p.len).collect();
        assert_eq!(packs, [7 + 8, 9 + 16383], "in the order of 'c' and 'd', with which they begin");
        assert_eq!(manifest.files()[0].parts[1..], [Part::Tensor(5), Part::Pack(1), Part::Tensor(4), Part::Pack(0)]);
        assert!(matches!(manifest.tensor("long").unwrap().content, Content::Chunks(_)));
    }

    #[test]
    fn a_short_tensor_alone_is_a_chunk() {
        let manifest = manifest_of(&[("a", 9), ("none", 0), ("long", 40_000), ("b", 8)], 0);
        assert_eq!(manifest.packs(), []);
    }

    #[test]
    fn packs_have_a_longest_length() {
        let names: Vec<String> = (0..100).map(|i| format!("t{i:02}")).collect();
        let scales: Vec<(&str, u64)> = names.iter().map(|n| (n.as_str(), 4096)).collect();
        for (total, lens) in [(0, vec![65536; 6]), (1 << 40, vec![262_144])] {
            let packs: Vec<u32> = manifest_of(&scales, total).packs().iter().map(|p| p.len).collect();
            assert_eq!(packs[..lens.len()], lens);
            assert_eq!(packs.iter().sum::<u32>(), 409_600);
        }
    }

    proptest! {
        #[test]
        fn every_tensor_can_be_read_back(lens in prop::collection::vec(0u64..30_000, 0..40), flip in any::<u64>()) {
            // Names in an order that is not the file's.
            let name = |i: usize| format!("{:016x}", (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ flip);
            let names: Vec<String> = (0..lens.len()).map(name).collect();
            let tensors: Vec<(&str, u64)> = names.iter().map(String::as_str).zip(lens.iter().copied()).collect();
            let manifest = manifest_of(&tensors, 0);
            prop_assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest.clone()));
        }
    }

    #[test]
    fn a_tensor_in_two_files_is_refused() {
        let (header, _) = safetensors_file(&[("a", 10)]);
        let mut blueprint = Blueprint::new(5_000_015);
        blueprint.add_safetensors("x.safetensors", &header, "").unwrap();
        assert!(blueprint.clone().add_safetensors("sub/x.safetensors", &header, "sub/x.safetensors#").is_ok());
        let error = blueprint.add_safetensors("y.safetensors", &header, "").unwrap_err();
        assert!(error.to_string().contains("both 'x.safetensors' and 'y.safetensors'"));
    }
}
