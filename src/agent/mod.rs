//! One running node: the brain (`aquifer_proto::Node`) wired to the hands (mesh, transport,
//! memory, engines).
//!
//! One task owns everything here. It waits for an event, applies it without waiting for
//! anything else, and drains the brain's outputs. What takes long (hashing, copying, disks) is
//! a job on another thread that ends in an event.

mod asked;
mod channels;
mod config;
pub(crate) mod draining;
mod endpoints;
mod engines;
mod grants;
mod handle;
mod heard;
pub(crate) mod history;
mod jobs;
mod keeping;
mod landing;
mod library;
pub(crate) mod lifecycle;
mod news;
mod node_view;
pub(crate) mod numbers;
mod operator;
mod outlet;
mod pieces;
pub(crate) mod readiness;
mod recording;
mod regions;
pub(crate) mod releasing;
mod rollouts;
mod service;
pub(crate) mod tally;
mod telling;
mod transports;
mod updates;
pub(crate) mod view;

use crate::state::StateDir;
use anyhow::{Context, Result};
use aquifer_core::{ChannelName, ChunkHash, ManifestHash, NodeId, Time};
use aquifer_engine::{ConnId, EngineEvent, EngineServer, Engines};
use aquifer_hooks::Hooks;
use aquifer_memory::{DiskStore, MemoryStore};
use aquifer_mesh::{GossipId, Mesh, MeshConfig, MeshEvent};
use aquifer_proto::forecast::Eta;
use aquifer_proto::{Config, CostlyLimit, Input, LocalStatus, OpId, Output, Rates, Recorded};
use aquifer_transport::{Completion, Encryption};
pub(crate) use config::{AgentConfig, Hold, Publish, Pull, PullWhat};
use draining::Draining;
use engines::EngineConn;
use grants::GrantTable;
use handle::Shared;
pub(crate) use handle::{Ask, Handle};
use jobs::JobDone;
use landing::{Full, Read};
use library::{Loaded, Tree};
use lifecycle::{Happening, Kind, Lifecycle};
use news::Progress;
use numbers::{Limits, Measured, Meters};
use outlet::Outlet;
use readiness::Flags;
use recording::Recording;
use regions::Gpus;
use releasing::Publication;
use service::Service;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tally::Tally;
use tokio::sync::{mpsc, oneshot, watch};
pub(crate) use transports::RdmaOptions;
use transports::Transports;
use updates::Books;
use view::{Traffic, View};

/// How often the view for people is renewed.
const VIEW_INTERVAL: Duration = Duration::from_millis(200);
/// Kinds of problems told once each; beyond that many, silence. Guess.
const TOLD_MAX: usize = 4096;
/// Goodbye is given this long to reach the neighbours.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// A started agent, seen from outside.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) view: watch::Receiver<View>,
    pub(crate) handle: Handle,
    stop: mpsc::Sender<()>,
    task: tokio::task::JoinHandle<Result<Ended>>,
}

/// How an agent's life ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Stopped,
    /// What was to be pulled is there, whole.
    Pulled(ManifestHash),
}

impl Running {
    /// Says goodbye to the mesh and waits for the end.
    pub(crate) async fn stop(self) -> Result<Ended> {
        // A closed channel means that it has ended by itself.
        let _ = self.stop.send(()).await;
        self.ended().await
    }

    /// Hands over what nobody else has, as long as that takes and the agent's grace allows; it ends by itself then.
    pub(crate) async fn drain(&self) {
        let (reply, begun) = oneshot::channel();
        if self.handle.ask(Ask::Drain { grace: None, reply }).await.is_ok() {
            // An error says that it has ended.
            let _ = begun.await;
        }
    }

    /// Waits until the agent ends by itself.
    pub(crate) async fn ended(self) -> Result<Ended> {
        self.task.await.context("the agent's task panicked")?
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }
}

/// Everything that can happen to an agent.
#[derive(Debug)]
enum Event {
    Mesh(MeshEvent),
    Engine(EngineEvent),
    Read(Completion),
    Job(JobDone),
    Ask(Ask),
    Timeout,
    View,
    Stop,
}

