//! A recorded node, live or simulated, told the same again: does it decide the same, and what?

use anyhow::Result;
use aquifer_core::{NodeId, PeerMessage, Time};
use aquifer_proto::Output;
use aquifer_proto::record::{Difference, Replay, Report, variant};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes of the file read at once.
const PIECE_BYTES: usize = 1 << 20;

/// Peers that the table names; the rest are one line.
const PEERS_MAX: usize = 16;

#[derive(Clone, Debug)]
pub struct Replayed {
    pub report: Report,
    /// Outputs of each kind.
    pub kinds: BTreeMap<String, u64>,
    pub peers: BTreeMap<NodeId, Traffic>,
}

/// Chunks that went, or were to go, between the node and one peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Reads begun from it.
    pub reads: u64,
    /// Reads whose end was told it, with whatever outcome.
    pub returned: u64,
    /// Grants made to it, and the chunks in them.
    pub grants: u64,
    pub chunks_granted: u64,
}

impl Replayed {
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(File::open(path)?)
    }

    /// Reads a recording to its end.
    pub fn of(mut recording: impl Read) -> Result<Self> {
        let (mut replay, mut kinds, mut peers) = (Replay::default(), BTreeMap::new(), BTreeMap::new());
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let bytes = recording.read(&mut piece)?;
            if bytes == 0 {
                return Ok(Replayed { report: replay.finish()?, kinds, peers });
            }
            replay.feed(&piece[..bytes], &mut |_, output| {
                *kinds.entry(kind(output)).or_default() += 1;
                note(output, &mut peers);
            })?;
        }
    }

    /// Why it does not pass, if it does not.
    pub fn failures(&self) -> Vec<String> {
        let told = |d: &Difference| format!("the node decides otherwise at event {}", d.event);
        self.report.difference.iter().map(told).collect()
    }
}

fn kind(output: &Output) -> String {
    if let Output::Send { message, .. } = output {
        format!("Send {}", variant(message))
    } else if let Output::Notice(notice) = output {
        format!("Notice {}", variant(notice))
    } else {
        variant(output)
    }
}

fn note(output: &Output, peers: &mut BTreeMap<NodeId, Traffic>) {
    if let Output::Read { peer, .. } = output {
        peers.entry(*peer).or_default().reads += 1;
    } else if let Output::Send { to, message: PeerMessage::Progress { returned, .. } } = output {
        peers.entry(*to).or_default().returned += returned.len() as u64;
    } else if let Output::Grant { to, chunks, .. } = output {
        let peer = peers.entry(*to).or_default();
        peer.grants += 1;
        peer.chunks_granted += chunks.len() as u64;
    }
}

impl fmt::Display for Replayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = &self.report;
        let seconds = |t: Time| t.since(Time::ZERO).as_secs_f64();
        let (begin, end) = (seconds(r.begin), seconds(r.end));
        writeln!(f, "node {} ({}), of version '{}'", r.name, r.node.short(), r.version)?;
        writeln!(f, "{} events in {:.3} s, from {begin:.3} s to {end:.3} s", r.events, end - begin)?;
        if r.torn_bytes > 0 {
            writeln!(f, "its last event was cut off after {} bytes", r.torn_bytes)?;
        }
        match &r.difference {
            None => writeln!(f, "all {} decisions are the same", r.decisions)?,
            Some(d) => self.difference(f, d)?,
        }
        writeln!(f, "\n{:<28} {:>10}", "decided", "times")?;
        for (kind, count) in &self.kinds {
            writeln!(f, "{kind:<28} {count:>10}")?;
        }
        self.table_of_peers(f)
    }
}

impl Replayed {
    fn difference(&self, f: &mut fmt::Formatter<'_>, d: &Difference) -> fmt::Result {
        writeln!(f, "DIFFERENT at event {}, at {:.6} s: {}", d.event, d.at.since(Time::ZERO).as_secs_f64(), d.told)?;
        writeln!(f, "  {} decisions then, {} now:", d.recorded, d.replayed)?;
        d.outputs.iter().try_for_each(|output| writeln!(f, "    {output}"))?;
        let (at, why) = d.timeout.unwrap_or_default();
        writeln!(f, "  it would be woken at {:.6} s: {why}", at.since(Time::ZERO).as_secs_f64())
    }

    fn table_of_peers(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut peers: Vec<_> = self.peers.iter().map(|(node, t)| (node.short(), *t)).collect();
        peers.sort_by_key(|(_, t)| std::cmp::Reverse(t.reads + t.chunks_granted));
        if peers.len() > PEERS_MAX {
            let rest = peers.split_off(PEERS_MAX);
            let sum = rest.iter().fold(Traffic::default(), |sum, (_, t)| sum.and(*t));
            peers.push((format!("{} others", rest.len()), sum));
        }
        if peers.is_empty() {
            return Ok(());
        }
        let columns = ["reads", "returned", "grants", "chunks granted"];
        writeln!(f, "\n{:<16} {:>8} {:>9} {:>8} {:>15}", "peer", columns[0], columns[1], columns[2], columns[3])?;
        for (name, t) in peers {
            writeln!(f, "{name:<16} {:>8} {:>9} {:>8} {:>15}", t.reads, t.returned, t.grants, t.chunks_granted)?;
        }
        Ok(())
    }
}

impl Traffic {
    fn and(self, other: Traffic) -> Traffic {
        Traffic {
            reads: self.reads + other.reads,
            returned: self.returned + other.returned,
            grants: self.grants + other.grants,
            chunks_granted: self.chunks_granted + other.chunks_granted,
        }
    }
}
