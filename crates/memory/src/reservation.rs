//! A place for one chunk that is not there yet.

use crate::disk::DiskTarget;
use crate::error::{MemoryError, StoreError};
use crate::span::Span;
use crate::store::MemoryTarget;
use crate::tree::TreeTarget;

/// Room for one chunk's bytes, in whatever store promised it. Land in [`Reservation::span`],
/// verify there, then [`Reservation::commit`]. Dropped without that, it leaves no trace.
#[derive(Debug)]
pub struct Reservation {
    span: Span,
    target: Target,
}

#[derive(Debug)]
pub(crate) enum Target {
    /// The landing place is the final one.
    InPlace,
    Memory(MemoryTarget),
    Disk(DiskTarget),
    Tree(TreeTarget),
}

impl Reservation {
    /// For a landing place that is the final one: an engine's region. Committing does nothing.
    pub fn in_place(span: Span) -> Self {
        Reservation::new(span, Target::InPlace)
    }

    pub(crate) fn new(span: Span, target: Target) -> Self {
        Reservation { span, target }
    }

    /// Where to land: as long as the chunk, writable.
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// Makes the chunk visible and returns where to serve it from. The caller has verified the
    /// bytes. May wait for a disk.
    pub fn commit(self) -> Result<Span, StoreError> {
        match self.target {
            Target::InPlace => Ok(self.span),
            Target::Memory(target) => Ok(target.commit()),
            Target::Disk(target) => target.commit(&self.span),
            Target::Tree(target) => target.commit(&self.span),
        }
    }

    /// Whether [`Reservation::adopt`] may spare a copy.
    pub fn adopts(&self) -> bool {
        matches!(self.target, Target::Memory(_))
    }

    /// Commits the same bytes, which lie elsewhere and can never change, as they are if the store can keep
    /// them so; else copies them first. The caller has verified them.
    pub fn adopt(self, bytes: Span) -> Result<Span, StoreError> {
        if let Target::Memory(target) = &self.target
            && bytes.len() == self.span.len()
            && bytes.as_immutable().is_some()
            && let Some(kept) = target.adopt(bytes.clone())
        {
            return Ok(kept);
        }
        let copied = bytes.copy_to(0, &self.span, 0, self.span.len());
        copied.map_err(|source| MemoryError::Os { call: "copy", what: "a chunk".into(), source })?;
        self.commit()
    }
}
