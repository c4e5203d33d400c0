//! Verified chunks on disk, by name: one file each.
//!
//! A chunk is written to `tmp/` and renamed to `chunks/ab/abcd…`, so that a process killed at
//! any instant leaves it whole or absent. A power failure may leave a file whose bytes never
//! reached the disk: [`DiskStore::verify`] finds those, and a node that starts asks it.

use crate::error::StoreError;
use crate::limits::STAGING_DEFAULT_BYTES;
use crate::mapping::Mapping;
use crate::reservation::{Reservation, Target};
use crate::span::{Span, with_piece};
use crate::staging::StagingPool;
use aquifer_core::ChunkHash;
use rustix::fs::{FlockOperation, flock};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Cheap to clone; clones are the same store.
#[derive(Clone, Debug)]
pub struct DiskStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    limit: Option<u64>,
    staging: StagingPool,
    state: Mutex<State>,
    /// Held, not read: the lock ends with it.
    _lock: File,
}

#[derive(Debug, Default)]
struct State {
    chunks: BTreeMap<ChunkHash, u64>,
    /// Bytes of `chunks`, and of reservations.
    used: u64,
    /// Numbers the files in `tmp/`.
    next: u64,
}

impl DiskStore {
    /// Opens or creates a store that holds at most `limit_bytes`, if that is given.
    pub fn open(dir: &Path, limit_bytes: Option<u64>) -> Result<Self, StoreError> {
        Self::open_with(dir, limit_bytes, StagingPool::new(STAGING_DEFAULT_BYTES))
    }

    /// The same, landing in memory of `staging`.
    pub fn open_with(dir: &Path, limit: Option<u64>, staging: StagingPool) -> Result<Self, StoreError> {
        create_dir(dir)?;
        let lock = lock_file(&dir.join("lock"), dir)?;
        for name in ["chunks", "tmp"] {
            create_dir(&dir.join(name))?;
        }
        clear(&dir.join("tmp"))?;
        let chunks = list(&dir.join("chunks"))?;
        let used = chunks.values().sum();
        let state = Mutex::new(State { chunks, used, next: 0 });
        Ok(DiskStore(Arc::new(Inner { dir: dir.to_path_buf(), limit, staging, state, _lock: lock })))
    }

    /// Every chunk and its length, in ascending order, as found at open and committed since. What
    /// was there at open is not verified.
    pub fn hashes_with_len(&self) -> Vec<(ChunkHash, u64)> {
        self.0.lock().chunks.iter().map(|(hash, len)| (*hash, *len)).collect()
    }

    pub fn contains(&self, hash: &ChunkHash) -> bool {
        self.0.lock().chunks.contains_key(hash)
    }

    /// Bytes of all chunks and reservations.
    pub fn used_bytes(&self) -> u64 {
        self.0.lock().used
    }

    pub fn get(&self, hash: &ChunkHash) -> Option<Span> {
        let len = *self.0.lock().chunks.get(hash)?;
        let span = self.0.span(hash)?;
        (span.len() == len).then_some(span)
    }

    /// Hashes a chunk, and removes it if it is wrong. False if it is not there (any more).
    pub fn verify(&self, hash: &ChunkHash) -> io::Result<bool> {
        let right = match self.get(hash) {
            Some(span) => span.hash()? == *hash,
            None => false,
        };
        if !right {
            self.remove(hash);
        }
        Ok(right)
    }

    /// Room for a chunk of `len` bytes.
    pub fn reserve(&self, hash: ChunkHash, len: u64) -> Result<Reservation, StoreError> {
        let charge = Charge::new(&self.0, len)?;
        let staged = self.0.staging.try_take(len);
        let span = staged.ok_or_else(|| StoreError::StagingFull { limit: self.0.staging.limit_bytes() })?;
        Ok(Reservation::new(span, Target::Disk(DiskTarget { charge, hash })))
    }

