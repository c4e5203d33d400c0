//! A manifest as files: what `pull --to DIR` builds.
//!
//! Files grow under `DIR/.aquifer-partial/<manifest>/`, sparse and of their final length, and are
//! renamed into place when all of them are whole. Nothing is recorded about which chunks are
//! there: a restart hashes what it finds (see `scan`), and so it finds the chunks of an older
//! release, or of another pull that was given up, just as well.

use crate::at::Root;
use crate::error::StoreError;
use crate::limits::{STAGING_DEFAULT_BYTES, TREE_OPEN_FILES_MAX};
use crate::mapping::Mapping;
use crate::reservation::{Reservation, Target};
use crate::span::{Span, clamped, with_piece};
use crate::staging::StagingPool;
use aquifer_core::{Chunk, ChunkSet, Layout, Manifest, ManifestHash};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod scan;

/// Where files grow, below the directory of the checkpoint.
pub const PARTIAL_DIR: &str = ".aquifer-partial";

/// Cheap to clone; clones are the same tree.
#[derive(Clone, Debug)]
pub struct FileTree(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: Root,
    partial: Root,
    /// Name of `partial` below [`PARTIAL_DIR`].
    manifest: String,
    files: Vec<TreeFile>,
    chunks: Vec<Chunk>,
    /// Sorted by chunk.
    places: Vec<Place>,
    staging: StagingPool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct TreeFile {
    path: String,
    len: u64,
}

/// One appearance of a chunk in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    chunk: u32,
    file: usize,
    offset: u64,
}

#[derive(Debug)]
struct State {
    /// Chunks that are right at all their places.
    have: ChunkSet,
    /// For each place, whether the right bytes are there.
    right: Vec<bool>,
    /// For each file, whether it stands under its final name.
    settled: Vec<bool>,
    open: BTreeMap<usize, Arc<Mapping>>,
}

impl FileTree {
    /// Opens or creates `dir`, for this process alone. `layout` is that of `manifest`.
    pub fn open(dir: &Path, manifest: &Manifest, layout: &Layout) -> Result<Self, StoreError> {
        Self::open_with(dir, manifest, layout, StagingPool::new(STAGING_DEFAULT_BYTES))
    }

    /// The same, landing in memory of `staging`.
    pub fn open_with(
        dir: &Path,
        manifest: &Manifest,
        layout: &Layout,
        staging: StagingPool,
    ) -> Result<Self, StoreError> {
        if manifest.files().is_empty() && !manifest.tensors().is_empty() {
            let reason = "the release has tensors but no files: there is nothing to write here".into();
            return Err(StoreError::Refused { path: dir.to_path_buf(), reason });
        }
        fs::create_dir_all(dir).map_err(StoreError::io("create", dir, 0))?;
        let root = Root::open(dir)?;
        root.lock()?;
        let name = ManifestHash::of(&manifest.encode()).to_string();
        let relative = format!("{PARTIAL_DIR}/{name}");
        let partial = root.subdir(&relative, true)?.ok_or_else(|| StoreError::Refused {
            path: root.path_of(&relative),
            reason: "vanished while it was made".into(),
        })?;
        let files: Vec<TreeFile> = manifest
            .files()
            .iter()
            .map(|file| TreeFile { path: file.path.clone(), len: manifest.file_bytes(file) })
            .collect();
        let places = places(layout);
        let state = Mutex::new(State {
            have: ChunkSet::empty(layout.len()),
            right: vec![false; places.len()],
            settled: vec![false; files.len()],
            open: BTreeMap::new(),
        });
        let chunks = layout.chunks.clone();
        Ok(FileTree(Arc::new(Inner { root, partial, manifest: name, files, chunks, places, staging, state })))
    }

    /// The chunks that some file needs.
    pub fn wanted(&self) -> ChunkSet {
        ChunkSet::from_indices(self.0.chunk_count(), self.0.places.iter().map(|p| p.chunk))
    }

