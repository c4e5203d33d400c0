//! Slots of any length in memfd slabs: best fit among free extents, neighbours merged when freed.

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
    /// Bytes of all slabs; never more than `limit`.
    mapped: u64,
    slabs: BTreeMap<u32, Slab>,
    /// Every free extent of every slab: length, slab, offset.
    free: BTreeSet<(u64, u32, u64)>,
    next: u32,
}

#[derive(Debug)]
struct Slab {
    mapping: Arc<Mapping>,
    /// Offset to length. Never two that touch.
    free: BTreeMap<u64, u64>,
}

impl Slabs {
    pub(crate) fn new(limit: u64) -> Self {
        let state = State { limit, used: 0, mapped: 0, slabs: BTreeMap::new(), free: BTreeSet::new(), next: 0 };
        Slabs(Arc::new(Mutex::new(state)))
    }

    /// A slot of `len` bytes, free again when the last span made from it is gone.
    pub(crate) fn take(&self, len: u64) -> Result<Span, StoreError> {
        let slot_len = len.max(1).next_multiple_of(SLOT_BYTES);
        let (slab, offset, mapping) = self.lock().take(slot_len)?;
        let slot = Slot { slabs: self.clone(), slab, offset, len: slot_len };
        Ok(mapping.span().guarded(Arc::new(slot)).slice(offset..offset + len)?)
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
    fn take(&mut self, len: u64) -> Result<(u32, u64, Arc<Mapping>), StoreError> {
        let fit = |free: &BTreeSet<(u64, u32, u64)>| free.range((len, 0, 0)..).next().copied();
        let found = match fit(&self.free) {
            Some(found) => found,
            None => {
                self.grow(len)?;
                fit(&self.free).ok_or(self.full(len))?
            }
        };
        let (free_len, slab, offset) = found;
        self.unlist(slab, offset, free_len);
        if free_len > len {
            self.list(slab, offset + len, free_len - len);
        }
        self.used += len;
        let mapping = self.slabs.get(&slab).map(|s| s.mapping.clone()).ok_or(self.full(len))?;
        Ok((slab, offset, mapping))
    }

    /// Takes a slot back. A slab that is wholly free is unmapped, but for one spare.
    fn give(&mut self, slab: u32, offset: u64, len: u64) -> Option<Slab> {
        self.used -= len;
        let free = &self.slabs.get(&slab)?.free;
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
        match merged.1 == slab_len && spare {
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

    fn grow(&mut self, len: u64) -> Result<(), StoreError> {
        let slab_len = SLAB_BYTES.max(len).min(self.limit - self.mapped) / SLOT_BYTES * SLOT_BYTES;
        if slab_len < len {
            return Err(self.full(len));
        }
        let (mapping, _) = Mapping::memfd("aquifer-chunks", slab_len).map_err(|error: MemoryError| {
            tracing::warn!("the chunk store cannot grow: {error}");
            self.full(len)
        })?;
        let slab = self.next;
        self.next += 1;
        self.mapped += slab_len;
        self.slabs.insert(slab, Slab { mapping, free: BTreeMap::new() });
        self.list(slab, 0, slab_len);
        Ok(())
    }

    fn full(&self, needed: u64) -> StoreError {
        StoreError::Full { needed, limit: self.limit, used: self.used }
    }

    fn list(&mut self, slab: u32, offset: u64, len: u64) {
        self.free.insert((len, slab, offset));
        if let Some(s) = self.slabs.get_mut(&slab) {
            s.free.insert(offset, len);
        }
    }

    fn unlist(&mut self, slab: u32, offset: u64, len: u64) {
        self.free.remove(&(len, slab, offset));
        if let Some(s) = self.slabs.get_mut(&slab) {
            s.free.remove(&offset);
        }
    }
}

/// A slot while spans of it exist.
struct Slot {
    slabs: Slabs,
    slab: u32,
    offset: u64,
    len: u64,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let emptied = self.slabs.lock().give(self.slab, self.offset, self.len);
        drop(emptied); // unmapped outside the lock
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl State {
        fn assert_invariants(&self) {
            let free: u64 = self.free.iter().map(|f| f.0).sum();
            assert_eq!(free + self.used, self.mapped);
            assert!(self.mapped <= self.limit);
            assert_eq!(self.mapped, self.slabs.values().map(|s| s.mapping.len()).sum::<u64>());
            for (id, slab) in &self.slabs {
                let mut reached = None;
                for (&offset, &len) in &slab.free {
                    assert!(reached.is_none_or(|r| r < offset), "free extents touch");
                    assert!(self.free.contains(&(len, *id, offset)));
                    reached = Some(offset + len);
                }
                assert!(reached.is_none_or(|r| r <= slab.mapping.len()));
            }
            assert_eq!(self.free.len(), self.slabs.values().map(|s| s.free.len()).sum::<usize>());
        }
    }

    proptest! {
        #[test]
        fn slots_never_overlap(ops in prop::collection::vec((any::<bool>(), 0u64..(5 << 20)), 1..150)) {
            let slabs = Slabs::new(150 << 20);
            let mut held: Vec<Span> = Vec::new();
            for (take, n) in ops {
                if take {
                    match slabs.take(n) {
                        Ok(span) => {
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
                slabs.lock().assert_invariants();
            }
            held.clear();
            slabs.lock().assert_invariants();
            prop_assert_eq!(slabs.used(), 0);
            prop_assert!(slabs.lock().slabs.len() <= 1);
        }
    }
}
