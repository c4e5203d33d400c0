//! `aquifer bench transfer`: chunks from one process to another over a real transport, verified,
//! beside what plain TCP and plain BLAKE3 take for as many bytes.

use super::args;
use super::cores::Took;
use super::ends::{Holding, Offer, Pulling, Terms};
pub(crate) use super::ends::{Kind, Origin};
use super::figures::{Asked, Ratio, Run};
use super::lab::{Child, Lab, Thing};
use super::machine;
use super::part::Part;
use super::report::Report;
use super::wire::Pair;
use crate::output::tell;
use crate::units;
use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::PathBuf;

const SIZE_BYTES: u64 = 4 << 30;

#[derive(Clone, Copy, Debug)]
enum Measured {
    Aquifer,
    Tcp,
    TcpAndHash,
    Hash,
}

const BESIDE: [Thing<Measured>; 3] = [
    Thing {
        key: Measured::Tcp,
        name: "plain TCP",
        what: "std's blocking sockets, 1 connection, from memory to memory, nothing hashed",
    },
    Thing {
        key: Measured::TcpAndHash,
        name: "BLAKE3-plus-receive",
        what: "the same; the receiving thread hashes each piece of 256 KiB while it is in cache",
    },
    Thing { key: Measured::Hash, name: "BLAKE3", what: "one thread hashing as many bytes from memory, by 4 MiB" },
];

pub(super) fn run(lab: &Lab, args: &args::Transfer) -> Result<Report> {
    // Both ends of the transfer, and of plain TCP.
    let size = machine::size(args.size.size, SIZE_BYTES, 4)?;
    let terms = Terms::new(args.transport, args.conns, size, args.chunk)?;
    let (name, what) = words(args);
    tell(&format!("Setting up: {} at both ends ...", units::bytes(size)));
    let mut transfer = Transfer::start(lab, terms, args.source, args.window)?;
    let mut pair = Pair::start(lab, size, size)?;
    let mut things = vec![Thing { key: Measured::Aquifer, name, what }];
    things.extend(BESIDE);
    let series = lab.by_turns(&things, |measured| match measured {
        Measured::Aquifer => transfer.pull(),
        Measured::Tcp => pair.tcp(1),
        Measured::TcpAndHash => pair.tcp_and_hash(),
        Measured::Hash => pair.hash(),
    })?;
    transfer.check()?;

    let settings = json!({
        "transport": args.transport.name(), "conns": args.conns, "source": args.source, "size_bytes": size,
        "chunk_bytes": args.chunk, "window": args.window, "runs": lab.runs(),
    });
    let mut report = Report::new("transfer", settings);
    let [aquifer, tcp, tcp_and_hash, hash] = &series[..] else { bail!("a series is missing") };
    let cpu = aquifer.runs.iter().zip(tcp.runs.iter().zip(&hash.runs));
    let slower = tcp.slower(tcp_and_hash);
    report.ratios = vec![
        Ratio::new(
            "CPU",
            "CPU seconds per GB of both processes, to those of plain TCP and BLAKE3 added",
            Asked::AtMost(1.10),
            cpu.map(|(a, (tcp, hash))| a.cpu_s_per_gb() / (tcp.cpu_s_per_gb() + hash.cpu_s_per_gb())),
        ),
        Ratio::new(
            "time",
            format!("seconds per GB, to those of '{}', the slower of both ways to receive", slower.name),
            Asked::AtMost(1.15),
            aquifer.runs.iter().zip(&slower.runs).map(|(a, limit)| a.s_per_gb() / limit.s_per_gb()),
        ),
    ];
    report.notes = vec![pair.sends_by()];
    report.series = series;
    Ok(report)
}

fn words(args: &args::Transfer) -> (&'static str, &'static str) {
    let what = match args.source {
        Origin::Memory => "from shared memory into shared memory, each chunk hashed where it landed",
        Origin::File => "from a file in the page cache into shared memory, each chunk hashed where it landed",
    };
    match args.transport {
        Kind::Tcp => ("aquifer over TCP", what),
    }
}

/// A holder and a puller.
#[derive(Debug)]
struct Transfer {
    holder: Child<Holder>,
    puller: Child<Puller>,
}

impl Transfer {
    fn start(lab: &Lab, terms: Terms, origin: Origin, window: u32) -> Result<Self> {
        let file = (origin == Origin::File).then(|| lab.dir().join("holder.bytes"));
        if file.is_some() {
            machine::check_room(lab.dir(), terms.bytes)?;
        }
        let (holder, offer) = lab.start::<Holder>(&HolderSetup { terms: terms.clone(), file })?;
        let (puller, ()) = lab.start::<Puller>(&PullerSetup { terms, offer, window })?;
        Ok(Transfer { holder, puller })
    }

    fn pull(&mut self) -> Result<Run> {
        let before = self.holder.ask(&())?;
        let pulled = self.puller.ask(&PullerTask::Pull)?;
        let after = self.holder.ask(&())?;
        let Took { bytes, seconds } = pulled.reply;
        Ok(Run { bytes, seconds, processes: vec![before.usage_until(&after, "holder"), pulled.usage("puller")] })
    }

    fn check(&mut self) -> Result<()> {
        self.puller.ask(&PullerTask::Check).map(|_| ())
    }
}

#[derive(Debug)]
pub(super) struct Holder {
    _holding: Holding,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HolderSetup {
    terms: Terms,
    file: Option<PathBuf>,
}

impl Part for Holder {
    const NAME: &'static str = "holder";
    type Setup = HolderSetup;
    type Ready = Offer;
    /// Says no more than what was used until then.
    type Task = ();
    type Reply = ();

    fn set_up(setup: HolderSetup) -> Result<(Self, Offer)> {
        let (holding, offer) = Holding::start(&setup.terms, setup.file)?;
        Ok((Holder { _holding: holding }, offer))
    }

    fn work(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct Puller(Pulling);

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PullerSetup {
    terms: Terms,
    offer: Offer,
    window: u32,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum PullerTask {
    Pull,
    /// Whether what was pulled is there.
    Check,
}

impl Part for Puller {
    const NAME: &'static str = "puller";
    type Setup = PullerSetup;
    type Ready = ();
    type Task = PullerTask;
    type Reply = Took;

    fn set_up(setup: PullerSetup) -> Result<(Self, ())> {
        Ok((Puller(Pulling::start(setup.terms, &setup.offer, setup.window)?), ()))
    }

    fn work(&mut self, task: PullerTask) -> Result<Took> {
        match task {
            PullerTask::Pull => self.0.pull(),
            PullerTask::Check => {
                let start = std::time::Instant::now();
                self.0.check()?;
                Ok(Took::since(start, self.0.bytes()))
            }
        }
    }
}
