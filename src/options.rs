//! The options of a node: one table, from flags, environment and a TOML file, in that order.

use crate::agent::lifecycle::Kind;
use crate::agent::{AgentConfig, Hold, RdmaOptions};
use crate::state::StateDir;
use crate::{http, keys, units};
use anyhow::{Context, Result, anyhow, bail};
use aquifer_core::limits::{STATUS_CHANNELS_MAX, STATUS_LABEL_BYTES_MAX, STATUS_LABELS_MAX, STATUS_NAME_BYTES_MAX};
use aquifer_core::{ChannelName, PublisherKey};
use aquifer_hooks::{Hook, Kinds, Secret};
use aquifer_proto::rollout::Override;
use clap::Args;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// Kubernetes kills a pod after 30 s unless told otherwise.
const DRAIN_GRACE: Duration = Duration::from_secs(25);

/// Guess: less than a tenth of what one PCIe 5 link of 16 lanes carries that way (55 GB/s), and thousandths of what
/// GPU memory gives, so that no engine notices; and enough for the network card of 40 Gbit/s that it feeds.
const GPU_UPLOAD_BYTES_PER_S: u64 = 4 << 30;

/// Options of `aquifer agent` alone.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct AgentOptions {
    /// A channel to follow, such as prod/model. May be repeated
    #[arg(long, env = "AQUIFER_CHANNEL", value_name = "CHANNEL", value_delimiter = ',')]
    pub(crate) channel: Vec<String>,
    /// Stay with this manifest, whatever is released: its hash, or CHANNEL=HASH. May be repeated
    #[arg(long, env = "AQUIFER_PIN", value_name = "HASH", value_delimiter = ',')]
    pub(crate) pin: Vec<String>,
    /// Socket for engines on this machine [default: $XDG_RUNTIME_DIR/aquifer.sock or /tmp/aquifer-UID.sock]
    #[arg(long, env = "AQUIFER_SOCKET", value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Keep chunks on disk, here: a node with a store restarts warm
    #[arg(long, env = "AQUIFER_STORE", value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,
    /// Most bytes in the store [default: no limit but the disk]
    #[arg(long, env = "AQUIFER_STORE_LIMIT", value_name = "SIZE")]
    pub(crate) store_limit: Option<String>,
    /// Most bytes of chunks in host memory, beside engines' own [default: 4GiB]
    #[arg(long, env = "AQUIFER_MEMORY_LIMIT", value_name = "SIZE")]
    pub(crate) memory_limit: Option<String>,
    /// What to hold: `all` of every channel, or what `engines` here need [default: all with --store, else engines]
    #[arg(long, env = "AQUIFER_HOLD", value_name = "WHAT")]
    pub(crate) hold: Option<String>,
    /// Where an update of GPU memory waits to be applied: `shadow`, beside it on the GPU where that has room
    /// (a pause of milliseconds), or `host` [default: shadow]
    #[arg(long, env = "AQUIFER_LANDING", value_name = "WHERE")]
    pub(crate) landing: Option<String>,
    /// Take host memory for that of a GPU of this UUID, to try without one what is done with GPUs
    #[arg(long, hide = true, value_name = "UUID", value_delimiter = ',')]
    pub(crate) twin_gpu: Vec<String>,
    /// Most memory of those that can be had in one piece
    #[arg(long, hide = true, value_name = "SIZE")]
    pub(crate) twin_gpu_memory: Option<String>,
    /// Answer HTTP here: readiness, metrics, state, events, and a page for people; or `off`. Whoever can connect can
    /// read [default: 127.0.0.1:7404, or any free port of 127.0.0.1 if another agent has it]
    #[arg(long, env = "AQUIFER_HTTP", value_name = "ADDRESS", help_heading = "Operation")]
    pub(crate) http: Option<String>,
    /// File with the token that calls over HTTP need which change something; without it there are none
    #[arg(long, env = "AQUIFER_HTTP_TOKEN", value_name = "FILE", help_heading = "Operation")]
    pub(crate) http_token: Option<PathBuf>,
    /// Run this command (by /bin/sh) at each event, which comes as JSON on its standard input. May be repeated
    #[arg(long, env = "AQUIFER_HOOK", value_name = "COMMAND", help_heading = "Operation")]
    pub(crate) hook: Vec<String>,
    /// Post each event to this address. May be repeated
    #[arg(long, env = "AQUIFER_WEBHOOK", value_name = "URL", help_heading = "Operation")]
    pub(crate) webhook: Vec<String>,
    /// File with the secret that webhooks are signed with, as standardwebhooks.com has it
    #[arg(long, env = "AQUIFER_WEBHOOK_SECRET", value_name = "FILE", help_heading = "Operation")]
    pub(crate) webhook_secret: Option<PathBuf>,
    /// Tell hooks and webhooks of these events, such as activated. May be repeated [default: all but hydrating,
    /// peer-joined and peer-left]
    #[arg(long, env = "AQUIFER_HOOK_EVENT", value_name = "KIND", value_delimiter = ',', help_heading = "Operation")]
    pub(crate) hook_event: Vec<String>,
    /// When asked to leave, hand over what nobody else has for so long at most [default: 25s]
    #[arg(long, env = "AQUIFER_DRAIN_GRACE", value_name = "DURATION", help_heading = "Operation")]
    pub(crate) drain_grace: Option<String>,
    /// Keep a record of all that this node is told and decides in this file, without secrets; an
    /// earlier one is kept as PATH.old. `simulations replay` replays it
    #[arg(long, env = "AQUIFER_RECORD", value_name = "PATH")]
    pub(crate) record: Option<PathBuf>,
}

