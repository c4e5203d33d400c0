//! Options of everything that joins a mesh.

use super::defaults::{default_shm_dir, host_name};
use super::file::list;
use super::{DRAIN_GRACE, size};
use crate::agent::{AgentConfig, Hold, RdmaOptions};
use crate::keys;
use crate::state::StateDir;
use anyhow::{Context, Result, anyhow, bail};
use aquifer_core::limits::{STATUS_CHANNELS_MAX, STATUS_LABEL_BYTES_MAX, STATUS_LABELS_MAX, STATUS_NAME_BYTES_MAX};
use aquifer_core::{ChannelName, PublisherKey};
use clap::Args;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Guess: less than a tenth of what one PCIe 5 link of 16 lanes carries that way (55 GB/s), and thousandths of what
/// GPU memory gives, so that no engine notices; and enough for the network card of 40 Gbit/s that it feeds.
const GPU_UPLOAD_BYTES_PER_S: u64 = 4 << 30;

/// Options of everything that joins a mesh.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct NodeOptions {
    /// File with the mesh key (`aquifer keygen mesh`); nodes without the same key cannot connect
    #[arg(long, env = "AQUIFER_MESH_KEY", value_name = "FILE", help_heading = "Mesh")]
    pub(crate) mesh_key: Option<PathBuf>,
    /// A node of the mesh to join through: host:port, where the host may be a DNS name with many
    /// addresses, or a multiaddress. One that answers is enough. May be repeated
    #[arg(long, env = "AQUIFER_PEER", value_name = "ADDRESS", value_delimiter = ',', help_heading = "Mesh")]
    pub(crate) peer: Vec<String>,
    /// Where to listen for the mesh. May be repeated [default: 0.0.0.0:7401 for an agent, else any
    /// port]
    #[arg(long, env = "AQUIFER_LISTEN", value_name = "ADDRESS", value_delimiter = ',', help_heading = "Mesh")]
    pub(crate) listen: Vec<String>,
    /// Addresses to tell others besides those found: host:port, or a multiaddress. May be repeated
    #[arg(long, env = "AQUIFER_EXTERNAL", value_name = "ADDRESS", value_delimiter = ',', help_heading = "Mesh")]
    pub(crate) external: Vec<String>,
    /// Find nodes on the local network by multicast DNS: true, as without a value, or false
    #[arg(long, env = "AQUIFER_MDNS", value_name = "BOOL", help_heading = "Mesh", num_args = 0..=1, default_missing_value = "true", hide_possible_values = true)]
    pub(crate) mdns: Option<bool>,
    /// Where to serve chunks over TCP [default: 0.0.0.0:7402 for an agent, else any port]
    #[arg(long, env = "AQUIFER_DATA_LISTEN", value_name = "ADDRESS", help_heading = "Mesh")]
    pub(crate) data_listen: Option<SocketAddr>,
    /// Where others reach --data-listen, if not at this node's address and the same port: ip:port
    #[arg(long, env = "AQUIFER_DATA_ADVERTISE", value_name = "ADDRESS", help_heading = "Mesh")]
    pub(crate) data_advertise: Option<String>,
    /// Encrypt chunks on their way over TCP: off, or tls, which also refuses readers that do not. A node with
    /// off encrypts towards one with tls, so a mesh can be switched node by node [default: off]
    #[arg(long, env = "AQUIFER_DATA_ENCRYPTION", value_name = "HOW", help_heading = "Mesh")]
    pub(crate) data_encryption: Option<String>,
    /// What to call this node [default: the host's name]
    #[arg(long, env = "AQUIFER_NAME", help_heading = "Mesh")]
    pub(crate) name: Option<String>,
    /// Labels such as zone=a, rack=12 or host=h7: what is behind one uplink crosses it about once. May be
    /// repeated
    #[arg(long, env = "AQUIFER_LABEL", value_name = "KEY=VALUE", value_delimiter = ',', help_heading = "Mesh")]
    pub(crate) label: Vec<String>,
    /// A publisher to believe: its public key (`aquifer keygen public`), for all channels, or
    /// CHANNEL=KEY for one. May be repeated
    #[arg(long, env = "AQUIFER_TRUST", value_name = "KEY", value_delimiter = ',', help_heading = "Mesh")]
    pub(crate) trust: Vec<String>,
    /// Directory for identity, accepted releases and manifests: what makes a restart remember
    /// [default: ~/.local/state/aquifer/NAME for an agent, else none]
    #[arg(long, env = "AQUIFER_STATE", value_name = "DIR", help_heading = "Mesh")]
    pub(crate) state: Option<PathBuf>,
    /// Chunk bytes that others may be reading from this node at once [default: 256MiB]
    #[arg(long, env = "AQUIFER_UPLOAD_WINDOW", value_name = "SIZE", help_heading = "Mesh")]
    pub(crate) upload_window: Option<String>,
    /// Chunk bytes a second that this node uploads at most, so that its engines keep the rest of the
    /// network card [default: no limit]
    #[arg(long, env = "AQUIFER_UPLOAD_LIMIT", value_name = "SIZE", help_heading = "Mesh")]
    pub(crate) upload_limit: Option<String>,
    /// Chunk bytes a second that are copied out of GPUs for other nodes at most, so that engines keep the rest of
    /// PCIe; 0: nothing is served from GPUs [default: 4GiB]
    #[arg(long, env = "AQUIFER_GPU_UPLOAD_LIMIT", value_name = "SIZE", help_heading = "Mesh")]
    pub(crate) gpu_upload_limit: Option<String>,
    /// Let nodes of this user on this machine copy chunks from memory instead of over TCP: true, as without
    /// a value, or false [default: true]
    #[arg(long, env = "AQUIFER_SHM", value_name = "BOOL", help_heading = "Mesh", num_args = 0..=1, default_missing_value = "true", hide_possible_values = true)]
    pub(crate) shm: Option<bool>,
    /// Where they meet; containers that share it share memory [default: $XDG_RUNTIME_DIR/aquifer-shm or
    /// /tmp/aquifer-UID-shm]
    #[arg(long, env = "AQUIFER_SHM_DIR", value_name = "DIR", help_heading = "Mesh")]
    pub(crate) shm_dir: Option<PathBuf>,
    /// Read chunks over RDMA, and let others, where both sides have a device for it: `auto`, or `off`
    /// [default: auto]
    #[arg(long, env = "AQUIFER_RDMA", value_name = "WHEN", help_heading = "Mesh", hide_possible_values = true)]
    pub(crate) rdma: Option<When>,
    /// An RDMA device to use, such as mlx5_0; it must be there. May be repeated [default: all that can be used]
    #[arg(long, env = "AQUIFER_RDMA_DEVICE", value_name = "NAME", value_delimiter = ',', help_heading = "Mesh")]
    pub(crate) rdma_device: Vec<String>,
    /// Entry of the devices' GID tables to use [default: RoCE v2 on IPv4, then on IPv6; `aquifer doctor` shows them]
    #[arg(long, env = "AQUIFER_RDMA_GID", value_name = "INDEX", help_heading = "Mesh")]
    pub(crate) rdma_gid: Option<u32>,
    /// Where to listen for what is said beside RDMA [default: 0.0.0.0:7403 for an agent, else any port]
    #[arg(long, env = "AQUIFER_RDMA_LISTEN", value_name = "ADDRESS", help_heading = "Mesh")]
    pub(crate) rdma_listen: Option<SocketAddr>,
    /// TCP congestion control that chunks are sent by, one that the system allows [default: the system's,
    /// or in place of bbr one that heeds losses]
    #[arg(long, env = "AQUIFER_TCP_CONGESTION", value_name = "NAME", help_heading = "Mesh")]
    pub(crate) tcp_congestion: Option<String>,
}

