//! Asks about manifests that are still on their way here: an asker may have heard of a release
//! first.
//!
//! They end as others do: replaced, withdrawn, refused, or with the connection. A manifest that
//! does not come keeps no place from the next one.

use crate::limits::{ASKERS_MAX, EARLY_ASK_PATIENCE, EARLY_BYTES_MAX, EARLY_MANIFESTS_MAX};
use aquifer_core::message::{Refusal, Terms};
use aquifer_core::{ChunkSet, ManifestHash, NodeId, Time};
use std::collections::BTreeMap;

/// Each manifest has at least one ask.
#[derive(Debug, Default)]
pub(crate) struct EarlyAsks {
    manifests: BTreeMap<ManifestHash, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    since: Time,
    asks: BTreeMap<NodeId, EarlyAsk>,
}

/// An ask as it came, and was corrected since.
#[derive(Debug)]
pub(crate) struct EarlyAsk {
    pub(crate) wanted: ChunkSet,
    pub(crate) have: ChunkSet,
    pub(crate) terms: Terms,
}

impl EarlyAsks {
    /// Takes, replaces or ends an ask.
    pub(crate) fn on_ask(&mut self, now: Time, from: NodeId, manifest: ManifestHash, ask: EarlyAsk) -> Option<Refusal> {
        if ask.wanted.is_empty() {
            self.retain(|of, node| !(*of == manifest && *node == from));
            return None;
        }
        if self.manifests.len() >= EARLY_MANIFESTS_MAX && !self.manifests.contains_key(&manifest) {
            return Some(Refusal::Nothing);
        }
        let before = self.manifests.get(&manifest).and_then(|w| w.asks.get(&from)).map_or(0, EarlyAsk::bytes);
        if self.bytes() - before + ask.bytes() > EARLY_BYTES_MAX {
            self.retain(|of, node| !(*of == manifest && *node == from));
            return Some(Refusal::Full);
        }
        let waiting = self.manifests.entry(manifest).or_insert_with(|| Waiting { since: now, asks: BTreeMap::new() });
        if waiting.asks.len() >= ASKERS_MAX && !waiting.asks.contains_key(&from) {
            return Some(Refusal::Full);
        }
        waiting.asks.insert(from, ask);
        None
    }

    pub(crate) fn on_progress(
        &mut self,
        from: NodeId,
        manifest: ManifestHash,
        (taken, again, terms): (&[u32], &[u32], Terms),
    ) {
        if let Some(ask) = self.manifests.get_mut(&manifest).and_then(|w| w.asks.get_mut(&from)) {
            ask.correct(taken, again, terms);
        }
    }

    pub(crate) fn on_disconnected(&mut self, node: &NodeId) {
        self.retain(|_, from| from != node);
    }

    /// The manifest is here now, or of no interest any more: its asks are the caller's.
    pub(crate) fn take(&mut self, manifest: &ManifestHash) -> BTreeMap<NodeId, EarlyAsk> {
        self.manifests.remove(manifest).map(|w| w.asks).unwrap_or_default()
    }

    /// Ends all of them. Returns who is to be told.
    pub(crate) fn take_all(&mut self) -> Vec<(ManifestHash, NodeId)> {
        let all = std::mem::take(&mut self.manifests).into_iter();
        all.flat_map(|(m, waiting)| waiting.asks.into_keys().map(move |node| (m, node))).collect()
    }

    /// Gives up manifests that are not `coming`, some time after they were first asked for. Returns
    /// who is to be told.
    pub(crate) fn on_timeout(
        &mut self,
        now: Time,
        coming: impl Fn(&ManifestHash) -> bool,
    ) -> Vec<(ManifestHash, NodeId)> {
        let in_vain = |(m, w): &(&ManifestHash, &Waiting)| now.since(w.since) >= EARLY_ASK_PATIENCE && !coming(m);
        let given_up: Vec<ManifestHash> = self.manifests.iter().filter(in_vain).map(|(m, _)| *m).collect();
        given_up.into_iter().flat_map(|m| self.take(&m).into_keys().map(move |node| (m, node))).collect()
    }

    /// What the sets take.
    pub(crate) fn bytes(&self) -> usize {
        self.manifests.values().flat_map(|w| w.asks.values()).map(EarlyAsk::bytes).sum()
    }

    /// How many manifests are asked for, and by whom.
    pub(crate) fn len(&self) -> usize {
        self.manifests.len()
    }

    pub(crate) fn asking(&self) -> impl Iterator<Item = &NodeId> {
        self.manifests.values().flat_map(|w| w.asks.keys())
    }

