//! One simulated node: the brain, and the little of its hands that the model needs.

use crate::scenario::{Expanded, NodePlan};
use aquifer_core::{ChannelName, ChunkSet, NodeSecret, PublisherSecret, Time};
use aquifer_proto::{Config, Node};

/// Chunks a node lets others read at once: the agent's own default.
const LEASED_CHUNKS_MAX: u64 = 64;

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) node: Node,
    pub(super) plan: NodePlan,
    /// Counts starts; what was planned for an earlier life is void.
    pub(super) life: u32,
    pub(super) alive: bool,
    /// Verified chunks that lie here.
    pub(super) has: ChunkSet,
    pub(super) finished: Option<Time>,
    /// Until when it is busy with control messages.
    pub(super) busy_until: Time,
    pub(super) wake_at: Option<Time>,
}

impl Peer {
    pub(super) fn new(e: &Expanded, plan: &NodePlan, life: u32, now: Time) -> Self {
        let mut seed = [0; 32];
        seed[..4].copy_from_slice(&plan.index.to_le_bytes());
        seed[4] = 1;
        let config = Config {
            identity: NodeSecret::from_seed(seed),
            incarnation: u64::from(life) + 1,
            name: format!("n{}", plan.index),
            version: String::new(),
            labels: plan.nic.rack.map(|r| ("rack".to_string(), r.to_string())).into_iter().collect(),
            channels: vec![(channel(), vec![publisher().public()])],
            accepted: vec![],
            leased_bytes_max: LEASED_CHUNKS_MAX * e.chunk_bytes,
            upload_bytes_per_s: plan.nic.upload_cap.map(whole),
            seed: e.seed << 32 | u64::from(plan.index) << 8 | u64::from(life),
        };
        Peer {
            node: Node::new(config, now),
            plan: plan.clone(),
            life,
            alive: false,
            has: plan.has.clone(),
            finished: None,
            busy_until: now,
            wake_at: None,
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "`as` saturates")]
fn whole(value: f64) -> u64 {
    value as u64
}

pub(super) fn channel() -> ChannelName {
    "c".parse().expect("it is a channel name")
}

pub(super) fn publisher() -> PublisherSecret {
    PublisherSecret::from_seed([7; 32])
}
