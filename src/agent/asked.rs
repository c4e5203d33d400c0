//! What is asked over HTTP and only the agent's own task can answer.

use super::{Agent, Ask};
use crate::http::{Autoscale, Bucket, Hydrating, SwarmView};
use aquifer_core::ChannelName;

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
            Some(chunks) => (chunks.len(), Bucket::all(chunks.len(), |chunk| chunks.of(chunk))),
        };
        SwarmView {
            channel: channel.to_string(),
            manifest: manifest.map(|m| m.to_string()).unwrap_or_default(),
            chunks: count.into(),
            buckets,
        }
    }

    fn autoscale(&self, channel: &ChannelName, nodes: u32) -> Autoscale {
        let forecast = self.node.forecast(channel);
        Autoscale {
            channel: channel.to_string(),
            hydrated_replicas: forecast.hydrated as u64,
            ready_replicas: forecast.ready as u64,
            hydrating_replicas: forecast.hydrating.len() as u64,
            hydrating: forecast.hydrating.iter().map(|h| self.hydrating(channel, h)).collect(),
            spare_upload_bytes_per_s: forecast.spare_upload_bytes_per_s,
            nodes,
            predicted_seconds: forecast.seconds_for(nodes),
        }
    }
}
use super::shim::Soon;
impl Agent { fn hydrating(&self, _c: &ChannelName, _h: &(aquifer_core::NodeId, f64)) -> Hydrating { Hydrating::default() } }
