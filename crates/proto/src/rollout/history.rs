//! What became of the last releases of a channel, as far as this node has heard: for people (`aquifer releases`).
//! Nothing is decided by it.

use crate::limits::{MEMBERS_MAX, RELEASES_KEPT};
use aquifer_core::limits::REPORT_REASON_BYTES_MAX;
use aquifer_core::text::shorten;
use aquifer_core::{NodeId, Phase, Policy, PublisherKey, Release, ReleaseId, Report, Statement, Step, Times, Word};
use std::collections::BTreeMap;

/// The last [`RELEASES_KEPT`] releases of one channel, by their numbers. It is told what the node hears, its own
/// included, in any order and as often as it likes.
#[derive(Debug, Default)]
pub struct History(BTreeMap<ReleaseId, Entry>);

/// One release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: ReleaseId,
    /// None as long as only a statement about it has been heard.
    pub made: Option<Made>,
    /// None: nobody said anything, or it waits for no word.
    pub word: Option<Said>,
    /// Of each member that reported on it, the farthest that it came.
    pub members: BTreeMap<NodeId, Progress>,
}

/// Who made it, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub publisher: PublisherKey,
    /// By the publisher's clock, milliseconds since 1970.
    pub created_unix_ms: u64,
    pub note: String,
    pub policy: Policy,
    pub rolls_back_to: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub word: Word,
    pub by: PublisherKey,
    pub reason: String,
    /// By the speaker's clock, milliseconds since 1970.
    pub created_unix_ms: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub step: Step,
    pub phase: Phase,
    /// By that member's clock.
    pub times: Times,
    /// What it waited for there, or what went wrong.
    pub reason: String,
}

impl History {
    pub fn on_release(&mut self, release: &Release, publisher: PublisherKey) {
        let Some(entry) = self.entry_or_new(release.id()) else { return };
        // Two makers of one release are told apart by nobody: the first that was heard stays.
        entry.made.get_or_insert_with(|| Made {
            publisher,
            created_unix_ms: release.created_unix_ms,
            note: release.note.clone(),
            policy: release.policy.clone(),
            rolls_back_to: release.rolls_back_to,
        });
    }

    /// It may come before its release. A commit counts before an abort, as for [`super::Rollout`].
    pub fn on_statement(&mut self, statement: &Statement, by: PublisherKey) {
        let Some(entry) = self.entry_or_new(statement.release) else { return };
        if entry.word.as_ref().is_some_and(|said| said.word >= statement.word) {
            return;
        }
        let (reason, created_unix_ms) = (statement.reason.clone(), statement.created_unix_ms);
        entry.word = Some(Said { word: statement.word, by, reason, created_unix_ms });
    }

    /// What a member says of itself. Only what it says of a release that is known: anybody can invent others. An
    /// older report than one that was heard changes nothing but what it knows of times.
    pub fn on_report(&mut self, node: NodeId, report: &Report) {
        let Some(entry) = self.0.get_mut(&report.wanted) else { return };
        if entry.members.len() >= MEMBERS_MAX && !entry.members.contains_key(&node) {
            return;
        }
        let known = entry.members.entry(node).or_default();
        known.times.merge(&report.times);
        if (report.step, report.phase) >= (known.step, known.phase) {
            (known.step, known.phase) = (report.step, report.phase);
            known.reason.clone_from(&report.reason);
            shorten(&mut known.reason, REPORT_REASON_BYTES_MAX);
        }
    }

    /// Newest first.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.0.values().rev()
    }

    pub fn entry(&self, id: &ReleaseId) -> Option<&Entry> {
        self.0.get(id)
    }

    /// None: it is older than all that are kept, and there are enough.
    fn entry_or_new(&mut self, id: ReleaseId) -> Option<&mut Entry> {
        let is_old = self.0.first_key_value().is_some_and(|(oldest, _)| id < *oldest);
        if self.0.len() >= RELEASES_KEPT && !self.0.contains_key(&id) {
            if is_old {
                return None;
            }
            self.0.pop_first();
        }
        Some(self.0.entry(id).or_insert_with(|| Entry { id, made: None, word: None, members: BTreeMap::new() }))
    }
}

impl Entry {
    /// How many members came to each phase, and no farther.
    pub fn by_phase(&self) -> BTreeMap<Phase, usize> {
        count(self.members.values().map(|progress| progress.phase))
    }

    pub fn by_step(&self) -> BTreeMap<Step, usize> {
        count(self.members.values().map(|progress| progress.step))
    }

    /// Nodes that the release names and that have reported nothing of it.
    pub fn unheard(&self) -> impl Iterator<Item = &NodeId> {
        let roster = self.made.iter().flat_map(|made| made.policy.roster.iter().map(|entry| &entry.node));
        roster.filter(|node| !self.members.contains_key(node))
    }
}

