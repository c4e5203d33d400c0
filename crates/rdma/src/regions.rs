//! Registrations, one for each mapping and use: registering is dear (it pins every page), chunks are many.

use crate::error::RdmaError;
use crate::verbs::{Access, ProtectionDomain, Region};
use aquifer_memory::{Mapping, Span};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The registered memory of one rail.
pub(crate) struct Regions {
    domain: Arc<ProtectionDomain>,
    /// By the address of the mapping's value, which the region keeps where it is.
    entries: Mutex<BTreeMap<(usize, Access), Entry>>,
}

/// Locked while its registration is made, so that it is made once.
type Entry = Arc<Mutex<Option<Arc<Region>>>>;

impl Regions {
    pub(crate) fn new(domain: Arc<ProtectionDomain>) -> Self {
        Regions { domain, entries: Mutex::default() }
    }

    /// The region that `span` is a part of. May take as long as registering all of its mapping takes.
    pub(crate) fn of(&self, span: &Span, access: Access) -> Result<Arc<Region>, RdmaError> {
        let (mapping, _) = span.mapping();
        let entry = self.lock().entry((address(mapping), access)).or_default().clone();
        let mut entry = entry.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(region) = &*entry {
            return Ok(region.clone());
        }
        // All of the mapping, and without the span's guard: the registration outlives this use of it.
        let region = match Region::register(&self.domain, mapping.span(), access) {
            Err(RdmaError::Memlock { .. }) if self.release(|region| Arc::strong_count(region) == 1) => {
                Region::register(&self.domain, mapping.span(), access)?
            }
            other => other?,
        };
        Ok(entry.insert(region).clone())
    }

    /// The same, if it is registered already.
    pub(crate) fn registered(&self, span: &Span, access: Access) -> Option<Arc<Region>> {
        let entry = self.lock().get(&(address(span.mapping().0), access)).cloned()?;
        entry.try_lock().ok()?.clone()
    }

    /// Gives memory back that nobody else keeps mapped.
    pub(crate) fn sweep(&self) {
        self.release(|region| Arc::strong_count(region) == 1 && Arc::strong_count(region.span().mapping().0) == 1);
    }

    /// How many there are, and how long they are together.
    pub(crate) fn totals(&self) -> (u64, u64) {
        let entries: Vec<Entry> = self.lock().values().cloned().collect();
        let lens = entries.iter().filter_map(|e| Some(e.try_lock().ok()?.as_ref()?.span().len()));
        lens.fold((0, 0), |(count, sum), len| (count + 1, sum + len))
    }

    /// Deregisters those that `may_go` says, and whether there were any. Those being made are left alone.
    fn release(&self, may_go: impl Fn(&Arc<Region>) -> bool) -> bool {
        let mut gone = Vec::new();
        self.lock().retain(|_, entry| {
            // Nobody can take a region out of an entry while this holds both locks.
            let Ok(mut region) = entry.try_lock() else { return true };
            match &*region {
                None => Arc::strong_count(entry) > 1,
                Some(r) if may_go(r) => {
                    gone.extend(region.take());
                    Arc::strong_count(entry) > 1
                }
                Some(_) => true,
            }
        });
        !gone.is_empty() // and deregistered here, outside the lock
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(usize, Access), Entry>> {
        // Each change is a single insert or remove.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Regions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, bytes) = self.totals();
        write!(f, "Regions({count} of {bytes} bytes)")
    }
}

fn address(mapping: &Arc<Mapping>) -> usize {
    Arc::as_ptr(mapping).addr()
}
