//! Fetching manifests by hash, in pieces, from one peer at a time. Where the length is known, some pieces
//! are asked for ahead, so that neither side waits for the other.

use crate::io::Output;
use crate::limits::{MANIFEST_MISSES, MANIFEST_PIECES_AHEAD, MANIFEST_RETRY, MANIFEST_RETRY_MAX, MANIFEST_TIMEOUT};
use aquifer_core::limits::{MANIFEST_BYTES_MAX, MANIFEST_PIECE_BYTES};
use aquifer_core::{ManifestHash, NodeId, PeerMessage, Time};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use std::collections::{BTreeMap, VecDeque};

#[derive(Debug, Default)]
pub(crate) struct Manifests {
    fetches: BTreeMap<ManifestHash, Fetch>,
}

#[derive(Debug)]
struct Fetch {
    /// Length of the manifest; unknown until the first piece where no release told it.
    total: Option<u64>,
    /// Whether a release told `total`, rather than a peer.
    told: bool,
    bytes: Vec<u8>,
    asked: Option<(NodeId, Time)>,
    /// Where the next piece to ask for begins.
    asked_to: u64,
    /// How often a peer had it not: the more, the longer until one is asked again.
    misses: u32,
    /// Peers that lacked it or lied, and until when they are passed over.
    passed_over: BTreeMap<NodeId, Time>,
}

/// Somebody sent a manifest's worth of bytes that are not the manifest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Liar(pub(crate) NodeId);

impl Manifests {
    /// Wants a manifest of `total` bytes; zero if that is not known.
    pub(crate) fn want(&mut self, manifest: ManifestHash, total: u64) {
        self.fetches.entry(manifest).or_insert_with(|| Fetch {
            total: (total > 0).then_some(total),
            told: total > 0,
            bytes: Vec::new(),
            asked: None,
            asked_to: 0,
            misses: 0,
            passed_over: BTreeMap::new(),
        });
    }

    pub(crate) fn forget(&mut self, manifest: &ManifestHash) {
        self.fetches.remove(manifest);
    }

    pub(crate) fn wanted(&self) -> impl Iterator<Item = ManifestHash> + '_ {
        self.fetches.keys().copied()
    }

    pub(crate) fn is_wanted(&self, manifest: &ManifestHash) -> bool {
        self.fetches.contains_key(manifest)
    }

    /// When [`Manifests::review`] has something to do again.
    pub(crate) fn next_timeout(&self) -> Option<Time> {
        let next = |f: &Fetch| match f.asked {
            Some((_, at)) => Some(at + MANIFEST_TIMEOUT),
            None => f.passed_over.values().min().copied(),
        };
        self.fetches.values().filter_map(next).min()
    }

    /// Asks a peer for each manifest nobody is asked for. `likely` have it; `connected` are asked
    /// if none of those is left.
    pub(crate) fn review(
        &mut self,
        now: Time,
        likely: impl Fn(&ManifestHash) -> Vec<NodeId>,
        connected: &[NodeId],
        rng: &mut SmallRng,
        out: &mut VecDeque<Output>,
    ) {
        for (manifest, fetch) in &mut self.fetches {
            if let Some((peer, since)) = fetch.asked {
                if now.since(since) < MANIFEST_TIMEOUT && connected.contains(&peer) {
                    continue;
                }
                fetch.pass_over(peer, now);
            }
            fetch.passed_over.retain(|_, until| *until > now);
            let free = |nodes: &[NodeId]| -> Vec<NodeId> {
                nodes.iter().filter(|n| !fetch.passed_over.contains_key(n)).copied().collect()
            };
            let best = free(&likely(manifest));
            let candidates = if best.is_empty() { free(connected) } else { best };
            if let Some(&peer) = candidates.choose(rng) {
                fetch.ask(*manifest, peer, now, out);
            }
        }
    }

    pub(crate) fn on_piece(
        &mut self,
        now: Time,
        from: NodeId,
        (manifest, offset, total, bytes): (ManifestHash, u64, u64, Vec<u8>),
        out: &mut VecDeque<Output>,
    ) -> Result<(), Liar> {
        let Some(fetch) = self.fetches.get_mut(&manifest) else { return Ok(()) };
        if fetch.asked.is_none_or(|(peer, _)| peer != from) || offset != fetch.bytes.len() as u64 {
            return Ok(());
        }
        if total == 0 {
            fetch.misses += 1;
            fetch.pass_over(from, now);
            return Ok(());
        }
        let expected = *fetch.total.get_or_insert(total.min(MANIFEST_BYTES_MAX as u64));
        let room = expected - offset;
        // Only a full piece counts as an answer: a trickle would keep the time-out from coming.
        if total != expected || bytes.len() as u64 != room.min(MANIFEST_PIECE_BYTES as u64) {
            fetch.pass_over(from, now + MANIFEST_TIMEOUT);
            return Err(Liar(from));
        }
        fetch.bytes.extend_from_slice(&bytes);
        if (fetch.bytes.len() as u64) < expected {
            fetch.ask(manifest, from, now, out);
            return Ok(());
        }
        if ManifestHash::of(&fetch.bytes) != manifest {
            fetch.pass_over(from, now + MANIFEST_TIMEOUT);
            return Err(Liar(from));
        }
        let bytes = self.fetches.remove(&manifest).map(|f| f.bytes).unwrap_or_default();
        out.push_back(Output::ManifestFetched { manifest, bytes });
        Ok(())
    }
}

