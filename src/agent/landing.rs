//! From a granted chunk to a verified one: where it lands, and what becomes of it.

use super::jobs::Job;
use super::tally::Lane;
use super::transports::Way;
use super::{Agent, endpoints};
use aquifer_core::{ChunkHash, ManifestHash, NodeId};
use aquifer_engine::ConnId;
use aquifer_memory::{Reservation, Span, StoreError};
use aquifer_proto::limits::READ_STALL;
use aquifer_proto::{EngineInput, Input, OpId, ReadOutcome};
use aquifer_transport::{Completion, Endpoint, ReadDone, ReadError, ReadOp};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// A read under way, and where it lands. While it is committed, `landing` is taken.
#[derive(Debug)]
pub(super) struct Read {
    manifest: ManifestHash,
    chunk: u32,
    hash: ChunkHash,
    peer: NodeId,
    /// How it came, once it has.
    way: Option<Way>,
    landing: Option<Landing>,
}

/// How long chunks of a release have found no room, without one that did in between.
#[derive(Debug)]
pub(super) struct Full {
    since: Instant,
    last: Instant,
}

/// Guess: what is under way gives room back within seconds, if it is going to.
const ROOM_WAIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
enum Landing {
    Store(Reservation),
    /// An engine's memory, while it serves nothing.
    Region(ConnId, Span),
}

impl Agent {
    pub(super) fn start_read(&mut self, op: OpId, peer: NodeId, manifest: ManifestHash, lease: u64, chunk: u32) {
        let Some(hash_and_len) = self.chunk(&manifest, chunk) else {
            return self.read_done(op, ReadOutcome::Declined);
        };
        let (Some(access), endpoints) = (self.access.get(&peer).cloned(), self.endpoints(&peer)) else {
            return self.read_done(op, ReadOutcome::Failed);
        };
        if endpoints.is_empty() {
            self.tell_once(format!("endpoint {peer}"), || {
                tracing::warn!("{} tells no data endpoint that can be used", peer.short());
            });
            return self.read_done(op, ReadOutcome::Failed);
        }
        if self.reading.contains(&hash_and_len.0) {
            // Another release shares this chunk, and its read is under way: where it lands, this one
            // finds it.
            return self.read_done(op, ReadOutcome::Declined);
        }
        let landing = match self.landing(&manifest, chunk, hash_and_len) {
            Ok(landing) => landing,
            // Reads under way will give staging back: nothing a person need do.
            Err(StoreError::StagingFull { .. }) => return self.read_done(op, ReadOutcome::Declined),
            Err(StoreError::Full { .. }) if self.gets_room(&manifest) => {
                return self.read_done(op, ReadOutcome::Declined);
            }
            Err(error) => {
                self.note_problem(&manifest, error.to_string());
                return self.read_done(op, ReadOutcome::Declined);
            }
        };
        let (into, adopts) = match &landing {
            Landing::Store(reservation) => (reservation.span().clone(), reservation.adopts()),
            Landing::Region(_, span) => (span.clone(), false),
        };
        if let Landing::Region(conn, _) = &landing {
            self.engine_input(*conn, EngineInput::Landing { chunk });
        }
        tracing::trace!("reads {chunk} from {} under lease {lease}", peer.short());
        let (hash, _) = hash_and_len;
        self.reading.insert(hash);
        self.reads.insert(op, Read { manifest, chunk, hash, peer, way: None, landing: Some(landing) });
        let stall = READ_STALL;
        self.transports.read(ReadOp { id: op, peer, endpoints, access, lease, chunk, into, adopts, stall });
    }

    pub(super) fn cancel_read(&mut self, op: OpId) {
        // One that is being committed is past cancelling; its end is on its way.
        if self.reads.get(&op).is_some_and(|r| r.landing.is_some()) {
            self.transports.cancel(op);
        }
    }

