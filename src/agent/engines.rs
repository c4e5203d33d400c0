//! Engines of this node: their registrations, and carrying out what their sessions decide.

use super::jobs::Job;
use super::lifecycle::Kind;
use super::pieces::{Memory, Source, Staged};
use super::regions::{Region, Regions};
use super::updates::Books;
use super::{Agent, Hold};
use crate::errors::reasons;
use aquifer_core::{Binding, ChannelName, ChunkHash, ChunkSet, ManifestHash, Report, Row, TensorEntry};
use aquifer_cuda::{DeviceSpan, DeviceWorker};
use aquifer_engine::protocol::{
    Conduct, ErrorReply, Hello, ManifestReply, PROTOCOL_VERSION, RegionSpec, ReleaseInfo, Request, RowSpec, Stage,
    Standing, TensorInfo, Welcome, code,
};
use aquifer_engine::{ConnId, EngineEvent, ManifestPage};
use aquifer_memory::Span;
use aquifer_proto::rollout::{Facts, Order};
use aquifer_proto::{Asked, EngineInput, EngineOutput, EngineSession, Input, Plan, Target, Tell};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most regions of one engine. Guess: one for each tensor of a large model would fit.
const REGIONS_MAX: usize = 65_536;
/// Most bindings of one engine. Guess: two for each tensor of a mixture of experts with 1.5 million.
const BINDINGS_MAX: usize = 3 << 20;

#[derive(Debug)]
pub(super) struct EngineConn {
    pub(super) pid: u32,
    pub(super) name: String,
    /// None until it has said hello.
    pub(super) channel: Option<ChannelName>,
    pub(super) session: EngineSession,
    /// Where the node stands, as it was told last, and the report that this was made of.
    pub(super) standing: Option<(Report, Standing)>,
    /// What it was told to do last, and how it was as the brain knows it.
    pub(super) order: Option<Order>,
    pub(super) told: Option<Facts>,
    /// A release that its bindings do not fit.
    pub(super) unfit: Option<ManifestHash>,
    said_serving: Option<ManifestHash>,
    pub(super) conduct: Conduct,
    /// Since when it owes an answer, if it owes one.
    pub(super) asked_at: Instant,
    /// Since when it answers no requests, if it said so.
    pub(super) paused_at: Option<Instant>,
    /// Shared with the jobs that write to them.
    pub(super) regions: Arc<Regions>,
    /// Chunks that are to be copied to a GPU, when those before them are: together they take less time.
    pub(super) to_copy: Vec<(u32, Source)>,
    pub(super) copying: bool,
    /// What lies on GPUs of a release that is about to be applied.
    pub(super) staged: Option<Arc<Staged>>,
    /// Of what is being applied: somebody was reading from where it goes.
    pub(super) was_read: bool,
    all_fresh: bool,
    pub(super) bindings: Vec<Binding>,
    pub(super) rows: Vec<Row>,
    /// Requests for a manifest that is not here yet, and from which tensor on, if in pages.
    waiting: Vec<(u64, Option<u32>)>,
    pub(super) progress: Option<(Instant, u64)>,
}

impl EngineConn {
    /// Whether there may be so many bindings more.
    fn check_count(&self, more: usize) -> Result<(), ErrorReply> {
        let count = self.bindings.len() + self.rows.iter().map(Row::len).sum::<usize>() + more;
        match count > BINDINGS_MAX {
            true => Err(ErrorReply::new("too-many-bindings", format!("more than {BINDINGS_MAX} bindings"))),
            false => Ok(()),
        }
    }

    pub(super) fn region_slice(&self, region: u32, range: Range<u64>) -> Option<Span> {
        self.regions.get(&region)?.host()?.slice(range).ok()
    }

    /// The same where it is on a GPU, and who works there.
    pub(super) fn gpu_slice(&self, region: u32, range: Range<u64>) -> Option<(DeviceSpan, &Arc<dyn DeviceWorker>)> {
        self.regions.get(&region)?.gpu(range)
    }

