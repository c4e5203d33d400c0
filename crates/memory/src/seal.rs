//! A store's memory, which its owner writes to until it is sealed: then nobody can, for good, and anybody
//! may have it as it is.

use crate::limits::SEALED_SHARE;
use rustix::fs::{SealFlags, fcntl_add_seals};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The memfd of one slab, and who may write to it.
#[derive(Debug)]
pub(crate) struct Slab {
    fd: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Slots that are being written to.
    writers: usize,
    /// Bytes of slots lent out.
    used: u64,
    form: Form,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Form {
    #[default]
    Open,
    /// The kernel did not seal it: it is not asked again.
    Unsealable,
    Sealed,
    /// Cannot be written to any more, and is not sealed either.
    Stuck,
}

/// A mapping of the slab, as sealing has to change it.
pub(crate) trait Remap {
    /// Puts a mapping of `fd`'s memory in the place of the one there, to be read or also written.
    fn remap(&self, fd: BorrowedFd<'_>, writable: bool) -> rustix::io::Result<()>;
}

impl Slab {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Slab { fd, state: Mutex::default() }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn is_writable(&self) -> bool {
        matches!(self.lock().form, Form::Open | Form::Unsealable)
    }

    pub(crate) fn is_sealed(&self) -> bool {
        self.lock().form == Form::Sealed
    }

    /// Begins to write to `len` bytes of it, which count as used from now on; false if that cannot be any
    /// more.
    pub(crate) fn begin(&self, len: u64) -> bool {
        let mut state = self.lock();
        let may = matches!(state.form, Form::Open | Form::Unsealable);
        if may {
            state.writers += 1;
            state.used += len;
        }
        may
    }

    /// Nobody writes to that slot any more.
    pub(crate) fn written(&self) {
        self.lock().writers -= 1;
    }

    /// Nobody uses those bytes any more.
    pub(crate) fn freed(&self, len: u64) {
        self.lock().used -= len;
    }

    /// Seals it if nobody writes to it and it is nearly full, since its free rest is lost then. True if it
    /// is sealed.
    pub(crate) fn seal(&self, len: u64, mapping: &impl Remap) -> bool {
        let mut state = self.lock();
        let ripe = state.writers == 0 && state.used >= len / SEALED_SHARE.1 * SEALED_SHARE.0;
        if state.form == Form::Open && ripe {
            state.form = self.try_seal(len, mapping);
        }
        state.form == Form::Sealed
    }

    /// A mapping that could be written to would keep the kernel from sealing. Nobody writes while it is
    /// replaced: `state` is locked, and has no writers.
    fn try_seal(&self, len: u64, mapping: &impl Remap) -> Form {
        let sealed = crate::shared::reopen(self.fd.as_fd()).and_then(|readable| {
            let Some(readable) = readable else { return Ok(false) };
            mapping.remap(readable.as_fd(), false)?;
            Ok(fcntl_add_seals(&self.fd, SealFlags::WRITE | SealFlags::SEAL).is_ok())
        });
        match sealed {
            Ok(true) => Form::Sealed,
            // A device has it pinned, say.
            Ok(false) | Err(_) => match mapping.remap(self.fd.as_fd(), true) {
                Ok(()) => Form::Unsealable,
                Err(errno) => {
                    tracing::warn!("{len} bytes of the chunk store can only be read from now on: mmap: {errno}");
                    Form::Stuck
                }
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is a single assignment or addition: a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
