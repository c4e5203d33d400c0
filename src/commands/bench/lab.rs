//! Where a bench is run: its directory, its processes, and the order of what is measured.

use super::figures::{Run, Series, Usage};
use super::part::{Answer, Part};
use crate::output::BARS;
use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything a bench waits for, at sizes of a large machine's memory.
const PATIENCE: Duration = Duration::from_secs(1800);
/// How soon an interrupt is noticed.
const POLL: Duration = Duration::from_millis(50);

/// Asks a bench to end. Whoever waits for a process notices.
#[derive(Clone, Debug, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(super) fn now(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => bail!("interrupted"),
            false => Ok(()),
        }
    }
}

/// See the module. Its directory is removed when it is dropped.
#[derive(Debug)]
pub(super) struct Lab {
    scratch: TempDir,
    stop: Stop,
    runs: u32,
    started: AtomicU64,
}

/// A thing to measure: what to call it, and what is done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thing<K> {
    pub(super) key: K,
    pub(super) name: &'static str,
    pub(super) what: &'static str,
}

impl Lab {
    pub(super) fn open(dir: Option<&Path>, runs: u32, stop: Stop) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("aquifer-bench-");
        let scratch = match dir {
            Some(dir) => {
                builder.tempdir_in(dir).with_context(|| format!("cannot make a directory in {}", dir.display()))
            }
            None => builder.tempdir().context("cannot make a temporary directory"),
        };
        Ok(Lab { scratch: scratch?, stop, runs, started: AtomicU64::new(0) })
    }

    pub(super) fn dir(&self) -> &Path {
        self.scratch.path()
    }

    pub(super) fn stop(&self) -> &Stop {
        &self.stop
    }

    pub(super) fn runs(&self) -> u32 {
        self.runs
    }

    /// Starts a part and sets it up.
    pub(super) fn start<P: Part>(&self, setup: &P::Setup) -> Result<(Child<P>, P::Ready)> {
        let mut child = self.spawn::<P>()?;
        child.write(&serde_json::to_string(setup)?)?;
        let ready = child.read::<P::Ready>()?.reply;
        Ok((child, ready))
    }

    /// Has a part do one thing.
    pub(super) fn once<P: Part>(&self, setup: &P::Setup, task: &P::Task) -> Result<P::Reply> {
        Ok(self.start::<P>(setup)?.0.ask(task)?.reply)
    }

    /// Measures each of `things` in turn, again and again: the first turn only warms up.
    pub(super) fn by_turns<K: Copy>(
        &self,
        things: &[Thing<K>],
        mut measure: impl FnMut(K) -> Result<Run>,
    ) -> Result<Vec<Series>> {
        let empty = |thing: &Thing<K>| Series { name: thing.name, what: thing.what.to_string(), runs: Vec::new() };
        let mut all: Vec<Series> = things.iter().map(empty).collect();
        let shown = shown(things.len() as u64 * (u64::from(self.runs) + 1));
        for turn in 0..=self.runs {
            for (thing, series) in things.iter().zip(&mut all) {
                self.stop.check()?;
                shown.set_message(thing.name);
                let run = measure(thing.key).with_context(|| format!("cannot measure '{}'", thing.name))?;
                shown.inc(1);
                if turn > 0 {
                    series.runs.push(run);
                }
            }
        }
        shown.finish_and_clear();
        Ok(all)
    }

    fn spawn<P: Part>(&self) -> Result<Child<P>> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let log = self.dir().join(format!("{}-{number}.log", P::NAME));
        let errors = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
        command.args(["--config", "/dev/null", "bench-part", P::NAME]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors).spawn();
        let mut child = child.with_context(|| format!("cannot start a process for '{}'", P::NAME))?;
        let (Some(output), Some(input)) = (child.stdout.take(), child.stdin.take()) else {
            bail!("'{}' was started without its pipes", P::NAME);
        };
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Child { child, input, lines, log, stop: self.stop.clone(), part: PhantomData })
    }
}

/// Progress for whoever looks on.
fn shown(steps: u64) -> ProgressBar {
    let bar = match std::io::stderr().is_terminal() {
        true => BARS.add(ProgressBar::new(steps)),
        false => ProgressBar::hidden(),
    };
    if let Ok(style) = indicatif::ProgressStyle::with_template("   {pos}/{len} {bar:16} {elapsed} {msg}") {
        bar.set_style(style);
    }
    bar
}

/// A process that is a part of a bench. It does not outlive its handle.
#[derive(Debug)]
pub(super) struct Child<P> {
    child: std::process::Child,
    input: ChildStdin,
    lines: Receiver<String>,
    log: PathBuf,
    stop: Stop,
    part: PhantomData<fn(P)>,
}

/// An answer, and what the process had used by then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heard<T> {
    pub(super) reply: T,
    cpu_before: f64,
    cpu_after: f64,
    peak_bytes: u64,
}

impl<T> Heard<T> {
    /// What the task took.
    pub(super) fn usage(&self, process: &str) -> Usage {
        let cpu_seconds = self.cpu_after - self.cpu_before;
        Usage { process: process.to_string(), cpu_seconds, peak_bytes: self.peak_bytes }
    }

    /// What was used between two tasks.
    pub(super) fn usage_until<U>(&self, later: &Heard<U>, process: &str) -> Usage {
        let cpu_seconds = later.cpu_before - self.cpu_after;
        Usage { process: process.to_string(), cpu_seconds, peak_bytes: later.peak_bytes }
    }
}

impl<P: Part> Child<P> {
    pub(super) fn ask(&mut self, task: &P::Task) -> Result<Heard<P::Reply>> {
        self.tell(task)?;
        self.hear()
    }

    /// Gives it a task whose answer is heard later.
    pub(super) fn tell(&mut self, task: &P::Task) -> Result<()> {
        self.write(&serde_json::to_string(task)?)
    }

    pub(super) fn hear(&mut self) -> Result<Heard<P::Reply>> {
        self.read()
    }

    fn write(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}").with_context(|| format!("'{}' is gone{}", P::NAME, self.last_words()))
    }

    fn read<T: serde::de::DeserializeOwned>(&mut self) -> Result<Heard<T>> {
        let line = self.line()?;
        match serde_json::from_str(&line).with_context(|| format!("'{}' said {line:.200}", P::NAME))? {
            Answer::Done { reply, cpu_before, cpu_after, peak_bytes } => {
                Ok(Heard { reply, cpu_before, cpu_after, peak_bytes })
            }
            Answer::Failed { reason } => bail!("{}: {reason}", P::NAME),
        }
    }

    fn line(&mut self) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.stop.check()?;
            match self.lines.recv_timeout(POLL) {
                Ok(line) => return Ok(line),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(RecvTimeoutError::Timeout) => bail!("'{}' said nothing for {PATIENCE:?}", P::NAME),
                Err(RecvTimeoutError::Disconnected) => bail!("'{}' ended early{}", P::NAME, self.last_words()),
            }
        }
    }

    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let first = text.lines().count().saturating_sub(5);
        let lines: Vec<&str> = text.lines().skip(first).collect();
        if lines.is_empty() { String::new() } else { format!("; its last words:\n{}", lines.join("\n")) }
    }
}

impl<P> Drop for Child<P> {
    fn drop(&mut self) {
        // Either call fails only if the process has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