    pub(super) fn memory(&self, target: &Target) -> Memory {
        let (plan, layout) = (target.plan.clone(), target.layout.clone());
        Memory { plan, layout, regions: self.regions.clone() }
    }

    /// Then nobody else reads from where it lies.
    pub(super) fn regions_are_gpus(&self) -> bool {
        self.regions.values().all(|region| region.host().is_none())
    }

    pub(super) fn has_gpu(&self) -> bool {
        self.regions.values().any(|region| region.host().is_none())
    }
}

pub(super) type Reply = Result<Value, ErrorReply>;

impl Agent {
    pub(super) fn on_engine(&mut self, event: EngineEvent) {
        match event {
            EngineEvent::Opened { conn, pid, .. } => {
                let pid = pid.and_then(|p| u32::try_from(p).ok()).unwrap_or(0);
                let fresh = EngineConn {
                    pid,
                    name: format!("pid-{pid}"),
                    channel: None,
                    session: EngineSession::default(),
                    standing: None,
                    order: None,
                    told: None,
                    unfit: None,
                    said_serving: None,
                    conduct: Conduct::default(),
                    asked_at: Instant::now(),
                    paused_at: None,
                    regions: Arc::default(),
                    to_copy: Vec::new(),
                    copying: false,
                    staged: None,
                    was_read: false,
                    all_fresh: true,
                    bindings: Vec::new(),
                    rows: Vec::new(),
                    waiting: Vec::new(),
                    progress: None,
                };
                self.sessions.insert(conn, fresh);
            }
            EngineEvent::Request { conn, id, request, fd } => {
                if let Some(reply) = self.on_request(conn, id, request, fd)
                    && let Some(engines) = &self.engines
                {
                    engines.reply(conn, id, reply);
                }
            }
            EngineEvent::Closed { conn } => self.on_engine_closed(conn),
        }
    }

    /// None if the reply comes later.
    fn on_request(&mut self, conn: ConnId, id: u64, request: Request, fd: Option<OwnedFd>) -> Option<Reply> {
        match request {
            Request::Status => {
                self.count_sent();
                let view = serde_json::to_value(self.view());
                return Some(view.map_err(|e| ErrorReply::new(code::TOO_LARGE, e.to_string())));
            }
            Request::Drain(drain) => {
                self.drain_within(drain.grace_ms.map(Duration::from_millis));
                self.answer_when_drained(conn, id);
                return None;
            }
            Request::Releases(asked) => return Some(self.show_releases(&asked)),
            Request::Draft(draft) => return Some(self.on_draft(draft)),
            Request::Announce(announce) => return Some(self.on_announce(&announce)),
            Request::Word(asked) => return Some(self.on_word(&asked)),
            Request::Hello(hello) => return Some(self.on_hello(conn, hello)),
            _ if self.sessions.get(&conn).is_none_or(|c| c.channel.is_none()) => {
                return Some(Err(ErrorReply::new(code::HELLO, "say hello first")));
            }
            Request::Conduct(conduct) => self.sessions.get_mut(&conn)?.conduct = conduct,
            Request::Manifest { from } => {
                self.sessions.get_mut(&conn)?.waiting.push((id, from));
                let channel = self.sessions.get(&conn)?.channel.clone()?;
                self.answer_waiting_engines(&channel);
                return None;
            }
            Request::Region(spec) => {
                if let Err(refusal) = self.check_region(conn, &spec) {
                    return Some(Err(refusal));
                }
                self.job(Job::OpenRegion { conn, request: id, spec, fd, gpus: self.gpus.clone() });
                return None;
            }
            Request::Bind { bindings } => {
                let bindings = bindings.into_iter().map(Binding::from).collect();
                return Some(self.on_bind(conn, bindings));
            }
            Request::BindRow(spec) => return Some(self.on_bind_row(conn, spec)),
            Request::Hydrate => self.on_hydrate(conn),
            Request::Paused { manifest } => {
                self.sessions.get_mut(&conn)?.paused_at = Some(Instant::now());
                self.engine_input(conn, EngineInput::Paused { manifest });
            }
            Request::Checked { manifest } => {
                self.engine_input(conn, EngineInput::Checked { manifest, result: Ok(()) });
            }
            Request::Resumed { manifest } => {
                self.measure_pause(conn);
                self.engine_input(conn, EngineInput::Resumed { manifest });
            }
            Request::Refused(refusal) => {
                let name = &self.sessions.get(&conn)?.name;
                tracing::warn!("engine {name} refused {}: {}", refusal.manifest.short(), refusal.message);
                let asked = match refusal.stage {
                    Stage::Pause => Asked::Pause,
                    Stage::Check => Asked::Check,
                    Stage::Resume => Asked::Resume,
                };
                let (manifest, reason) = (refusal.manifest, refusal.message);
                self.engine_input(conn, EngineInput::Refused { asked, manifest, reason });
            }
        }
        Some(Ok(json!({})))
    }

