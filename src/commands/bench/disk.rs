//! What the disk can do: a file written and read from its begin to its end, past the page cache
//! where the file system allows that.

use super::content::PIECE_BYTES;
use super::cores::Took;
use super::part::Part;
use anyhow::{Context, Result};
use rustix::fs::{Advice, OFlags, fadvise, fcntl_getfl, fcntl_setfl};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

/// Bytes of one read or write, of which one is under way at a time. Guess: long enough that its begin
/// and its end are little of it.
const REQUEST_BYTES: usize = 16 << 20;
/// Where uncached requests must begin in memory: the sector size of any disk divides it.
const ALIGNMENT_BYTES: usize = 4096;

#[derive(Debug)]
pub(super) struct Disk {
    /// It has no name, so nothing is left of it.
    file: File,
    bytes: u64,
    uncached: bool,
    buffer: Vec<u8>,
    begin: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Setup {
    pub(super) dir: PathBuf,
    pub(super) bytes: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// A new file, until the disk has all of it.
    Write,
    /// What was written.
    Read,
}

impl Part for Disk {
    const NAME: &'static str = "disk";
    type Setup = Setup;
    /// Whether the page cache is passed by.
    type Ready = bool;
    type Task = Task;
    type Reply = Took;

    fn set_up(setup: Setup) -> Result<(Self, bool)> {
        let dir = setup.dir.display();
        let file = tempfile::tempfile_in(&setup.dir).with_context(|| format!("cannot make a file in {dir}"))?;
        let mut buffer = super::content::memory(REQUEST_BYTES + ALIGNMENT_BYTES);
        let begin = buffer.as_ptr().align_offset(ALIGNMENT_BYTES);
        let request = &mut buffer[begin..begin + REQUEST_BYTES];
        let uncached = pass_cache_by(&file, &request[..PIECE_BYTES]);
        // Whole requests only, as uncached ones must be.
        let bytes = setup.bytes.next_multiple_of(REQUEST_BYTES as u64);
        Ok((Disk { file, bytes, uncached, buffer, begin }, uncached))
    }

    fn work(&mut self, task: Task) -> Result<Took> {
        match task {
            Task::Write => {
                self.file.set_len(0).context("cannot empty a file")?;
                let start = Instant::now();
                self.each(|file, request, at| file.write_all_at(request, at)).context("cannot write to the disk")?;
                self.file.sync_data().context("cannot write to the disk")?;
                Ok(Took::since(start, self.bytes))
            }
            Task::Read => {
                if !self.uncached {
                    fadvise(&self.file, 0, None, Advice::DontNeed).context("cannot drop cached pages")?;
                }
                let start = Instant::now();
                self.each(|file, request, at| file.read_exact_at(request, at)).context("cannot read from the disk")?;
                Ok(Took::since(start, self.bytes))
            }
        }
    }
}

impl Disk {
    fn each(&mut self, each: impl Fn(&File, &mut [u8], u64) -> std::io::Result<()>) -> std::io::Result<()> {
        let request = &mut self.buffer[self.begin..self.begin + REQUEST_BYTES];
        (0..self.bytes).step_by(REQUEST_BYTES).try_for_each(|at| each(&self.file, request, at))
    }
}

/// Sets O_DIRECT, if the file system takes it and a write with it.
fn pass_cache_by(file: &File, aligned: &[u8]) -> bool {
    let Ok(flags) = fcntl_getfl(file) else { return false };
    let set = fcntl_setfl(file, flags | OFlags::DIRECT).is_ok();
    let works = set && file.write_all_at(aligned, 0).is_ok();
    if set && !works {
        // If this fails too, the writes that follow say so.
        let _ = fcntl_setfl(file, flags);
    }
    works
}
