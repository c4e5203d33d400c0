//! What a node says of itself, and when.

use super::Node;
use crate::io::Output;
use crate::limits::STATUS_SPACING;
use crate::members::jittered;
use crate::rollout::Rollout;
use aquifer_core::limits::{STATUS_ADDRESSES_MAX, STATUS_ALSO_MAX, STATUS_CHANNELS_MAX};
use aquifer_core::{
    ChannelName, ChannelStatus, GossipMessage, ManifestHash, NodeId, PeerMessage, Release, SignedStatus, Status, Time,
};
use rand::Rng;
use std::collections::BTreeSet;
use std::time::Duration;

impl Node {
    pub(super) fn leave(&mut self) {
        let record = self.sign_status(true);
        self.out.push_back(Output::Gossip(GossipMessage::Status(record.clone())));
        // Gossip may take a heartbeat; those next to us should know at once.
        let neighbours: Vec<NodeId> = self.members.connected().copied().collect();
        for node in neighbours {
            let message = PeerMessage::Snapshot {
                statuses: vec![(record.clone(), 0)],
                releases: Vec::new(),
                statements: Vec::new(),
            };
            self.send(node, message);
        }
    }

    /// Something changed that others want to know. Where many would speak at once, as after a
    /// release, they take turns.
    pub(super) fn status_soon(&mut self, now: Time) {
        let within = self.members.turns().mul_f64(self.rng.random());
        self.status_in(now, within);
    }

    /// Publishes a status record `within` from now, but not too soon after the last one.
    pub(super) fn status_in(&mut self, now: Time, within: Duration) {
        let earliest = self.status_sent.map_or(now, |sent| sent + STATUS_SPACING);
        self.status_at = self.status_at.min(earliest.max(now + within));
    }

    pub(super) fn publish_status(&mut self, now: Time) {
        self.status_interval = self.members.status_interval();
        self.status_at = now + jittered(self.status_interval, &mut self.rng);
        self.status_sent = Some(now);
        let record = self.sign_status(false);
        self.out.push_back(Output::Gossip(GossipMessage::Status(record)));
    }

    pub(super) fn sign_status(&mut self, leaving: bool) -> SignedStatus {
        self.status_seq += 1;
        SignedStatus::sign(&self.own_status(leaving), &self.config.identity)
    }

    /// How it is now, as the next record would say.
    pub(crate) fn own_status(&self, leaving: bool) -> Status {
        Status {
            node: self.me,
            incarnation: self.config.incarnation,
            seq: self.status_seq,
            name: self.config.name.clone(),
            addresses: self.local.addresses.iter().take(STATUS_ADDRESSES_MAX).cloned().collect(),
            data_endpoints: self.local.data_endpoints.clone(),
            labels: self.config.labels.clone(),
            channels: self.channel_statuses(),
            leases: leases(self.budget.leased_bytes),
            leases_max: leases(self.budget.leased_bytes_max),
            engines: self.local.engines,
            engines_ready: self.local.engines_ready,
            interval_ms: u32::try_from(self.status_interval.as_millis()).unwrap_or(u32::MAX),
            leaving,
            draining: self.drain.is_some(),
            upload_bytes_per_s: self.rates.upload_bytes_per_s,
            uploading_bytes_per_s: self.rates.uploading_bytes_per_s,
            download_bytes_per_s: self.rates.download_bytes_per_s,
            version: self.config.version.clone(),
        }
    }

    /// What a node like this one fetches of the channel's release; the whole, if this one wants nothing of it.
    pub(crate) fn bytes_to_hydrate(&self, channel: &ChannelName) -> Option<u64> {
        let release = self.rollouts.get(channel).and_then(Rollout::wanted).or(self.releases.newest(channel))?;
        let stock = &self.swarms.get(&release.manifest)?.stock;
        let (wanted, _) = stock.progress_bytes();
        Some(if wanted > 0 { wanted } else { stock.bytes() })
    }

    fn channel_statuses(&self) -> Vec<ChannelStatus> {
        let of = |(channel, release): (&ChannelName, Option<&Release>)| {
            let mine = self.rollouts.get(channel).and_then(Rollout::wanted);
            let manifest = mine.map_or(ManifestHash::NONE, |r| r.manifest);
            let progress = self.progress(&manifest).unwrap_or_default();
            let here =
                |m: &ManifestHash| *m != manifest && self.swarms.get(m).is_some_and(|s| !s.stock.have.is_empty());
            let others: BTreeSet<ManifestHash> = self.releases.of_channel(channel).map(|(_, r)| r.manifest).collect();
            ChannelStatus {
                channel: channel.clone(),
                seq: release.map_or(0, |r| r.seq),
                manifest,
                chunks_wanted: progress.chunks_wanted,
                chunks_have: progress.chunks_have,
                also: others.into_iter().filter(here).take(STATUS_ALSO_MAX).collect(),
                report: self.reported.get(channel).cloned(),
            }
        };
        self.releases.followed().map(of).take(STATUS_CHANNELS_MAX).collect()
    }
}

fn leases(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(aquifer_core::limits::CHUNK_BYTES_TARGET.into())).unwrap_or(u32::MAX)
}
