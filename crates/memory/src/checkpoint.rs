//! A checkpoint on disk, to publish: which files it has, which tensors are in them, their hashes,
//! and the mapped files to serve from.

use crate::error::MemoryError;
use crate::limits::{CHECKPOINT_DEPTH_MAX, CHECKPOINT_FILES_MAX, INDEX_BYTES_MAX, PUBLISH_PIECE_BYTES};
use crate::mapping::Mapping;
use crate::span::{Span, clamped};
use aquifer_core::blueprint::{Blueprint, BlueprintError, Cut};
use aquifer_core::manifest::check_path;
use aquifer_core::safetensors::{self, Header, SafetensorsError};
use aquifer_core::{ChunkHash, ChunkSet, Hash, Layout, Manifest, ManifestHash};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;

mod walk;

const SAFETENSORS: &str = ".safetensors";
const INDEX: &str = ".safetensors.index.json";
/// The index that wins where a directory has several, as in repositories that carry a model in
/// two layouts.
const MAIN_INDEX: &str = "model.safetensors.index.json";
/// How git-lfs begins the file it leaves where it did not fetch the real one.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

#[derive(Debug, Error)]
pub enum PublishError {
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path}: {reason}")]
    Refused { path: PathBuf, reason: String },
    #[error("{path} is no valid safetensors file: {source}")]
    Safetensors { path: PathBuf, source: SafetensorsError },
    #[error("{index} names the shard '{shard}', which is not there")]
    MissingShard { index: PathBuf, shard: String },
    #[error("{index} says that tensor '{tensor}' is in '{shard}', which does not have it")]
    MissingTensor { index: PathBuf, tensor: String, shard: String },
    #[error("{path}: {reason}; publish again when nothing writes to it")]
    Changed { path: PathBuf, reason: String },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Blueprint(#[from] BlueprintError),
}

/// A checkpoint that was looked at but not yet hashed.
#[derive(Debug)]
pub struct Source {
    files: Vec<SourceFile>,
    blueprint: Blueprint,
}

/// One file of a checkpoint.
#[derive(Debug)]
pub struct SourceFile {
    /// Its path in the manifest.
    pub path: String,
    pub mapping: Arc<Mapping>,
    /// For a safetensors file.
    pub header: Option<Arc<Header>>,
    /// What its tensors' names begin with in the manifest.
    pub prefix: String,
}

impl Source {
    /// Looks at one safetensors file, or at a directory: every file in it travels but those that
    /// match `exclude` (paths with `*` and `?`), version control, caches and temporary files.
    /// Nothing is read but headers.
    pub fn open(path: &Path, exclude: &[String]) -> Result<Self, PublishError> {
        let meta = fs::metadata(path).map_err(in_path("read", path))?;
        match meta.is_dir() {
            true => Self::open_dir(path, exclude),
            false => Self::open_file(path),
        }
    }

    /// Sorted by path.
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// Bytes to hash.
    pub fn bytes(&self) -> u64 {
        total(&self.files)
    }

    /// Hashes everything with `threads` threads, each byte read once, and makes the manifest.
    /// `progress` is called with the bytes of each piece, by several threads at once.
    pub fn hash(self, threads: usize, progress: &(dyn Fn(u64) + Sync)) -> Result<Published, PublishError> {
        let cuts = self.blueprint.cuts().to_vec();
        let hashes = hash_cuts(&self.files, &cuts, threads, progress)?;
        for file in &self.files {
            if let Some(reason) = file.mapping.changed().map_err(in_path("read", file.os_path()))? {
                return Err(PublishError::Changed { path: file.os_path().to_path_buf(), reason });
            }
        }
        Published::new(self, &cuts, &hashes)
    }

    fn open_file(path: &Path) -> Result<Self, PublishError> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let file = SourceFile::open(path, name, Some(String::new()))?;
        Self::of(vec![file])
    }

    fn open_dir(dir: &Path, exclude: &[String]) -> Result<Self, PublishError> {
        let paths = walk::files(dir, exclude)?;
        if paths.is_empty() {
            return Err(refused(dir, "there is no file to publish"));
        }
        let index = Index::find(dir, &paths)?;
        let model = |path: &str| match &index {
            Some(index) => index.shards.contains_key(path),
            None => !path.contains('/'),
        };
        let open = |path: &String| {
            let is_shard = index.as_ref().is_some_and(|i| i.shards.contains_key(path));
            let prefix = match model(path) {
                true => String::new(),
                false => format!("{path}#"),
            };
            let prefix = (is_shard || path.ends_with(SAFETENSORS)).then_some(prefix);
            SourceFile::open(&dir.join(path), path.clone(), prefix)
        };
        // On all cores: a header may hold a million names.
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let files = in_parallel(&paths, threads, open)?;
        if let Some(index) = index {
            index.check(&files)?;
        }
        Self::of(files)
    }

    fn of(files: Vec<SourceFile>) -> Result<Self, PublishError> {
        let mut blueprint = Blueprint::new(total(&files));
        for file in &files {
            match &file.header {
                Some(header) => blueprint.add_safetensors(&file.path, header, &file.prefix),
                None => blueprint.add_file(&file.path, file.mapping.len()),
            };
        }
        blueprint.check()?;
        Ok(Source { files, blueprint })
    }
}