/// What a configuration file may hold.
#[derive(Debug, Default, Deserialize)]
struct FileOptions {
    #[serde(flatten)]
    node: NodeOptions,
    #[serde(flatten)]
    agent: AgentOptions,
    #[serde(flatten)]
    unknown: BTreeMap<String, toml::Value>,
}

/// An agent's options as flags and environment give them, completed from the configuration file.
pub(crate) fn of_agent(
    config: Option<&Path>,
    node: NodeOptions,
    agent: AgentOptions,
) -> Result<(NodeOptions, AgentOptions)> {
    let file = read_config(config)?;
    Ok((node.or(file.node), agent.or(file.agent)))
}

/// The same for a node that comes and goes. The file is the agent's, which may run beside it: what
/// only one process can have, its ports, addresses and state, is not taken from there.
pub(crate) fn of_passing(config: Option<&Path>, node: NodeOptions) -> Result<NodeOptions> {
    Ok(node.or(read_config(config)?.node.shared()))
}

fn read_config(config: Option<&Path>) -> Result<FileOptions> {
    let Some(path) = config.map(Path::to_path_buf).or_else(default_config) else {
        return Ok(FileOptions::default());
    };
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_config(&text).with_context(|| path.display().to_string())
}

fn default_config() -> Option<PathBuf> {
    let home = directory("XDG_CONFIG_HOME").or_else(|| Some(directory("HOME")?.join(".config")));
    let own = home.map(|h| h.join("aquifer/aquifer.toml"));
    own.into_iter().chain([PathBuf::from("/etc/aquifer/aquifer.toml")]).find(|p| p.exists())
}

/// The options in `text`. They are read one by one, so that what is wrong with one can name it.
fn parse_config(text: &str) -> Result<FileOptions> {
    let table: toml::Table = text.parse().map_err(|error| not_toml(text, &error))?;
    let mut checked = toml::Table::new();
    for (key, value) in table {
        let one = toml::Table::from_iter([(key.clone(), as_meant(&key, value))]);
        let options: FileOptions =
            one.clone().try_into().map_err(|e: toml::de::Error| anyhow!("'{key}': {}", e.message()))?;
        if !options.unknown.is_empty() {
            bail!("there is no option '{key}'; the names are those of the flags of `aquifer agent --help`");
        }
        if one.values().all(|value| value.as_str() != Some("")) {
            checked.extend(one);
        }
    }
    Ok(checked.try_into()?)
}

