//! Making the view, and what is due whenever it is renewed.

use super::view::{ChannelView, EngineView, PeerView, Rates, Rejected, RolloutView, View};
use super::{Agent, PullWhat, channels};
use anyhow::Result;
use aquifer_core::{ChannelName, ManifestHash, Report};
use aquifer_engine::DuringPause;
use std::time::{Duration, Instant};

/// What a release's coming and going leaves behind is not needed soon.
const GIVE_BACK_INTERVAL: Duration = Duration::from_secs(60);

impl Agent {
    pub(super) fn renew_view(&mut self) -> Result<()> {
        self.publication.iter_mut().for_each(|publication| publication.may_decide = true);
        self.measure_rates();
        self.watch_peers();
        self.look_on_draining();
        self.service.lives(&self.shared.readiness.borrow());
        self.check_published_files();
        self.report_progress();
        self.look_for_overdue();
        self.renew_news();
        self.give_memory_back();
        // Last: what comes of it is carried out after this.
        self.publish_when_ready()
    }

    pub(super) fn has_paused_engine(&self) -> bool {
        self.sessions.values().any(|conn| conn.paused_at.is_some())
    }

    fn give_memory_back(&mut self) {
        if self.memory_given_back.elapsed() >= GIVE_BACK_INTERVAL && !self.has_paused_engine() {
            self.memory_given_back = Instant::now();
            tokio::task::spawn_blocking(aquifer_memory::allocator::give_back);
        }
    }

    /// Counts, shows and tells where channels stand; in this order, so that whoever hears of it and asks finds it so.
    pub(super) fn renew_news(&mut self) {
        self.measure_progress();
        self.measure();
        self.show();
        self.tell_news();
        self.news_due = false;
    }

    /// The view as of now, for whoever looks.
    pub(super) fn show(&mut self) {
        self.count_sent();
        self.renew_readiness(true);
        let view = self.view();
        self.view.send_replace(view);
        let numbers = self.numbers();
        self.shared.numbers.send_replace(numbers);
    }

    /// What the transports sent since this was done last.
    pub(super) fn count_sent(&mut self) {
        let sent = self.grants.take_sent();
        self.tally.send(sent, |node| self.node.member(node).is_some());
        self.tally.fill(&mut self.traffic);
    }

    pub(super) fn view(&self) -> View {
        let rejections = self.node.rejections();
        View {
            node: self.node.id().to_string(),
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            uptime_seconds: self.origin.elapsed().as_secs_f64(),
            addresses: self.local.addresses.clone(),
            data_endpoint: self.data_endpoint.clone(),
            data_encryption: self.data_encryption.to_string(),
            channels: self.channel_views(),
            engines: self.sessions.values().filter(|c| c.channel.is_some()).map(|c| self.engine_view(c)).collect(),
            publication: self.publication_view(),
            peers: self.peer_views(),
            traffic: self.traffic,
            transports: self.transports.views(),
            rdma_ports: self.transports.rdma_ports(),
            rejected_releases: Rejected {
                forged: rejections.forged,
                untrusted: rejections.untrusted,
                older: rejections.older,
            },
            memory_store_bytes: self.memory.used_bytes(),
            disk_store_bytes: self.disk.as_ref().map_or(0, aquifer_memory::DiskStore::used_bytes),
            leased_bytes: self.node.leased_bytes(),
            rates: Rates { in_bytes_per_s: self.tally.rates().0, out_bytes_per_s: self.tally.rates().1 },
            readiness: self.readiness(),
            draining: self.draining.is_some(),
            http: self.http.clone(),
            labels: self.labels.clone(),
        }
    }

    fn channel_views(&self) -> Vec<ChannelView> {
        let mut views: Vec<ChannelView> = self.channels.iter().map(|(name, c)| self.channel_view(name, c)).collect();
        // A pull by hash follows no channel; people want to see it all the same.
        if let Some(PullWhat::Manifest(manifest)) = self.pull.as_ref().map(|p| &p.what) {
            let view = ChannelView { channel: "-".into(), manifest: manifest.to_string(), ..ChannelView::default() };
            views.push(self.manifest_view(view, manifest));
        }
        views
    }