    /// The chunks that are right wherever they are needed.
    pub fn have(&self) -> ChunkSet {
        self.0.lock().have.clone()
    }

    /// Hashes what is there already, with `threads` threads, and returns the chunks found. Looks in
    /// the files that grow, in those of other pulls into this directory that were given up, and in
    /// the files that stand under their final names. `found` is called for each chunk with its
    /// length.
    pub fn scan(&self, threads: usize, found: &mut dyn FnMut(u32, u64)) -> Result<ChunkSet, StoreError> {
        scan::run(&self.0, threads, found)?;
        Ok(self.have())
    }

    /// Room for chunk `index` of the layout. Committing writes it to every file that needs it.
    pub fn reserve(&self, index: u32) -> Result<Reservation, StoreError> {
        if self.0.places_of(index).is_empty() {
            let reason = format!("no file of the release needs chunk {index}");
            return Err(StoreError::Refused { path: self.0.root.path_of(""), reason });
        }
        let len = u64::from(self.0.chunks[index as usize].len);
        let staged = self.0.staging.try_take(len);
        let span = staged.ok_or_else(|| StoreError::StagingFull { limit: self.0.staging.limit_bytes() })?;
        Ok(Reservation::new(span, Target::Tree(TreeTarget { tree: self.clone(), index })))
    }

    /// The bytes of a chunk that is there, to serve from.
    pub fn get(&self, index: u32) -> Option<Span> {
        if !self.0.lock().have.contains(index) {
            return None;
        }
        let place = *self.0.places.get(self.0.places_of(index).start)?;
        let served = self.0.span_of(place).and_then(|span| self.0.check_unchanged(place, span));
        served.map_err(|error| tracing::warn!("cannot serve chunk {index}: {error}")).ok()
    }

    /// Believes a chunk no more: its bytes were found to be others. It must be landed again.
    pub fn forget(&self, index: u32) {
        if index >= self.0.chunk_count() {
            return;
        }
        let mut state = self.0.lock();
        state.have.remove(index);
        self.0.places_of(index).for_each(|at| state.right[at] = false);
    }

    /// Moves every file to its final name, each at once, and removes what is left of this and
    /// other pulls. All chunks must be there.
    pub fn finish(&self) -> Result<(), StoreError> {
        let mut wanted = self.wanted();
        wanted.subtract(&self.have());
        let missing = wanted.count();
        if missing > 0 {
            return Err(StoreError::Incomplete { missing });
        }
        for (file, TreeFile { path, .. }) in self.0.files.iter().enumerate() {
            if self.0.lock().settled[file] {
                continue;
            }
            self.0.mapping(file)?;
            self.0.root.adopt(&self.0.partial, path, path)?;
            let mut state = self.0.lock();
            state.settled[file] = true;
            state.open.remove(&file); // to be opened again as it is now, so that a later change is noticed
        }
        let leftover = self.0.root.path_of(PARTIAL_DIR);
        match fs::remove_dir_all(&leftover) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", &leftover, 0)(error)),
            _ => Ok(()),
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Places are marked one by one after their bytes are written: a panic elsewhere leaves
        // nothing marked that is not there.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn chunk_count(&self) -> u32 {
        u32::try_from(self.chunks.len()).unwrap_or(u32::MAX)
    }

    /// Indices into `places` of one chunk.
    fn places_of(&self, chunk: u32) -> std::ops::Range<usize> {
        let begin = self.places.partition_point(|p| p.chunk < chunk);
        begin..begin + self.places[begin..].partition_point(|p| p.chunk == chunk)
    }

    fn place_len(&self, place: Place) -> u64 {
        u64::from(self.chunks[place.chunk as usize].len)
    }

    fn span_of(&self, place: Place) -> Result<Span, StoreError> {
        let span = self.mapping(place.file)?.span();
        Ok(span.slice(place.offset..place.offset + self.place_len(place))?)
    }