/// Whether something is used that may not be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum When {
    Auto,
    Off,
}

impl NodeOptions {
    pub(super) fn or(self, file: Self) -> Self {
        NodeOptions {
            mesh_key: self.mesh_key.or(file.mesh_key),
            peer: list(self.peer, file.peer),
            listen: list(self.listen, file.listen),
            external: list(self.external, file.external),
            mdns: self.mdns.or(file.mdns),
            data_listen: self.data_listen.or(file.data_listen),
            data_advertise: self.data_advertise.or(file.data_advertise),
            name: self.name.or(file.name),
            label: list(self.label, file.label),
            trust: list(self.trust, file.trust),
            state: self.state.or(file.state),
            upload_window: self.upload_window.or(file.upload_window),
            upload_limit: self.upload_limit.or(file.upload_limit),
            gpu_upload_limit: self.gpu_upload_limit.or(file.gpu_upload_limit),
            shm: self.shm.or(file.shm),
            shm_dir: self.shm_dir.or(file.shm_dir),
            rdma: self.rdma.or(file.rdma),
            rdma_device: list(self.rdma_device, file.rdma_device),
            rdma_gid: self.rdma_gid.or(file.rdma_gid),
            rdma_listen: self.rdma_listen.or(file.rdma_listen),
            tcp_congestion: self.tcp_congestion.or(file.tcp_congestion),
            data_encryption: self.data_encryption.or(file.data_encryption),
        }
    }

