//! Verified chunks in host memory, by name.

use crate::error::StoreError;
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
        let span = self.slabs.take(len)?;
        Ok(Reservation::new(span, Target::Memory(MemoryTarget { store: self.clone(), hash })))
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
}

impl MemoryTarget {
    /// If the chunk came twice, the first copy stays.
    pub(crate) fn commit(self, span: Span) -> Span {
        self.store.lock().entry(self.hash).or_insert(span).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
