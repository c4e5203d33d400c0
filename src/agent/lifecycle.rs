//! What happens to this node, as others are told: one stream of numbered events, for hooks and for whoever listens.
//!
//! [`Lifecycle`] says what is news; it looks at where the node stands and does no IO. [`EventLog`] keeps the last
//! ones for those that come late.

use aquifer_core::report::Phase;
use aquifer_core::{ChannelName, NodeId, ReleaseId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;
use utoipa::ToSchema;

/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Events kept for listeners that come back. Guess: minutes of a busy node.
pub(crate) const LOG_MAX: usize = 1024;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// The node found its mesh: somebody answered.
    #[default]
    Joined,
    /// A release that is for this node.
    Heard,
    /// It is being fetched; told again with how far it is.
    Hydrating,
    /// All that this node needs of it is here, and hashes to its name.
    Hydrated,
    /// All of the channel's engines here serve it.
    Activated,
    /// An engine cannot take it, or its own check failed.
    CheckFailed,
    /// The engines serve again what they served before.
    RolledBack,
    Draining,
    Drained,
    /// The last event of a process.
    Left,
    PeerJoined,
    PeerLeft,
    EngineJoined,
    EngineLeft,
}

impl Kind {
    pub(crate) const ALL: [Kind; 14] = [
        Kind::Joined,
        Kind::Heard,
        Kind::Hydrating,
        Kind::Hydrated,
        Kind::Activated,
        Kind::CheckFailed,
        Kind::RolledBack,
        Kind::Draining,
        Kind::Drained,
        Kind::Left,
        Kind::PeerJoined,
        Kind::PeerLeft,
        Kind::EngineJoined,
        Kind::EngineLeft,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Joined => "joined",
            Kind::Heard => "heard",
            Kind::Hydrating => "hydrating",
            Kind::Hydrated => "hydrated",
            Kind::Activated => "activated",
            Kind::CheckFailed => "check-failed",
            Kind::RolledBack => "rolled-back",
            Kind::Draining => "draining",
            Kind::Drained => "drained",
            Kind::Left => "left",
            Kind::PeerJoined => "peer-joined",
            Kind::PeerLeft => "peer-left",
            Kind::EngineJoined => "engine-joined",
            Kind::EngineLeft => "engine-left",
        }
    }
}

/// One event, as hooks, webhooks and `/v1/events` tell it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Happening {
    /// `NODE-INCARNATION-SEQ`: the same event never has two, however often it is delivered.
    pub(crate) id: String,
    /// Grows by one with each event of one process.
    pub(crate) seq: u64,
    /// By this node's clock.
    pub(crate) time_unix_ms: u64,
    pub(crate) event: Kind,
    /// Whose event it is: its identity, and what it is called.
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) channel: Option<String>,
    /// The release's number and manifest.
    pub(crate) release: Option<u64>,
    pub(crate) manifest: Option<String>,
    pub(crate) engine: Option<String>,
    pub(crate) bytes_done: Option<u64>,
    pub(crate) bytes_total: Option<u64>,
    /// Seconds until it is hydrated, as it goes now; absent while nothing moves.
    pub(crate) eta_seconds: Option<f64>,
    /// Of `peer-joined` and `peer-left`.
    pub(crate) peer: Option<String>,
    /// What went wrong, or what it waits for.
    pub(crate) reason: String,
}

/// Where a node stands in a channel, for as much as events tell of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Standing {
    pub(super) wanted: Option<ReleaseId>,
    /// None until it is known how much that is.
    pub(super) bytes: Option<(u64, u64)>,
    /// Everything is here.
    pub(super) is_whole: bool,
    pub(super) phase: Option<Phase>,
    pub(super) serves_wanted: bool,
    pub(super) eta_seconds: Option<f64>,
    pub(super) reason: String,
}

/// What was told of each channel's release.
#[derive(Debug, Default)]
pub(super) struct Lifecycle {
    channels: BTreeMap<ChannelName, Told>,
    pub(super) joined: bool,
}

