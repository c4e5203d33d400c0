//! `aquifer bench limits`: what this machine can do, without Aquifer.

use super::args::{Card, Size};
use super::cores::{Cores, Setup, Task, Threads};
use super::disk::{self, Disk};
use super::figures::{Asked, Ratio, Run, Series};
use super::files::{self, Files, Make, Maker};
use super::gpu::{Chosen, Copies, CopiesSetup, Copy};
use super::lab::{Child, Lab, Thing};
use super::machine;
use super::report::Report;
use super::wire::Pair;
use anyhow::{Context, Result};
use serde_json::json;

const SIZE_BYTES: u64 = 1 << 30;
/// Source and destination of copies, the file in the page cache; and both ends of TCP.
const COPIES: u64 = 5;

#[derive(Clone, Copy, Debug)]
enum Measured {
    Cores(Task),
    Tcp(u16),
    TcpAndHash,
    Disk(disk::Task),
    Files(files::Task),
    Gpu(Copy),
}

const THINGS: [Thing<Measured>; 15] = [
    thing(Measured::Cores(Task::Copy(Threads::One)), "memcpy, 1 thread", "bytes copied from memory to memory"),
    thing(Measured::Cores(Task::Copy(Threads::All)), "memcpy, all cores", "the same"),
    thing(Measured::Cores(Task::HashHot(Threads::One)), "BLAKE3 hot, 1 thread", "the same 4 MiB again and again"),
    thing(Measured::Cores(Task::HashHot(Threads::All)), "BLAKE3 hot, all cores", "the same"),
    thing(Measured::Cores(Task::HashMemory(Threads::One)), "BLAKE3, 1 thread", "4 MiB after 4 MiB of memory"),
    thing(Measured::Cores(Task::HashMemory(Threads::All)), "BLAKE3, all cores", "the same"),
    thing(Measured::Cores(Task::CopyHashPieces), "memcpy + BLAKE3", "one thread, by 256 KiB, hashed while in cache"),
    thing(Measured::Cores(Task::CopyThenHash), "memcpy, then BLAKE3", "one thread, all copied before all is hashed"),
    thing(
        Measured::Tcp(1),
        "TCP, 1 connection",
        "std's blocking sockets between two processes on loopback, 4 MiB a call",
    ),
    thing(Measured::Tcp(2), "TCP, 2 connections", "the same, two threads at each end"),
    thing(
        Measured::TcpAndHash,
        "BLAKE3-plus-receive",
        "1 connection; the receiving thread hashes each piece of 256 KiB while it is in cache",
    ),
    thing(Measured::Disk(disk::Task::Write), "disk write", "a file in --dir, by 16 MiB, until the disk has it"),
    thing(Measured::Disk(disk::Task::Read), "disk read", "the same file, by 16 MiB"),
    thing(Measured::Files(files::Task::Mmap), "BLAKE3 of a file, mmap", "in the page cache, all cores, as b3sum does"),
    thing(
        Measured::Files(files::Task::Pread),
        "BLAKE3 of a file, pread",
        "in the page cache, all cores, by 4 MiB, read into buffers of 256 KiB",
    ),
];

/// Where there is a GPU.
const GPU_THINGS: [Thing<Measured>; 3] = [
    thing(Measured::Gpu(Copy::In), "GPU, host to device", "PCIe: registered memory, one copy of all"),
    thing(Measured::Gpu(Copy::Out), "GPU, device to host", "the same"),
    thing(Measured::Gpu(Copy::Within), "GPU, on the device", "one copy of all: each byte is read and written"),
];

const fn thing(key: Measured, name: &'static str, what: &'static str) -> Thing<Measured> {
    Thing { key, name, what }
}

pub(super) fn run(lab: &Lab, card: &Card, size: Size) -> Result<Report> {
    let gpu = match Chosen::of(card) {
        Err(error) if card.is_named() => return Err(error.into()),
        found => found,
    };
    let gpu_copies = gpu.as_ref().map_or(0, Chosen::host_copies);
    let size = machine::size(size.size, SIZE_BYTES, COPIES + gpu_copies)?;
    machine::check_room(lab.dir(), size.saturating_mul(2))?;
    let files = lab.dir().join("files");
    lab.once::<Maker>(&(), &Make::File { dir: files.clone(), bytes: size })?;
    let (mut cores, ()) = lab.start::<Cores>(&Setup { bytes: usize::try_from(size)? })?;
    let mut pair = Pair::start(lab, size, size)?;
    let (mut disk, uncached) = lab.start::<Disk>(&disk::Setup { dir: lab.dir().to_path_buf(), bytes: size })?;
    let (mut files, _) = lab.start::<Files>(&files)?;
    let (mut gpu, told) = match gpu {
        Ok(device) => {
            let (copies, name) = lab.start::<Copies>(&CopiesSetup { device, bytes: size })?;
            (Some(copies), format!("GPU: {name}"))
        }
        Err(reason) => (None, format!("GPU: {reason}")),
    };
    let things: Vec<_> = THINGS.into_iter().chain(GPU_THINGS.into_iter().filter(|_| gpu.is_some())).collect();
    let series = lab.by_turns(&things, |measured| match measured {
        Measured::Cores(task) => cores.ask(&task).map(|heard| heard.alone()),
        Measured::Tcp(connections) => pair.tcp(connections),
        Measured::TcpAndHash => pair.tcp_and_hash(1),
        Measured::Disk(task) => disk.ask(&task).map(|heard| heard.alone()),
        Measured::Files(task) => files.ask(&task).map(|heard| heard.alone()),
        Measured::Gpu(task) => copy(&mut gpu, task),
    })?;
    let mut report = Report::new("limits", json!({"size_bytes": size, "runs": lab.runs(), "disk_uncached": uncached}));
    report.ratios = scaling(&series);
    report.notes = vec![pair.sends_by(), told];
    report.notes.push(match uncached {
        true => "disk: past the page cache (O_DIRECT), one request at a time".to_string(),
        false => {
            "disk: the file system of --dir refuses O_DIRECT, so bytes go through the page cache; writes end with \
                  fdatasync, reads begin after the cached pages were dropped where that is possible"
                .to_string()
        }
    });
    report.series = series;
    Ok(report)
}

fn copy(gpu: &mut Option<Child<Copies>>, task: Copy) -> Result<Run> {
    Ok(gpu.as_mut().context("there is no GPU")?.ask(&task)?.alone())
}

/// What more cores and fewer passes bring.
fn scaling(series: &[Series]) -> Vec<Ratio> {
    let find = |name: &str| series.iter().find(|s| s.name == name);
    let ratio = |name: &'static str, of: &str, to: &str| {
        let (of, to) = (find(of)?, find(to)?);
        let turns = of.runs.iter().zip(&to.runs).map(|(of, to)| of.gb_per_s() / to.gb_per_s());
        Some(Ratio::new(name, format!("GB/s of '{}' to '{}'", of.name, to.name), Asked::Nothing, turns))
    };
    [
        ratio("BLAKE3 on all cores", "BLAKE3, all cores", "BLAKE3, 1 thread"),
        ratio("hashing while in cache", "memcpy + BLAKE3", "memcpy, then BLAKE3"),
        ratio("a second connection", "TCP, 2 connections", "TCP, 1 connection"),
    ]
    .into_iter()
    .flatten()
    .collect()
}
