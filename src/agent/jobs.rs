//! Work that takes long: hashing, copying, disks. On blocking threads, each ending in an event.

use super::library::Tree;
use super::{Agent, Ended, Event};
use anyhow::{Context, Result};
use aquifer_core::{ChunkHash, ChunkSet, Layout, ManifestHash, NodeId, Run};
use aquifer_engine::ConnId;
use aquifer_memory::{DiskStore, Reservation, Span, StoreError};
use aquifer_proto::{EngineInput, OpId, Plan};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

#[derive(Debug)]
pub(super) enum Job {
    /// Hash what a disk store and a file tree hold of a manifest.
    Check {
        manifest: ManifestHash,
        layout: Arc<Layout>,
        disk: Option<DiskStore>,
        tree: Option<Tree>,
    },
    Commit {
        op: OpId,
        reservation: Reservation,
    },
    FinishTree {
        tree: Tree,
    },
    Recheck {
        manifest: ManifestHash,
        chunk: u32,
        hash: ChunkHash,
        span: Span,
        reader: NodeId,
    },
    /// Hash what lies in an engine's regions.
    Scan {
        conn: ConnId,
        plan: Arc<Plan>,
        layout: Arc<Layout>,
        regions: BTreeMap<u32, Span>,
    },
    Copy {
        conn: ConnId,
        chunk: u32,
        source: Source,
        plan: Arc<Plan>,
        regions: BTreeMap<u32, Span>,
    },
    Apply {
        conn: ConnId,
        sources: Vec<(u32, Source)>,
        plan: Arc<Plan>,
        regions: BTreeMap<u32, Span>,
    },
}

/// Bytes to copy into an engine's memory.
#[derive(Debug)]
pub(super) enum Source {
    /// The memory store's own: verified when they came, and nobody else's to write.
    Store(Span),
    /// What a disk gives back and what an engine has may have changed since it was verified: it
    /// is hashed on the way.
    Disk(DiskStore, ChunkHash),
    Region(Span, ChunkHash),
}

/// Why a copy failed, and whose fault it is.
#[derive(Debug)]
pub(super) enum CopyError {
    /// The source is not what it should be: it must be fetched again.
    Source {
        chunk: u32,
        reason: String,
    },
    Region(String),
}

#[derive(Debug)]
pub(super) enum JobDone {
    Checked { manifest: ManifestHash, result: Result<ChunkSet> },
    Committed { op: OpId, result: Result<(), StoreError> },
    TreeFinished { manifest: ManifestHash, result: Result<(), StoreError> },
    Rechecked { manifest: ManifestHash, chunk: u32, reader: NodeId, result: io::Result<bool> },
    Scanned { conn: ConnId, in_place: ChunkSet },
    Copied { conn: ConnId, chunk: u32, result: Result<(), CopyError> },
    Applied { conn: ConnId, result: Result<(), CopyError> },
}

impl Agent {
    /// Starts a job after the outputs of this step are carried out: leases over what it will
    /// overwrite are closed by then.
    pub(super) fn job(&mut self, job: Job) {
        self.queued.push(job);
    }

    pub(super) fn start_jobs(&mut self) {
        for job in self.queued.drain(..) {
            let events = self.jobs.clone();
            tokio::task::spawn_blocking(move || {
                // The agent may have ended meanwhile; then nobody waits for the answer.
                let _ = events.send(Event::Job(job.run()));
            });
        }
    }

    pub(super) fn on_job(&mut self, done: JobDone) -> Result<()> {
        match done {
            JobDone::Checked { manifest, result } => {
                self.tree_jobs -= usize::from(self.tree.as_ref().is_some_and(|t| t.manifest == manifest));
                let found = result.context("cannot read what is on disk")?;
                self.on_checked(manifest, Some(found));
            }
            JobDone::Committed { op, result } => self.on_committed(op, result),
            JobDone::TreeFinished { manifest, result } => {
                self.tree_jobs = self.tree_jobs.saturating_sub(1);
                result?;
                if self.tree.as_ref().is_some_and(|t| t.manifest == manifest) {
                    self.ended = Some(Ended::Pulled(manifest));
                }
            }
            JobDone::Rechecked { manifest, chunk, reader, result } => match result {
                Ok(true) => tracing::info!(
                    "{} says that chunk {chunk} of {} came wrong; it is right here",
                    reader.short(),
                    manifest.short()
                ),
                Ok(false) => self.withdraw(manifest, chunk, "its bytes are not what they were"),
                Err(error) => self.withdraw(manifest, chunk, &format!("it cannot be read: {error}")),
            },
            JobDone::Scanned { conn, in_place } => {
                self.traffic.chunks_found += u64::from(in_place.count());
                self.engine_input(conn, EngineInput::Scanned { in_place });
            }
            JobDone::Copied { conn, chunk, result } => {
                let ok = self.copied(conn, result);
                self.engine_input(conn, EngineInput::Copied { chunk, ok });
                if !ok {
                    self.feed_engine(conn);
                }
            }
            JobDone::Applied { conn, result } => {
                let ok = self.copied(conn, result);
                self.engine_input(conn, EngineInput::Applied { ok });
            }
        }
        Ok(())
    }

