//! Who is asked for what waits, and over which connections: one for each port, while there is enough to
//! read.

use super::super::join::{Attempt, Joined};
use super::super::link::Link;
use super::super::{Command, LinkId};
use super::Driver;
use crate::config::count;
use crate::limits::THREAD_STACK_BYTES;
use aquifer_core::{Access, NodeId};
use aquifer_transport::ReadError;
use std::thread;
use std::time::Instant;

impl Driver {
    /// Asks for what is queued, over the connections there are, and opens others where that is of use.
    pub(super) fn pump(&mut self, peer: NodeId) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        let now = Instant::now();
        let mut under_way = 0;
        loop {
            let links = entry.links.keys().filter_map(|id| Some((*id, self.links.get(id)?.flights.len())));
            let counts: Vec<(LinkId, usize)> = links.collect();
            under_way = counts.iter().map(|(_, count)| count).sum::<usize>().max(under_way);
            let Some(node) = entry.queue.front().map(|read| read.node) else { break };
            let roomy = counts.iter().filter_map(|(id, count)| {
                let link = self.links.get(id).filter(|link| link.has_room())?;
                Some((self.world.nearness.distance(node, link.rail), *count, *id))
            });
            let Some((_, _, id)) = roomy.min() else { break };
            let (Some(link), Some(read)) = (self.links.get_mut(&id), entry.queue.pop_front()) else { break };
            let (rail, into) = (self.world.rails[link.rail].clone(), read.op.into.clone());
            let number = link.ask(read, now);
            let access = rail.landing_access();
            if let Some(region) = rail.regions.registered(&into, access) {
                if let Some(flight) = link.flights.get_mut(&number) {
                    flight.region = Some(region);
                }
                continue;
            }
            let inbox = self.inbox.clone();
            self.world.registering.give(move || {
                let result = rail.regions.of(&into, access);
                drop(into);
                // A driver that has ended has no use for it.
                inbox.put(Command::Registered { link: id, number, result });
            });
        }
        if self.closing {
            return;
        }
        let (node, nearness) = (entry.node, &self.world.nearness);
        let distance = |rail| nearness.distance(node, rail);
        let under_way = under_way + entry.queue.len();
        if let Some(rail) = entry.next_rail(self.world.rails.len(), under_way, now, distance) {
            self.connect(peer, rail);
        } else if entry.is_idle() {
            self.peers.remove(&peer);
        }
    }

    pub(super) fn connect(&mut self, peer: NodeId, rail: usize) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        let Some((access, endpoints)) = entry.target() else { return };
        self.next_link += 1;
        let link = self.next_link;
        entry.joining.insert(link, rail);
        let attempt = Attempt {
            link,
            peer,
            access: access.clone(),
            endpoints,
            config: self.world.config.clone(),
            rail: self.world.rails[rail].clone(),
            completions: self.world.queues[rail].clone(),
            inbox: self.inbox.clone(),
        };
        let name = format!("aquifer-join-{link}");
        let started = thread::Builder::new().name(name).stack_size(THREAD_STACK_BYTES).spawn(|| attempt.run());
        match started {
            Ok(_) => self.joins += 1,
            Err(error) => {
                let reason = format!("a thread of the transport could not start: {error}");
                entry.joining.remove(&link);
                self.on_unreachable(peer, rail, &access, &ReadError::Landing(reason));
            }
        }
        self.dirty.insert(peer); // for another port, perhaps
    }

    pub(super) fn on_joined(&mut self, link: LinkId, peer: NodeId, access: &Access, result: Result<Joined, ReadError>) {
        self.joins -= 1;
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        let Some(rail) = entry.joining.remove(&link) else {
            self.dirty.insert(peer);
            return; // nobody wants it any more
        };
        self.dirty.insert(peer);
        match result {
            Ok(joined) => {
                count(&self.counters.connected, 1);
                entry.reached = Some(joined.endpoint);
                entry.links.insert(link, rail);
                self.links.insert(link, Link::new(peer, rail, joined, Instant::now()));
            }
            Err(error) => self.on_unreachable(peer, rail, access, &error),
        }
    }

    /// A connection could not be made: its reads fail, unless another is there for them.
    pub(super) fn on_unreachable(&mut self, peer: NodeId, rail: usize, access: &Access, error: &ReadError) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        entry.pause(rail, Instant::now());
        let queue = std::mem::take(&mut entry.queue);
        let refused = matches!(error, ReadError::Refused(_));
        let others = entry.has_connection();
        let (failed, kept) = queue.into_iter().partition::<Vec<_>, _>(|q| match refused {
            // That ticket was refused: reads with another may do.
            true => q.op.access == *access,
            false => !others,
        });
        entry.queue = kept.into();
        for read in failed {
            self.fail(read, error.clone());
        }
    }
}
