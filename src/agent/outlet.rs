//! Serving from GPU memory. What lies only there and is granted is copied to host memory of this node's, hashed
//! there, since the engine may have written over it, and only then is its reader told.
//!
//! How much is promised at a time, and in a second, is the brain's to decide (`proto::CostlyLimit`). A chunk is
//! kept in host memory while it is under lease, and then until the room is needed.

use super::Agent;
use super::jobs::Job;
use anyhow::Result;
use aquifer_core::{ChunkHash, ManifestHash, NodeId};
use aquifer_cuda::{DeviceSpan, DeviceWorker};
use aquifer_engine::ConnId;
use aquifer_memory::{MemoryStore, Reservation, Span, StoreError};
use aquifer_proto::{EngineSession, Target};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Host memory for chunks of GPUs, besides the store's. Guess: four of its slabs.
pub(super) const ROOM_BYTES: u64 = 256 << 20;
/// What is promised of that at once: the rest is for what a slab loses where its chunks are of different lengths,
/// and for those that are read again.
pub(super) const PROMISED_BYTES_MAX: u64 = ROOM_BYTES / 2;
/// Chunks that are kept account of: as many as there is room for, at a page each. Those that were removed meanwhile
/// are struck off beyond that.
const KEPT_MAX: usize = 1 << 16;
/// Copied and hashed by one job: half a millisecond of PCIe, so that an engine that is to change its memory is read
/// no longer than that.
const BATCH_BYTES: u64 = 16 << 20;
/// Jobs at once: one core hashes 2 to 6 GB/s.
const JOBS_MAX: usize = 4;

/// A chunk on its way out.
#[derive(Debug)]
pub(super) struct Outgoing {
    hash: ChunkHash,
    from: DeviceSpan,
    to: Reservation,
    /// `to` is in this node's own store.
    home: bool,
}

/// Copies them and says which are right.
pub(super) fn bring_out(chunks: Vec<Outgoing>, worker: &Arc<dyn DeviceWorker>) -> Vec<(Outgoing, bool)> {
    let pairs: Vec<_> = chunks.iter().map(|chunk| (chunk.from.clone(), chunk.to.span().clone())).collect();
    let copied = worker.bring_out(&pairs);
    if let Err(error) = &copied {
        tracing::warn!("{} chunks cannot be copied out of {}: {error}", chunks.len(), worker.uuid());
    }
    let is_right = |chunk: &Outgoing| copied.is_ok() && chunk.to.span().hash().is_ok_and(|found| found == chunk.hash);
    chunks.into_iter().map(|chunk| (is_right(&chunk), chunk)).map(|(right, chunk)| (chunk, right)).collect()
}

/// Where a chunk lies whole and verified in the memory of an engine that answers from there, unless it was asked to
/// pause for a release that changes it.
fn steady_place(session: &EngineSession, manifest: &ManifestHash, chunk: u32) -> Option<(u32, Range<u64>)> {
    session.verified()?;
    let is_kept = |target: &Target| target.manifest == *manifest && !session.is_gathering(manifest, chunk);
    if session.phase() == "pausing" && !session.target().is_some_and(is_kept) {
        return None;
    }
    session.place(manifest, chunk)
}

/// Who is told once a chunk is there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Promise {
    to: NodeId,
    manifest: ManifestHash,
    lease: u64,
    chunk: u32,
    /// When the lease runs out.
    until: Instant,
}

#[derive(Debug, Default)]
struct Waiting {
    promises: Vec<Promise>,
    /// An engine here needs it elsewhere in its memory: it goes to the node's own store.
    home: bool,
    under_way: bool,
}

/// The books: what was promised, what is there, and under lease.
#[derive(Debug)]
pub(super) struct Outlet {
    store: MemoryStore,
    waiting: BTreeMap<ChunkHash, Waiting>,
    /// Those of them that are not under way, the first promised first.
    queue: VecDeque<ChunkHash>,
    promised: BTreeMap<(u64, u32), ChunkHash>,
    jobs: usize,
    /// Leases over chunks in the store.
    leases: BTreeMap<(u64, u32), ChunkHash>,
    /// Chunks in the store, and how many leases are over each.
    kept: BTreeMap<ChunkHash, usize>,
    /// Those with none, the longest idle first.
    idle: VecDeque<ChunkHash>,
    /// Since outputs were drained last.
    brain_was_told: bool,
}

impl Outlet {
    pub(super) fn new(room_bytes: u64) -> Self {
        Outlet {
            store: MemoryStore::new(room_bytes),
            waiting: BTreeMap::new(),
            queue: VecDeque::new(),
            promised: BTreeMap::new(),
            jobs: 0,
            leases: BTreeMap::new(),
            kept: BTreeMap::new(),
            idle: VecDeque::new(),
            brain_was_told: false,
        }
    }

