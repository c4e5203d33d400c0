//! What engines are told: of releases, of what failed, and how far it is.

use super::{Agent, EngineConn};
use aquifer_core::{ChannelName, ManifestHash};
use aquifer_engine::ConnId;
use aquifer_engine::protocol::{Conduct, Event as EngineNews, Failure, Progress, ReleaseInfo, Standing};
use aquifer_proto::limits::{
    ENGINE_ANSWER_GRACE, ENGINE_CHECK_MAX, ENGINE_PAUSE_MAX, ENGINE_RESUME_MAX, ENGINE_TIMEOUT_MAX,
};
use aquifer_proto::{Asked, EngineInput, Tell};
use std::time::{Duration, Instant};

impl Agent {
    pub(super) fn tell_engine(&mut self, conn: ConnId, channel: &ChannelName, tell: Tell) {
        let about = match &tell {
            Tell::Hydrated { manifest }
            | Tell::Pause { manifest, .. }
            | Tell::Check { manifest }
            | Tell::Applied { manifest }
            | Tell::Aborted { manifest }
            | Tell::Failed { manifest, .. } => *manifest,
        };
        let Some(entry) = self.sessions.get_mut(&conn) else { return };
        if entry.session.asked().is_some() {
            entry.asked_at = Instant::now();
        }
        let name = entry.name.clone();
        // The newest release may be ahead of the one the engine takes.
        let known: Vec<_> = self.node.releases(channel).collect();
        let told = known.iter().rev().find(|(_, release)| release.manifest == about);
        // One so old that it is not remembered is told under the newest's number: the engine must
        // hear of it all the same.
        let Some((signed, release)) = told.or_else(|| known.last()) else { return };
        let (mut release, publisher) = ((*release).clone(), signed.publisher);
        release.manifest = about;
        let release = ReleaseInfo::new(&release, publisher);
        let news = match tell {
            Tell::Hydrated { manifest } => {
                self.spoiled.retain(|(id, _)| *id != conn);
                tracing::info!("engine {name} is hydrated: {}", manifest.short());
                EngineNews::Hydrated { release }
            }
            Tell::Pause { bytes, .. } => EngineNews::Pause { release, bytes },
            Tell::Check { .. } => EngineNews::Check { release },
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

    /// An answer that has not come in its time does not come.
    pub(super) fn look_for_overdue(&mut self) {
        let overdue = |(conn, entry): (&ConnId, &EngineConn)| {
            let asked = entry.session.asked()?;
            let most = patience(asked, &entry.conduct);
            (entry.asked_at.elapsed() > most).then_some((*conn, asked, most.as_secs()))
        };
        let late: Vec<(ConnId, Asked, u64)> = self.sessions.iter().filter_map(overdue).collect();
        for (conn, asked, seconds) in late {
            let reason = match asked {
                Asked::Pause => format!("the engine did not answer within {seconds} s that it paused"),
                Asked::Check => format!("the engine's check did not end within {seconds} s"),
                Asked::Resume => format!("the engine did not answer within {seconds} s that it serves it"),
            };
            let name = self.sessions.get(&conn).map(|c| c.name.as_str()).unwrap_or_default();
            tracing::warn!("engine {name}: {reason}");
            self.engine_input(conn, EngineInput::Overdue { reason });
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

    /// Tells engines where the node stands with their channel, if that is news to them.
    pub(super) fn tell_standing(&mut self) {
        let Some(engines) = &self.engines else { return };
        for (conn, entry) in &mut self.sessions {
            let report = entry.channel.as_ref().and_then(|channel| self.node.rollout(channel)?.report());
            let Some(report) = report else { continue };
            if entry.standing.as_ref().is_some_and(|(known, _)| known == report) {
                continue;
            }
            let standing = Standing {
                wanted: report.wanted.manifest,
                due: report.due().map(|due| due.manifest),
                phase: report.phase.to_string(),
                ready: report.ready,
                reason: report.reason.clone(),
            };
            let before = entry.standing.replace((report.clone(), standing.clone()));
            if before.is_none_or(|(_, before)| before != standing) {
                engines.event(*conn, &EngineNews::Standing(standing));
            }
        }
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

/// How long an engine may take to answer.
fn patience(asked: Asked, conduct: &Conduct) -> Duration {
    let (said, most) = match asked {
        Asked::Pause => (conduct.pause_timeout_ms, ENGINE_PAUSE_MAX),
        Asked::Check => (conduct.check_timeout_ms, ENGINE_CHECK_MAX),
        Asked::Resume => (None, ENGINE_RESUME_MAX),
    };
    said.map_or(most, |ms| Duration::from_millis(ms).min(ENGINE_TIMEOUT_MAX) + ENGINE_ANSWER_GRACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_has_the_time_that_it_says_and_a_little_more() {
        let silent = Conduct::default();
        let says = Conduct { pause_timeout_ms: Some(1500), check_timeout_ms: Some(u64::MAX), ..Conduct::default() };
        assert_eq!(patience(Asked::Pause, &silent), ENGINE_PAUSE_MAX);
        assert_eq!(patience(Asked::Pause, &says), Duration::from_millis(6500));
        assert_eq!(patience(Asked::Check, &says), ENGINE_TIMEOUT_MAX + ENGINE_ANSWER_GRACE);
        assert_eq!(patience(Asked::Resume, &says), ENGINE_RESUME_MAX);
    }
}