#[derive(Debug, Default)]
struct Told {
    wanted: Option<ReleaseId>,
    progress: Option<Instant>,
    is_whole: bool,
    is_active: bool,
    failed: bool,
    rolled_back: bool,
}

impl Lifecycle {
    /// What is new in a channel since it was looked at last. An event may be skipped when it is over before anybody
    /// looks (a small release is fetched within one step); what is told is in order.
    pub(super) fn observe(&mut self, channel: &ChannelName, now: Standing, at: Instant) -> Vec<Happening> {
        let told = self.channels.entry(channel.clone()).or_default();
        let mut news = Vec::new();
        let Some(wanted) = now.wanted else { return news };
        let mut tell = |event, reason: &str| {
            let (done, total) = now.bytes.unzip();
            news.push(Happening {
                event,
                channel: Some(channel.to_string()),
                release: Some(wanted.seq),
                manifest: Some(wanted.manifest.to_string()),
                bytes_done: done,
                bytes_total: total,
                eta_seconds: now.eta_seconds.filter(|_| event == Kind::Hydrating),
                reason: reason.to_string(),
                ..Happening::default()
            });
        };
        if told.wanted != Some(wanted) {
            *told = Told { wanted: Some(wanted), ..Told::default() };
            tell(Kind::Heard, "");
        }
        let under_way = !now.is_whole && now.bytes.is_some_and(|(done, total)| done < total);
        if under_way && told.progress.is_none_or(|last| at.duration_since(last) >= PROGRESS_INTERVAL) {
            told.progress = Some(at);
            tell(Kind::Hydrating, &now.reason);
        }
        // What was lost and fetched again is told again.
        if now.is_whole && !std::mem::replace(&mut told.is_whole, now.is_whole) {
            tell(Kind::Hydrated, "");
        }
        if under_way {
            told.is_whole = false;
        }
        let failed = now.phase == Some(Phase::Failed);
        if failed && !std::mem::replace(&mut told.failed, failed) {
            tell(Kind::CheckFailed, &now.reason);
        }
        let rolled_back = now.phase == Some(Phase::RolledBack);
        if rolled_back && !std::mem::replace(&mut told.rolled_back, rolled_back) {
            // A failure that was over before anybody looked.
            if !std::mem::replace(&mut told.failed, true) {
                tell(Kind::CheckFailed, &now.reason);
            }
            tell(Kind::RolledBack, &now.reason);
        }
        let is_active = now.phase == Some(Phase::Ready) && now.serves_wanted;
        if is_active && !told.is_active {
            tell(Kind::Activated, "");
        }
        told.is_active = is_active;
        news
    }
}

/// The last events, and who listens to the next ones.
#[derive(Debug)]
pub(crate) struct EventLog {
    last: Mutex<VecDeque<Arc<Happening>>>,
    listeners: broadcast::Sender<Arc<Happening>>,
    prefix: String,
}

impl EventLog {
    pub(super) fn new(node: &NodeId, incarnation: u64) -> Self {
        let prefix = format!("{}-{incarnation}", &node.to_string()[..16]);
        EventLog { last: Mutex::default(), listeners: broadcast::channel(LOG_MAX).0, prefix }
    }

    /// Numbers an event and tells listeners.
    pub(super) fn push(&self, mut event: Happening) -> Arc<Happening> {
        let mut last = self.lock();
        event.seq = last.back().map_or(1, |e| e.seq + 1);
        event.id = format!("{}-{}", self.prefix, event.seq);
        let event = Arc::new(event);
        last.push_back(event.clone());
        if last.len() > LOG_MAX {
            last.pop_front();
        }
        // An error says that nobody listens.
        let _ = self.listeners.send(event.clone());
        event
    }