    fn on_hello(&mut self, conn: ConnId, hello: Hello) -> Reply {
        if hello.protocol != PROTOCOL_VERSION {
            let text = format!(
                "the engine speaks protocol {}, this agent {PROTOCOL_VERSION}: use the same release of Aquifer",
                hello.protocol
            );
            return Err(ErrorReply::new(code::PROTOCOL_VERSION, text));
        }
        if !self.channels.contains_key(&hello.channel) || self.hold == Hold::Own {
            let known: Vec<_> = self.channels.keys().map(ChannelName::as_str).collect();
            let text = format!(
                "this agent does not follow channel '{}' (it follows: {}): start it with --channel {}",
                hello.channel,
                if known.is_empty() { "none".into() } else { known.join(", ") },
                hello.channel
            );
            return Err(ErrorReply::new("unknown-channel", text));
        }
        let Some(entry) = self.sessions.get_mut(&conn) else {
            return Err(ErrorReply::new(code::HELLO, "the connection is gone"));
        };
        if entry.channel.is_some() {
            return Err(ErrorReply::new(code::HELLO, "hello was said already"));
        }
        tracing::info!("engine {} (pid {}) is here, for {}", hello.name, hello.pid, hello.channel);
        let (name, channel) = (hello.name, hello.channel);
        entry.name = name.clone();
        entry.pid = hello.pid;
        entry.channel = Some(channel.clone());
        entry.said_serving = hello.serving;
        entry.conduct = hello.conduct;
        let welcome = Welcome {
            node: self.node.id(),
            agent_name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_string(),
        };
        self.count_engines();
        self.tell_of_engine(Kind::EngineJoined, &name, &channel);
        serde_json::to_value(welcome).map_err(|e| ErrorReply::new(code::TOO_LARGE, e.to_string()))
    }

    fn check_region(&mut self, conn: ConnId, spec: &RegionSpec) -> Result<(), ErrorReply> {
        let bad = |text: String| Err(ErrorReply::new(code::BAD_REGION, text));
        let entry = self.registering(conn)?;
        if entry.regions.contains_key(&spec.region) {
            return bad(format!("region {} is registered already", spec.region));
        }
        match entry.regions.len() < REGIONS_MAX {
            true => Ok(()),
            false => bad(format!("more than {REGIONS_MAX} regions: put several tensors into one")),
        }
    }

    pub(super) fn on_region_opened(
        &mut self,
        conn: ConnId,
        request: u64,
        spec: &RegionSpec,
        result: anyhow::Result<Region>,
    ) {
        // It may have gone on without waiting for the answer.
        let reply = self.check_region(conn, spec).and_then(|()| {
            let refused = |error: &_| format!("region {}: {}", spec.region, reasons(error));
            let region = result.map_err(|error| ErrorReply::new(code::BAD_REGION, refused(&error)))?;
            let entry = self.registering(conn)?;
            Arc::make_mut(&mut entry.regions).insert(spec.region, region);
            entry.all_fresh &= spec.fresh;
            Ok(json!({}))
        });
        if let Some(engines) = &self.engines {
            engines.reply(conn, request, reply);
        }
    }