    pub(super) fn get(&self, hash: &ChunkHash) -> Option<Span> {
        self.store.get(hash)
    }

    /// Nobody is to read it any more.
    pub(super) fn remove(&self, hash: &ChunkHash) {
        self.store.remove(hash);
    }

    fn promise(&mut self, hash: ChunkHash, promise: Promise) {
        self.promised.insert((promise.lease, promise.chunk), hash);
        self.wait_for(hash).promises.push(promise);
    }

    fn wait_for(&mut self, hash: ChunkHash) -> &mut Waiting {
        let queue = &mut self.queue;
        self.waiting.entry(hash).or_insert_with(|| {
            queue.push_back(hash);
            Waiting::default()
        })
    }

    /// A lease is over this chunk: if it is in the store it stays there.
    pub(super) fn lease(&mut self, lease: u64, chunk: u32, hash: ChunkHash) {
        if let Some(leases) = self.kept.get_mut(&hash)
            && self.leases.insert((lease, chunk), hash).is_none()
        {
            *leases += 1;
            self.idle.retain(|idle| *idle != hash);
        }
    }

    /// The lease is over.
    pub(super) fn close(&mut self, lease: u64, chunk: u32) {
        if let Some(hash) = self.promised.remove(&(lease, chunk))
            && let Some(waiting) = self.waiting.get_mut(&hash)
        {
            waiting.promises.retain(|p| (p.lease, p.chunk) != (lease, chunk));
            if waiting.promises.is_empty() && !waiting.home && !waiting.under_way {
                self.waiting.remove(&hash);
                self.queue.retain(|queued| *queued != hash);
            }
        }
        if let Some(hash) = self.leases.remove(&(lease, chunk))
            && let Some(leases) = self.kept.get_mut(&hash)
        {
            *leases -= 1;
            if *leases == 0 {
                self.idle.push_back(hash);
            }
        }
    }

    /// Room for a chunk, at the cost of those that nobody has under lease.
    fn room_for(&mut self, hash: ChunkHash, len: u64) -> Option<Reservation> {
        loop {
            match self.store.reserve(hash, len) {
                Ok(reservation) => return Some(reservation),
                Err(StoreError::Full { .. }) => {
                    let first = self.idle.pop_front()?;
                    self.kept.remove(&first);
                    self.store.remove(&first);
                }
                Err(error) => {
                    tracing::warn!("there is no room for chunks of GPUs: {error}");
                    return None;
                }
            }
        }
    }

    /// The first in the queue is under way.
    fn begin(&mut self) {
        if let Some(waiting) = self.queue.pop_front().and_then(|hash| self.waiting.get_mut(&hash)) {
            waiting.under_way = true;
        }
    }

    /// It is in the store, for as long as nobody needs the room.
    fn keep(&mut self, hash: ChunkHash) {
        if self.kept.len() >= KEPT_MAX {
            let (store, kept) = (&self.store, &mut self.kept);
            self.idle.retain(|hash| store.contains(hash) || kept.remove(hash).is_none());
        }
        let idle = &mut self.idle;
        self.kept.entry(hash).or_insert_with(|| {
            idle.push_back(hash);
            0
        });
    }

    /// Nobody waits for it any more. Who did.
    fn end(&mut self, hash: &ChunkHash) -> Option<Waiting> {
        let waiting = self.waiting.remove(hash)?;
        self.queue.retain(|queued| queued != hash);
        for promise in &waiting.promises {
            self.promised.remove(&(promise.lease, promise.chunk));
        }
        Some(waiting)
    }

    /// It is to be tried again, if somebody still waits for it.
    fn again(&mut self, hash: ChunkHash) {
        let Some(waiting) = self.waiting.get_mut(&hash) else { return };
        waiting.under_way = false;
        match waiting.promises.is_empty() && !waiting.home {
            true => drop(self.waiting.remove(&hash)),
            false => self.queue.push_back(hash),
        }
    }
}

impl Agent {
    /// Where a chunk lies whole, verified and for some time to come in an engine's memory on a GPU.
    pub(super) fn on_gpu(&self, conn: ConnId, hash: &ChunkHash) -> Option<(DeviceSpan, Arc<dyn DeviceWorker>)> {
        let entry = self.sessions.get(&conn)?;
        if self.spoiled.contains(&(conn, *hash)) {
            return None;
        }
        self.manifests.iter().find_map(|(manifest, loaded)| {
            let (region, range) = steady_place(&entry.session, manifest, loaded.layout.index_of(hash)?)?;
            entry.gpu_slice(region, range).map(|(span, worker)| (span, worker.clone()))
        })
    }

