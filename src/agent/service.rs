//! The service manager that started this process, if one did: systemd's notifications.

use super::readiness::Readiness;
use sd_notify::NotifyState;
use std::time::{Duration, Instant};

/// Tells the manager that the agent lives and what it is at. Without a manager it does nothing.
#[derive(Debug)]
pub(super) struct Service {
    /// How often it wants to hear that the agent lives, if it wants to.
    watchdog: Option<Duration>,
    told: Instant,
    status: String,
}

impl Service {
    pub(super) fn new() -> Self {
        Service { watchdog: sd_notify::watchdog_enabled(), told: Instant::now(), status: String::new() }
    }

    /// It listens, and others may rely on that. Whether engines serve is another question: `/readyz`.
    pub(super) fn started(&self) {
        notify(&[NotifyState::Ready]);
    }

    /// To be called by the task that must not hang, as often as it comes round.
    pub(super) fn lives(&mut self, readiness: &Readiness) {
        if let Some(interval) = self.watchdog
            && self.told.elapsed() >= interval / 3
        {
            self.told = Instant::now();
            notify(&[NotifyState::Watchdog]);
        }
        let status = match (readiness.ready, readiness.eta_seconds) {
            (true, _) => "ready".to_string(),
            (false, None) => format!("not ready: {}", readiness.reason),
            (false, Some(seconds)) => {
                format!("not ready: {} ({} left)", readiness.reason, crate::units::seconds(seconds))
            }
        };
        if status != self.status {
            notify(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    pub(super) fn stops(&self) {
        notify(&[NotifyState::Stopping]);
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("the service manager does not hear: {error}");
    }
}
