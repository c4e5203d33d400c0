//! The puller's half: whom to ask, which grants to use, when to look elsewhere.

use super::Stock;
use crate::io::{OpId, Output};
use crate::limits::{
    ASK_PATIENCE, ASK_REFRESH, ASKS_MAX, CREDITS_MAX, DIAL_PATIENCE, FLIGHT_BYTES_MAX, LEASE_TTL, PROGRESS_CHUNKS_MAX,
    PROGRESS_INTERVAL,
};
use crate::node::audit::ensure;
use aquifer_core::limits::CHUNK_BYTES_TARGET;
use aquifer_core::message::Outcome;
use aquifer_core::{ChunkSet, ManifestHash, NodeId, PeerMessage, Time};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

#[derive(Debug, Default)]
pub(crate) struct Pulling {
    asks: BTreeMap<NodeId, Ask>,
    /// Candidates that a link was wanted to, and when: one that does not come up must not keep a
    /// place from others, as a publisher that died does.
    dialled: BTreeMap<NodeId, Time>,
    flights: BTreeMap<u32, Flight>,
    flight_bytes: u64,
    /// Verified since the last progress message, and when that is due.
    news: Vec<(u32, NodeId)>,
    news_due: Option<Time>,
}

#[derive(Debug)]
struct Ask {
    sent_at: Time,
    last_grant: Time,
}

#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) op: OpId,
    pub(crate) holder: NodeId,
    pub(crate) lease: u64,
    /// Its holder took the lease back: whatever arrives is not held against it.
    pub(crate) revoked: bool,
    /// It took longer than its lease: a holder that trickles is no better than one that is silent.
    pub(crate) late: bool,
    cancelled: bool,
    deadline: Time,
}

/// A grant as it came in; `welcome` is false from a peer that is avoided.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) from: NodeId,
    pub(crate) lease: u64,
    pub(crate) chunks: Vec<u32>,
    pub(crate) welcome: bool,
}

/// A peer that takes part in the swarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) node: NodeId,
    pub(crate) connected: bool,
    /// Chunks it says it has verified.
    pub(crate) have: u32,
}

impl Pulling {
    /// Keeps the right peers asked: as many as allowed, those with something to give among them,
    /// and none that stays silent while others wait. Returns peers worth dialling.
    pub(crate) fn review(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        now: Time,
        mut candidates: Vec<Candidate>,
        rng: &mut SmallRng,
        out: &mut VecDeque<Output>,
    ) -> Vec<NodeId> {
        if stock.is_complete() {
            self.withdraw_all(manifest, stock, out);
            return Vec::new();
        }
        let fit: BTreeSet<NodeId> = candidates.iter().filter(|c| c.connected).map(|c| c.node).collect();
        let unfit: Vec<NodeId> = self.asks.keys().filter(|n| !fit.contains(n)).copied().collect();
        unfit.into_iter().for_each(|n| self.withdraw(manifest, stock, n, out));

        candidates.shuffle(rng);
        // Half of the places go to those who have most, the other half to anybody: newcomers
        // must be asked before they have something, or they would be asked too late.
        candidates.sort_by_key(|c| std::cmp::Reverse(c.have));
        let mut rest = candidates.split_off(candidates.len().min(ASKS_MAX / 2));
        rest.shuffle(rng);
        candidates.extend(rest);
        self.dialled.retain(|_, at| now.since(*at) < DIAL_PATIENCE);
        candidates.retain(|c| !self.asks.contains_key(&c.node) && (c.connected || !self.dialled.contains_key(&c.node)));
        if !candidates.is_empty() && self.asks.len() >= ASKS_MAX {
            self.drop_most_silent(manifest, stock, now, out);
        }
        let free = ASKS_MAX - self.asks.len();
        candidates.truncate(free);
        for candidate in candidates.iter().filter(|c| c.connected) {
            self.asks.insert(candidate.node, Ask { sent_at: now, last_grant: now });
        }
        self.send_asks(manifest, stock, now, out);
        let strangers: Vec<NodeId> = candidates.into_iter().filter(|c| !c.connected).map(|c| c.node).collect();
        self.dialled.extend(strangers.iter().map(|n| (*n, now)));
        strangers
    }

    /// What is wanted changed: say so to everybody asked, and stop what is no longer wanted.
    pub(crate) fn on_wants_changed(&mut self, manifest: ManifestHash, stock: &Stock, out: &mut VecDeque<Output>) {
        for (chunk, flight) in &mut self.flights {
            if !stock.is_missing(*chunk) && !flight.cancelled {
                flight.cancelled = true;
                out.push_back(Output::CancelRead { op: flight.op });
            }
        }
        if stock.is_complete() {
            self.withdraw_all(manifest, stock, out);
        } else {
            let asked: Vec<NodeId> = self.asks.keys().copied().collect();
            asked.iter().for_each(|n| out.push_back(self.ask_message(manifest, stock, *n)));
        }
    }