    /// The same in another engine's.
    pub(super) fn on_another_gpu(&self, conn: ConnId, hash: &ChunkHash) -> Option<(DeviceSpan, Arc<dyn DeviceWorker>)> {
        self.sessions.keys().filter(|id| **id != conn).find_map(|id| self.on_gpu(*id, hash))
    }

    pub(super) fn on_any_gpu(&self, hash: &ChunkHash) -> Option<(DeviceSpan, Arc<dyn DeviceWorker>)> {
        self.sessions.keys().find_map(|id| self.on_gpu(*id, hash))
    }

    /// Has a granted chunk brought out, if it lies on a GPU.
    pub(super) fn promise(
        &mut self,
        to: NodeId,
        manifest: ManifestHash,
        lease: u64,
        ttl: Duration,
        chunk: u32,
    ) -> bool {
        let hash = self.manifests.get(&manifest).and_then(|l| Some(l.layout.chunks.get(chunk as usize)?.hash));
        let Some(hash) = hash.filter(|hash| self.on_any_gpu(hash).is_some()) else { return false };
        self.outlet.promise(hash, Promise { to, manifest, lease, chunk, until: Instant::now() + ttl });
        true
    }

    /// Has a chunk that an engine needs elsewhere in its memory put into this node's store, if its memory is the
    /// only place where it lies: nothing may be copied from where something else is written.
    pub(super) fn bring_home(&mut self, conn: ConnId, manifest: &ManifestHash, chunk: u32) {
        let Some(hash) = self.manifests.get(manifest).map(|l| l.layout.chunk(chunk).hash) else { return };
        if self.on_gpu(conn, &hash).is_some() {
            self.outlet.wait_for(hash).home = true;
        }
    }

    /// Starts to bring out what waits. True if the brain was told something.
    pub(super) fn bring_out(&mut self) -> Result<bool> {
        let mut gone = BTreeSet::new();
        while self.outlet.jobs < JOBS_MAX && !self.outlet.queue.is_empty() {
            let Some((worker, chunks)) = self.next_batch(&mut gone) else { break };
            self.outlet.jobs += 1;
            self.start_job(Job::BringOut { chunks, worker });
        }
        self.give_up(&gone)?;
        Ok(std::mem::take(&mut self.outlet.brain_was_told) || !gone.is_empty())
    }

    /// Chunks of one device; those that are `gone` meanwhile are not for anybody.
    fn next_batch(&mut self, gone: &mut BTreeSet<ChunkHash>) -> Option<(Arc<dyn DeviceWorker>, Vec<Outgoing>)> {
        let (mut batch, mut bytes) = (None, 0);
        while let Some(hash) = self.outlet.queue.front().copied().filter(|_| bytes < BATCH_BYTES) {
            let Some((from, worker)) = self.on_any_gpu(&hash) else {
                self.outlet.queue.pop_front();
                gone.insert(hash);
                continue;
            };
            if batch.as_ref().is_some_and(|(of, _): &(Arc<dyn DeviceWorker>, _)| of.uuid() != worker.uuid()) {
                break;
            }
            let home = self.outlet.waiting.get(&hash).is_some_and(|waiting| waiting.home);
            let room = match home {
                true => self.room_in_store(hash, from.len()),
                false => self.outlet.room_for(hash, from.len()),
            };
            match room {
                Some(to) => {
                    self.outlet.begin();
                    bytes += from.len();
                    batch.get_or_insert((worker, Vec::new())).1.push(Outgoing { hash, from, to, home });
                }
                // It is fetched, which is where it is told what is in the way.
                None if home => {
                    self.outlet.queue.pop_front();
                    self.spoil(&hash, &from);
                    gone.insert(hash);
                }
                // Leases that end make room.
                None => break,
            }
        }
        batch
    }

    fn room_in_store(&mut self, hash: ChunkHash, len: u64) -> Option<Reservation> {
        if let Ok(room) = self.memory.reserve(hash, len) {
            return Some(room);
        }
        self.outlet.brain_was_told = true;
        self.evict_superseded();
        self.trim_memory(true);
        self.memory.reserve(hash, len).ok()
    }