    pub(super) fn on_read(&mut self, completion: Completion) {
        let Some((way, completion)) = self.transports.on_completion(completion) else { return };
        let op = completion.id;
        let Some(read) = self.reads.get_mut(&op) else { return };
        read.way = Some(way);
        let (manifest, chunk, hash, peer) = (read.manifest, read.chunk, read.hash, read.peer);
        let Some(landing) = read.landing.take() else { return };
        match &completion.result {
            Ok(done) => tracing::trace!("has read {chunk} from {} in {:?}", peer.short(), done.elapsed),
            Err(ReadError::Revoked | ReadError::Cancelled) => {}
            Err(ReadError::Landing(reason)) => tracing::warn!("chunk {chunk} cannot land here: {reason}"),
            Err(error) => tracing::debug!("reading chunk {chunk} from {}: {error}", peer.short()),
        }
        let outcome = outcome(&completion.result, hash, self.manifests.contains_key(&manifest));
        let adopted = completion.result.ok().and_then(|done| done.adopted);
        match (outcome, landing) {
            (ReadOutcome::Verified, Landing::Store(reservation)) => {
                if self.disk.is_some() || self.tree.is_some() {
                    self.job(Job::Commit { op, reservation });
                } else {
                    let kept = match adopted {
                        Some(bytes) => reservation.adopt(bytes),
                        None => reservation.commit(),
                    };
                    self.on_committed(op, kept.map(drop));
                }
            }
            (_, Landing::Region(conn, _)) if !self.sessions.contains_key(&conn) => {
                // The engine is gone, and its memory with it.
                self.end_read(op, ReadOutcome::Declined);
            }
            (outcome, Landing::Region(conn, _)) => {
                let verified = outcome == ReadOutcome::Verified;
                self.engine_input(conn, EngineInput::Landed { chunk, verified });
                if verified {
                    self.on_verified(op, manifest, chunk, peer);
                    // Another engine may have come to want it while it was on its way.
                    self.offer_to_engines(manifest, chunk);
                } else {
                    self.end_read(op, outcome);
                }
            }
            (outcome, Landing::Store(_)) => self.end_read(op, outcome),
        }
    }

    /// A verified chunk reached its store, or could not be written there.
    pub(super) fn on_committed(&mut self, op: OpId, result: Result<(), StoreError>) {
        let Some(read) = self.reads.get(&op) else { return };
        let (manifest, chunk, peer) = (read.manifest, read.chunk, read.peer);
        match result {
            Ok(()) => self.on_verified(op, manifest, chunk, peer),
            Err(error) => {
                self.note_problem(&manifest, error.to_string());
                self.end_read(op, ReadOutcome::Declined);
            }
        }
    }

    fn on_verified(&mut self, op: OpId, manifest: ManifestHash, chunk: u32, peer: NodeId) {
        let bytes = self.chunk(&manifest, chunk).map_or(0, |(_, len)| len);
        self.traffic.chunks_verified += 1;
        self.traffic.bytes_in += bytes;
        if let Some(way) = self.reads.get(&op).and_then(|read| read.way) {
            let (boundary, channel) = (self.node.boundary_to(&peer), self.channel_of(&manifest));
            let is_member = self.node.member(&peer).is_some();
            self.tally.receive(peer, is_member, Lane { way, boundary, channel }, bytes);
        }
        self.clear_problem(&manifest);
        self.end_read(op, ReadOutcome::Verified);
        self.note_held(manifest, chunk);
        self.offer_to_engines(manifest, chunk);
    }

    fn end_read(&mut self, op: OpId, outcome: ReadOutcome) {
        if let Some(read) = self.reads.remove(&op) {
            self.reading.remove(&read.hash);
        }
        match outcome {
            ReadOutcome::Corrupt => self.traffic.chunks_corrupt += 1,
            ReadOutcome::Failed => self.traffic.reads_failed += 1,
            ReadOutcome::Verified | ReadOutcome::Revoked | ReadOutcome::Declined => {}
        }
        self.read_done(op, outcome);
    }

    fn read_done(&mut self, op: OpId, outcome: ReadOutcome) {
        self.input(Input::ReadDone { op, outcome });
    }

    /// Straight into an engine's memory where that is the only place that wants the chunk, and
    /// wants it in one piece; else into this node's store.
    fn landing(
        &mut self,
        manifest: &ManifestHash,
        chunk: u32,
        (hash, len): (ChunkHash, u64),
    ) -> Result<Landing, StoreError> {
        if let Some(tree) = self.tree.as_ref().filter(|t| t.manifest == *manifest) {
            return tree.files.reserve(chunk).map(Landing::Store);
        }
        if let Some(disk) = self.disk.clone() {
            return match disk.reserve(hash, len) {
                Err(StoreError::Full { .. } | StoreError::DiskFull { .. }) => {
                    self.evict_superseded();
                    disk.reserve(hash, len).map(Landing::Store)
                }
                other => other.map(Landing::Store),
            };
        }
        if self.hold != super::Hold::All
            && let Some(landing) = self.region_landing(manifest, chunk)
        {
            return Ok(landing);
        }
        match self.memory.reserve(hash, len) {
            Err(StoreError::Full { .. }) => {
                // What is kept to go back to goes first.
                self.evict_superseded();
                self.memory.reserve(hash, len).or_else(|_| {
                    self.trim_memory(true);
                    self.memory.reserve(hash, len)
                })
            }
            other => other,
        }
        .map(Landing::Store)
    }

