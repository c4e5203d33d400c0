//! Numbers that an autoscaler can act on.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `/v1/autoscale`, as this node knows it from the records of the others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Autoscale {
    pub(crate) channel: String,
    /// Nodes that have all they want of the channel's release; that serve what they should; and that are fetching.
    pub(crate) hydrated_replicas: u64,
    pub(crate) ready_replicas: u64,
    pub(crate) hydrating_replicas: u64,
    pub(crate) hydrating: Vec<Hydrating>,
    /// What nodes that hold the release could send more, in a second; null while no node's upload is known.
    pub(crate) spare_upload_bytes_per_s: Option<u64>,
    /// For so many nodes more that start now with nothing, `predicted_seconds` until the last has everything; null while no
    /// rate is known. A lower bound: it counts bytes and bandwidth, not starting processes.
    pub(crate) nodes: u32,
    pub(crate) predicted_seconds: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Hydrating {
    pub(crate) node: String,
    pub(crate) name: String,
    /// Of the chunks it wants.
    pub(crate) fraction: f64,
    pub(crate) eta_seconds: Option<f64>,
}