    /// Forgets a chunk and deletes its file; false if it was not there.
    pub fn remove(&self, hash: &ChunkHash) -> bool {
        let mut state = self.0.lock();
        let Some(len) = state.chunks.remove(hash) else { return false };
        state.used -= len;
        if let Err(error) = fs::remove_file(self.0.path(hash)) {
            tracing::warn!("cannot remove {}: {error}", self.0.path(hash).display());
        }
        true
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Counters and map change together without anything between that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, hash: &ChunkHash) -> PathBuf {
        let hex = hash.to_string();
        self.dir.join("chunks").join(&hex[..2]).join(&hex)
    }

    fn span(&self, hash: &ChunkHash) -> Option<Span> {
        let path = self.path(hash);
        match Mapping::file(&path) {
            Ok(mapping) => Some(mapping.span()),
            Err(error) => {
                tracing::warn!("a stored chunk cannot be read: {error}");
                None
            }
        }
    }

    /// Writes a chunk under a temporary name, then gives it its own. True if it is new.
    fn write(&self, hash: &ChunkHash, span: &Span) -> io::Result<bool> {
        let number = {
            let mut state = self.lock();
            state.next += 1;
            state.next
        };
        let temporary = self.dir.join("tmp").join(format!("{hash}.{number}"));
        let settled = write_file(&temporary, span).and_then(|()| self.settle(hash, &temporary, span.len()));
        if settled.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        settled
    }

    /// Under the lock, so that a chunk removed meanwhile is either listed and there, or neither.
    fn settle(&self, hash: &ChunkHash, temporary: &Path, len: u64) -> io::Result<bool> {
        let path = self.path(hash);
        fs::create_dir_all(path.parent().unwrap_or(&self.dir))?;
        let mut state = self.lock();
        fs::rename(temporary, &path)?;
        Ok(state.chunks.insert(*hash, len).is_none())
    }
}

/// Where a disk reservation becomes visible.
#[derive(Debug)]
pub(crate) struct DiskTarget {
    charge: Charge,
    hash: ChunkHash,
}

impl DiskTarget {
    pub(crate) fn commit(self, span: &Span) -> Result<Span, StoreError> {
        let inner = self.charge.inner.clone();
        let path = inner.path(&self.hash);
        if inner.write(&self.hash, span).map_err(StoreError::io("write", &path, span.len()))? {
            self.charge.keep();
        }
        Ok(Mapping::file(&path)?.span())
    }
}

/// Bytes counted as used while a reservation lasts.
#[derive(Debug)]
struct Charge {
    inner: Arc<Inner>,
    len: u64,
}

impl Charge {
    fn new(inner: &Arc<Inner>, len: u64) -> Result<Self, StoreError> {
        let mut state = inner.lock();
        let used = state.used;
        match inner.limit {
            Some(limit) if used.saturating_add(len) > limit => Err(StoreError::Full { needed: len, limit, used }),
            _ => {
                state.used += len;
                Ok(Charge { inner: inner.clone(), len })
            }
        }
    }

    /// The bytes are a chunk's now.
    fn keep(mut self) {
        self.len = 0;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.len > 0 {
            self.inner.lock().used -= self.len;
        }
    }
}

/// Creates a directory and its parents, for its owner only.
fn create_dir(dir: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(StoreError::io("create", dir, 0))
}

/// Takes the lock `path`, which says that this process alone uses `dir`, and leaves its pid in it.
fn lock_file(path: &Path, dir: &Path) -> Result<File, StoreError> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(StoreError::io("open", path, 0))?;
    if let Err(errno) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
        if errno != rustix::io::Errno::WOULDBLOCK {
            return Err(StoreError::io("lock", path, 0)(errno));
        }
        let mut pid = String::new();
        let _ = (&file).take(20).read_to_string(&mut pid);
        let owner = if pid.is_empty() { pid } else { format!(" (pid {})", pid.trim()) };
        return Err(StoreError::Locked { path: dir.to_path_buf(), owner });
    }
    let note = format!("{}\n", std::process::id());
    file.set_len(0).and_then(|()| file.write_all(note.as_bytes())).map_err(StoreError::io("write", path, 0))?;
    Ok(file)
}

fn clear(dir: &Path) -> Result<(), StoreError> {
    for entry in entries(dir)? {
        fs::remove_file(&entry).map_err(StoreError::io("remove", &entry, 0))?;
    }
    Ok(())
}

