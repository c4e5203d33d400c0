//! The transport between processes of one machine: bytes are shared, not sent.
//!
//! A holder listens on a Unix socket in a directory that agents of one machine have in common. Who
//! connects proves itself as over TCP, asks for a chunk, and is told where it lies, with a descriptor
//! of that, read-only, if it does not have one yet. The reader copies the bytes to where they are to
//! land, hashes them there piece by piece, and asks whether they were right all the while. Both sides
//! take processes of their own user only.
//!
//! A file on a local disk is shared as it is, and so is a full slab of a memory store, which is sealed for that:
//! nobody can write to it any more, and who has a store of its own keeps the chunk where it lies. Of other
//! memory a reader sees a window, to which the holder copies each chunk. In pages of 4 KiB that is cheaper
//! than to share memory itself, whose every page would be new to the reader. And an engine's region belongs to
//! the engine: a descriptor of it would outlive every lease, show what was never granted, and let any
//! process of its user open it anew to write.

use crate::{Completion, Grants, Operation, Transport, limits};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

mod directory;
mod holder;
mod link;
mod reader;
mod slots;
#[cfg(test)]
mod tests;
mod window;
mod wire;

/// What may be tuned. The defaults are those of [`limits`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShmConfig {
    /// 1 to [`limits::SHM_CONNECTIONS_PER_PEER_MAX`]: as many chunks are copied at once.
    pub connections_per_peer: usize,
    pub handshake_timeout: Duration,
    /// A reader closes a connection unused for so long.
    pub idle_timeout: Duration,
    /// A holder closes a connection without a request for so long.
    pub accepted_idle_timeout: Duration,
    /// A holder gives up on a reader that takes no byte for so long.
    pub write_timeout: Duration,
    /// Connections accepted in all, and those of them without a valid ticket yet.
    pub accepted_max: usize,
    pub unauthenticated_max: usize,
    /// Bytes of all windows that readers see chunks of memory through.
    pub windows_bytes_max: u64,
}

impl Default for ShmConfig {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        ShmConfig {
            connections_per_peer: cores.min(limits::SHM_CONNECTIONS_PER_PEER_MAX),
            handshake_timeout: limits::HANDSHAKE_TIMEOUT,
            idle_timeout: limits::IDLE_TIMEOUT,
            accepted_idle_timeout: limits::ACCEPTED_IDLE_TIMEOUT,
            write_timeout: limits::WRITE_TIMEOUT,
            accepted_max: limits::ACCEPTED_MAX,
            unauthenticated_max: limits::UNAUTHENTICATED_MAX,
            windows_bytes_max: limits::SHM_WINDOWS_BYTES_MAX,
        }
    }
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShmStats {
    /// Payload copied, whole chunks or not.
    pub received_bytes: u64,
    /// Payload that readers said they have.
    pub sent_bytes: u64,
    /// Connections opened to peers, up to the end of the handshake.
    pub connected: u64,
    /// Connections accepted from peers, up to the end of the handshake.
    pub accepted: u64,
    /// Connections turned away or ended for what the other side did.
    pub rejected: u64,
}

#[derive(Debug, Default)]
struct Counters {
    received: AtomicU64,
    sent: AtomicU64,
    connected: AtomicU64,
}

/// See the module. Dropping it ends every read and closes every connection.
pub struct ShmTransport {
    path: PathBuf,
    counters: Arc<Counters>,
    reader: Arc<reader::Reader>,
    holder: holder::Holder,
}

impl ShmTransport {
    /// Listens in `directory`, which is made for this user alone if it is not there, and serves what
    /// `grants` allow. Of `completions` the same is true as of those of [`crate::TcpTransport::start`].
    pub fn start(
        directory: &Path,
        grants: Arc<dyn Grants>,
        completions: impl Fn(Completion) + Send + Sync + 'static,
        config: ShmConfig,
    ) -> io::Result<Arc<Self>> {
        let directory = std::path::absolute(directory)?;
        let socket = directory::Socket::listen(&directory)?;
        let path = socket.path().to_path_buf();
        let counters = Arc::new(Counters::default());
        let reader = Arc::new(reader::Reader::new(config.clone(), Box::new(completions), counters.clone()));
        let holder = holder::Holder::start(socket, config, grants, counters.clone())?;
        Ok(Arc::new(ShmTransport { path, counters, reader, holder }))
    }

    /// The socket it listens on.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn stats(&self) -> ShmStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ShmStats {
            received_bytes: of(&self.counters.received),
            sent_bytes: of(&self.counters.sent),
            connected: of(&self.counters.connected),
            accepted: self.holder.room().accepted(),
            rejected: self.holder.room().rejected(),
        }
    }

    /// Ends every read, closes every connection and waits for the threads. Reads submitted later
    /// complete at once. Not to be called from a completion.
    pub fn shutdown(&self) {
        self.holder.room().close();
        self.reader.close();
        self.reader.join();
        self.holder.room().join();
    }
}

impl Transport for ShmTransport {
    fn name(&self) -> &'static str {
        "shm"
    }

    fn submit(&self, operation: Operation) {
        match operation {
            Operation::Read(op) => self.reader.read(op),
            Operation::Cancel(id) => self.reader.cancel(id),
            Operation::Disconnect(peer) => self.reader.disconnect(peer),
        }
    }
}

impl Drop for ShmTransport {
    fn drop(&mut self) {
        self.holder.room().close();
        self.reader.close();
    }
}

impl fmt::Debug for ShmTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShmTransport({}, {:?})", self.path.display(), self.stats())
    }
}
