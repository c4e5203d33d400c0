//! A manifest in the making: what to hash, in what pieces, before any byte is read.
//!
//! The publisher fills a blueprint from headers and lengths, hashes the ranges it asks for in
//! whatever order and on however many cores, and gets the manifest back.

use crate::cut::{self, ChunkTarget};
use crate::hash::ChunkHash;
use crate::manifest::{Chunk, Content, FileEntry, Manifest, ManifestError, Packed, Part, TensorEntry};
use crate::safetensors::{Header, TensorSpan};
use std::borrow::Cow;
use std::sync::Arc;
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
    cuts: Vec<Cut>,
    /// All tensors by name, once that was settled.
    order: Option<Vec<Place>>,
}

#[derive(Clone, Debug)]
struct PlannedFile {
    path: String,
    /// Of its tensors' names.
    prefix: String,
    /// Not copied: a checkpoint may have a million tensors.
    header: Option<Arc<Header>>,
    parts: Vec<PlannedPart>,
}

/// A tensor: its file, and its number in that file's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    file: u32,
    tensor: u32,
}

/// Tensors are told by their numbers in the file's header.
#[derive(Clone, Debug)]
enum PlannedPart {
    /// Each of so many cuts.
    Bytes(usize),
    Tensor(u32, usize),
    /// One cut.
    Pack(Vec<u32>),
}

impl Blueprint {
    /// An empty one, for a checkpoint whose files have `total` bytes together.
    pub fn new(total: u64) -> Self {
        Blueprint { target: ChunkTarget::of(total), files: Vec::new(), cuts: Vec::new(), order: None }
    }

    /// Adds a file of `bytes` bytes without structure. Returns its index.
    pub fn add_file(&mut self, path: &str, bytes: u64) -> usize {
        let file = self.begin(path, "", None);
        self.add_bytes(file, bytes);
        file
    }

    /// Adds a safetensors file. With `prefix`, its tensors are named `prefix` + name: that is how
    /// a file that is not one of the model's own shards keeps out of the model's names. Returns its index.
    pub fn add_safetensors(&mut self, path: &str, header: &Arc<Header>, prefix: &str) -> usize {
        let file = self.begin(path, prefix, Some(header.clone()));
        self.add_bytes(file, header.data_begin);
        let mut pack = Gathered::default();
        for (tensor, span) in (0u32..).zip(&header.tensors) {
            let bytes = span.end - span.begin;
            if bytes == 0 {
                // Where it stands makes no difference: it does not end a pack.
                self.add_tensor(file, tensor, span);
                continue;
            }
            let short = self.target.is_short(bytes);
            if !short || pack.bytes + bytes > self.target.pack_bytes().into() {
                self.add_pack(file, header, std::mem::take(&mut pack));
            }
            match short {
                true => pack.push(tensor, span.begin, bytes),
                false => self.add_tensor(file, tensor, span),
            }
        }
        self.add_pack(file, header, pack);
        file
    }

    /// Whether every tensor has a name of its own: better known before anything is hashed.
    pub fn check(&mut self) -> Result<(), BlueprintError> {
        if self.order.is_none() {
            self.order = Some(self.by_name()?);
        }
        Ok(())
    }

    /// Every range to hash, file by file, in the order of their bytes.
    pub fn cuts(&self) -> &[Cut] {
        &self.cuts
    }

