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
use aquifer_core::{How, OnFailure, Policy, Release, ReleaseId, Time};
use std::collections::BTreeMap;
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
    /// What a publisher is to do about the newest release, if it failed. None also if it is not known here what
    /// was served before, or if there are more nodes than a release may name.
    pub fn remedy(&self) -> Option<Remedy> {
        let (_, since) = self.troubled?;
        let (failed, to) = self.trouble()?;
        let How::Synchronous { deadline_ms, .. } = failed.policy.how else { return None };
        // Of any number a majority is made.
        let how = How::Synchronous { required: Required::Count(1), deadline_ms, on_failure: OnFailure::Stay };
        let (subset, pinned) = (failed.policy.subset.clone(), failed.policy.pinned);
        let policy = self.with_roster(Policy { subset, pinned, how, roster: vec![] })?;
        let (count, first) = self.failures(failed);
        let reason = format!("{} failed at {count} of {} nodes; one: {first}", failed.seq, failed.policy.roster.len());
        Some(Remedy { failed: failed.id(), to: to.clone(), policy, reason, since })
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
        let (failed, to) = match (self.lane.is_committed(&newest.id()), newest.rolls_back_to) {
            (true, _) => (newest, self.served_before(newest)?),
            // A way back that came to nothing because somebody did not answer in time: those who are there
            // now may get farther. If a person gave it up, it stays at that.
            (false, Some(seq)) if self.ran_out == Some(true) => {
                let older = self.lane.newest_first().filter(|r| r.id() < newest.id());
                let failed = older.into_iter().find(|r| self.lane.is_committed(&r.id()))?;
                (failed, self.lane.get(&ReleaseId { seq, manifest: newest.manifest })?)
            }
            (false, _) => return None,
        };
        let How::Synchronous { required, on_failure: OnFailure::RollBack, .. } = failed.policy.how else {
            return None;
        };
        let roster = failed.policy.roster.len();
        let (count, _) = self.failures(failed);
        (count > roster - required.of(roster)).then_some((failed, to))
    }

    /// At how many of its roster it failed, and what one of them says.
    fn failures(&self, release: &Release) -> (usize, &str) {
        let here = self.stand.as_ref().filter(|s| s.wanted == release.id()).and_then(|s| s.failed.as_deref());
        let here = here.map(|reason| (&self.me, reason));
        let elsewhere = self.past.failures(release.id()).filter(|(node, _)| **node != self.me);
        let all = here.into_iter().chain(elsewhere).filter(|(node, _)| release.policy.entry(node).is_some());
        let reasons: Vec<&str> = all.map(|(_, reason)| reason).collect();
        (reasons.len(), reasons.first().copied().unwrap_or(""))
    }

    /// What most of the roster served before it, as they say: one alone could name anything.
    fn served_before(&self, release: &Release) -> Option<&Release> {
        let of_roster = self.view.reports().filter(|(node, _, _)| release.policy.entry(node).is_some());
        let reports = of_roster.map(|(_, _, report)| report).chain(&self.said);
        let mut bases: BTreeMap<ReleaseId, usize> = BTreeMap::new();
        for base in reports.filter(|r| r.wanted == release.id()).filter_map(|r| r.base) {
            *bases.entry(base).or_default() += 1;
        }
        let all: usize = bases.values().sum();
        let (base, _) = bases.into_iter().find(|(_, count)| count * 2 > all)?;
        self.lane.get(&base).filter(|base| base.id() < release.id())
    }
}
