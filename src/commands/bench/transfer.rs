//! `aquifer bench transfer`: chunks from one process to another over a real transport, verified,
//! beside what plain TCP and plain BLAKE3 take for as many bytes.

use super::args;
use super::cores::{Cores, Setup, Task, Threads, Took};
pub(crate) use super::ends::{Destination, Kind, Origin};
use super::ends::{Holding, Offer, Pulling, Terms};
use super::figures::{Asked, Ratio, Run, Series};
use super::lab::{Child, Lab, Thing};
use super::machine;
use super::part::Part;
use super::report::Report;
use super::wire::Pair;
use crate::output::tell;
use crate::units;
use anyhow::{Result, bail};
use aquifer_transport::limits::CONNECTIONS_PER_PEER_MAX;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::PathBuf;

const SIZE_BYTES: u64 = 4 << 30;

#[derive(Clone, Copy, Debug)]
enum Measured {
    Aquifer,
    /// The same without encryption.
    Plain,
    Tcp,
    TcpAndHash,
    Hash,
    Copy,
}

const HASH: Thing<Measured> = thing(Measured::Hash, "BLAKE3", "one thread hashing as many bytes from memory, by 4 MiB");

const BESIDE_TCP: [Thing<Measured>; 3] = [
    thing(
        Measured::Tcp,
        "plain TCP",
        "std's blocking sockets, a connection for each core or as many as --conns, from memory to memory, nothing hashed",
    ),
    thing(
        Measured::TcpAndHash,
        "BLAKE3-plus-receive",
        "the same; the receiving threads hash each piece of 256 KiB while it is in cache",
    ),
    HASH,
];
const BESIDE_TLS: [Thing<Measured>; 1] =
    [thing(Measured::Plain, "aquifer over TCP", "the same transfer with encryption off")];
const BESIDE_RDMA: [Thing<Measured>; 2] =
    [thing(Measured::Tcp, "plain TCP", "std's blocking sockets, 1 connection, over loopback, nothing hashed"), HASH];
const BESIDE_SHM: [Thing<Measured>; 2] =
    [thing(Measured::Copy, "memcpy", "one thread copying as many bytes from memory to memory"), HASH];

const fn thing(key: Measured, name: &'static str, what: &'static str) -> Thing<Measured> {
    Thing { key, name, what }
}

pub(super) fn run(lab: &Lab, args: &args::Transfer) -> Result<Report> {
    // Both ends of the transfer, and of what it is compared with.
    let size = machine::size(args.size.size, SIZE_BYTES, 4)?;
    let terms = |kind| {
        let terms = Terms::new(kind, args.conns, size, args.chunk, lab.dir());
        terms.map(|mut terms| {
            (terms.origin, terms.destination) = (args.source, args.into);
            terms
        })
    };
    let (name, what) = words(args);
    tell(&format!("Setting up: {} at both ends ...", units::bytes(size)));
    let mut transfer = Transfer::start(lab, terms(args.transport)?, args.window)?;
    let mut things = vec![Thing { key: Measured::Aquifer, name, what }];
    let settings = json!({
        "transport": args.transport.name(), "conns": args.conns.map_or(json!("an agent's"), |n| json!(n)), "source": args.source, "into": args.into, "size_bytes": size,
        "chunk_bytes": args.chunk, "window": args.window, "runs": lab.runs(),
    });
    let mut report = Report::new("transfer", settings);
    report.series = match args.transport {
        Kind::Tcp => {
            let mut pair = Pair::start(lab, size, size)?;
            let connections = connections_beside(args.conns);
            report.notes = vec![pair.sends_by(), format!("connections of plain TCP: {connections}")];
            things.extend(BESIDE_TCP);
            lab.by_turns(&things, |measured| match measured {
                Measured::Aquifer | Measured::Plain => transfer.pull(),
                Measured::Tcp | Measured::Copy => pair.tcp(connections),
                Measured::TcpAndHash => pair.tcp_and_hash(connections),
                Measured::Hash => pair.hash(),
            })?
        }
        Kind::Tls => {
            let mut plain = Transfer::start(lab, terms(Kind::Tcp)?, args.window)?;
            things.extend(BESIDE_TLS);
            let series = lab.by_turns(&things, |measured| match measured {
                Measured::Aquifer => transfer.pull(),
                Measured::Plain | Measured::Tcp | Measured::TcpAndHash | Measured::Hash | Measured::Copy => {
                    plain.pull()
                }
            })?;
            plain.check()?;
            series
        }
        Kind::Rdma => {
            let mut pair = Pair::start(lab, size, size)?;
            report.notes = vec![pair.sends_by()];
            things.extend(BESIDE_RDMA);
            lab.by_turns(&things, |measured| match measured {
                Measured::Tcp => pair.tcp(1),
                Measured::Hash => pair.hash(),
                Measured::Aquifer | Measured::Plain | Measured::TcpAndHash | Measured::Copy => transfer.pull(),
            })?
        }
        Kind::Shm => {
            let (mut cores, ()) = lab.start::<Cores>(&Setup { bytes: usize::try_from(size)? })?;
            things.extend(BESIDE_SHM);
            lab.by_turns(&things, |measured| match measured {
                Measured::Copy => cores.ask(&Task::Copy(Threads::One)).map(|heard| heard.alone()),
                Measured::Hash => cores.ask(&Task::HashMemory(Threads::One)).map(|heard| heard.alone()),
                Measured::Aquifer | Measured::Plain | Measured::Tcp | Measured::TcpAndHash => transfer.pull(),
            })?
        }
    };
    transfer.check()?;
    report.ratios = ratios(args.transport, args.into, &report.series)?;
    Ok(report)
}

