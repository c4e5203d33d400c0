//! The puller's half: which grants to use, what to tell the holders, when to look elsewhere.

use super::Stock;
use super::asks::{Ask, Asks, Candidate};
use super::hunger::Hunger;
use super::news::{News, Told};
use super::reach::{DISTANCE_MAX, Reach};
use crate::io::{OpId, Output};
use crate::limits::{
    ASK_REFRESH, ASK_RETRY, ASKS_MAX, FLIGHT_BYTES_MAX, FLIGHT_WATCH, HUNGER_PATIENCE, LEASE_TTL, MUTUAL_GRACE,
    NEWS_CHUNKS, OVERDUE_FACTOR, PACE_BYTES_MIN, PACE_SAMPLES, PROGRESS_INTERVAL_MAX, PROGRESS_INTERVAL_MIN,
    READ_STALL, SILENT_PAUSE,
};
use crate::node::audit::ensure;
use aquifer_core::message::{Outcome, Refusal, Returned, Terms};
use aquifer_core::{ChunkSet, ManifestHash, NodeId, PeerMessage, Time};
use rand::rngs::SmallRng;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

#[derive(Debug, Default)]
pub(crate) struct Pulling {
    asks: Asks,
    flights: BTreeMap<u32, Flight>,
    flight_bytes: u64,
    news: News,
    /// When those who were not spoken to since are told the news.
    news_due: Option<Time>,
    hunger: Hunger,
    /// When holders were first looked for.
    began: Option<Time>,
    /// When flights are looked over.
    watch_at: Option<Time>,
    /// When the last read ended, and the time between two such ends, as a moving average.
    landed_at: Option<Time>,
    gap: Duration,
    /// How long a byte takes on its way, typically: seconds.
    pace: f64,
    reach: Reach,
    /// The reach narrowed, and those far away have not heard it.
    narrowed: bool,
    /// This node is about to leave: it asks nobody, and what is under way may end.
    retired: bool,
}

#[derive(Debug)]
struct Flight {
    op: OpId,
    holder: NodeId,
    lease: u64,
    started: Time,
    /// It takes so long that another holder would be as welcome.
    overdue: bool,
    /// A holder and its lease that take over once this read has ended.
    successor: Option<(NodeId, u64)>,
    /// Its holder took the lease back: whatever arrives is not held against it.
    revoked: bool,
    /// It took longer than its lease: a holder that trickles is no better than one that is silent.
    late: bool,
    cancelled: bool,
}

/// A flight's end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landed {
    pub(crate) revoked: bool,
    pub(crate) late: bool,
    pub(crate) successor: Option<(NodeId, u64)>,
}

/// A grant as it came in; `welcome` is false from a peer that is avoided.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) from: NodeId,
    pub(crate) lease: u64,
    pub(crate) chunks: Vec<u32>,
    pub(crate) welcome: bool,
}

impl Flight {
    /// Another holder may bring it: this one takes long.
    fn is_replaceable(&self, by: &NodeId) -> bool {
        self.overdue && self.successor.is_none() && !self.cancelled && self.holder != *by
    }

    /// It is to end; that it has is still to come.
    fn cancel(&mut self, out: &mut VecDeque<Output>) {
        if !std::mem::replace(&mut self.cancelled, true) {
            out.push_back(Output::CancelRead { op: self.op });
        }
    }
}

impl Pulling {
    /// Whether [`Pulling::review`] could use candidates now.
    pub(crate) fn is_looking(&self, stock: &Stock, now: Time) -> bool {
        !self.retired && !stock.is_complete() && (self.asks.len() < ASKS_MAX || self.is_starving(now))
    }

    /// When free places are open to all.
    pub(crate) fn open_at(&self) -> Option<Time> {
        self.began.map(|began| began + MUTUAL_GRACE)
    }

    /// Keeps enough peers asked, and none that stays silent while this node goes hungry. Returns
    /// peers worth dialling.
    pub(crate) fn review(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        now: Time,
        mut candidates: Vec<Candidate>,
        rng: &mut SmallRng,
        out: &mut VecDeque<Output>,
    ) -> Vec<NodeId> {
        if self.retired || stock.is_complete() {
            self.withdraw_all(manifest, stock, out);
            return Vec::new();
        }
        if self.is_starving(now)
            && self.asks.len() >= ASKS_MAX
            && let Some(node) = self.asks.replaceable(now, HUNGER_PATIENCE, &candidates)
        {
            self.asks.pass_over(node, now, SILENT_PAUSE);
            self.withdraw(manifest, stock, node, out);
        }
        let starving = self.is_starving(now);
        if starving {
            let further = self.reach.widen();
            self.hunger.look(now, further);
        }
        if starving || std::mem::take(&mut self.narrowed) {
            self.ask_far(manifest, stock, now, out);
        }
        self.withdraw_idle(manifest, stock, &mut candidates, out);
        // At first there is room for those who will ask this node, and are to be asked in return.
        let began = *self.began.get_or_insert(now);
        let alone = starving || now.since(began) >= MUTUAL_GRACE;
        let (new, dials) = self.asks.fill(now, self.news.end(), candidates, alone, rng);
        new.into_iter().for_each(|n| self.ask(manifest, stock, now, n, out));
        self.refresh(manifest, stock, now, out);
        dials
    }

