//! The one thread that owns every connection of the reading side and drives the devices: it waits for
//! a command, a completion or a word of a holder, applies it without waiting for anything else, and
//! asks for more.

mod connecting;
mod waiting;

use super::link::{Link, Loss, verdict};
use super::peer::{Peer, Queued};
use super::{ASKED_TO, Command, Completions, Inbox, LinkId, SHUTTING_DOWN};
use crate::config::{Counters, RdmaConfig, count};
use crate::error::RdmaError;
use crate::limits::RETRIES_MAX;
use crate::rail::Rail;
use crate::topology::Nearness;
use crate::verbs::{Completion as Work, CompletionQueue, Region, RemoteRegion, WorkError};
use crate::wire::{FromHolder, FromReader, Outcome};
use crate::workers::Workers;
use aquifer_core::{ChunkHash, NodeId};
use aquifer_transport::{Completion, OpId, ReadDone, ReadError, ReadOp};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// What a driver drives, and who does for it what takes long.
#[derive(Debug)]
pub(super) struct World {
    pub(super) config: RdmaConfig,
    pub(super) rails: Arc<Vec<Arc<Rail>>>,
    /// One for each rail.
    pub(super) queues: Vec<Arc<CompletionQueue>>,
    pub(super) nearness: Nearness,
    pub(super) hashing: Workers,
    pub(super) registering: Arc<Workers>,
}

pub(super) struct Driver {
    world: World,
    inbox: Arc<Inbox>,
    completions: Arc<Completions>,
    counters: Arc<Counters>,
    peers: BTreeMap<NodeId, Peer>,
    links: BTreeMap<LinkId, Link>,
    /// Whose read each is that is not completed.
    ops: BTreeMap<OpId, NodeId>,
    /// READs under way: their connection, read and length.
    works: BTreeMap<u64, (LinkId, u32, u32)>,
    next_link: LinkId,
    next_work: u64,
    /// Attempts to connect that have not come back.
    joins: usize,
    /// Peers for which there may be something to do.
    dirty: BTreeSet<NodeId>,
    closing: bool,
    ticked: Instant,
    swept: Instant,
}

impl Driver {
    pub(super) fn new(world: World, inbox: Arc<Inbox>, completions: Arc<Completions>, counters: Arc<Counters>) -> Self {
        Driver {
            world,
            inbox,
            completions,
            counters,
            peers: BTreeMap::new(),
            links: BTreeMap::new(),
            ops: BTreeMap::new(),
            works: BTreeMap::new(),
            next_link: 0,
            next_work: 0,
            joins: 0,
            dirty: BTreeSet::new(),
            closing: false,
            ticked: Instant::now(),
            swept: Instant::now(),
        }
    }

    pub(super) fn run(&mut self) {
        loop {
            for command in self.inbox.take() {
                self.apply(command);
            }
            while let Some(peer) = self.dirty.pop_first() {
                self.pump(peer);
            }
            self.speak();
            if self.closing && self.links.is_empty() && self.joins == 0 {
                break;
            }
            if !self.dirty.is_empty() {
                continue;
            }
            let ready = self.wait();
            for rail in ready.rails {
                self.on_completions(rail);
            }
            for link in ready.links {
                self.on_readable(link);
            }
            self.tick();
        }
        for command in self.inbox.close() {
            self.apply(command);
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Read(op) => self.on_read(op),
            Command::Cancel(id) => self.on_cancel(id),
            Command::Disconnect(peer) => self.end_peer(peer, ASKED_TO),
            Command::Close => {
                self.closing = true;
                let peers: Vec<NodeId> = self.peers.keys().copied().collect();
                peers.into_iter().for_each(|peer| self.end_peer(peer, SHUTTING_DOWN));
            }
            Command::Joined { link, peer, access, result } => self.on_joined(link, peer, &access, *result),
            Command::Registered { link, number, result } => self.on_registered(link, number, result),
            Command::Hashed { link, number, result } => self.on_hashed(link, number, result),
        }
    }

    fn on_read(&mut self, op: ReadOp) {
        if self.closing {
            return self.complete(op.id, Err(ReadError::Disconnected(SHUTTING_DOWN.into())));
        }
        let peer = op.peer;
        self.ops.insert(op.id, peer);
        let entry = self.peers.entry(peer).or_default();
        entry.way = Some((op.access.clone(), op.endpoints.clone()));
        entry.node = self.world.nearness.node_of(&op.into);
        entry.queue.push_back(Queued { node: entry.node, op, retries: 0 });
        self.dirty.insert(peer);
    }