fn list(chunks: &Path) -> Result<BTreeMap<ChunkHash, u64>, StoreError> {
    let mut found = BTreeMap::new();
    for fan in entries(chunks)? {
        for path in entries(&fan)? {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            match (name.parse(), fs::metadata(&path)) {
                (Ok(hash), Ok(meta)) if meta.is_file() => {
                    found.insert(hash, meta.len());
                }
                _ => tracing::warn!("{} is not a chunk: ignored", path.display()),
            }
        }
    }
    Ok(found)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    read().map_err(StoreError::io("list", dir, 0))
}

fn write_file(path: &Path, span: &Span) -> io::Result<()> {
    let mut file = File::create(path)?;
    with_piece(|piece| {
        let mut done = 0;
        while done < span.len() {
            let n = piece.len().min(crate::span::clamped(span.len() - done));
            span.read(done, &mut piece[..n])?;
            file.write_all(&piece[..n])?;
            done += n as u64;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn put(store: &DiskStore, bytes: &[u8]) -> Result<Span, StoreError> {
        let reservation = store.reserve(ChunkHash::of(bytes), bytes.len() as u64)?;
        reservation.span().write(0, bytes).unwrap();
        reservation.commit()
    }

    #[test]
    fn chunks_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskStore::open(dir.path(), None).unwrap();
        let long = vec![7; 600_000];
        put(&store, b"hello").unwrap();
        let span = put(&store, &long).unwrap();
        assert_eq!(span.hash().unwrap(), ChunkHash::of(&long));
        drop(store.reserve(ChunkHash::of(b"x"), 1).unwrap());
        assert_eq!(store.used_bytes(), 600_005);
        let listed = store.hashes_with_len();
        drop(store);
        let store = DiskStore::open(dir.path(), None).unwrap();
        assert_eq!(store.hashes_with_len(), listed);
        assert_eq!(store.used_bytes(), 600_005);
        assert!(store.verify(&ChunkHash::of(&long)).unwrap());
        assert!(store.remove(&ChunkHash::of(&long)));
        assert_eq!(span.hash().unwrap(), ChunkHash::of(&long), "a span outlives its chunk");
        assert!(store.get(&ChunkHash::of(&long)).is_none());
    }

    #[test]
    fn leftovers_of_a_killed_process_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        drop(DiskStore::open(dir.path(), None).unwrap());
        let half = dir.path().join("tmp").join("half");
        fs::write(&half, b"half a chunk").unwrap();
        let store = DiskStore::open(dir.path(), None).unwrap();
        assert!(!half.exists());
        assert_eq!(store.hashes_with_len(), []);
    }

    #[test]
    fn damage_is_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskStore::open(dir.path(), None).unwrap();
        let hash = ChunkHash::of(b"hello");
        put(&store, b"hello").unwrap();
        let file = OpenOptions::new().write(true).open(store.0.path(&hash)).unwrap();
        file.write_at(b"j", 0).unwrap();
        assert!(!store.verify(&hash).unwrap());
        assert!(!store.contains(&hash) && store.used_bytes() == 0);
        put(&store, b"hello").unwrap();
        OpenOptions::new().write(true).open(store.0.path(&hash)).unwrap().set_len(2).unwrap();
        assert!(store.get(&hash).is_none());
    }

    #[test]
    fn two_agents_cannot_share_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskStore::open(dir.path(), None).unwrap();
        let error = DiskStore::open(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(store);
        DiskStore::open(dir.path(), None).unwrap();
    }

    #[test]
    fn limits_hold() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskStore::open(dir.path(), Some(10)).unwrap();
        let held = store.reserve(ChunkHash::of(b"123456"), 6).unwrap();
        assert!(matches!(put(&store, b"abcde"), Err(StoreError::Full { needed: 5, limit: 10, used: 6 })));
        drop(held);
        put(&store, b"abcde").unwrap();
        put(&store, b"abcde").unwrap();
        assert_eq!(store.used_bytes(), 5);
    }
}
