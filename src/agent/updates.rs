//! Bringing chunks into engines' memory: to the host's one by one, to a GPU's together; and what changes on a
//! GPU waits there until it is applied.

use super::Agent;
use super::jobs::Job;
use super::pieces::{Source, Staged};
use super::regions::Region;
use aquifer_core::{ChannelName, ChunkSet, ManifestHash};
use aquifer_engine::ConnId;
use aquifer_proto::{Target, Tell};
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

    /// Puts what will change beside the engine's memory on the GPU; the engine is asked to pause when it is there.
    pub(super) fn stage(&mut self, conn: ConnId, channel: &ChannelName, manifest: ManifestHash, target: &Target) {
        let Some(entry) = self.sessions.get(&conn) else { return };
        let memory = entry.memory(target);
        let chunks: Vec<u32> = entry.session.to_change().iter().flat_map(ChunkSet::iter).collect();
        tracing::debug!(
            "engine {}, for {channel}: {} chunks of {} go to the GPU",
            entry.name,
            chunks.len(),
            manifest.short()
        );
        let sources = chunks.into_iter().filter_map(|c| Some((c, self.source(conn, &manifest, c)?))).collect();
        self.job(Job::Stage { conn, manifest, sources, memory });
    }

    pub(super) fn on_staged(&mut self, conn: ConnId, manifest: ManifestHash, staged: Staged) {
        let Some(entry) = self.sessions.get_mut(&conn) else { return };
        let (Some(target), Some(changes)) = (entry.session.target(), entry.session.to_change()) else { return };
        if target.manifest != manifest {
            return; // It turned to another release meanwhile, and that will be staged.
        }
        let bytes = target.plan.bytes_of(&changes);
        entry.staged = Some(Arc::new(staged));
        if let Some(channel) = entry.channel.clone() {
            self.tell_engine(conn, &channel, Tell::Pause { manifest, bytes });
        }
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