    /// What came after the event of that id, as far as it is kept, and what is to come. An id of an earlier life of
    /// this node, or none that was ever given, gets all that is kept; None gets the last `count`.
    pub(crate) fn listen(
        &self,
        after: Option<&str>,
        count: usize,
    ) -> (Vec<Arc<Happening>>, broadcast::Receiver<Arc<Happening>>) {
        let last = self.lock();
        let missed = match after {
            None => last.iter().skip(last.len().saturating_sub(count)).cloned().collect(),
            Some(id) => {
                let seen = last.iter().position(|e| e.id == id).map_or(0, |at| at + 1);
                last.iter().skip(seen).cloned().collect()
            }
        };
        (missed, self.listeners.subscribe())
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Happening>>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_core::ManifestHash;

    fn id(seq: u64) -> Option<ReleaseId> {
        Some(ReleaseId { seq, manifest: ManifestHash::of(&[u8::try_from(seq).unwrap()]) })
    }

    fn kinds(events: &[Happening]) -> Vec<Kind> {
        events.iter().map(|e| e.event).collect()
    }

    #[test]
    fn a_release_is_told_from_heard_to_activated_once_each() {
        let (mut lifecycle, channel, start) = (Lifecycle::default(), "a/b".parse().unwrap(), Instant::now());
        let mut at =
            |ms, standing: Standing| kinds(&lifecycle.observe(&channel, standing, start + Duration::from_millis(ms)));
        let fetching = |done| Standing { wanted: id(1), bytes: Some((done, 10)), ..Standing::default() };
        assert_eq!(at(0, Standing::default()), []);
        assert_eq!(at(0, Standing { wanted: id(1), ..Standing::default() }), [Kind::Heard]);
        assert_eq!(at(0, fetching(0)), [Kind::Hydrating]);
        assert_eq!(at(500, fetching(5)), []);
        assert_eq!(at(1000, fetching(6)), [Kind::Hydrating]);
        let whole = Standing { is_whole: true, phase: Some(Phase::Staged), ..fetching(10) };
        assert_eq!(at(1100, whole.clone()), [Kind::Hydrated]);
        let ready = Standing { phase: Some(Phase::Ready), serves_wanted: true, ..whole.clone() };
        assert_eq!(at(1200, ready.clone()), [Kind::Activated]);
        assert_eq!(at(1300, ready), []);
        let next = Standing { wanted: id(2), phase: Some(Phase::Heard), ..Standing::default() };
        assert_eq!(at(1400, next.clone()), [Kind::Heard]);
        let failed = Standing { phase: Some(Phase::Failed), reason: "too hot".into(), ..next.clone() };
        assert_eq!(at(1500, failed.clone()), [Kind::CheckFailed]);
        assert_eq!(at(1550, failed), []);
        let back = Standing { phase: Some(Phase::RolledBack), ..next };
        assert_eq!(at(1600, back), [Kind::RolledBack]);
    }

    #[test]
    fn what_is_over_at_once_is_told_in_order() {
        let (mut lifecycle, channel) = (Lifecycle::default(), "a/b".parse().unwrap());
        let all = Standing {
            wanted: id(1),
            bytes: Some((10, 10)),
            is_whole: true,
            phase: Some(Phase::Ready),
            serves_wanted: true,
            ..Standing::default()
        };
        let events = lifecycle.observe(&channel, all, Instant::now());
        assert_eq!(kinds(&events), [Kind::Heard, Kind::Hydrated, Kind::Activated]);
    }

    #[test]
    fn who_comes_back_gets_what_it_missed() {
        let log = EventLog::new(&NodeId([7; 32]), 3);
        for _ in 0..LOG_MAX + 10 {
            log.push(Happening::default());
        }
        let (missed, _) = log.listen(Some("0707070707070707-3-1030"), 0);
        assert_eq!(missed.iter().map(|e| e.seq).collect::<Vec<_>>(), [1031, 1032, 1033, 1034]);
        assert_eq!(log.listen(Some("0707070707070707-2-5"), 0).0.len(), LOG_MAX, "of an earlier life");
        assert!(log.listen(None, 0).0.is_empty());
        let (two, mut next) = log.listen(None, 2);
        assert_eq!(two.iter().map(|e| e.seq).collect::<Vec<_>>(), [1033, 1034]);
        assert_eq!(next.try_recv().ok(), None);
        log.push(Happening::default());
        assert_eq!(next.try_recv().map(|e| e.seq), Ok(1035));
    }

    #[test]
    fn names_are_those_on_the_wire() {
        for kind in Kind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }
}