    /// The most asks about one manifest.
    pub(crate) fn most(&self) -> usize {
        self.manifests.values().map(|w| w.asks.len()).max().unwrap_or(0)
    }

    fn retain(&mut self, keep: impl Fn(&ManifestHash, &NodeId) -> bool) {
        self.manifests.retain(|manifest, waiting| {
            waiting.asks.retain(|node, _| keep(manifest, node));
            !waiting.asks.is_empty()
        });
    }
}

impl EarlyAsk {
    fn bytes(&self) -> usize {
        self.wanted.bytes() + self.have.bytes()
    }

    fn correct(&mut self, taken: &[u32], again: &[u32], terms: Terms) {
        self.terms = terms;
        for &chunk in taken {
            self.wanted.remove(chunk);
            self.have.insert(chunk);
        }
        for &chunk in again {
            self.have.remove(chunk);
            self.wanted.insert(chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_core::limits::MANIFEST_CHUNKS_MAX;

    const A: NodeId = NodeId([1; 32]);
    const B: NodeId = NodeId([2; 32]);

    fn name(n: usize) -> ManifestHash {
        ManifestHash::of(&n.to_le_bytes())
    }

    fn ask(early: &mut EarlyAsks, now: Time, from: NodeId, n: usize, wanted: u32) -> Option<Refusal> {
        let wanted = ChunkSet::from_indices(9, 0..wanted);
        early.on_ask(now, from, name(n), EarlyAsk { wanted, have: ChunkSet::empty(9), terms: Terms::default() })
    }

    #[test]
    fn who_withdraws_or_goes_keeps_no_place() {
        let (mut early, now) = (EarlyAsks::default(), Time::ZERO);
        assert_eq!(ask(&mut early, now, A, 0, 0), None, "nothing is kept of it");
        for n in 0..EARLY_MANIFESTS_MAX {
            assert_eq!(ask(&mut early, now, A, n, 9), None);
        }
        assert_eq!(ask(&mut early, now, B, 0, 9), None);
        assert_eq!(ask(&mut early, now, B, 99, 9), Some(Refusal::Nothing));
        assert_eq!(ask(&mut early, now, A, 1, 0), None);
        assert_eq!(ask(&mut early, now, B, 99, 9), None, "a withdrawal makes room");
        early.on_disconnected(&A);
        assert_eq!(early.len(), 2);
        assert_eq!(early.take(&name(0)).into_keys().collect::<Vec<_>>(), [B]);
    }

    #[test]
    fn a_manifest_that_does_not_come_is_given_up() {
        let mut early = EarlyAsks::default();
        ask(&mut early, Time::ZERO, A, 0, 9);
        ask(&mut early, Time::ZERO, B, 0, 9);
        ask(&mut early, Time::ZERO, B, 1, 9);
        let later = Time::ZERO + EARLY_ASK_PATIENCE;
        ask(&mut early, later, A, 2, 9);
        assert_eq!(early.on_timeout(later, |m| *m == name(1)), [(name(0), A), (name(0), B)]);
        assert_eq!(early.len(), 2, "one is on its way, and one was just asked for");
    }

    #[test]
    fn nobody_waits_at_a_full_table() {
        let mut early = EarlyAsks::default();
        for n in 0..ASKERS_MAX {
            let node = NodeId([u8::try_from(n + 10).unwrap(); 32]);
            assert_eq!(ask(&mut early, Time::ZERO, node, 0, 9), None);
        }
        assert_eq!(ask(&mut early, Time::ZERO, A, 0, 9), Some(Refusal::Full));
        assert_eq!(early.most(), ASKERS_MAX);
    }

    #[test]
    fn few_wait_with_long_asks() {
        let mut early = EarlyAsks::default();
        let mut ask = |n: u8| {
            // A few bytes on the wire, a megabyte here.
            let len = u32::try_from(MANIFEST_CHUNKS_MAX).unwrap();
            let ask = EarlyAsk { wanted: ChunkSet::full(len), have: ChunkSet::empty(len), terms: Terms::default() };
            let refusal = early.on_ask(Time::ZERO, NodeId([n; 32]), name(0), ask);
            assert!(early.bytes() <= EARLY_BYTES_MAX);
            refusal
        };
        let kept = (0..ASKERS_MAX).take_while(|n| ask(u8::try_from(*n).unwrap()).is_none()).count();
        assert!((1..ASKERS_MAX).contains(&kept), "{kept} are kept");
        assert_eq!(ask(0), None, "in place of its last");
    }
}
