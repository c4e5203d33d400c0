//! Where an engine is on its way from one release to the next.

use super::{Asked, Target};
use aquifer_core::{ChunkSet, ManifestHash, Phase};

#[derive(Debug)]
pub(super) enum State {
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
    /// Answers nothing: chunks go straight to their spots.
    Filling {
        target: Target,
        landed: ChunkSet,
        available: ChunkSet,
    },
    Serving {
        current: Target,
    },
    /// The changed chunks of the target are gathered beside what it answers from.
    Staging {
        update: Update,
        staged: ChunkSet,
    },
    /// They are all there; the driver puts them, and what they will overwrite, where each is at hand.
    Preparing {
        update: Update,
    },
    /// Ready to pause, once it may.
    Prepared {
        update: Update,
    },
    /// It was asked to pause.
    Pausing {
        update: Update,
    },
    /// It answers nothing, and its memory is being changed.
    Applying {
        target: Target,
        in_place: ChunkSet,
    },
    /// All of the target is in place, and it answers nothing yet.
    InPlace {
        target: Target,
        way: Way,
        check: Check,
    },
    /// It was told to answer from the target, and has not said that it does.
    Resuming {
        target: Target,
    },
    /// It holds this whole and answers nothing, and nothing is to be done about it before another release
    /// comes. `quiet`: for certain, so that its memory may be changed.
    Stuck {
        current: Target,
        quiet: bool,
    },
}

/// From one release to the next while it answers.
#[derive(Clone, Debug)]
pub(super) struct Update {
    /// What lies whole in its memory. None if it answers from something this agent knows only as bytes.
    pub(super) current: Option<Target>,
    pub(super) target: Target,
    /// Chunks of the target that lie where they belong already.
    pub(super) in_place: ChunkSet,
}

/// How it came to hold a release, and so how it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// It was filled while it answered nothing.
    Filled,
    /// It paused for it.
    Paused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    Due,
    Running,
    Passed,
}

impl Update {
    /// Chunks of the target that change in memory.
    pub(super) fn changes(&self) -> ChunkSet {
        let mut chunks = self.target.plan.needs().clone();
        chunks.subtract(&self.in_place);
        chunks
    }
}

impl State {
    /// In one word.
    pub(super) fn name(&self) -> &'static str {
        match self {
            State::Registering => "registering",
            State::Waiting { .. } => "waiting",
            State::Scanning { .. } => "scanning",
            State::Filling { .. } => "hydrating",
            State::Serving { .. } => "serving",
            State::Staging { .. } => "staging",
            State::Preparing { .. } => "preparing",
            State::Prepared { .. } => "staged",
            State::Pausing { .. } => "pausing",
            State::Applying { .. } => "applying",
            State::InPlace { way: Way::Filled, check: Check::Due, .. } => "hydrated",
            State::InPlace { way: Way::Paused, check: Check::Due, .. } => "applied",
            State::InPlace { check: Check::Running, .. } => "checking",
            State::InPlace { check: Check::Passed, .. } => "checked",
            State::Resuming { .. } => "resuming",
            State::Stuck { .. } => "failed",
        }
    }

    /// The release whose chunks are spoken of.
    pub(super) fn target(&self) -> Option<&Target> {
        match self {
            State::Registering | State::Waiting { .. } => None,
            State::Scanning { target, .. }
            | State::Filling { target, .. }
            | State::Applying { target, .. }
            | State::InPlace { target, .. }
            | State::Resuming { target } => Some(target),
            State::Staging { update, .. }
            | State::Preparing { update }
            | State::Prepared { update }
            | State::Pausing { update } => Some(&update.target),
            State::Serving { current } | State::Stuck { current, .. } => Some(current),
        }
    }

    /// From when the target's chunks are gathered until the engine has paused for them.
    pub(super) fn update(&self) -> Option<&Update> {
        match self {
            State::Staging { update, .. }
            | State::Preparing { update }
            | State::Prepared { update }
            | State::Pausing { update } => Some(update),
            State::Registering
            | State::Waiting { .. }
            | State::Scanning { .. }
            | State::Filling { .. }
            | State::Serving { .. }
            | State::Applying { .. }
            | State::InPlace { .. }
            | State::Resuming { .. }
            | State::Stuck { .. } => None,
        }
    }

    /// How far the target is, if it is not what the engine answers from.
    pub(super) fn phase(&self) -> Phase {
        match self {
            State::Registering
            | State::Waiting { .. }
            | State::Scanning { .. }
            | State::Serving { .. }
            | State::Stuck { .. } => Phase::Heard,
            State::Filling { .. } | State::Staging { .. } => Phase::Planned,
            State::Preparing { .. } => Phase::Verified,
            State::Prepared { .. }
            | State::Pausing { .. }
            | State::InPlace { way: Way::Filled, check: Check::Due, .. } => Phase::Staged,
            State::Applying { .. } | State::InPlace { check: Check::Due | Check::Running, .. } => Phase::Paused,
            State::InPlace { check: Check::Passed, .. } | State::Resuming { .. } => Phase::Checked,
        }
    }

    /// What the engine has to answer.
    pub(super) fn asked(&self) -> Option<Asked> {
        match self {
            State::Pausing { .. } => Some(Asked::Pause),
            State::InPlace { check: Check::Running, .. } => Some(Asked::Check),
            State::Resuming { .. } => Some(Asked::Resume),
            State::Registering
            | State::Waiting { .. }
            | State::Scanning { .. }
            | State::Filling { .. }
            | State::Serving { .. }
            | State::Staging { .. }
            | State::Preparing { .. }
            | State::Prepared { .. }
            | State::Applying { .. }
            | State::InPlace { check: Check::Due | Check::Passed, .. }
            | State::Stuck { .. } => None,
        }
    }
}
