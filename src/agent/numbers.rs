//! The figures behind `/metrics`: what is counted as it happens, and what is looked at when somebody asks.

use super::lifecycle::Kind;
use super::tally::Lane;
use super::{Agent, Hold};
use aquifer_core::report::Phase;
use aquifer_core::{ChannelName, ReleaseId, Report};
use aquifer_engine::ConnId;
use aquifer_proto::forecast::Forecast;
use aquifer_proto::{Counters, Input, Rates};
use prometheus::core::Collector;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// From a release heard to a phase reached, in seconds: a delta on a fast network, and a terabyte on a slow one.
const PHASE_BUCKETS: [f64; 14] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0];
/// Milliseconds are what it should be, seconds what it may be.
const PAUSE_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// Counted as it happens. Clones count together.
#[derive(Clone, Debug)]
pub(crate) struct Meters {
    pub(crate) phases: HistogramVec,
    pub(crate) pauses: HistogramVec,
    pub(crate) check_failures: IntCounterVec,
    pub(crate) rollbacks: IntCounterVec,
    pub(crate) members_left: IntCounterVec,
}

impl Meters {
    /// `help` has each metric's text, by its name.
    pub(super) fn new(help: impl Fn(&str) -> &'static str) -> Result<Self, prometheus::Error> {
        let opts = |name: &str| Opts::new(name, help(name));
        let histogram = |name: &str, labels: &[&str], buckets: &[f64]| {
            HistogramVec::new(HistogramOpts::from(opts(name)).buckets(buckets.to_vec()), labels)
        };
        Ok(Meters {
            phases: histogram("aquifer_phase_seconds", &["channel", "phase"], &PHASE_BUCKETS)?,
            pauses: histogram("aquifer_engine_pause_seconds", &["channel", "engine"], &PAUSE_BUCKETS)?,
            check_failures: IntCounterVec::new(opts("aquifer_check_failures_total"), &["channel"])?,
            rollbacks: IntCounterVec::new(opts("aquifer_rollbacks_total"), &["channel"])?,
            members_left: IntCounterVec::new(opts("aquifer_members_left_total"), &["how"])?,
        })
    }

    pub(crate) fn collectors(&self) -> [Box<dyn Collector>; 5] {
        [
            Box::new(self.phases.clone()),
            Box::new(self.pauses.clone()),
            Box::new(self.check_failures.clone()),
            Box::new(self.rollbacks.clone()),
            Box::new(self.members_left.clone()),
        ]
    }

    /// Series that are there from the start: an increase from nothing is none to Prometheus.
    pub(super) fn begin<'a>(&self, channels: impl Iterator<Item = &'a ChannelName>) {
        for channel in channels {
            self.check_failures.with_label_values(&[channel.as_str()]);
            self.rollbacks.with_label_values(&[channel.as_str()]);
        }
        ["goodbye", "silence"].iter().for_each(|how| drop(self.members_left.with_label_values(&[*how])));
    }

    pub(super) fn count(&self, event: Kind, channel: &str) {
        match event {
            Kind::CheckFailed => self.check_failures.with_label_values(&[channel]).inc(),
            Kind::RolledBack => self.rollbacks.with_label_values(&[channel]).inc(),
            Kind::Joined
            | Kind::Heard
            | Kind::Hydrating
            | Kind::Hydrated
            | Kind::Activated
            | Kind::Draining
            | Kind::Drained
            | Kind::Left
            | Kind::PeerJoined
            | Kind::PeerLeft
            | Kind::EngineJoined
            | Kind::EngineLeft => {}
        }
    }
}

/// What the operator allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) upload_bytes: u64,
    pub(super) upload_bytes_per_s: Option<u64>,
    pub(super) memory_bytes: u64,
    pub(super) store_bytes: Option<u64>,
}

/// Looked at as often as the view is renewed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbers {
    pub(crate) counters: Counters,
    pub(crate) received: BTreeMap<Lane, u64>,
    pub(crate) sent: BTreeMap<Lane, u64>,
    pub(crate) leased_bytes_limit: u64,
    pub(crate) memory_limit_bytes: u64,
    /// None: the disk is the limit.
    pub(crate) disk_limit_bytes: Option<u64>,
    pub(crate) channels: BTreeMap<String, ChannelNumbers>,
    /// What waits, and how much may: by the queue's name.
    pub(crate) queues: BTreeMap<&'static str, (u64, u64)>,
    pub(crate) peers_draining: u64,
    pub(crate) spare_upload_bytes_per_s: u64,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct ChannelNumbers {
    /// The newest release heard of, and the newest that is served here, or held whole.
    pub(crate) seq: u64,
    pub(crate) served_seq: u64,
    pub(crate) lag: Duration,
    pub(crate) wanted_bytes: u64,
    pub(crate) held_bytes: u64,
    pub(crate) eta_seconds: Option<f64>,
    pub(crate) replicas_hydrated: u64,
    pub(crate) replicas_hydrating: u64,
    pub(crate) replicas_ready: u64,
}

/// What was measured of a channel's releases.
#[derive(Debug, Default)]
pub(super) struct Measured {
    wanted: Option<ReleaseId>,
    /// Since when there is a release that is not served here.
    behind: Option<Instant>,
    phases: Vec<Phase>,
    served_seq: u64,
}

impl Measured {
    /// Phases that were reached since this was asked last, with the time they took.
    fn reached(&mut self, report: &Report) -> Vec<(Phase, Duration)> {
        if self.wanted != Some(report.wanted) {
            self.wanted = Some(report.wanted);
            self.phases.clear();
        }
        let times = report.times.iter().filter(|(phase, _)| !self.phases.contains(phase)).collect::<Vec<_>>();
        self.phases.extend(times.iter().map(|(phase, _)| *phase));
        times.into_iter().map(|(phase, ms)| (phase, Duration::from_millis(ms.into()))).collect()
    }
}

