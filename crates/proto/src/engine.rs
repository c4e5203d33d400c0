//! One engine's way from registered memory to serving a release, and from release to release.
//!
//! While the engine serves nothing, chunks land straight in its memory. While it serves, a new
//! release is gathered beside it and applied between `pause` and `resume`. An engine is never
//! said to serve what is not wholly in place.

use crate::plan::Plan;
use aquifer_core::{ChunkSet, Layout, ManifestHash};
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// A release as it concerns one engine.
#[derive(Clone, Debug)]
pub struct Target {
    pub manifest: ManifestHash,
    pub plan: Arc<Plan>,
    pub layout: Arc<Layout>,
}

#[derive(Clone, Debug)]
pub enum EngineInput {
    /// Registration is complete. `serving`: the engine answers from what its memory holds now,
    /// and must not be disturbed. `fresh`: nothing was ever written there.
    Hydrate {
        serving: Option<ManifestHash>,
        fresh: bool,
    },
    /// This is the release to get to.
    Target(Target),
    /// The newest release does not fit the bindings.
    Unfit {
        manifest: ManifestHash,
        reason: String,
    },
    /// Chunks of the target whose every spot was hashed, and is right.
    Scanned {
        in_place: ChunkSet,
    },
    /// The driver is about to land this chunk of the target in its place in the region.
    Landing {
        chunk: u32,
    },
    /// That ended.
    Landed {
        chunk: u32,
        verified: bool,
    },
    /// These chunks of the target lie verified somewhere on this node.
    Available {
        chunks: ChunkSet,
    },
    /// An [`EngineOutput::Copy`] ended.
    Copied {
        chunk: u32,
        ok: bool,
    },
    /// An [`EngineOutput::Apply`] ended.
    Applied {
        ok: bool,
    },
    /// The engine quiesced; it goes on; it would not.
    Paused,
    Resumed,
    Refused {
        reason: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineOutput {
    /// Hash what lies in the regions against the target.
    Scan,
    /// Copy the chunk from where it lies to its spots.
    Copy {
        chunk: u32,
    },
    /// Copy all of them, while the engine is paused.
    Apply {
        chunks: ChunkSet,
    },
    /// What the engine needs fetched is not what it was, and what lies verified in its memory neither.
    WantsChanged,
    /// What lies verified in the engine's memory is not what it was.
    PlacesChanged,
    Tell(Tell),
}

/// What to tell the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tell {
    Hydrated { manifest: ManifestHash },
    Pause { manifest: ManifestHash, bytes: u64 },
    Applied { manifest: ManifestHash },
    Aborted { manifest: ManifestHash },
    Failed { manifest: ManifestHash, code: &'static str, reason: String },
}

#[derive(Debug)]
enum Phase {
    /// Bindings are coming in.
    Registering,
    /// Registered; no release is known yet.
    Waiting {
        scan: bool,
        serving: Option<ManifestHash>,
    },
    /// Memory is being hashed. `serving` as the engine said it.
    Scanning {
        target: Target,
        serving: Option<ManifestHash>,
    },
    /// Not serving: chunks go straight to their spots.
    Filling {
        target: Target,
        landed: ChunkSet,
        available: ChunkSet,
    },
    Serving {
        current: Target,
    },
    /// Serving, with the changed chunks of the target gathered beside it. `current` is None if
    /// the engine serves something this agent knows only as bytes.
    Staging {
        current: Option<Target>,
        target: Target,
        in_place: ChunkSet,
        staged: ChunkSet,
    },
    Pausing {
        current: Option<Target>,
        target: Target,
        in_place: ChunkSet,
    },
    Applying {
        target: Target,
        in_place: ChunkSet,
    },
    /// `refused`: the engine would not serve it; only another release can help.
    Resuming {
        current: Target,
        refused: bool,
    },
}

/// One engine. See the module.
#[derive(Debug)]
pub struct EngineSession {
    phase: Phase,
    /// Chunks being landed or copied into the engine's memory now.
    busy: BTreeSet<u32>,
    /// A newer target, waiting for a moment when it can be turned to.
    next: Option<Target>,
    /// A release the engine cannot or would not take.
    refused: Option<(ManifestHash, String)>,
    /// What the engine answers from.
    serving: Option<ManifestHash>,
    out: VecDeque<EngineOutput>,
}

impl Default for EngineSession {
    fn default() -> Self {
        EngineSession {
            phase: Phase::Registering,
            busy: BTreeSet::new(),
            next: None,
            refused: None,
            serving: None,
            out: VecDeque::new(),
        }
    }
}

impl EngineSession {
    pub fn handle(&mut self, input: EngineInput) {
        match input {
            EngineInput::Hydrate { serving, fresh } => self.on_hydrate(serving, fresh),
            EngineInput::Target(target) => self.on_target(target),
            EngineInput::Unfit { manifest, reason } => self.on_unfit(manifest, reason),
            EngineInput::Scanned { in_place } => self.on_scanned(in_place),
            EngineInput::Landing { chunk } => drop(self.busy.insert(chunk)),
            EngineInput::Landed { chunk, verified } => self.on_in_place(chunk, verified),
            EngineInput::Copied { chunk, ok } => self.on_in_place(chunk, ok),
            EngineInput::Available { chunks } => self.on_available(&chunks),
            EngineInput::Applied { ok } => self.on_applied(ok),
            EngineInput::Paused => self.on_paused(),
            EngineInput::Resumed => self.on_resumed(),
            EngineInput::Refused { reason } => self.on_refused(reason),
        }
        self.turn_to_next();
    }

    pub fn poll_output(&mut self) -> Option<EngineOutput> {
        self.out.pop_front()
    }

    /// In one word, for status.
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Registering => "registering",
            Phase::Waiting { .. } => "waiting",
            Phase::Scanning { .. } => "scanning",
            Phase::Filling { .. } => "hydrating",
            Phase::Serving { .. } => "serving",
            Phase::Staging { .. } => "staging",
            Phase::Pausing { .. } => "pausing",
            Phase::Applying { .. } => "applying",
            Phase::Resuming { .. } => "resuming",
        }
    }

