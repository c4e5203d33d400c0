//! `aquifer bench publish`: hashing a checkpoint as `aquifer publish` does before it announces,
//! beside what BLAKE3 itself does with the same files on all cores.

use super::args::Size;
use super::cores::Took;
use super::figures::{Asked, Ratio, Run};
use super::files::{self, Files, Make, Maker};
use super::lab::{Lab, Thing};
use super::machine;
use super::part::Part;
use super::report::{Report, Table};
use crate::output::tell;
use crate::units;
use anyhow::{Context, Result, bail};
use aquifer_memory::Source;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SIZE_BYTES: u64 = 4 << 30;
/// How often memory is looked at meanwhile: seldom enough to cost nothing (50 µs each time).
const LOOK: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug)]
enum Measured {
    Aquifer,
    Mmap,
    Pread,
}

const THINGS: [Thing<Measured>; 3] = [
    Thing {
        key: Measured::Aquifer,
        name: "aquifer publish",
        what: "every chunk hashed and the manifest made, on all cores, files in the page cache",
    },
    Thing {
        key: Measured::Mmap,
        name: "BLAKE3, mmap",
        what: "the same files hashed by BLAKE3's update_mmap_rayon on all cores, as b3sum does",
    },
    Thing {
        key: Measured::Pread,
        name: "BLAKE3, pread",
        what: "the same files hashed by 4 MiB on all cores, read into buffers of 256 KiB",
    },
];

pub(super) fn run(lab: &Lab, path: Option<&Path>, size: Size) -> Result<Report> {
    let path = match path {
        Some(path) => path.to_path_buf(),
        None => make_checkpoint(lab, machine::size(size.size, SIZE_BYTES, 1)?)?,
    };
    let (mut files, bytes) = lab.start::<Files>(&path)?;
    let (mut hasher, ()) = lab.start::<Hasher>(&path)?;
    // The first turn brings the files into the page cache.
    let mut memory = Vec::new();
    let series = lab.by_turns(&THINGS, |measured| {
        let (took, usage) = match measured {
            Measured::Aquifer => {
                let heard = hasher.ask(&())?;
                memory.push((heard.reply.before_bytes, heard.reply.peak_bytes));
                (heard.reply.took, heard.usage("publisher"))
            }
            Measured::Mmap => {
                let heard = files.ask(&files::Task::Mmap)?;
                (heard.reply, heard.usage("hasher"))
            }
            Measured::Pread => {
                let heard = files.ask(&files::Task::Pread)?;
                (heard.reply, heard.usage("hasher"))
            }
        };
        Ok(Run { bytes: took.bytes, seconds: took.seconds, processes: vec![usage] })
    })?;

    let mut report = Report::new("publish", json!({"size_bytes": bytes, "runs": lab.runs()}));
    let [aquifer, mmap, pread] = &series[..] else { bail!("a series is missing") };
    let faster = mmap.faster(pread);
    report.ratios = vec![Ratio::new(
        "rate",
        format!("bytes per second, to those of '{}', the faster of both ways", faster.name),
        Asked::AtLeast(0.90),
        aquifer.runs.iter().zip(&faster.runs).map(|(a, blake3)| a.gb_per_s() / blake3.gb_per_s()),
    )];
    let before = memory.iter().map(|(before, _)| *before).max().unwrap_or(0);
    let peak = memory.iter().map(|(_, peak)| *peak).max().unwrap_or(0);
    report.tables = vec![Table {
        name: "publisher memory",
        columns: vec!["anonymous memory resident", "before", "at its peak", "peak bytes"],
        rows: vec![vec!["RssAnon".into(), units::bytes(before).into(), units::bytes(peak).into(), peak.into()]],
    }];
    report.notes = vec!["peak memory above counts mapped pages of the files; RssAnon does not".to_string()];
    report.series = series;
    Ok(report)
}

/// A checkpoint of about `bytes` in the lab's directory.
pub(super) fn make_checkpoint(lab: &Lab, bytes: u64) -> Result<PathBuf> {
    let dir = lab.dir().join("checkpoint");
    machine::check_room(lab.dir(), bytes)?;
    tell(&format!("Making a checkpoint of about {} ...", units::bytes(bytes)));
    lab.once::<Maker>(&(), &Make::Checkpoint { dir: dir.clone(), bytes })?;
    Ok(dir)
}

/// Hashes a checkpoint as `aquifer publish` does.
#[derive(Debug)]
pub(super) struct Hasher {
    path: PathBuf,
}

/// How long it took, and memory of this process alone.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Hashed {
    took: Took,
    before_bytes: u64,
    peak_bytes: u64,
}

impl Part for Hasher {
    const NAME: &'static str = "publisher";
    type Setup = PathBuf;
    type Ready = ();
    type Task = ();
    type Reply = Hashed;

    fn set_up(path: PathBuf) -> Result<(Self, ())> {
        Ok((Hasher { path }, ()))
    }

    fn work(&mut self, (): ()) -> Result<Hashed> {
        let before_bytes = anonymous_bytes();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let peak = scope.spawn(|| {
                let mut peak = before_bytes;
                while !ended.load(Ordering::Relaxed) {
                    peak = peak.max(anonymous_bytes());
                    std::thread::park_timeout(LOOK);
                }
                peak
            });
            let took = self.hash();
            ended.store(true, Ordering::Relaxed);
            peak.thread().unpark();
            let peak_bytes = peak.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok(Hashed { took: took?, before_bytes, peak_bytes })
        })
    }
}

impl Hasher {
    fn hash(&self) -> Result<Took> {
        let start = Instant::now();
        let shown = || format!("cannot publish {}", self.path.display());
        let published = Source::open(&self.path, &[]).and_then(|s| {
            let bytes = s.bytes();
            s.hash(machine::cores(), &|_| {}).map(|published| (published, bytes))
        });
        let (published, bytes) = published.with_context(shown)?;
        let took = Took::since(start, bytes);
        drop(published);
        Ok(took)
    }
}

fn anonymous_bytes() -> u64 {
    machine::status_bytes(None, "RssAnon")
}