    /// The manifest, given the hash of every cut, in the order of [`Blueprint::cuts`].
    pub fn finish(mut self, hashes: &[ChunkHash]) -> Result<Manifest, BlueprintError> {
        if hashes.len() != self.cuts.len() {
            return Err(BlueprintError::HashCount { expected: self.cuts.len(), found: hashes.len() });
        }
        self.check()?;
        let order = self.order.take().unwrap_or_default();
        let chunks = self.cuts.iter().zip(hashes).map(|(cut, hash)| Chunk { hash: *hash, len: cut.len });
        let mut draft = Draft::of(&self.files, chunks);
        draft.renumber_packs(&order);
        let ranks = ranks(&self.files, &order);
        let entry = |at: &Place| self.files[at.file as usize].entry(at.tensor, draft.take_content(at));
        let tensors = order.iter().map(entry).collect();
        let parts = draft.parts.into_iter().zip(ranks);
        let settle = |(file, (parts, ranks)): (PlannedFile, (Vec<DraftPart>, Vec<u32>))| FileEntry {
            path: file.path,
            parts: parts.into_iter().map(|part| part.settle(&ranks, &draft.renumbered)).collect(),
        };
        let mut files: Vec<FileEntry> = self.files.into_iter().zip(parts).map(settle).collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Manifest::new(files, tensors, draft.packs)?)
    }

    /// All tensors in the order of their names, which must differ.
    fn by_name(&self) -> Result<Vec<Place>, BlueprintError> {
        let mut names: Vec<(Cow<'_, str>, Place)> = Vec::new();
        for (file, planned) in (0u32..).zip(&self.files) {
            let tensors = planned.header.iter().flat_map(|header| &header.tensors);
            names.extend((0u32..).zip(tensors).map(|(tensor, span)| (planned.name(span), Place { file, tensor })));
        }
        // Stable, because that sort makes use of what is in order already, as most files are.
        names.sort_by(|(a, _), (b, _)| a.cmp(b));
        match names.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some([(name, a), (_, b)]) => {
                let path = |at: &Place| self.files[at.file as usize].path.clone();
                Err(BlueprintError::TensorTwice { name: name.to_string(), a: path(a), b: path(b) })
            }
            _ => Ok(names.into_iter().map(|(_, place)| place).collect()),
        }
    }

    fn begin(&mut self, path: &str, prefix: &str, header: Option<Arc<Header>>) -> usize {
        let (path, prefix) = (path.to_string(), prefix.to_string());
        self.files.push(PlannedFile { path, prefix, header, parts: Vec::new() });
        self.order = None;
        self.files.len() - 1
    }

    /// The first `bytes` of a file, which belong to no tensor.
    fn add_bytes(&mut self, file: usize, bytes: u64) {
        match self.add_cuts(file, 0, cut::plain_cuts(bytes, self.target)) {
            0 => {}
            cuts => self.files[file].parts.push(PlannedPart::Bytes(cuts)),
        }
    }

    fn add_tensor(&mut self, file: usize, tensor: u32, span: &TensorSpan) {
        let cuts = cut::tensor_cuts(&span.shape, span.end - span.begin, self.target);
        let cuts = self.add_cuts(file, span.begin, cuts);
        self.files[file].parts.push(PlannedPart::Tensor(tensor, cuts));
    }

    /// What was gathered is a pack, or a tensor like any other if it is alone.
    fn add_pack(&mut self, file: usize, header: &Header, pack: Gathered) {
        match pack.tensors[..] {
            [] => {}
            [tensor] => self.add_tensor(file, tensor, &header.tensors[tensor as usize]),
            [..] => {
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

impl PlannedFile {
    fn name<'a>(&self, span: &'a TensorSpan) -> Cow<'a, str> {
        match self.prefix.is_empty() {
            true => Cow::Borrowed(&span.name),
            false => Cow::Owned(format!("{}{}", self.prefix, span.name)),
        }
    }

    fn spans(&self) -> &[TensorSpan] {
        self.header.as_ref().map_or(&[], |header| &header.tensors)
    }

    fn entry(&self, tensor: u32, content: Content) -> TensorEntry {
        let span = &self.spans()[tensor as usize];
        TensorEntry {
            name: self.name(span).into_owned(),
            dtype: span.dtype.clone(),
            shape: span.shape.clone(),
            content,
        }
    }
}

/// Short tensors that stand one after the other.
#[derive(Default)]
struct Gathered {
    tensors: Vec<u32>,
    begin: u64,
    bytes: u64,
}

impl Gathered {
    fn push(&mut self, tensor: u32, begin: u64, bytes: u64) {
        if self.tensors.is_empty() {
            self.begin = begin;
        }
        self.bytes += bytes;
        self.tensors.push(tensor);
    }
}

/// What the tensors and parts of all files are made of, file by file.
struct Draft {
    /// Of each tensor of each file.
    contents: Vec<Vec<Content>>,
    parts: Vec<Vec<DraftPart>>,
    /// First in the order of the files, then in that of a manifest.
    packs: Vec<Chunk>,
    /// For each pack as it was numbered at first, its number in the manifest.
    renumbered: Vec<u32>,
}

/// A part that names a tensor by its number in the file and a pack by its first number.
enum DraftPart {
    Bytes(Vec<Chunk>),
    Tensor(u32),
    Pack(usize),
}

impl Draft {
    fn of(files: &[PlannedFile], mut chunks: impl Iterator<Item = Chunk>) -> Self {
        let mut draft = Draft { contents: Vec::new(), parts: Vec::new(), packs: Vec::new(), renumbered: Vec::new() };
        let mut own = |count: usize| -> Vec<Chunk> { chunks.by_ref().take(count).collect() };
        for file in files {
            let mut contents = vec![Content::Chunks(Vec::new()); file.spans().len()];
            let add = |part: &PlannedPart| match part {
                PlannedPart::Bytes(cuts) => DraftPart::Bytes(own(*cuts)),
                PlannedPart::Tensor(tensor, cuts) => {
                    contents[*tensor as usize] = Content::Chunks(own(*cuts));
                    DraftPart::Tensor(*tensor)
                }
                PlannedPart::Pack(tensors) => {
                    let pack = draft.packs.len();
                    draft.packs.extend(own(1));
                    fill_pack(&mut contents, number(pack), tensors, file.spans());
                    DraftPart::Pack(pack)
                }
            };
            let parts = file.parts.iter().map(add).collect();
            draft.parts.push(parts);
            draft.contents.push(contents);
        }
        draft
    }

    /// Packs stand in the order of their first tensors.
    fn renumber_packs(&mut self, order: &[Place]) {
        self.renumbered = vec![0; self.packs.len()];
        let mut packs = Vec::with_capacity(self.packs.len());
        for at in order {
            if let Content::Packed(Packed { pack, begin: 0, .. }) = self.contents[at.file as usize][at.tensor as usize]
            {
                self.renumbered[pack as usize] = number(packs.len());
                packs.push(self.packs[pack as usize]);
            }
        }
        self.packs = packs;
    }

    fn take_content(&mut self, at: &Place) -> Content {
        let content = &mut self.contents[at.file as usize][at.tensor as usize];
        match std::mem::replace(content, Content::Chunks(Vec::new())) {
            Content::Packed(packed) => {
                Content::Packed(Packed { pack: self.renumbered[packed.pack as usize], ..packed })
            }
            Content::Chunks(chunks) => Content::Chunks(chunks),
        }
    }
}

impl DraftPart {
    /// `ranks` are the numbers of the file's tensors in the manifest.
    fn settle(self, ranks: &[u32], renumbered: &[u32]) -> Part {
        match self {
            DraftPart::Bytes(chunks) => Part::Bytes(chunks),
            DraftPart::Tensor(tensor) => Part::Tensor(ranks[tensor as usize]),
            DraftPart::Pack(pack) => Part::Pack(renumbered[pack]),
        }
    }
}

fn fill_pack(contents: &mut [Content], pack: u32, tensors: &[u32], spans: &[TensorSpan]) {
    let mut begin = 0;
    for tensor in tensors {
        let span = &spans[*tensor as usize];
        let len = u32::try_from(span.end - span.begin).expect("a short tensor is no longer than a pack");
        contents[*tensor as usize] = Content::Packed(Packed { pack, begin, len });
        begin += len;
    }
}

/// For each tensor of each file, its number in `order`.
fn ranks(files: &[PlannedFile], order: &[Place]) -> Vec<Vec<u32>> {
    let mut ranks: Vec<Vec<u32>> = files.iter().map(|file| vec![0; file.spans().len()]).collect();
    for (rank, at) in order.iter().enumerate() {
        ranks[at.file as usize][at.tensor as usize] = number(rank);
    }
    ranks
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

    fn safetensors_file(tensors: &[(&str, u64)]) -> (Arc<Header>, Vec<u8>) {
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
        (Arc::new(safetensors::parse(&file[..header_len], file.len() as u64).unwrap()), file)
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
        one.add_safetensors("m.safetensors", &header, "");
        one.add_file("config.json", 5);
        let hashes = hash(&[bytes.clone(), note.clone()], &one);
        let one = one.finish(&hashes).unwrap();

        let mut two = Blueprint::new(5_000_015);
        two.add_file("config.json", 5);
        two.add_safetensors("m.safetensors", &header, "");
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
        blueprint.add_safetensors("m.safetensors", &header, "");
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
        blueprint.add_safetensors("x.safetensors", &header, "");
        let mut apart = blueprint.clone();
        apart.add_safetensors("sub/x.safetensors", &header, "sub/x.safetensors#");
        assert_eq!(apart.check(), Ok(()));
        blueprint.add_safetensors("y.safetensors", &header, "");
        let error = blueprint.check().unwrap_err();
        assert!(error.to_string().contains("both 'x.safetensors' and 'y.safetensors'"));
    }
}