    pub fn is_registering(&self) -> bool {
        matches!(self.phase, Phase::Registering)
    }

    /// What the engine answers from, as far as it is known: an engine that was there before this
    /// agent is believed until its memory was hashed.
    pub fn serving(&self) -> Option<ManifestHash> {
        self.serving
    }

    /// What the engine answers from, if every byte of it was seen to be in place.
    pub fn verified(&self) -> Option<ManifestHash> {
        match &self.phase {
            Phase::Serving { current } => Some(current.manifest),
            Phase::Staging { current, .. } | Phase::Pausing { current, .. } => current.as_ref().map(|c| c.manifest),
            Phase::Registering
            | Phase::Waiting { .. }
            | Phase::Scanning { .. }
            | Phase::Filling { .. }
            | Phase::Applying { .. }
            | Phase::Resuming { .. } => None,
        }
    }

    /// Why the newest release is not what it serves, if that will not change by itself.
    pub fn refusal(&self) -> Option<&(ManifestHash, String)> {
        self.refused.as_ref()
    }

    pub fn target(&self) -> Option<&Target> {
        match &self.phase {
            Phase::Registering | Phase::Waiting { .. } => None,
            Phase::Scanning { target, .. }
            | Phase::Filling { target, .. }
            | Phase::Staging { target, .. }
            | Phase::Pausing { target, .. }
            | Phase::Applying { target, .. } => Some(target),
            Phase::Serving { current } | Phase::Resuming { current, .. } => Some(current),
        }
    }

    /// The newest release it was pointed at, whether it has turned to it or not.
    pub fn aim(&self) -> Option<&Target> {
        self.next.as_ref().or_else(|| self.target())
    }

    /// Whether it gives up what it is being filled with, as soon as nothing is on its way into its memory.
    pub fn is_turning(&self) -> bool {
        self.next.is_some() && matches!(self.phase, Phase::Filling { .. })
    }

    /// Chunks of the target this engine needs on this node, whether there or not. None until
    /// that is known.
    pub fn needs(&self) -> Option<&ChunkSet> {
        let known = !matches!(self.phase, Phase::Registering | Phase::Waiting { .. } | Phase::Scanning { .. });
        self.target().filter(|_| known).map(|t| t.plan.needs())
    }