    fn on_cancel(&mut self, id: OpId) {
        let Some(peer) = self.ops.get(&id).copied() else { return };
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        if let Some(at) = entry.queue.iter().position(|q| q.op.id == id) {
            drop(entry.queue.remove(at));
            return self.complete(id, Err(ReadError::Cancelled));
        }
        let found = self.links.iter().filter(|(_, link)| link.peer == peer);
        let found = found.filter_map(|(link, l)| Some((*link, l.number_of(id)?))).next();
        if let Some((link, number)) = found {
            self.give_up(link, number, ReadError::Cancelled);
        }
    }

    /// Ends every read of a peer, and every connection to it.
    fn end_peer(&mut self, peer: NodeId, reason: &'static str) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        entry.joining.clear(); // whoever still connects finds no place
        let queue = std::mem::take(&mut entry.queue);
        let now = Instant::now();
        let links: Vec<LinkId> = self.links.iter().filter(|(_, l)| l.peer == peer).map(|(id, _)| *id).collect();
        for link in links {
            self.end_link(link, Loss::Told(reason), now);
        }
        for read in queue {
            self.fail(read, ReadError::Disconnected(reason.into()));
        }
        self.dirty.insert(peer);
    }

    fn on_registered(&mut self, link: LinkId, number: u32, result: Result<Arc<Region>, RdmaError>) {
        let Some(l) = self.links.get_mut(&link) else { return };
        l.progress = Instant::now();
        match result {
            Ok(region) => {
                let Some(flight) = l.flights.get_mut(&number).filter(|f| f.read.is_some()) else { return };
                flight.region = Some(region);
                l.on_ready(number);
                self.post(link);
            }
            Err(error) => self.give_up(link, number, ReadError::Landing(error.to_string())),
        }
    }

    /// Posts READs for as long as the queue pair takes any.
    fn post(&mut self, link: LinkId) {
        let Some(l) = self.links.get_mut(&link) else { return };
        while let Some(piece) = l.next_piece(self.world.config.piece_bytes) {
            self.next_work += 1;
            if let Err(error) = l.post(self.next_work, &piece) {
                return self.end_link(link, Loss::Broken(error.to_string()), Instant::now());
            }
            self.works.insert(self.next_work, (link, piece.number, piece.len));
        }
    }

    fn on_completions(&mut self, rail: usize) {
        let queue = self.world.queues[rail].clone();
        let mut works: Vec<Work> = Vec::new();
        let drained = queue.rearm().and_then(|()| {
            while queue.poll(&mut works)? {}
            Ok(())
        });
        for work in works {
            self.on_work(&work);
        }
        if let Err(error) = drained {
            tracing::error!("{error}; the connections over {} are closed", self.world.rails[rail]);
            self.end_rail(rail, &error.to_string());
        }
    }

    fn on_work(&mut self, work: &Work) {
        let Some((link, number, len)) = self.works.remove(&work.id) else { return };
        let Some(l) = self.links.get_mut(&link) else { return };
        let now = Instant::now();
        let since = l.landed;
        let Some(flight) = l.on_posted_ended(work.id, number) else { return };
        match &work.result {
            Ok(()) => {
                flight.landed += len;
                let (landed, given_up) = (flight.is_landed(), flight.fate.is_some() && flight.under_way == 0);
                flight.elapsed = now.duration_since(flight.asked.max(since));
                l.progress = now;
                count(&self.counters.received, u64::from(len));
                if given_up {
                    self.end_read(link, number);
                } else if landed {
                    l.landed = now;
                    self.on_landed(link, number);
                }
                self.post(link);
            }
            Err(WorkError::Flushed) => {}
            Err(error) => {
                if !flight.told {
                    // Its lease may have ended under the read: the holder knows.
                    flight.told = true;
                    l.say(FromReader::Done { number, outcome: Outcome::Failed });
                }
                let reason = format!("reading over {}: {error}", self.world.rails[l.rail]);
                let (peer, rail) = (l.peer, l.rail);
                if *error != WorkError::Access
                    && let Some(entry) = self.peers.get_mut(&peer)
                {
                    entry.pause(rail, now);
                }
                self.end_link(link, Loss::Broken(reason), now);
            }
        }
        self.end_if_over(link, now);
    }

