//! Bytes on their way to an engine's memory, and how far it goes when they are there.

use super::state::{Check, State, Update, Way};
use super::{Base, EngineOutput, EngineSession, Tell};
use crate::limits::ENGINE_RELEASES_PASSED_MAX;
use crate::rollout::Until;
use aquifer_core::{ChunkSet, ManifestHash};

impl EngineSession {
    pub(super) fn on_scanned(&mut self, in_place: ChunkSet) {
        let State::Scanning { target, serving } = &self.state else { return };
        let (target, serving) = (target.clone(), *serving);
        match serving {
            Some(other) if other != target.manifest => {
                self.serving = Some(other);
                self.stage(Update { current: None, target, in_place });
            }
            Some(manifest) if in_place.is_superset(target.plan.needs()) => {
                self.serving = Some(manifest);
                self.note_passed(manifest);
                self.state = State::Serving { current: target };
                self.tell(Tell::Hydrated { manifest });
                self.changed();
            }
            // Nothing served, or what it believes to serve and its memory is not: that is repaired at once.
            _ => self.fill(target, Some(in_place)),
        }
    }

    pub(super) fn on_in_place(&mut self, chunk: u32, ok: bool) {
        if !self.busy.remove(&chunk) {
            return;
        }
        if let State::Filling { target, landed, available } = &mut self.state {
            if ok && target.plan.needs().contains(chunk) {
                landed.insert(chunk);
            } else {
                available.remove(chunk);
            }
        }
        self.finish_filling();
    }

    pub(super) fn on_available(&mut self, chunks: &ChunkSet) {
        match &mut self.state {
            State::Filling { target, landed, available } => {
                let new: Vec<u32> = chunks
                    .intersection(target.plan.needs())
                    .filter(|c| !landed.contains(*c) && !self.busy.contains(c) && available.insert(*c))
                    .collect();
                for chunk in new {
                    self.busy.insert(chunk);
                    self.out.push_back(EngineOutput::Copy { chunk });
                }
            }
            State::Staging { update, staged } => {
                let needed = chunks.intersection(update.target.plan.needs());
                for chunk in needed.filter(|c| !update.in_place.contains(*c)) {
                    staged.insert(chunk);
                }
                self.finish_staging();
            }
            State::Registering
            | State::Waiting { .. }
            | State::Scanning { .. }
            | State::Serving { .. }
            | State::Preparing { .. }
            | State::Prepared { .. }
            | State::Pausing { .. }
            | State::Applying { .. }
            | State::InPlace { .. }
            | State::Resuming { .. }
            | State::Stuck { .. } => {}
        }
    }

    pub(super) fn finish_staging(&mut self) {
        let State::Staging { update, staged } = &self.state else { return };
        if self.next.is_some() || update.in_place.count() + staged.count() < update.target.plan.needs().count() {
            return;
        }
        let (update, chunks) = (update.clone(), staged.clone());
        let keep = self.renew_base(&update);
        self.state = State::Preparing { update };
        self.out.push_back(EngineOutput::Prepare { chunks, keep });
    }

    /// What it answers from is what it goes back to. Chunks of that to keep, if there are any.
    fn renew_base(&mut self, update: &Update) -> ChunkSet {
        let Some(current) = update.current.clone() else {
            self.base = None;
            return ChunkSet::empty(0);
        };
        if self.serving != Some(current.manifest) {
            return ChunkSet::empty(current.layout.len()); // It goes back already.
        }
        let mut keep = current.plan.needs().clone();
        keep.subtract(&current.carried_over(&update.target, update.target.plan.needs()));
        self.base = Some(Base { target: current, keep: keep.clone() });
        // Another release's chunks need not be kept any more.
        self.changed();
        keep
    }

    pub(super) fn on_prepared(&mut self, ok: bool) {
        let State::Preparing { update } = &self.state else { return };
        let update = update.clone();
        match ok {
            true => self.state = State::Prepared { update },
            false => self.stage(update),
        }
    }

    pub(super) fn on_applied(&mut self, ok: bool) {
        let State::Applying { target, in_place } = &self.state else { return };
        let (target, in_place) = (target.clone(), in_place.clone());
        if ok {
            self.state = State::InPlace { target, way: Way::Paused, check: Check::Due };
            // What is told comes first, since every answer waits for it.
            self.settle();
            self.out.push_back(EngineOutput::PlacesChanged);
        } else {
            // Memory is half one, half the other, and the engine is paused: fill it like new.
            self.fill(target, Some(in_place));
        }
    }

    /// As far as it may without anybody else.
    pub(super) fn go_on(&mut self) {
        if let State::Prepared { update } = &self.state
            && self.next.is_none()
            && self.until >= Until::Checked
        {
            let (manifest, bytes) = (update.target.manifest, update.target.plan.bytes_of(&update.changes()));
            self.state = State::Pausing { update: update.clone() };
            self.tell(Tell::Pause { manifest, bytes });
        }
        let State::InPlace { target, way, check } = &self.state else { return };
        let (target, way, mut check, manifest) = (target.clone(), *way, *check, target.manifest);
        // What it answered from before was good enough then.
        let goes_back = self.is_base(&target);
        let until = match self.next {
            _ if goes_back => Until::Serving,
            Some(_) => self.superseded_until,
            None => self.until,
        };
        if check == Check::Due && (goes_back || self.passed.contains(&manifest)) {
            check = Check::Passed;
        }
        match check {
            Check::Due if until >= Until::Checked => {
                check = Check::Running;
                self.tell(Tell::Check { manifest });
            }
            Check::Passed if until == Until::Serving => return self.let_serve(target, way),
            Check::Due | Check::Running | Check::Passed => {}
        }
        self.state = State::InPlace { target, way, check };
    }

    fn let_serve(&mut self, target: super::Target, way: Way) {
        let manifest = target.manifest;
        match way {
            Way::Paused => {
                self.state = State::Resuming { target };
                self.tell(Tell::Applied { manifest });
            }
            Way::Filled => {
                self.tell(Tell::Hydrated { manifest });
                self.serve(target);
            }
        }
    }

    /// It answers from this.
    pub(super) fn serve(&mut self, current: super::Target) {
        self.serving = Some(current.manifest);
        self.note_passed(current.manifest);
        self.state = State::Serving { current };
        self.changed();
    }

    pub(super) fn note_passed(&mut self, manifest: ManifestHash) {
        self.passed.retain(|passed| *passed != manifest);
        self.passed.push_back(manifest);
        if self.passed.len() > ENGINE_RELEASES_PASSED_MAX {
            self.passed.pop_front();
        }
    }
}