    /// Who else is in the mesh, and how far away each is, changed.
    pub(crate) fn on_neighbours(&mut self, me: &NodeId, others: &[(NodeId, u8)]) {
        self.reach.rank(me, others);
        self.narrowed = true;
    }

    /// What is wanted changed: say so to everybody asked, and stop what is no longer wanted.
    pub(crate) fn on_wants_changed(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        now: Time,
        out: &mut VecDeque<Output>,
    ) {
        for (_, flight) in self.flights.iter_mut().filter(|(chunk, _)| !stock.is_missing(**chunk)) {
            flight.cancel(out);
        }
        self.hunger.hope();
        if self.retired || stock.is_complete() {
            self.withdraw_all(manifest, stock, out);
        } else {
            self.asks.nodes().into_iter().for_each(|n| self.ask(manifest, stock, now, n, out));
        }
    }

    /// Uses what of a grant is of use, declines the rest.
    pub(crate) fn on_grant(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        now: Time,
        Offer { from, lease, chunks, welcome }: Offer,
        mut next_op: impl FnMut(u32, NodeId, u64) -> OpId,
        out: &mut VecDeque<Output>,
    ) {
        let Some(ask) = self.asks.get_mut(&from) else {
            // It was never asked, or the grant crossed the withdrawal or a refusal. What is missing is not
            // "coming from somewhere else": who takes it for that, and drains, would leave with it.
            let is_missing = |chunk| stock.is_missing(chunk) && !self.flights.contains_key(&chunk);
            let outcome = |chunk| if is_missing(chunk) { Outcome::Postponed } else { Outcome::Declined };
            let returned = chunks.into_iter().map(|chunk| Returned { lease, chunk, outcome: outcome(chunk) }).collect();
            return out.push_back(only_returned(from, manifest, returned));
        };
        ask.last_grant = now;
        let mut returned = Vec::new();
        for chunk in chunks {
            let bytes = stock.bytes_of(chunk);
            let room = self.flight_bytes == 0 || self.flight_bytes + bytes <= FLIGHT_BYTES_MAX;
            if let Some(flight) = self.flights.get_mut(&chunk) {
                if welcome && flight.is_replaceable(&from) {
                    flight.successor = Some((from, lease));
                    flight.cancel(out);
                } else {
                    returned.push(Returned { lease, chunk, outcome: Outcome::Declined });
                }
            } else if !stock.is_missing(chunk) {
                returned.push(Returned { lease, chunk, outcome: Outcome::Declined });
            } else if !welcome || !room {
                returned.push(Returned { lease, chunk, outcome: Outcome::Postponed });
            } else {
                let op = next_op(chunk, from, lease);
                self.begin(manifest, stock, now, (op, chunk), (from, lease), out);
            }
        }
        self.note_hunger(stock, now);
        if !returned.is_empty() {
            self.tell(manifest, stock, now, from, returned, out);
        }
    }

    /// Reads a granted chunk.
    pub(crate) fn begin(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        now: Time,
        (op, chunk): (OpId, u32),
        (holder, lease): (NodeId, u64),
        out: &mut VecDeque<Output>,
    ) {
        if let Some(ask) = self.asks.get_mut(&holder) {
            ask.on_begin(now);
        }
        let flight = Flight {
            op,
            holder,
            lease,
            started: now,
            overdue: false,
            successor: None,
            revoked: false,
            late: false,
            cancelled: false,
        };
        self.flights.insert(chunk, flight);
        self.hunger.hope();
        self.flight_bytes += stock.bytes_of(chunk);
        self.news.taken(chunk, holder);
        self.tell_soon(now);
        self.watch_at.get_or_insert(now + FLIGHT_WATCH);
        out.push_back(Output::Read { op, peer: holder, manifest, lease, chunk });
    }

