//! How long hydration takes: of nodes that do not exist yet, for who decides how many to start; and of one that is
//! under way. Nothing in this crate is decided by it.
//!
//! The bound is that of a fluid: bytes may be sent on as they arrive, in any small pieces. The swarm comes within some
//! percent of it (`simulations`), so it is an estimate as good as the rates that go into it.

use crate::limits::{ETA_SPACING, ETA_WINDOW};
use crate::node::Node;
use aquifer_core::{ChannelName, NodeId, Status, Time};
use std::collections::VecDeque;
use std::time::Duration;

const NANOS: u128 = 1_000_000_000;

/// The least time in which `k` nodes that have nothing can get `bytes` each: one copy has to leave the seeds, each node
/// has to take it in, and all of them together cannot get more than everybody uploads. None: never, at a rate of zero.
///
/// R. Kumar and K. Ross, "Peer-assisted file distribution: the minimum distribution time", HotWeb 2006, theorem 1:
/// these three bounds are tight.
pub fn hydration_time(
    bytes: u64,
    seeds_upload: u64,
    peers_upload_each: u64,
    download_each: u64,
    k: u32,
) -> Option<Duration> {
    if k == 0 || bytes == 0 {
        return Some(Duration::ZERO);
    }
    let (one, all) = (u128::from(bytes), u128::from(bytes) * u128::from(k));
    let everybody = u128::from(seeds_upload) + u128::from(peers_upload_each) * u128::from(k);
    let first_copy = time(one, seeds_upload.into())?;
    let own_link = time(one, download_each.into())?;
    Some(first_copy.max(own_link).max(time(all, everybody)?))
}

/// Rounded up; at most 2^96 bytes.
fn time(bytes: u128, bytes_per_s: u128) -> Option<Duration> {
    if bytes_per_s == 0 {
        return None;
    }
    let nanos = (bytes * NANOS).div_ceil(bytes_per_s);
    let within = u32::try_from(nanos % NANOS).ok()?;
    Some(Duration::new(u64::try_from(nanos / NANOS).ok()?, within))
}

/// How a channel's nodes are, and how long more of them would take. Who drains is no replica any more.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Nodes that have all they want of the release that is for them.
    pub hydrated_replicas: u32,
    /// Those whose engines serve, and may.
    pub ready_replicas: u32,
    pub hydrating: Vec<Hydrating>,
    /// What the hydrated could upload in a second, beside what they do. None: no node's upload is known.
    pub spare_upload_bytes_per_s: Option<u64>,
    pub nodes: u32,
    /// Until so many `nodes` more have what this one is to have. None: no rates are known, or no manifest; or nothing
    /// is spare.
    pub predicted: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Hydrating {
    pub node: NodeId,
    pub name: String,
    /// Of the chunks that it wants; they are about equally long.
    pub fraction: f64,
}

/// What one node says, as far as it matters here.
#[derive(Clone, Debug)]
struct Standing {
    node: NodeId,
    name: String,
    chunks_wanted: u32,
    chunks_have: u32,
    ready: bool,
    draining: bool,
    /// Zero: not known.
    upload: u64,
    uploading: u64,
    download: u64,
}

impl Forecast {
    /// As this node sees it: from its members' last records, and from how it is itself.
    pub fn of(node: &Node, channel: &ChannelName, nodes: u32) -> Forecast {
        let own = node.own_status(false);
        let everybody = std::iter::once(&own).chain(node.members().map(|m| m.status.as_ref()));
        let all: Vec<Standing> = everybody.filter_map(|status| Standing::of(status, channel)).collect();
        Self::among(&all, node.bytes_to_hydrate(channel), nodes)
    }

