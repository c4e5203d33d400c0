//! Which chunks this node fetches from afar, so that a rack takes each chunk in about once.
//!
//! Nodes say by their labels `zone`, `rack` and `host` where they stand. A boundary is crossed for
//! a chunk by few of those behind it: rendezvous hashing ranks them for each of a fixed number of
//! buckets (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM
//! Transactions on Networking 6(1), 1998), all compute the same ranks, and the first fetches. Who
//! goes hungry fetches what it is second for, fourth, and so on: a first that is dead, slow, or
//! does not want the chunk itself holds nobody up for long.

use aquifer_core::{ChunkSet, NodeId};

/// The labels that say where a node stands, innermost first.
const PLACES: [&str; 3] = ["host", "rack", "zone"];

/// Of two nodes that differ in the outermost.
#[expect(clippy::cast_possible_truncation, reason = "there are three")]
pub(crate) const DISTANCE_MAX: u8 = PLACES.len() as u8;

/// Guess: enough that thirty nodes get about even shares, few enough to rank in microseconds.
const BUCKETS: u32 = 256;

/// Boundaries between two nodes: 0 if none, else 1 + the index of the outermost label in which they
/// differ. A label that one of them lacks does not part them.
pub(crate) fn distance(a: &[(String, String)], b: &[(String, String)]) -> u8 {
    let value = |labels: &[(String, String)], key: &str| labels.iter().position(|(k, _)| k == key);
    let differ = |key: &&str| match (value(a, key), value(b, key)) {
        (Some(x), Some(y)) => a[x].1 != b[y].1,
        (None, _) | (_, None) => false,
    };
    let outermost = PLACES.iter().rposition(differ);
    outermost.map_or(0, |i| u8::try_from(i + 1).unwrap_or(u8::MAX))
}

/// The label that such a distance is named after; None if no boundary is known.
pub(crate) fn boundary(distance: u8) -> Option<&'static str> {
    PLACES.get(usize::from(distance.checked_sub(1)?)).copied()
}

/// The buckets whose chunks may be fetched from some distance, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share([u64; (BUCKETS / 64) as usize]);

#[derive(Debug)]
pub(crate) struct Reach {
    /// By distance less one, by bucket: how many behind the same boundary come before this node.
    ranks: [Vec<u32>; PLACES.len()],
    /// Chunks are fetched by so many of those behind a boundary.
    width: u32,
}

impl Default for Reach {
    /// Nobody else is behind any boundary: everything may be fetched from everywhere.
    fn default() -> Self {
        Reach { ranks: std::array::from_fn(|_| vec![0; BUCKETS as usize]), width: 1 }
    }
}

impl Reach {
    /// Ranks this node among `others`, each at its distance.
    pub(crate) fn rank(&mut self, me: &NodeId, others: &[(NodeId, u8)]) {
        self.ranks.iter_mut().for_each(|r| r.fill(0));
        let farthest = others.iter().map(|(_, d)| *d).max().unwrap_or(0);
        let mine: Vec<u64> = (0..BUCKETS).map(|b| score(me, b)).collect();
        // Behind a boundary that parts this node from those at distance d are all that are nearer;
        // boundaries beyond which nobody stands need no ranks.
        for (node, distance) in others.iter().filter(|(_, d)| *d < farthest) {
            let ahead: Vec<bool> = (0..BUCKETS).zip(&mine).map(|(b, own)| score(node, b) > *own).collect();
            for ranks in &mut self.ranks[usize::from(*distance)..usize::from(farthest)] {
                ranks.iter_mut().zip(&ahead).for_each(|(rank, ahead)| *rank += u32::from(*ahead));
            }
        }
    }

    pub(crate) fn allows(&self, distance: u8, chunk: u32) -> bool {
        let ranks = usize::from(distance).checked_sub(1).and_then(|level| self.ranks.get(level));
        ranks.is_none_or(|ranks| ranks[(chunk % BUCKETS) as usize] < self.width)
    }

    /// What may be fetched from that far, to be compared with what it was.
    pub(crate) fn share(&self, distance: u8) -> Share {
        let mut share = [0; (BUCKETS / 64) as usize];
        for bucket in (0..BUCKETS).filter(|b| self.allows(distance, *b)) {
            share[(bucket / 64) as usize] |= 1 << (bucket % 64);
        }
        Share(share)
    }

