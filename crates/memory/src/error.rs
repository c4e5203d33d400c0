//! What can go wrong with memory and with stores, and what the user can do about it.

use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum MemoryError {
    #[error("{call} for {what}: {source}")]
    Os { call: &'static str, what: String, source: io::Error },
    #[error(
        "the region is not a memfd (fcntl F_GET_SEALS: {source}): make it with memfd_create and MFD_ALLOW_SEALING, and seal it with F_SEAL_SHRINK"
    )]
    NotMemfd { source: io::Error },
    #[error(
        "the region's memfd may still be shrunk, which would crash the agent: seal it with fcntl F_ADD_SEALS, F_SEAL_SHRINK"
    )]
    NotSealed,
    #[error("the descriptor is not of a file or memory on this machine: {reason}")]
    NotShared { reason: String },
    #[error("the region is said to have {claimed} bytes, its memfd has {found}")]
    TooSmall { claimed: u64, found: u64 },
    #[error("bytes {begin}..{end} do not lie in a span of {len}")]
    Bounds { begin: u64, end: u64, len: u64 },
}

impl MemoryError {
    pub(crate) fn os(call: &'static str, what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let what = what.into();
        move |errno| MemoryError::Os { call, what, source: errno.into() }
    }
}

#[derive(Debug, Error)]
pub enum StoreError {
    #[error(
        "the store is full: {needed} more bytes are needed, {used} of {limit} are in use; raise its limit or follow fewer channels"
    )]
    Full { needed: u64, limit: u64, used: u64 },
    #[error("no space left on the disk of {path}: {needed} more bytes are needed; free some, or choose another disk")]
    DiskFull { path: PathBuf, needed: u64 },
    #[error("all {limit} bytes of staging memory are in use; try again when a read has ended")]
    StagingFull { limit: u64 },
    #[error("{path} is in use by another aquifer process{owner}; stop that one, or choose another directory")]
    Locked { path: PathBuf, owner: String },
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path}: {reason}")]
    Refused { path: PathBuf, reason: String },
    #[error("{missing} chunks are still missing")]
    Incomplete { missing: u32 },
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl StoreError {
    /// An error of the operating system while doing `action` to `path`; `needed` bytes if it is
    /// for want of space.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: &Path, needed: u64) -> impl FnOnce(E) -> Self {
        let path = path.to_path_buf();
        move |error| {
            let source = error.into();
            match is_out_of_space(&source) {
                true => StoreError::DiskFull { path, needed },
                false => StoreError::Io { action, path, source },
            }
        }
    }
}

fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
