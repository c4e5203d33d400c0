//! A release's chunks as a picture: what is here, what is wanted, and how many copies are known.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// More columns than that nobody sees.
pub(crate) const BUCKETS_MAX: usize = 256;

/// `/v1/swarm`: the chunks of a channel's release, in the order of its manifest, in at most 256 buckets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct SwarmView {
    pub(crate) channel: String,
    /// Empty: no release is known.
    pub(crate) manifest: String,
    /// Distinct chunks of the release; zero until its manifest is here.
    pub(crate) chunks: u64,
    pub(crate) buckets: Vec<Bucket>,
}

/// Some chunks that follow each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Bucket {
    /// The share of them that is here, and that is to be here.
    pub(crate) have: f64,
    pub(crate) wanted: f64,
    /// Copies on other nodes that this one knows of, for each of them, on average.
    pub(crate) copies: f64,
}

impl Bucket {
    /// What a run of chunks comes to. `of` tells of each whether it is here, whether it is wanted, and its copies.
    pub(crate) fn all(chunks: u32, of: impl Fn(u32) -> (bool, bool, u32)) -> Vec<Bucket> {
        let count = (chunks as usize).min(BUCKETS_MAX);
        let edge = |i: usize| u32::try_from(i as u64 * u64::from(chunks) / count as u64).unwrap_or(chunks);
        let bucket = |i: usize| {
            let (from, to) = (edge(i), edge(i + 1));
            let mut sum = Bucket::default();
            for (have, wanted, copies) in (from..to).map(&of) {
                sum.have += f64::from(u8::from(have));
                sum.wanted += f64::from(u8::from(wanted));
                sum.copies += f64::from(copies);
            }
            let n = f64::from((to - from).max(1));
            Bucket { have: sum.have / n, wanted: sum.wanted / n, copies: sum.copies / n }
        };
        (0..count).map(bucket).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_in_one_bucket() {
        for chunks in [0, 1, 2, 255, 256, 257, 1000, 100_000] {
            let buckets = Bucket::all(chunks, |c| (c % 2 == 0, true, 3));
            assert_eq!(buckets.len(), (chunks as usize).min(BUCKETS_MAX));
            assert!(buckets.iter().all(|b| b.wanted == 1.0 && b.copies == 3.0 && (0.0..=1.0).contains(&b.have)));
        }
        let one = Bucket::all(2, |c| (c == 1, false, c));
        assert_eq!((one[0].have, one[1].have, one[1].copies), (0.0, 1.0, 1.0));
    }
}