    fn copied(&mut self, conn: ConnId, result: Result<(), CopyError>) -> bool {
        let target = self.sessions.get(&conn).and_then(|c| c.session.target()).map(|t| t.manifest);
        match (result, target) {
            (Ok(()), _) => true,
            (Err(CopyError::Source { chunk, reason }), Some(manifest)) => {
                self.withdraw(manifest, chunk, &reason);
                false
            }
            (Err(CopyError::Source { reason, .. } | CopyError::Region(reason)), _) => {
                tracing::warn!("engine {}: {reason}", conn.0);
                false
            }
        }
    }
}

impl Job {
    fn run(self) -> JobDone {
        match self {
            Job::Check { manifest, layout, disk, tree } => {
                JobDone::Checked { manifest, result: check(&layout, disk.as_ref(), tree.as_ref()) }
            }
            Job::Commit { op, reservation } => JobDone::Committed { op, result: reservation.commit().map(drop) },
            Job::FinishTree { tree } => JobDone::TreeFinished { manifest: tree.manifest, result: tree.files.finish() },
            Job::Recheck { manifest, chunk, hash, span, reader } => {
                let result = span.hash().map(|found| found == hash);
                JobDone::Rechecked { manifest, chunk, reader, result }
            }
            Job::Scan { conn, plan, layout, regions } => {
                let right = |chunk: &u32| is_in_place(&plan, &regions, *chunk, layout.chunk(*chunk).hash);
                let in_place = ChunkSet::from_indices(layout.len(), plan.needs().iter().filter(right));
                JobDone::Scanned { conn, in_place }
            }
            Job::Copy { conn, chunk, source, plan, regions } => {
                JobDone::Copied { conn, chunk, result: copy(&plan, &regions, chunk, &source) }
            }
            Job::Apply { conn, sources, plan, regions } => {
                let result = sources.iter().try_for_each(|(chunk, source)| copy(&plan, &regions, *chunk, source));
                JobDone::Applied { conn, result }
            }
        }
    }
}

fn check(layout: &Layout, disk: Option<&DiskStore>, tree: Option<&Tree>) -> Result<ChunkSet> {
    let mut found = ChunkSet::empty(layout.len());
    if let Some(disk) = disk {
        for (index, chunk) in (0u32..).zip(&layout.chunks) {
            match disk.verify(&chunk.hash) {
                Ok(true) => drop(found.insert(index)),
                Ok(false) => {}
                Err(error) => {
                    // Fetched again, like one that was never there.
                    tracing::warn!("stored chunk {:?} cannot be read: {error}", chunk.hash);
                    disk.remove(&chunk.hash);
                }
            }
        }
    }
    if let Some(tree) = tree {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        found.union_with(&tree.files.scan(threads, &mut |_, _| {})?);
    }
    Ok(found)
}

/// Whether every spot of the chunk holds its bytes. A spot that holds only a part of them
/// cannot be checked and counts as wrong.
fn is_in_place(plan: &Plan, regions: &BTreeMap<u32, Span>, chunk: u32, hash: ChunkHash) -> bool {
    plan.spots(chunk).iter().all(|spot| {
        let gather = || -> Option<ChunkHash> {
            let mut hasher = blake3::Hasher::new();
            for (region, run) in plan.runs(spot) {
                regions.get(&region)?.hash_into(run.region_offset, run.bytes, &mut hasher).ok()?;
            }
            Some(ChunkHash(aquifer_core::Hash(*hasher.finalize().as_bytes())))
        };
        plan.covers(spot) && gather() == Some(hash)
    })
}

fn copy(plan: &Plan, regions: &BTreeMap<u32, Span>, chunk: u32, source: &Source) -> Result<(), CopyError> {
    let bad = |reason: String| CopyError::Source { chunk, reason };
    let checked = |span: &Span, hash: &ChunkHash| -> Result<Bytes, CopyError> {
        let mut bytes = vec![0; usize::try_from(span.len()).map_err(|e| bad(e.to_string()))?];
        span.read(0, &mut bytes).map_err(|e| bad(format!("it cannot be read: {e}")))?;
        match ChunkHash::of(&bytes) == *hash {
            true => Ok(Bytes::Private(bytes)),
            false => Err(bad("its bytes are not what they were".into())),
        }
    };
    let bytes = match source {
        Source::Store(span) => Bytes::Shared(span.clone()),
        Source::Region(span, hash) => checked(span, hash)?,
        Source::Disk(disk, hash) => {
            checked(&disk.get(hash).ok_or_else(|| bad("it is gone from the store".into()))?, hash)?
        }
    };
    for spot in plan.spots(chunk) {
        for (region, run) in plan.runs(spot) {
            let region = regions.get(&region).ok_or_else(|| CopyError::Region("a region is gone".into()))?;
            bytes.copy_to(&run, region).map_err(|e| CopyError::Region(e.to_string()))?;
        }
    }
    Ok(())
}

enum Bytes {
    Shared(Span),
    Private(Vec<u8>),
}

impl Bytes {
    fn copy_to(&self, run: &Run, region: &Span) -> io::Result<()> {
        match self {
            Bytes::Shared(span) => span.copy_to(run.tensor_offset, region, run.region_offset, run.bytes),
            Bytes::Private(bytes) => {
                let at = |offset: u64| usize::try_from(offset).map_err(io::Error::other);
                let piece = bytes.get(at(run.tensor_offset)?..at(run.tensor_offset + run.bytes)?);
                region.write(run.region_offset, piece.ok_or_else(|| io::Error::other("a run beyond its chunk"))?)
            }
        }
    }
}
