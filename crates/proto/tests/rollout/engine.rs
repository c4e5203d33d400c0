//! An engine and its session, as far as rollouts see them: it gets releases ready, pauses, changes,
//! checks and resumes, each in its own time.

use aquifer_core::{ManifestHash, Phase};
use aquifer_proto::rollout::{Facts, Order, Until};
use std::collections::BTreeSet;
use std::time::Duration;

/// What goes wrong with a manifest at an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Its check fails.
    Fails,
    /// Its check takes long, and fails in the end.
    Hangs,
    /// Its check does not end before its agent is started anew; then it passes.
    HangsUntilRestart,
    /// It goes on answering although it was told to pause, until that is given up.
    NeverPauses,
}

pub(crate) const FAULTS: [Fault; 4] = [Fault::Fails, Fault::Hangs, Fault::HangsUntilRestart, Fault::NeverPauses];

#[derive(Debug, Default)]
pub(crate) struct Engine {
    pub(crate) up: bool,
    pub(crate) served: Option<ManifestHash>,
    /// What it answered from before it paused.
    before: Option<ManifestHash>,
    pub(crate) order: Option<Order>,
    target: Option<ManifestHash>,
    phase: Phase,
    failed: Option<(ManifestHash, String)>,
    /// Whose check has passed, and what needs not be fetched again.
    pub(crate) passed: BTreeSet<ManifestHash>,
    fetched: BTreeSet<ManifestHash>,
    /// It was answering, and does not because it was told to switch.
    pub(crate) out: bool,
    /// It hangs, and hears nothing; and does not again, once its agent was started anew.
    stuck: bool,
    cured: bool,
    /// Of the next step: an older one that is still to come is void.
    pub(crate) token: u64,
}

/// What the next step takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    Instant,
    Fetch,
    Switch,
}

impl Engine {
    pub(crate) fn facts(&self) -> Facts {
        Facts { served: self.served, target: self.target, phase: self.phase, failed: self.failed.clone() }
    }

    /// It begins anew, with empty memory.
    pub(crate) fn start(&mut self) {
        *self = Engine { up: true, token: self.token + 1, ..Engine::default() };
    }

    pub(crate) fn crash(&mut self) {
        *self = Engine { token: self.token + 1, ..Engine::default() };
    }

    /// Its agent is another process now: what was decided for it is forgotten, what it answers is not.
    pub(crate) fn on_new_agent(&mut self) {
        (self.order, self.target, self.phase, self.failed) = (None, None, Phase::Heard, None);
        (self.stuck, self.cured) = (false, true);
        self.token += 1;
    }

    /// Takes an order; the next step, if there is one.
    pub(crate) fn obey(&mut self, order: Order) -> Option<Pace> {
        self.order = Some(order);
        if self.stuck {
            return None;
        }
        if self.served == Some(order.manifest) {
            (self.target, self.phase) = (None, Phase::Heard);
        } else if self.target != Some(order.manifest) {
            (self.target, self.phase) = (Some(order.manifest), Phase::Heard);
        }
        self.next()
    }

    /// What is to come, and how long it takes.
    pub(crate) fn next(&self) -> Option<Pace> {
        let order = self.order.filter(|_| self.up && !self.stuck)?;
        let target = self.target.filter(|t| *t == order.manifest)?;
        if self.failed.as_ref().is_some_and(|(m, _)| *m == target) {
            return None;
        }
        match self.phase {
            Phase::Heard | Phase::Planned | Phase::Fetched | Phase::Verified => match self.fetched.contains(&target) {
                true => Some(Pace::Instant),
                false => Some(Pace::Fetch),
            },
            Phase::Staged if order.until >= Until::Checked => Some(Pace::Switch),
            Phase::Paused => Some(Pace::Switch),
            Phase::Checked if order.until == Until::Serving => Some(Pace::Switch),
            Phase::Staged | Phase::Checked | Phase::Ready | Phase::Failed | Phase::RolledBack => None,
        }
    }

    /// How long the next step is to last, if it is not as usual. None: it does not end.
    pub(crate) fn delay(&mut self, fault: Option<Fault>, usual: Duration) -> Option<Duration> {
        match (fault, self.phase) {
            (Some(Fault::Hangs), Phase::Paused) | (Some(Fault::NeverPauses), Phase::Staged) => Some(usual + PATIENCE),
            (Some(Fault::HangsUntilRestart), Phase::Paused) if !self.cured => {
                self.stuck = true;
                None
            }
            _ => Some(usual),
        }
    }

    /// The step ends, well unless there is a fault.
    pub(crate) fn step(&mut self, fault: Option<Fault>) {
        let Some(target) = self.target else { return };
        let fails = matches!(fault, Some(Fault::Fails | Fault::Hangs));
        self.phase = match self.phase {
            Phase::Heard => Phase::Planned,
            Phase::Planned => Phase::Fetched,
            Phase::Fetched => Phase::Verified,
            Phase::Verified => {
                self.fetched.insert(target);
                Phase::Staged
            }
            Phase::Staged if fault == Some(Fault::NeverPauses) => {
                self.failed = Some((target, "it did not pause".to_string()));
                self.target = None;
                Phase::Heard
            }
            Phase::Staged => {
                self.out |= self.served.is_some();
                self.before = self.served.take().or(self.before);
                Phase::Paused
            }
            Phase::Paused if fails => {
                self.failed = Some((target, "the answers are wrong".to_string()));
                // It puts back what it changed before it answers again.
                self.served = self.before;
                self.out &= self.served.is_none();
                self.target = None;
                Phase::Heard
            }
            Phase::Paused => {
                self.passed.insert(target);
                Phase::Checked
            }
            Phase::Checked => {
                (self.served, self.before, self.target, self.out) = (Some(target), Some(target), None, false);
                Phase::Heard
            }
            phase @ (Phase::Ready | Phase::Failed | Phase::RolledBack) => phase,
        };
    }
}

/// When an engine's driver gives up on it.
const PATIENCE: Duration = Duration::from_secs(40);

/// What a step may last.
pub(crate) fn duration(pace: Pace, dice: f64) -> Duration {
    match pace {
        Pace::Instant => Duration::from_millis(1),
        Pace::Fetch => Duration::from_secs_f64(0.02 + 0.5 * dice),
        Pace::Switch => Duration::from_secs_f64(0.01 + 1.5 * dice * dice),
    }
}
