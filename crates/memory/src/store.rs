//! Verified chunks in host memory, by name.

use crate::error::{MemoryError, StoreError};
use crate::reservation::{Reservation, Target};
use crate::slabs::Slabs;
use crate::span::Span;
use aquifer_core::ChunkHash;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A chunk store in memfd slabs. Holds a bounded number of bytes and evicts nothing by itself.
/// Cheap to clone; clones are the same store.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    slabs: Slabs,
    chunks: Arc<Mutex<BTreeMap<ChunkHash, Span>>>,
}

impl MemoryStore {
    /// A store whose slabs never take more than `limit_bytes` together.
    pub fn new(limit_bytes: u64) -> Self {
        MemoryStore { slabs: Slabs::new(limit_bytes), chunks: Arc::default() }
    }

    /// Room for a chunk of `len` bytes.
    pub fn reserve(&self, hash: ChunkHash, len: u64) -> Result<Reservation, StoreError> {
        let lent = match self.slabs.take(len) {
            Err(full @ StoreError::Full { .. }) => match self.compact(len)? {
                true => self.slabs.take(len)?,
                false => return Err(full),
            },
            other => other?,
        };
        let target = MemoryTarget { store: self.clone(), hash, to_keep: lent.to_keep };
        Ok(Reservation::new(lent.to_write, Target::Memory(target)))
    }

    /// Moves the chunks out of a sealed slab that has `len` bytes to gain, so that it goes; false if there is none.
    /// For a moment it takes a slab beyond the limit.
    fn compact(&self, len: u64) -> Result<bool, StoreError> {
        let Some(sparsest) = self.slabs.sparsest(len) else { return Ok(false) };
        let inside =
            |(hash, span): (&ChunkHash, &Span)| Arc::ptr_eq(span.mapping().0, &sparsest).then(|| (*hash, span.clone()));
        let moving: Vec<(ChunkHash, Span)> = self.lock().iter().filter_map(inside).collect();
        for (hash, span) in moving {
            let copy = self.slabs.take_beyond(span.len())?;
            let copied = span.copy_to(0, &copy.to_write, 0, span.len());
            copied.map_err(|source| MemoryError::Os { call: "copy", what: "a chunk".into(), source })?;
            // What was removed meanwhile stays so.
            if let Some(chunk) = self.lock().get_mut(&hash) {
                *chunk = copy.to_keep;
            }
        }
        Ok(true)
    }

    pub fn get(&self, hash: &ChunkHash) -> Option<Span> {
        self.lock().get(hash).cloned()
    }

    pub fn contains(&self, hash: &ChunkHash) -> bool {
        self.lock().contains_key(hash)
    }

    /// Forgets a chunk; false if it was not there. Its memory is free when nobody reads it any more.
    pub fn remove(&self, hash: &ChunkHash) -> bool {
        let removed = self.lock().remove(hash);
        removed.is_some()
    }

    /// Bytes in use, reservations and chunks that are still being read included.
    pub fn used_bytes(&self) -> u64 {
        self.slabs.used()
    }

