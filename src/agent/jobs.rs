//! Work that takes long: hashing, copying, disks. On blocking threads, each ending in an event.

use super::library::Tree;
use super::pieces::{CopyError, Source, copy, is_in_place};
use super::{Agent, Ended, Event};
use anyhow::{Context, Result};
use aquifer_core::{ChunkHash, ChunkSet, Layout, ManifestHash, NodeId};
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
        regions: Arc<BTreeMap<u32, Span>>,
    },
    Copy {
        conn: ConnId,
        chunk: u32,
        source: Source,
        plan: Arc<Plan>,
        regions: Arc<BTreeMap<u32, Span>>,
    },
    Apply {
        conn: ConnId,
        sources: Vec<(u32, Source)>,
        plan: Arc<Plan>,
        regions: Arc<BTreeMap<u32, Span>>,
    },
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
                let right = |chunk: &u32| is_in_place(&plan, &regions, *chunk, layout.chunk(*chunk));
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
