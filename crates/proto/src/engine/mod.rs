//! One engine's way from registered memory to serving a release, and from release to release.
//!
//! While the engine serves nothing, chunks land straight in its memory. While it serves, a new
//! release is gathered beside it and applied between `pause` and `resume`; there the engine's own check
//! runs, and where it fails the release before is put back. An engine is never said to serve what is
//! not wholly in place. How far it may go is told from outside ([`EngineInput::Until`]); back to what it
//! answered from it may go at any time.

mod answers;
#[cfg(test)]
mod model;
mod moves;
mod queries;
mod state;
#[cfg(test)]
mod tests;
mod turning;

use crate::plan::Plan;
use crate::rollout::Until;
use aquifer_core::{ChunkSet, Layout, ManifestHash};
use state::State;
use std::collections::{BTreeSet, VecDeque};
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
    /// This is the release to get to. One that failed is tried again if another was the target meanwhile.
    Target(Target),
    /// How far to go with it, until this is said again. Without a word it goes on to serving.
    Until(Until),
    /// Both at once, so that what is said of one release is not taken to be of another.
    Order {
        target: Target,
        until: Until,
    },
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
    /// An [`EngineOutput::Prepare`] ended. Not `ok`: some of the chunks are not there after all.
    Prepared {
        ok: bool,
    },
    /// An [`EngineOutput::Apply`] ended.
    Applied {
        ok: bool,
    },
    /// What the engine answered: it quiesced; its check of the release passed, or failed for that reason;
    /// it answers from it; or it would not do the first or the last.
    Paused {
        manifest: ManifestHash,
    },
    Checked {
        manifest: ManifestHash,
        result: Result<(), String>,
    },
    Resumed {
        manifest: ManifestHash,
    },
    Refused {
        asked: Asked,
        manifest: ManifestHash,
        reason: String,
    },
    /// It has not answered what [`EngineSession::asked`] says, in the time it has for that.
    Overdue {
        reason: String,
    },
}

/// What an engine is asked for, and owes an answer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Asked {
    Pause,
    Check,
    Resume,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineOutput {
    /// Hash what lies in the regions against the target.
    Scan,
    /// Copy the chunk from where it lies to its spots.
    Copy {
        chunk: u32,
    },
    /// All that changes is on this node. Put `chunks` of the target where they are applied from fastest, and
    /// see to it that `keep`, chunks of [`EngineSession::base`] that will be overwritten, are on this node
    /// also then. The engine goes on serving.
    Prepare {
        chunks: ChunkSet,
        keep: ChunkSet,
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
    Hydrated {
        manifest: ManifestHash,
    },
    Pause {
        manifest: ManifestHash,
        bytes: u64,
    },
    /// It is in place: see whether it is any good, without answering anybody from it.
    Check {
        manifest: ManifestHash,
    },
    /// Answer from it: the new release, or the one before if that was put back or never overwritten.
    Applied {
        manifest: ManifestHash,
    },
    Aborted {
        manifest: ManifestHash,
    },
    Failed {
        manifest: ManifestHash,
        code: &'static str,
        reason: String,
    },
}

/// One engine. See the module.
#[derive(Debug)]
pub struct EngineSession {
    state: State,
    until: Until,
    /// How far it was to go with what it turns from, while `next` waits.
    superseded_until: Until,
    /// Chunks being landed or copied into the engine's memory now.
    busy: BTreeSet<u32>,
    /// What it was pointed at last.
    aim: Option<Target>,
    /// A newer target, waiting for a moment when it can be turned to.
    next: Option<Target>,
    /// A release the engine cannot or would not take, or that failed its check.
    failed: Option<(ManifestHash, String)>,
    /// What the engine answers from.
    serving: Option<ManifestHash>,
    /// What it goes back to: what it answers from while another is prepared, and what it answered from before.
    base: Option<Base>,
    /// Releases that it has answered from or whose check has passed, the latest last.
    passed: VecDeque<ManifestHash>,
    /// Answers that came too late to count, and are still to come.
    owed: VecDeque<(Asked, ManifestHash)>,
    out: VecDeque<EngineOutput>,
}

#[derive(Debug)]
struct Base {
    target: Target,
    /// Its chunks that were, or will be, overwritten by what comes after.
    keep: ChunkSet,
}

impl Default for EngineSession {
    fn default() -> Self {
        EngineSession {
            state: State::Registering,
            until: Until::Serving,
            superseded_until: Until::Serving,
            busy: BTreeSet::new(),
            aim: None,
            next: None,
            failed: None,
            serving: None,
            base: None,
            passed: VecDeque::new(),
            owed: VecDeque::new(),
            out: VecDeque::new(),
        }
    }
}

impl EngineSession {
    pub fn handle(&mut self, input: EngineInput) {
        match input {
            EngineInput::Hydrate { serving, fresh } => self.on_hydrate(serving, fresh),
            EngineInput::Target(target) => self.on_target(target),
            EngineInput::Until(until) => self.until = until,
            EngineInput::Order { target, until } => {
                self.on_target(target);
                self.until = until;
            }
            EngineInput::Unfit { manifest, reason } => self.on_unfit(manifest, reason),
            EngineInput::Scanned { in_place } => self.on_scanned(in_place),
            EngineInput::Landing { chunk } => drop(self.busy.insert(chunk)),
            EngineInput::Landed { chunk, verified } => self.on_in_place(chunk, verified),
            EngineInput::Copied { chunk, ok } => self.on_in_place(chunk, ok),
            EngineInput::Available { chunks } => self.on_available(&chunks),
            EngineInput::Prepared { ok } => self.on_prepared(ok),
            EngineInput::Applied { ok } => self.on_applied(ok),
            EngineInput::Paused { manifest } => self.on_paused(manifest),
            EngineInput::Checked { manifest, result } => self.on_checked(manifest, result),
            EngineInput::Resumed { manifest } => self.on_resumed(manifest),
            EngineInput::Refused { asked, manifest, reason } => self.on_refused(asked, manifest, reason),
            EngineInput::Overdue { reason } => self.on_overdue(reason),
        }
        self.settle();
        self.assert_invariants();
    }

    pub fn poll_output(&mut self) -> Option<EngineOutput> {
        self.out.pop_front()
    }

    /// Turns to a newer target, and goes as far as it may.
    fn settle(&mut self) {
        self.turn_to_next();
        self.go_on();
    }

    fn changed(&mut self) {
        self.out.push_back(EngineOutput::WantsChanged);
    }

    fn tell(&mut self, tell: Tell) {
        self.out.push_back(EngineOutput::Tell(tell));
    }

    fn assert_invariants(&self) {
        if let State::Serving { current } = &self.state {
            assert_eq!(self.serving, Some(current.manifest), "it serves what it answers from");
        }
        let quiet = matches!(self.state, State::Filling { .. } | State::Applying { .. });
        assert!(self.busy.is_empty() || quiet, "nothing is written while it may read");
        assert!(!quiet || self.serving.is_none(), "what is being changed is not answered from");
    }
}