    /// In ascending order.
    pub fn hashes(&self) -> Vec<ChunkHash> {
        self.lock().keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ChunkHash, Span>> {
        // Every mutation is a single insert or remove: a panic elsewhere leaves nothing half done.
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a memory reservation becomes visible.
#[derive(Debug)]
pub(crate) struct MemoryTarget {
    store: MemoryStore,
    hash: ChunkHash,
    /// The bytes that are written by way of the reservation's span.
    to_keep: Span,
}

impl MemoryTarget {
    /// If the chunk came twice, the first copy stays.
    pub(crate) fn commit(self) -> Span {
        self.store.lock().entry(self.hash).or_insert(self.to_keep).clone()
    }

    /// Keeps `span` in place of what was reserved; `None`, and nothing is changed, if there is no room for
    /// both at once.
    pub(crate) fn adopt(&self, span: Span) -> Option<Span> {
        let span = self.store.slabs.adopt(span).ok()?;
        Some(self.store.lock().entry(self.hash).or_insert(span).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::SLAB_BYTES;
    use crate::shared::{Known, Shared};

    fn put(store: &MemoryStore, bytes: &[u8]) -> Result<Span, StoreError> {
        let reservation = store.reserve(ChunkHash::of(bytes), bytes.len() as u64)?;
        reservation.span().write(0, bytes).unwrap();
        reservation.commit()
    }

    #[test]
    fn committed_or_absent() {
        let store = MemoryStore::new(1 << 20);
        let hash = ChunkHash::of(b"hello");
        drop(store.reserve(hash, 5).unwrap());
        assert!(!store.contains(&hash) && store.used_bytes() == 0);
        put(&store, b"hello").unwrap();
        put(&store, b"hello").unwrap();
        assert_eq!(store.get(&hash).unwrap().hash().unwrap(), hash);
        assert_eq!(store.hashes(), [hash]);
        assert_eq!(store.used_bytes(), 4096);
    }

    const CHUNK: u64 = 4 << 20;
    const PER_SLAB: u8 = 16;

    fn bytes_of(n: u8) -> Vec<u8> {
        vec![n; usize::try_from(CHUNK).unwrap()]
    }

    fn hash_of(n: u8) -> ChunkHash {
        ChunkHash::of(&bytes_of(n))
    }

    /// As `share` does where pages are large.
    fn seal(span: &Span) -> bool {
        let mapping = span.mapping().0;
        mapping.as_slab().unwrap().seal(mapping.len(), &**mapping)
    }

    #[test]
    fn a_slab_is_sealed_once_it_is_full_and_nobody_writes() {
        let store = MemoryStore::new(2 * SLAB_BYTES);
        let first = put(&store, &bytes_of(0)).unwrap();
        assert!(!seal(&first) && first.is_writable(), "nearly empty");
        (1..PER_SLAB - 1).for_each(|n| drop(put(&store, &bytes_of(n)).unwrap()));
        let last = store.reserve(hash_of(15), CHUNK).unwrap();
        last.span().write(0, &bytes_of(15)).unwrap();
        assert!(!seal(&first), "somebody writes");
        last.commit().unwrap();
        assert!(first.as_immutable().is_none());
        assert!(seal(&first) && !first.is_writable() && first.write(0, b"x").is_err());
        assert_eq!(first.as_immutable().unwrap(), &bytes_of(0)[..]);
        assert_eq!(first.hash().unwrap(), hash_of(0));
        // What is free in it from now on is not lent out.
        drop(first);
        assert!(store.remove(&hash_of(0)));
        let next = put(&store, &bytes_of(16)).unwrap();
        assert!(next.is_writable() && next.hash().unwrap() == hash_of(16));
        (1..PER_SLAB).for_each(|n| assert!(store.remove(&hash_of(n))));
        assert_eq!(store.used_bytes(), CHUNK);
    }

    #[test]
    fn what_another_sealed_is_kept_as_it_is() {
        let (holder, store) = (MemoryStore::new(SLAB_BYTES), MemoryStore::new(SLAB_BYTES + CHUNK));
        let all: Vec<Span> = (0..PER_SLAB).map(|n| put(&holder, &bytes_of(n)).unwrap()).collect();
        assert!(seal(&all[0]));
        let fd = all[3].mapping().0.share().unwrap().expect("it is sealed");
        let known = Known::default();
        let again = Shared::receive_known(fd.try_clone().unwrap(), &known).unwrap();
        let theirs = Shared::receive_known(fd, &known).unwrap();
        let place = |shared: &Shared| shared.sealed(0, 1).unwrap().as_ptr();
        assert_eq!(place(&theirs), place(&again));
        assert!(theirs.sealed(SLAB_BYTES - CHUNK + 1, CHUNK).is_none() && theirs.sealed(u64::MAX, 1).is_none());
        let seen = theirs.sealed(all[3].mapping().1, CHUNK).unwrap();
        drop((all, holder));

        let adopted = store.reserve(hash_of(3), CHUNK).unwrap().adopt(seen).unwrap();
        assert!(adopted.as_immutable().is_some());
        assert_eq!((adopted.hash().unwrap(), store.used_bytes()), (hash_of(3), CHUNK));
        // There is no room to count a second besides the slab: it is copied.
        let seen = theirs.sealed(4 * CHUNK, CHUNK).unwrap();
        let name = seen.hash().unwrap();
        let copied = store.reserve(name, CHUNK).unwrap().adopt(seen).unwrap();
        assert!(copied.as_immutable().is_none());
        assert_eq!((store.get(&name).unwrap().hash().unwrap(), store.used_bytes()), (name, 2 * CHUNK));
        drop(adopted);
        assert!(store.remove(&hash_of(3)));
        assert_eq!(store.used_bytes(), CHUNK);
    }

    #[test]
    fn what_is_free_in_sealed_slabs_is_had_back_when_it_is_needed() {
        let store = MemoryStore::new(2 * SLAB_BYTES);
        for n in 0..2 * PER_SLAB {
            put(&store, &bytes_of(n)).unwrap();
        }
        (0..2 * PER_SLAB).for_each(|n| assert!(n % PER_SLAB != 0 || seal(&store.get(&hash_of(n)).unwrap())));
        assert!(matches!(store.reserve(hash_of(40), CHUNK), Err(StoreError::Full { .. })));
        let (gone, left): (Vec<u8>, Vec<u8>) = (0..2 * PER_SLAB).partition(|n| n % 4 == 0);
        gone.iter().for_each(|n| assert!(store.remove(&hash_of(*n))));
        // As much fits as was removed, whatever it costs.
        let mut came = Vec::new();
        for n in 40..40 + u8::try_from(gone.len()).unwrap() {
            put(&store, &bytes_of(n)).unwrap();
            came.push(n);
        }
        assert!(matches!(store.reserve(hash_of(90), CHUNK), Err(StoreError::Full { .. })));
        for n in left.into_iter().chain(came) {
            assert_eq!(store.get(&hash_of(n)).unwrap().hash().unwrap(), hash_of(n));
        }
    }

    #[test]
    fn a_slot_is_reused_only_after_its_last_reader() {
        let store = MemoryStore::new(8192);
        let one = put(&store, &[1; 8192]).unwrap();
        assert!(store.remove(&ChunkHash::of(&[1; 8192])));
        let error = put(&store, &[2; 10]).unwrap_err();
        assert!(matches!(error, StoreError::Full { needed: 4096, limit: 8192, used: 8192 }), "{error}");
        assert_eq!(one.hash().unwrap(), ChunkHash::of(&[1; 8192]));
        drop(one);
        put(&store, &[2; 10]).unwrap();
    }
}
