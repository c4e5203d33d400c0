//! What engines are told: of releases, of what failed, and how far it is.

use super::Agent;
use aquifer_core::{ChannelName, ManifestHash};
use aquifer_engine::ConnId;
use aquifer_engine::protocol::{Event as EngineNews, Failure, Progress, ReleaseInfo};
use aquifer_proto::Tell;
use std::time::Instant;

impl Agent {
    pub(super) fn tell_engine(&mut self, conn: ConnId, channel: &ChannelName, tell: Tell) {
        let about = match &tell {
            Tell::Hydrated { manifest }
            | Tell::Pause { manifest, .. }
            | Tell::Applied { manifest }
            | Tell::Aborted { manifest }
            | Tell::Failed { manifest, .. } => *manifest,
        };
        let name = self.sessions.get(&conn).map(|c| c.name.clone()).unwrap_or_default();
        // The newest release may be ahead of the one the engine takes.
        let told = self.channels.get(channel).and_then(|c| c.history.iter().rev().find(|(r, _)| r.manifest == about));
        // One so old that it is not remembered is told under the newest's number: the engine must
        // hear of it all the same.
        let newest = || self.channels.get(channel).and_then(|c| c.release.as_ref());
        let Some((mut release, publisher)) = told.or_else(newest).cloned() else { return };
        release.manifest = about;
        let release = ReleaseInfo::new(&release, publisher);
        let news = match tell {
            Tell::Hydrated { manifest } => {
                self.spoiled.retain(|(id, _)| *id != conn);
                tracing::info!("engine {name} is hydrated: {}", manifest.short());
                EngineNews::Hydrated { release }
            }
            Tell::Pause { bytes, .. } => EngineNews::Pause { release, bytes },
            Tell::Applied { manifest } => {
                self.spoiled.retain(|(id, _)| *id != conn);
                tracing::info!("engine {name} switches to {}", manifest.short());
                EngineNews::Applied { release }
            }
            Tell::Aborted { .. } => EngineNews::Aborted { release },
            Tell::Failed { manifest, code, reason } => {
                EngineNews::Failed(Failure { manifest, code: code.to_string(), message: reason })
            }
        };
        if let Some(engines) = &self.engines {
            engines.event(conn, &news);
            self.told_engine = true;
        }
    }

    pub(super) fn tell_engines(&self, channel: &ChannelName, news: &EngineNews) {
        let Some(engines) = &self.engines else { return };
        for (conn, _) in self.sessions.iter().filter(|(_, c)| c.channel.as_ref() == Some(channel)) {
            engines.event(*conn, news);
        }
    }

    pub(super) fn fail_engines(&self, channel: &ChannelName, manifest: ManifestHash, problem: &str) {
        let failure = Failure { manifest, code: "stalled".to_string(), message: problem.to_string() };
        self.tell_engines(channel, &EngineNews::Failed(failure));
    }

    /// Tells engines that wait how far it is.
    pub(super) fn report_progress(&mut self) {
        let mut reports = Vec::new();
        for (id, conn) in &mut self.sessions {
            let Some(target) = conn.session.target() else { continue };
            let (done, total) = conn.session.progress();
            if done >= total && conn.progress.is_none() {
                continue;
            }
            let manifest = target.manifest;
            let bytes_total = target.plan.bytes_of(target.plan.needs());
            let bytes_done = bytes_total * u64::from(done) / u64::from(total.max(1));
            let now = Instant::now();
            let (since, from) = *conn.progress.get_or_insert((now, bytes_done));
            let seconds = now.duration_since(since).as_secs_f64().max(0.001);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
            let bytes_per_s = (bytes_done.saturating_sub(from) as f64 / seconds) as u64;
            if done >= total {
                conn.progress = None;
            }
            reports.push((*id, manifest, bytes_done, bytes_total, done, total, bytes_per_s));
        }
        let Some(engines) = &self.engines else { return };
        for (conn, manifest, bytes_done, bytes_total, done, total, bytes_per_s) in reports {
            let peers = self.node.progress(&manifest).map_or(0, |p| p.sources as u64);
            engines.event(
                conn,
                &EngineNews::Progress(Progress {
                    manifest,
                    bytes_done,
                    bytes_total,
                    chunks_done: done.into(),
                    chunks_total: total.into(),
                    peers,
                    bytes_per_s,
                }),
            );
        }
    }
}