    /// Looks over the flights: gives up those that outlast their lease, and lets others bring what
    /// takes many times as long as usual.
    pub(crate) fn on_timeout(&mut self, manifest: ManifestHash, stock: &Stock, now: Time, out: &mut VecDeque<Output>) {
        if self.watch_at.is_none_or(|at| at > now) {
            return;
        }
        self.watch_at = (!self.flights.is_empty()).then(|| now + FLIGHT_WATCH);
        let mut slow = BTreeSet::new();
        for (chunk, flight) in self.flights.iter_mut().filter(|(_, f)| !f.cancelled) {
            let age = now.since(flight.started);
            if age >= LEASE_TTL {
                flight.late = true;
                flight.cancel(out);
            }
            let usual = Duration::from_secs_f64(self.pace * stock.bytes_of(*chunk).max(PACE_BYTES_MIN) as f64);
            if !flight.overdue && self.pace > 0.0 && age >= FLIGHT_WATCH.max(usual * OVERDUE_FACTOR) {
                flight.overdue = true;
                slow.insert(flight.holder);
                self.news.again(*chunk, flight.holder);
            }
        }
        if !slow.is_empty() {
            self.tell_soon(now);
            self.note_hunger(stock, now);
        }
        for holder in slow {
            self.asks.pass_over(holder, now, ASK_RETRY);
            self.withdraw(manifest, stock, holder, out);
        }
    }

    pub(crate) fn on_revoke(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        now: Time,
        (from, lease): (NodeId, u64),
        out: &mut VecDeque<Output>,
    ) {
        let mut returned = Vec::new();
        for (&chunk, flight) in &mut self.flights {
            flight.revoked |= flight.holder == from && flight.lease == lease;
            // A read that never began. Only some of the lease's chunks may be gone, and the holder
            // waits for the others.
            if flight.successor.take_if(|next| *next == (from, lease)).is_some() {
                returned.push(Returned { lease, chunk, outcome: Outcome::Declined });
            }
        }
        if !returned.is_empty() {
            self.tell(manifest, stock, now, from, returned, out);
        }
    }

    pub(crate) fn on_refused(&mut self, from: NodeId, refusal: Refusal, now: Time) {
        self.asks.on_refused(from, refusal, now);
    }

    /// Ends the flight of `chunk`, if `op` is the one under way.
    pub(crate) fn land(&mut self, stock: &Stock, now: Time, op: OpId, chunk: u32) -> Option<Landed> {
        if self.flights.get(&chunk)?.op != op {
            return None;
        }
        let bytes = stock.bytes_of(chunk);
        self.flight_bytes -= bytes;
        let Flight { holder, started, overdue, successor, revoked, late, .. } = self.flights.remove(&chunk)?;
        if overdue {
            // Others were told that they might bring it; if it did not come they are told again.
            self.news.taken(chunk, holder);
            self.tell_soon(now);
        }
        let took = now.since(started);
        if let Some(ask) = self.asks.get_mut(&holder) {
            ask.on_end(now, took);
        }
        if let Some(last) = self.landed_at.replace(now) {
            self.gap = (self.gap * 15 + now.since(last)) / 16;
        }
        let sample = took.as_secs_f64() / bytes.max(PACE_BYTES_MIN) as f64;
        self.pace = if self.pace > 0.0 { self.pace + (sample - self.pace) / PACE_SAMPLES } else { sample };
        Some(Landed { revoked, late, successor })
    }

    /// News is told after a few chunks' time: often enough that holders rarely offer what came from
    /// elsewhere, and no more often, because each telling is a message to every holder.
    fn tell_soon(&mut self, now: Time) {
        let within = (self.gap * NEWS_CHUNKS).clamp(PROGRESS_INTERVAL_MIN, PROGRESS_INTERVAL_MAX);
        self.news_due.get_or_insert(now + within);
    }

    /// Gives a lease back to its holder, and tells it what else is new; others look again for a
    /// chunk that did not come.
    pub(crate) fn give_back(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        now: Time,
        holder: NodeId,
        returned: Returned,
        out: &mut VecDeque<Output>,
    ) {
        if stock.is_missing(returned.chunk) && !self.flights.contains_key(&returned.chunk) {
            self.news.again(returned.chunk, holder);
            self.tell_soon(now);
        }
        self.note_hunger(stock, now);
        self.tell(manifest, stock, now, holder, vec![returned], out);
    }

    /// `chunk` is here without anybody's help.
    pub(crate) fn on_held(&mut self, now: Time, chunk: u32, me: NodeId, out: &mut VecDeque<Output>) {
        if let Some(flight) = self.flights.get_mut(&chunk) {
            flight.cancel(out);
        }
        self.news.taken(chunk, me);
        self.tell_soon(now);
    }

