//! The thread that writes down what one hook has pending. A disk that is slow or full delays only it.

use crate::desk::Desk;
use crate::limits::{Limits, SPOOL_SLACK_BYTES};
use crate::spool::Spool;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

#[derive(Debug)]
pub(crate) struct Scribe {
    pub(crate) desk: Arc<Desk>,
    pub(crate) spool: Spool,
    pub(crate) limits: Limits,
    /// Held, not read: the lock of the spool's directory ends with the last scribe.
    pub(crate) lock: Arc<File>,
}

impl Scribe {
    /// Until all ends, and then for what there is.
    pub(crate) fn write(mut self) {
        let mut ill_until = None;
        loop {
            let writing = self.desk.writing(ill_until);
            let was_ill = ill_until.is_some();
            let written = self.spool.put(&writing.what).and_then(|()| self.compact());
            ill_until = self.health(was_ill, written);
            if writing.last {
                break;
            }
        }
        drop(self.lock);
        self.desk.close_paper();
    }

    fn compact(&mut self) -> io::Result<()> {
        let pending = u64::try_from(self.desk.pending_bytes()).unwrap_or(u64::MAX);
        if self.spool.bytes() <= pending.saturating_mul(2).saturating_add(SPOOL_SLACK_BYTES) {
            return Ok(());
        }
        let what = self.desk.take_writing(true);
        self.spool.put(&what)
    }

    /// Warns once of trouble that lasts. Returns until when it is left alone.
    fn health(&self, was_ill: bool, written: io::Result<()>) -> Option<Instant> {
        let (name, path) = (&self.desk.name, self.spool.path().display());
        let error = match written {
            Ok(()) if was_ill => {
                tracing::info!("hook {name}: its events can be kept in {path} again");
                return None;
            }
            Ok(()) => return None,
            Err(error) => error,
        };
        if !was_ill {
            tracing::warn!(
                "hook {name}: cannot write {path}: {error}; its events are delivered from memory, and those pending are \
                 lost if the agent ends: see to it"
            );
        }
        Instant::now().checked_add(self.limits.spool_retry)
    }
}
