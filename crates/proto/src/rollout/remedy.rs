//! What a publisher is to do about a synchronous release that fails once it is committed.
//!
//! Nobody can take a commit back: others may have switched. So the way back is a release of its own, with the manifest
//! that was served before, switched to together as well. It is called for when so many of the roster
//! failed that the release would not have been committed had they failed before: the publisher said
//! itself how many it needs. (Where all are required, that is one.)
//!
//! A way back takes a majority and not what the failed release required, because where that failed an engine may
//! be in no state to take anything; and its own failure leads nowhere further.

use super::Rollout;
use aquifer_core::policy::Required;
use aquifer_core::{How, NodeId, OnFailure, Phase, Policy, Release, ReleaseId, Report, Time};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// "Release this, as a rollback." The number of the new release is for the driver to find: one more than that
/// of the newest it knows. Only one holder of the key is to follow, since two who gave one number to two
/// rosters would be taken for one: the node that made the failed release at once; another only once that one has not
/// done it for [`crate::limits::ROLLOUT_SILENCE`] after `since`, and is not heard of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// What failed.
    pub failed: ReleaseId,
    /// What is to be served instead. The new release takes its manifest and says to roll back to its number.
    pub to: Release,
    /// Of the new release, with its roster.
    pub policy: Policy,
    /// For people: where it failed, and why. It may serve as the new release's note.
    pub reason: String,
    /// Since when this is called for.
    pub since: Time,
}

impl Rollout {
    /// What a publisher is to do about the newest release, if it failed. None also as long as it hears too few of
    /// its nodes, if it is not known here what was served before, or if there are more nodes than a release may name.
    pub fn remedy(&self, now: Time) -> Option<Remedy> {
        let (_, since) = self.troubled?;
        let (failed, to) = self.trouble()?;
        if !self.sees_enough(now, failed) {
            return None;
        }
        let How::Synchronous { deadline_ms, .. } = failed.policy.how else { return None };
        // Of any number a majority is made.
        let how = How::Synchronous { required: Required::Count(1), deadline_ms, on_failure: OnFailure::Stay };
        let (subset, pinned) = (failed.policy.subset.clone(), failed.policy.pinned);
        let policy = self.with_roster(Policy { subset, pinned, how, roster: vec![] })?;
        let failures: Vec<&str> = self.accounts.failures(failed).collect();
        let (count, first) = (failures.len(), failures.first()?);
        let reason =
            format!("release {} failed at {count} of {} nodes; one: {first}", failed.seq, failed.policy.roster.len());
        Some(Remedy { failed: failed.id(), to: to.clone(), policy, reason, since })
    }

    /// Whether the roster of the way back would be no chance selection: of the failed release's, most are there, and
    /// who is not is gone, and not only unheard of by one who has just started. Who is left out might serve on.
    fn sees_enough(&self, now: Time, failed: &Release) -> bool {
        let roster = &failed.policy.roster;
        let is_there = |node: &NodeId| *node == self.me || self.view.is_there(node);
        let there = roster.iter().filter(|e| is_there(&e.node)).count();
        there * 2 > roster.len() && roster.iter().all(|e| is_there(&e.node) || self.view.is_silent(now, &e.node))
    }

    /// Since when it has been called for, and by which release.
    pub(super) fn look_for_trouble(&mut self, now: Time) {
        if self.ran_out.is_none()
            && let Some(release) = self.release().filter(|r| self.lane.aborted(&r.id()).is_some())
            && let How::Synchronous { deadline_ms, .. } = release.policy.how
        {
            self.ran_out = Some(now.since(self.since) >= Duration::from_millis(deadline_ms));
        }
        let failed = self.trouble().map(|(failed, _)| failed.id());
        self.troubled = failed.map(|failed| match self.troubled {
            Some((known, since)) if known == failed => (failed, since),
            _ => (failed, now),
        });
    }

    /// A release that is to be undone, and the one to go back to.
    fn trouble(&self) -> Option<(&Release, &Release)> {
        let newest = self.release()?;
        let failed = match self.lane.is_committed(&newest.id()) {
            true => newest,
            // Another came, and came to nothing. If it was the way back, it is tried again with those who are there
            // now; unless a person gave it up, for then it stays at that.
            false if self.ran_out? || newest.rolls_back_to.is_none() => {
                let mut older = self.lane.newest_first().filter(|r| r.id() < newest.id());
                older.find(|r| self.lane.is_committed(&r.id()))?
            }
            false => return None,
        };
        let How::Synchronous { required, on_failure: OnFailure::RollBack, .. } = failed.policy.how else {
            return None;
        };
        let roster = failed.policy.roster.len();
        let to = self.lane.get(&self.accounts.served_before(failed)?)?;
        (self.accounts.failures(failed).count() > roster - required.of(roster)).then_some((failed, to))
    }
}

/// What the roster of each synchronous release said of it last: also when a newer one has come.
#[derive(Debug, Default)]
pub(super) struct Accounts(BTreeMap<ReleaseId, BTreeMap<NodeId, Account>>);

#[derive(Debug)]
struct Account {
    base: Option<ReleaseId>,
    failed: Option<String>,
}

impl Accounts {
    /// Forgets all releases but `kept`.
    pub(super) fn keep(&mut self, kept: &BTreeSet<ReleaseId>) {
        self.0.retain(|id, _| kept.contains(id));
        for id in kept {
            self.0.entry(*id).or_default();
        }
    }

    pub(super) fn on_report(&mut self, node: NodeId, report: &Report) {
        let Some(of) = self.0.get_mut(&report.wanted) else { return };
        let failed = (report.phase == Phase::Failed).then(|| report.reason.clone());
        of.insert(node, Account { base: report.base, failed });
    }

    fn of_roster<'a>(&'a self, release: &'a Release) -> impl Iterator<Item = &'a Account> {
        let all = self.0.get(&release.id()).into_iter().flatten();
        all.filter(|(node, _)| release.policy.entry(node).is_some()).map(|(_, account)| account)
    }

    fn failures<'a>(&'a self, release: &'a Release) -> impl Iterator<Item = &'a str> {
        self.of_roster(release).filter_map(|account| account.failed.as_deref())
    }

    /// What most of the roster served before it, as they say: one alone could name anything.
    fn served_before(&self, release: &Release) -> Option<ReleaseId> {
        let mut bases: BTreeMap<ReleaseId, usize> = BTreeMap::new();
        for base in self.of_roster(release).filter_map(|account| account.base) {
            *bases.entry(base).or_default() += 1;
        }
        let all: usize = bases.values().sum();
        bases.into_iter().find(|(base, count)| count * 2 > all && *base < release.id()).map(|(base, _)| base)
    }
}
