//! What a node shows of itself: the same record for `status`, progress bars and tests.

use super::readiness::Readiness;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct View {
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) uptime_seconds: f64,
    pub(crate) addresses: Vec<String>,
    pub(crate) data_endpoint: String,
    /// `off` or `tls`.
    pub(crate) data_encryption: String,
    pub(crate) channels: Vec<ChannelView>,
    pub(crate) engines: Vec<EngineView>,
    /// What this node publishes.
    #[serde(default)]
    pub(crate) publication: Option<PublicationView>,
    pub(crate) peers: Vec<PeerView>,
    pub(crate) traffic: Traffic,
    /// By name: `shm` and `rdma`, where they are on, and `tcp`.
    pub(crate) transports: BTreeMap<String, TransportView>,
    /// The ports `rdma` uses, in words.
    #[serde(default)]
    pub(crate) rdma_ports: Vec<String>,
    pub(crate) rejected_releases: Rejected,
    /// Chunks held in host memory and on disk, and bytes under lease to readers.
    pub(crate) memory_store_bytes: u64,
    pub(crate) disk_store_bytes: u64,
    pub(crate) leased_bytes: u64,
    /// As of the last seconds.
    #[serde(default)]
    pub(crate) rates: Rates,
    #[serde(default)]
    pub(crate) readiness: Readiness,
    /// It hands over what nobody else has, and leaves.
    #[serde(default)]
    pub(crate) draining: bool,
    /// Where it answers over HTTP; None: it does not.
    #[serde(default)]
    pub(crate) http: Option<String>,
    #[serde(default)]
    pub(crate) labels: Vec<(String, String)>,
}

/// Chunk bytes a second, of the last seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Rates {
    pub(crate) in_bytes_per_s: u64,
    pub(crate) out_bytes_per_s: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ChannelView {
    pub(crate) channel: String,
    pub(crate) seq: u64,
    /// Empty while no release is known.
    pub(crate) manifest: String,
    pub(crate) publisher: String,
    pub(crate) note: String,
    /// Length of the checkpoint; zero until the manifest is here.
    pub(crate) checkpoint_bytes: u64,
    pub(crate) chunks: u64,
    /// What this node holds or is to hold.
    pub(crate) chunks_wanted: u64,
    pub(crate) chunks_have: u64,
    pub(crate) bytes_wanted: u64,
    pub(crate) bytes_have: u64,
    /// Holders that bytes come from now.
    pub(crate) sources: u64,
    /// `waiting`, `manifest`, `checking`, `fetching`, `hydrated` or `idle`.
    pub(crate) state: String,
    /// Why it does not get on, if there is a reason a person can mend.
    pub(crate) problem: Option<String>,
    /// How this node's engines are with the release's rollout; None if it has none.
    #[serde(default)]
    pub(crate) rollout: Option<RolloutView>,
    /// How the release is rolled out, in words; and `commit` or `abort` once that was said.
    #[serde(default)]
    pub(crate) policy: String,
    #[serde(default)]
    pub(crate) word: Option<String>,
    /// Until what its engines, or it, need is here, as it goes now; None: nothing moves.
    #[serde(default)]
    pub(crate) eta_seconds: Option<f64>,
}

/// Where a node stands on its way to a release.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct RolloutView {
    pub(crate) channel: String,
    /// The release that is for it, and the manifest that its engines are to serve now; empty: nothing yet.
    pub(crate) seq: u64,
    pub(crate) wanted: String,
    pub(crate) due: String,
    /// What all of its engines answer from; empty if they differ, or one does not answer.
    pub(crate) served: String,
    /// `waiting`, `going`, `done`, `going back` or `halted`.
    pub(crate) step: String,
    /// `heard`, `planned`, `fetched`, `verified`, `staged`, `paused`, `checked`, `ready`, `failed` or `rolled back`.
    pub(crate) phase: String,
    pub(crate) ready: bool,
    /// What it waits for, or what went wrong.
    pub(crate) reason: String,
}

/// The release that this node makes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct PublicationView {
    pub(crate) channel: String,
    pub(crate) seq: u64,
    pub(crate) manifest: String,
    pub(crate) publisher: String,
    /// It goes back to that one, because this node's release before it failed; and its note.
    pub(crate) rolls_back_to: Option<u64>,
    pub(crate) note: String,
    /// `commit` or `abort`, if it waits for a word and that was said; and why.
    pub(crate) word: Option<String>,
    pub(crate) reason: String,
    /// How many nodes were prepared last, how many have to be, and how many it names.
    pub(crate) prepared: Option<(u64, u64, u64)>,
    /// A later release for the same nodes: its number and manifest.
    pub(crate) superseded_by: Option<(u64, String)>,
    /// Other nodes that hold all of it that they want.
    pub(crate) holders: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct EngineView {
    pub(crate) name: String,
    pub(crate) pid: u32,
    pub(crate) channel: String,
    pub(crate) phase: String,
    /// The manifest it serves, wholly verified; empty if none.
    pub(crate) serving: String,
    pub(crate) ready: bool,
    pub(crate) chunks_done: u64,
    pub(crate) chunks_total: u64,
    pub(crate) reason: Option<String>,
    /// What becomes of requests that come to it while it is paused, if it says: `held` or `refused`.
    #[serde(default)]
    pub(crate) during_pause: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct PeerView {
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) connected: bool,
    pub(crate) labels: Vec<(String, String)>,
    /// `(channel, sequence number, chunks it has, chunks it wants)`.
    pub(crate) channels: Vec<(String, u64, u32, u32)>,
    /// Of the channels that its engines follow.
    #[serde(default)]
    pub(crate) rollouts: Vec<RolloutView>,
    pub(crate) engines: u32,
    pub(crate) engines_ready: u32,
    /// Not asked for chunks now, because of how earlier reads went.
    pub(crate) avoided: bool,
    /// It hands over what nobody else has, and leaves.
    #[serde(default)]
    pub(crate) draining: bool,
    pub(crate) corrupt_chunks: u32,
    pub(crate) bytes_from: u64,
    /// The same by the transports they came by; those that brought none are left out.
    pub(crate) bytes_by: BTreeMap<String, u64>,
    pub(crate) bytes_to: u64,
}

/// Chunk bytes moved, whole chunks or not, verified or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct TransportView {
    pub(crate) received_bytes: u64,
    pub(crate) sent_bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Traffic {
    /// Verified chunk bytes read from peers, and sent to them.
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    /// Of chunks copied out of GPUs, for others to read.
    #[serde(default)]
    pub(crate) bytes_out_of_gpus: u64,
    pub(crate) chunks_verified: u64,
    pub(crate) chunks_corrupt: u64,
    pub(crate) reads_failed: u64,
    /// Chunks found in place after a restart, and not fetched.
    pub(crate) chunks_found: u64,
    /// Distinct peers that verified bytes came from.
    pub(crate) sources: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Rejected {
    pub(crate) forged: u64,
    pub(crate) untrusted: u64,
    pub(crate) older: u64,
}

impl View {
    pub(crate) fn channel(&self, name: &str) -> Option<&ChannelView> {
        self.channels.iter().find(|c| c.channel == name)
    }
}