    /// A file that stands under its final name is the user's: if it was written to since, what is
    /// there may be anything.
    fn check_unchanged(&self, place: Place, span: Span) -> Result<Span, StoreError> {
        if !self.lock().settled[place.file] {
            return Ok(span);
        }
        let path = self.root.path_of(&self.files[place.file].path);
        match span.mapping().0.changed().map_err(StoreError::io("read", &path, 0))? {
            None => Ok(span),
            Some(reason) => Err(StoreError::Refused { path, reason }),
        }
    }

    /// A file, mapped; one that grows is made if it is not there.
    fn mapping(&self, file: usize) -> Result<Arc<Mapping>, StoreError> {
        let mut state = self.lock();
        if let Some(mapping) = state.open.get(&file) {
            return Ok(mapping.clone());
        }
        let TreeFile { path, len } = &self.files[file];
        let (opened, root) = match state.settled[file] {
            true => {
                let found = self.root.open_file(path)?;
                let gone = || StoreError::Refused { path: self.root.path_of(path), reason: "was removed".into() };
                (found.ok_or_else(gone)?, &self.root)
            }
            false => {
                let made = self.partial.create_file(path)?;
                made.set_len(*len).map_err(StoreError::io("extend", &self.partial.path_of(path), *len))?;
                (made, &self.partial)
            }
        };
        let mapping = Mapping::from_file(opened, &root.path_of(path))?;
        if state.open.len() >= TREE_OPEN_FILES_MAX {
            state.open.pop_first();
        }
        state.open.insert(file, mapping.clone());
        Ok(mapping)
    }

    /// Writes a chunk to every place that lacks it. `read` fills a buffer from an offset of the chunk.
    fn write_chunk(&self, chunk: u32, read: &dyn Fn(u64, &mut [u8]) -> io::Result<()>) -> Result<(), StoreError> {
        for at in self.places_of(chunk) {
            if self.lock().right[at] {
                continue;
            }
            let place = self.places[at];
            let mapping = self.mapping(place.file)?;
            let written = write_at(&mapping, place.offset, self.place_len(place), read);
            let path = self.partial.path_of(&self.files[place.file].path);
            written.map_err(|error| StoreError::io("write", &path, self.missing_bytes())(error))?;
            self.lock().right[at] = true;
        }
        self.lock().have.insert(chunk);
        Ok(())
    }

    /// Bytes still to be written.
    fn missing_bytes(&self) -> u64 {
        let state = self.lock();
        self.places.iter().zip(&state.right).filter(|(_, right)| !**right).map(|(p, _)| self.place_len(*p)).sum()
    }
}

/// Where a reservation of a file tree becomes visible.
#[derive(Debug)]
pub(crate) struct TreeTarget {
    tree: FileTree,
    index: u32,
}

impl TreeTarget {
    pub(crate) fn commit(self, span: &Span) -> Result<Span, StoreError> {
        let tree = &self.tree.0;
        tree.write_chunk(self.index, &|at, buffer| span.read(at, buffer))?;
        tree.span_of(tree.places[tree.places_of(self.index).start])
    }
}

fn places(layout: &Layout) -> Vec<Place> {
    let files = layout.files.iter().enumerate();
    let place = |file, extents: &Vec<aquifer_core::Extent>| -> Vec<Place> {
        extents.iter().map(|e| Place { chunk: e.chunk, file, offset: e.offset }).collect()
    };
    let mut places: Vec<Place> = files.flat_map(|(file, extents)| place(file, extents)).collect();
    places.sort_unstable();
    places
}

fn write_at(
    mapping: &Mapping,
    offset: u64,
    len: u64,
    read: &dyn Fn(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let Some(mapped) = mapping.mapped_file() else { return Err(io::Error::other("not a file")) };
    with_piece(|piece| {
        let mut done = 0;
        while done < len {
            let n = piece.len().min(clamped(len - done));
            read(done, &mut piece[..n])?;
            mapped.file.write_all_at(&piece[..n], offset + done)?;
            done += n as u64;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests;
