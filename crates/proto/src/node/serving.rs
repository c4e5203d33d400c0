//! Serving: what askers say, and what they are granted.

use super::Node;
use crate::io::Output;
use crate::limits::LEASE_TTL;
use crate::swarm::EarlyAsk;
use aquifer_core::message::{Outcome, Refusal, Returned, Terms};
use aquifer_core::{ManifestHash, NodeId, PeerMessage, Time};

impl Node {
    pub(super) fn on_ask(&mut self, now: Time, from: NodeId, manifest: ManifestHash, ask: EarlyAsk) {
        self.grants_due = true;
        let is_far = self.is_far(&from);
        if ask.wanted.is_empty() {
            // It may be leaving too.
            self.count_holders_soon();
        } else {
            self.counters.asks_received += 1;
        }
        if let Some(swarm) = self.swarms.get_mut(&manifest) {
            let (is_new, looking) = (!swarm.serving.is_asked_by(&from), swarm.pulling.is_looking(&swarm.stock, now));
            let refusal = swarm.serving.on_ask(&swarm.stock, from, ask.wanted, ask.have, (ask.terms, is_far));
            if let Some(refusal) = refusal {
                self.refuse(from, manifest, refusal);
            } else if is_new && looking {
                // To ask it in return.
                self.review_swarms_soon(now);
            }
            return;
        }
        if self.drain.is_some() && !ask.wanted.is_empty() {
            return self.refuse(from, manifest, Refusal::Draining);
        }
        if let Some(refusal) = self.early_asks.on_ask(now, from, manifest, ask) {
            self.refuse(from, manifest, refusal);
        }
    }

    pub(super) fn on_progress(
        &mut self,
        now: Time,
        from: NodeId,
        manifest: ManifestHash,
        returned: Vec<Returned>,
        (taken, again, terms): (Vec<u32>, Vec<u32>, Terms),
    ) {
        self.grants_due = true;
        let Some(swarm) = self.swarms.get_mut(&manifest) else {
            return self.early_asks.on_progress(from, manifest, (&taken, &again, terms));
        };
        for back in returned {
            if !swarm.serving.on_return(&swarm.stock, &mut self.budget, now, from, back) {
                continue;
            }
            let Returned { lease, chunk, outcome } = back;
            self.out.push_back(Output::LeaseClosed { lease, chunk });
            if outcome == Outcome::Corrupt {
                self.out.push_back(Output::Recheck { manifest, chunk, reader: from });
            }
        }
        swarm.serving.on_progress(&swarm.stock, from, &taken, &again, terms);
    }

    /// Round-robin over the swarms, so that no channel starves another.
    pub(super) fn grant(&mut self, now: Time) {
        if !std::mem::take(&mut self.grants_due) {
            return;
        }
        let manifests: Vec<ManifestHash> = self.swarms.keys().copied().collect();
        let mut granted = true;
        while granted {
            granted = false;
            for manifest in &manifests {
                let Some(swarm) = self.swarms.get_mut(manifest) else { continue };
                let grant = swarm.serving.grant(&swarm.stock, &mut self.budget, now, &mut self.rng);
                if let Some(g) = grant {
                    granted = true;
                    self.counters.grants += 1;
                    self.counters.leases_granted += g.chunks.len() as u64;
                    let ttl = LEASE_TTL;
                    self.out.push_back(Output::Grant {
                        to: g.to,
                        manifest: *manifest,
                        lease: g.lease,
                        ttl,
                        chunks: g.chunks,
                    });
                }
            }
        }
    }

    pub(super) fn refuse(&mut self, to: NodeId, manifest: ManifestHash, refusal: Refusal) {
        self.counters.refusals_sent += 1;
        self.send(to, PeerMessage::Refuse { manifest, refusal });
    }
}
