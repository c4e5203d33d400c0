//! What goes to one GPU together.

use super::{CopyError, Move};
use aquifer_core::ChunkHash;
use aquifer_cuda::{DeviceError, DeviceSpan, DeviceWorker, Goes};
use aquifer_memory::Span;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What waits to be staged on one GPU, and where that goes.
pub(super) struct ToStage {
    pub(super) worker: Arc<dyn DeviceWorker>,
    pub(super) chunks: Vec<(Span, ChunkHash)>,
    pub(super) go: Vec<(u32, Goes)>,
    pub(super) bytes: u64,
    /// The same of what lies on GPUs already.
    pub(super) across: Vec<(DeviceSpan, ChunkHash)>,
    pub(super) go_across: Vec<(u32, Goes)>,
}

impl ToStage {
    pub(super) fn new(worker: Arc<dyn DeviceWorker>) -> Self {
        let (across, go_across) = (Vec::new(), Vec::new());
        ToStage { worker, chunks: Vec::new(), go: Vec::new(), bytes: 0, across, go_across }
    }

    pub(super) fn stage(&mut self, moves: &mut BTreeMap<u32, Vec<Move>>) {
        self.bytes = 0;
        let (go, go_across) = (std::mem::take(&mut self.go), std::mem::take(&mut self.go_across));
        let places = self.worker.stage(&std::mem::take(&mut self.chunks));
        self.note(go, places, moves);
        let places = self.worker.stage_across(&std::mem::take(&mut self.across));
        self.note(go_across, places, moves);
    }

    fn note(
        &self,
        go: Vec<(u32, Goes)>,
        places: Result<Vec<Option<DeviceSpan>>, DeviceError>,
        moves: &mut BTreeMap<u32, Vec<Move>>,
    ) {
        match places {
            Ok(places) => {
                for ((chunk, goes), place) in go.into_iter().zip(places) {
                    let there = place.map(|from| Move { worker: self.worker.clone(), from, goes });
                    moves.entry(chunk).or_default().extend(there);
                }
            }
            Err(error) => tracing::info!("{} chunks are applied from host memory: {error}", go.len()),
        }
    }
}

/// What waits to be done on one GPU, and for which of the list it is done.
pub(super) struct ForGpu {
    pub(super) worker: Arc<dyn DeviceWorker>,
    pub(super) land: Vec<(Span, ChunkHash, Goes)>,
    pub(super) landed: Vec<usize>,
    /// Of memory that is kept for `land` alone.
    pub(super) held_bytes: u64,
    /// The same of what lies on GPUs already.
    pub(super) across: Vec<(DeviceSpan, ChunkHash, Goes)>,
    pub(super) went_across: Vec<(usize, u32)>,
    pub(super) apply: Vec<(DeviceSpan, Goes)>,
    pub(super) applied: Vec<usize>,
}

impl ForGpu {
    pub(super) fn new(worker: Arc<dyn DeviceWorker>) -> Self {
        let (landed, applied) = (Vec::new(), Vec::new());
        let (across, went_across) = (Vec::new(), Vec::new());
        ForGpu { worker, land: Vec::new(), landed, held_bytes: 0, across, went_across, apply: Vec::new(), applied }
    }

    pub(super) fn apply(&self, results: &mut [(u32, Result<(), CopyError>)]) {
        if let Err(error) = self.worker.apply(&self.apply) {
            self.applied.iter().for_each(|at| fail(&mut results[*at].1, error.to_string()));
        }
    }

    pub(super) fn land_across(&mut self, results: &mut [(u32, Result<(), CopyError>)]) {
        if self.across.is_empty() {
            return;
        }
        self.held_bytes = 0;
        let (across, went) = (std::mem::take(&mut self.across), std::mem::take(&mut self.went_across));
        match self.worker.land_across(&across) {
            Ok(wrong) => {
                for (place, (at, chunk)) in wrong.iter().filter_map(|place| Some((*place, *went.get(*place)?))) {
                    results[at].1 = Err(CopyError::OnGpu { chunk, from: across[place].0.clone() });
                }
            }
            Err(error) => went.iter().for_each(|(at, _)| fail(&mut results[*at].1, error.to_string())),
        }
    }

    pub(super) fn land(&mut self, results: &mut [(u32, Result<(), CopyError>)]) {
        if self.land.is_empty() {
            return;
        }
        self.held_bytes = 0;
        let (land, landed) = (std::mem::take(&mut self.land), std::mem::take(&mut self.landed));
        match self.worker.land(&land) {
            Ok(wrong) => {
                let uuid = self.worker.uuid();
                for at in wrong.iter().filter_map(|place| landed.get(*place)) {
                    let reason = format!("a chunk came to {uuid} with other bytes than it had in host memory");
                    fail(&mut results[*at].1, reason);
                }
            }
            Err(error) => landed.iter().for_each(|at| fail(&mut results[*at].1, error.to_string())),
        }
    }
}

/// What failed first is told.
fn fail(result: &mut Result<(), CopyError>, reason: String) {
    if result.is_ok() {
        *result = Err(CopyError::Region(reason));
    }
}
