//! What deciding costs: CPU time for each chunk, and bytes of state, of one node in a large mesh.
//!
//! One real node knows `--members` others and a manifest of `--chunks`. Askers return each chunk
//! they are granted, verified, and tell in the same message which they got elsewhere meanwhile: one
//! for each chunk that moves, as in a swarm where everybody advances alike. Who was granted nothing
//! for a while tells all the same, as pullers do. Holders grant what is asked of them, as much as
//! they have credit for. Everybody, the node too, begins with a random half of the chunks, which is
//! when sets are least regular.
//!
//! Only time inside the node counts (the thread's CPU clock, read around batches of inputs); its
//! driver's part, such as encoding messages, does not. Virtual time passes as chunks would at
//! 100 Gbit/s. State is the growth of resident memory over several nodes, divided by their number.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)] // The table is what the program is for.

use anyhow::{Context, Result};
use aquifer_core::message::{Outcome, Returned, Terms};
use aquifer_core::{
    Access, ChannelStatus, ChunkSet, GossipMessage, ManifestHash, NodeId, NodeSecret, PeerMessage, Policy,
    PublisherSecret, Release, SignedRelease, SignedStatus, Status, Time,
};
use aquifer_proto::limits::NEWS_CHUNKS;
use aquifer_proto::{Config, Input, LocalStatus, Output, ReadOutcome, Recorded};
use clap::Parser;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const CHUNK_BYTES: u32 = 4 << 20;

/// A chunk's time on the wire at 100 Gbit/s.
const CHUNK_TIME: Duration = Duration::from_nanos(335_544);

/// The agent's default upload window.
const LEASED_BYTES_MAX: u64 = 256 << 20;

/// What an asker accepts: two chunks at once of a holder, with some under way from others.
const TERMS: Terms = Terms { credit_bytes: 2 * CHUNK_BYTES as u64, flight_bytes: 8 * CHUNK_BYTES as u64 };

/// Nodes whose memory is measured together.
const NODES_FOR_STATE: u32 = 8;

/// CPU per chunk, and state, of one node's decisions.
#[derive(Clone, Copy, Debug, Parser)]
struct Options {
    /// Other nodes that the node knows
    #[arg(long, default_value_t = 4096)]
    members: u32,
    /// Chunks of the manifest
    #[arg(long, default_value_t = 250_000)]
    chunks: u32,
    /// Nodes that ask it, and as many others that it is connected to and may ask
    #[arg(long, default_value_t = 32)]
    askers: u32,
    /// Chunks to move in each measurement, at most a quarter of all: nearer the end, all that is
    /// left is missing everywhere
    #[arg(long, default_value_t = 20_000)]
    moves: u64,
    /// Most CPU seconds in the node for each measurement
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Let the node keep a record, and count its bytes
    #[arg(long)]
    on_record: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Granting,
    Pulling,
    Both,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mesh = Mesh::new(options);
    // First of all: what later measurements free would be taken instead of new memory.
    let state = mesh.state_bytes()?;
    println!(
        "one node that knows {} members and {} chunks, with {} askers and {} holders",
        options.members, options.chunks, options.askers, options.askers
    );
    println!(
        "\n{:<10} {:>9} {:>9} {:>9} {:>12} {:>10} {:>16}",
        "side", "granted", "pulled", "CPU s", "µs per chunk", "declined", "recorded B/chunk"
    );
    let mut json = Vec::new();
    for (side, name) in [(Side::Granting, "granting"), (Side::Pulling, "pulling"), (Side::Both, "both")] {
        let mut bench = Bench::new(&mesh, side);
        bench.run();
        let moves = (bench.granted + bench.pulled).max(1);
        let (cpu, recorded) = (bench.cpu.as_secs_f64(), bench.record_bytes as u64 / moves);
        let micros = cpu * 1e6 / moves as f64;
        println!(
            "{name:<10} {:>9} {:>9} {cpu:>9.3} {micros:>12.2} {:>10} {recorded:>16}",
            bench.granted, bench.pulled, bench.declined
        );
        json.push(format!("\"{name}_us_per_chunk\":{micros:.3}"));
    }
    let micros = mesh.status_micros();
    println!("\na status record heard: {micros:.1} µs");
    println!("state of a node that does both: {:.2} MiB", state as f64 / f64::from(1 << 20));
    let Options { members, chunks, askers, .. } = options;
    println!(
        "{{\"members\":{members},\"chunks\":{chunks},\"askers\":{askers},{},\"us_per_status\":{micros:.3},\"state_bytes\":{state}}}",
        json.join(",")
    );
    Ok(())
}