    /// Chunks of the target that are right in the engine's memory, and how many it needs.
    pub fn progress(&self) -> (u32, u32) {
        let of = |target: &Target, done: u32| (done, target.plan.needs().count());
        match &self.phase {
            Phase::Registering | Phase::Waiting { .. } | Phase::Scanning { .. } => (0, 0),
            Phase::Filling { target, landed, .. } => of(target, landed.count()),
            Phase::Staging { target, in_place, staged, .. } => of(target, in_place.count() + staged.count()),
            Phase::Pausing { target, .. } | Phase::Applying { target, .. } => of(target, target.plan.needs().count()),
            Phase::Serving { current } | Phase::Resuming { current, .. } => of(current, current.plan.needs().count()),
        }
    }

    /// Where chunk `chunk` of `manifest` lies whole and verified in the engine's memory.
    pub fn place(&self, manifest: &ManifestHash, chunk: u32) -> Option<(u32, Range<u64>)> {
        let held = |target: &Target, landed: &ChunkSet| {
            (target.manifest == *manifest && landed.contains(chunk)).then(|| target.plan.place(chunk)).flatten()
        };
        match &self.phase {
            Phase::Registering | Phase::Waiting { .. } | Phase::Scanning { .. } => None,
            Phase::Filling { target, landed, .. } => held(target, landed),
            Phase::Serving { current } | Phase::Resuming { current, .. } => held(current, current.plan.needs()),
            Phase::Applying { target, in_place } => held(target, in_place),
            Phase::Staging { current, target, in_place, .. } | Phase::Pausing { current, target, in_place } => {
                let old = current.as_ref().and_then(|c| held(c, c.plan.needs()));
                old.or_else(|| held(target, in_place))
            }
        }
    }

    /// Chunks that change in the engine's memory once it pauses, from when it is asked to until then.
    pub fn to_change(&self) -> Option<ChunkSet> {
        let Phase::Pausing { target, in_place, .. } = &self.phase else { return None };
        let mut chunks = target.plan.needs().clone();
        chunks.subtract(in_place);
        Some(chunks)
    }

    /// Whether the driver may land this chunk of `manifest` in the engine's memory at once.
    pub fn landing_place(&self, manifest: &ManifestHash, chunk: u32) -> Option<(u32, Range<u64>)> {
        let Phase::Filling { target, landed, .. } = &self.phase else { return None };
        let free = self.next.is_none() && !landed.contains(chunk) && !self.busy.contains(&chunk);
        (free && target.manifest == *manifest && target.plan.needs().contains(chunk))
            .then(|| target.plan.place(chunk))
            .flatten()
    }

    /// Whether a chunk of `manifest` that lies in the node's store is still waited for here.
    pub fn is_gathering(&self, manifest: &ManifestHash, chunk: u32) -> bool {
        match &self.phase {
            Phase::Filling { target, landed, .. } => {
                target.manifest == *manifest && target.plan.needs().contains(chunk) && !landed.contains(chunk)
            }
            Phase::Staging { target, in_place, .. }
            | Phase::Pausing { target, in_place, .. }
            | Phase::Applying { target, in_place } => {
                target.manifest == *manifest && target.plan.needs().contains(chunk) && !in_place.contains(chunk)
            }
            Phase::Registering
            | Phase::Waiting { .. }
            | Phase::Scanning { .. }
            | Phase::Serving { .. }
            | Phase::Resuming { .. } => false,
        }
    }

    fn on_hydrate(&mut self, serving: Option<ManifestHash>, fresh: bool) {
        if matches!(self.phase, Phase::Registering) {
            // What it says it serves is a claim until its memory was hashed.
            self.phase = Phase::Waiting { scan: !fresh || serving.is_some(), serving };
        }
    }

    fn on_target(&mut self, target: Target) {
        self.refused = None;
        self.next = Some(target);
    }

    fn on_unfit(&mut self, manifest: ManifestHash, reason: String) {
        self.next = None;
        self.tell(Tell::Failed { manifest, code: "incompatible", reason: reason.clone() });
        self.refused = Some((manifest, reason));
    }

