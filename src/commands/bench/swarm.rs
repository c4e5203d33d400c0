//! `aquifer bench swarm`: a real mesh on loopback, from the announcement of a release to the last
//! engine hydrated, beside plain TCP of as many bytes.

use super::args::Size;
use super::cores::{self, Cores, Took};
use super::figures::{Asked, Ratio, Run, Usage, gigabytes};
use super::lab::{Lab, Stop, Thing};
use super::machine::{self, cpu_seconds_of, status_bytes};
use super::publish::make_checkpoint;
use super::report::{Report, Table};
use super::wire::Pair;
use crate::agent::view::View;
use crate::commands::demo::process::{Engine, Node, Publisher};
use crate::commands::demo::{self, Site};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

const SIZE_BYTES: u64 = 1 << 30;
const PUBLISHER: &str = "publisher";
/// How exactly the end is known. Engines say it themselves; this is how often they are listened to.
const POLL: Duration = Duration::from_millis(2);
/// Longer than meeting, and than moving all bytes, on a slow machine.
const MEETING: Duration = Duration::from_secs(60);
/// Agents renew what they say five times a second; what they did not say by then is not said.
const COUNTING: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(1800);

#[derive(Clone, Copy, Debug)]
enum Measured {
    Aquifer,
    Tcp,
    Hash,
    Touch,
}

const THINGS: [Thing<Measured>; 4] = [
    Thing {
        key: Measured::Aquifer,
        name: "aquifer",
        what: "from the end of hashing at the publisher (it joins, signs and announces then) to the last engine \
               hydrated: chunks through the swarm into engines' memory, verified; agents and engines wait, joined",
    },
    Thing {
        key: Measured::Tcp,
        name: "plain TCP",
        what: "as many bytes over 1 connection between two processes, nothing hashed",
    },
    Thing { key: Measured::Hash, name: "BLAKE3", what: "one thread hashing as many bytes from memory" },
    Thing {
        key: Measured::Touch,
        name: "first touch",
        what: "as much fresh shared memory made present by all cores, as engines' memory is when chunks land; its \
               CPU time includes giving it back",
    },
];

pub(super) fn run(lab: &Lab, nodes: u16, size: Size) -> Result<Report> {
    // The publisher's page cache, each engine; and both ends of TCP.
    let size = machine::size(size.size, SIZE_BYTES, u64::from(nodes) + 3)?;
    let checkpoint = make_checkpoint(lab, size)?;
    let mut pair = Pair::start(lab, size * u64::from(nodes), size)?;
    let (mut cores, ()) = lab.start::<Cores>(&cores::Setup { bytes: cores::CHUNK_BYTES })?;
    let mut swarms = Vec::new();
    let series = lab.by_turns(&THINGS, |measured| match measured {
        Measured::Aquifer => {
            let dir = lab.dir().join(format!("swarm-{}", swarms.len()));
            std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
            let swarm = Swarm::start(&dir, nodes)?.hydrate(&checkpoint, lab.stop())?;
            swarms.push(swarm.traffic);
            Ok(swarm.run)
        }
        Measured::Tcp => pair.tcp(1),
        Measured::Hash => pair.hash(),
        Measured::Touch => {
            let heard = cores.ask(&cores::Task::Touch { bytes: size, times: nodes })?;
            let Took { bytes, seconds } = heard.reply;
            Ok(Run { bytes, seconds, processes: vec![heard.usage("toucher")] })
        }
    })?;

    let mut report = Report::new("swarm", json!({"nodes": nodes, "size_bytes": size, "runs": lab.runs()}));
    let [aquifer, tcp, hash, touch] = &series[..] else { bail!("a series is missing") };
    let turns = || aquifer.runs.iter().zip(&tcp.runs).zip(hash.runs.iter().zip(&touch.runs));
    report.ratios = vec![
        Ratio::new(
            "time",
            "seconds per GB, to those of plain TCP",
            Asked::Nothing,
            turns().map(|((a, tcp), _)| a.s_per_gb() / tcp.s_per_gb()),
        ),
        Ratio::new(
            "time with first touch",
            "seconds per GB, to those of plain TCP and first touch added",
            Asked::Nothing,
            turns().map(|((a, tcp), (_, touch))| a.s_per_gb() / (tcp.s_per_gb() + touch.s_per_gb())),
        ),
        Ratio::new(
            "CPU",
            "CPU seconds per GB of all processes, to those of plain TCP, BLAKE3 and first touch added",
            Asked::Nothing,
            turns().map(|((a, tcp), (hash, touch))| {
                a.cpu_s_per_gb() / (tcp.cpu_s_per_gb() + hash.cpu_s_per_gb() + touch.cpu_s_per_gb())
            }),
        ),
    ];
    report.tables = vec![Table {
        name: "payload in the last run",
        columns: vec!["node", "GB in", "GB out"],
        rows: swarms.pop().unwrap_or_default(),
    }];
    report.notes = vec![
        pair.sends_by(),
        "GB are those that all engines together take; CPU of the publisher is counted from when it had hashed".into(),
        "engines' memory is fresh in every run: its first touch is part of the time".into(),
    ];
    report.series = series;
    Ok(report)
}

