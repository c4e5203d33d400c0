//! What each engine of a node is told to do for a channel, and what all of them together have come to.

use aquifer_core::{ManifestHash, Phase};
use bincode::{Decode, Encode};
use std::collections::BTreeMap;

/// The driver's number for an engine.
pub type EngineId = u64;

/// How an engine is, as its session knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Facts {
    /// What it answers from, whole. None: it answers nothing, or nothing that is known to be whole.
    pub served: Option<ManifestHash>,
    /// What is being made ready for it, and how far that is.
    pub target: Option<ManifestHash>,
    pub phase: Phase,
    /// What it cannot take, or did not pass its check with, and why.
    pub failed: Option<(ManifestHash, String)>,
}

impl Facts {
    pub(super) fn has_failed(&self, manifest: &ManifestHash) -> bool {
        self.failed.as_ref().is_some_and(|(failed, _)| failed == manifest)
    }
}

/// What an engine is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode)]
pub struct Order {
    pub manifest: ManifestHash,
    pub until: Until,
}

/// How far it may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode)]
pub enum Until {
    /// Everything waits beside what it serves; it goes on answering.
    Staged,
    /// It answers no requests, and its memory is changed and checked.
    Checked,
    /// It answers from the new.
    Serving,
}

#[derive(Debug, Default)]
pub(super) struct Engines(BTreeMap<EngineId, (Facts, Option<Order>)>);

impl Engines {
    pub(super) fn on_facts(&mut self, engine: EngineId, facts: Facts) {
        self.0.entry(engine).or_default().0 = facts;
    }

    /// Whether there was such an engine.
    pub(super) fn on_gone(&mut self, engine: EngineId) -> bool {
        self.0.remove(&engine).is_some()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn facts(&self) -> impl Iterator<Item = &Facts> {
        self.0.values().map(|(facts, _)| facts)
    }

    /// What all of them answer from.
    pub(super) fn served(&self) -> Option<ManifestHash> {
        let first = self.facts().next()?.served?;
        self.facts().all(|f| f.served == Some(first)).then_some(first)
    }

    pub(super) fn all_serve(&self, manifest: &ManifestHash) -> bool {
        self.served() == Some(*manifest)
    }

    /// None of them is on its way there: each has arrived, or cannot.
    pub(super) fn are_at_rest(&self, manifest: &ManifestHash) -> bool {
        self.facts().all(|f| f.served == Some(*manifest) || f.has_failed(manifest))
    }

    pub(super) fn none_serves(&self) -> bool {
        self.facts().all(|f| f.served.is_none())
    }

    pub(super) fn failure(&self, manifest: &ManifestHash) -> Option<&str> {
        self.facts().find(|f| f.has_failed(manifest)).and_then(|f| f.failed.as_ref()).map(|(_, reason)| reason.as_str())
    }

    /// How far the last of them is with `manifest`.
    pub(super) fn phase(&self, manifest: &ManifestHash) -> Phase {
        let of = |f: &Facts| match (f.served == Some(*manifest), f.target == Some(*manifest)) {
            _ if f.has_failed(manifest) => Phase::Heard,
            (true, _) => Phase::Checked,
            (false, true) => f.phase.min(Phase::Checked),
            (false, false) => Phase::Heard,
        };
        self.facts().map(of).min().unwrap_or_default()
    }

    /// Gives each engine its order; returns those that are new.
    pub(super) fn order(&mut self, of: impl Fn(&Facts) -> Option<Order>) -> Vec<(EngineId, Order)> {
        let mut new = Vec::new();
        for (engine, (facts, order)) in &mut self.0 {
            let next = of(facts);
            if let Some(next) = next.filter(|_| next != *order) {
                *order = Some(next);
                new.push((*engine, next));
            }
        }
        new
    }
}