fn count<K: Ord>(keys: impl Iterator<Item = K>) -> BTreeMap<K, usize> {
    let mut counts = BTreeMap::new();
    keys.for_each(|key| *counts.entry(key).or_default() += 1);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::testing::{commit, id, release};
    use aquifer_core::PublisherSecret;
    use aquifer_core::policy::Entry as Named;

    fn key(n: u8) -> PublisherKey {
        PublisherSecret::from_seed([n; 32]).public()
    }

    fn node(n: usize) -> NodeId {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&n.to_be_bytes());
        NodeId(bytes)
    }

    fn report(seq: u64, step: Step, phase: Phase, reason: &str) -> Report {
        let mut times = Times::default();
        times.reach(phase, 7);
        Report {
            wanted: id(seq),
            base: None,
            step,
            phase,
            served: None,
            settled: false,
            ready: false,
            engines: 1,
            held: false,
            reason: reason.to_string(),
            times,
        }
    }

    fn heard(seq: u64) -> History {
        let mut history = History::default();
        history.on_release(&release(seq, Policy::default()), key(1));
        history
    }

    #[test]
    fn the_newest_come_first_and_the_oldest_go() {
        let mut history = History::default();
        let last = 3 * RELEASES_KEPT as u64;
        // Every other one first, then all.
        for seq in (1..=last).step_by(2).chain(1..=last) {
            history.on_release(&release(seq, Policy::default()), key(1));
        }
        let kept: Vec<u64> = history.entries().map(|entry| entry.id.seq).collect();
        let expected: Vec<u64> = (last + 1 - RELEASES_KEPT as u64..=last).rev().collect();
        assert_eq!(kept, expected);
        history.on_statement(&commit(1), key(1));
        assert!(history.entry(&id(1)).is_none(), "an old one pushes out no newer one");
    }

    #[test]
    fn what_is_said_comes_in_any_order() {
        let mut history = History::default();
        let abort = Statement { word: Word::Abort, reason: "no".to_string(), ..commit(1) };
        history.on_statement(&abort, key(2));
        let said = |history: &History| history.entry(&id(1)).unwrap().word.as_ref().map(|s| (s.word, s.by));
        assert_eq!(said(&history), Some((Word::Abort, key(2))));
        assert_eq!(history.entry(&id(1)).unwrap().made, None);
        history.on_release(&release(1, Policy::default()), key(1));
        history.on_release(&release(1, Policy::default()), key(3));
        assert_eq!(history.entry(&id(1)).unwrap().made.as_ref().unwrap().publisher, key(1));
        history.on_statement(&commit(1), key(1));
        history.on_statement(&abort, key(2));
        assert_eq!(said(&history), Some((Word::Commit, key(1))));
    }

    #[test]
    fn of_each_member_the_farthest_counts() {
        let mut history = heard(1);
        let steps = [
            (Step::Waiting, Phase::Staged, "waits for a"),
            (Step::Going, Phase::Paused, ""),
            // Late, and twice.
            (Step::Waiting, Phase::Staged, "waits for b"),
            (Step::Going, Phase::Paused, "switching"),
        ];
        for (step, phase, reason) in steps {
            history.on_report(node(1), &report(1, step, phase, reason));
        }
        history.on_report(node(2), &report(1, Step::Waiting, Phase::Failed, "too large"));
        let entry = history.entry(&id(1)).unwrap();
        let first = &entry.members[&node(1)];
        assert_eq!((first.step, first.phase, first.reason.as_str()), (Step::Going, Phase::Paused, "switching"));
        assert_eq!((first.times.at(Phase::Staged), first.times.at(Phase::Paused)), (Some(7), Some(7)));
        assert_eq!(entry.by_phase(), BTreeMap::from([(Phase::Paused, 1), (Phase::Failed, 1)]));
        assert_eq!(entry.by_step(), BTreeMap::from([(Step::Waiting, 1), (Step::Going, 1)]));
        // A node that was started anew has no times, and takes none away.
        let again = Report { times: Times::default(), ..report(1, Step::Done, Phase::Ready, "") };
        history.on_report(node(1), &again);
        let first = &history.entry(&id(1)).unwrap().members[&node(1)];
        assert_eq!((first.phase, first.times.at(Phase::Staged)), (Phase::Ready, Some(7)));
    }

    #[test]
    fn who_is_named_and_silent_is_told() {
        let mut history = History::default();
        let named = |n| Named { node: node(n), canary: false, group: 0 };
        let policy = Policy { roster: vec![named(1), named(2)], ..Policy::default() };
        history.on_release(&release(1, policy), key(1));
        history.on_report(node(2), &report(1, Step::Waiting, Phase::Heard, ""));
        assert_eq!(history.entry(&id(1)).unwrap().unheard().collect::<Vec<_>>(), [&node(1)]);
    }

    #[test]
    fn liars_and_crowds_take_no_room() {
        let mut history = heard(1);
        history.on_report(node(1), &report(2, Step::Done, Phase::Ready, "invented"));
        assert_eq!(history.entries().count(), 1);
        (0..MEMBERS_MAX + 9).for_each(|n| history.on_report(node(n), &report(1, Step::Waiting, Phase::Heard, "")));
        let long = "x".repeat(REPORT_REASON_BYTES_MAX * 2);
        history.on_report(node(3), &report(1, Step::Done, Phase::Ready, &long));
        let entry = history.entry(&id(1)).unwrap();
        assert_eq!(entry.members.len(), MEMBERS_MAX);
        let progress = &entry.members[&node(3)];
        assert_eq!((progress.phase, progress.reason.len()), (Phase::Ready, REPORT_REASON_BYTES_MAX));
    }
}