#[derive(Debug)]
struct Agent {
    node: Recorded,
    /// Where the record of `node` goes, if it keeps one.
    recording: Option<Recording>,
    origin: Instant,
    mesh: Mesh,
    transports: Transports,
    grants: Arc<GrantTable>,
    /// Where engines find this node.
    socket: Option<PathBuf>,
    engines: Option<Engines>,
    sessions: BTreeMap<ConnId, EngineConn>,
    /// Chunks that an engine's memory held once, and does not any more: the engine wrote there.
    spoiled: BTreeSet<(ConnId, ChunkHash)>,
    state: Option<StateDir>,
    name: String,
    labels: Vec<(String, String)>,
    http: Option<String>,
    gpus: Gpus,
    /// What is on its way out of GPUs, for others.
    outlet: Outlet,
    /// In the step that is being done.
    told_engine: bool,
    /// What the brain is to be told once engines have been told.
    books: Books,
    shadow: bool,
    hold: Hold,
    memory: MemoryStore,
    disk: Option<DiskStore>,
    tree: Option<Tree>,
    /// What to pull once nothing is under way for `tree`, and how many jobs use that.
    next_tree: Option<ManifestHash>,
    tree_jobs: usize,
    pull: Option<Pull>,
    publication: Option<Publication>,
    channels: BTreeMap<ChannelName, channels::Channel>,
    manifests: BTreeMap<ManifestHash, Loaded>,
    reads: BTreeMap<OpId, Read>,
    /// Chunks that `reads` are after: each is fetched once, also where releases share it.
    reading: BTreeSet<ChunkHash>,
    /// Releases of which chunks found no room.
    full: BTreeMap<ManifestHash, Full>,
    memory_given_back: Instant,
    /// What was shown is behind by more than words.
    news_due: bool,
    /// How to reach each holder's data plane: its latest grant's ticket, and its address.
    access: BTreeMap<NodeId, aquifer_core::Access>,
    addresses: BTreeMap<NodeId, IpAddr>,
    /// Gossip messages that the brain owes a verdict.
    tokens: BTreeMap<u64, GossipId>,
    next_token: u64,
    local: LocalStatus,
    data_endpoint: String,
    data_encryption: Encryption,
    traffic: Traffic,
    tally: Tally,
    limits: Limits,
    /// How far each channel's release is, as of the last view.
    progress: BTreeMap<ChannelName, Progress>,
    /// How fast others get theirs, in chunks.
    peer_etas: BTreeMap<(NodeId, ChannelName), Eta>,
    measured: BTreeMap<ChannelName, Measured>,
    meters: Meters,
    lifecycle: Lifecycle,
    /// What readiness was when it was told last.
    flags: Flags,
    shared: Shared,
    service: Service,
    drain_grace: Duration,
    draining: Option<Draining>,
    /// What the brain was told of them last.
    told_rates: Rates,
    /// Jobs that were started and have not ended.
    running_jobs: usize,
    /// How many events wait for this task, and how many may.
    events_waiting: (u64, u64),
    /// Problems told already, so that each is told once.
    told: BTreeSet<String>,
    /// Jobs decided on in this step.
    queued: Vec<jobs::Job>,
    jobs: mpsc::UnboundedSender<Event>,
    view: watch::Sender<View>,
    ended: Option<Ended>,
}

/// Starts a node. Errors are those of starting: a port taken, a directory in use, a bad address.
pub(crate) async fn start(config: AgentConfig) -> Result<Running> {
    // Unbounded, because a completion may come from within `submit`, on this very task; each event
    // is owed by a read or a job, and those are bounded by what may be in flight.
    let (events, received) = mpsc::unbounded_channel();
    let grants = Arc::new(GrantTable::default());
    let completed = events.clone();
    let completion = move |completion| {
        // The agent drains this as long as it lives; after it, nobody waits for the answer.
        let _ = completed.send(Event::Read(completion));
    };
    let transports = Transports::start(&config, &grants, completion)?;
    let mesh_config = MeshConfig {
        identity: config.identity.clone(),
        mesh_key: config.mesh_key.clone(),
        listen: config.listen.clone(),
        bootstrap: config.peers.clone(),
        mdns: config.mdns,
        external: config.external.clone(),
    };
    let (mesh, mesh_events) = aquifer_mesh::start(mesh_config).await?;
    let (engines, engine_events) = match &config.socket {
        Some(path) => {
            let (engines, events) = EngineServer::bind(path)?.run();
            tracing::info!("engines: {}", path.display());
            (Some(engines), Some(events))
        }
        None => (None, None),
    };
    let disk = config.store.as_ref().map(|dir| DiskStore::open(dir, config.store_bytes)).transpose()?;
    let (view, view_receiver) = watch::channel(View::default());
    let (stop, stopped) = mpsc::channel(1);
    let (asks, asked) = mpsc::channel(handle::ASKS_MAX);
    let agent = Agent::new(config, mesh, transports, grants, engines, disk, events, view)?;
    let handle = agent.handle(view_receiver.clone(), asks);
    let task = tokio::spawn(agent.run(received, mesh_events, engine_events, (asked, stopped)));
    Ok(Running { view: view_receiver, handle, stop, task })
}