impl Agent {
    pub(super) fn measure_pause(&mut self, conn: ConnId) {
        let Some(entry) = self.sessions.get_mut(&conn) else { return };
        if let (Some(since), Some(channel)) = (entry.paused_at.take(), &entry.channel) {
            let pauses = self.meters.pauses.with_label_values(&[channel.as_str(), &entry.name]);
            pauses.observe(since.elapsed().as_secs_f64());
        }
    }

    /// Engines come and go for months, each by a name of its own, perhaps.
    pub(super) fn forget_pauses(&self, channel: &ChannelName, engine: &str) {
        let has_it = |c: &super::EngineConn| c.name == engine && c.channel.as_ref() == Some(channel);
        if !self.sessions.values().any(has_it) {
            // One that never paused has none.
            let _ = self.meters.pauses.remove_label_values(&[channel.as_str(), engine]);
        }
    }

    /// Tells the brain how fast this node sends and gets.
    pub(super) fn measure_rates(&mut self) {
        let (_, out) = self.tally.clock(Instant::now());
        let (peak_in, peak_out) = self.tally.peaks();
        let upload = self.limits.upload_bytes_per_s.unwrap_or(peak_out);
        let rates = Rates { upload_bytes_per_s: upload, uploading_bytes_per_s: out, download_bytes_per_s: peak_in };
        if self.told_rates != rates {
            self.told_rates = rates;
            self.input(Input::Rates(rates));
        }
    }

    /// Looks how long phases took. Cheap where nothing is new.
    pub(super) fn measure(&mut self) {
        let channels: Vec<ChannelName> = self.channels.keys().cloned().collect();
        for channel in channels {
            let newest = self.current_release(&channel);
            // A report outlives the engines that it is of.
            let has_engines = self.sessions.values().any(|c| c.channel.as_ref() == Some(&channel));
            let report = self.node.rollout(&channel).and_then(|rollout| rollout.report()).filter(|_| has_engines);
            let measured = self.measured.entry(channel.clone()).or_default();
            if let Some(report) = report {
                for (phase, took) in measured.reached(report) {
                    let phase = phase.to_string().replace(' ', "_");
                    self.meters.phases.with_label_values(&[channel.as_str(), &phase]).observe(took.as_secs_f64());
                }
            }
            let served = match report {
                Some(report) => report.served,
                None => newest.map(|id| id.manifest).filter(|_| self.is_whole(&channel)),
            };
            let newest = newest.filter(|_| self.has_use_for(&channel));
            let of_served =
                self.node.releases(&channel).filter(|(_, r)| Some(r.manifest) == served).map(|(_, r)| r.seq);
            let served_seq = of_served.last();
            let measured = self.measured.entry(channel).or_default();
            match newest {
                Some(id) if served == Some(id.manifest) => measured.behind = None,
                Some(_) => drop(measured.behind.get_or_insert_with(Instant::now)),
                None => measured.behind = None,
            }
            measured.served_seq = served_seq.unwrap_or(measured.served_seq);
        }
    }

    fn current_release(&self, channel: &ChannelName) -> Option<ReleaseId> {
        Some(self.channels.get(channel)?.release.as_ref()?.0.id())
    }

    /// Whether the channel's releases are wanted here: a node that only waits for an engine is behind nothing.
    fn has_use_for(&self, channel: &ChannelName) -> bool {
        let holds = match self.hold {
            Hold::All => true,
            Hold::Engines => false,
            // A publisher serves its own, whatever came after it.
            Hold::Own => self.pull.is_some(),
        };
        holds || self.sessions.values().any(|c| c.channel.as_ref() == Some(channel))
    }

    fn is_whole(&self, channel: &ChannelName) -> bool {
        self.progress_of(channel).is_some_and(|(done, total)| done >= total)
    }

    pub(super) fn numbers(&self) -> Numbers {
        let mut spare = 0;
        let mut of = |channel: &ChannelName| {
            let measured = self.measured.get(channel);
            let (held_bytes, wanted_bytes) = self.progress_of(channel).unwrap_or_default();
            let forecast = Forecast::of(&self.node, channel, 0);
            spare = spare.max(forecast.spare_upload_bytes_per_s.unwrap_or(0));
            ChannelNumbers {
                seq: self.current_release(channel).map_or(0, |id| id.seq),
                served_seq: measured.map_or(0, |m| m.served_seq),
                lag: measured.and_then(|m| m.behind).map_or(Duration::ZERO, |since| since.elapsed()),
                wanted_bytes,
                held_bytes,
                eta_seconds: self.eta(channel),
                replicas_hydrated: forecast.hydrated_replicas.into(),
                replicas_hydrating: forecast.hydrating.len() as u64,
                replicas_ready: forecast.ready_replicas.into(),
            }
        };
        let channels = self.channels.keys().map(|channel| (channel.to_string(), of(channel))).collect();
        Numbers {
            counters: self.node.counters(),
            received: self.tally.received.clone(),
            sent: self.tally.sent.clone(),
            leased_bytes_limit: self.limits.upload_bytes,
            memory_limit_bytes: self.limits.memory_bytes,
            disk_limit_bytes: self.limits.store_bytes,
            channels,
            queues: BTreeMap::from([
                ("jobs", (self.running_jobs as u64, crate::BLOCKING_THREADS as u64)),
                ("events", self.events_waiting),
            ]),
            peers_draining: self.node.members().filter(|m| m.status.draining).count() as u64,
            spare_upload_bytes_per_s: spare,
        }
    }
}