    /// All of a chunk has come: the holder is told, and what lies here is hashed meanwhile.
    fn on_landed(&mut self, link: LinkId, number: u32) {
        let Some(l) = self.links.get_mut(&link) else { return };
        let Some(flight) = l.flights.get_mut(&number) else { return };
        flight.told = true;
        let Some(into) = flight.read.as_ref().map(|read| read.op.into.clone()) else { return };
        l.say(FromReader::Done { number, outcome: Outcome::Read });
        let inbox = self.inbox.clone();
        self.world.hashing.give(move || {
            let result = into.hash();
            drop(into);
            inbox.put(Command::Hashed { link, number, result });
        });
    }

    fn on_hashed(&mut self, link: LinkId, number: u32, result: io::Result<ChunkHash>) {
        let Some(flight) = self.links.get_mut(&link).and_then(|l| l.flights.get_mut(&number)) else { return };
        match result {
            Ok(hash) => {
                flight.hash = Some(hash);
                self.settle(link, number);
            }
            Err(error) => self.give_up(link, number, ReadError::Landing(error.to_string())),
        }
    }

    fn on_readable(&mut self, link: LinkId) {
        let Some(l) = self.links.get_mut(&link) else { return };
        let heard = l.listen();
        let now = Instant::now();
        loop {
            let Some(l) = self.links.get_mut(&link) else { return };
            match l.next_answer() {
                Ok(Some(answer)) => {
                    l.progress = now;
                    self.on_answer(link, answer);
                }
                Ok(None) => break,
                Err(reason) => return self.end_link(link, Loss::Broken(reason.into()), now),
            }
        }
        if let Err(error) = heard {
            self.end_link(link, Loss::Broken(error.to_string()), now);
        }
        self.end_if_over(link, now);
    }

    fn on_answer(&mut self, link: LinkId, answer: FromHolder) {
        match answer {
            FromHolder::Granted { number, remote } => self.on_granted(link, number, remote),
            FromHolder::Refused { number, refusal } => {
                self.on_refused(link, number, ReadError::Refused(refusal));
            }
            FromHolder::Unavailable { number } => {
                let reason = "the holder cannot show this chunk over RDMA at the moment".into();
                self.on_refused(link, number, ReadError::Unreachable(reason));
            }
            FromHolder::Verdict { number, valid } => {
                let Some(l) = self.links.get_mut(&link) else { return };
                match l.flights.get_mut(&number) {
                    Some(flight) if flight.told && flight.valid.is_none() => {
                        flight.valid = Some(valid);
                        self.settle(link, number);
                    }
                    _ => self.unasked(link),
                }
            }
        }
    }

    fn on_granted(&mut self, link: LinkId, number: u32, remote: RemoteRegion) {
        let Some(l) = self.links.get_mut(&link) else { return };
        match l.flights.get_mut(&number) {
            Some(flight) if flight.grant.is_none() => {
                let waited_for = flight.read.is_some();
                if !waited_for || l.ending.is_some() {
                    l.say(FromReader::Done { number, outcome: Outcome::LetBe });
                    // On a connection that ends, the read itself goes to another with the rest of them.
                    if !waited_for {
                        self.forget(link, number);
                    }
                    return;
                }
                if remote.len != flight.len() {
                    return self.unasked(link);
                }
                flight.grant = Some(remote);
                l.on_ready(number);
                self.post(link);
            }
            _ => self.unasked(link),
        }
    }

    fn on_refused(&mut self, link: LinkId, number: u32, error: ReadError) {
        let Some(l) = self.links.get_mut(&link) else { return };
        match l.flights.get_mut(&number) {
            Some(flight) if flight.grant.is_none() => {
                let id = flight.id();
                self.forget(link, number);
                if let Some(id) = id {
                    self.complete(id, Err(error));
                }
            }
            _ => self.unasked(link),
        }
    }

    fn unasked(&mut self, link: LinkId) {
        let reason = "it answered what was not asked".into();
        self.end_link(link, Loss::Broken(reason), Instant::now());
    }

    /// Completes a read that landed, once its hash and the holder's word are there.
    fn settle(&mut self, link: LinkId, number: u32) {
        let Some(l) = self.links.get_mut(&link) else { return };
        let Some(flight) = l.flights.get(&number) else { return };
        if flight.read.is_none() {
            return self.forget(link, number); // nobody waits for it: its word has come
        }
        let (Some(result), Some(id)) = (flight.outcome(), flight.id()) else { return };
        self.forget(link, number);
        self.complete(id, result);
    }

