//! Telling the world what happens here: lifecycle events, readiness, and how long it takes yet.

use super::Agent;
use super::lifecycle::{Happening, Kind, Standing};
use crate::state::unix_ms;
use aquifer_core::report::Phase;
use aquifer_core::{ChannelName, ManifestHash};
use aquifer_proto::forecast::Eta;
use std::time::{Duration, Instant};

/// How far a channel's release is here.
#[derive(Debug)]
pub(super) struct Progress {
    manifest: ManifestHash,
    /// Bytes that are here, and that are needed.
    done: u64,
    total: u64,
    /// How fast it comes, while some is missing.
    eta: Option<Eta>,
}

/// What is left to deliver is given so long at the end; the rest is kept for the next start, if there is a state directory.
const FLUSH_TIME: Duration = Duration::from_secs(2);

impl Agent {
    pub(super) async fn flush_hooks(&self) {
        let hooks = self.shared.hooks.clone();
        let flushed = tokio::task::spawn_blocking(move || hooks.flush(Instant::now() + FLUSH_TIME));
        match flushed.await {
            Ok(0) => {}
            Ok(left) => {
                tracing::warn!("{left} events were not delivered to hooks; they are kept in the state directory")
            }
            Err(error) => tracing::debug!("hooks: {error}"),
        }
    }

    /// Numbers an event and hands it to everybody who listens.
    pub(super) fn tell(&mut self, event: Happening) {
        let event =
            Happening { time_unix_ms: unix_ms(), node: self.node.id().to_string(), name: self.name.clone(), ..event };
        let event = self.shared.events.push(event);
        tracing::debug!("event {}: {}", event.id, event.event.name());
        self.shared.hooks.send(for_hooks(&event));
    }

    pub(super) fn tell_of_peer(&mut self, event: Kind, peer: &aquifer_core::NodeId, reason: &str) {
        let (peer, reason) = (Some(peer.to_string()), reason.to_string());
        self.tell(Happening { event, peer, reason, ..Happening::default() });
    }

    pub(super) fn tell_of_engine(&mut self, event: Kind, engine: &str, channel: &ChannelName) {
        let (engine, channel) = (Some(engine.to_string()), Some(channel.to_string()));
        self.tell(Happening { event, engine, channel, ..Happening::default() });
    }

    /// Looks whether any channel's standing is news. [`Agent::measure_progress`] comes before it.
    pub(super) fn tell_news(&mut self) {
        let now = Instant::now();
        let channels: Vec<ChannelName> = self.channels.keys().cloned().collect();
        for channel in channels {
            let standing = self.standing_in(&channel);
            for event in self.lifecycle.observe(&channel, standing, now) {
                if let Some(channel) = &event.channel {
                    self.meters.count(event.event, channel);
                }
                self.tell(event);
            }
        }
    }

    fn standing_in(&self, channel: &ChannelName) -> Standing {
        let report = self.node.rollout(channel).and_then(|rollout| rollout.report());
        let wanted = self.channels.get(channel).and_then(|c| c.release.as_ref()).map(|(release, _)| release.id());
        // A report of another release than the one that is being got to tells nothing of it.
        let report = report.filter(|report| Some(report.wanted) == wanted);
        let bytes = self.progress_of(channel);
        let arrived = bytes.is_some_and(|(done, total)| done >= total);
        let has_engines = self.sessions.values().any(|c| c.channel.as_ref() == Some(channel));
        let is_whole = match report.filter(|_| has_engines) {
            Some(report) => (Phase::Verified..=Phase::Ready).contains(&report.phase),
            None => arrived,
        };
        Standing {
            wanted,
            bytes,
            is_whole,
            phase: report.map(|report| report.phase),
            serves_wanted: report.is_some_and(|report| report.ready && report.served == Some(report.wanted.manifest)),
            eta_seconds: self.eta(channel),
            reason: report.map(|report| report.reason.clone()).unwrap_or_default(),
        }
    }

    /// Bytes that this node has, and needs, of the release that is for it: what its engines need of it, or what it is
    /// to hold if it has none for the channel; as of when that was counted last. None until it is known, or if it needs
    /// nothing.
    pub(super) fn progress_of(&self, channel: &ChannelName) -> Option<(u64, u64)> {
        let counted = self.progress.get(channel).filter(|p| Some(p.manifest) == self.current_manifest(channel))?;
        Some((counted.done, counted.total))
    }

    fn count_progress(&self, channel: &ChannelName) -> Option<(u64, u64)> {
        let manifest = self.current_manifest(channel)?;
        if self.manifests.get(&manifest).is_none_or(|loaded| !loaded.checked) {
            return None;
        }
        let mut of_engines = None;
        for conn in self.sessions.values().filter(|c| c.channel.as_ref() == Some(channel)) {
            let Some(target) = conn.session.target().filter(|target| target.manifest == manifest) else { continue };
            let total = target.plan.bytes_of(target.plan.needs());
            let (done, chunks) = conn.session.progress();
            let done = total * u64::from(done) / u64::from(chunks.max(1));
            let (have, want) = of_engines.unwrap_or((0, 0));
            of_engines = Some((have + done, want + total));
        }
        if of_engines.is_some() {
            return of_engines;
        }
        let (wanted, have) = self.node.progress_bytes(&manifest);
        (wanted > 0).then_some((have, wanted))
    }

    /// Counts every channel's progress, once for all that is told of it: a release may have millions of chunks.
    pub(super) fn measure_progress(&mut self) {
        let now = self.now();
        let mut before = std::mem::take(&mut self.progress);
        for channel in self.channels.keys() {
            let Some((manifest, (done, total))) = self.current_manifest(channel).zip(self.count_progress(channel))
            else {
                continue;
            };
            let eta = (done < total).then(|| {
                let mut eta = before.remove(channel).and_then(|known| known.eta).unwrap_or_default();
                eta.note(now, done);
                eta
            });
            self.progress.insert(channel.clone(), Progress { manifest, done, total, eta });
        }
    }

    /// Seconds until this node has what it needs of the channel's release.
    pub(super) fn eta(&self, channel: &ChannelName) -> Option<f64> {
        let Progress { eta, total, .. } = self.progress.get(channel)?;
        Some(eta.as_ref()?.estimate(self.now(), *total)?.left.as_secs_f64())
    }
}

fn for_hooks(event: &Happening) -> aquifer_hooks::Event {
    let progress = event.event == Kind::Hydrating;
    aquifer_hooks::Event {
        id: event.id.clone(),
        kind: event.event.name().to_string(),
        // It is plain data: it can be written.
        body: serde_json::to_string(event).unwrap_or_default(),
        replaceable: progress.then(|| event.channel.clone().unwrap_or_default()),
    }
}
