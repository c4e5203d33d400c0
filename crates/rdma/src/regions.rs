//! Registrations: registering is dear (it pins every page), chunks are many. So memory is registered in long
//! pieces, each once for each use of it, when the first chunk of it is read or shown. What long memory takes to
//! register is spread over the reading of it.

use crate::error::RdmaError;
use crate::limits::REGION_IDLE;
use crate::verbs::{Access, ProtectionDomain, Region};
use aquifer_core::limits::CHUNK_BYTES_MAX;
use aquifer_memory::Span;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The registered memory of one rail.
pub(crate) struct Regions {
    domain: Arc<ProtectionDomain>,
    piece_bytes: u64,
    entries: Mutex<BTreeMap<Key, Entry>>,
}

/// A piece of a mapping, and what it is registered for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// The address of the mapping's value, which the region keeps where it is.
    mapping: usize,
    begin: u64,
    end: u64,
    access: Access,
}

/// Locked while its registration is made, so that it is made once.
type Entry = Arc<Mutex<Option<Made>>>;

struct Made {
    region: Arc<Region>,
    used: Instant,
}

impl Regions {
    /// Memory is registered in pieces of `piece_bytes`, and the longest chunk.
    pub(crate) fn new(domain: Arc<ProtectionDomain>, piece_bytes: u64) -> Self {
        Regions { domain, piece_bytes: piece_bytes.max(1), entries: Mutex::default() }
    }

    /// The region that `span` is a part of. Takes as long as registering a piece of its mapping does.
    pub(crate) fn of(&self, span: &Span, access: Access) -> Result<Arc<Region>, RdmaError> {
        let key = self.key(span, access);
        let piece = key.begin..key.end;
        let entry = self.lock().entry(key).or_default().clone();
        let mut entry = entry.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = &mut *entry {
            return Ok(made.used());
        }
        let register = || {
            // Without the span's guard: the registration outlives this use of it.
            let memory = span.mapping().0.span().slice(piece.clone());
            let memory = memory.map_err(|e| RdmaError::system("a piece of memory")(std::io::Error::other(e)))?;
            Region::register(&self.domain, memory, access)
        };
        let idle = |_: &Key, made: &Made| made.is_free() && made.used.elapsed() >= REGION_IDLE;
        let registered = match register() {
            Err(RdmaError::Memlock { .. }) if self.release(idle) => register(),
            // A store that seals its memory makes it read-only meanwhile, and `is_writable` waits for the outcome.
            Err(error) if error.is_fault() && span.is_writable() => register(),
            other => other,
        };
        let region = registered.inspect_err(tell_of_the_limit)?;
        Ok(entry.insert(Made { region, used: Instant::now() }).used())
    }

    /// The same, if it is registered already.
    pub(crate) fn registered(&self, span: &Span, access: Access) -> Option<Arc<Region>> {
        let entry = self.lock().get(&self.key(span, access)).cloned()?;
        entry.try_lock().ok()?.as_mut().map(Made::used)
    }

    /// How many there are, and how long they are together.
    pub(crate) fn totals(&self) -> (u64, u64) {
        let mut totals = (0, 0);
        self.each(|_, made| totals = (totals.0 + 1, totals.1 + made.region.span().len()));
        totals
    }

    fn key(&self, span: &Span, access: Access) -> Key {
        let (mapping, offset) = span.mapping();
        let part = offset..offset.saturating_add(span.len());
        let Range { start: begin, end } = piece(mapping.len(), part, self.piece_bytes);
        Key { mapping: Arc::as_ptr(mapping).addr(), begin, end, access }
    }

    /// Looks at all but those being made.
    fn each(&self, mut look: impl FnMut(&Key, &Made)) {
        for (key, entry) in &*self.lock() {
            if let Ok(entry) = entry.try_lock()
                && let Some(made) = &*entry
            {
                look(key, made);
            }
        }
    }

    /// Deregisters those that `may_go` says, and whether there were any. Those being made are left alone.
    fn release(&self, may_go: impl Fn(&Key, &Made) -> bool) -> bool {
        let mut gone = Vec::new();
        self.lock().retain(|key, entry| {
            // Nobody can take a region out of an entry while this holds both locks.
            let Ok(mut made) = entry.try_lock() else { return true };
            if made.as_ref().is_some_and(|made| may_go(key, made)) {
                gone.extend(made.take());
            }
            made.is_some() || Arc::strong_count(entry) > 1
        });
        !gone.is_empty() // and deregistered here, outside the lock
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Entry>> {
        // Each change is a single insert or remove.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives memory back that nothing but registrations, of all rails together, keeps mapped.
pub(crate) fn sweep<'a>(all: impl Iterator<Item = &'a Regions> + Clone) {
    let mut keeping: BTreeMap<usize, usize> = BTreeMap::new();
    all.clone().for_each(|regions| regions.each(|key, _| *keeping.entry(key.mapping).or_default() += 1));
    // Whoever registers has a span of the mapping, which counts: so what nobody else keeps stays unused.
    let abandoned = |key: &Key, made: &Made| {
        let mapped = Arc::strong_count(made.region.span().mapping().0);
        made.is_free() && keeping.get(&key.mapping).is_some_and(|regions| mapped <= *regions)
    };
    all.for_each(|regions| {
        regions.release(abandoned);
    });
}

impl Made {
    fn used(&mut self) -> Arc<Region> {
        self.used = Instant::now();
        self.region.clone()
    }

    /// Whether nothing uses it.
    fn is_free(&self) -> bool {
        Arc::strong_count(&self.region) == 1
    }
}

impl fmt::Debug for Regions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, bytes) = self.totals();
        write!(f, "Regions({count} of {bytes} bytes)")
    }
}

/// The piece that is registered for the bytes `part` of a mapping of `len` bytes. Pieces overlap by the longest
/// chunk, so that each chunk lies in one.
fn piece(len: u64, part: Range<u64>, piece_bytes: u64) -> Range<u64> {
    let begin = part.start / piece_bytes * piece_bytes;
    let end = begin.saturating_add(piece_bytes).saturating_add(CHUNK_BYTES_MAX.into()).max(part.end).min(len);
    begin..end
}

/// Says once that too little memory may be locked: the limit is the process's, whatever runs into it.
fn tell_of_the_limit(error: &RdmaError) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if matches!(error, RdmaError::Memlock { .. }) && !TOLD.swap(true, Ordering::Relaxed) {
        tracing::warn!("memory that cannot be registered is not read over RDMA: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = CHUNK_BYTES_MAX as u64;
    const PIECE: u64 = 10 * CHUNK;

    #[test]
    fn every_chunk_lies_in_a_piece_and_a_piece_in_its_memory() {
        let len = 3 * PIECE + 5;
        let of = |part| piece(len, part, PIECE);
        for start in [0, 1, PIECE - CHUNK, PIECE - 1, PIECE, 2 * PIECE - 1, len - CHUNK] {
            let piece = of(start..start + CHUNK);
            assert!(piece.start <= start && start + CHUNK <= piece.end && piece.end <= len, "{start}: {piece:?}");
            assert!(piece.end - piece.start <= PIECE + CHUNK, "{start}: {piece:?}");
        }
        assert_eq!(of(7..8), of(CHUNK..2 * CHUNK), "neighbours share a piece");
        assert_eq!(piece(100, 3..4, PIECE), 0..100);
        assert_eq!(of(5..len), 0..len, "what is longer than a chunk has a piece of its own");
    }
}