impl SourceFile {
    /// `prefix` is given for safetensors files.
    fn open(os_path: &Path, path: String, prefix: Option<String>) -> Result<Self, PublishError> {
        check_path(&path).map_err(|reason| refused(os_path, reason))?;
        let mapping = Mapping::file(os_path)?;
        let header = prefix.is_some().then(|| read_header(&mapping.span(), os_path)).transpose()?.map(Arc::new);
        Ok(SourceFile { path, mapping, header, prefix: prefix.unwrap_or_default() })
    }

    fn os_path(&self) -> &Path {
        self.mapping.path().unwrap_or(Path::new(&self.path))
    }
}

fn total(files: &[SourceFile]) -> u64 {
    files.iter().map(|f| f.mapping.len()).sum()
}

fn read_header(file: &Span, path: &Path) -> Result<Header, PublishError> {
    let bad = |source| PublishError::Safetensors { path: path.to_path_buf(), source };
    let head = |len: u64| {
        let mut bytes = vec![0; clamped(len.min(file.len()))];
        file.read(0, &mut bytes).map(|()| bytes).map_err(in_path("read", path))
    };
    let first = head(LFS_POINTER.len() as u64)?;
    if first == LFS_POINTER {
        return Err(refused(path, "is a git-lfs pointer and not the file itself: run 'git lfs pull'"));
    }
    let length = first.first_chunk::<8>().ok_or_else(|| bad(SafetensorsError::Short(file.len())))?;
    let bytes = safetensors::header_bytes(length, file.len()).map_err(bad)?;
    safetensors::parse(&head(bytes)?, file.len()).map_err(bad)
}

/// A Hugging Face index: which tensor is in which shard.
#[derive(Debug)]
struct Index {
    path: PathBuf,
    /// Shard to the tensors it should have.
    shards: BTreeMap<String, Vec<String>>,
}

#[derive(serde::Deserialize)]
struct RawIndex {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn find(dir: &Path, paths: &[String]) -> Result<Option<Self>, PublishError> {
        let mut found: Vec<&String> = paths.iter().filter(|p| !p.contains('/') && p.ends_with(INDEX)).collect();
        found.sort_by_key(|name| (*name != MAIN_INDEX, *name));
        let Some((name, others)) = found.split_first() else { return Ok(None) };
        if !others.is_empty() {
            tracing::info!("{name} says which files are the model; {others:?} travel as plain files");
        }
        Self::read(dir.join(name), paths).map(Some)
    }

    fn read(path: PathBuf, paths: &[String]) -> Result<Self, PublishError> {
        let len = fs::metadata(&path).map_err(in_path("read", &path))?.len();
        if len > INDEX_BYTES_MAX {
            return Err(refused(&path, format!("has {len} bytes, an index may have {INDEX_BYTES_MAX}")));
        }
        let bytes = fs::read(&path).map_err(in_path("read", &path))?;
        let raw: RawIndex =
            serde_json::from_slice(&bytes).map_err(|e| refused(&path, format!("is not a safetensors index: {e}")))?;
        let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, shard) in raw.weight_map {
            shards.entry(shard).or_default().push(tensor);
        }
        match shards.keys().find(|shard| paths.binary_search(shard).is_err()) {
            Some(shard) => Err(PublishError::MissingShard { shard: shard.clone(), index: path }),
            None => Ok(Index { path, shards }),
        }
    }

    fn check(&self, files: &[SourceFile]) -> Result<(), PublishError> {
        for file in files {
            let (Some(promised), Some(header)) = (self.shards.get(&file.path), &file.header) else { continue };
            let there: BTreeSet<&str> = header.tensors.iter().map(|t| t.name.as_str()).collect();
            if let Some(tensor) = promised.iter().find(|name| !there.contains(name.as_str())) {
                let (tensor, shard) = (tensor.clone(), file.path.clone());
                return Err(PublishError::MissingTensor { index: self.path.clone(), tensor, shard });
            }
        }
        Ok(())
    }
}

