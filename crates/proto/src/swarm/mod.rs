//! One manifest's swarm, as one node takes part in it: what it has, pulls and serves.
//!
//! The puller asks many holders at once; each holder answers when it has something worth
//! granting, and chooses what. So a chunk goes where it is rarest, nothing waits for a round of
//! requests, and a node that must keep its bandwidth simply grants less.

mod asker;
mod asks;
mod bits;
mod budget;
mod early;
mod given;
mod hunger;
mod news;
mod pull;
mod rarity;
mod reach;
mod serve;

pub(crate) use asks::Candidate;
pub(crate) use budget::Budget;
pub use budget::CostlyLimit;
pub(crate) use early::{EarlyAsk, EarlyAsks};
pub(crate) use pull::{Landed, Offer, Pulling, only_returned};
pub(crate) use reach::{boundary, distance};
pub(crate) use serve::Serving;

use aquifer_core::ChunkSet;

/// What both halves know of the manifest.
#[derive(Debug)]
pub(crate) struct Stock {
    /// Length of each distinct chunk, in bytes.
    chunk_bytes: Vec<u32>,
    /// The longest of them.
    unit_bytes: u64,
    /// Verified here, and served.
    pub(crate) have: ChunkSet,
    /// Those that are given as a [`CostlyLimit`] allows, where they are here.
    pub(crate) costly: ChunkSet,
    /// To be held here, whether it is or not.
    pub(crate) wanted: ChunkSet,
}

impl Stock {
    pub(crate) fn new(chunk_bytes: Vec<u32>) -> Self {
        let len = u32::try_from(chunk_bytes.len()).expect("the driver's layout numbers chunks with 32 bits");
        let unit_bytes = chunk_bytes.iter().copied().max().unwrap_or(0).max(1).into();
        let nothing = ChunkSet::empty(len);
        Stock { chunk_bytes, unit_bytes, have: nothing.clone(), costly: nothing.clone(), wanted: nothing }
    }

    pub(crate) fn len(&self) -> u32 {
        self.have.len()
    }

    pub(crate) fn bytes_of(&self, chunk: u32) -> u64 {
        self.chunk_bytes.get(chunk as usize).copied().unwrap_or(0).into()
    }

    /// Of all of the manifest.
    pub(crate) fn bytes(&self) -> u64 {
        self.chunk_bytes.iter().map(|b| u64::from(*b)).sum()
    }

    /// Length of the longest chunk: what windows are counted in.
    pub(crate) fn unit_bytes(&self) -> u64 {
        self.unit_bytes
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
        let wanted = self.wanted.count();
        let missing = self.wanted.difference(&self.have).count();
        (wanted, wanted - u32::try_from(missing).unwrap_or(wanted))
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
