//! What this node wants of a manifest, what it has, and what becomes of who reads it when that changes.

use super::Node;
use crate::io::Output;
use aquifer_core::message::Refusal;
use aquifer_core::{ChunkSet, ManifestHash, NodeId, PeerMessage, Time};

impl Node {
    pub(super) fn on_wanted(&mut self, now: Time, manifest: ManifestHash, chunks: ChunkSet) {
        let Some(swarm) = self.swarms.get_mut(&manifest) else { return };
        if chunks.len() != swarm.stock.len() {
            return;
        }
        swarm.stock.wanted = chunks;
        swarm.told_hydrated &= swarm.stock.is_complete();
        swarm.pulling.on_wants_changed(manifest, &swarm.stock, now, &mut self.out);
        self.status_soon(now);
        self.review_swarms(now);
    }

    pub(super) fn on_held(&mut self, now: Time, manifest: ManifestHash, chunks: &ChunkSet) {
        let Some(swarm) = self.swarms.get_mut(&manifest) else { return };
        let new: Vec<u32> = chunks.iter().filter(|c| !swarm.stock.have.contains(*c)).collect();
        swarm.stock.have.union_with(chunks);
        self.grants_due = true;
        for chunk in new {
            swarm.serving.on_held(chunk);
            swarm.pulling.on_held(now, chunk, self.me, &mut self.out);
        }
        self.status_soon(now);
    }

    pub(super) fn on_costly(&mut self, manifest: &ManifestHash, chunks: ChunkSet) {
        let Some(swarm) = self.swarms.get_mut(manifest) else { return };
        if chunks.len() == swarm.stock.len() {
            swarm.stock.costly = chunks;
            self.grants_due = true;
        }
    }

    pub(super) fn on_lost(&mut self, now: Time, manifest: ManifestHash, chunks: &ChunkSet) {
        self.grants_due = true;
        let Some(swarm) = self.swarms.get_mut(&manifest) else { return };
        let lost: Vec<u32> = chunks.intersection(&swarm.stock.have).collect();
        swarm.stock.have.subtract(chunks);
        swarm.told_hydrated &= swarm.stock.is_complete();
        for chunk in lost {
            for (reader, lease) in swarm.serving.on_lost(&swarm.stock, &mut self.budget, chunk) {
                self.counters.leases_revoked += 1;
                self.out.push_back(Output::LeaseClosed { lease, chunk });
                let message = PeerMessage::Revoke { manifest, lease };
                self.out.push_back(Output::Send { to: reader, message });
            }
        }
        if let Some(swarm) = self.swarms.get_mut(&manifest) {
            swarm.pulling.on_wants_changed(manifest, &swarm.stock, now, &mut self.out);
        }
        self.status_soon(now);
        self.review_swarms(now);
    }

    pub(super) fn on_forget(&mut self, manifest: ManifestHash) {
        self.grants_due = true;
        self.manifests.forget(&manifest);
        self.spoiled.retain(|(of, _)| *of != manifest);
        let early: Vec<NodeId> = self.early_asks.take(&manifest).into_keys().collect();
        early.into_iter().for_each(|node| self.refuse(node, manifest, Refusal::Nothing));
        let Some(mut swarm) = self.swarms.remove(&manifest) else { return };
        let asking: Vec<NodeId> = swarm.serving.asking().copied().collect();
        asking.into_iter().for_each(|node| self.refuse(node, manifest, Refusal::Nothing));
        swarm.pulling.stop(manifest, &swarm.stock, &mut self.out);
        let everybody: Vec<NodeId> = self.members.connected().copied().collect();
        for node in everybody {
            for (lease, chunk) in swarm.serving.on_gone(&swarm.stock, &mut self.budget, &node) {
                self.out.push_back(Output::LeaseClosed { lease, chunk });
            }
        }
    }
}