    pub(super) fn on_brought_out(&mut self, chunks: Vec<(Outgoing, bool)>) -> Result<()> {
        self.outlet.jobs -= 1;
        let (mut there, mut gone) = (Vec::new(), BTreeSet::new());
        let mut spoiled: BTreeMap<String, usize> = BTreeMap::new();
        for (Outgoing { hash, from, to, home }, is_right) in chunks {
            if is_right {
                self.traffic.bytes_out_of_gpus += from.len();
                there.extend(self.came(hash, to, home));
                continue;
            }
            drop(to);
            if let Some(name) = self.spoil(&hash, &from) {
                *spoiled.entry(name).or_default() += 1;
            }
            match self.on_any_gpu(&hash) {
                Some(_) => self.outlet.again(hash),
                None => drop(gone.insert(hash)),
            }
        }
        for (name, count) in spoiled {
            tracing::warn!(
                "{count} chunks in the GPU memory of engine {name} are not what they were: not used any more"
            );
        }
        self.hand_out(there)?;
        self.give_up(&gone)
    }

    /// A chunk is there. Who was promised it.
    fn came(&mut self, hash: ChunkHash, to: Reservation, home: bool) -> Vec<Promise> {
        let waiting = self.outlet.end(&hash).unwrap_or_default();
        if let Err(error) = to.commit() {
            tracing::warn!("a chunk of a GPU is not kept: {error}");
        }
        if !home {
            self.outlet.keep(hash);
            if waiting.home {
                // That was asked for while it was on its way to others.
                self.outlet.wait_for(hash).home = true;
            }
            return waiting.promises;
        }
        let known = self.manifests.iter().find_map(|(m, l)| Some((*m, l.layout.index_of(&hash)?)));
        if let Some((manifest, chunk)) = known {
            self.note_held(manifest, chunk);
            self.offer_to_engines(manifest, chunk);
        }
        waiting.promises
    }

    /// Tells those who were promised chunks that they may read them now.
    fn hand_out(&mut self, promises: Vec<Promise>) -> Result<()> {
        let mut grants: BTreeMap<(NodeId, ManifestHash, u64), (Instant, Vec<u32>)> = BTreeMap::new();
        for Promise { to, manifest, lease, chunk, until } in promises {
            if let Some(span) = self.span_of(&manifest, chunk) {
                self.lease_out(to, manifest, lease, chunk, span);
                grants.entry((to, manifest, lease)).or_insert((until, Vec::new())).1.push(chunk);
            }
        }
        for ((to, manifest, lease), (until, chunks)) in grants {
            self.tell_grant(to, manifest, lease, until.saturating_duration_since(Instant::now()), chunks)?;
        }
        Ok(())
    }

    /// These lie on no GPU any more. Who was promised them has them from elsewhere if they came there meanwhile;
    /// the brain takes the leases back of the others.
    fn give_up(&mut self, gone: &BTreeSet<ChunkHash>) -> Result<()> {
        let waiting: Vec<Waiting> = gone.iter().filter_map(|hash| self.outlet.end(hash)).collect();
        self.hand_out(waiting.into_iter().flat_map(|waiting| waiting.promises).collect())?;
        self.refresh_having(gone);
        Ok(())
    }

    /// A chunk is not what it was in an engine's memory on a GPU, unless the engine has gone on to another release
    /// meanwhile.
    pub(super) fn withdraw_from_gpu(&mut self, hash: &ChunkHash, from: &DeviceSpan) {
        if let Some(name) = self.spoil(hash, from) {
            tracing::warn!("chunk {hash:?} in the GPU memory of engine {name} is not what it was; it is used no more");
        }
        self.refresh_having(&BTreeSet::from([*hash]));
    }

    /// Whose memory it was.
    fn spoil(&mut self, hash: &ChunkHash, from: &DeviceSpan) -> Option<String> {
        let conns: Vec<ConnId> = self.sessions.keys().copied().collect();
        let there = |conn: &ConnId| self.on_gpu(*conn, hash).is_some_and(|(span, _)| span.is_same(from));
        let spoiled: Vec<ConnId> = conns.into_iter().filter(there).collect();
        self.spoiled.extend(spoiled.iter().map(|conn| (*conn, *hash)));
        spoiled.first().and_then(|conn| self.sessions.get(conn)).map(|entry| entry.name.clone())
    }

    /// Tells the brain what is here of every manifest that has one of these.
    fn refresh_having(&mut self, hashes: &BTreeSet<ChunkHash>) {
        let having = |hash: &ChunkHash| {
            self.manifests
                .iter()
                .filter(|(_, l)| l.layout.index_of(hash).is_some())
                .map(|(m, _)| *m)
                .collect::<Vec<_>>()
        };
        let manifests: BTreeSet<ManifestHash> = hashes.iter().flat_map(having).collect();
        manifests.into_iter().for_each(|manifest| self.refresh_held(manifest));
    }
}

#[cfg(test)]
mod tests;
