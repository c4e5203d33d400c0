//! The rules of a manifest: what `Manifest::new` refuses.

use super::{Chunk, Content, FileEntry, Manifest, ManifestError, Packed, Part, TensorEntry, chunks_bytes};
use crate::hash::ChunkHash;
use crate::limits::{CHUNK_BYTES_MAX, MANIFEST_CHUNKS_MAX, NAME_BYTES_MAX, TENSOR_DIMS_MAX};
use std::collections::BTreeMap;

impl Manifest {
    pub(super) fn check(&self) -> Result<(), ManifestError> {
        check_order("file", self.files.iter().map(|f| f.path.as_str()))?;
        check_order("tensor", self.tensors.iter().map(|t| t.name.as_str()))?;
        let mut lengths = Lengths::default();
        lengths.admit(&self.packs).map_err(|e| e.at("pack", ""))?;
        for tensor in &self.tensors {
            let refuse = |reason: String| entry_error("tensor", &tensor.name, reason);
            check_name(&tensor.name).map_err(refuse)?;
            if let Content::Chunks(chunks) = &tensor.content {
                lengths.admit(chunks).map_err(|e| e.at("tensor", &tensor.name))?;
            }
            check_tensor(tensor).map_err(refuse)?;
        }
        self.check_packs()?;
        self.check_parts(&mut lengths)?;
        check_directories(&self.files)
    }

    /// The tensors of each pack fill it, without overlap or gap. There are two at least, for a single
    /// one is a chunk of its own; and packs stand in the order of their first tensors.
    fn check_packs(&self) -> Result<(), ManifestError> {
        let packed = |(i, tensor): (usize, &TensorEntry)| match &tensor.content {
            Content::Packed(packed) => Some((*packed, i)),
            Content::Chunks(_) => None,
        };
        let mut members: Vec<(Packed, usize)> = self.tensors.iter().enumerate().filter_map(packed).collect();
        members.sort_unstable_by_key(|(packed, i)| (packed.pack, packed.begin, *i));
        if let Some((Packed { pack, .. }, i)) = members.last().filter(|(p, _)| p.pack as usize >= self.packs.len()) {
            let reason = format!("is in pack {pack} of {}", self.packs.len());
            return Err(entry_error("tensor", &self.tensors[*i].name, reason));
        }
        let mut rest = members.as_slice();
        let mut before = None;
        for (index, pack) in (0u32..).zip(&self.packs) {
            let (own, others) = rest.split_at(rest.iter().take_while(|(packed, _)| packed.pack == index).count());
            rest = others;
            let mut reached = 0;
            for (packed, i) in own {
                if u64::from(packed.begin) != reached || packed.len == 0 {
                    let Packed { begin, len, .. } = packed;
                    let reason = format!("is {len} bytes from {begin} on of pack {index}, where {reached} was next");
                    return Err(entry_error("tensor", &self.tensors[*i].name, reason));
                }
                reached += u64::from(packed.len);
            }
            let refuse = |reason: String| Err(entry_error("pack", &index.to_string(), reason));
            if reached != u64::from(pack.len) {
                return refuse(format!("has {} bytes, its tensors {reached}", pack.len));
            }
            let first = match own {
                [(_, first), _, ..] => Some(*first),
                _ => return refuse("holds a single tensor: that is a chunk of its own".into()),
            };
            if first < before {
                return refuse("its first tensor stands before that of the pack before".into());
            }
            before = first;
        }
        Ok(())
    }

