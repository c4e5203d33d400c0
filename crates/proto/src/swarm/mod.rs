//! One manifest's swarm, as one node takes part in it: what it has, pulls and serves.
//!
//! The puller asks many holders at once; each holder answers when it has something worth
//! granting, and chooses what. So a chunk goes where it is rarest, nothing waits for a round of
//! requests, and a node that must keep its bandwidth simply grants less.

mod pull;
mod serve;

pub(crate) use pull::{Candidate, Offer, Pulling, returned};
pub(crate) use serve::{Budget, Serving};

use aquifer_core::ChunkSet;

/// What both halves know of the manifest.
#[derive(Debug)]
pub(crate) struct Stock {
    /// Length of each distinct chunk, in bytes.
    chunk_bytes: Vec<u32>,
    /// Verified here, and served.
    pub(crate) have: ChunkSet,
    /// To be held here, whether it is or not.
    pub(crate) wanted: ChunkSet,
}

impl Stock {
    pub(crate) fn new(chunk_bytes: Vec<u32>) -> Self {
        let len = u32::try_from(chunk_bytes.len()).expect("the driver's layout numbers chunks with 32 bits");
        Stock { chunk_bytes, have: ChunkSet::empty(len), wanted: ChunkSet::empty(len) }
    }

    pub(crate) fn len(&self) -> u32 {
        self.have.len()
    }

    pub(crate) fn bytes_of(&self, chunk: u32) -> u64 {
        self.chunk_bytes.get(chunk as usize).copied().unwrap_or(0).into()
    }

    pub(crate) fn is_missing(&self, chunk: u32) -> bool {
        self.wanted.contains(chunk) && !self.have.contains(chunk)
    }

    pub(crate) fn missing(&self) -> ChunkSet {
        let mut missing = self.wanted.clone();
        missing.subtract(&self.have);
        missing
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.have.is_superset(&self.wanted)
    }

    /// Chunks wanted, and how many of them are here.
    pub(crate) fn progress(&self) -> (u32, u32) {
        (self.wanted.count(), self.wanted.count() - self.missing().count())
    }

    pub(crate) fn progress_bytes(&self) -> (u64, u64) {
        let bytes = |set: &ChunkSet| set.iter().map(|c| self.bytes_of(c)).sum::<u64>();
        let wanted = bytes(&self.wanted);
        (wanted, wanted - bytes(&self.missing()))
    }
}

#[derive(Debug)]
pub(crate) struct Swarm {
    pub(crate) stock: Stock,
    pub(crate) pulling: Pulling,
    pub(crate) serving: Serving,
    /// Said once per completion.
    pub(crate) told_hydrated: bool,
}

impl Swarm {
    pub(crate) fn new(chunk_bytes: Vec<u32>) -> Self {
        let stock = Stock::new(chunk_bytes);
        let serving = Serving::new(stock.len());
        Swarm { stock, pulling: Pulling::default(), serving, told_hydrated: false }
    }
}