    /// Leaves of `set` what may be fetched from that far.
    pub(crate) fn restrict(&self, distance: u8, set: &mut ChunkSet) {
        if distance > 0 {
            let not: Vec<u32> = set.iter().filter(|c| !self.allows(distance, *c)).collect();
            not.into_iter().for_each(|c| {
                set.remove(c);
            });
        }
    }

    /// Returns whether there was more to reach.
    pub(crate) fn widen(&mut self) -> bool {
        let more = self.ranks.iter().flatten().any(|rank| *rank >= self.width);
        self.width = self.width.saturating_mul(2);
        more
    }

    /// Returns whether it was wider.
    pub(crate) fn narrow(&mut self) -> bool {
        std::mem::replace(&mut self.width, 1) > 1
    }
}

/// SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014) over a node's name and a bucket.
fn score(node: &NodeId, bucket: u32) -> u64 {
    let name = node.0.iter().take(8).fold(0u64, |n, b| n << 8 | u64::from(*b));
    let mut x = name ^ (u64::from(bucket) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_core::NodeSecret;

    fn labels(of: &[(&str, &str)]) -> Vec<(String, String)> {
        of.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn the_outermost_difference_counts() {
        let here = labels(&[("host", "h1"), ("rack", "1"), ("zone", "a")]);
        assert_eq!(distance(&here, &here), 0);
        assert_eq!(distance(&here, &labels(&[("host", "h2"), ("rack", "1"), ("zone", "a")])), 1);
        assert_eq!(distance(&here, &labels(&[("host", "h2"), ("rack", "2"), ("zone", "a")])), 2);
        assert_eq!(distance(&here, &labels(&[("host", "h1"), ("rack", "1"), ("zone", "b")])), 3);
        assert_eq!(distance(&here, &labels(&[("rack", "1"), ("gpu", "x")])), 0);
    }

    #[test]
    fn each_chunk_has_one_that_fetches_it_from_afar_and_shares_are_even() {
        let nodes: Vec<NodeId> = (0..32).map(|i| NodeSecret::from_seed([i; 32]).public()).collect();
        let reach = |me: usize| {
            let mut reach = Reach::default();
            let others = nodes.iter().enumerate().filter(|(i, _)| *i != me).map(|(_, n)| (*n, 0));
            let elsewhere = (NodeSecret::from_seed([99; 32]).public(), 2);
            reach.rank(&nodes[me], &others.chain([elsewhere]).collect::<Vec<_>>());
            reach
        };
        let reaches: Vec<Reach> = (0..32).map(reach).collect();
        for chunk in 0..BUCKETS {
            assert_eq!(reaches.iter().filter(|r| r.allows(2, chunk)).count(), 1);
            assert!(reaches.iter().all(|r| r.allows(0, chunk)));
        }
        let most = reaches.iter().map(|r| (0..BUCKETS).filter(|c| r.allows(2, *c)).count()).max();
        assert!(most < Some(24), "{most:?} of 8 on average");
        let mut hungry = reach(0);
        let narrow = (0..BUCKETS).filter(|c| hungry.allows(2, *c)).count();
        assert!(hungry.widen());
        assert!((0..BUCKETS).filter(|c| hungry.allows(2, *c)).count() > narrow);
        assert!(hungry.narrow() && !hungry.narrow());
        assert!(std::iter::repeat_with(|| hungry.widen()).take(6).any(|more| !more), "in the end all is reached");
    }

    #[test]
    fn who_stands_beyond_a_boundary_does_not_compete() {
        let (me, other) = (NodeSecret::from_seed([1; 32]).public(), NodeSecret::from_seed([2; 32]).public());
        let mut reach = Reach::default();
        reach.rank(&me, &[(other, 2)]);
        assert!((0..BUCKETS).all(|c| reach.allows(2, c)), "each is alone in its rack");
        reach.rank(&me, &[(other, 2), (NodeSecret::from_seed([3; 32]).public(), 3)]);
        assert!((0..BUCKETS).all(|c| reach.allows(2, c)));
        assert!(!(0..BUCKETS).all(|c| reach.allows(3, c)), "they share the zone");
    }
}