impl Agent {
    #[expect(clippy::too_many_arguments, reason = "the one place where the parts meet")]
    fn new(
        mut config: AgentConfig,
        mesh: Mesh,
        transports: Transports,
        grants: Arc<GrantTable>,
        engines: Option<Engines>,
        disk: Option<DiskStore>,
        jobs: mpsc::UnboundedSender<Event>,
        view: watch::Sender<View>,
    ) -> Result<Self> {
        let hooks = Hooks::start(std::mem::take(&mut config.hooks), config.state.as_ref().map(StateDir::spool))?;
        let meters = Meters::new(crate::http::help)?;
        let shared = Shared {
            readiness: watch::channel(readiness::Readiness::default()).0,
            numbers: watch::channel(numbers::Numbers::default()).0,
            events: Arc::new(lifecycle::EventLog::new(&config.identity.public(), config.incarnation)),
            hooks: Arc::new(handle::RunningHooks::new(hooks)),
        };
        let state = config.state.as_ref();
        let accepted = state.map(StateDir::releases).unwrap_or_default();
        let said = state.map(StateDir::statements).unwrap_or_default();
        let stand = |channel: &ChannelName| Some((channel.clone(), state?.stand(channel)?));
        let stands = config.channels.iter().filter_map(|(channel, _)| stand(channel)).collect();
        let seed = u64::from_le_bytes(crate::keys::random_bytes()?[..8].try_into()?);
        if let Some(publish) = &config.publish {
            let key = publish.secret.public();
            match config.channels.iter_mut().find(|(c, _)| *c == publish.channel) {
                Some((_, trusted)) => trusted.push(key),
                None => config.channels.push((publish.channel.clone(), vec![key])),
            }
        }
        let port = transports.local_addr().port();
        let data_endpoint = endpoints::announced(config.data_advertise.as_deref(), port, config.data_encryption);
        let origin = Instant::now();
        let recording = config.record.as_deref().map(Recording::start).transpose()?;
        let begin = if recording.is_some() { Recorded::on_record } else { Recorded::new };
        let node = begin(
            Config {
                identity: config.identity,
                incarnation: config.incarnation,
                name: config.name.clone(),
                version: env!("CARGO_PKG_VERSION").to_string(),
                labels: config.labels.clone(),
                channels: config.channels.clone(),
                accepted,
                said,
                stands,
                overrides: config.overrides,
                leased_bytes_max: config.upload_bytes,
                upload_bytes_per_s: config.upload_bytes_per_s,
                costly: CostlyLimit {
                    bytes_per_s: config.gpu_upload_bytes_per_s,
                    leased_bytes_max: outlet::PROMISED_BYTES_MAX,
                },
                seed,
            },
            Time::ZERO,
        );
        meters.begin(config.channels.iter().map(|(channel, _)| channel));
        let channels = config.channels.iter().map(|(c, _)| (c.clone(), channels::Channel::default())).collect();
        let publication = config.publish.map(|p| Publication::new(p, config.peers.is_empty() && !config.mdns));
        Ok(Agent {
            node,
            recording,
            origin,
            mesh,
            transports,
            grants,
            socket: config.socket,
            engines,
            sessions: BTreeMap::new(),
            state: config.state,
            name: config.name,
            labels: config.labels,
            http: config.http,
            gpus: Gpus::new(config.twin_gpus, config.twin_gpu_bytes, config.twin_gpu_bytes_per_s),
            outlet: Outlet::new(outlet::ROOM_BYTES),
            told_engine: false,
            books: Books::default(),
            shadow: config.shadow,
            hold: config.hold,
            memory: MemoryStore::new(config.memory_bytes),
            disk,
            tree: None,
            next_tree: None,
            tree_jobs: 0,
            spoiled: BTreeSet::new(),
            pull: config.pull,
            publication,
            channels,
            manifests: BTreeMap::new(),
            reads: BTreeMap::new(),
            reading: BTreeSet::new(),
            full: BTreeMap::new(),
            memory_given_back: Instant::now(),
            news_due: false,
            access: BTreeMap::new(),
            addresses: BTreeMap::new(),
            tokens: BTreeMap::new(),
            next_token: 0,
            local: LocalStatus::default(),
            data_endpoint,
            data_encryption: config.data_encryption,
            traffic: Traffic::default(),
            tally: Tally::default(),
            limits: Limits {
                upload_bytes: config.upload_bytes,
                upload_bytes_per_s: config.upload_bytes_per_s,
                memory_bytes: config.memory_bytes,
                store_bytes: config.store_bytes,
            },
            progress: BTreeMap::new(),
            peer_etas: BTreeMap::new(),
            measured: BTreeMap::new(),
            meters,
            lifecycle: Lifecycle::default(),
            flags: Flags::default(),
            shared,
            service: Service::new(),
            drain_grace: config.drain_grace,
            draining: None,
            told_rates: Rates::default(),
            running_jobs: 0,
            events_waiting: (0, 0),
            told: BTreeSet::new(),
            queued: Vec::new(),
            jobs,
            view,
            ended: None,
        })
    }