fn hash_cuts(
    files: &[SourceFile],
    cuts: &[Cut],
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<ChunkHash>, PublishError> {
    in_parallel(cuts, threads, |cut| with_publish_piece(|piece| hash_cut(&files[cut.file], cut, piece, progress)))
}

/// Runs `f` with this thread's buffer to publish through.
fn with_publish_piece<T>(f: impl FnOnce(&mut [u8]) -> T) -> T {
    thread_local!(static PIECE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    PIECE.with_borrow_mut(|piece| {
        piece.resize(PUBLISH_PIECE_BYTES, 0);
        f(piece)
    })
}

/// `work` on every item with `threads` threads, one item after the other as each thread becomes free. An
/// error ends it soon.
fn in_parallel<I: Sync, O: Send>(
    items: &[I],
    threads: usize,
    work: impl Fn(&I) -> Result<O, PublishError> + Sync,
) -> Result<Vec<O>, PublishError> {
    let cursor = AtomicUsize::new(0);
    let share = || -> Result<Vec<(usize, O)>, PublishError> {
        let mut done = Vec::new();
        loop {
            let at = cursor.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { return Ok(done) };
            done.push((at, work(item).inspect_err(|_| cursor.store(items.len(), Ordering::Relaxed))?));
        }
    };
    let mut done = Vec::with_capacity(items.len());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.clamp(1, items.len().max(1))).map(|_| scope.spawn(share)).collect();
        for worker in workers {
            done.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok::<(), PublishError>(())
    })?;
    done.sort_by_key(|(at, _)| *at);
    Ok(done.into_iter().map(|(_, output)| output).collect())
}

fn hash_cut(
    file: &SourceFile,
    cut: &Cut,
    buffer: &mut [u8],
    progress: &(dyn Fn(u64) + Sync),
) -> Result<ChunkHash, PublishError> {
    let span = file.mapping.span();
    let mut hasher = blake3::Hasher::new();
    let (mut at, end) = (cut.offset, cut.offset + u64::from(cut.len));
    while at < end {
        let n = buffer.len().min(clamped(end - at));
        span.read(at, &mut buffer[..n]).map_err(in_path("read", file.os_path()))?;
        hasher.update(&buffer[..n]);
        at += n as u64;
        progress(n as u64);
    }
    Ok(ChunkHash(Hash(*hasher.finalize().as_bytes())))
}

/// A hashed checkpoint: its manifest, and its files to serve from. No byte of it is copied.
#[derive(Debug)]
pub struct Published {
    pub manifest: Arc<Manifest>,
    /// The canonical bytes of the manifest.
    pub manifest_bytes: Vec<u8>,
    pub hash: ManifestHash,
    pub layout: Arc<Layout>,
    files: Vec<SourceFile>,
    /// For each chunk of the layout, a file and an offset that hold it.
    places: Vec<(usize, u64)>,
    /// Chunks found to be no longer what was hashed.
    withdrawn: Mutex<ChunkSet>,
}

impl Published {
    fn new(source: Source, cuts: &[Cut], hashes: &[ChunkHash]) -> Result<Self, PublishError> {
        let manifest = source.blueprint.finish(hashes)?;
        let manifest_bytes = manifest.encode();
        let layout = Layout::of(&manifest);
        let first: BTreeMap<&ChunkHash, &Cut> = hashes.iter().zip(cuts).rev().collect();
        let place = |chunk: &aquifer_core::Chunk| first.get(&chunk.hash).map_or((0, 0), |cut| (cut.file, cut.offset));
        let places = layout.chunks.iter().map(place).collect();
        let hash = ManifestHash::of(&manifest_bytes);
        let withdrawn = Mutex::new(ChunkSet::empty(layout.len()));
        let (manifest, layout) = (Arc::new(manifest), Arc::new(layout));
        Ok(Published { withdrawn, manifest, manifest_bytes, hash, layout, files: source.files, places })
    }

    /// The files it was made of, sorted by path.
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// The bytes of chunk `index` of the layout, in the mapped file. `None` if there is no such
    /// chunk, or its file was written to since it was opened: what is there may be anything.
    pub fn get(&self, index: u32) -> Option<Span> {
        let (file, offset) = *self.places.get(index as usize)?;
        if self.withdrawn().contains(index) {
            return None;
        }
        let len = u64::from(self.layout.chunk(index).len);
        let mapping = &self.files.get(file)?.mapping;
        match mapping.changed() {
            Ok(None) => mapping.span().slice(offset..offset + len).ok(),
            Ok(Some(_)) | Err(_) => None,
        }
    }

    /// Gives a chunk out no more: its bytes were found to be others than were hashed.
    pub fn withdraw(&self, index: u32) {
        self.withdrawn().insert(index);
    }

    fn withdrawn(&self) -> MutexGuard<'_, ChunkSet> {
        // A set is whole also if a thread died while it held the lock.
        self.withdrawn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happened to files that are no longer what was hashed, one line each.
    pub fn changed(&self) -> Vec<String> {
        let reason = |file: &SourceFile| match file.mapping.changed() {
            Ok(reason) => reason,
            Err(error) => Some(error.to_string()),
        };
        self.files.iter().filter_map(|f| Some(format!("{}: {}", f.os_path().display(), reason(f)?))).collect()
    }
}

fn in_path(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PublishError {
    let path = path.to_path_buf();
    move |source| PublishError::Io { action, path, source }
}

fn refused(path: &Path, reason: impl Into<String>) -> PublishError {
    PublishError::Refused { path: path.to_path_buf(), reason: reason.into() }
}

#[cfg(test)]
mod tests;
