//! Leaving in good order: what nobody else has is handed over first.
//!
//! A node that drains says so, asks for nothing, and gives only *sole* chunks (`swarm::serve`). Once nobody wants one,
//! and nobody reads, for a while, it may go. It waits for nothing else: what others have they get from each other.

use super::Node;
use crate::io::Output;
use crate::limits::DRAIN_SETTLE;
use aquifer_core::message::Refusal;
use aquifer_core::{ManifestHash, NodeId, Time};

#[derive(Debug, Default)]
pub(super) struct Drain {
    /// Who holds what may have changed.
    holders_due: bool,
    /// Since when nobody wants anything of this node.
    quiet_since: Option<Time>,
    told: bool,
}

/// What a node that drains is still needed for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrainProgress {
    /// Chunks that are wanted, and that nobody else is known to have or to be getting.
    pub sole_chunks: u64,
    /// Bytes under lease to readers.
    pub leased_bytes: u64,
}

impl Drain {
    pub(super) fn next_timeout(&self) -> Option<Time> {
        self.quiet_since.filter(|_| !self.told).map(|since| since + DRAIN_SETTLE)
    }
}

impl Node {
    /// What keeps it, if it drains.
    pub fn drain_progress(&self) -> Option<DrainProgress> {
        self.drain.as_ref()?;
        let sole_chunks = self.swarms.values().map(|s| s.serving.sole_chunks(&s.stock)).sum();
        Some(DrainProgress { sole_chunks, leased_bytes: self.budget.leased_bytes })
    }

    pub(super) fn drain(&mut self, now: Time) {
        if self.drain.is_some() {
            return;
        }
        self.drain = Some(Drain::default());
        for (manifest, node) in self.early_asks.take_all() {
            self.refuse(node, manifest, Refusal::Draining);
        }
        let manifests: Vec<ManifestHash> = self.swarms.keys().copied().collect();
        manifests.iter().for_each(|manifest| self.drain_swarm(manifest));
        self.publish_status(now);
    }

    /// Has the swarm drain too, if this node does.
    pub(super) fn drain_swarm(&mut self, manifest: &ManifestHash) {
        let (Some(drain), Some(swarm)) = (&mut self.drain, self.swarms.get_mut(manifest)) else { return };
        drain.holders_due = true;
        self.grants_due = true;
        swarm.serving.drain();
        swarm.pulling.retire(*manifest, &swarm.stock, &mut self.out);
    }

    pub(super) fn count_holders_soon(&mut self) {
        if let Some(drain) = &mut self.drain {
            drain.holders_due = true;
        }
    }

    /// Sends those away to whom it gives nothing.
    pub(super) fn dismiss(&mut self, now: Time) {
        let Some(drain) = &mut self.drain else { return };
        if std::mem::take(&mut drain.holders_due) {
            self.grants_due = true;
            self.count_holders(now);
        }
        let mut idle = Vec::new();
        for (manifest, swarm) in &mut self.swarms {
            idle.extend(swarm.serving.dismiss(&swarm.stock).into_iter().map(|node| (*manifest, node)));
        }
        for (manifest, node) in idle {
            self.refuse(node, manifest, Refusal::Draining);
        }
    }

    /// Somebody is on the way to ask.
    pub(super) fn busy_while_draining(&mut self) {
        if let Some(drain) = &mut self.drain {
            drain.quiet_since = None;
        }
    }

    /// After each step: whether it is needed no more.
    pub(super) fn note_quiet(&mut self, now: Time) {
        let Some(drain) = self.drain.as_mut().filter(|d| !d.told) else { return };
        if !self.swarms.values().all(|s| s.serving.is_quiet()) {
            drain.quiet_since = None;
            return;
        }
        let since = *drain.quiet_since.get_or_insert(now);
        if now.since(since) >= DRAIN_SETTLE {
            drain.told = true;
            self.out.push_back(Output::Drained);
        }
    }

    fn count_holders(&mut self, now: Time) {
        let (members, trust) = (&self.members, &self.trust);
        let drains = |node: &NodeId| members.member(node).is_some_and(|m| m.status.draining);
        let stays = |node: &NodeId| members.is_connected(node) && !drains(node);
        for (manifest, swarm) in &mut self.swarms {
            let all = swarm.stock.len();
            let has_all = |node: &&NodeId| {
                let channels = members.member(node).map(|m| m.status.channels.as_slice()).unwrap_or_default();
                let whole = |c: &aquifer_core::ChannelStatus| {
                    c.manifest == *manifest && (c.chunks_wanted, c.chunks_have) == (all, all)
                };
                channels.iter().any(whole)
            };
            let mut others = members.connected().filter(|n| stays(n) && !trust.is_avoided(n, now));
            swarm.serving.on_holders(others.any(|n| has_all(&n)), stays);
        }
    }
}