fn not_toml(text: &str, error: &toml::de::Error) -> anyhow::Error {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    anyhow!("it is not TOML: line {}: {}", before.matches('\n').count() + 1, error.message())
}

/// As on the command line, a single value may stand where a list is meant; a size may be a number of bytes, and a
/// duration one of seconds.
fn as_meant(key: &str, value: toml::Value) -> toml::Value {
    const LISTS: [&str; 10] =
        ["peer", "listen", "external", "label", "trust", "channel", "pin", "hook", "webhook", "hook-event"];
    const NUMBERS: [&str; 5] = ["upload-window", "upload-limit", "store-limit", "memory-limit", "drain-grace"];
    match value.as_integer() {
        Some(number) if NUMBERS.contains(&key) => toml::Value::String(number.to_string()),
        None if value.is_str() && LISTS.contains(&key) => toml::Value::Array(vec![value]),
        _ => value,
    }
}

/// The first list, or the second if the first is empty. Empty words in a list, as after a last
/// comma, say nothing.
fn list(first: Vec<String>, second: Vec<String>) -> Vec<String> {
    let said = |list: Vec<String>| {
        let words = list.iter().map(|word| word.trim()).filter(|word| !word.is_empty());
        words.map(str::to_string).collect::<Vec<_>>()
    };
    let first = said(first);
    if first.is_empty() { said(second) } else { first }
}

/// The same of what may have commas and spaces in it.
fn lines(first: Vec<String>, second: Vec<String>) -> Vec<String> {
    let said = |list: Vec<String>| list.into_iter().filter(|line| !line.trim().is_empty()).collect::<Vec<_>>();
    let first = said(first);
    if first.is_empty() { said(second) } else { first }
}

