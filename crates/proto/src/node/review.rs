//! Looking the swarms over: whom each may ask, and who fetches what from afar.

use super::Node;
use crate::io::Output;
use crate::limits::PROMPT_REVIEW;
use crate::members::Member;
use crate::swarm;
use aquifer_core::{ChannelStatus, ManifestHash, NodeId, Release, Time};

impl Node {
    pub(super) fn review_swarms_soon(&mut self, now: Time) {
        self.swarms_at.get_or_insert(now + PROMPT_REVIEW);
    }

    pub(super) fn review_swarms(&mut self, now: Time) {
        self.swarms_at = None;
        self.rank_neighbours();
        let manifests: Vec<ManifestHash> = self.swarms.keys().copied().collect();
        for manifest in manifests {
            let looking = self.swarms.get(&manifest).is_some_and(|s| s.pulling.is_looking(&s.stock, now));
            let candidates = if looking { self.candidates(now, &manifest) } else { Vec::new() };
            let Some(swarm) = self.swarms.get_mut(&manifest) else { continue };
            let (rng, out) = (&mut self.rng, &mut self.out);
            let dials = swarm.pulling.review(manifest, &swarm.stock, now, candidates, rng, out);
            if let Some(at) = swarm.pulling.open_at().filter(|at| *at > now) {
                self.swarms_at = Some(self.swarms_at.map_or(at, |s| s.min(at)));
            }
            for node in dials {
                if let Some(member) = self.members.member(&node) {
                    self.out.push_back(Output::Dial { node, addresses: member.status.addresses.clone() });
                }
            }
        }
    }

    /// Peers that may be asked. Of a manifest that no release is known to name, nobody is known to have it:
    /// asking costs little, and who does not have it refuses.
    fn candidates(&self, now: Time, manifest: &ManifestHash) -> Vec<swarm::Candidate> {
        let fit = |m: &&Member| !self.trust.is_avoided(&m.status.node, now);
        let swarm = self.swarms.get(manifest);
        let candidate = |m: &Member| swarm::Candidate {
            node: m.status.node,
            connected: self.members.is_connected(&m.status.node),
            distance: self.distance(m),
            asks_us: swarm.is_some_and(|s| s.serving.is_asked_by(&m.status.node)),
            drains: m.status.draining,
        };
        if self.releases.of_manifest(manifest).next().is_some() {
            return self.following(manifest).filter(fit).map(candidate).collect();
        }
        let neighbours = self.members.connected().filter_map(|n| self.members.member(n));
        neighbours.filter(fit).map(candidate).collect()
    }

    /// Whoever says that it has the manifest or gets it; and whoever follows a channel with a release of it, if its
    /// last status record is older than that: at thousands of nodes records are rare.
    fn following<'a>(&'a self, manifest: &'a ManifestHash) -> impl Iterator<Item = &'a Member> {
        let releases: Vec<&Release> = self.releases.of_manifest(manifest).collect();
        let follows = move |m: &&Member| {
            let may_have = |c: &ChannelStatus| {
                let of = releases.iter().find(|r| r.channel == c.channel);
                of.is_some_and(|release| c.has(manifest) || c.seq < release.seq)
            };
            m.status.channels.iter().any(may_have)
        };
        self.members.iter().map(|(_, m)| m).filter(follows)
    }

    pub(super) fn is_far(&self, node: &NodeId) -> bool {
        self.members.member(node).is_some_and(|m| self.distance(m) > 0)
    }

    /// The outermost boundary between this node and another, as far as their labels tell: `host`, `rack`, `zone`,
    /// or `none`.
    pub fn boundary_to(&self, node: &NodeId) -> &'static str {
        let distance = self.members.member(node).map_or(0, |m| self.distance(m));
        swarm::boundary(distance).unwrap_or("none")
    }

    fn distance(&self, member: &Member) -> u8 {
        swarm::distance(&self.config.labels, &member.status.labels)
    }

    /// Where nodes stand in racks: settles anew who fetches what from afar, if somebody came, went
    /// or moved.
    fn rank_neighbours(&mut self) {
        let version = self.members.version();
        if self.config.labels.is_empty() || self.ranked == version {
            return;
        }
        self.ranked = version;
        let manifests: Vec<ManifestHash> = self.swarms.keys().copied().collect();
        for manifest in manifests {
            // Who drains fetches nothing for its neighbours.
            let others =
                self.following(&manifest).filter(|m| !m.status.draining).map(|m| (m.status.node, self.distance(m)));
            let others: Vec<(NodeId, u8)> = others.collect();
            if let Some(swarm) = self.swarms.get_mut(&manifest) {
                swarm.pulling.on_neighbours(&self.me, &others);
            }
        }
    }
}