    fn on_bind(&mut self, conn: ConnId, bindings: Vec<Binding>) -> Reply {
        let current = self.sessions.get(&conn).and_then(|c| self.current_manifest(c.channel.as_ref()?));
        let loaded = current.and_then(|m| self.manifests.get(&m)).map(|l| (l.manifest.clone(), l.layout.clone()));
        let entry = self.registering(conn)?;
        entry.check_count(bindings.len())?;
        if let Some((manifest, layout)) = loaded {
            // Told now rather than at hydration: the caller is at the line that is wrong.
            Plan::of(&manifest, &layout, &bindings, &[], &region_bytes(&entry.regions))
                .map_err(|e| ErrorReply::new("bad-binding", e.to_string()))?;
        }
        entry.bindings.extend(bindings);
        Ok(json!({}))
    }

    fn on_bind_row(&mut self, conn: ConnId, spec: RowSpec) -> Reply {
        let bad = |text: String| ErrorReply::new("bad-binding", text);
        let manifest = self.manifests.get(&spec.manifest).map(|loaded| loaded.manifest.clone());
        let entry = self.registering(conn)?;
        let manifest = manifest.ok_or_else(|| {
            let text = format!("manifest {} is not here: bind its tensors one by one", spec.manifest.short());
            ErrorReply::new(code::UNKNOWN_MANIFEST, text)
        })?;
        let region = entry.regions.get(&spec.region);
        let region_bytes = region.ok_or_else(|| bad(format!("region {} was never registered", spec.region)))?.len();
        let all = || vec![(0, u32::try_from(manifest.tensors().len()).unwrap_or(u32::MAX))];
        let tensors = spec.tensors.unwrap_or_else(all).into_iter().map(|(from, to)| from..to).collect();
        let row = Row::new(manifest, tensors, spec.region, spec.offset, spec.align).map_err(bad)?;
        if row.end() > region_bytes {
            let text = format!("reaches byte {} of region {}, which has {region_bytes}", row.end(), spec.region);
            return Err(bad(text));
        }
        entry.check_count(row.len())?;
        entry.rows.push(row);
        Ok(json!({}))
    }

    fn on_hydrate(&mut self, conn: ConnId) {
        let Some(entry) = self.sessions.get_mut(&conn) else { return };
        let (serving, fresh) = (entry.said_serving, entry.all_fresh);
        let channel = entry.channel.clone();
        entry.session.handle(EngineInput::Hydrate { serving, fresh });
        if let Some(channel) = channel {
            self.report_engine(conn);
            self.obey_all(&channel);
        }
    }

    fn on_engine_closed(&mut self, conn: ConnId) {
        let Some(entry) = self.sessions.remove(&conn) else { return };
        let Some(channel) = entry.channel else { return };
        tracing::info!("engine {} (pid {}), for {channel}, is gone", entry.name, entry.pid);
        self.tell_of_engine(Kind::EngineLeft, &entry.name, &channel);
        self.forget_pauses(&channel, &entry.name);
        self.spoiled.retain(|(id, _)| *id != conn);
        if entry.told.is_some() {
            self.input(Input::EngineGone { channel, engine: conn.0 });
        }
        self.refresh_all();
        self.tidy();
        self.count_engines();
    }

    pub(super) fn engine_input(&mut self, conn: ConnId, input: EngineInput) {
        if let Some(entry) = self.sessions.get_mut(&conn) {
            entry.session.handle(input);
            self.drain_engine(conn);
        }
    }