/// The others, and what they hold.
struct Mesh {
    options: Options,
    nodes: Vec<NodeId>,
    statuses: Vec<SignedStatus>,
    /// Later records of the same nodes.
    newer: Vec<SignedStatus>,
    index: BTreeMap<NodeId, usize>,
    half: ChunkSet,
}

impl Mesh {
    fn new(options: Options) -> Self {
        let secrets: Vec<NodeSecret> = (0..options.members).map(secret).collect();
        let nodes: Vec<NodeId> = secrets.iter().map(NodeSecret::public).collect();
        let sign = |seq| secrets.iter().map(|s| SignedStatus::sign(&status(s.public(), seq, options), s)).collect();
        let index = nodes.iter().enumerate().map(|(i, n)| (*n, i)).collect();
        let half = random_half(options.chunks, &mut SmallRng::seed_from_u64(1));
        Mesh { options, statuses: sign(1), newer: sign(2), nodes, index, half }
    }

    /// A node that knows everybody, is connected to its askers and holders, and has its half, or
    /// all of it if it is only to grant.
    fn node(&self, side: Side) -> Recorded {
        let now = Time::ZERO;
        let config = Config {
            identity: secret(u32::MAX),
            incarnation: 1,
            name: "bench".into(),
            version: String::new(),
            labels: vec![],
            channels: vec![("c".parse().expect("a channel name"), vec![publisher().public()])],
            accepted: vec![release()],
            said: Vec::new(),
            stands: Vec::new(),
            overrides: Vec::new(),
            leased_bytes_max: LEASED_BYTES_MAX,
            upload_bytes_per_s: None,
            costly: Default::default(),
            seed: 1,
        };
        let begin = if self.options.on_record { Recorded::on_record } else { Recorded::new };
        let mut node = begin(config, now);
        let local = LocalStatus { addresses: vec!["here".into()], ..LocalStatus::default() };
        node.handle(now, Input::Local(local));
        for signed in &self.statuses {
            let message = GossipMessage::Status(signed.clone());
            node.handle(now, Input::Gossip { via: self.nodes[0], token: 0, message });
            while node.poll_output().is_some() {}
        }
        let (manifest, full) = (manifest(), ChunkSet::full(self.options.chunks));
        let chunk_bytes = vec![CHUNK_BYTES; self.options.chunks as usize];
        let held = if side == Side::Granting { full.clone() } else { self.half.clone() };
        node.handle(now, Input::ManifestLoaded { manifest, chunk_bytes });
        node.handle(now, Input::Held { manifest, chunks: held });
        let connected = self.nodes.iter().take(2 * self.options.askers as usize);
        connected.for_each(|n| node.handle(now, Input::Connected { node: *n }));
        while node.poll_output().is_some() {}
        node.handle(now, Input::Wanted { manifest, chunks: full });
        node.take_record();
        node
    }

    fn ask(&self, i: usize, have: &ChunkSet) -> Input {
        let mut wanted = ChunkSet::full(self.options.chunks);
        wanted.subtract(have);
        let message = PeerMessage::Ask { manifest: manifest(), wanted, have: have.clone(), terms: TERMS };
        Input::Message { from: self.nodes[i], message }
    }

    /// CPU for one newer record of a known member.
    fn status_micros(&self) -> f64 {
        let mut node = self.node(Side::Both);
        while node.poll_output().is_some() {}
        let begin = cpu_now();
        for signed in &self.newer {
            let message = GossipMessage::Status(signed.clone());
            node.handle(Time::ZERO + Duration::from_secs(3), Input::Gossip { via: self.nodes[0], token: 0, message });
            while node.poll_output().is_some() {}
        }
        (cpu_now() - begin).as_secs_f64() * 1e6 / self.newer.len() as f64
    }

