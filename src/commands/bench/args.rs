//! The options of `aquifer bench`.

use super::transfer::{Destination, Kind, Origin};
use crate::units;
use aquifer_cuda::DeviceUuid;
use clap::{Args, Subcommand};
use std::path::PathBuf;

pub(super) const NODES: u16 = 3;
const CHUNK_BYTES: u64 = 4 << 20;
/// What an agent has under way at most, 128 MiB (`FLIGHT_BYTES_MAX` of `proto`).
const WINDOW_CHUNKS: u32 = 32;

const ABOUT: &str = "Every bench measures what Aquifer does and what the machine can do in the same run, by turns \
(A B A B ...), once to warm up and then --runs times; it shows medians with least and most, CPU time and peak memory \
of every process, and ratios. GB are 1e9 bytes. Figures hold for a machine that does nothing else.

On two cores, with the defaults, limits and publish take half a minute each, transfer one and a half, swarm one, \
gossip 25 s. gpu needs 34 GB of GPU memory and 17 GB of host memory for Llama 8B's 16.06 GB.";

#[derive(Debug, Args)]
#[command(after_help = ABOUT)]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub(crate) command: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// What this machine can do: copying, hashing, TCP over loopback, the disk, the page cache, copies to a GPU
    Limits {
        #[command(flatten)]
        card: Card,
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        size: Size,
    },
    /// Chunks from one process's memory to another's, verified; beside plain TCP and plain BLAKE3
    Transfer(Transfer),
    /// Hashing a checkpoint as `aquifer publish` does; beside BLAKE3 itself on all cores
    Publish {
        /// The checkpoint to hash [default: one that is made up, of --size]
        #[arg(conflicts_with = "size")]
        path: Option<PathBuf>,
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        size: Size,
    },
    /// A publisher, agents and engines on loopback, from the announcement to the last engine
    /// hydrated; beside plain TCP of as many bytes
    Swarm {
        /// How many nodes, beside the publisher
        #[arg(long, default_value_t = NODES, value_parser = clap::value_parser!(u16).range(1..=64))]
        nodes: u16,
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        size: Size,
    },
    /// Round trips of control and gossip messages between two nodes, idle and while chunks move;
    /// beside an echo over plain TCP
    Gossip {
        /// How long to measure idle, and how long saturated
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        #[command(flatten)]
        common: Common,
    },
    /// What a GPU does with chunks: hashes, loads that it verifies, updates that it applies, host memory made
    /// ready for it; beside plain copies
    Gpu {
        #[command(flatten)]
        card: Card,
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        size: Size,
    },
    /// All of the above, one after the other; without a GPU, all but that
    All {
        #[command(flatten)]
        card: Card,
        /// Of `gossip`
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        size: Size,
    },
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Common {
    /// How often each thing is measured, after one run to warm up
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) runs: u32,
    /// Where files are made, in a directory of their own that is removed at the end [default: the
    /// system's temporary directory]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Print one JSON document instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Card {
    /// The GPU to measure, by UUID as `nvidia-smi -L` shows it [default: the first that is visible]
    #[arg(long, value_name = "UUID")]
    pub(crate) gpu: Option<DeviceUuid>,
    /// A GPU of that name that is made of host memory, to try all this where there is none
    #[arg(long, value_name = "UUID", hide = true, conflicts_with = "gpu")]
    pub(crate) twin_gpu: Option<DeviceUuid>,
}

impl Card {
    /// Whether one was asked for, so that it is an error if it is not there.
    pub(super) fn is_named(&self) -> bool {
        self.gpu.is_some() || self.twin_gpu.is_some()
    }
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Size {
    /// How many bytes, such as 4GiB [default: 4GiB (limits and swarm: 1GiB; gpu: 16GiB), or less where
    /// memory is short]
    #[arg(long, value_name = "SIZE", value_parser = units::parse)]
    pub(crate) size: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Transfer {
    /// The transport to measure
    #[arg(long, value_enum, default_value_t = Kind::Tcp)]
    pub(crate) transport: Kind,
    /// Where the holder has the bytes
    #[arg(long, value_enum, default_value_t = Origin::Memory)]
    pub(crate) source: Origin,
    /// Where the puller wants them
    #[arg(long, value_enum, default_value_t = Destination::Region)]
    pub(crate) into: Destination,
    /// Connections of the transport [default: of TCP as many as an agent opens, else 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) conns: Option<u16>,
    /// Length of a chunk
    #[arg(long, value_name = "SIZE", default_value = "4MiB", value_parser = units::parse)]
    pub(crate) chunk: u64,
    /// Reads under way at a time; an agent has 128 MiB under way
    #[arg(long, value_name = "CHUNKS", default_value_t = WINDOW_CHUNKS, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) window: u32,
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) size: Size,
}

impl Transfer {
    /// With the defaults.
    pub(super) fn of(transport: Kind, source: Origin, into: Destination, common: Common, size: Size) -> Self {
        Transfer { transport, source, into, conns: None, chunk: CHUNK_BYTES, window: WINDOW_CHUNKS, common, size }
    }
}