    pub(super) fn answer_waiting_engines(&mut self, channel: &ChannelName) {
        let Some((release, publisher)) = self.channels.get(channel).and_then(|c| c.release.clone()) else { return };
        let Some(loaded) = self.manifests.get(&release.manifest).filter(|l| l.checked) else { return };
        let waiting = |c: &EngineConn| c.channel.as_ref() == Some(channel) && !c.waiting.is_empty();
        let release = ReleaseInfo::new(&release, publisher);
        let info = |t: &TensorEntry| TensorInfo {
            name: t.name.clone(),
            dtype: t.dtype.name().to_string(),
            shape: t.shape.clone(),
            bytes: t.bytes(),
        };
        let all = || loaded.manifest.tensors().iter().map(info).collect();
        let Some(engines) = &self.engines else { return };
        for (conn, entry) in self.sessions.iter_mut().filter(|(_, c)| waiting(c)) {
            for (id, from) in entry.waiting.drain(..) {
                let release = release.clone();
                match from {
                    Some(from) => engines.reply_page(*conn, id, &ManifestPage::of(release, &loaded.manifest, from)),
                    None => engines.reply_manifest(*conn, id, &ManifestReply { release, tensors: all() }),
                }
            }
        }
    }

    /// Answers those that wait for a manifest that cannot be used.
    pub(super) fn refuse_waiting_engines(&mut self, channel: &ChannelName, problem: &str) {
        let Some(engines) = &self.engines else { return };
        for (id, conn) in self.sessions.iter_mut().filter(|(_, c)| c.channel.as_ref() == Some(channel)) {
            for (request, _) in conn.waiting.drain(..) {
                engines.reply(*id, request, Err(ErrorReply::new("bad-release", problem)));
            }
        }
    }

    /// A chunk came to lie on this node: in its store, or in an engine's memory.
    pub(super) fn offer_to_engines(&mut self, manifest: ManifestHash, chunk: u32) {
        let Some(loaded) = self.manifests.get(&manifest) else { return };
        let (hash, len) = (loaded.layout.chunk(chunk).hash, loaded.layout.len());
        let mut offers = Vec::new();
        for (id, conn) in &self.sessions {
            let Some(target) = conn.session.target() else { continue };
            let (index, len) = match target.manifest == manifest {
                true => (Some(chunk), len),
                false => (target.layout.index_of(&hash), target.layout.len()),
            };
            if let Some(index) = index.filter(|i| conn.session.is_gathering(&target.manifest, *i)) {
                offers.push((*id, ChunkSet::from_indices(len, [index])));
            }
        }
        for (conn, chunks) in offers {
            self.engine_input(conn, EngineInput::Available { chunks });
        }
    }

    /// What was found in one engine's memory is what another may be waiting for, and is not fetched any more.
    fn feed_engines(&mut self) {
        let conns: Vec<ConnId> = self.sessions.keys().copied().collect();
        conns.into_iter().for_each(|conn| self.feed_engine(conn));
    }

    /// Offers an engine everything it waits for that lies on this node.
    pub(super) fn feed_engine(&mut self, conn: ConnId) {
        let Some(entry) = self.sessions.get(&conn) else { return };
        let Some(target) = entry.session.target().cloned() else { return };
        let Some(needs) = entry.session.needs() else { return };
        let manifest = target.manifest;
        let gathering = needs.iter().filter(|c| entry.session.is_gathering(&manifest, *c)).collect::<Vec<_>>();
        let mut chunks = ChunkSet::empty(target.layout.len());
        for chunk in gathering {
            if self.has_source(conn, &manifest, chunk) {
                chunks.insert(chunk);
            } else {
                self.bring_home(conn, &manifest, chunk);
            }
        }
        if !chunks.is_empty() {
            self.engine_input(conn, EngineInput::Available { chunks });
        }
    }