    async fn run(
        mut self,
        mut received: mpsc::UnboundedReceiver<Event>,
        mut mesh_events: mpsc::Receiver<MeshEvent>,
        mut engine_events: Option<mpsc::Receiver<EngineEvent>>,
        (mut asked, mut stopped): (mpsc::Receiver<Ask>, mpsc::Receiver<()>),
    ) -> Result<Ended> {
        self.begin()?;
        self.service.started();
        let mut view_tick = tokio::time::interval(VIEW_INTERVAL);
        view_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while self.ended.is_none() {
            self.drain()?;
            self.record();
            // Of many nodes and chunks a view takes milliseconds: no engine that is paused waits for it.
            if self.news_due && !self.has_paused_engine() {
                self.rest_for_engines().await;
                self.renew_news();
            }
            self.events_waiting = ((received.len() + mesh_events.len()) as u64, mesh_events.max_capacity() as u64);
            let timeout = self.node.poll_timeout().map(|(at, _)| self.origin + at.since(Time::ZERO));
            let event = tokio::select! {
                Some(event) = received.recv() => event,
                event = mesh_events.recv() => Event::Mesh(event.context("the mesh's task ended")?),
                Some(event) = next(&mut engine_events) => Event::Engine(event),
                () = sleep_until(timeout) => Event::Timeout,
                _ = view_tick.tick() => Event::View,
                Some(ask) = asked.recv() => Event::Ask(ask),
                _ = stopped.recv() => Event::Stop,
            };
            self.apply(event)?;
            self.rest_for_engines().await;
        }
        drop((received, asked));
        self.service.stops();
        // Whoever watches sees how it ended, not how it was at the last tick.
        self.renew_news();
        self.leave().await;
        self.tell(Happening { event: Kind::Left, ..Happening::default() });
        self.flush_hooks().await;
        if let Some(socket) = &self.socket {
            // The server removes it when its task ends, but the process may be faster. Until then its
            // lock is held, so it is ours.
            let _ = std::fs::remove_file(socket);
        }
        Ok(self.ended.take().unwrap_or(Ended::Stopped))
    }

