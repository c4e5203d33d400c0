//! Options of `aquifer agent` alone.

use super::defaults::default_socket;
use super::file::list;
use super::size;
use crate::agent::{AgentConfig, Hold};
use anyhow::{Context, Result, bail};
use aquifer_core::ChannelName;
use aquifer_proto::rollout::Override;
use clap::Args;
use serde::Deserialize;
use std::path::PathBuf;

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
    /// Bytes a second that come to each of those from host memory at most
    #[arg(long, hide = true, value_name = "SIZE")]
    pub(crate) twin_gpu_rate: Option<String>,
    /// Keep a record of all that this node is told and decides in this file, without secrets; an
    /// earlier one is kept as PATH.old. `simulations replay` replays it
    #[arg(long, env = "AQUIFER_RECORD", value_name = "PATH")]
    pub(crate) record: Option<PathBuf>,
}

impl AgentOptions {
    pub(super) fn or(self, file: Self) -> Self {
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
            twin_gpu_rate: self.twin_gpu_rate.or(file.twin_gpu_rate),
            record: self.record.or(file.record),
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
        config.twin_gpu_bytes_per_s =
            size("--twin-gpu-rate", self.twin_gpu_rate.as_deref())?.unwrap_or(u64::MAX).max(1);
        config.record = self.record.clone();
        config.overrides = self.overrides()?;
        config.socket = Some(self.socket.clone().unwrap_or_else(default_socket));
        Ok(())
    }
}
