//! Slots of any length in memfd slabs: best fit among free extents, neighbours merged when freed.
//!
//! A slab may be sealed to be shared (see `seal`): then its free rest is lent out no more, and it goes when
//! its last slot does. Slots in another process's sealed slab take none of this memory, and count all the same.

use crate::error::{MemoryError, StoreError};
use crate::limits::{SLAB_BYTES, SLOT_BYTES};
use crate::mapping::Mapping;
use crate::span::Span;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Cheap to clone; clones are the same slabs.
#[derive(Clone, Debug)]
pub(crate) struct Slabs(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    limit: u64,
    /// Bytes of slots lent out.
    used: u64,
    /// Bytes of all slabs, and of slots that lie in others' memory. More than `limit` only while slabs are
    /// emptied.
    mapped: u64,
    slabs: BTreeMap<u32, Slab>,
    /// Every free extent of every slab that was not found sealed: length, slab, offset.
    free: BTreeSet<(u64, u32, u64)>,
    next: u32,
}

#[derive(Debug)]
struct Slab {
    mapping: Arc<Mapping>,
    /// Offset to length. Never two that touch.
    free: BTreeMap<u64, u64>,
    /// Found sealed: not written to any more.
    sealed: bool,
}

impl Slabs {
    pub(crate) fn new(limit: u64) -> Self {
        let state = State { limit, used: 0, mapped: 0, slabs: BTreeMap::new(), free: BTreeSet::new(), next: 0 };
        Slabs(Arc::new(Mutex::new(state)))
    }

    /// A slot of `len` bytes, free again when the last span made from either is gone: one to write to, one
    /// to keep.
    pub(crate) fn take(&self, len: u64) -> Result<Lent, StoreError> {
        self.take_within(len, 0)
    }

    /// The same, for as long as it takes to free more than that: a slab beyond the limit at most.
    pub(crate) fn take_beyond(&self, len: u64) -> Result<Lent, StoreError> {
        self.take_within(len, SLAB_BYTES)
    }

    fn take_within(&self, len: u64, beyond: u64) -> Result<Lent, StoreError> {
        let slot_len = len.max(1).next_multiple_of(SLOT_BYTES);
        let (slab, offset, mapping) = self.lock().take(slot_len, beyond)?;
        let writing = Writing(mapping.clone());
        let place = Place::Own { slab, offset };
        let slot = Arc::new(Slot { slabs: self.clone(), place, len: slot_len });
        let kept = mapping.span().guarded(slot).slice(offset..offset + len)?;
        Ok(Lent { to_write: kept.clone().guarded(Arc::new(writing)), to_keep: kept })
    }

    /// A span of another process's memory, counted like a slot until the last span made from it is gone.
    pub(crate) fn adopt(&self, span: Span) -> Result<Span, StoreError> {
        let len = span.len().max(1).next_multiple_of(SLOT_BYTES);
        self.lock().adopt(len)?;
        Ok(span.guarded(Arc::new(Slot { slabs: self.clone(), place: Place::Others, len })))
    }

    /// The sealed slab with most of it free, if that is at least `len` bytes.
    pub(crate) fn sparsest(&self, len: u64) -> Option<Arc<Mapping>> {
        let state = self.lock();
        let sealed = state.slabs.values().filter(|slab| slab.mapping.is_immutable());
        let (free, slab) = sealed.map(|slab| (slab.free.values().sum::<u64>(), slab)).max_by_key(|(free, _)| *free)?;
        (free >= len).then(|| slab.mapping.clone())
    }

    pub(crate) fn used(&self) -> u64 {
        self.lock().used
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // `State` asserts its invariants before it changes anything, so a panic leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, len: u64, beyond: u64) -> Result<(u32, u64, Arc<Mapping>), StoreError> {
        loop {
            let found = match self.fit(len) {
                Some(found) => found,
                None => {
                    self.grow(len, beyond)?;
                    self.fit(len).ok_or(self.full(len))?
                }
            };
            let (free_len, slab, offset) = found;
            let mapping = self.slabs.get(&slab).map(|s| s.mapping.clone()).ok_or(self.full(len))?;
            if !mapping.as_slab().is_some_and(|s| s.begin(len)) {
                self.set_sealed(slab);
                continue;
            }
            self.unlist(slab, offset, free_len);
            if free_len > len {
                self.list(slab, offset + len, free_len - len);
            }
            self.used += len;
            return Ok((slab, offset, mapping));
        }
    }

    fn fit(&self, len: u64) -> Option<(u64, u32, u64)> {
        self.free.range((len, 0, 0)..).next().copied()
    }

    fn adopt(&mut self, len: u64) -> Result<(), StoreError> {
        if self.mapped + len > self.limit {
            return Err(self.full(len));
        }
        self.mapped += len;
        self.used += len;
        Ok(())
    }

    fn disown(&mut self, len: u64) {
        self.mapped -= len;
        self.used -= len;
    }

    /// What is free in it is lent out no more.
    fn set_sealed(&mut self, slab: u32) {
        let Some(s) = self.slabs.get_mut(&slab) else { return };
        s.sealed = true;
        self.free.retain(|(_, of, _)| *of != slab);
    }

