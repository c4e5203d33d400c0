//! Where the record of the brain goes: a file, written by a thread of its own, because the agent's
//! task waits for no disk.

use anyhow::{Context, Result, bail};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// Bytes that may wait for the disk. Guess: two of the longest events, and seconds of a busy node.
const WAITING_BYTES_MAX: usize = 64 << 20;

/// A record in the making. Each step's bytes are handed to the system at once, so that a killed
/// agent leaves all but its last moment.
#[derive(Debug)]
pub(super) struct Recording {
    path: PathBuf,
    /// None once the record had to end before the agent.
    pieces: Option<Sender<Vec<u8>>>,
    waiting: Arc<AtomicUsize>,
    writer: JoinHandle<()>,
}

impl Recording {
    /// Begins a new file; one of an earlier life becomes `PATH.old`, since a life that ended badly
    /// is the one to look at.
    pub(super) fn start(path: &Path) -> Result<Self> {
        let told = || format!("--record {}", path.display());
        put_aside(path).with_context(told)?;
        // It names the mesh's nodes and their addresses: for this user's eyes.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).with_context(told)?;
        tracing::info!("recording decisions to {}", path.display());
        let (pieces, received) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let (left, name) = (waiting.clone(), path.to_path_buf());
        let writer = std::thread::Builder::new().name("recording".into());
        let writer = writer.spawn(move || write_all(file, &name, &received, &left)).context("cannot start a thread")?;
        Ok(Recording { path: path.to_path_buf(), pieces: Some(pieces), waiting, writer })
    }

    pub(super) fn write(&mut self, piece: Vec<u8>) {
        let Some(pieces) = self.pieces.as_ref().filter(|_| !piece.is_empty()) else { return };
        let bytes = piece.len();
        if self.waiting.load(Ordering::Relaxed) + bytes > WAITING_BYTES_MAX {
            tracing::warn!("{} cannot be written as fast as things happen; it ends here", self.path.display());
            self.pieces = None;
            return;
        }
        self.waiting.fetch_add(bytes, Ordering::Relaxed);
        if pieces.send(piece).is_err() {
            // The writer has said why it stopped.
            self.pieces = None;
        }
    }

    /// Returns when all is written.
    pub(super) fn finish(self) {
        drop(self.pieces);
        if self.writer.join().is_err() {
            tracing::warn!("the thread that wrote {} panicked", self.path.display());
        }
    }
}

fn put_aside(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_file() => {
            let mut old = path.to_path_buf().into_os_string();
            old.push(".old");
            Ok(fs::rename(path, &old)?)
        }
        Ok(_) => bail!("there is something else than a file"),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn write_all(mut file: File, path: &Path, pieces: &Receiver<Vec<u8>>, waiting: &AtomicUsize) {
    for piece in pieces {
        if let Err(error) = file.write_all(&piece) {
            tracing::warn!("{} ends here: {error}", path.display());
            return;
        }
        waiting.fetch_sub(piece.len(), Ordering::Relaxed);
    }
}