/// The directory an environment variable names; an empty one names none.
fn directory(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

impl NodeOptions {
    fn or(self, file: Self) -> Self {
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
    fn shared(self) -> Self {
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

impl AgentOptions {
    fn or(self, file: Self) -> Self {
        AgentOptions {
            channel: list(self.channel, file.channel),
            pin: list(self.pin, file.pin),
            socket: self.socket.or(file.socket),
            store: self.store.or(file.store),
            store_limit: self.store_limit.or(file.store_limit),
            memory_limit: self.memory_limit.or(file.memory_limit),
            hold: self.hold.or(file.hold),
            landing: self.landing.or(file.landing),
            twin_gpu: list(self.twin_gpu, file.twin_gpu),
            twin_gpu_memory: self.twin_gpu_memory.or(file.twin_gpu_memory),
            record: self.record.or(file.record),
            http: self.http.or(file.http),
            http_token: self.http_token.or(file.http_token),
            hook: lines(self.hook, file.hook),
            webhook: lines(self.webhook, file.webhook),
            webhook_secret: self.webhook_secret.or(file.webhook_secret),
            hook_event: list(self.hook_event, file.hook_event),
            drain_grace: self.drain_grace.or(file.drain_grace),
        }
    }

    pub(crate) fn channels(&self) -> Result<Vec<ChannelName>> {
        self.channel.iter().map(|c| c.parse().with_context(|| format!("--channel '{c}'"))).collect()
    }

    /// What each channel is to stay with.
    fn overrides(&self) -> Result<Vec<(ChannelName, Override)>> {
        let mut pinned = Vec::new();
        let hash = |text: &str| text.parse().map(Override::Pinned);
        for text in &self.pin {
            let wrong = || format!("--pin '{text}'");
            match text.split_once('=') {
                Some((channel, manifest)) => {
                    pinned.push((channel.parse().with_context(wrong)?, hash(manifest).with_context(wrong)?));
                }
                None => {
                    let manifest = hash(text).with_context(wrong)?;
                    pinned.extend(self.channels()?.into_iter().map(|channel| (channel, manifest)));
                }
            }
        }
        Ok(pinned)
    }

    /// None: it does not answer HTTP.
    pub(crate) fn http(&self) -> Result<Option<http::Where>> {
        match self.http.as_deref() {
            None => Ok(Some(http::Where::Default)),
            Some("off") => Ok(None),
            Some(text) => {
                let address = text.parse().with_context(|| format!("--http '{text}' is not ip:port, or 'off'"))?;
                Ok(Some(http::Where::At(address)))
            }
        }
    }

    fn hooks(&self) -> Result<Vec<Hook>> {
        let known = Kind::ALL.map(Kind::name);
        if let Some(kind) = self.hook_event.iter().find(|kind| !known.contains(&kind.as_str())) {
            bail!("--hook-event '{kind}': events are {}", known.join(", "));
        }
        let kinds = || match self.hook_event.as_slice() {
            // Of every node that comes, all others tell.
            [] => {
                Kinds::AllBut([Kind::Hydrating, Kind::PeerJoined, Kind::PeerLeft].map(|k| k.name().to_string()).into())
            }
            kinds => Kinds::Only(kinds.iter().cloned().collect()),
        };
        let secret = match &self.webhook_secret {
            None => None,
            Some(path) => {
                let told = || format!("--webhook-secret {}", path.display());
                Some(Secret::parse(&std::fs::read(path).with_context(told)?).with_context(told)?)
            }
        };
        let commands = self.hook.iter().map(|line| Ok(Hook::command(line).context("--hook")?.of(kinds())));
        let webhooks =
            self.webhook.iter().map(|url| Ok(Hook::webhook(url, secret.clone()).context("--webhook")?.of(kinds())));
        commands.chain(webhooks).collect()
    }

    /// Adds these options to a node's configuration.
    pub(crate) fn configure(&self, config: &mut AgentConfig) -> Result<()> {
        config.hold = match self.hold.as_deref() {
            Some("all") => Hold::All,
            Some("engines") => Hold::Engines,
            Some(other) => bail!("--hold '{other}': it is 'all' or 'engines'"),
            None if self.store.is_some() => Hold::All,
            None => Hold::Engines,
        };
        config.store = self.store.clone();
        config.store_bytes = size("--store-limit", self.store_limit.as_deref())?;
        config.memory_bytes = size("--memory-limit", self.memory_limit.as_deref())?.unwrap_or(4 << 30);
        config.shadow = match self.landing.as_deref() {
            None | Some("shadow") => true,
            Some("host") => false,
            Some(other) => bail!("--landing '{other}': it is 'shadow' or 'host'"),
        };
        config.twin_gpus = self.twin_gpu.iter().map(|u| u.parse()).collect::<Result<_, _>>().context("--twin-gpu")?;
        config.twin_gpu_bytes = size("--twin-gpu-memory", self.twin_gpu_memory.as_deref())?.unwrap_or(u64::MAX);
        config.record = self.record.clone();
        config.overrides = self.overrides()?;
        config.drain_grace =
            self.drain_grace.as_deref().map_or(Ok(DRAIN_GRACE), |text| duration("--drain-grace", text))?;
        config.hooks = self.hooks()?;
        config.socket = Some(self.socket.clone().unwrap_or_else(default_socket));
        Ok(())
    }
}

fn duration(flag: &'static str, text: &str) -> Result<Duration> {
    units::parse_duration(text).context(flag)
}

fn size(flag: &'static str, text: Option<&str>) -> Result<Option<u64>> {
    text.map(units::parse).transpose().context(flag)
}

pub(crate) fn default_socket() -> PathBuf {
    match directory("XDG_RUNTIME_DIR") {
        Some(dir) => dir.join("aquifer.sock"),
        None => PathBuf::from(format!("/tmp/aquifer-{}.sock", rustix::process::getuid().as_raw())),
    }
}

fn default_shm_dir() -> PathBuf {
    match directory("XDG_RUNTIME_DIR") {
        Some(dir) => dir.join("aquifer-shm"),
        None => PathBuf::from(format!("/tmp/aquifer-{}-shm", rustix::process::getuid().as_raw())),
    }
}

/// Where an agent called `name` remembers, unless told otherwise; None for a user without a home.
pub(crate) fn default_state(name: Option<&str>) -> Option<PathBuf> {
    let home = directory("XDG_STATE_HOME").or_else(|| Some(directory("HOME")?.join(".local/state")))?;
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = name.map_or_else(host_name, str::to_string).chars().map(plain).collect();
    Some(home.join("aquifer").join(name.trim_start_matches('.')))
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::reasons;

    fn refusal(text: &str) -> String {
        reasons(&parse_config(text).expect_err(text))
    }

    #[test]
    fn a_file_may_say_it_as_the_command_line_does() {
        let text =
            "peer = 'a:1'\nlabel = ['zone=a', 'rack=1']\nmemory-limit = 1048576\nstore-limit = '4GiB'\nmdns = true";
        let FileOptions { node, agent, .. } = parse_config(text).unwrap();
        assert_eq!((node.peer, node.label.len(), node.mdns), (vec!["a:1".to_string()], 2, Some(true)));
        assert_eq!(size("", agent.memory_limit.as_deref()).unwrap(), Some(1 << 20));
        assert_eq!(size("", agent.store_limit.as_deref()).unwrap(), Some(4 << 30));
    }

    #[test]
    fn what_is_empty_says_nothing() {
        let FileOptions { node, agent, .. } = parse_config("name = ''\nstate = ''\nmemory-limit = ''").unwrap();
        assert_eq!((node.name, node.state, agent.memory_limit), (None, None, None));
        let words = |text: &str| text.split(',').map(str::to_string).collect::<Vec<_>>();
        assert_eq!(list(words("a, b,"), words("c")), ["a", "b"]);
        assert_eq!(list(words(","), words("c")), ["c"]);
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        for (text, key) in [
            ("peer = 5", "'peer'"),
            ("peer = [5]", "'peer'"),
            ("name = ['a']", "'name'"),
            ("mdns = 'yes'", "'mdns'"),
            ("data-listen = 'here'", "'data-listen'"),
            ("memory-limit = 1.5", "'memory-limit'"),
            ("[agent]\nname = 'a'", "'agent'"),
            ("colour = ''", "no option 'colour'"),
            ("name = 'a'\n\npeer =", "line 3"),
        ] {
            let refusal = refusal(text);
            assert!(refusal.contains(key) && !refusal.contains('\n'), "{text}: {refusal}");
        }
    }

    #[test]
    fn a_passing_node_leaves_the_agent_what_is_its_own() {
        let text = "mesh-key = 'k'\npeer = 'a:1'\nname = 'n'\nstate = 's'\nlisten = '0.0.0.0:1'\n\
            external = '/ip4/1.2.3.4/tcp/1'\ndata-listen = '0.0.0.0:2'\ndata-advertise = '1.2.3.4:2'";
        let shared = parse_config(text).unwrap().node.shared();
        assert_eq!((shared.mesh_key, shared.peer), (Some("k".into()), vec!["a:1".to_string()]));
        assert_eq!(shared.name, Some("n".to_string()));
        assert_eq!((shared.state, shared.data_listen, shared.data_advertise), (None, None, None));
        assert!(shared.listen.is_empty() && shared.external.is_empty());
    }

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

    #[test]
    fn a_size_that_is_none_names_its_flag() {
        let error = size("--store-limit", Some("4 parsecs")).expect_err("parsecs are long");
        assert!(reasons(&error).starts_with("--store-limit: '4 parsecs'"), "{error:#}");
    }
}
