//! Whatever one node is told to be.

use crate::state::StateDir;
use aquifer_core::{ChannelName, ManifestHash, NodeSecret, Policy, PublisherKey, PublisherSecret};
use aquifer_cuda::DeviceUuid;
use aquifer_hooks::Hook;
use aquifer_memory::Published;
use aquifer_mesh::MeshKey;
use aquifer_proto::rollout::Override;
use aquifer_transport::Encryption;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::transports::RdmaOptions;

/// Which chunks a node keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// Every chunk of every followed channel's release.
    All,
    /// What its engines need.
    Engines,
    /// Only what it published or was told to pull.
    Own,
}

#[derive(Debug)]
pub(crate) struct AgentConfig {
    pub(crate) name: String,
    pub(crate) identity: NodeSecret,
    pub(crate) incarnation: u64,
    pub(crate) mesh_key: MeshKey,
    pub(crate) listen: Vec<String>,
    pub(crate) external: Vec<String>,
    pub(crate) peers: Vec<String>,
    pub(crate) mdns: bool,
    pub(crate) data_listen: SocketAddr,
    pub(crate) data_advertise: Option<String>,
    pub(crate) data_encryption: Encryption,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) channels: Vec<(ChannelName, Vec<PublisherKey>)>,
    /// Channels of which this node stays with one manifest, whatever is released.
    pub(crate) overrides: Vec<(ChannelName, Override)>,
    pub(crate) hold: Hold,
    /// Whether updates of GPU memory wait on the GPU, where there is room.
    pub(crate) shadow: bool,
    pub(crate) twin_gpus: Vec<DeviceUuid>,
    pub(crate) twin_gpu_bytes: u64,
    pub(crate) twin_gpu_bytes_per_s: u64,
    /// What is copied out of GPUs for others, in a second; zero: nothing is.
    pub(crate) gpu_upload_bytes_per_s: u64,
    pub(crate) store: Option<PathBuf>,
    pub(crate) store_bytes: Option<u64>,
    pub(crate) memory_bytes: u64,
    pub(crate) upload_bytes: u64,
    pub(crate) upload_bytes_per_s: Option<u64>,
    /// See [`aquifer_transport::TcpConfig::congestion`].
    pub(crate) tcp_congestion: Option<String>,
    /// Where agents of one machine meet; None: they send over TCP.
    pub(crate) shm_dir: Option<PathBuf>,
    /// None where it is off.
    pub(crate) rdma: Option<RdmaOptions>,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) state: Option<StateDir>,
    pub(crate) publish: Option<Publish>,
    pub(crate) pull: Option<Pull>,
    pub(crate) record: Option<PathBuf>,
    pub(crate) drain_grace: Duration,
    /// Where it answers over HTTP, to be told.
    pub(crate) http: Option<String>,
    pub(crate) hooks: Vec<Hook>,
}

#[derive(Debug)]
pub(crate) struct Publish {
    pub(crate) channel: ChannelName,
    pub(crate) secret: PublisherSecret,
    pub(crate) note: String,
    /// Without its roster.
    pub(crate) policy: Policy,
    pub(crate) source: Arc<Published>,
}

#[derive(Clone, Debug)]
pub(crate) struct Pull {
    pub(crate) what: PullWhat,
    pub(crate) dir: PathBuf,
}

#[derive(Clone, Debug)]
pub(crate) enum PullWhat {
    Channel(ChannelName),
    Manifest(ManifestHash),
}
