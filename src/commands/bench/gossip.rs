//! `aquifer bench gossip`: how long a node waits for another's word, idle and while chunks move
//! between them as fast as they can.
//!
//! Two processes, each with a mesh as an agent has it. One asks every 20 ms, by a control message
//! and by gossip; the other answers in kind. Beside them goes an echo over plain TCP. Nobody knows releases here: messages are counted by
//! numbers they carry anyway.

use super::cores::Took;
use super::echo::{self, Echo};
use super::ends::{Holding, Kind, Offer, Pulling, Terms};
use super::figures::{Asked, Ratio, Run, Series, Spread, quantile};
use super::lab::Lab;
use super::machine;
use super::part::Part;
use super::report::{Report, Table};
use crate::keys;
use anyhow::{Context, Result, bail};
use aquifer_core::{
    ChannelName, GossipMessage, ManifestHash, NodeId, NodeSecret, PeerMessage, Policy, PublisherSecret, Release,
    SignedRelease,
};
use aquifer_mesh::{Mesh, MeshConfig, MeshEvent, MeshKey, Verdict};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc::Receiver;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

/// What moves while messages go.
const SIZE_BYTES: u64 = 512 << 20;
const CHUNK_BYTES: u64 = 4 << 20;
/// Reads under way, as an agent has them.
const WINDOW_CHUNKS: u32 = 32;
/// How often one asks.
const INTERVAL: Duration = Duration::from_millis(20);
/// A message that was not answered by then, after the last was sent, is lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// Before all nodes know who listens to which gossip, some is lost.
const GREETING: Slice = Slice { seconds: 0.2, patience_seconds: 0.5, saturated: false };
/// Nodes that cannot find each other on loopback never will.
const MEETING: Duration = Duration::from_secs(60);
/// Messages are to be answered within this on two cores, while chunks move.
const ASKED_MS: f64 = 50.0;

pub(super) fn run(lab: &Lab, seconds: u64) -> Result<Report> {
    let size = machine::size(None, SIZE_BYTES, 2)?;
    let terms = Terms::new(Kind::Tcp, None, size, CHUNK_BYTES.min(size), lab.dir())?;
    let mesh_key = keys::random_bytes()?;
    let (mut answerer, there) = lab.start::<Answerer>(&AnswererSetup { terms: terms.clone(), mesh_key })?;
    let (mut asker, ()) = lab.start::<Asker>(&AskerSetup { terms, mesh_key, there })?;
    #[expect(clippy::cast_precision_loss, reason = "seconds of a bench are few")]
    let slice_seconds = seconds as f64 / f64::from(lab.runs());
    let slice = |saturated| Slice { seconds: slice_seconds, patience_seconds: PATIENCE.as_secs_f64(), saturated };

    let mut series =
        Series { name: "aquifer over TCP", what: "chunks, verified, while messages go".into(), runs: vec![] };
    let mut idle = Times::default();
    let mut saturated = Times::default();
    for _ in 0..lab.runs() {
        idle.add(asker.ask(&slice(false))?.reply);
        let before = answerer.ask(&())?;
        let heard = asker.ask(&slice(true))?;
        let after = answerer.ask(&())?;
        let processes = vec![before.usage_until(&after, "holder and answerer"), heard.usage("puller and asker")];
        let Took { bytes, seconds } = heard.reply.moved;
        series.runs.push(Run { bytes, seconds, processes });
        saturated.add(heard.reply);
    }

    let settings = json!({"seconds": seconds, "runs": lab.runs(), "size_bytes": size, "every_ms": 20});
    let mut report = Report::new("gossip", settings);
    let rows = [("idle", &idle), ("saturated", &saturated)];
    report.tables = vec![Table {
        name: "round trips",
        columns: vec!["message", "while", "count", "lost", "p50 ms", "p99 ms", "max ms"],
        rows: rows.iter().flat_map(|(state, times)| times.rows(state)).collect(),
    }];
    report.ratios = vec![
        p99("control p99", "99 of 100 control messages are answered within, while chunks move", &saturated.control),
        p99("gossip p99", "the same of gossip messages", &saturated.gossip),
        Ratio::new(
            "control to plain TCP",
            "p99 of control messages, to that of a plain TCP echo at the same time, while chunks move",
            Asked::Nothing,
            saturated.control.iter().zip(&saturated.echo).map(|(control, echo)| p99_of(control) / p99_of(echo)),
        ),
    ];
    report.notes = vec![format!(
        "round trips are counted from when a message was due, every 20 ms; on {} cores (asked is for two)",
        machine::cores()
    )];
    report.series = vec![series];
    Ok(report)
}