/// Agents that know each other, each with an engine that waits for a release.
struct Swarm {
    site: Site,
    nodes: Vec<(Node, Engine)>,
}

/// A run, and what each node took and gave.
struct Hydrated {
    run: Run,
    traffic: Vec<Vec<Value>>,
}

impl Swarm {
    fn start(dir: &Path, count: u16) -> Result<Self> {
        let site = demo::make_keys(dir, None)?;
        let mut nodes: Vec<(Node, Engine)> = Vec::new();
        for i in 1..=count {
            let peers: Vec<String> = nodes.first().map(|(first, _)| first.address.clone()).into_iter().collect();
            let node = Node::start(&site, &format!("node-{i}"), &peers)?;
            let engine = Engine::start(&site, &node)?;
            nodes.push((node, engine));
        }
        Ok(Swarm { site, nodes })
    }

    fn hydrate(mut self, checkpoint: &Path, stop: &Stop) -> Result<Hydrated> {
        let others = self.nodes.len() - 1;
        let knows_others = |view: &View| view.peers.iter().filter(|p| p.connected).count() >= others;
        self.until(MEETING, stop, "the nodes do not find each other", |node, _| Ok(knows_others(&node.view()?)))?;
        let pids = self.pids();
        let before = pids.iter().map(|(_, pid)| cpu_seconds_of(*pid)).collect::<Result<Vec<_>>>()?;

        let peers = [self.nodes[0].0.address.clone()];
        let publisher = Publisher::announce(&self.site, PUBLISHER, checkpoint, &peers)?;
        let (hashed, hashed_cpu) = (Instant::now(), cpu_seconds_of(publisher.pid())?);
        self.until(PATIENCE, stop, "the engines are not hydrated", |_, engine| {
            engine.update()?;
            Ok(engine.serving.is_some())
        })?;
        let last = self.nodes.iter().filter_map(|(_, engine)| engine.serving.as_ref()).map(|(_, at)| *at).max();
        let seconds = last.context("no engine is hydrated")?.duration_since(hashed).as_secs_f64();

        let mut processes = vec![usage(PUBLISHER, cpu_seconds_of(publisher.pid())? - hashed_cpu, publisher.pid())];
        for ((name, pid), before) in pids.iter().zip(before) {
            processes.push(usage(name, cpu_seconds_of(*pid)? - before, *pid));
        }
        let views = self.settled(stop)?;
        let bytes = views.iter().flat_map(|view| &view.channels).map(|c| c.bytes_wanted).sum();
        Ok(Hydrated { run: Run { bytes, seconds, processes }, traffic: traffic(&views) })
    }

    fn pids(&self) -> Vec<(String, u32)> {
        let of = |(node, engine): &(Node, Engine)| {
            [(node.name.clone(), node.pid()), (format!("{}'s engine", node.name), engine.pid())]
        };
        self.nodes.iter().flat_map(of).collect()
    }

    /// What the agents say once they have counted everything: what one took, another gave.
    fn settled(&mut self, stop: &Stop) -> Result<Vec<View>> {
        self.until(MEETING, stop, "the agents do not say what they hold", |node, _| {
            let view = node.view()?;
            Ok(view.channels.iter().all(|c| c.bytes_wanted > 0 && c.bytes_have == c.bytes_wanted))
        })?;
        let deadline = Instant::now() + COUNTING;
        loop {
            let views = self.nodes.iter().map(|(node, _)| node.view()).collect::<Result<Vec<_>>>()?;
            let taken: u64 = views.iter().map(|v| v.traffic.bytes_in).sum();
            let given: u64 = views.iter().map(|v| v.traffic.bytes_out).sum();
            if taken <= given + given_by_publisher(&views) || Instant::now() > deadline {
                return Ok(views);
            }
            stop.check()?;
            std::thread::sleep(POLL);
        }
    }

    /// Waits until it is so of every node.
    fn until(
        &mut self,
        patience: Duration,
        stop: &Stop,
        otherwise: &str,
        is_so: impl Fn(&Node, &mut Engine) -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + patience;
        for (node, engine) in &mut self.nodes {
            while !is_so(node, engine)? {
                stop.check()?;
                node.check_alive()?;
                if Instant::now() > deadline {
                    bail!("{otherwise} within {patience:?}");
                }
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }
}

fn usage(process: &str, cpu_seconds: f64, pid: u32) -> Usage {
    Usage { process: process.to_string(), cpu_seconds, peak_bytes: status_bytes(Some(pid), "VmHWM") }
}

/// What the publisher gave is known by those who took it.
fn given_by_publisher(views: &[View]) -> u64 {
    views.iter().flat_map(|v| &v.peers).filter(|p| p.name == PUBLISHER).map(|p| p.bytes_from).sum()
}

/// Rows of names and GB.
fn traffic(views: &[View]) -> Vec<Vec<Value>> {
    let row = |name: &str, taken: u64, given: u64| vec![name.into(), gigabytes(taken).into(), gigabytes(given).into()];
    let nodes = views.iter().map(|v| row(&v.name, v.traffic.bytes_in, v.traffic.bytes_out));
    std::iter::once(row(PUBLISHER, 0, given_by_publisher(views))).chain(nodes).collect()
}
