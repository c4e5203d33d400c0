//! What is known of an engine, for its driver, for rollouts and for people.

use super::state::{State, Update};
use super::{Asked, EngineSession, Target};
use crate::rollout::Facts;
use aquifer_core::{ChunkSet, ManifestHash};
use std::ops::Range;

impl EngineSession {
    /// In one word, for status.
    pub fn phase(&self) -> &'static str {
        self.state.name()
    }

    pub fn is_registering(&self) -> bool {
        matches!(self.state, State::Registering)
    }

    /// What the engine answers from, as far as it is known: an engine that was there before this
    /// agent is believed until its memory was hashed.
    pub fn serving(&self) -> Option<ManifestHash> {
        self.serving
    }

    /// What the engine answers from, if every byte of it was seen to be in place.
    pub fn verified(&self) -> Option<ManifestHash> {
        let whole = if let State::Serving { current } = &self.state {
            Some(current)
        } else {
            self.state.update().and_then(|update| update.current.as_ref())
        };
        whole.map(|target| target.manifest).filter(|manifest| self.serving == Some(*manifest))
    }

    /// For the rollout of its channel.
    pub fn facts(&self) -> Facts {
        let rests = matches!(self.state, State::Serving { .. } | State::Stuck { .. });
        Facts {
            // One that was asked to pause, and not to go on with that, has stopped or will in a moment.
            served: self.verified().filter(|_| !self.is_pausing_in_vain()),
            target: self.state.target().filter(|_| !rests).map(|target| target.manifest),
            phase: self.state.phase(),
            failed: self.failed.clone(),
        }
    }

    fn is_pausing_in_vain(&self) -> bool {
        let called_off = matches!(self.state, State::Pausing { .. }) && self.next.is_some();
        called_off || self.owed.iter().any(|(asked, _)| *asked == Asked::Pause)
    }

    /// Why the newest release is not what it serves, if that will not change by itself.
    pub fn refusal(&self) -> Option<&(ManifestHash, String)> {
        self.failed.as_ref()
    }

    /// The release that chunk numbers are of, in what is put in and out.
    pub fn target(&self) -> Option<&Target> {
        self.state.target()
    }

    /// The newest release it was pointed at, whether it has turned to it or not, and whether it failed or not.
    pub fn aim(&self) -> Option<&Target> {
        self.aim.as_ref().or_else(|| self.target())
    }

    /// What it would go back to.
    pub fn base(&self) -> Option<&Target> {
        self.base.as_ref().map(|base| &base.target)
    }

    /// Whether a chunk of `manifest` is to be kept on this node, as long as there is room, so that the engine can
    /// go back.
    pub fn keeps(&self, manifest: &ManifestHash, chunk: u32) -> bool {
        let overwritten =
            |base: &Target| !matches!(&self.state, State::Serving { current } if current.manifest == base.manifest);
        self.base.as_ref().is_some_and(|base| {
            base.target.manifest == *manifest && base.keep.contains(chunk) && overwritten(&base.target)
        })
    }

    /// What the engine was asked, and has not answered yet.
    pub fn asked(&self) -> Option<Asked> {
        self.state.asked()
    }

    /// Whether it gives up what it is being filled with, as soon as nothing is on its way into its memory.
    pub fn is_turning(&self) -> bool {
        self.next.is_some() && matches!(self.state, State::Filling { .. })
    }

    /// Chunks of the target this engine needs on this node, whether there or not. None until
    /// that is known.
    pub fn needs(&self) -> Option<&ChunkSet> {
        let known = !matches!(self.state, State::Registering | State::Waiting { .. } | State::Scanning { .. });
        self.target().filter(|_| known).map(|t| t.plan.needs())
    }

    /// Chunks of the target that are right in the engine's memory or at hand for it, and how many it needs.
    pub fn progress(&self) -> (u32, u32) {
        let Some(needs) = self.needs() else { return (0, 0) };
        let total = needs.count();
        let done = match &self.state {
            State::Filling { landed, .. } => landed.count(),
            State::Staging { update, staged } => update.in_place.count() + staged.count(),
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
            | State::Stuck { .. } => total,
        };
        (done, total)
    }

    /// Where chunk `chunk` of `manifest` lies whole and verified in the engine's memory.
    pub fn place(&self, manifest: &ManifestHash, chunk: u32) -> Option<(u32, Range<u64>)> {
        let held = |target: &Target, landed: &ChunkSet| {
            (target.manifest == *manifest && landed.contains(chunk)).then(|| target.plan.place(chunk)).flatten()
        };
        match &self.state {
            State::Registering | State::Waiting { .. } | State::Scanning { .. } => None,
            State::Filling { target, landed, .. } => held(target, landed),
            State::Applying { target, in_place } => held(target, in_place),
            State::Serving { current: whole }
            | State::Stuck { current: whole, .. }
            | State::InPlace { target: whole, .. }
            | State::Resuming { target: whole } => held(whole, whole.plan.needs()),
            State::Staging { update, .. }
            | State::Preparing { update }
            | State::Prepared { update }
            | State::Pausing { update } => {
                let Update { current, target, in_place } = update;
                let old = current.as_ref().and_then(|c| held(c, c.plan.needs()));
                old.or_else(|| held(target, in_place))
            }
        }
    }

    /// Whether the driver may land this chunk of `manifest` in the engine's memory at once.
    pub fn landing_place(&self, manifest: &ManifestHash, chunk: u32) -> Option<(u32, Range<u64>)> {
        let State::Filling { target, landed, .. } = &self.state else { return None };
        let free = self.next.is_none() && !landed.contains(chunk) && !self.busy.contains(&chunk);
        (free && target.manifest == *manifest && target.plan.needs().contains(chunk))
            .then(|| target.plan.place(chunk))
            .flatten()
    }

    /// Whether a chunk of `manifest` that lies in the node's store is still waited for here.
    pub fn is_gathering(&self, manifest: &ManifestHash, chunk: u32) -> bool {
        let waits = |target: &Target, there: &ChunkSet| {
            target.manifest == *manifest && target.plan.needs().contains(chunk) && !there.contains(chunk)
        };
        match &self.state {
            State::Filling { target, landed, .. } => waits(target, landed),
            State::Applying { target, in_place } => waits(target, in_place),
            State::Staging { update, .. }
            | State::Preparing { update }
            | State::Prepared { update }
            | State::Pausing { update } => waits(&update.target, &update.in_place),
            State::Registering
            | State::Waiting { .. }
            | State::Scanning { .. }
            | State::Serving { .. }
            | State::InPlace { .. }
            | State::Resuming { .. }
            | State::Stuck { .. } => false,
        }
    }
}
