//! What the engine answers: that it paused, that its check passed, that it serves; or that it would not.

use super::state::{Check, State, Update};
use super::{Asked, EngineOutput, EngineSession, Tell};
use crate::limits::ENGINE_ANSWERS_OWED_MAX;
use crate::rollout::Until;
use aquifer_core::ManifestHash;

impl EngineSession {
    pub(super) fn on_paused(&mut self, manifest: ManifestHash) {
        if !self.counts(Asked::Pause, manifest) {
            return;
        }
        let State::Pausing { update } = &self.state else { return };
        let update = update.clone();
        if self.next.is_some() || self.until < Until::Checked {
            return self.call_off(update);
        }
        self.serving = None;
        let chunks = update.changes();
        self.state = State::Applying { target: update.target, in_place: update.in_place };
        // First, since every answer waits for it.
        self.out.push_back(EngineOutput::Apply { chunks });
        self.out.push_back(EngineOutput::PlacesChanged);
    }

    /// It paused for what is not to come, or not yet. Nothing has changed.
    fn call_off(&mut self, update: Update) {
        if self.next.is_none() {
            self.next = Some(update.target.clone());
        }
        let Update { current, target, in_place } = update;
        match current {
            // It is asked to say that it goes on.
            Some(current) if self.serving == Some(current.manifest) => {
                let manifest = current.manifest;
                self.serving = None;
                self.state = State::Resuming { target: current };
                self.tell(Tell::Applied { manifest });
            }
            Some(current) => self.state = State::Stuck { current, quiet: true },
            None => {
                self.tell(Tell::Aborted { manifest: target.manifest });
                self.stage(Update { current: None, target, in_place });
            }
        }
        self.changed();
    }

    pub(super) fn on_checked(&mut self, manifest: ManifestHash, result: Result<(), String>) {
        if !self.counts(Asked::Check, manifest) {
            return;
        }
        let State::InPlace { check, target, .. } = &mut self.state else { return };
        match result {
            Ok(()) => {
                *check = Check::Passed;
                self.note_passed(manifest);
            }
            Err(reason) => {
                let target = target.clone();
                self.fail(manifest, reason);
                self.go_back(target);
            }
        }
    }

    pub(super) fn on_resumed(&mut self, manifest: ManifestHash) {
        if !self.counts(Asked::Resume, manifest) {
            return;
        }
        let State::Resuming { target } = &self.state else { return };
        let target = target.clone();
        self.serve(target);
    }

    pub(super) fn on_refused(&mut self, asked: Asked, manifest: ManifestHash, reason: String) {
        match asked {
            Asked::Pause if self.counts(asked, manifest) => self.will_not_pause(reason),
            Asked::Check => self.on_checked(manifest, Err(reason)),
            Asked::Resume => self.will_not_resume(manifest, reason),
            Asked::Pause => {}
        }
    }

    fn will_not_pause(&mut self, reason: String) {
        let State::Pausing { update } = &self.state else { return };
        let (manifest, current) = (update.target.manifest, update.current.clone());
        self.state = match current {
            Some(current) if self.serving == Some(current.manifest) => State::Serving { current },
            Some(current) => State::Stuck { current, quiet: false },
            None => State::Waiting { scan: true, serving: self.serving },
        };
        // Of what it was to go back to that says nothing: what led there failed before.
        if self.base.as_ref().is_none_or(|base| base.target.manifest != manifest) {
            self.fail(manifest, reason);
        }
        self.tell(Tell::Aborted { manifest });
        self.changed();
    }

    /// The bytes are right, the engine is not well, and paused.
    fn will_not_resume(&mut self, manifest: ManifestHash, reason: String) {
        let was_told = self.counts(Asked::Resume, manifest);
        match &self.state {
            State::Resuming { target } | State::Serving { current: target }
                if was_told || self.serving == Some(manifest) =>
            {
                let target = target.clone();
                self.serving = None;
                self.fail(manifest, reason);
                self.base.take_if(|base| base.target.manifest == manifest);
                self.go_back(target);
            }
            // It was said to go on with what it had, after a pause that was called off. What is being prepared
            // is for an engine that pauses, and it will say again that it does.
            State::Staging { .. } | State::Preparing { .. } | State::Prepared { .. } | State::Pausing { .. }
                if self.serving == Some(manifest) =>
            {
                self.serving = None;
                self.fail(manifest, reason);
                self.changed();
            }
            State::Registering
            | State::Waiting { .. }
            | State::Scanning { .. }
            | State::Filling { .. }
            | State::Serving { .. }
            | State::Staging { .. }
            | State::Preparing { .. }
            | State::Prepared { .. }
            | State::Pausing { .. }
            | State::Applying { .. }
            | State::InPlace { .. }
            | State::Resuming { .. }
            | State::Stuck { .. } => {}
        }
    }

    pub(super) fn on_overdue(&mut self, reason: String) {
        let (Some(asked), Some(target)) = (self.state.asked(), self.state.target().cloned()) else { return };
        self.owed.push_back((asked, target.manifest));
        if self.owed.len() > ENGINE_ANSWERS_OWED_MAX {
            self.owed.pop_front();
        }
        match asked {
            Asked::Pause => self.will_not_pause(reason),
            Asked::Check => {
                self.fail(target.manifest, reason);
                self.go_back(target);
            }
            // It may begin to answer from it at any moment: nothing of its memory is touched before it has
            // said that it pauses.
            Asked::Resume => {
                self.serving = None;
                self.fail(target.manifest, reason);
                self.base.take_if(|base| base.target.manifest == target.manifest);
                match &self.base {
                    Some(base) => {
                        let base = base.target.clone();
                        self.stage_from(Some(target), base, None);
                    }
                    None => {
                        self.state = State::Stuck { current: target, quiet: false };
                        self.changed();
                    }
                }
            }
        }
    }

    /// Whether this answers what was asked last. What comes late answers an earlier question: an engine
    /// answers each once, and in order.
    fn counts(&mut self, asked: Asked, manifest: ManifestHash) -> bool {
        if let Some(at) = self.owed.iter().position(|owed| *owed == (asked, manifest)) {
            self.owed.drain(..=at);
            return false;
        }
        let is_asked = self.state.asked() == Some(asked);
        let answers = is_asked && self.state.target().is_some_and(|target| target.manifest == manifest);
        if answers {
            self.owed.clear();
        }
        answers
    }

    fn fail(&mut self, manifest: ManifestHash, reason: String) {
        self.passed.retain(|passed| *passed != manifest);
        let goes_back = self.base.as_ref().is_some_and(|base| base.target.manifest == manifest);
        // What led there says more than that the way back failed too.
        if !(goes_back && self.failed.is_some()) {
            self.failed = Some((manifest, reason));
        }
    }
}