    /// Takes up the newest target as soon as nothing is being written for the one before.
    fn turn_to_next(&mut self) {
        if !self.busy.is_empty() {
            return;
        }
        let ready = matches!(
            self.phase,
            Phase::Waiting { .. }
                | Phase::Filling { .. }
                | Phase::Serving { .. }
                | Phase::Staging { .. }
                | Phase::Resuming { refused: true, .. }
        );
        let Some(next) = self.next.take_if(|_| ready) else { return };
        match std::mem::replace(&mut self.phase, Phase::Registering) {
            Phase::Waiting { scan: false, .. } => self.fill(next, None),
            Phase::Waiting { serving, .. } => {
                self.phase = Phase::Scanning { target: next, serving };
                self.out.push_back(EngineOutput::Scan);
            }
            Phase::Filling { target, landed, available } => {
                if target.manifest == next.manifest {
                    self.phase = Phase::Filling { target, landed, available };
                } else {
                    let kept = next.plan.carried_over(&next.layout, &target.plan, &target.layout, &landed);
                    self.fill(next, Some(kept));
                }
            }
            Phase::Serving { current } => {
                if current.manifest == next.manifest {
                    self.phase = Phase::Serving { current };
                } else {
                    let all = current.plan.needs();
                    let in_place = next.plan.carried_over(&next.layout, &current.plan, &current.layout, all);
                    self.stage(Some(current), next, in_place);
                }
            }
            Phase::Staging { current, target, in_place, .. } => {
                let in_place = match &current {
                    Some(c) if c.manifest == next.manifest => {
                        // Back to what it serves: nothing to do.
                        self.phase = Phase::Serving { current: c.clone() };
                        self.changed();
                        return;
                    }
                    Some(c) => next.plan.carried_over(&next.layout, &c.plan, &c.layout, c.plan.needs()),
                    None => next.plan.carried_over(&next.layout, &target.plan, &target.layout, &in_place),
                };
                self.stage(current, next, in_place);
            }
            Phase::Resuming { current, .. } => {
                let all = current.plan.needs();
                let kept = next.plan.carried_over(&next.layout, &current.plan, &current.layout, all);
                self.fill(next, Some(kept));
            }
            phase @ (Phase::Registering | Phase::Scanning { .. } | Phase::Pausing { .. } | Phase::Applying { .. }) => {
                self.phase = phase
            }
        }
    }

    fn fill(&mut self, target: Target, landed: Option<ChunkSet>) {
        let empty = ChunkSet::empty(target.layout.len());
        let landed = landed.unwrap_or_else(|| empty.clone());
        self.phase = Phase::Filling { target, landed, available: empty };
        self.changed();
        self.finish_filling();
    }

    fn stage(&mut self, current: Option<Target>, target: Target, in_place: ChunkSet) {
        let staged = ChunkSet::empty(target.layout.len());
        self.phase = Phase::Staging { current, target, in_place, staged };
        self.changed();
        self.finish_staging();
    }

    fn on_scanned(&mut self, in_place: ChunkSet) {
        let Phase::Scanning { target, serving } = &self.phase else { return };
        let (target, serving) = (target.clone(), *serving);
        match serving {
            Some(other) if other != target.manifest => {
                self.serving = Some(other);
                self.stage(None, target, in_place);
            }
            // Nothing served, or what it believes to serve: if its memory is not it, repair it
            // at once; if it is, this ends the filling before it began.
            _ => {
                self.serving = None;
                self.fill(target, Some(in_place));
            }
        }
    }

    fn on_in_place(&mut self, chunk: u32, ok: bool) {
        if !self.busy.remove(&chunk) {
            return;
        }
        if let Phase::Filling { target, landed, available } = &mut self.phase {
            if ok && target.plan.needs().contains(chunk) {
                landed.insert(chunk);
            } else {
                available.remove(chunk);
            }
        }
        self.finish_filling();
    }