    /// Resident memory of one node, on average. Each has been asked and is asking.
    fn state_bytes(&self) -> Result<u64> {
        let build = || {
            let mut rng = SmallRng::seed_from_u64(2);
            let mut node = self.node(Side::Both);
            for i in 0..self.options.askers as usize {
                node.handle(Time::ZERO, self.ask(i, &random_half(self.options.chunks, &mut rng)));
                while node.poll_output().is_some() {}
            }
            node
        };
        // The first takes what the mesh's making left free.
        let first = build();
        let before = resident_bytes()?;
        let nodes: Vec<Recorded> = (0..NODES_FOR_STATE).map(|_| build()).collect();
        let grown = resident_bytes()?.saturating_sub(before);
        drop((first, nodes));
        Ok(grown / u64::from(NODES_FOR_STATE))
    }
}

/// One node and its peers at work.
struct Bench<'m> {
    mesh: &'m Mesh,
    node: Recorded,
    rng: SmallRng,
    now: Time,
    /// What peers have sent since the last batch.
    inputs: Vec<Input>,
    askers: Vec<Asker>,
    holders: BTreeMap<NodeId, Holder>,
    connected: BTreeSet<NodeId>,
    /// Chunks that moved in all: as many each asker got elsewhere.
    moved: u64,
    granted: u64,
    pulled: u64,
    declined: u64,
    record_bytes: usize,
    cpu: Duration,
}

/// A peer that asks the node.
struct Asker {
    has: ChunkSet,
    /// Chunks that had moved when it last spoke.
    told: u64,
}

/// A peer that the node asks.
struct Holder {
    wanted: ChunkSet,
    credit_bytes: u64,
    /// Granted and not returned.
    open_bytes: u64,
    next_lease: u64,
    /// Where it looks for the next chunk to grant.
    cursor: u32,
}

impl<'m> Bench<'m> {
    fn new(mesh: &'m Mesh, side: Side) -> Self {
        let mut rng = SmallRng::seed_from_u64(3);
        let Options { chunks, askers, .. } = mesh.options;
        let count = if side == Side::Pulling { 0 } else { askers as usize };
        let askers: Vec<Asker> = (0..count).map(|_| Asker { has: random_half(chunks, &mut rng), told: 0 }).collect();
        let inputs = askers.iter().enumerate().map(|(i, a)| mesh.ask(i, &a.has)).collect();
        let connected = mesh.nodes.iter().take(2 * mesh.options.askers as usize).copied().collect();
        Bench {
            mesh,
            node: mesh.node(side),
            rng,
            now: Time::ZERO,
            inputs,
            askers,
            holders: BTreeMap::new(),
            connected,
            moved: 0,
            granted: 0,
            pulled: 0,
            declined: 0,
            record_bytes: 0,
            cpu: Duration::ZERO,
        }
    }

    fn run(&mut self) {
        // The first asks and answers are the beginning, not what a chunk costs.
        self.batch();
        (self.granted, self.pulled, self.declined) = (0, 0, 0);
        (self.record_bytes, self.cpu) = (0, Duration::ZERO);
        let limit = Duration::from_secs_f64(self.mesh.options.seconds);
        let moves = self.mesh.options.moves.min(u64::from(self.mesh.options.chunks / 4));
        while self.granted + self.pulled < moves && self.cpu < limit {
            self.batch();
            self.tell_news();
        }
    }