    /// What several nodes on one machine may have in common.
    pub(super) fn shared(self) -> Self {
        NodeOptions {
            mesh_key: self.mesh_key,
            peer: self.peer,
            mdns: self.mdns,
            name: self.name,
            label: self.label,
            trust: self.trust,
            upload_window: self.upload_window,
            upload_limit: self.upload_limit,
            gpu_upload_limit: self.gpu_upload_limit,
            shm: self.shm,
            shm_dir: self.shm_dir,
            rdma: self.rdma,
            rdma_device: self.rdma_device,
            rdma_gid: self.rdma_gid,
            tcp_congestion: self.tcp_congestion,
            data_encryption: self.data_encryption,
            ..NodeOptions::default()
        }
    }

    /// The configuration of a node that follows `channels`. `ports` are the defaults for mesh, data and
    /// what is said beside RDMA.
    pub(crate) fn config(&self, channels: &[ChannelName], ports: (u16, u16, u16)) -> Result<AgentConfig> {
        let Some(key) = &self.mesh_key else {
            bail!(
                "no mesh key: a mesh is private. Make one with `aquifer keygen mesh --out mesh.key`, copy it to every node, and give it with --mesh-key mesh.key"
            );
        };
        let mesh_key = keys::read_mesh_key(key)?;
        let (name, labels, channels) = (self.node_name()?, self.labels()?, self.trusted(channels)?);
        let state = self.state.as_deref().map(StateDir::open).transpose()?;
        let (identity, incarnation) = match &state {
            Some(state) => (state.identity()?, state.next_incarnation()?),
            None => (aquifer_core::NodeSecret::from_seed(keys::random_bytes()?), crate::state::unix_ms()),
        };
        let listen = match self.listen.is_empty() {
            true => vec![format!("0.0.0.0:{}", ports.0)],
            false => self.listen.clone(),
        };
        if let Some(text) = self.data_advertise.as_ref().filter(|t| t.parse::<SocketAddr>().is_err()) {
            bail!("--data-advertise '{text}' is not ip:port");
        }
        Ok(AgentConfig {
            name,
            identity,
            incarnation,
            mesh_key,
            listen,
            external: self.external.clone(),
            peers: self.peer.clone(),
            mdns: self.mdns.unwrap_or(false),
            data_listen: self.data_listen.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], ports.1))),
            data_advertise: self.data_advertise.clone(),
            data_encryption: self
                .data_encryption
                .as_deref()
                .unwrap_or("off")
                .parse()
                .map_err(|reason| anyhow!("--data-encryption: {reason}"))?,
            labels,
            channels,
            overrides: Vec::new(),
            hold: Hold::Own,
            shadow: true,
            twin_gpus: Vec::new(),
            twin_gpu_bytes: u64::MAX,
            twin_gpu_bytes_per_s: u64::MAX,
            store: None,
            store_bytes: None,
            memory_bytes: 4 << 30,
            upload_bytes: size("--upload-window", self.upload_window.as_deref())?.unwrap_or(256 << 20),
            upload_bytes_per_s: size("--upload-limit", self.upload_limit.as_deref())?,
            gpu_upload_bytes_per_s: size("--gpu-upload-limit", self.gpu_upload_limit.as_deref())?
                .unwrap_or(GPU_UPLOAD_BYTES_PER_S),
            tcp_congestion: self.tcp_congestion.clone(),
            rdma: (self.rdma != Some(When::Off)).then(|| RdmaOptions {
                listen: self.rdma_listen.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], ports.2))),
                devices: self.rdma_device.clone(),
                gid_index: self.rdma_gid,
            }),
            shm_dir: self.shm.unwrap_or(true).then(|| self.shm_dir.clone().unwrap_or_else(default_shm_dir)),
            socket: None,
            state,
            publish: None,
            pull: None,
            record: None,
            drain_grace: DRAIN_GRACE,
            http: None,
            hooks: Vec::new(),
        })
    }

    // What a node says of itself travels to all others, who drop a record that is too long.

    fn node_name(&self) -> Result<String> {
        let name = self.name.clone().filter(|name| !name.is_empty()).unwrap_or_else(host_name);
        match name.len() {
            0..=STATUS_NAME_BYTES_MAX => Ok(name),
            bytes => bail!("--name has {bytes} bytes; it may have {STATUS_NAME_BYTES_MAX}"),
        }
    }

    fn labels(&self) -> Result<Vec<(String, String)>> {
        if self.label.len() > STATUS_LABELS_MAX {
            bail!("{} times --label; a node may have {STATUS_LABELS_MAX}", self.label.len());
        }
        if let Some(long) = self.label.iter().find(|label| label.len() > STATUS_LABEL_BYTES_MAX) {
            let begin: String = long.chars().take(32).collect();
            bail!("--label '{begin}...' has {} bytes; it may have {STATUS_LABEL_BYTES_MAX}", long.len());
        }
        let split = |text: &String| {
            let (key, value) = text.split_once('=').with_context(|| format!("--label '{text}' is not key=value"))?;
            Ok((key.to_string(), value.to_string()))
        };
        let mut labels = self.label.iter().map(split).collect::<Result<Vec<_>>>()?;
        labels.sort();
        Ok(labels)
    }

    /// Which publishers are trusted for each channel.
    fn trusted(&self, channels: &[ChannelName]) -> Result<Vec<(ChannelName, Vec<PublisherKey>)>> {
        let mut trusted: BTreeMap<ChannelName, Vec<PublisherKey>> =
            channels.iter().map(|c| (c.clone(), Vec::new())).collect();
        for text in &self.trust {
            match text.split_once('=') {
                None => {
                    let key = keys::parse_publisher(text).with_context(|| format!("--trust '{text}'"))?;
                    trusted.values_mut().for_each(|keys| keys.push(key));
                }
                Some((channel, key)) => {
                    let key = keys::parse_publisher(key).with_context(|| format!("--trust '{text}'"))?;
                    let channel: ChannelName = channel.parse().with_context(|| format!("--trust '{text}'"))?;
                    if let Some(keys) = trusted.get_mut(&channel) {
                        keys.push(key);
                    }
                }
            }
        }
        if trusted.len() > STATUS_CHANNELS_MAX {
            bail!("{} channels to follow; a node may follow {STATUS_CHANNELS_MAX}", trusted.len());
        }
        Ok(trusted.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crowds_and_long_words_are_refused() {
        let labels = |count: usize, bytes: usize| {
            let label = (0..count).map(|i| format!("{i:02}={}", "x".repeat(bytes - 3))).collect();
            NodeOptions { label, ..NodeOptions::default() }.labels()
        };
        assert_eq!(labels(STATUS_LABELS_MAX, STATUS_LABEL_BYTES_MAX).unwrap().len(), STATUS_LABELS_MAX);
        assert!(labels(STATUS_LABELS_MAX + 1, 8).is_err() && labels(1, STATUS_LABEL_BYTES_MAX + 1).is_err());
        let named = |bytes: usize| NodeOptions { name: Some("n".repeat(bytes)), ..NodeOptions::default() }.node_name();
        assert!(named(STATUS_NAME_BYTES_MAX).is_ok() && named(STATUS_NAME_BYTES_MAX + 1).is_err());
        let following = |count: usize| {
            let channels: Vec<ChannelName> = (0..count).map(|i| format!("c/{i}").parse().unwrap()).collect();
            NodeOptions::default().trusted(&channels)
        };
        assert!(following(STATUS_CHANNELS_MAX).is_ok() && following(STATUS_CHANNELS_MAX + 1).is_err());
    }
}