    /// Takes a slot back. A slab that is wholly free is unmapped, but for one spare; a sealed one always.
    fn give(&mut self, slab: u32, offset: u64, len: u64) -> Option<Slab> {
        self.used -= len;
        let mapping = &self.slabs.get(&slab)?.mapping;
        mapping.as_slab()?.freed(len);
        if mapping.is_immutable() {
            self.set_sealed(slab);
        }
        let Slab { free, sealed, .. } = self.slabs.get(&slab)?;
        let sealed = *sealed;
        let before = free.range(..offset).next_back().map(|(&o, &l)| (o, l)).filter(|(o, l)| o + l == offset);
        let after = free.get(&(offset + len)).map(|&l| (offset + len, l));
        let mut merged = (offset, len);
        for (o, l) in [before, after].into_iter().flatten() {
            self.unlist(slab, o, l);
            merged = (merged.0.min(o), merged.1 + l);
        }
        self.list(slab, merged.0, merged.1);
        let slab_len = self.slabs.get(&slab)?.mapping.len();
        let spare = self.free.iter().any(|&(l, s, _)| s != slab && self.is_whole(s, l));
        match merged.1 == slab_len && (spare || sealed) {
            true => self.drop_slab(slab, slab_len),
            false => None,
        }
    }

    fn is_whole(&self, slab: u32, len: u64) -> bool {
        self.slabs.get(&slab).is_some_and(|s| s.mapping.len() == len)
    }

    fn drop_slab(&mut self, slab: u32, len: u64) -> Option<Slab> {
        self.unlist(slab, 0, len);
        self.mapped -= len;
        self.slabs.remove(&slab)
    }

    fn grow(&mut self, len: u64, beyond: u64) -> Result<(), StoreError> {
        let room = self.limit.saturating_add(beyond).saturating_sub(self.mapped);
        let slab_len = SLAB_BYTES.max(len).min(room) / SLOT_BYTES * SLOT_BYTES;
        if slab_len < len {
            return Err(self.full(len));
        }
        let mapping = Mapping::slab("aquifer-chunks", slab_len).map_err(|error: MemoryError| {
            tracing::warn!("the chunk store cannot grow: {error}");
            self.full(len)
        })?;
        let slab = self.next;
        self.next += 1;
        self.mapped += slab_len;
        self.slabs.insert(slab, Slab { mapping, free: BTreeMap::new(), sealed: false });
        self.list(slab, 0, slab_len);
        Ok(())
    }

    fn full(&self, needed: u64) -> StoreError {
        StoreError::Full { needed, limit: self.limit, used: self.used }
    }

    fn list(&mut self, slab: u32, offset: u64, len: u64) {
        let Some(s) = self.slabs.get_mut(&slab) else { return };
        s.free.insert(offset, len);
        if !s.sealed {
            self.free.insert((len, slab, offset));
        }
    }

    fn unlist(&mut self, slab: u32, offset: u64, len: u64) {
        self.free.remove(&(len, slab, offset));
        if let Some(s) = self.slabs.get_mut(&slab) {
            s.free.remove(&offset);
        }
    }
}

/// A slot that was taken, twice.
pub(crate) struct Lent {
    pub(crate) to_write: Span,
    pub(crate) to_keep: Span,
}

/// A slot while spans of it exist.
struct Slot {
    slabs: Slabs,
    place: Place,
    len: u64,
}

enum Place {
    Own { slab: u32, offset: u64 },
    Others,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let emptied = match self.place {
            Place::Own { slab, offset } => self.slabs.lock().give(slab, offset, self.len),
            Place::Others => {
                self.slabs.lock().disown(self.len);
                None
            }
        };
        drop(emptied); // unmapped outside the lock
    }
}

/// A slab may not be sealed while this exists.
struct Writing(Arc<Mapping>);

impl Drop for Writing {
    fn drop(&mut self) {
        if let Some(slab) = self.0.as_slab() {
            slab.written();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl State {
        fn assert_invariants(&self) {
            let free: u64 = self.slabs.values().flat_map(|slab| slab.free.values()).sum();
            assert_eq!(free + self.used, self.mapped);
            assert!(self.mapped <= self.limit);
            assert_eq!(self.mapped, self.slabs.values().map(|s| s.mapping.len()).sum::<u64>());
            for (id, slab) in &self.slabs {
                let mut reached = None;
                for (&offset, &len) in &slab.free {
                    assert!(reached.is_none_or(|r| r < offset), "free extents touch");
                    assert_eq!(self.free.contains(&(len, *id, offset)), !slab.sealed);
                    reached = Some(offset + len);
                }
                assert!(reached.is_none_or(|r| r <= slab.mapping.len()));
            }
            let listed = self.slabs.values().filter(|s| !s.sealed).map(|s| s.free.len());
            assert_eq!(self.free.len(), listed.sum::<usize>());
        }
    }

    proptest! {
        #[test]
        fn slots_never_overlap(ops in prop::collection::vec((any::<bool>(), 0u64..(9 << 20)), 1..150)) {
            let slabs = Slabs::new(150 << 20);
            let mut held: Vec<Span> = Vec::new();
            for (take, n) in ops {
                if take {
                    match slabs.take(n).map(|lent| lent.to_keep) {
                        Ok(span) => {
                            // Whatever was sealed before is not what is lent out.
                            prop_assert!(span.is_writable());
                            let begin = span.as_ptr() as usize;
                            let end = begin + usize::try_from(n).unwrap();
                            let apart = held.iter().all(|h| {
                                let b = h.as_ptr() as usize;
                                end <= b || b + usize::try_from(h.len()).unwrap() <= begin
                            });
                            prop_assert!(apart);
                            held.push(span);
                        }
                        Err(e) => assert!(matches!(e, StoreError::Full { .. })),
                    }
                } else if !held.is_empty() {
                    let at = usize::try_from(n).unwrap() % held.len();
                    held.swap_remove(at);
                }
                if n % 8 == 0 && let Some(span) = held.first() {
                    let mapping = span.mapping().0;
                    mapping.as_slab().unwrap().seal(mapping.len(), &**mapping);
                }
                slabs.lock().assert_invariants();
            }
            held.clear();
            slabs.lock().assert_invariants();
            prop_assert_eq!(slabs.used(), 0);
            prop_assert!(slabs.lock().slabs.len() <= 1);
        }
    }
}