/// Connections of plain TCP beside a transfer's: so many that all cores have work, unless the transfer may not.
fn connections_beside(conns: Option<u16>) -> u16 {
    let cores = machine::cores().min(CONNECTIONS_PER_PEER_MAX);
    conns.unwrap_or(u16::try_from(cores).unwrap_or(1))
}

fn ratios(kind: Kind, into: Destination, series: &[Series]) -> Result<Vec<Ratio>> {
    let [aquifer, beside @ ..] = series else { bail!("a series is missing") };
    Ok(match (kind, beside) {
        (Kind::Shm, [_, hash]) if into == Destination::Store => vec![Ratio::new(
            "rate",
            "GB/s, to those of one thread that hashes as many bytes with BLAKE3 and copies nothing",
            Asked::AtLeast(0.90),
            aquifer.runs.iter().zip(&hash.runs).map(|(a, hash)| hash.s_per_gb() / a.s_per_gb()),
        )],
        (Kind::Tcp, [tcp, tcp_and_hash, hash]) => {
            let cpu = aquifer.runs.iter().zip(tcp.runs.iter().zip(&hash.runs));
            let slower = tcp.slower(tcp_and_hash);
            vec![
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
            ]
        }
        (Kind::Tls, [plain]) => {
            let turns = || aquifer.runs.iter().zip(&plain.runs);
            vec![
                Ratio::new(
                    "CPU",
                    "CPU seconds per GB of both processes, to those with encryption off",
                    Asked::Nothing,
                    turns().map(|(a, off)| a.cpu_s_per_gb() / off.cpu_s_per_gb()),
                ),
                Ratio::new(
                    "rate",
                    "GB/s, to those with encryption off",
                    Asked::Nothing,
                    turns().map(|(a, off)| a.gb_per_s() / off.gb_per_s()),
                ),
            ]
        }
        (Kind::Rdma, [tcp, hash]) => {
            [(tcp, "rate to TCP", "plain TCP"), (hash, "rate to BLAKE3", "BLAKE3 by one thread")]
                .map(|(beside, name, what)| {
                    let turns = aquifer.runs.iter().zip(&beside.runs);
                    let rates = turns.map(|(a, limit)| a.gb_per_s() / limit.gb_per_s());
                    Ratio::new(name, format!("GB/s, to those of {what}"), Asked::Nothing, rates)
                })
                .into()
        }
        (Kind::Shm, [copy, hash]) => {
            let turns = aquifer.runs.iter().zip(copy.runs.iter().zip(&hash.runs));
            vec![Ratio::new(
                "rate",
                "GB/s, to those of one thread that copies with memcpy and then hashes with BLAKE3",
                Asked::AtLeast(0.80),
                turns.map(|(a, (copy, hash))| (copy.s_per_gb() + hash.s_per_gb()) / a.s_per_gb()),
            )]
        }
        _ => bail!("a series is missing"),
    })
}

fn words(args: &args::Transfer) -> (&'static str, &'static str) {
    let what = match (args.source, args.into) {
        (Origin::Memory, Destination::Region) => "from shared memory into shared memory, hashed on the way into place",
        (Origin::File, Destination::Region) => {
            "from a file in the page cache into shared memory, hashed on the way into place"
        }
        (Origin::Store, Destination::Region) => "from a chunk store into shared memory, hashed on the way into place",
        (Origin::Memory, Destination::Store) => "from shared memory into a chunk store that begins empty, hashed",
        (Origin::File, Destination::Store) => {
            "from a file in the page cache into a chunk store that begins empty, hashed"
        }
        (Origin::Store, Destination::Store) => "from one chunk store into another, which begins empty, hashed",
    };
    let name = match args.transport {
        Kind::Tcp => "aquifer over TCP",
        Kind::Tls => "aquifer over TLS",
        Kind::Shm => "aquifer by shared memory",
        Kind::Rdma => "aquifer over RDMA",
    };
    (name, what)
}

/// A holder and a puller.
#[derive(Debug)]
struct Transfer {
    holder: Child<Holder>,
    puller: Child<Puller>,
}

impl Transfer {
    fn start(lab: &Lab, terms: Terms, window: u32) -> Result<Self> {
        let file = lab.dir().join("holder.bytes");
        if terms.origin == Origin::File {
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
    file: PathBuf,
}

impl Part for Holder {
    const NAME: &'static str = "holder";
    type Setup = HolderSetup;
    type Ready = Offer;
    /// Says no more than what was used until then.
    type Task = ();
    type Reply = ();

    fn set_up(setup: HolderSetup) -> Result<(Self, Offer)> {
        let (holding, offer) = Holding::start(&setup.terms, &setup.file)?;
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