    /// Uses what of a grant is of use, declines the rest.
    pub(crate) fn on_grant(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        now: Time,
        Offer { from, lease, chunks, welcome }: Offer,
        mut next_op: impl FnMut(u32) -> OpId,
        out: &mut VecDeque<Output>,
    ) {
        if let Some(ask) = self.asks.get_mut(&from) {
            ask.last_grant = now;
        }
        for chunk in chunks {
            let bytes = stock.bytes_of(chunk);
            let room = self.flight_bytes == 0 || self.flight_bytes + bytes <= FLIGHT_BYTES_MAX;
            if !welcome || !stock.is_missing(chunk) || self.flights.contains_key(&chunk) || !room {
                out.push_back(returned(from, manifest, lease, chunk, Outcome::Declined));
                continue;
            }
            let op = next_op(chunk);
            let deadline = now + LEASE_TTL;
            let flight = Flight { op, holder: from, lease, revoked: false, late: false, cancelled: false, deadline };
            self.flights.insert(chunk, flight);
            self.flight_bytes += bytes;
            out.push_back(Output::Read { op, peer: from, manifest, lease, chunk });
        }
    }

    /// Gives up reads that outlast their lease.
    pub(crate) fn on_timeout(&mut self, now: Time, out: &mut VecDeque<Output>) {
        for flight in self.flights.values_mut().filter(|f| f.deadline <= now && !f.cancelled) {
            flight.late = true;
            flight.cancelled = true;
            out.push_back(Output::CancelRead { op: flight.op });
        }
    }

    pub(crate) fn on_revoke(&mut self, from: NodeId, lease: u64) {
        let hit = self.flights.values_mut().filter(|f| f.holder == from && f.lease == lease);
        hit.for_each(|f| f.revoked = true);
    }

    /// Ends the flight of `chunk`, if `op` is the one under way.
    pub(crate) fn land(&mut self, stock: &Stock, op: OpId, chunk: u32) -> Option<Flight> {
        if self.flights.get(&chunk)?.op != op {
            return None;
        }
        self.flight_bytes -= stock.bytes_of(chunk);
        self.flights.remove(&chunk)
    }

    /// `chunk` is verified here, read from `from`, or without anybody's help.
    pub(crate) fn on_verified(&mut self, now: Time, chunk: u32, from: NodeId) {
        self.news.push((chunk, from));
        self.news_due.get_or_insert(now + PROGRESS_INTERVAL);
    }

    pub(crate) fn on_disconnected(&mut self, node: &NodeId) {
        self.asks.remove(node);
    }

    pub(crate) fn flush_news(&mut self, manifest: ManifestHash, now: Time, out: &mut VecDeque<Output>) {
        if self.news.len() < PROGRESS_CHUNKS_MAX && self.news_due.is_none_or(|due| due > now) {
            return;
        }
        self.news_due = None;
        let news = std::mem::take(&mut self.news);
        let credits = self.credits();
        for node in self.asks.keys() {
            // The holder it came from learned it from the return.
            let got: Vec<u32> = news.iter().filter(|(_, from)| from != node).map(|(c, _)| *c).collect();
            if !got.is_empty() {
                let message = PeerMessage::Progress { manifest, got, credits };
                out.push_back(Output::Send { to: *node, message });
            }
        }
    }

    pub(crate) fn next_timeout(&self) -> Option<Time> {
        let flights = self.flights.values().filter(|f| !f.cancelled).map(|f| f.deadline);
        flights.chain(self.news_due).min()
    }

    /// Cancels every read and withdraws every ask.
    pub(crate) fn stop(&mut self, manifest: ManifestHash, stock: &Stock, out: &mut VecDeque<Output>) {
        for flight in self.flights.values_mut().filter(|f| !f.cancelled) {
            flight.cancelled = true;
            out.push_back(Output::CancelRead { op: flight.op });
        }
        self.withdraw_all(manifest, stock, out);
    }

    /// Peers that chunks are coming from now.
    pub(crate) fn sources(&self) -> usize {
        self.flights.values().map(|f| f.holder).collect::<BTreeSet<_>>().len()
    }

    pub(crate) fn asked(&self) -> impl Iterator<Item = &NodeId> {
        self.asks.keys()
    }