/// Over all slices, with the spread of the slices.
fn p99(name: &'static str, what: &str, slices: &[Vec<f64>]) -> Ratio {
    let by_slice = Spread::of(slices.iter().map(|slice| p99_of(slice)));
    let all = quantile(&sorted(slices.iter().flatten()), 0.99);
    Ratio {
        unit: " ms",
        value: Spread { median: all, ..by_slice },
        ..Ratio::new(name, what, Asked::AtMost(ASKED_MS), [])
    }
}

fn p99_of(slice: &[f64]) -> f64 {
    quantile(&sorted(slice.iter()), 0.99)
}

fn sorted<'a>(figures: impl Iterator<Item = &'a f64>) -> Vec<f64> {
    let mut sorted: Vec<f64> = figures.copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Round trips in ms, slice by slice.
#[derive(Debug, Default)]
struct Times {
    control: Vec<Vec<f64>>,
    gossip: Vec<Vec<f64>>,
    echo: Vec<Vec<f64>>,
    control_lost: u64,
    gossip_lost: u64,
}

impl Times {
    fn add(&mut self, heard: Answered) {
        self.control.push(heard.control_ms);
        self.gossip.push(heard.gossip_ms);
        self.echo.push(heard.echo_ms);
        self.control_lost += heard.control_lost;
        self.gossip_lost += heard.gossip_lost;
    }

    fn rows(&self, state: &str) -> [Vec<serde_json::Value>; 3] {
        let row = |message: &str, slices: &Vec<Vec<f64>>, lost: u64| {
            let all = sorted(slices.iter().flatten());
            let at = |share| quantile(&all, share).into();
            vec![message.into(), state.into(), all.len().into(), lost.into(), at(0.5), at(0.99), at(1.0)]
        };
        [
            row("control", &self.control, self.control_lost),
            row("gossip", &self.gossip, self.gossip_lost),
            row("plain TCP", &self.echo, 0),
        ]
    }
}

/// A node of the mesh of two.
struct Node {
    mesh: Mesh,
    events: Receiver<MeshEvent>,
}

impl Node {
    async fn start(mesh_key: [u8; 32], bootstrap: Vec<String>) -> Result<Self> {
        let config = MeshConfig {
            identity: NodeSecret::from_seed(keys::random_bytes()?),
            mesh_key: MeshKey::generate(mesh_key),
            listen: vec!["127.0.0.1:0".to_string()],
            bootstrap,
            mdns: false,
            external: vec![],
        };
        let (mesh, events) = aquifer_mesh::start(config).await?;
        Ok(Node { mesh, events })
    }

    async fn next(&mut self) -> Result<MeshEvent> {
        self.events.recv().await.context("the mesh has ended")
    }
}

/// Messages with a number, of one who asks or answers.
#[derive(Debug)]
struct Voice {
    secret: PublisherSecret,
    channel: ChannelName,
}

impl Voice {
    fn new(channel: &str) -> Result<Self> {
        Ok(Voice { secret: PublisherSecret::from_seed(keys::random_bytes()?), channel: channel.parse()? })
    }

    fn gossip(&self, number: u64) -> GossipMessage {
        let release = Release {
            channel: self.channel.clone(),
            seq: number,
            manifest: nothing(),
            manifest_bytes: 1,
            rolls_back_to: None,
            policy: Policy::default(),
            created_unix_ms: 0,
            note: String::new(),
        };
        GossipMessage::Release(SignedRelease::sign(&release, &self.secret))
    }
}

/// The number of a gossip message, its signature checked as an agent does.
fn number(message: &GossipMessage) -> Option<u64> {
    match message {
        GossipMessage::Release(release) => release.open().ok().map(|r| r.seq),
        GossipMessage::Status(_) | GossipMessage::Statement(_) => None,
    }
}

fn control(number: u64) -> PeerMessage {
    PeerMessage::ManifestAsk { manifest: nothing(), offset: number }
}

/// Messages name a manifest; here it means nothing.
fn nothing() -> ManifestHash {
    ManifestHash::of(b"")
}

/// Holds chunks and answers messages.
#[derive(Debug)]
pub(super) struct Answerer {
    _holding: Holding,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct AnswererSetup {
    terms: Terms,
    mesh_key: [u8; 32],
}

/// Where the answerer is, and what it has.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct There {
    address: String,
    echo_port: u16,
    offer: Offer,
}

impl Part for Answerer {
    const NAME: &'static str = "answerer";
    type Setup = AnswererSetup;
    type Ready = There;
    /// Says no more than what was used until then.
    type Task = ();
    type Reply = ();

    fn set_up(setup: AnswererSetup) -> Result<(Self, There)> {
        let (holding, offer) = Holding::start(&setup.terms, Path::new(""))?;
        let runtime = Handle::current();
        let mut node = runtime.block_on(Node::start(setup.mesh_key, vec![]))?;
        let address = loop {
            if let MeshEvent::Listening { address } = runtime.block_on(node.next())? {
                break address;
            }
        };
        let voice = Voice::new("bench/answers")?;
        runtime.spawn(async move { while answer(&mut node, &voice).await.is_ok() {} });
        Ok((Answerer { _holding: holding }, There { address, echo_port: echo::answer()?, offer }))
    }

    fn work(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

async fn answer(node: &mut Node, voice: &Voice) -> Result<()> {
    match node.next().await? {
        MeshEvent::Message { from, message } => node.mesh.send(from, message),
        MeshEvent::Gossip { id, message, .. } => {
            node.mesh.verdict(id, Verdict::Accept);
            if let Some(number) = number(&message) {
                node.mesh.gossip(voice.gossip(number));
            }
        }
        MeshEvent::Listening { .. }
        | MeshEvent::ListeningEnded { .. }
        | MeshEvent::Connected { .. }
        | MeshEvent::Disconnected { .. }
        | MeshEvent::Malformed { .. }
        | MeshEvent::Unreachable { .. } => {}
    }
    Ok(())
}

/// Pulls chunks and asks.
pub(super) struct Asker {
    node: Node,
    peer: NodeId,
    voice: Voice,
    pulling: Pulling,
    echo: Echo,
    /// Of the next message.
    number: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct AskerSetup {
    terms: Terms,
    mesh_key: [u8; 32],
    there: There,
}

/// Ask for so long.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Slice {
    seconds: f64,
    /// How long to wait for what is not answered yet; then it is lost.
    patience_seconds: f64,
    saturated: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answered {
    control_ms: Vec<f64>,
    gossip_ms: Vec<f64>,
    echo_ms: Vec<f64>,
    control_lost: u64,
    gossip_lost: u64,
    moved: Took,
}

impl Part for Asker {
    const NAME: &'static str = "asker";
    type Setup = AskerSetup;
    type Ready = ();
    type Task = Slice;
    type Reply = Answered;

    fn set_up(setup: AskerSetup) -> Result<(Self, ())> {
        let mut pulling = Pulling::start(setup.terms, &setup.there.offer, WINDOW_CHUNKS)?;
        pulling.pull()?;
        let echo = Echo::connect(setup.there.echo_port)?;
        let (node, peer) = Handle::current().block_on(meet(setup.mesh_key, setup.there.address))?;
        let mut asker = Asker { node, peer, voice: Voice::new("bench/asks")?, pulling, echo, number: 0 };
        let deadline = Instant::now() + MEETING;
        loop {
            let heard = asker.work(GREETING)?;
            if heard.control_lost + heard.gossip_lost == 0 {
                return Ok((asker, ()));
            }
            if Instant::now() > deadline {
                bail!("two nodes on loopback do not hear each other's gossip");
            }
        }
    }

    fn work(&mut self, slice: Slice) -> Result<Answered> {
        let ended = AtomicBool::new(false);
        let runtime = Handle::current();
        let Asker { node, peer, voice, pulling, echo, number } = self;
        std::thread::scope(|scope| {
            let moving = slice.saturated.then(|| scope.spawn(|| pull_until(pulling, &ended)));
            let echoing = scope.spawn(|| echo.ask_until(INTERVAL, &ended));
            let answered = runtime.block_on(ask(node, *peer, voice, number, slice));
            ended.store(true, Ordering::Relaxed);
            let moved = moving.map(joined).transpose()?.unwrap_or(NOTHING);
            let echo_ms = joined(echoing)?;
            Ok(Answered { moved, echo_ms, ..answered? })
        })
    }
}

const NOTHING: Took = Took { bytes: 0, seconds: 0.0 };

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

async fn meet(mesh_key: [u8; 32], address: String) -> Result<(Node, NodeId)> {
    let mut node = Node::start(mesh_key, vec![address]).await?;
    let deadline = Instant::now() + MEETING;
    loop {
        let event = timeout_at(deadline, node.next()).await.context("two nodes on loopback do not meet")??;
        if let MeshEvent::Connected { node: peer, .. } = event {
            return Ok((node, peer));
        }
    }
}

fn pull_until(pulling: &mut Pulling, ended: &AtomicBool) -> Result<Took> {
    let start = std::time::Instant::now();
    let mut bytes = 0;
    loop {
        bytes += pulling.pull()?.bytes;
        if ended.load(Ordering::Relaxed) {
            return Ok(Took::since(start, bytes));
        }
    }
}

/// Asks every 20 ms, and waits for what is not answered yet.
async fn ask(node: &mut Node, peer: NodeId, voice: &Voice, number: &mut u64, slice: Slice) -> Result<Answered> {
    let mut ticks = interval(INTERVAL);
    // A message that is late was due when it was due.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let end = Instant::now() + Duration::from_secs_f64(slice.seconds);
    let lost = end + Duration::from_secs_f64(slice.patience_seconds);
    let (mut open_control, mut open_gossip) = (Open::new(), Open::new());
    let mut answered = Answered {
        control_ms: vec![],
        gossip_ms: vec![],
        echo_ms: vec![],
        control_lost: 0,
        gossip_lost: 0,
        moved: NOTHING,
    };
    let mut asking = true;
    while asking || !(open_control.is_empty() && open_gossip.is_empty()) {
        tokio::select! {
            due = ticks.tick() => {
                asking = due < end;
                if asking {
                    *number += 1;
                    node.mesh.send(peer, control(*number));
                    node.mesh.gossip(voice.gossip(*number));
                    open_control.insert(*number, due);
                    open_gossip.insert(*number, due);
                } else if due > lost {
                    break;
                }
            }
            event = node.next() => take_in(&mut node.mesh, event?, &mut open_control, &mut open_gossip, &mut answered)?,
        }
    }
    answered.control_lost = open_control.len() as u64;
    answered.gossip_lost = open_gossip.len() as u64;
    Ok(answered)
}

type Open = BTreeMap<u64, Instant>;

fn take_in(
    mesh: &mut Mesh,
    event: MeshEvent,
    control: &mut Open,
    gossip: &mut Open,
    answered: &mut Answered,
) -> Result<()> {
    let ms = |due: Instant| due.elapsed().as_secs_f64() * 1e3;
    match event {
        MeshEvent::Message { message: PeerMessage::ManifestAsk { offset, .. }, .. } => {
            answered.control_ms.extend(control.remove(&offset).map(ms));
        }
        MeshEvent::Gossip { id, message, .. } => {
            mesh.verdict(id, Verdict::Accept);
            answered.gossip_ms.extend(number(&message).and_then(|n| gossip.remove(&n)).map(ms));
        }
        MeshEvent::Disconnected { .. } => bail!("the other node is gone"),
        MeshEvent::Message { .. }
        | MeshEvent::Listening { .. }
        | MeshEvent::ListeningEnded { .. }
        | MeshEvent::Connected { .. }
        | MeshEvent::Malformed { .. }
        | MeshEvent::Unreachable { .. } => {}
    }
    Ok(())
}
