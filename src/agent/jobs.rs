//! Work that takes long: hashing, copying, disks. On blocking threads, each ending in an event.

use super::keeping::Keep;
use super::library::Tree;
use super::outlet::{self, Outgoing};
use super::pieces::{CopyError, Memory, Source, Staged};
use super::regions::{Gpus, Region};
use super::{Agent, Ended, Event};
use anyhow::{Context, Result};
use aquifer_core::{ChunkHash, ChunkSet, Layout, ManifestHash, NodeId};
use aquifer_cuda::DeviceWorker;
use aquifer_engine::ConnId;
use aquifer_engine::protocol::RegionSpec;
use aquifer_memory::{DiskStore, Reservation, Span, StoreError};
use aquifer_proto::{EngineInput, OpId};
use std::io;
use std::os::fd::OwnedFd;
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
    /// Find out what an engine's region is.
    OpenRegion {
        conn: ConnId,
        request: u64,
        spec: RegionSpec,
        fd: Option<OwnedFd>,
        gpus: Gpus,
    },
    /// Hash what lies in an engine's regions.
    Scan {
        conn: ConnId,
        memory: Memory,
    },
    Copy {
        conn: ConnId,
        sources: Vec<(u32, Source)>,
        memory: Memory,
    },
    /// Put what will change on the GPU beside what it will change, and what will be overwritten into the store.
    Prepare {
        conn: ConnId,
        manifest: ManifestHash,
        sources: Vec<(u32, Source)>,
        memory: Memory,
        kept: Option<Keep>,
    },
    /// Copy chunks out of an engine's memory on a GPU, for others to read.
    BringOut {
        chunks: Vec<Outgoing>,
        worker: Arc<dyn DeviceWorker>,
    },
    Apply {
        conn: ConnId,
        sources: Vec<(u32, Source)>,
        staged: Option<Arc<Staged>>,
        memory: Memory,
    },
}

#[derive(Debug)]
pub(super) enum JobDone {
    Checked { manifest: ManifestHash, result: Result<ChunkSet> },
    Committed { op: OpId, result: Result<(), StoreError> },
    TreeFinished { manifest: ManifestHash, result: Result<(), StoreError> },
    Rechecked { manifest: ManifestHash, chunk: u32, reader: NodeId, result: io::Result<bool> },
    RegionOpened { conn: ConnId, request: u64, spec: RegionSpec, result: Result<Region> },
    Scanned { conn: ConnId, in_place: ChunkSet },
    Copied { conn: ConnId, results: Vec<(u32, Result<(), CopyError>)> },
    Prepared { conn: ConnId, manifest: ManifestHash, staged: Staged },
    BroughtOut { chunks: Vec<(Outgoing, bool)> },
    Applied { conn: ConnId, result: Result<(), CopyError> },
}

impl Agent {
    /// Starts a job after the outputs of this step are carried out: leases over what it will
    /// overwrite are closed by then.
    pub(super) fn job(&mut self, job: Job) {
        self.queued.push(job);
    }

    pub(super) fn start_jobs(&mut self) {
        for job in std::mem::take(&mut self.queued) {
            self.start_job(job);
        }
    }

    /// At once: for jobs that overwrite nothing that may be under a lease.
    pub(super) fn start_job(&mut self, job: Job) {
        self.running_jobs += 1;
        let events = self.jobs.clone();
        tokio::task::spawn_blocking(move || {
            // Freeing GPU memory takes as long as a small update, and an engine is paused: it is freed afterwards.
            let staged = job.staged();
            // The agent may have ended meanwhile; then nobody waits for the answer.
            let _ = events.send(Event::Job(job.run()));
            drop(staged);
        });
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
            JobDone::RegionOpened { conn, request, spec, result } => {
                self.on_region_opened(conn, request, &spec, result)
            }
            JobDone::Copied { conn, results } => {
                let mut missing = false;
                for (chunk, result) in results {
                    let ok = self.copied(conn, result);
                    missing |= !ok;
                    self.engine_input(conn, EngineInput::Copied { chunk, ok });
                }
                self.copy_next(conn, true);
                if missing {
                    self.feed_engine(conn);
                }
            }
            JobDone::Prepared { conn, manifest, staged } => self.on_prepared(conn, manifest, staged),
            JobDone::BroughtOut { chunks } => self.on_brought_out(chunks)?,
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
            (Err(CopyError::OnGpu { chunk, from }), Some(manifest)) => {
                if let Some(hash) = self.manifests.get(&manifest).map(|l| l.layout.chunk(chunk).hash) {
                    self.withdraw_from_gpu(&hash, &from);
                }
                false
            }
            (Err(CopyError::OnGpu { .. }), None) => false,
            (Err(CopyError::Source { reason, .. } | CopyError::Region(reason)), _) => {
                tracing::warn!("engine {}: {reason}", conn.0);
                false
            }
        }
    }
}

impl Job {
    /// What lies on GPUs for this job alone.
    fn staged(&self) -> Option<Arc<Staged>> {
        match self {
            Job::Apply { staged, .. } => staged.clone(),
            Job::Check { .. }
            | Job::Commit { .. }
            | Job::FinishTree { .. }
            | Job::Recheck { .. }
            | Job::OpenRegion { .. }
            | Job::Scan { .. }
            | Job::Copy { .. }
            | Job::Prepare { .. }
            | Job::BringOut { .. } => None,
        }
    }

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
            Job::OpenRegion { conn, request, spec, fd, gpus } => {
                let result = gpus.region(&spec, fd);
                JobDone::RegionOpened { conn, request, spec, result }
            }
            Job::Scan { conn, memory } => JobDone::Scanned { conn, in_place: memory.in_place() },
            Job::Copy { conn, sources, memory } => JobDone::Copied { conn, results: memory.copy_all(&sources, None) },
            Job::Prepare { conn, manifest, sources, memory, kept } => {
                if let Some(kept) = kept {
                    kept.run();
                }
                JobDone::Prepared { conn, manifest, staged: memory.stage(&sources) }
            }
            Job::BringOut { chunks, worker } => JobDone::BroughtOut { chunks: outlet::bring_out(chunks, &worker) },
            Job::Apply { conn, sources, staged, memory } => {
                let results = memory.copy_all(&sources, staged.as_deref());
                JobDone::Applied { conn, result: results.into_iter().try_for_each(|(_, result)| result) }
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