    fn on_available(&mut self, chunks: &ChunkSet) {
        match &mut self.phase {
            Phase::Filling { target, landed, available } => {
                let new: Vec<u32> = chunks
                    .intersection(target.plan.needs())
                    .filter(|c| !landed.contains(*c) && !self.busy.contains(c) && available.insert(*c))
                    .collect();
                for chunk in new {
                    self.busy.insert(chunk);
                    self.out.push_back(EngineOutput::Copy { chunk });
                }
            }
            Phase::Staging { target, in_place, staged, .. } => {
                let new: Vec<u32> =
                    chunks.intersection(target.plan.needs()).filter(|c| !in_place.contains(*c)).collect();
                for chunk in new {
                    staged.insert(chunk);
                }
                self.finish_staging();
            }
            Phase::Registering
            | Phase::Waiting { .. }
            | Phase::Scanning { .. }
            | Phase::Serving { .. }
            | Phase::Pausing { .. }
            | Phase::Applying { .. }
            | Phase::Resuming { .. } => {}
        }
    }

    fn finish_filling(&mut self) {
        let Phase::Filling { target, landed, .. } = &self.phase else { return };
        if self.busy.is_empty() && self.next.is_none() && landed.is_superset(target.plan.needs()) {
            let current = target.clone();
            let manifest = current.manifest;
            self.phase = Phase::Serving { current };
            self.serving = Some(manifest);
            self.tell(Tell::Hydrated { manifest });
            self.changed();
        }
    }

    fn finish_staging(&mut self) {
        let Phase::Staging { current, target, in_place, staged } = &self.phase else { return };
        if self.next.is_some() || in_place.count() + staged.count() < target.plan.needs().count() {
            return;
        }
        let (manifest, bytes) = (target.manifest, target.plan.bytes_of(staged));
        let (current, target, in_place) = (current.clone(), target.clone(), in_place.clone());
        self.phase = Phase::Pausing { current, target, in_place };
        self.tell(Tell::Pause { manifest, bytes });
    }

    fn on_paused(&mut self) {
        let Some(chunks) = self.to_change() else { return };
        let Phase::Pausing { target, in_place, .. } = &self.phase else { return };
        self.phase = Phase::Applying { target: target.clone(), in_place: in_place.clone() };
        self.serving = None;
        // First, since every answer waits for it.
        self.out.push_back(EngineOutput::Apply { chunks });
        self.out.push_back(EngineOutput::PlacesChanged);
    }

    fn on_applied(&mut self, ok: bool) {
        let Phase::Applying { target, in_place } = &self.phase else { return };
        let target = target.clone();
        if ok {
            let manifest = target.manifest;
            self.phase = Phase::Resuming { current: target, refused: false };
            self.tell(Tell::Applied { manifest });
            self.out.push_back(EngineOutput::PlacesChanged);
        } else {
            // Memory is half one, half the other, and the engine is paused: fill it like new.
            let in_place = in_place.clone();
            self.fill(target, Some(in_place));
        }
    }

    fn on_resumed(&mut self) {
        let Phase::Resuming { current, .. } = &self.phase else { return };
        let current = current.clone();
        self.serving = Some(current.manifest);
        self.phase = Phase::Serving { current };
        self.changed();
    }

    fn on_refused(&mut self, reason: String) {
        match &self.phase {
            Phase::Pausing { current, target, .. } => {
                let manifest = target.manifest;
                self.refused = Some((manifest, reason));
                self.phase = match current {
                    Some(current) => Phase::Serving { current: current.clone() },
                    None => Phase::Waiting { scan: true, serving: self.serving },
                };
                self.tell(Tell::Aborted { manifest });
                self.changed();
            }
            // The bytes are right, the engine is not well: it stays paused, not ready, until
            // another release comes.
            Phase::Resuming { current, .. } | Phase::Serving { current } => {
                let current = current.clone();
                self.refused = Some((current.manifest, reason));
                self.serving = None;
                self.phase = Phase::Resuming { current, refused: true };
                self.changed();
            }
            Phase::Registering
            | Phase::Waiting { .. }
            | Phase::Scanning { .. }
            | Phase::Filling { .. }
            | Phase::Staging { .. }
            | Phase::Applying { .. } => {}
        }
    }

    fn changed(&mut self) {
        self.out.push_back(EngineOutput::WantsChanged);
    }

