//! Bringing chunks into engines' memory: to the host's one by one, to a GPU's together; and what changes on a
//! GPU waits there until it is applied.

use super::Agent;
use super::jobs::Job;
use super::pieces::{Source, Staged};
use super::regions::Region;
use aquifer_core::{ChunkSet, ManifestHash};
use aquifer_engine::ConnId;
use aquifer_proto::{EngineInput, Target};
use std::sync::Arc;

/// Chunks that are copied to a GPU in one go. Guess: 1 GiB of chunks of 4 MiB is 20 ms of PCIe.
const COPIED_AT_ONCE_MAX: usize = 256;

/// What is told to the brain at the end of a step, since an engine may be waiting for what the step tells it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Books {
    /// Where chunks lie.
    pub(super) all: bool,
    /// How many engines are ready.
    pub(super) count: bool,
}

impl Agent {
    /// At once where it goes to host memory; else when the GPU is free, with all that came meanwhile.
    pub(super) fn copy(&mut self, conn: ConnId, target: &Target, chunk: u32, source: Source) {
        let Some(entry) = self.sessions.get_mut(&conn) else { return };
        if entry.has_gpu() {
            entry.to_copy.push((chunk, source));
            return self.copy_next(conn, false);
        }
        let memory = entry.memory(target);
        self.job(Job::Copy { conn, sources: vec![(chunk, source)], memory });
    }

    /// Copies what waits for the GPU, unless something is being copied there; `ended`: that has ended.
    pub(super) fn copy_next(&mut self, conn: ConnId, ended: bool) {
        let Some(entry) = self.sessions.get_mut(&conn) else { return };
        entry.copying &= !ended;
        let Some(target) = entry.session.target().filter(|_| !entry.copying && !entry.to_copy.is_empty()) else {
            return;
        };
        let memory = entry.memory(target);
        let count = entry.to_copy.len().min(COPIED_AT_ONCE_MAX);
        let sources = entry.to_copy.drain(..count).collect();
        entry.copying = true;
        self.job(Job::Copy { conn, sources, memory });
    }

    /// Has what will change put beside the engine's memory on the GPU, and what will be overwritten kept on this
    /// node; the engine is asked to pause when that is done.
    pub(super) fn prepare(&mut self, conn: ConnId, target: &Target, chunks: &ChunkSet, keep: &ChunkSet) {
        let manifest = target.manifest;
        let gone: Vec<u32> = chunks.iter().filter(|chunk| !self.has_source(conn, &manifest, *chunk)).collect();
        if !gone.is_empty() {
            gone.into_iter().for_each(|chunk| self.discard(manifest, chunk));
            return self.engine_input(conn, EngineInput::Prepared { ok: false });
        }
        let kept = self.keeping(conn, keep);
        let Some(entry) = self.sessions.get(&conn) else { return };
        let stages = entry.has_gpu() && self.shadow;
        let (memory, name) = (entry.memory(target), entry.name.clone());
        let mut sources = Vec::new();
        if stages {
            tracing::debug!("engine {name}: {} chunks of {} go to the GPU", chunks.count(), manifest.short());
            sources = chunks.iter().filter_map(|c| Some((c, self.source(conn, &manifest, c)?))).collect();
        }
        match sources.is_empty() && kept.is_none() {
            true => self.engine_input(conn, EngineInput::Prepared { ok: true }),
            false => self.job(Job::Prepare { conn, manifest, sources, memory, kept }),
        }
    }

    pub(super) fn on_prepared(&mut self, conn: ConnId, manifest: ManifestHash, staged: Staged) {
        let Some(entry) = self.sessions.get_mut(&conn) else { return };
        if entry.session.target().is_some_and(|target| target.manifest == manifest) {
            entry.staged = Some(Arc::new(staged));
        }
        self.engine_input(conn, EngineInput::Prepared { ok: true });
    }

    /// Gives back what lies on GPUs for a release that the engine does not turn to after all.
    pub(super) fn drop_staged(&mut self, conn: ConnId) {
        let Some(entry) = self.sessions.get_mut(&conn) else { return };
        let memory = entry.session.target().map(|target| entry.memory(target));
        entry.staged.take_if(|staged| memory.is_none_or(|memory| !staged.is_for(&memory)));
    }

    /// Where each chunk of an update is copied from; None if one is nowhere.
    pub(super) fn sources_of_update(
        &mut self,
        conn: ConnId,
        target: &Target,
        chunks: &ChunkSet,
    ) -> Option<Vec<(u32, Source)>> {
        let entry = self.sessions.get(&conn)?;
        let (staged, memory) = (entry.staged.clone(), entry.memory(target));
        let on_gpus = |chunk| staged.as_ref().is_some_and(|staged| staged.has_all_of(chunk, &memory));
        let (there, elsewhere): (Vec<u32>, Vec<u32>) = chunks.iter().partition(|chunk| on_gpus(*chunk));
        let elsewhere = elsewhere.into_iter().map(|c| Some((c, self.source(conn, &target.manifest, c)?)));
        let mut sources = elsewhere.collect::<Option<Vec<_>>>()?;
        sources.extend(there.into_iter().map(|chunk| (chunk, Source::Staged)));
        Some(sources)
    }

    pub(super) fn apply_update(&mut self, conn: ConnId, target: &Target, sources: Vec<(u32, Source)>) {
        let Some(entry) = self.sessions.get_mut(&conn) else { return };
        let staged = entry.staged.take();
        let memory = entry.memory(target);
        // The engine waits: what the brain has to know it is told afterwards, unless somebody reads what will change.
        let changes = || memory.changes_on_host(sources.iter().map(|(chunk, _)| *chunk));
        entry.was_read =
            self.grants.reach(memory.regions.values().filter_map(Region::host)) && self.grants.close_over(&changes());
        self.start_job(Job::Apply { conn, sources, staged, memory });
    }
}
