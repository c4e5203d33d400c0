//! What an agent says of itself, as a program that watches it would read it.

use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Status {
    pub(crate) node: String,
    pub(crate) addresses: Vec<String>,
    pub(crate) data_endpoint: String,
    pub(crate) data_encryption: String,
    pub(crate) channels: Vec<ChannelStatus>,
    pub(crate) engines: Vec<EngineStatus>,
    pub(crate) peers: Vec<PeerStatus>,
    pub(crate) traffic: Traffic,
    pub(crate) transports: BTreeMap<String, TransportStatus>,
    pub(crate) rejected_releases: Rejected,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ChannelStatus {
    pub(crate) channel: String,
    pub(crate) seq: u64,
    pub(crate) manifest: String,
    pub(crate) chunks_wanted: u64,
    pub(crate) chunks_have: u64,
    pub(crate) state: String,
    pub(crate) problem: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct EngineStatus {
    pub(crate) phase: String,
    pub(crate) serving: String,
    pub(crate) ready: bool,
    pub(crate) chunks_done: u64,
    pub(crate) chunks_total: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct PeerStatus {
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) connected: bool,
    /// `(channel, sequence number, chunks it has, chunks it wants)`.
    pub(crate) channels: Vec<(String, u64, u64, u64)>,
    pub(crate) avoided: bool,
    pub(crate) corrupt_chunks: u64,
    pub(crate) bytes_from: u64,
    pub(crate) bytes_by: BTreeMap<String, u64>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct TransportStatus {
    pub(crate) received_bytes: u64,
    pub(crate) sent_bytes: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Traffic {
    pub(crate) bytes_in: u64,
    pub(crate) chunks_verified: u64,
    pub(crate) chunks_corrupt: u64,
    pub(crate) chunks_found: u64,
    pub(crate) reads_failed: u64,
    pub(crate) sources: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Rejected {
    pub(crate) forged: u64,
    pub(crate) untrusted: u64,
    pub(crate) older: u64,
}

impl Status {
    /// The only channel it follows.
    pub(crate) fn channel(&self) -> &ChannelStatus {
        assert_eq!(self.channels.len(), 1, "{self:?}");
        &self.channels[0]
    }

    pub(crate) fn peer(&self, name: &str) -> Option<&PeerStatus> {
        self.peers.iter().find(|p| p.name == name)
    }
}