    /// Tells the node all that was sent, as a driver would, then lets its peers react.
    fn batch(&mut self) {
        let inputs = std::mem::take(&mut self.inputs);
        if inputs.is_empty() {
            // Nobody moves: whatever the node waits for is next.
            self.now = self.node.poll_timeout().map_or(self.now, |(at, _)| at.max(self.now));
        }
        let mut outputs = Vec::new();
        let begin = cpu_now();
        self.wake(&mut outputs);
        for input in inputs {
            let moves = matches!(&input, Input::ReadDone { .. })
                || matches!(&input, Input::Message { message: PeerMessage::Progress { returned, .. }, .. } if !returned.is_empty());
            self.node.handle(self.now, input);
            outputs.extend(std::iter::from_fn(|| self.node.poll_output()));
            if moves {
                self.now = self.now + CHUNK_TIME;
            }
            self.wake(&mut outputs);
        }
        self.record_bytes += self.node.take_record().len();
        self.cpu += cpu_now() - begin;
        outputs.into_iter().for_each(|output| self.react(output));
    }

    fn wake(&mut self, outputs: &mut Vec<Output>) {
        if self.node.poll_timeout().is_some_and(|(at, _)| at <= self.now) {
            self.node.handle_timeout(self.now);
            outputs.extend(std::iter::from_fn(|| self.node.poll_output()));
        }
    }

    fn react(&mut self, output: Output) {
        if let Output::Grant { to, lease, chunks, .. } = output {
            chunks.into_iter().for_each(|chunk| self.read_by_asker(to, lease, chunk));
        } else if let Output::Read { op, .. } = output {
            self.pulled += 1;
            self.moved += 1;
            self.inputs.push(Input::ReadDone { op, outcome: ReadOutcome::Verified });
        } else if let Output::Send { to, message } = output {
            self.hear(to, message);
        } else if let Output::Dial { node, .. } = output
            && self.connected.insert(node)
        {
            self.inputs.push(Input::Connected { node });
        }
    }

    fn read_by_asker(&mut self, to: NodeId, lease: u64, chunk: u32) {
        let Some(&i) = self.mesh.index.get(&to) else { return };
        let outcome = if self.askers[i].has.insert(chunk) { Outcome::Verified } else { Outcome::Declined };
        match outcome == Outcome::Verified {
            true => (self.granted, self.moved) = (self.granted + 1, self.moved + 1),
            false => self.declined += 1,
        }
        self.speak(i, vec![Returned { lease, chunk, outcome }]);
    }

    fn hear(&mut self, to: NodeId, message: PeerMessage) {
        if let PeerMessage::Ask { wanted, terms, .. } = message {
            let cursor = self.rng.random_range(0..self.mesh.options.chunks);
            let new = || Holder { wanted: ChunkSet::empty(0), credit_bytes: 0, open_bytes: 0, next_lease: 1, cursor };
            let holder = self.holders.entry(to).or_insert_with(new);
            (holder.wanted, holder.credit_bytes) = (wanted, terms.credit_bytes);
        } else if let (PeerMessage::Progress { returned, taken, again, terms, .. }, Some(holder)) =
            (message, self.holders.get_mut(&to))
        {
            holder.credit_bytes = terms.credit_bytes;
            for Returned { chunk, outcome, .. } in returned {
                holder.open_bytes -= u64::from(CHUNK_BYTES);
                if outcome == Outcome::Postponed {
                    holder.wanted.insert(chunk);
                }
                self.declined += u64::from(outcome != Outcome::Verified);
            }
            for chunk in taken {
                holder.wanted.remove(chunk);
            }
            for chunk in again {
                holder.wanted.insert(chunk);
            }
        }
        self.grant(to);
    }

    /// The holder gives what it may.
    fn grant(&mut self, from: NodeId) {
        let Some(holder) = self.holders.get_mut(&from) else { return };
        while (holder.open_bytes == 0 || holder.open_bytes < holder.credit_bytes)
            && let Some(chunk) = holder.next_chunk()
        {
            holder.open_bytes += u64::from(CHUNK_BYTES);
            holder.next_lease += 1;
            let access = Access { ticket: 0, secret: [0; 32] };
            let (manifest, lease, chunks) = (manifest(), holder.next_lease, vec![chunk]);
            let message = PeerMessage::Grant { manifest, lease, ttl_ms: 30_000, chunks, access };
            self.inputs.push(Input::Message { from, message });
        }
    }