    fn drain_engine(&mut self, conn: ConnId) {
        while let Some(output) = self.sessions.get_mut(&conn).and_then(|c| c.session.poll_output()) {
            self.carry_out_engine(conn, output);
        }
        self.report_engine(conn);
    }

    fn carry_out_engine(&mut self, conn: ConnId, output: EngineOutput) {
        let Some(entry) = self.sessions.get(&conn) else { return };
        let Some(channel) = entry.channel.clone() else { return };
        let target = entry.session.target().cloned();
        match (output, target) {
            (EngineOutput::Scan, Some(target)) => {
                let memory = entry.memory(&target);
                self.job(Job::Scan { conn, memory });
            }
            (EngineOutput::Copy { chunk }, Some(target)) => match self.source(conn, &target.manifest, chunk) {
                Some(source) => self.copy(conn, &target, chunk, source),
                None => {
                    self.engine_input(conn, EngineInput::Copied { chunk, ok: false });
                    self.discard(target.manifest, chunk);
                }
            },
            (EngineOutput::Apply { chunks }, Some(target)) => match self.sources_of_update(conn, &target, &chunks) {
                Some(sources) => self.apply_update(conn, &target, sources),
                None => {
                    let gone = chunks.iter().filter(|c| !self.has_source(conn, &target.manifest, *c));
                    let gone: Vec<u32> = gone.collect();
                    gone.into_iter().for_each(|c| self.discard(target.manifest, c));
                    self.engine_input(conn, EngineInput::Applied { ok: false });
                }
            },
            (EngineOutput::WantsChanged, _) => {
                self.drop_staged(conn);
                self.refresh_all();
                self.feed_engines();
                self.tidy();
                self.count_engines();
            }
            // Others read copies of what is there, so nothing changes for them at once; and the engine may be waiting.
            // What is promised of it meanwhile is found to be gone when it is to be brought out.
            (EngineOutput::PlacesChanged, _) if entry.regions_are_gpus() => self.books.count = true,
            // Nobody had a lease over what is overwritten; whoever is promised it meanwhile does not get it.
            (EngineOutput::PlacesChanged, _) if entry.session.phase() == "applying" && !entry.was_read => {
                self.books.count = true;
            }
            (EngineOutput::PlacesChanged, _) => self.books.all = true,
            (EngineOutput::Prepare { chunks, keep }, Some(target)) => self.prepare(conn, &target, &chunks, &keep),
            (EngineOutput::Tell(Tell::Check { manifest }), _) if !entry.conduct.checks => {
                self.engine_input(conn, EngineInput::Checked { manifest, result: Ok(()) });
            }
            (EngineOutput::Tell(tell), _) => self.tell_engine(conn, &channel, tell),
            (
                EngineOutput::Scan
                | EngineOutput::Copy { .. }
                | EngineOutput::Prepare { .. }
                | EngineOutput::Apply { .. },
                None,
            ) => {}
        }
    }

    /// Where to copy a chunk from for this engine. Never from its own memory, which is about to
    /// be overwritten: such a chunk is first put into the store.
    pub(super) fn source(&mut self, conn: ConnId, manifest: &ManifestHash, chunk: u32) -> Option<Source> {
        let (hash, len) = {
            let c = self.manifests.get(manifest)?.layout.chunk(chunk);
            (c.hash, u64::from(c.len))
        };
        // What is on a GPU is not to come from the host once more, if it can come directly.
        let on_gpu = self.on_another_gpu(conn, &hash);
        let goes_to = self.sessions.get(&conn)?.regions.values().find_map(Region::worker);
        if let (Some((span, worker)), Some(goes_to)) = (&on_gpu, goes_to)
            && goes_to.reaches(span)
        {
            return Some(Source::Gpu(span.clone(), worker.clone(), hash));
        }
        if let Some(span) = self.memory.get(&hash) {
            return Some(Source::Store(span));
        }
        if let Some(disk) = self.disk.as_ref().filter(|d| d.contains(&hash)) {
            return Some(Source::Disk(disk.clone(), hash));
        }
        let other = self.sessions.keys().filter(|id| **id != conn).find_map(|id| self.in_region(*id, &hash));
        if let Some(span) = other {
            return Some(Source::Region(span, hash));
        }
        if let Some((span, worker)) = on_gpu {
            return Some(Source::Gpu(span, worker, hash));
        }
        let own = self.in_region(conn, &hash)?;
        let reservation = self.memory.reserve(hash, len).ok()?;
        own.copy_to(0, reservation.span(), 0, len).ok()?;
        if reservation.span().hash().ok()? != hash {
            return None;
        }
        Some(Source::Store(reservation.commit().ok()?))
    }

