//! From one target to the next: each waits until what is under way for the one before has ended.

use super::state::{Check, State, Update, Way};
use super::{EngineOutput, EngineSession, Target, Tell};
use crate::rollout::Until;
use aquifer_core::{ChunkSet, ManifestHash};

impl EngineSession {
    pub(super) fn on_hydrate(&mut self, serving: Option<ManifestHash>, fresh: bool) {
        if matches!(self.state, State::Registering) {
            // What it says it serves is a claim until its memory was hashed.
            self.state = State::Waiting { scan: !fresh || serving.is_some(), serving };
        }
    }

    pub(super) fn on_target(&mut self, target: Target) {
        let is = |of: Option<ManifestHash>| of == Some(target.manifest);
        let failed = is(self.failed.as_ref().map(|(manifest, _)| *manifest));
        if failed && is(self.aim.as_ref().map(|aim| aim.manifest)) {
            return;
        }
        // Where it goes back to says nothing of what it comes from.
        let goes_back = is(self.serving) || is(self.base.as_ref().map(|base| base.target.manifest));
        if failed || !goes_back {
            self.failed = None;
        }
        if self.next.is_none() {
            self.superseded_until = self.until;
        }
        self.aim = Some(target.clone());
        self.next = Some(target);
    }

    pub(super) fn on_unfit(&mut self, manifest: ManifestHash, reason: String) {
        (self.aim, self.next) = (None, None);
        self.tell(Tell::Failed { manifest, code: "incompatible", reason: reason.clone() });
        self.failed = Some((manifest, reason));
    }

    /// Takes up the newest target, unless something is being written, hashed or waited for that is to
    /// end first.
    pub(super) fn turn_to_next(&mut self) {
        let Some(next) = &self.next else { return };
        // What it is on its way to anyway; but where it is stuck it begins anew.
        let begun = !matches!(self.state, State::Stuck { .. });
        if begun && self.state.target().is_some_and(|t| t.manifest == next.manifest) {
            self.next = None;
            self.finish_filling();
            return self.finish_staging();
        }
        let Some(next) = self.next.take_if(|_| self.busy.is_empty()) else { return };
        match std::mem::replace(&mut self.state, State::Registering) {
            State::Waiting { scan: false, .. } => self.fill(next, None),
            State::Waiting { serving, .. } => {
                self.state = State::Scanning { target: next, serving };
                self.out.push_back(EngineOutput::Scan);
            }
            State::Filling { target, landed, .. } => {
                let kept = next.carried_over(&target, &landed);
                self.fill(next, Some(kept));
            }
            State::InPlace { target, way, check: check @ (Check::Due | Check::Passed) } => {
                // To answer soon is worth more than to skip a release.
                let may_serve = way == Way::Paused && self.superseded_until == Until::Serving;
                if self.is_base(&target) || (may_serve && !self.is_base(&next)) {
                    self.state = State::InPlace { target, way, check };
                    self.next = Some(next);
                } else if self.is_base(&next) {
                    self.go_back(target);
                } else if way == Way::Paused && self.base.is_some() {
                    self.next = Some(next);
                    self.go_back(target);
                } else {
                    self.fill_from(&target, next);
                }
            }
            State::Stuck { current, quiet: true } => self.fill_from(&current, next),
            State::Serving { current } | State::Stuck { current, quiet: false } => {
                self.stage_from(Some(current), next, None);
            }
            State::Staging { update, .. } | State::Prepared { update } => {
                let Update { current, target, in_place } = update;
                match current {
                    // Back to what it serves: nothing to do.
                    Some(c) if c.manifest == next.manifest && self.serving == Some(c.manifest) => {
                        self.state = State::Serving { current: c };
                        self.changed();
                    }
                    current => self.stage_from(current, next, Some((target, in_place))),
                }
            }
            state @ (State::Registering
            | State::Scanning { .. }
            | State::Preparing { .. }
            | State::Pausing { .. }
            | State::Applying { .. }
            | State::InPlace { check: Check::Running, .. }
            | State::Resuming { .. }) => {
                (self.state, self.next) = (state, Some(next));
            }
        }
    }

    pub(super) fn is_base(&self, target: &Target) -> bool {
        self.base.as_ref().is_some_and(|base| base.target.manifest == target.manifest)
    }

    pub(super) fn fill(&mut self, target: Target, landed: Option<ChunkSet>) {
        let empty = ChunkSet::empty(target.layout.len());
        let landed = landed.unwrap_or_else(|| empty.clone());
        self.serving = None;
        self.state = State::Filling { target, landed, available: empty };
        self.changed();
        self.finish_filling();
    }

    /// The same, of memory that holds `current` whole.
    fn fill_from(&mut self, current: &Target, target: Target) {
        let kept = target.carried_over(current, current.plan.needs());
        self.fill(target, Some(kept));
    }

    /// `known`: what else is known of the memory of an engine whose release is not.
    pub(super) fn stage_from(&mut self, current: Option<Target>, target: Target, known: Option<(Target, ChunkSet)>) {
        let in_place = match (&current, &known) {
            (Some(current), _) => target.carried_over(current, current.plan.needs()),
            (None, Some((other, in_place))) => target.carried_over(other, in_place),
            (None, None) => ChunkSet::empty(target.layout.len()),
        };
        self.stage(Update { current, target, in_place });
    }

    pub(super) fn stage(&mut self, update: Update) {
        let staged = ChunkSet::empty(update.target.layout.len());
        self.state = State::Staging { update, staged };
        self.changed();
        self.finish_staging();
    }

    /// Puts back what it answered from before, in the memory of a quiet engine that holds `from` whole. Without
    /// anything to go back to it stays as it is.
    pub(super) fn go_back(&mut self, from: Target) {
        let base = self.base.as_ref().map(|base| base.target.clone()).filter(|base| base.manifest != from.manifest);
        let Some(base) = base else {
            self.state = State::Stuck { current: from, quiet: true };
            return self.changed();
        };
        let in_place = base.carried_over(&from, from.plan.needs());
        let mut chunks = base.plan.needs().clone();
        chunks.subtract(&in_place);
        self.state = State::Applying { target: base, in_place };
        self.out.push_back(EngineOutput::Apply { chunks });
        self.changed();
    }

    pub(super) fn finish_filling(&mut self) {
        let State::Filling { target, landed, .. } = &self.state else { return };
        if self.busy.is_empty() && self.next.is_none() && landed.is_superset(target.plan.needs()) {
            self.state = State::InPlace { target: target.clone(), way: Way::Filled, check: Check::Due };
            self.changed();
        }
    }
}

impl Target {
    /// Its chunks whose every spot is right in memory where those of `from` in `landed` are.
    pub(super) fn carried_over(&self, from: &Target, landed: &ChunkSet) -> ChunkSet {
        self.plan.carried_over(&self.layout, &from.plan, &from.layout, landed)
    }
}