impl Fetch {
    /// Asks for the next piece, and for those after it that are there for certain.
    fn ask(&mut self, manifest: ManifestHash, peer: NodeId, now: Time, out: &mut VecDeque<Output>) {
        self.asked = Some((peer, now));
        let next = self.bytes.len() as u64;
        let ahead = next + MANIFEST_PIECES_AHEAD * MANIFEST_PIECE_BYTES as u64;
        let certain = self.total.map_or(next + 1, |total| total.min(ahead));
        self.asked_to = self.asked_to.max(next);
        while self.asked_to < certain {
            let message = PeerMessage::ManifestAsk { manifest, offset: self.asked_to };
            out.push_back(Output::Send { to: peer, message });
            self.asked_to += MANIFEST_PIECE_BYTES as u64;
        }
    }

    /// Starts over with somebody else: pieces of two peers are never mixed.
    fn pass_over(&mut self, peer: NodeId, now: Time) {
        self.bytes.clear();
        (self.asked, self.asked_to) = (None, 0);
        if !self.told {
            self.total = None;
        }
        let wait = MANIFEST_RETRY.saturating_mul(1 + self.misses / MANIFEST_MISSES).min(MANIFEST_RETRY_MAX);
        self.passed_over.insert(peer, now + wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    const A: NodeId = NodeId([1; 32]);
    const B: NodeId = NodeId([2; 32]);

    fn asked(out: &mut VecDeque<Output>) -> Vec<(NodeId, u64)> {
        let ask = |o| {
            let Output::Send { to, message: PeerMessage::ManifestAsk { offset, .. } } = o else { return None };
            Some((to, offset))
        };
        out.drain(..).filter_map(ask).collect()
    }

    #[test]
    fn some_pieces_are_asked_for_ahead_and_none_twice() {
        const PIECE: u64 = MANIFEST_PIECE_BYTES as u64;
        let bytes: Vec<u8> = (0..6 * MANIFEST_PIECE_BYTES + 5).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let (name, total) = (ManifestHash::of(&bytes), bytes.len() as u64);
        for told in [total, 0] {
            let (mut manifests, mut out) = (Manifests::default(), VecDeque::new());
            manifests.want(name, told);
            manifests.review(Time::ZERO, |_| vec![A], &[A], &mut SmallRng::seed_from_u64(1), &mut out);
            let mut waiting: VecDeque<u64> = asked(&mut out).into_iter().map(|(_, offset)| offset).collect();
            assert_eq!(waiting.len() as u64, if told > 0 { MANIFEST_PIECES_AHEAD } else { 1 });
            let mut expected = 0;
            while let Some(offset) = waiting.pop_front() {
                assert_eq!(offset, expected);
                expected += PIECE;
                let begin = usize::try_from(offset).unwrap();
                let piece = bytes[begin..bytes.len().min(begin + MANIFEST_PIECE_BYTES)].to_vec();
                manifests.on_piece(Time::ZERO, A, (name, offset, total, piece), &mut out).unwrap();
                if let Some(Output::ManifestFetched { bytes: fetched, .. }) = out.back() {
                    assert!(*fetched == bytes && waiting.is_empty());
                    break;
                }
                waiting.extend(asked(&mut out).into_iter().map(|(_, offset)| offset));
                assert!(waiting.len() as u64 <= MANIFEST_PIECES_AHEAD);
            }
            assert!(!manifests.is_wanted(&name), "it is never whole");
        }
    }

    #[test]
    fn pieces_add_up_and_a_liar_costs_one_try() {
        let bytes = vec![7u8; MANIFEST_PIECE_BYTES + 5];
        let name = ManifestHash::of(&bytes);
        let (mut manifests, mut out) = (Manifests::default(), VecDeque::new());
        let mut rng = SmallRng::seed_from_u64(1);
        manifests.want(name, bytes.len() as u64);

        manifests.review(Time::ZERO, |_| vec![A], &[A, B], &mut rng, &mut out);
        assert_eq!(asked(&mut out), [(A, 0), (A, MANIFEST_PIECE_BYTES as u64)]);
        let total = bytes.len() as u64;
        let piece = |from: u64, b: &[u8]| (name, from, total, b.to_vec());
        let wrong = vec![8u8; MANIFEST_PIECE_BYTES];
        assert_eq!(manifests.on_piece(Time::ZERO, A, piece(0, &wrong), &mut out), Ok(()));
        assert_eq!(asked(&mut out), [], "it was asked for ahead");
        let lie = manifests.on_piece(Time::ZERO, A, piece(MANIFEST_PIECE_BYTES as u64, &[8; 5]), &mut out);
        assert_eq!(lie, Err(Liar(A)));

        manifests.review(Time::ZERO, |_| vec![A], &[A, B], &mut rng, &mut out);
        assert_eq!(asked(&mut out), [(B, 0), (B, MANIFEST_PIECE_BYTES as u64)]);
        let (first, rest) = bytes.split_at(MANIFEST_PIECE_BYTES);
        assert_eq!(manifests.on_piece(Time::ZERO, B, piece(0, first), &mut out), Ok(()));
        assert_eq!(manifests.on_piece(Time::ZERO, B, piece(first.len() as u64, rest), &mut out), Ok(()));
        assert!(out.iter().any(|o| matches!(o, Output::ManifestFetched { bytes: b, .. } if *b == bytes)));
    }

    #[test]
    fn hostile_pieces_are_refused_at_once() {
        let name = ManifestHash::of(b"m");
        let (mut manifests, mut out) = (Manifests::default(), VecDeque::new());
        let mut rng = SmallRng::seed_from_u64(1);
        manifests.want(name, 10);
        manifests.review(Time::ZERO, |_| vec![A], &[A], &mut rng, &mut out);
        let lie = manifests.on_piece(Time::ZERO, A, (name, 0, u64::MAX, vec![0; 5]), &mut out);
        assert_eq!(lie, Err(Liar(A)));
        assert_eq!(manifests.on_piece(Time::ZERO, B, (name, 0, 10, vec![0; 10]), &mut out), Ok(()), "not asked");
    }
}