    /// Who did not speak for a while tells what it got elsewhere.
    fn tell_news(&mut self) {
        let behind = |a: &Asker| self.moved - a.told >= u64::from(NEWS_CHUNKS);
        let behind: Vec<usize> = (0..self.askers.len()).filter(|i| behind(&self.askers[*i])).collect();
        behind.into_iter().for_each(|i| self.speak(i, Vec::new()));
    }

    /// The asker gives leases back, and tells what it got elsewhere since it last spoke.
    fn speak(&mut self, i: usize, returned: Vec<Returned>) {
        let asker = &mut self.askers[i];
        let count = usize::try_from(self.moved - asker.told).unwrap_or(usize::MAX);
        asker.told = self.moved;
        let begin = self.rng.random_range(0..asker.has.len());
        let order = (begin..asker.has.len()).chain(0..begin);
        let taken: Vec<u32> = order.filter(|c| !asker.has.contains(*c)).take(count).collect();
        for chunk in &taken {
            asker.has.insert(*chunk);
        }
        let message = PeerMessage::Progress { manifest: manifest(), returned, taken, again: vec![], terms: TERMS };
        self.inputs.push(Input::Message { from: self.mesh.nodes[i], message });
    }
}

impl Holder {
    fn next_chunk(&mut self) -> Option<u32> {
        let len = self.wanted.len();
        let order = (self.cursor..len).chain(0..self.cursor.min(len));
        let chunk = order.into_iter().find(|c| self.wanted.contains(*c))?;
        self.wanted.remove(chunk);
        self.cursor = (chunk + 1) % len;
        Some(chunk)
    }
}

fn secret(i: u32) -> NodeSecret {
    let mut seed = [1; 32];
    seed[..4].copy_from_slice(&i.to_le_bytes());
    NodeSecret::from_seed(seed)
}

fn publisher() -> PublisherSecret {
    PublisherSecret::from_seed([7; 32])
}

fn manifest() -> ManifestHash {
    ManifestHash::of(b"manifest")
}

fn release() -> SignedRelease {
    let release = Release {
        channel: "c".parse().expect("a channel name"),
        seq: 1,
        manifest: manifest(),
        manifest_bytes: 8,
        rolls_back_to: None,
        policy: Policy::default(),
        created_unix_ms: 0,
        note: String::new(),
    };
    SignedRelease::sign(&release, &publisher())
}

/// A record as a real node's: two addresses, a label or two, one channel it is half way with.
fn status(node: NodeId, seq: u64, options: Options) -> Status {
    let channel = ChannelStatus {
        channel: "c".parse().expect("a channel name"),
        seq: 1,
        manifest: manifest(),
        chunks_wanted: options.chunks,
        chunks_have: options.chunks / 2,
        also: Vec::new(),
        report: None,
    };
    Status {
        node,
        incarnation: 1,
        seq,
        name: format!("node-{}", node.short()),
        addresses: vec!["/ip4/10.0.0.1/tcp/7401".into(), "/ip4/192.168.0.1/tcp/7401".into()],
        data_endpoints: vec![":7402".into()],
        labels: vec![("rack".into(), "r12".into()), ("zone".into(), "a".into())],
        channels: vec![channel],
        leases: 16,
        leases_max: 64,
        engines: 8,
        engines_ready: 0,
        interval_ms: 3000,
        leaving: false,
        draining: false,
        upload_bytes_per_s: 12_500_000_000,
        uploading_bytes_per_s: 6_000_000_000,
        download_bytes_per_s: 12_500_000_000,
        version: "0.1.0".into(),
    }
}

fn random_half(chunks: u32, rng: &mut SmallRng) -> ChunkSet {
    ChunkSet::from_indices(chunks, (0..chunks).filter(|_| rng.random()))
}

fn cpu_now() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

fn resident_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let kib = text.lines().find_map(|l| l.strip_prefix("RssAnon:")).and_then(|l| l.split_whitespace().next());
    let kib: u64 = kib.context("no RssAnon in /proc/self/status")?.parse()?;
    Ok(kib << 10)
}