    pub(crate) fn flights(&self) -> impl Iterator<Item = (u32, OpId)> + '_ {
        self.flights.iter().map(|(chunk, flight)| (*chunk, flight.op))
    }

    /// What is wrong with this half, if anything is.
    pub(crate) fn audit(&self, stock: &Stock, now: Time) -> Result<(), String> {
        let bytes: u64 = self.flights.keys().map(|c| stock.bytes_of(*c)).sum();
        ensure(self.asks.len() <= ASKS_MAX, || format!("{} asks stand", self.asks.len()))?;
        ensure(bytes == self.flight_bytes, || format!("{bytes} bytes fly, {} are counted", self.flight_bytes))?;
        ensure(bytes <= FLIGHT_BYTES_MAX || self.flights.len() == 1, || format!("{bytes} bytes fly"))?;
        let idle = self.flights.iter().find(|(c, f)| !stock.is_missing(**c) && !f.cancelled);
        ensure(idle.is_none(), || format!("still reads what it does not need: {idle:?}"))?;
        // One review may be late by as much as a driver is.
        let late = self.flights.iter().find(|(_, f)| !f.cancelled && f.deadline + ASK_PATIENCE < now);
        ensure(late.is_none(), || format!("a read outlasted its lease: {late:?}"))
    }

    fn send_asks(&mut self, manifest: ManifestHash, stock: &Stock, now: Time, out: &mut VecDeque<Output>) {
        let due = |a: &Ask| a.sent_at == now || now.since(a.sent_at) >= ASK_REFRESH;
        let due: Vec<NodeId> = self.asks.iter().filter(|(_, a)| due(a)).map(|(n, _)| *n).collect();
        for node in due {
            out.push_back(self.ask_message(manifest, stock, node));
            if let Some(ask) = self.asks.get_mut(&node) {
                ask.sent_at = now;
            }
        }
    }

    fn ask_message(&self, manifest: ManifestHash, stock: &Stock, to: NodeId) -> Output {
        let message =
            PeerMessage::Ask { manifest, wanted: stock.missing(), have: stock.have.clone(), credits: self.credits() };
        Output::Send { to, message }
    }

    /// Shares what may be in flight among those asked.
    fn credits(&self) -> u16 {
        let chunks = FLIGHT_BYTES_MAX / u64::from(CHUNK_BYTES_TARGET) / self.asks.len().max(1) as u64;
        u16::try_from(chunks).unwrap_or(CREDITS_MAX).clamp(1, CREDITS_MAX)
    }

    fn drop_most_silent(&mut self, manifest: ManifestHash, stock: &Stock, now: Time, out: &mut VecDeque<Output>) {
        let silent = self.asks.iter().filter(|(_, a)| now.since(a.last_grant) >= ASK_PATIENCE);
        let most = silent.min_by_key(|(_, a)| a.last_grant).map(|(n, _)| *n);
        if let Some(node) = most {
            self.withdraw(manifest, stock, node, out);
        }
    }

    fn withdraw(&mut self, manifest: ManifestHash, stock: &Stock, node: NodeId, out: &mut VecDeque<Output>) {
        self.asks.remove(&node);
        let nothing = ChunkSet::empty(stock.len());
        let message = PeerMessage::Ask { manifest, wanted: nothing, have: stock.have.clone(), credits: 0 };
        out.push_back(Output::Send { to: node, message });
    }

    fn withdraw_all(&mut self, manifest: ManifestHash, stock: &Stock, out: &mut VecDeque<Output>) {
        let asked: Vec<NodeId> = self.asks.keys().copied().collect();
        asked.into_iter().for_each(|n| self.withdraw(manifest, stock, n, out));
    }
}

pub(crate) fn returned(to: NodeId, manifest: ManifestHash, lease: u64, chunk: u32, outcome: Outcome) -> Output {
    Output::Send { to, message: PeerMessage::Return { manifest, lease, chunk, outcome } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use std::time::Duration;

    #[test]
    fn a_peer_that_cannot_be_reached_keeps_no_place_from_others() {
        let mut stock = Stock::new(vec![1; 4]);
        stock.wanted = ChunkSet::full(4);
        let (mut pulling, mut rng, mut out) = (Pulling::default(), SmallRng::seed_from_u64(1), VecDeque::new());
        let peer = |n: usize| NodeId([u8::try_from(n).unwrap(); 32]);
        let living = |n| Candidate { node: peer(n), connected: true, have: 0 };
        let dead = Candidate { node: peer(200), connected: false, have: 4 };
        let candidates: Vec<Candidate> = (0..ASKS_MAX).map(living).chain([dead]).collect();
        let manifest = ManifestHash::of(b"m");
        let mut review = |at: Duration, candidates: &[Candidate]| {
            let now = Time::ZERO + at;
            let dials = pulling.review(manifest, &stock, now, candidates.to_vec(), &mut rng, &mut out);
            (dials, pulling.asks.len())
        };
        assert_eq!(review(Duration::ZERO, &candidates), (vec![peer(200)], ASKS_MAX - 1));
        assert_eq!(review(Duration::from_millis(100), &candidates), (vec![], ASKS_MAX));
        assert_eq!(review(DIAL_PATIENCE, &candidates), (vec![peer(200)], ASKS_MAX - 1), "it is tried again later");
    }
}
