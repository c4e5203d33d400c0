//! An agent as those see it who serve others from it: what it shows, what happens, and what may be asked of it.

use super::history::ReleasesView;
use super::lifecycle::EventLog;
use super::numbers::{Meters, Numbers};
use super::readiness::Readiness;
use super::view::View;
use crate::http::{Autoscale, SwarmView};
use aquifer_core::ChannelName;
use aquifer_hooks::{Event, HookStats, Hooks};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

/// Asks that wait for the agent's task. Guess: more than one machine's tools ask at once; who comes later waits.
pub(super) const ASKS_MAX: usize = 64;

/// Something that only the agent's own task can answer, or do.
#[derive(Debug)]
pub(crate) enum Ask {
    Releases {
        channel: ChannelName,
        reply: oneshot::Sender<ReleasesView>,
    },
    Swarm {
        channel: ChannelName,
        reply: oneshot::Sender<SwarmView>,
    },
    Autoscale {
        channel: ChannelName,
        nodes: u32,
        reply: oneshot::Sender<Autoscale>,
    },
    /// Answered once it has begun.
    Drain {
        grace: Option<Duration>,
        reply: oneshot::Sender<()>,
    },
}

/// The hooks, until the agent ends them.
#[derive(Debug)]
pub(crate) struct RunningHooks(RwLock<Option<Hooks>>);

impl RunningHooks {
    pub(super) fn new(hooks: Hooks) -> Self {
        RunningHooks(RwLock::new(Some(hooks)))
    }

    pub(super) fn send(&self, event: Event) {
        if let Some(hooks) = &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            hooks.send(event);
        }
    }

    pub(crate) fn stats(&self) -> Vec<HookStats> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(Hooks::stats).unwrap_or_default()
    }

    /// See [`Hooks::flush`]. Nothing is sent after it.
    pub(super) fn flush(&self, deadline: Instant) -> usize {
        let hooks = self.0.write().unwrap_or_else(PoisonError::into_inner).take();
        hooks.map_or(0, |hooks| hooks.flush(deadline))
    }
}

/// Clones are of the same agent.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    pub(crate) view: watch::Receiver<View>,
    pub(crate) readiness: watch::Receiver<Readiness>,
    pub(crate) numbers: watch::Receiver<Numbers>,
    pub(crate) meters: Meters,
    pub(crate) events: Arc<EventLog>,
    pub(crate) hooks: Arc<RunningHooks>,
    pub(super) asks: mpsc::Sender<Ask>,
    pub(super) origin: Instant,
}

impl Handle {
    /// Err: the agent has ended.
    pub(crate) async fn ask(&self, ask: Ask) -> Result<(), ()> {
        self.asks.send(ask).await.map_err(drop)
    }

    /// How long ago the agent's task last looked at itself.
    pub(crate) fn age(&self) -> Duration {
        let shown = Duration::try_from_secs_f64(self.view.borrow().uptime_seconds).unwrap_or_default();
        self.origin.elapsed().saturating_sub(shown)
    }
}

/// The agent's ends of what a [`Handle`] shows.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) readiness: watch::Sender<Readiness>,
    pub(super) numbers: watch::Sender<Numbers>,
    pub(super) events: Arc<EventLog>,
    pub(super) hooks: Arc<RunningHooks>,
}
