//! What an engine can go back to without the network: the bytes that an update overwrites, in this node's store.

use super::Agent;
use super::pieces::Memory;
use aquifer_core::{ChunkHash, ChunkSet, ManifestHash};
use aquifer_engine::ConnId;
use aquifer_memory::{Reservation, StoreError};

/// Chunks to be copied from an engine's memory, which it goes on reading meanwhile, to where they are kept.
#[derive(Debug)]
pub(super) struct Keep {
    engine: String,
    manifest: ManifestHash,
    memory: Memory,
    chunks: Vec<(u32, ChunkHash, Reservation)>,
    /// For which there is no room.
    without: usize,
}

impl Keep {
    pub(super) fn run(self) {
        let Keep { engine, manifest, memory, chunks, mut without } = self;
        for (chunk, hash, reservation) in chunks {
            without += usize::from(!keep(&memory, chunk, hash, reservation));
        }
        tell(&engine, &manifest, without);
    }
}

impl Agent {
    /// Chunks of the engine's base that are nowhere on this node but in memory that will be overwritten. None if
    /// there are none.
    pub(super) fn keeping(&mut self, conn: ConnId, keep: &ChunkSet) -> Option<Keep> {
        let entry = self.sessions.get(&conn)?;
        let base = entry.session.base()?.clone();
        let (engine, memory, manifest) = (entry.name.clone(), entry.memory(&base), base.manifest);
        let (mut chunks, mut without) = (Vec::new(), 0);
        for chunk in keep.iter() {
            let named = base.layout.chunk(chunk);
            if self.memory.contains(&named.hash) || self.disk.as_ref().is_some_and(|d| d.contains(&named.hash)) {
                continue;
            }
            let room = if without == 0 { self.room_for(named.hash, named.len.into()) } else { None };
            match room {
                Some(reservation) => chunks.push((chunk, named.hash, reservation)),
                None => without += 1,
            }
        }
        if chunks.is_empty() {
            tell(&engine, &manifest, without);
            return None;
        }
        Some(Keep { engine, manifest, memory, chunks, without })
    }

    /// What waits to be applied is not given up for it.
    fn room_for(&mut self, hash: ChunkHash, len: u64) -> Option<Reservation> {
        match self.memory.reserve(hash, len) {
            Err(StoreError::Full { .. }) => {
                self.trim_memory(false);
                self.memory.reserve(hash, len).ok()
            }
            other => other.ok(),
        }
    }

    /// Whether an engine of this node may have to go back to a chunk.
    pub(super) fn is_kept(&self, manifest: &ManifestHash, chunk: u32) -> bool {
        self.sessions.values().any(|conn| conn.session.keeps(manifest, chunk))
    }
}

/// Whether it is in the store then.
fn keep(memory: &Memory, chunk: u32, hash: ChunkHash, reservation: Reservation) -> bool {
    let copied = memory.read_chunk(chunk, reservation.span());
    let is_right = copied.is_some() && reservation.span().hash().is_ok_and(|found| found == hash);
    is_right && reservation.commit().is_ok()
}

fn tell(engine: &str, manifest: &ManifestHash, without: usize) {
    if without > 0 {
        tracing::info!(
            "engine {engine}: {without} chunks of {} that are about to be overwritten cannot be kept here: to go \
             back would be to fetch them again",
            manifest.short()
        );
    }
}