    /// Whether [`Agent::source`] would find one, for as much as can be told without reading.
    pub(super) fn has_source(&self, conn: ConnId, manifest: &ManifestHash, chunk: u32) -> bool {
        let Some(hash) = self.manifests.get(manifest).map(|l| l.layout.chunk(chunk).hash) else { return false };
        self.memory.contains(&hash)
            || self.on_another_gpu(conn, &hash).is_some()
            || self.disk.as_ref().is_some_and(|d| d.contains(&hash))
            || self.sessions.keys().any(|id| self.in_region(*id, &hash).is_some())
    }

    /// Where a chunk lies whole in an engine's memory, maybe under another release's numbering.
    pub(super) fn in_region(&self, conn: ConnId, hash: &ChunkHash) -> Option<Span> {
        if self.spoiled.contains(&(conn, *hash)) {
            return None;
        }
        let entry = self.sessions.get(&conn)?;
        self.manifests.iter().find_map(|(m, l)| {
            let (region, range) = entry.session.place(m, l.layout.index_of(hash)?)?;
            entry.region_slice(region, range)
        })
    }

    /// What lies here is told before what is wanted: the brain would ask for what is there, and grant what is
    /// not.
    fn refresh_all(&mut self) {
        let manifests: Vec<ManifestHash> = self.manifests.keys().copied().collect();
        manifests.iter().for_each(|manifest| self.refresh_held(*manifest));
        manifests.iter().for_each(|manifest| self.refresh_wants(*manifest));
    }

    /// Tells the brain what changed of engines' memory in the step that was done.
    pub(super) fn do_books(&mut self) {
        let Books { all, count } = std::mem::take(&mut self.books);
        if all {
            self.refresh_all();
            self.tidy();
        }
        if all || count {
            self.count_engines();
        }
    }

    /// Gives up what nothing here needs any more.
    fn tidy(&mut self) {
        self.trim_memory(false);
        self.retire();
    }

    /// Whether the engine serves exactly what it should.
    pub(super) fn is_ready(&self, conn: &EngineConn) -> bool {
        let due = conn.channel.as_ref().and_then(|channel| self.node.rollout(channel)?.vouched());
        due.is_some_and(|due| conn.session.verified() == Some(due.manifest))
    }

    fn count_engines(&mut self) {
        let known = self.sessions.values().filter(|c| c.channel.is_some());
        let ready = known.clone().filter(|c| self.is_ready(c)).count();
        self.local.engines = u32::try_from(known.count()).unwrap_or(u32::MAX);
        self.local.engines_ready = u32::try_from(ready).unwrap_or(u32::MAX);
        self.input(Input::Local(self.local.clone()));
    }

    fn registering(&mut self, conn: ConnId) -> Result<&mut EngineConn, ErrorReply> {
        let entry = self.sessions.get_mut(&conn).filter(|c| c.session.is_registering());
        entry.ok_or_else(|| {
            ErrorReply::new(code::BAD_REQUEST, "registration is over once hydration began: connect anew to change it")
        })
    }
}

pub(super) fn region_bytes(regions: &Regions) -> BTreeMap<u32, u64> {
    regions.iter().map(|(id, region)| (*id, region.len())).collect()
}
