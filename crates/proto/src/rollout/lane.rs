//! The releases and statements a node knows of one channel, and which of them is for it.

use crate::limits::RELEASES_KEPT;
use aquifer_core::{How, Release, ReleaseId, Statement, Word};
use std::collections::BTreeMap;

#[derive(Debug)]
pub(super) struct Lane {
    labels: Vec<(String, String)>,
    /// Those whose selector this node matches.
    releases: BTreeMap<ReleaseId, Release>,
    statements: BTreeMap<ReleaseId, Statement>,
}

impl Lane {
    pub(super) fn new(labels: Vec<(String, String)>) -> Self {
        Lane { labels, releases: BTreeMap::new(), statements: BTreeMap::new() }
    }

    pub(super) fn labels(&self) -> &[(String, String)] {
        &self.labels
    }

    /// Takes a release that this node is concerned with. Beyond a bound the oldest is forgotten
    /// that is none of `kept`.
    pub(super) fn on_release(&mut self, release: Release, kept: &[ReleaseId]) {
        if !release.policy.subset.matches(&self.labels) {
            return;
        }
        self.releases.insert(release.id(), release);
        while self.releases.len() > RELEASES_KEPT {
            let Some(oldest) = self.releases.keys().find(|id| !kept.contains(id)).copied() else { return };
            self.releases.remove(&oldest);
            self.statements.remove(&oldest);
        }
    }

    /// A statement may come before the release that it speaks of. Of two that contradict each other
    /// the greater counts, whichever comes first.
    pub(super) fn on_statement(&mut self, statement: Statement) {
        let known = self.statements.get(&statement.release);
        if known.is_some_and(|known| known.word >= statement.word) {
            return;
        }
        self.statements.insert(statement.release, statement);
        while self.statements.len() > RELEASES_KEPT * 2 {
            let Some(oldest) = self.statements.keys().find(|id| !self.releases.contains_key(id)).copied() else {
                return;
            };
            self.statements.remove(&oldest);
        }
    }

    pub(super) fn get(&self, id: &ReleaseId) -> Option<&Release> {
        self.releases.get(id)
    }

    /// Newest first.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = &Release> {
        self.releases.values().rev()
    }

    pub(super) fn is_committed(&self, id: &ReleaseId) -> bool {
        self.statements.get(id).is_some_and(|s| s.word == Word::Commit)
    }

    pub(super) fn aborted(&self, id: &ReleaseId) -> Option<&Statement> {
        self.statements.get(id).filter(|s| s.word == Word::Abort)
    }

    /// The release to get to: the newest, but for one that is pinned, which only one for the same
    /// selector follows.
    pub(super) fn wanted(&self) -> Option<&Release> {
        let mut releases = self.releases.values();
        let first = releases.next()?;
        let follow = |current: &'_ Release, next: &'_ Release| {
            current.policy.pinned && current.policy.subset != next.policy.subset
        };
        Some(releases.fold(first, |current, next| if follow(current, next) { current } else { next }))
    }

    /// Synchronous releases after `base` up to `wanted`, oldest first.
    pub(super) fn synchronous_between(
        &self,
        base: Option<ReleaseId>,
        wanted: ReleaseId,
    ) -> impl Iterator<Item = &Release> {
        let after = move |r: &&Release| base.is_none_or(|base| r.id() > base);
        self.releases.range(..=wanted).map(|(_, r)| r).filter(after).filter(|r| r.policy.is_synchronous())
    }

    /// Releases that somebody has to give a word for.
    pub(super) fn waits_for_word(&self, release: &Release) -> bool {
        let needs = matches!(release.policy.how, How::Synchronous { .. } | How::Manual);
        needs && !self.is_committed(&release.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::testing::{commit, id, release};
    use aquifer_core::Policy;

    fn lane(labels: &[(&str, &str)]) -> Lane {
        Lane::new(labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    fn policy(subset: &str, pinned: bool) -> Policy {
        let subset = if subset.is_empty() { Default::default() } else { subset.parse().unwrap() };
        Policy { subset, pinned, ..Policy::default() }
    }

    fn wanted(lane: &Lane) -> u64 {
        lane.wanted().unwrap().seq
    }

    #[test]
    fn each_side_of_a_comparison_takes_its_own() {
        for (ab, expected) in [("x", 2), ("y", 3)] {
            let mut lane = lane(&[("ab", ab)]);
            lane.on_release(release(1, policy("", false)), &[]);
            lane.on_release(release(2, policy("ab=x", false)), &[]);
            lane.on_release(release(3, policy("ab=y", false)), &[]);
            assert_eq!(wanted(&lane), expected);
        }
    }

    #[test]
    fn pinned_nodes_stay_until_one_comes_for_them() {
        let mut lane = lane(&[("ab", "x")]);
        lane.on_release(release(1, policy("", false)), &[]);
        lane.on_release(release(2, policy("ab=x", true)), &[]);
        lane.on_release(release(3, policy("", false)), &[]);
        assert_eq!(wanted(&lane), 2);
        lane.on_release(release(4, policy("ab=x", false)), &[]);
        assert_eq!(wanted(&lane), 4);
        lane.on_release(release(5, policy("", false)), &[]);
        assert_eq!(wanted(&lane), 5, "the one that followed was not pinned");
    }

    #[test]
    fn what_is_in_use_is_not_forgotten() {
        let mut lane = lane(&[]);
        for seq in 1..=3 * RELEASES_KEPT as u64 {
            lane.on_release(release(seq, Policy::default()), &[id(2)]);
            lane.on_statement(commit(seq + 1));
        }
        assert!(lane.get(&id(2)).is_some() && lane.get(&id(1)).is_none());
        assert!(lane.is_committed(&id(3 * RELEASES_KEPT as u64 + 1)), "its release may come yet");
        assert!(lane.statements.len() <= RELEASES_KEPT * 2);
    }
}