    /// Whether there will be room in memory when what is under way has ended: what lands now goes on to an engine, what
    /// is copied there is kept no longer, and so is what others read. If that helps nobody for [`ROOM_WAIT`], no.
    fn gets_room(&mut self, manifest: &ManifestHash) -> bool {
        let lands = self.reads.values().any(|read| matches!(read.landing, Some(Landing::Store(_))));
        let copies = self.sessions.values().any(|conn| conn.copying || !conn.to_copy.is_empty());
        let works = self.running_jobs > 0 || !self.queued.is_empty();
        let passing = self.disk.is_none() && (lands || copies || works || self.node.leased_bytes() > 0);
        let now = Instant::now();
        let Full { since, last } = self.full.entry(*manifest).or_insert(Full { since: now, last: now });
        if now.duration_since(*last) >= ROOM_WAIT {
            // Of another time.
            *since = now;
        }
        *last = now;
        passing && now.duration_since(*since) < ROOM_WAIT
    }

    fn region_landing(&self, manifest: &ManifestHash, chunk: u32) -> Option<Landing> {
        let mut gathering = self.sessions.iter().filter(|(_, c)| c.session.is_gathering(manifest, chunk));
        let (id, conn) = gathering.next()?;
        let alone = gathering.next().is_none() && conn.session.target()?.plan.has_one_spot(chunk);
        let (region, range) = conn.session.landing_place(manifest, chunk).filter(|_| alone)?;
        Some(Landing::Region(*id, conn.region_slice(region, range)?))
    }

    fn chunk(&self, manifest: &ManifestHash, chunk: u32) -> Option<(ChunkHash, u64)> {
        let chunk = self.manifests.get(manifest)?.layout.chunks.get(chunk as usize)?;
        Some((chunk.hash, chunk.len.into()))
    }

    /// Where the peer's data plane listens. A missing host is one the peer is known by: where its
    /// connection comes from, and, since that need not be where it listens, those it names itself.
    fn endpoints(&self, peer: &NodeId) -> Vec<Endpoint> {
        let Some(member) = self.node.member(peer) else { return Vec::new() };
        let named = member.status.addresses.iter().filter_map(|a| host_of(a));
        let mut hosts: Vec<IpAddr> = self.addresses.get(peer).copied().into_iter().chain(named).collect();
        let mut seen = BTreeSet::new();
        hosts.retain(|host| seen.insert(*host));
        let said = member.status.data_endpoints.iter().flat_map(|text| endpoints::of(text, &hosts));
        said.filter(|endpoint| self.transports.can_try(endpoint)).collect()
    }

    /// Something that a person must mend keeps a release from completing.
    fn note_problem(&mut self, manifest: &ManifestHash, problem: String) {
        let channels = self.channels_at(manifest);
        self.tell_once(problem.clone(), || tracing::warn!("{}: {problem}", manifest.short()));
        for channel in channels {
            let entry = self.channels.entry(channel.clone()).or_default();
            if entry.problem.is_none() {
                entry.problem = Some(problem.clone());
                self.fail_engines(&channel, *manifest, &problem);
            }
        }
    }

    /// A chunk of it has come, by whatever manifest's read.
    pub(super) fn found_room(&mut self, manifest: &ManifestHash) {
        self.full.remove(manifest);
    }

    pub(super) fn has_reads_of(&self, manifest: &ManifestHash) -> bool {
        self.reads.values().any(|r| r.manifest == *manifest)
    }

    fn clear_problem(&mut self, manifest: &ManifestHash) {
        self.found_room(manifest);
        for channel in self.channels_at(manifest) {
            if let Some(entry) = self.channels.get_mut(&channel) {
                entry.problem = None;
            }
        }
    }
}

/// What a read of the chunk of that name came to. Of a manifest that is not known any more nothing is
/// kept, and nobody is accused.
fn outcome(result: &Result<ReadDone, ReadError>, hash: ChunkHash, is_known: bool) -> ReadOutcome {
    match result {
        Ok(done) if done.digest == hash && is_known => ReadOutcome::Verified,
        Ok(done) if done.digest == hash => ReadOutcome::Declined,
        Ok(_) => ReadOutcome::Corrupt,
        Err(ReadError::Revoked) => ReadOutcome::Revoked,
        Err(ReadError::Cancelled | ReadError::Landing(_)) => ReadOutcome::Declined,
        Err(_) => ReadOutcome::Failed,
    }
}

/// The address in a multiaddress such as `/ip4/10.0.0.1/tcp/7401`.
fn host_of(multiaddress: &str) -> Option<IpAddr> {
    multiaddress.split('/').nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_core::Hash;
    use std::time::Duration;

    #[test]
    fn what_is_right_is_not_called_corrupt_when_nobody_wants_it_any_more() {
        let name = |n| ChunkHash(Hash([n; 32]));
        let read = Ok(ReadDone { digest: name(1), bytes: 9, elapsed: Duration::ZERO, adopted: None });
        assert_eq!(outcome(&read, name(1), true), ReadOutcome::Verified);
        assert_eq!(outcome(&read, name(1), false), ReadOutcome::Declined);
        assert_eq!(outcome(&read, name(2), false), ReadOutcome::Corrupt);
        assert_eq!(outcome(&Err(ReadError::Cancelled), name(1), true), ReadOutcome::Declined);
    }
}