    fn channel_view(&self, name: &ChannelName, channel: &channels::Channel) -> ChannelView {
        let mut view = ChannelView {
            channel: name.to_string(),
            state: "waiting".into(),
            problem: channel.problem.clone(),
            ..ChannelView::default()
        };
        view.eta_seconds = self.eta(name);
        let report = self.node.rollout(name).and_then(|rollout| rollout.report());
        view.rollout = report.map(|report| rollout_view(name, report));
        let Some((release, publisher)) = &channel.release else { return view };
        view.policy = super::history::in_words(&release.policy);
        view.word = self.node.statement(name, &release.id()).map(|s| super::history::word(s.word).to_string());
        view.seq = release.seq;
        view.manifest = release.manifest.to_string();
        view.publisher = publisher.to_string();
        view.note = release.note.clone();
        self.manifest_view(view, &release.manifest)
    }

    fn manifest_view(&self, mut view: ChannelView, manifest: &ManifestHash) -> ChannelView {
        view.state = "manifest".into();
        let Some(loaded) = self.manifests.get(manifest) else { return view };
        let progress = self.node.progress(manifest).unwrap_or_default();
        view.checkpoint_bytes = loaded.manifest.bytes();
        view.chunks = loaded.layout.len().into();
        view.chunks_wanted = progress.chunks_wanted.into();
        view.chunks_have = progress.chunks_have.into();
        (view.bytes_wanted, view.bytes_have) = self.node.progress_bytes(manifest);
        view.sources = progress.sources as u64;
        view.state = match progress {
            _ if !loaded.checked => "checking",
            p if p.chunks_wanted == 0 => "idle",
            p if p.chunks_have < p.chunks_wanted => "fetching",
            _ => "hydrated",
        }
        .into();
        view
    }

    fn engine_view(&self, conn: &super::EngineConn) -> EngineView {
        let (done, total) = conn.session.progress();
        EngineView {
            name: conn.name.clone(),
            pid: conn.pid,
            channel: conn.channel.as_ref().map(ChannelName::to_string).unwrap_or_default(),
            phase: conn.session.phase().into(),
            serving: conn.session.verified().map(|m| m.to_string()).unwrap_or_default(),
            ready: self.is_ready(conn),
            chunks_done: done.into(),
            chunks_total: total.into(),
            reason: conn.session.refusal().map(|(_, reason)| reason.clone()),
            during_pause: conn.conduct.during_pause.map(|what| match what {
                DuringPause::Held => "held".into(),
                DuringPause::Refused => "refused".into(),
            }),
        }
    }

    fn peer_views(&self) -> Vec<PeerView> {
        let now = self.now();
        let of = |member: &aquifer_proto::Member| {
            let status = &member.status;
            let (avoided, corrupt_chunks) = self.node.trust_of(&status.node, now);
            let channels = status.channels.iter().filter(|c| c.seq > 0);
            PeerView {
                node: status.node.to_string(),
                name: status.name.clone(),
                connected: self.node.is_connected(&status.node),
                labels: status.labels.clone(),
                channels: channels.map(|c| (c.channel.to_string(), c.seq, c.chunks_have, c.chunks_wanted)).collect(),
                rollouts: status
                    .channels
                    .iter()
                    .filter_map(|c| Some(rollout_view(&c.channel, c.report.as_ref()?)))
                    .collect(),
                engines: status.engines,
                engines_ready: status.engines_ready,
                avoided,
                draining: status.draining,
                corrupt_chunks,
                bytes_from: self.tally.from(&status.node).map(|(_, bytes)| bytes).sum(),
                bytes_by: self.tally.from(&status.node).map(|(way, bytes)| (way.name().to_string(), bytes)).collect(),
                bytes_to: self.tally.to(&status.node),
            }
        };
        self.node.members().map(of).collect()
    }
}

fn rollout_view(channel: &ChannelName, report: &Report) -> RolloutView {
    RolloutView {
        channel: channel.to_string(),
        seq: report.wanted.seq,
        wanted: report.wanted.manifest.to_string(),
        due: report.due().map(|due| due.manifest.to_string()).unwrap_or_default(),
        served: report.served.map(|served| served.to_string()).unwrap_or_default(),
        step: report.step.to_string(),
        phase: report.phase.to_string(),
        ready: report.ready,
        reason: report.reason.clone(),
    }
}