    fn check_parts(&self, lengths: &mut Lengths) -> Result<(), ManifestError> {
        let mut tensors = vec![false; self.tensors.len()];
        let mut packs = vec![false; self.packs.len()];
        for file in &self.files {
            let refuse = |reason: String| entry_error("file", &file.path, reason);
            check_path(&file.path).map_err(refuse)?;
            for part in &file.parts {
                match part {
                    Part::Bytes(chunks) => lengths.admit(chunks).map_err(|e| e.at("file", &file.path))?,
                    Part::Pack(index) => take(&mut packs, "pack", *index).map_err(refuse)?,
                    Part::Tensor(index) => {
                        take(&mut tensors, "tensor", *index).map_err(refuse)?;
                        if let Content::Packed(Packed { pack, .. }) = self.tensors[*index as usize].content {
                            return Err(refuse(format!("names tensor {index}, which is in pack {pack}")));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// What is in one file is in no other, and only once.
fn take(taken: &mut [bool], what: &str, index: u32) -> Result<(), String> {
    let count = taken.len();
    match taken.get_mut(index as usize) {
        None => Err(format!("names {what} {index} of {count}")),
        Some(true) => Err(format!("names {what} {index}, which is in a file already")),
        Some(free) => {
            *free = true;
            Ok(())
        }
    }
}

/// Chunk lengths seen so far: one hash has one length, and all of them together have a bound.
#[derive(Default)]
struct Lengths {
    by_hash: BTreeMap<ChunkHash, u32>,
    total: usize,
    bytes: u64,
}

enum LengthError {
    TooMany,
    Bad(String),
}

impl LengthError {
    fn at(self, what: &'static str, name: &str) -> ManifestError {
        match self {
            LengthError::TooMany => ManifestError::TooManyChunks,
            LengthError::Bad(reason) => entry_error(what, name, reason),
        }
    }
}

impl Lengths {
    fn admit(&mut self, chunks: &[Chunk]) -> Result<(), LengthError> {
        for chunk in chunks {
            if chunk.len == 0 || chunk.len > CHUNK_BYTES_MAX {
                return Err(LengthError::Bad(format!(
                    "chunk {:?} has length {}, allowed are 1 to {CHUNK_BYTES_MAX}",
                    chunk.hash, chunk.len
                )));
            }
            if *self.by_hash.entry(chunk.hash).or_insert(chunk.len) != chunk.len {
                return Err(LengthError::Bad(format!("chunk {:?} is given two lengths", chunk.hash)));
            }
        }
        self.total += chunks.len();
        self.bytes = self.bytes.saturating_add(chunks_bytes(chunks));
        match self.total > MANIFEST_CHUNKS_MAX {
            true => Err(LengthError::TooMany),
            false => Ok(()),
        }
    }
}

fn entry_error(what: &'static str, name: &str, reason: String) -> ManifestError {
    ManifestError::Entry { what, name: name.chars().take(256).collect(), reason }
}

fn check_order<'a>(what: &'static str, names: impl Iterator<Item = &'a str>) -> Result<(), ManifestError> {
    let mut before: Option<&str> = None;
    for name in names {
        if let Some(b) = before.filter(|b| *b >= name) {
            return Err(ManifestError::Order { what, name: name.into(), before: b.into() });
        }
        before = Some(name);
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), String> {
    match name.len() {
        0 => Err("the name is empty".into()),
        n if n > NAME_BYTES_MAX => Err(format!("the name has {n} bytes, allowed are {NAME_BYTES_MAX}")),
        _ => Ok(()),
    }
}

fn check_tensor(tensor: &TensorEntry) -> Result<(), String> {
    if tensor.shape.len() > TENSOR_DIMS_MAX {
        return Err(format!("{} dimensions, allowed are {TENSOR_DIMS_MAX}", tensor.shape.len()));
    }
    check_name(tensor.dtype.name()).map_err(|e| format!("dtype: {e}"))?;
    match tensor.dtype.tensor_bytes(&tensor.shape) {
        Some(Ok(bytes)) if bytes != tensor.bytes() => Err(format!(
            "{} of shape {:?} is {bytes} bytes, its chunks are {}",
            tensor.dtype,
            tensor.shape,
            tensor.bytes()
        )),
        Some(Err(reason)) => Err(reason.into()),
        _ => Ok(()),
    }
}

/// A path that stays inside its directory whatever is done with it.
pub fn check_path(path: &str) -> Result<(), String> {
    check_name(path)?;
    let bad = |c: &str| c.is_empty() || c == "." || c == "..";
    if path.split('/').any(bad) || path.contains(['\\', '\0']) {
        return Err("a path must be relative, without '.', '..', empty parts, backslash or NUL".into());
    }
    Ok(())
}

/// No path may be both a file and a directory.
fn check_directories(files: &[FileEntry]) -> Result<(), ManifestError> {
    let is_file = |path: &str| files.binary_search_by(|f| f.path.as_str().cmp(path)).is_ok();
    for file in files {
        for (end, _) in file.path.match_indices('/') {
            if is_file(&file.path[..end]) {
                let reason = format!("'{}' is a file and cannot hold it", &file.path[..end]);
                return Err(entry_error("file", &file.path, reason));
            }
        }
    }
    Ok(())
}
