//! What is asked over HTTP and only the agent's own task can answer.

use super::{Agent, Ask};
use crate::http::{Autoscale, Bucket, Hydrating, SwarmView};
use aquifer_core::{ChannelName, ChannelStatus, NodeId};
use aquifer_proto::forecast::Forecast;
use std::collections::BTreeMap;

impl Agent {
    pub(super) fn on_ask(&mut self, ask: Ask) {
        // Who asked may be gone: then nobody misses the answer.
        match ask {
            Ask::Releases { channel, reply } => drop(reply.send(self.releases_of(&channel))),
            Ask::Swarm { channel, reply } => drop(reply.send(self.swarm_view(&channel))),
            Ask::Autoscale { channel, nodes, reply } => drop(reply.send(self.autoscale(&channel, nodes))),
            Ask::Drain { grace, reply } => {
                self.drain_within(grace);
                let _ = reply.send(());
            }
        }
    }

    fn swarm_view(&self, channel: &ChannelName) -> SwarmView {
        let manifest = self.current_manifest(channel);
        let chunks = manifest.and_then(|m| self.node.availability(&m));
        let (count, buckets) = match chunks {
            None => (0, Vec::new()),
            Some(chunks) => {
                // Who has everything asks for nothing, and is not counted by what is asked.
                let is_whole = |c: &&ChannelStatus| Some(c.manifest) == manifest && c.chunks_have >= chunks.len();
                let all = self.node.members().flat_map(|m| &m.status.channels);
                let whole = u32::try_from(all.filter(is_whole).count()).unwrap_or(u32::MAX);
                let of = |chunk| {
                    let (have, wanted, copies) = chunks.of(chunk);
                    (have, wanted, copies.max(whole))
                };
                (chunks.len(), Bucket::all(chunks.len(), of))
            }
        };
        SwarmView {
            channel: channel.to_string(),
            manifest: manifest.map(|m| m.to_string()).unwrap_or_default(),
            chunks: count.into(),
            buckets,
        }
    }

    fn autoscale(&self, channel: &ChannelName, nodes: u32) -> Autoscale {
        let forecast = Forecast::of(&self.node, channel, nodes);
        let hydrating = |h: &aquifer_proto::forecast::Hydrating| Hydrating {
            node: h.node.to_string(),
            name: h.name.clone(),
            fraction: h.fraction,
            eta_seconds: self.eta_of(&h.node, channel),
        };
        Autoscale {
            channel: channel.to_string(),
            hydrated_replicas: forecast.hydrated_replicas.into(),
            ready_replicas: forecast.ready_replicas.into(),
            hydrating_replicas: forecast.hydrating.len() as u64,
            hydrating: forecast.hydrating.iter().map(hydrating).collect(),
            spare_upload_bytes_per_s: forecast.spare_upload_bytes_per_s,
            nodes,
            predicted_seconds: forecast.predicted.map(|predicted| predicted.as_secs_f64()),
        }
    }

    /// Of this node it is known to the byte; of another by how its word changed from record to record.
    fn eta_of(&self, node: &NodeId, channel: &ChannelName) -> Option<f64> {
        if *node == self.node.id() {
            return self.eta(channel);
        }
        let status = &self.node.member(node)?.status;
        let of = status.channels.iter().find(|c| c.channel == *channel)?;
        let eta = self.peer_etas.get(&(*node, channel.clone()))?;
        Some(eta.estimate(self.now(), of.chunks_wanted.into())?.left.as_secs_f64())
    }

    /// Notes how far others are.
    pub(super) fn watch_peers(&mut self) {
        let now = self.now();
        let mut seen = BTreeMap::new();
        for member in self.node.members() {
            let hydrating = member.status.channels.iter().filter(|c| c.chunks_have < c.chunks_wanted);
            for of in hydrating {
                let key = (member.status.node, of.channel.clone());
                let mut eta = self.peer_etas.remove(&key).unwrap_or_default();
                eta.note(now, of.chunks_have.into());
                seen.insert(key, eta);
            }
        }
        self.peer_etas = seen;
    }
}
