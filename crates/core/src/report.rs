//! How far a node's engines are with the rollout of a channel's release: the part of its status
//! record that other nodes decide by.

use crate::hash::ManifestHash;
use crate::release::ReleaseId;
use crate::times::Times;
use bincode::{Decode, Encode};
use std::fmt;

/// A node's own account of one channel, true of all its engines together.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Report {
    /// The release it is to get to, or has got to.
    pub wanted: ReleaseId,
    /// The release it serves until then, and goes back to.
    pub base: Option<ReleaseId>,
    pub step: Step,
    pub phase: Phase,
    /// What all its engines answer from, whole. None if they differ, or one of them does not answer.
    pub served: Option<ManifestHash>,
    /// Nothing of it is out: each of its engines serves what the step calls for, or has failed with that; or it calls for
    /// nothing.
    pub settled: bool,
    /// They serve it, and nobody can be ready with another one that must not be.
    pub ready: bool,
    /// How many engines it has now for the channel. With none it is not counted on: a new release does without it.
    pub engines: u32,
    /// Its operator keeps it out of rollouts.
    pub held: bool,
    /// What it waits for, or what went wrong; for people.
    pub reason: String,
    /// When it reached each phase of the wanted release; for people.
    pub times: Times,
}

/// A node's way through one release. It only ever goes down this list, also over restarts: others
/// count on what they heard once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub enum Step {
    /// Serves its base, and gets the release ready beside it.
    #[default]
    Waiting,
    /// It is its turn: it switches. Of a synchronous release: it has heard the commit, and is not
    /// ready with its base any more.
    Going,
    /// Serves the release, checked.
    Done,
    /// Goes back to its base.
    GoingBack,
    /// Serves its base, and will not take this release.
    Halted,
}

/// How near its engines are to serving the release: the farthest of them counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub enum Phase {
    #[default]
    Heard,
    /// It is known what has to be fetched.
    Planned,
    /// Everything is on this node.
    Fetched,
    /// And hashes to its name.
    Verified,
    /// And waits where it can be applied at once: prepared.
    Staged,
    /// The engine answers no requests, so that it can be changed.
    Paused,
    /// Changed, and its own check has passed.
    Checked,
    Ready,
    /// It cannot take the release, or its check failed.
    Failed,
    /// It serves its base again.
    RolledBack,
}

impl Report {
    /// The release that it is to serve now.
    pub fn due(&self) -> Option<ReleaseId> {
        self.step.due(self.wanted, self.base)
    }
}

impl Step {
    /// Which of both is to be served then.
    pub fn due(self, wanted: ReleaseId, base: Option<ReleaseId>) -> Option<ReleaseId> {
        match self {
            Step::Going | Step::Done => Some(wanted),
            Step::Waiting | Step::GoingBack | Step::Halted => base,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Waiting => "waiting",
            Step::Going => "going",
            Step::Done => "done",
            Step::GoingBack => "going back",
            Step::Halted => "halted",
        })
    }
}

impl Phase {
    pub fn is_prepared(self) -> bool {
        (Phase::Staged..=Phase::Ready).contains(&self)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Heard => "heard",
            Phase::Planned => "planned",
            Phase::Fetched => "fetched",
            Phase::Verified => "verified",
            Phase::Staged => "staged",
            Phase::Paused => "paused",
            Phase::Checked => "checked",
            Phase::Ready => "ready",
            Phase::Failed => "failed",
            Phase::RolledBack => "rolled back",
        })
    }
}