    /// Ends a read for a reason of this node, now or when nothing of it is under way any more.
    fn give_up(&mut self, link: LinkId, number: u32, error: ReadError) {
        let Some(flight) = self.links.get_mut(&link).and_then(|l| l.flights.get_mut(&number)) else { return };
        flight.fate.get_or_insert(error);
        if flight.under_way == 0 {
            self.end_read(link, number);
        }
    }

    /// Ends a read that was given up and of which nothing is under way. The holder's answer to it may be:
    /// then the flight stays, without its read.
    fn end_read(&mut self, link: LinkId, number: u32) {
        let Some(l) = self.links.get_mut(&link) else { return };
        let Some(flight) = l.flights.get_mut(&number) else { return };
        let Some(error) = flight.fate.clone() else { return };
        let Some(read) = flight.read.take() else { return };
        flight.region = None;
        flight.stale = Some(Instant::now());
        let (granted, told, valid) = (flight.grant.is_some(), flight.told, flight.valid);
        if granted && !told {
            l.say(FromReader::Done { number, outcome: Outcome::LetBe });
            self.forget(link, number);
        } else if valid.is_some() {
            self.forget(link, number);
        }
        self.fail(read, error);
    }

    fn forget(&mut self, link: LinkId, number: u32) {
        if let Some(l) = self.links.get_mut(&link) {
            l.flights.remove(&number);
            self.dirty.insert(l.peer);
        }
    }

    fn end_rail(&mut self, rail: usize, reason: &str) {
        let now = Instant::now();
        let links: Vec<LinkId> = self.links.iter().filter(|(_, l)| l.rail == rail).map(|(id, _)| *id).collect();
        for link in links {
            self.end_link(link, Loss::Broken(reason.into()), now);
        }
    }

    fn end_link(&mut self, link: LinkId, why: Loss, now: Instant) {
        let Some(l) = self.links.get_mut(&link) else { return };
        tracing::debug!("the RDMA connection to {} over {} ends: {why:?}", l.peer.short(), self.world.rails[l.rail]);
        l.end(why, now);
        if let Some(entry) = self.peers.get_mut(&l.peer)
            && entry.links.remove(&link).is_some()
        {
            entry.ending += 1;
        }
        self.dirty.insert(l.peer);
        self.end_if_over(link, now);
    }

    /// Ends an ending connection when nothing of it is under way any more: its queue pair is destroyed,
    /// and then its reads end or go back to the queue.
    fn end_if_over(&mut self, link: LinkId, now: Instant) {
        if !self.links.get(&link).is_some_and(|l| l.is_over(now)) {
            return;
        }
        let Some(mut l) = self.links.remove(&link) else { return };
        let flights = std::mem::take(&mut l.flights);
        let (peer, why) = (l.peer, l.ending.take().map_or(Loss::Unneeded, |ending| ending.why));
        drop(l); // from here on no device writes to any of its landing places
        self.works.retain(|_, (of, _, _)| *of != link);
        let mut again = Vec::new();
        let mut ended = Vec::new();
        for (number, mut flight) in flights {
            let Some(read) = flight.read.take() else { continue };
            let revoked = (flight.valid == Some(false)).then_some(ReadError::Revoked);
            match revoked.or_else(|| verdict(number, &flight, &read, &why, now)) {
                Some(error) => ended.push((read, error)),
                None => {
                    let renewed = matches!(why, Loss::Renewed | Loss::Unneeded);
                    let retries = read.retries.saturating_add(u8::from(!renewed)).min(RETRIES_MAX);
                    again.push(Queued { retries, ..read });
                }
            }
        }
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.ending -= 1;
            again.into_iter().rev().for_each(|read| entry.queue.push_front(read));
        }
        self.dirty.insert(peer);
        for (read, error) in ended {
            self.fail(read, error);
        }
    }

    /// Drops the landing place, then completes.
    fn fail(&mut self, read: Queued, error: ReadError) {
        let id = read.op.id;
        drop(read);
        self.complete(id, Err(error));
    }

    fn complete(&mut self, id: OpId, result: Result<ReadDone, ReadError>) {
        self.ops.remove(&id);
        (self.completions)(Completion { id, result });
    }
}