    /// Somebody can be reached who may have what the others lack.
    pub(crate) fn on_connected(&mut self) {
        self.hunger.hope();
    }

    /// Its leases ended with the connection: it takes nothing over.
    pub(crate) fn on_disconnected(&mut self, node: &NodeId) {
        self.asks.remove(node);
        for flight in self.flights.values_mut() {
            flight.successor.take_if(|(holder, _)| holder == node);
        }
    }

    /// Tells those who were not spoken to for a while.
    pub(crate) fn flush_news(&mut self, manifest: ManifestHash, stock: &Stock, now: Time, out: &mut VecDeque<Output>) {
        if self.news_due.is_none_or(|due| due > now) {
            return;
        }
        self.news_due = None;
        let end = self.news.end();
        let behind: Vec<NodeId> = self.asks.iter_mut().filter(|(_, a)| a.cursor < end).map(|(n, _)| *n).collect();
        behind.into_iter().for_each(|n| self.tell(manifest, stock, now, n, Vec::new(), out));
        self.news.trim(self.asks.least_cursor().unwrap_or(end));
    }

    pub(crate) fn next_timeout(&self) -> Option<(Time, &'static str)> {
        let flights = self.watch_at.map(|at| (at, "flights"));
        let hunger = self.hunger.due().map(|at| (at, "hunger"));
        let news = self.news_due.map(|due| (due, "progress"));
        flights.into_iter().chain(hunger).chain(news).min()
    }

    /// Asks nobody any more.
    pub(crate) fn retire(&mut self, manifest: ManifestHash, stock: &Stock, out: &mut VecDeque<Output>) {
        self.retired = true;
        self.withdraw_all(manifest, stock, out);
    }

    /// Cancels every read and withdraws every ask.
    pub(crate) fn stop(&mut self, manifest: ManifestHash, stock: &Stock, out: &mut VecDeque<Output>) {
        self.flights.values_mut().for_each(|f| f.cancel(out));
        for (&chunk, flight) in &mut self.flights {
            if let Some((to, lease)) = flight.successor.take() {
                out.push_back(only_returned(to, manifest, vec![Returned { lease, chunk, outcome: Outcome::Declined }]));
            }
        }
        self.withdraw_all(manifest, stock, out);
    }

    /// Peers that chunks are coming from now.
    pub(crate) fn sources(&self) -> usize {
        self.flights.values().map(|f| f.holder).collect::<BTreeSet<_>>().len()
    }

    pub(crate) fn asked(&self) -> Vec<NodeId> {
        self.asks.nodes()
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
        // A driver may be late.
        let late = self.flights.iter().find(|(_, f)| !f.cancelled && now.since(f.started) > LEASE_TTL + READ_STALL);
        ensure(late.is_none(), || format!("a read outlasted its lease: {late:?}"))
    }

    /// Whether nothing more could be got from those asked for a while.
    pub(crate) fn is_starving(&self, now: Time) -> bool {
        self.hunger.due().is_some_and(|at| at <= now)
    }

    /// Hungry is who has less than two chunks under way and could have more.
    fn note_hunger(&mut self, stock: &Stock, now: Time) {
        if self.retired || self.flight_bytes >= 2 * stock.unit_bytes() || self.is_all_under_way(stock) {
            self.hunger.end();
            self.narrowed |= self.reach.narrow();
        } else {
            self.hunger.begin(now);
        }
    }

    /// Whether nothing is left to ask for. What takes long is: another could bring it.
    fn is_all_under_way(&self, stock: &Stock) -> bool {
        let flies = |chunk| self.flights.get(&chunk).is_some_and(|f| !f.overdue);
        stock.wanted.difference(&stock.have).all(flies)
    }

    fn ask(&mut self, manifest: ManifestHash, stock: &Stock, now: Time, to: NodeId, out: &mut VecDeque<Output>) {
        self.note_hunger(stock, now);
        let terms = self.asks.terms(stock, &to, self.flight_bytes);
        let end = self.news.end();
        let Some(ask) = self.asks.get_mut(&to) else { return };
        ask.on_sent(now, end);
        ask.share = Some(self.reach.share(ask.distance));
        let mut missing = stock.missing();
        self.reach.restrict(ask.distance, &mut missing);
        if missing.is_empty() {
            return self.withdraw(manifest, stock, to, out);
        }
        let (mut wanted, mut have) = (missing.clone(), stock.have.clone());
        for &chunk in self.flights.keys() {
            wanted.remove(chunk);
            have.insert(chunk);
        }
        if wanted.is_empty() {
            // An empty ask is none; one that wants what is on its way may yet be of use.
            wanted = missing;
            wanted.iter().for_each(|c| {
                have.remove(c);
            });
        }
        out.push_back(Output::Send { to, message: PeerMessage::Ask { manifest, wanted, have, terms } });
    }