    fn tell(&mut self, tell: Tell) {
        self.out.push_back(EngineOutput::Tell(tell));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{bind, manifest};
    use std::collections::BTreeMap;

    /// One tensor of two rows, bound whole; `content` names the chunks.
    fn target(content: [u8; 2]) -> Target {
        let (m, layout) = manifest(&[("a", &content)]);
        let plan = Plan::of(&m, &layout, &[bind("a", 2, vec![], 0)], &[], &BTreeMap::from([(0, 64)])).unwrap();
        Target { manifest: ManifestHash::of(&content), plan: Arc::new(plan), layout: Arc::new(layout) }
    }

    fn drain(session: &mut EngineSession) -> Vec<EngineOutput> {
        std::iter::from_fn(|| session.poll_output())
            .filter(|o| !matches!(o, EngineOutput::WantsChanged | EngineOutput::PlacesChanged))
            .collect()
    }

    fn set(chunks: &[u32]) -> ChunkSet {
        ChunkSet::from_indices(2, chunks.iter().copied())
    }

    fn serving(content: [u8; 2]) -> EngineSession {
        let mut session = EngineSession::default();
        session.handle(EngineInput::Hydrate { serving: None, fresh: true });
        session.handle(EngineInput::Target(target(content)));
        for chunk in 0..2 {
            assert!(session.landing_place(&ManifestHash::of(&content), chunk).is_some());
            session.handle(EngineInput::Landing { chunk });
            session.handle(EngineInput::Landed { chunk, verified: true });
        }
        let manifest = ManifestHash::of(&content);
        assert_eq!(drain(&mut session), [EngineOutput::Tell(Tell::Hydrated { manifest })]);
        assert_eq!(session.serving(), Some(manifest));
        session
    }

    #[test]
    fn an_update_moves_what_changed_between_pause_and_resume() {
        let mut session = serving([1, 2]);
        let new = ManifestHash::of(&[1, 9]);
        session.handle(EngineInput::Target(target([1, 9])));
        assert!(session.place(&new, 0).is_some() && session.place(&new, 1).is_none());
        assert_eq!(session.landing_place(&new, 1), None, "never into the memory of a serving engine");
        session.handle(EngineInput::Available { chunks: set(&[1]) });
        assert_eq!(drain(&mut session), [EngineOutput::Tell(Tell::Pause { manifest: new, bytes: 8 })]);
        assert_eq!(session.serving(), Some(ManifestHash::of(&[1, 2])));
        session.handle(EngineInput::Paused);
        assert_eq!(drain(&mut session), [EngineOutput::Apply { chunks: set(&[1]) }]);
        assert_eq!(session.serving(), None);
        session.handle(EngineInput::Applied { ok: true });
        assert_eq!(drain(&mut session), [EngineOutput::Tell(Tell::Applied { manifest: new })]);
        assert_eq!(session.serving(), None);
        session.handle(EngineInput::Resumed);
        assert_eq!(session.serving(), Some(new));
    }

    #[test]
    fn a_superseded_release_is_never_applied() {
        let mut session = serving([1, 2]);
        session.handle(EngineInput::Target(target([1, 9])));
        session.handle(EngineInput::Target(target([7, 9])));
        session.handle(EngineInput::Available { chunks: set(&[1]) });
        assert_eq!(drain(&mut session), []);
        session.handle(EngineInput::Available { chunks: set(&[0]) });
        let newest = ManifestHash::of(&[7, 9]);
        assert_eq!(drain(&mut session), [EngineOutput::Tell(Tell::Pause { manifest: newest, bytes: 16 })]);
    }

    #[test]
    fn nothing_is_planned_anew_while_bytes_are_in_flight() {
        let mut session = EngineSession::default();
        session.handle(EngineInput::Hydrate { serving: None, fresh: true });
        session.handle(EngineInput::Target(target([1, 2])));
        session.handle(EngineInput::Landing { chunk: 0 });
        session.handle(EngineInput::Target(target([8, 2])));
        let (old, new) = (ManifestHash::of(&[1, 2]), ManifestHash::of(&[8, 2]));
        assert_eq!(session.landing_place(&new, 1), None);
        assert_eq!(session.landing_place(&old, 1), None);
        session.handle(EngineInput::Landed { chunk: 0, verified: true });
        assert!(session.landing_place(&new, 1).is_some());
        assert!(session.landing_place(&new, 0).is_some(), "what landed was of the old release");
    }

    #[test]
    fn a_returning_engine_is_hashed_not_believed() {
        let mut session = EngineSession::default();
        let manifest = ManifestHash::of(&[1, 2]);
        session.handle(EngineInput::Hydrate { serving: Some(manifest), fresh: false });
        session.handle(EngineInput::Target(target([1, 2])));
        assert_eq!(drain(&mut session), [EngineOutput::Scan]);
        assert_eq!(session.verified(), None, "its word is not proof");
        session.handle(EngineInput::Scanned { in_place: set(&[0]) });
        assert_eq!(session.serving(), None);
        assert!(session.landing_place(&manifest, 1).is_some());
    }

    #[test]
    fn an_engine_serving_something_else_is_not_disturbed() {
        let mut session = EngineSession::default();
        let (old, new) = (ManifestHash::of(&[1, 2]), ManifestHash::of(&[1, 9]));
        session.handle(EngineInput::Hydrate { serving: Some(old), fresh: false });
        session.handle(EngineInput::Target(target([1, 9])));
        session.handle(EngineInput::Scanned { in_place: set(&[0]) });
        assert_eq!((session.serving(), session.landing_place(&new, 1)), (Some(old), None));
        drain(&mut session);
        session.handle(EngineInput::Available { chunks: set(&[1]) });
        assert_eq!(drain(&mut session), [EngineOutput::Tell(Tell::Pause { manifest: new, bytes: 8 })]);
    }

    #[test]
    fn an_engine_that_will_not_pause_keeps_what_it_has() {
        let mut session = serving([1, 2]);
        let (old, new) = (ManifestHash::of(&[1, 2]), ManifestHash::of(&[1, 9]));
        session.handle(EngineInput::Target(target([1, 9])));
        session.handle(EngineInput::Available { chunks: set(&[1]) });
        drain(&mut session);
        session.handle(EngineInput::Refused { reason: "busy".into() });
        assert_eq!(drain(&mut session), [EngineOutput::Tell(Tell::Aborted { manifest: new })]);
        assert_eq!(session.serving(), Some(old));
        assert_eq!(session.refusal().map(|r| r.0), Some(new));
    }

    #[test]
    fn an_engine_that_will_not_resume_takes_the_next_release() {
        let mut session = serving([1, 2]);
        session.handle(EngineInput::Target(target([1, 9])));
        session.handle(EngineInput::Available { chunks: set(&[1]) });
        session.handle(EngineInput::Paused);
        session.handle(EngineInput::Applied { ok: true });
        session.handle(EngineInput::Refused { reason: "broken".into() });
        assert_eq!(session.serving(), None);
        drain(&mut session);
        session.handle(EngineInput::Target(target([1, 2])));
        session.handle(EngineInput::Landing { chunk: 1 });
        session.handle(EngineInput::Landed { chunk: 1, verified: true });
        let manifest = ManifestHash::of(&[1, 2]);
        assert_eq!(drain(&mut session), [EngineOutput::Tell(Tell::Hydrated { manifest })]);
        session.handle(EngineInput::Refused { reason: "still broken".into() });
        assert_eq!((session.serving(), session.phase()), (None, "resuming"), "hydrated, and refused all the same");
    }

    #[test]
    fn a_rollback_overtakes_a_release_that_waits() {
        let mut session = serving([1, 2]);
        session.handle(EngineInput::Target(target([1, 9])));
        session.handle(EngineInput::Available { chunks: set(&[1]) });
        session.handle(EngineInput::Target(target([7, 7])));
        assert_eq!(session.aim().map(|t| t.manifest), Some(ManifestHash::of(&[7, 7])));
        session.handle(EngineInput::Target(target([1, 9])));
        session.handle(EngineInput::Paused);
        session.handle(EngineInput::Applied { ok: true });
        session.handle(EngineInput::Resumed);
        assert_eq!(session.serving(), Some(ManifestHash::of(&[1, 9])));
        assert_eq!(session.phase(), "serving");
    }

    #[test]
    fn a_release_that_does_not_fit_changes_nothing() {
        let mut session = serving([1, 2]);
        let manifest = ManifestHash::of(b"other");
        session.handle(EngineInput::Unfit { manifest, reason: "shape".into() });
        assert_eq!(session.phase(), "serving");
        assert!(matches!(&drain(&mut session)[..], [EngineOutput::Tell(Tell::Failed { .. })]));
    }
}