    fn apply(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Mesh(event) => self.on_mesh(event),
            Event::Engine(event) => self.on_engine(event),
            Event::Read(completion) => self.on_read(completion),
            Event::Job(done) => {
                self.running_jobs = self.running_jobs.saturating_sub(1);
                self.on_job(done)?;
            }
            Event::Ask(ask) => self.on_ask(ask),
            Event::Timeout => {
                let now = self.now();
                self.node.handle_timeout(now);
            }
            Event::View => self.renew_view()?,
            Event::Stop => self.ended = Some(Ended::Stopped),
        }
        Ok(())
    }

    fn handle(&self, view: watch::Receiver<View>, asks: mpsc::Sender<Ask>) -> Handle {
        Handle {
            view,
            readiness: self.shared.readiness.subscribe(),
            numbers: self.shared.numbers.subscribe(),
            meters: self.meters.clone(),
            events: self.shared.events.clone(),
            hooks: self.shared.hooks.clone(),
            asks,
            origin: self.origin,
        }
    }

    fn now(&self) -> Time {
        Time::from_origin(self.origin.elapsed())
    }

    /// Who writes to engines was woken on this thread, and runs there as soon as this task rests: an engine that is
    /// paused waits for it.
    async fn rest_for_engines(&mut self) {
        if std::mem::take(&mut self.told_engine) {
            tokio::task::yield_now().await;
        }
    }

    fn input(&mut self, input: Input) {
        let now = self.now();
        self.node.handle(now, input);
    }

    fn record(&mut self) {
        if let Some(recording) = &mut self.recording {
            recording.write(self.node.take_record());
        }
    }

    /// Carries out what the brain decided. Outputs may cause inputs, which cause outputs.
    fn drain(&mut self) -> Result<()> {
        loop {
            self.do_books();
            while let Some(output) = self.node.poll_output() {
                self.carry_out(output)?;
            }
            let said = self.say_what_is_decided();
            if !self.bring_out()? && !said && self.books == Books::default() {
                break;
            }
        }
        self.tell_standing();
        self.renew_readiness(false);
        self.start_jobs();
        if self.next_tree.is_some() && self.tree.is_some() {
            self.turn_tree()?;
        }
        Ok(())
    }

    fn carry_out(&mut self, output: Output) -> Result<()> {
        match output {
            Output::Send { to, message } => self.mesh.send(to, message),
            Output::Gossip(message) => self.mesh.gossip(message),
            Output::Verdict { token, verdict } => self.verdict(token, verdict),
            Output::Dial { node, addresses } => self.mesh.dial(node, addresses),
            Output::Grant { to, manifest, lease, ttl, chunks } => self.grant(to, manifest, lease, ttl, chunks)?,
            Output::LeaseClosed { lease, chunk } => {
                tracing::trace!("closed {chunk} under lease {lease}");
                self.grants.close(lease, chunk);
                self.outlet.close(lease, chunk);
            }
            Output::Read { op, peer, manifest, lease, chunk } => self.start_read(op, peer, manifest, lease, chunk),
            Output::CancelRead { op } => self.cancel_read(op),
            Output::ReleaseAccepted { signed, release } => self.on_release(&signed, &release)?,
            Output::StatementAccepted { signed } => self.on_statement(&signed)?,
            Output::Stand { channel, stand } => self.on_stand(&channel, &stand)?,
            Output::Order { engine, order, .. } => self.on_order(ConnId(engine), order),
            Output::ManifestFetched { manifest, bytes } => self.on_manifest_fetched(manifest, bytes)?,
            Output::ManifestAsked { to, manifest, offset } => self.send_manifest(to, manifest, offset),
            Output::Hydrated { manifest } => self.on_hydrated(manifest),
            Output::Recheck { manifest, chunk, reader } => self.recheck(manifest, chunk, reader),
            Output::Drained => self.on_drained(),
            Output::Notice(notice) => self.on_notice(notice),
        }
        Ok(())
    }

    /// Runs `tell` the first time it is called with this `key`.
    fn tell_once(&mut self, key: String, tell: impl FnOnce()) {
        if self.told.len() < TOLD_MAX && self.told.insert(key) {
            tell();
        }
    }

    async fn leave(&mut self) {
        self.input(Input::Leave);
        while let Some(output) = self.node.poll_output() {
            // The rest is of no more use to a node that goes.
            if let Output::Send { to, message } = output {
                self.mesh.send(to, message);
            } else if let Output::Gossip(message) = output {
                self.mesh.gossip(message);
            }
        }
        self.record();
        if tokio::time::timeout(LEAVE_TIME, self.mesh.clone().shutdown()).await.is_err() {
            tracing::debug!("the mesh did not shut down within {LEAVE_TIME:?}");
        }
        self.transports.shutdown();
        if let Some(recording) = self.recording.take() {
            recording.finish();
        }
    }
}

async fn next(events: &mut Option<mpsc::Receiver<EngineEvent>>) -> Option<EngineEvent> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