    /// Those who are hydrating take part: they need the upload too, and give theirs. So what is sent now, to them as
    /// it seems, counts as free. Where nobody is, it goes elsewhere, and does not.
    fn among(all: &[Standing], bytes: Option<u64>, nodes: u32) -> Forecast {
        let upload = median(all.iter().map(|s| s.upload));
        let download = median(all.iter().map(|s| s.download));
        let there = || all.iter().filter(|s| !s.draining);
        let hydrated = || there().filter(|s| s.is_hydrated());
        let hydrating: Vec<Hydrating> = there().filter_map(Standing::hydrating).collect();
        let of = |s: &Standing, typical: u64| if s.upload > 0 { s.upload } else { typical };
        let sum = |each: &dyn Fn(&Standing) -> u64| hydrated().fold(0u64, |sum, s| sum.saturating_add(each(s)));
        let spare = upload.map(|typical| sum(&|s| of(s, typical).saturating_sub(s.uploading)));
        let whole = upload.map(|typical| sum(&|s| of(s, typical)));
        let seeds = if hydrating.is_empty() { spare } else { whole };
        let k = nodes.saturating_add(u32::try_from(hydrating.len()).unwrap_or(u32::MAX));
        let predict = || hydration_time(bytes?, seeds?, upload?, download?, k);
        Forecast {
            hydrated_replicas: count(hydrated()),
            ready_replicas: count(there().filter(|s| s.ready)),
            predicted: if nodes == 0 { Some(Duration::ZERO) } else { predict() },
            hydrating,
            spare_upload_bytes_per_s: spare,
            nodes,
        }
    }
}

impl Standing {
    fn of(node: &Status, channel: &ChannelName) -> Option<Self> {
        let channel = node.channels.iter().find(|c| c.channel == *channel)?;
        Some(Standing {
            node: node.node,
            name: node.name.clone(),
            chunks_wanted: channel.chunks_wanted,
            chunks_have: channel.chunks_have,
            ready: channel.report.as_ref().is_some_and(|r| r.ready),
            draining: node.draining,
            upload: node.upload_bytes_per_s,
            uploading: node.uploading_bytes_per_s,
            download: node.download_bytes_per_s,
        })
    }

    fn is_hydrated(&self) -> bool {
        self.chunks_wanted > 0 && self.chunks_have >= self.chunks_wanted
    }

    fn hydrating(&self) -> Option<Hydrating> {
        let fraction = f64::from(self.chunks_have) / f64::from(self.chunks_wanted.max(1));
        let hydrating = || Hydrating { node: self.node, name: self.name.clone(), fraction };
        (self.chunks_have < self.chunks_wanted).then(hydrating)
    }
}

fn count<'a>(of: impl Iterator<Item = &'a Standing>) -> u32 {
    u32::try_from(of.count()).unwrap_or(u32::MAX)
}

/// Of those that are known; the lower of two.
fn median(rates: impl Iterator<Item = u64>) -> Option<u64> {
    let mut known: Vec<u64> = rates.filter(|r| *r > 0).collect();
    known.sort_unstable();
    known.get(known.len().saturating_sub(1) / 2).copied()
}

/// How fast one hydration goes, and how long it takes yet.
#[derive(Clone, Debug, Default)]
pub struct Eta {
    /// Not closer than [`ETA_SPACING`], and one at most that is older than [`ETA_WINDOW`].
    samples: VecDeque<(Time, u64)>,
    bytes_done: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Over [`ETA_WINDOW`], or since it began.
    pub bytes_per_s: f64,
    pub left: Duration,
}

impl Eta {
    /// So much is here now. Fewer bytes than before are a hydration that begins anew.
    pub fn note(&mut self, now: Time, bytes_done: u64) {
        if bytes_done < self.bytes_done {
            self.samples.clear();
        }
        self.bytes_done = bytes_done;
        if self.samples.back().is_none_or(|(at, _)| now.since(*at) >= ETA_SPACING) {
            self.samples.push_back((now, bytes_done));
        }
        while self.samples.get(1).is_some_and(|(at, _)| now.since(*at) >= ETA_WINDOW) {
            self.samples.pop_front();
        }
    }

    /// None if nothing moved lately, and something is missing.
    pub fn estimate(&self, now: Time, bytes_total: u64) -> Option<Estimate> {
        let missing = bytes_total.saturating_sub(self.bytes_done);
        let old = |(at, _): &&(Time, u64)| now.since(*at) >= ETA_WINDOW;
        let from = self.samples.iter().rev().find(old).or(self.samples.front());
        let rate = from.map_or(0.0, |(at, bytes)| rate(self.bytes_done.saturating_sub(*bytes), now.since(*at)));
        if missing == 0 {
            return Some(Estimate { bytes_per_s: rate, left: Duration::ZERO });
        }
        let left = Duration::try_from_secs_f64(missing as f64 / rate).ok()?;
        Some(Estimate { bytes_per_s: rate, left })
    }
}

fn rate(bytes: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { bytes as f64 / time.as_secs_f64() }
}

#[cfg(test)]
mod tests;
