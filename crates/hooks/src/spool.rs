//! One hook's file in the spool: a log of events and of how far they were delivered, one JSON object
//! a line.
//!
//! Only whole lines count, so that a process killed at any instant leaves a log that says what
//! happened up to some moment. It is not flushed to the disk: it outlives the process, not a power failure,
//! of which a node that starts again tells anyway.

use crate::desk::What;
use crate::event::Event;
use crate::outbox::{Entry, Outbox};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct Spool {
    path: PathBuf,
    file: Option<File>,
    /// Length of the file, as far as it is whole lines.
    bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line<'a> {
    /// An event that is to be delivered.
    Event { number: u64, sent_unix_ms: u64, event: Cow<'a, Event> },
    /// All up to this number are delivered.
    Done { number: u64 },
}

impl Spool {
    /// Opens a hook's file, if there is one, and puts what it has still to deliver into `outbox`. Returns
    /// how many of those were dropped, for being too many.
    pub(crate) fn open(path: PathBuf, outbox: &mut Outbox) -> io::Result<(Spool, u64)> {
        let mut spool = Spool { path, file: None, bytes: 0 };
        let file = match OpenOptions::new().read(true).append(true).open(&spool.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((spool, 0)),
            Err(error) => return Err(error),
        };
        let dropped = spool.replay(&file, outbox)?;
        // What follows the last whole line would run into the next one.
        file.set_len(spool.bytes)?;
        spool.file = Some(file);
        Ok((spool, dropped))
    }

    fn replay(&mut self, file: &File, outbox: &mut Outbox) -> io::Result<u64> {
        let mut reader = BufReader::new(file);
        let (mut dropped, mut unreadable) = (0, 0);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            if line.last() != Some(&b'\n') {
                tracing::warn!("{}: the last event was not written whole and is left out", self.path.display());
                break;
            }
            self.bytes += line.len() as u64;
            match serde_json::from_slice(&line) {
                Ok(Line::Event { number, sent_unix_ms, event }) => {
                    outbox.continue_from(number);
                    dropped += outbox.push(Entry { event: Arc::new(event.into_owned()), sent_unix_ms });
                }
                Ok(Line::Done { number }) => outbox.forget_to(number),
                Err(_) => unreadable += 1,
            }
            line.clear();
        }
        if unreadable > 0 {
            tracing::warn!("{}: {unreadable} lines cannot be read and are left out", self.path.display());
        }
        Ok(dropped)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn put(&mut self, what: &What) -> io::Result<()> {
        match what {
            What::Nothing => Ok(()),
            What::Clear => self.clear(),
            What::Append { done, entries } => self.append(*done, entries),
            What::Rewrite { entries } => self.rewrite(entries),
        }
    }

    /// Writes that all up to `done` are delivered, and events that are to be.
    fn append(&mut self, done: Option<u64>, entries: &[(u64, Entry)]) -> io::Result<()> {
        let lines = lines(done, entries)?;
        let whole = self.bytes;
        let file = self.file()?;
        if let Err(error) = file.write_all(&lines) {
            // A part may be there, and would run into the next line.
            let _ = file.set_len(whole);
            return Err(error);
        }
        self.bytes += lines.len() as u64;
        Ok(())
    }

    /// Nothing is to be delivered any more.
    fn clear(&mut self) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.set_len(0)?;
            self.bytes = 0;
        }
        Ok(())
    }

    /// Puts a file in place of the old one in which only these events are.
    fn rewrite(&mut self, entries: &[(u64, Entry)]) -> io::Result<()> {
        let lines = lines(None, entries)?;
        let temporary = self.path.with_extension(TEMPORARY);
        let settled = fs::write(&temporary, &lines).and_then(|()| {
            let file = OpenOptions::new().append(true).open(&temporary)?;
            fs::rename(&temporary, &self.path)?;
            Ok(file)
        });
        if settled.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        self.file = Some(settled?);
        self.bytes = lines.len() as u64;
        Ok(())
    }

    fn file(&mut self) -> io::Result<&mut File> {
        if self.file.is_none() {
            self.file = Some(OpenOptions::new().append(true).create(true).open(&self.path)?);
        }
        // It was just set.
        self.file.as_mut().ok_or_else(|| io::Error::other("no file"))
    }
}

const EVENTS: &str = "jsonl";
const TEMPORARY: &str = "tmp";

/// Where the events of a hook with this digest are.
pub(crate) fn path(dir: &Path, digest: &str) -> PathBuf {
    dir.join(digest).with_extension(EVENTS)
}

/// Removes the files of hooks that are not among `digests`, and what a killed process left unfinished.
/// Returns how many hooks' events are gone.
pub(crate) fn sweep(dir: &Path, digests: &[String]) -> io::Result<u64> {
    let mut removed = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let (Some(stem), Some(extension)) = (path.file_stem(), path.extension()) else { continue };
        let (stem, extension) = (stem.to_string_lossy(), extension.to_string_lossy());
        let ours = stem.len() == 16 && stem.bytes().all(|b| b.is_ascii_hexdigit());
        let events = extension == EVENTS && !digests.iter().any(|d| *d == stem);
        if ours && (events || extension == TEMPORARY) {
            fs::remove_file(&path)?;
            removed += u64::from(events);
        }
    }
    Ok(removed)
}

fn lines(done: Option<u64>, entries: &[(u64, Entry)]) -> io::Result<Vec<u8>> {
    let done = done.map(|number| Line::Done { number });
    let events = entries.iter().map(|(number, entry)| Line::Event {
        number: *number,
        sent_unix_ms: entry.sent_unix_ms,
        event: Cow::Borrowed(&*entry.event),
    });
    let mut bytes = Vec::new();
    for line in done.into_iter().chain(events) {
        serde_json::to_writer(&mut bytes, &line)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}