    /// Leases given back to `to`, and the news it has not heard.
    fn tell(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        now: Time,
        to: NodeId,
        returned: Vec<Returned>,
        out: &mut VecDeque<Output>,
    ) {
        let terms = self.asks.terms(stock, &to, self.flight_bytes);
        let end = self.news.end();
        let told = match self.asks.get_mut(&to) {
            Some(ask) => {
                let mut told = self.news.since(ask.cursor, to);
                ask.cursor = end;
                if let Some(told) = &mut told {
                    told.again.retain(|c| self.reach.allows(ask.distance, *c));
                }
                told
            }
            None => Some(Told::default()),
        };
        match told {
            Some(Told { taken, again }) => {
                if !(returned.is_empty() && taken.is_empty() && again.is_empty()) {
                    let message = PeerMessage::Progress { manifest, returned, taken, again, terms };
                    out.push_back(Output::Send { to, message });
                }
            }
            None => {
                let (taken, again) = (Vec::new(), Vec::new());
                let message = PeerMessage::Progress { manifest, returned, taken, again, terms };
                out.push_back(Output::Send { to, message });
                self.ask(manifest, stock, now, to, out);
            }
        }
    }

    /// Tells those beyond a boundary what they may give, if it is not what they were told.
    fn ask_far(&mut self, manifest: ManifestHash, stock: &Stock, now: Time, out: &mut VecDeque<Output>) {
        let differs = |a: &Ask| a.distance > 0 && a.share != Some(self.reach.share(a.distance));
        let far: Vec<NodeId> = self.asks.iter_mut().filter(|(_, a)| differs(a)).map(|(n, _)| *n).collect();
        far.into_iter().for_each(|n| self.ask(manifest, stock, now, n, out));
    }

    /// Keeps no place for those from whom nothing that is missing may be fetched: they are too far.
    fn withdraw_idle(
        &mut self,
        manifest: ManifestHash,
        stock: &Stock,
        candidates: &mut Vec<Candidate>,
        out: &mut VecDeque<Output>,
    ) {
        let missing = || stock.wanted.difference(&stock.have);
        let idle = (1..=DISTANCE_MAX).filter(|d| !missing().any(|c| self.reach.allows(*d, c)));
        let idle: Vec<u8> = idle.collect();
        candidates.retain(|c| !idle.contains(&c.distance));
        let asked = self.asks.iter_mut().filter(|(_, a)| idle.contains(&a.distance));
        let asked: Vec<NodeId> = asked.map(|(n, _)| *n).collect();
        asked.into_iter().for_each(|n| self.withdraw(manifest, stock, n, out));
    }

    /// Repeats asks now and then, whole.
    fn refresh(&mut self, manifest: ManifestHash, stock: &Stock, now: Time, out: &mut VecDeque<Output>) {
        let old = self.asks.iter_mut().filter(|(_, a)| now.since(a.sent_at) >= ASK_REFRESH);
        let old: Vec<NodeId> = old.map(|(n, _)| *n).collect();
        old.into_iter().for_each(|n| self.ask(manifest, stock, now, n, out));
    }

    /// The peer is asked no more.
    pub(crate) fn withdraw(&mut self, manifest: ManifestHash, stock: &Stock, node: NodeId, out: &mut VecDeque<Output>) {
        if self.asks.remove(&node) {
            let nothing = || ChunkSet::empty(stock.len());
            let terms = Default::default();
            let message = PeerMessage::Ask { manifest, wanted: nothing(), have: nothing(), terms };
            out.push_back(Output::Send { to: node, message });
        }
    }

    fn withdraw_all(&mut self, manifest: ManifestHash, stock: &Stock, out: &mut VecDeque<Output>) {
        self.hunger.end();
        self.asks.nodes().into_iter().for_each(|n| self.withdraw(manifest, stock, n, out));
    }
}

/// Gives leases back to a holder that is not asked, and has nothing else to hear.
pub(crate) fn only_returned(to: NodeId, manifest: ManifestHash, returned: Vec<Returned>) -> Output {
    let (taken, again, terms) = (Vec::new(), Vec::new(), Terms::default());
    Output::Send { to, message: PeerMessage::Progress { manifest, returned, taken, again, terms } }
}

#[cfg(test)]
mod tests;
