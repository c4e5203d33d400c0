//! A read's way over the modelled network: from a grant to bytes that are right, wrong, or never came.

use super::events::Event;
use super::run::World;
use crate::network::Done;
use aquifer_core::{ManifestHash, NodeId};
use aquifer_proto::limits::READ_STALL;
use aquifer_proto::{Input, OpId, ReadOutcome};

/// A read under way: asked for, moving or landing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Read {
    pub(super) reader: u32,
    pub(super) holder: u32,
    op: OpId,
    release: usize,
    lease: u64,
    chunk: u32,
    /// The life in which its holder granted it.
    ticket: u32,
    pub(super) moving: bool,
    /// Its bytes have been given up, by the network or by the holder.
    pub(super) doomed: bool,
}

impl World<'_> {
    pub(super) fn read(&mut self, reader: u32, op: OpId, peer: NodeId, what: (ManifestHash, u64, u32)) {
        let (manifest, lease, chunk) = what;
        let Some((&holder, release)) = self.index.get(&peer).zip(self.release_of(&manifest)) else { return };
        self.check_read(reader, holder, release, chunk);
        let tag = self.next_tag;
        self.next_tag += 1;
        let ticket = self.peers[reader as usize].tickets.get(&holder).copied().unwrap_or(u32::MAX);
        let read = Read { reader, holder, op, release, lease, chunk, ticket, moving: false, doomed: false };
        self.reads.insert(tag, read);
        self.by_op.insert((reader, op), tag);
        let holder = &mut self.peers[holder as usize];
        if holder.life == ticket {
            holder.leases.entry((lease, chunk)).and_modify(|read| *read = Some(tag));
        }
        self.events.plan(self.now + self.latency(), Event::Transfer { tag });
    }

    pub(super) fn transfer(&mut self, tag: u64) {
        let Some(read) = self.reads.get(&tag).copied().filter(|r| !r.doomed) else { return };
        let holder = &self.peers[read.holder as usize];
        if !holder.alive || holder.life != read.ticket || !self.reachable(read.holder, read.reader) {
            return self.doom(tag, self.latency(), false);
        }
        if !holder.leases.contains_key(&(read.lease, read.chunk)) {
            return self.doom(tag, self.latency(), true);
        }
        self.reads.entry(tag).and_modify(|r| r.moving = true);
        self.net.start(self.now, read.holder, read.reader, tag, self.e.chunk_bytes);
        if self.stalled[read.holder as usize].is_some() {
            self.events.plan(self.now + READ_STALL, Event::Stalled { tag });
        }
    }

    pub(super) fn cancel(&mut self, reader: u32, op: OpId) {
        if let Some(&tag) = self.by_op.get(&(reader, op)) {
            self.stop_transfer(tag);
            self.finish_read(tag, ReadOutcome::Declined);
        }
    }

    pub(super) fn stop_transfer(&mut self, tag: u64) {
        if let Some(r) = self.reads.get(&tag).filter(|r| r.moving) {
            self.net.cancel(self.now, r.holder, r.reader, tag);
        }
    }

    pub(super) fn on_transferred(&mut self, done: Done) {
        let Some(read) = self.reads.get(&done.tag).copied().filter(|r| !r.doomed) else { return };
        let right = self.right(read.release, read.chunk);
        let verified = self.bytes_of(&read) == Some(right);
        let reader = &mut self.peers[read.reader as usize];
        if verified && read.release == reader.release && !reader.has.insert(read.chunk) {
            self.duplicate_bytes += done.bytes;
            self.violated(format!("node {} fetched chunk {} again", read.reader, read.chunk));
        }
        self.finish_read(done.tag, if verified { ReadOutcome::Verified } else { ReadOutcome::Corrupt });
        let dies = self.e.seed_dies_after_bytes.is_some_and(|most| self.net.counters().up[0] >= most);
        if dies && self.peers[0].alive {
            self.crash(0);
        }
    }

    /// What a holder sends for a chunk.
    fn bytes_of(&self, read: &Read) -> Option<u64> {
        let holder = &self.peers[read.holder as usize];
        let held = holder.release == read.release && holder.has.contains(read.chunk);
        let right = held.then(|| self.right(read.release, read.chunk))?;
        let sent = holder.wrong.get(&read.chunk).copied().unwrap_or(right);
        Some(if holder.plan.fault.corrupt { !sent } else { sent })
    }

    /// The reads that are `so`, in the order in which they began.
    pub(super) fn reads_where(&self, so: impl Fn(&Read) -> bool) -> Vec<u64> {
        let mut tags: Vec<u64> = self.reads.iter().filter(|(_, r)| so(r)).map(|(tag, _)| *tag).collect();
        tags.sort_unstable();
        tags
    }

    pub(super) fn finish_read(&mut self, tag: u64, outcome: ReadOutcome) {
        let Some(read) = self.reads.remove(&tag) else { return };
        self.by_op.remove(&(read.reader, read.op));
        match outcome {
            ReadOutcome::Verified | ReadOutcome::Declined => {}
            ReadOutcome::Corrupt => self.mishap("corrupt reads"),
            ReadOutcome::Revoked => self.mishap("revoked reads"),
            ReadOutcome::Failed => self.mishap("failed reads"),
        }
        self.checks.on_read_end(read.reader, read.release, read.chunk);
        self.deliver(read.reader, self.now, Input::ReadDone { op: read.op, outcome });
    }
}
