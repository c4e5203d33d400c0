//! Synchronous releases: two-phase commit, and why nobody is ready with the old release once somebody
//! is with the new one.
//!
//! A node is *past* a release once it has heard the commit: it is never again ready with an older one
//! because it missed that. A release is *open* at a node when, of its group (the roster, and whoever
//! else reports),
//! - a majority of the roster is past it, and
//! - everybody else is past it, or has been silent for [`ROLLOUT_SILENCE`]; and where somebody is silent, that
//!   majority has been past it for as long.
//!
//! Each node looks for itself, and only then is ready with the new release. It takes nobody's word for it: one
//! that lies is one vote of many, and cannot open a release that some who are heard have not heard to be committed.
//!
//! As long as a node has not heard the commit it may have missed it: it is *in doubt*, and ready with
//! the old release only while
//! - a majority of the roster is heard and not missed, and
//! - nobody is known to be past it.
//!
//! So two majorities have a node in common. Say the release is open, somebody of the roster is not past it, and takes
//! itself to hear a majority. That has a node in common with those that have been past it for the silence. What was
//! heard of this one last, within a member's time-out, is newer than that, for the silence is two time-outs: so it
//! says that it is past, and who heard it is not ready. Whom else it hears, for how long, and who hears whom, matters not:
//! the network may part, and part otherwise, at any moment. What is assumed beyond: no clock runs
//! half as fast as another, and no record is on its way for as long as that leaves. No two nodes' times are compared.
//!
//! Without the last condition, one that leaves the side of those in doubt, and takes the commit with it to the other,
//! would open the release there while it is not yet missed here.
//!
//! Somebody who came after the roster was made may be in doubt, cut off, and not yet have noticed. Who was there
//! then has heard it, and waits for it. Who has just started has not: it lets as much time pass
//! as it takes to notice, unless its name in the roster says that it was there in this life when that was made.
//!
//! Who has not heard of the release is not in doubt. So it is committed only when everybody in the
//! roster has answered, prepared or not: a node that was cut off before it heard would stay ready with the
//! old one. Who was cut off when the roster was made is none of the group until it hears.
//!
//! There is no need to hear an abort (it is presumed as long as there is no commit), so a publisher
//! that dies before the commit leaves everybody with the old release, and any holder of the key may
//! still say either word.

use super::view::View;
use crate::limits::ROLLOUT_SILENCE;
use aquifer_core::policy::Required;
use aquifer_core::{NodeId, Phase, Release, ReleaseId, Report, Step, Time};
use std::collections::{BTreeMap, BTreeSet};

/// Who was ever heard to be past a synchronous release, and which are open.
#[derive(Debug, Default)]
pub(super) struct Past {
    /// And since when.
    past: BTreeMap<ReleaseId, BTreeMap<NodeId, Time>>,
    open: BTreeSet<ReleaseId>,
}

impl Past {
    /// Forgets all releases but `kept`.
    pub(super) fn keep(&mut self, kept: &BTreeSet<ReleaseId>) {
        self.past.retain(|id, _| kept.contains(id));
        self.open.retain(|id| kept.contains(id));
        for id in kept {
            self.past.entry(*id).or_default();
        }
    }

    pub(super) fn on_report(&mut self, now: Time, node: NodeId, report: &Report) {
        for (release, nodes) in &mut self.past {
            if is_past(report, release) {
                nodes.entry(node).or_insert(now);
            }
        }
    }

    /// Looks whether the release opens to `me`, which is past it; if not, for whom it waits. `knows_all`: whoever was
    /// there when it started has been heard by now. If not, it waits for itself.
    pub(super) fn look(
        &mut self,
        now: Time,
        me: &NodeId,
        release: &Release,
        view: &View,
        knows_all: bool,
    ) -> Result<(), NodeId> {
        let id = release.id();
        if self.open.contains(&id) {
            return Ok(());
        }
        let past = self.past.entry(id).or_default();
        past.entry(*me).or_insert(now);
        let is_past = |node: &NodeId| past.contains_key(node);
        let behind = |node: &NodeId| !is_past(node) && !view.is_silent(now, node);
        let roster: Vec<NodeId> = release.policy.roster.iter().map(|e| e.node).collect();
        let group = roster.iter().chain(group_beside_roster(release, view)).chain(missed_beside_roster(release, view));
        let unsure: Vec<&NodeId> = group.filter(|node| !is_past(node) && !is_held(view, node)).collect();
        if let Some(node) = unsure.iter().find(|node| behind(node)) {
            return Err(**node);
        }
        // Who was missed before it heard of the release is not in doubt of it.
        let may_doubt =
            |node: &&NodeId| roster.contains(node) || view.last_report(node).is_some_and(|report| report.wanted >= id);
        let doubter = unsure.iter().copied().find(may_doubt);
        let waited = |since: &Time| doubter.is_none() || now.since(*since) >= ROLLOUT_SILENCE;
        let counted = roster.iter().filter(|node| past.get(node).is_some_and(waited)).count();
        if let Some(node) = doubter.or_else(|| roster.iter().find(|node| !is_past(node)))
            && counted * 2 <= roster.len()
        {
            return Err(*node);
        }
        if !knows_all {
            return Err(*me);
        }
        self.open.insert(id);
        Ok(())
    }

    /// Why `me`, which has heard no commit, cannot be sure that the release is open to nobody. None: it can.
    pub(super) fn doubt(&self, me: &NodeId, release: &Release, view: &View) -> Option<Doubt> {
        let past = self.past.get(&release.id()).and_then(|past| past.keys().find(|node| *node != me));
        let roster = &release.policy.roster;
        let heard = roster.iter().filter(|e| e.node == *me || view.is_there(&e.node)).count();
        match past {
            Some(node) => Some(Doubt::Past(*node)),
            None if heard * 2 > roster.len() || roster.is_empty() => None,
            None => Some(Doubt::Few { heard, roster: roster.len() }),
        }
    }
}

/// Why a node may have missed a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// This one says to have heard it.
    Past(NodeId),
    /// No majority is heard.
    Few { heard: usize, roster: usize },
}

fn is_past(report: &Report, release: &ReleaseId) -> bool {
    report.base.is_some_and(|base| base >= *release) || (report.wanted == *release && report.step >= Step::Going)
}

fn is_held(view: &View, node: &NodeId) -> bool {
    view.report(node).is_some_and(|r| r.held)
}

/// Those that came after the release was made, or were not seen then.
pub(super) fn group_beside_roster<'a>(release: &'a Release, view: &'a View) -> impl Iterator<Item = &'a NodeId> {
    let concerned = view.reports().filter(|(_, seen, _)| release.policy.subset.matches(&seen.labels));
    concerned.map(|(node, _, _)| node).filter(|node| release.policy.entry(node).is_none())
}

/// Of those, who is missed. It may be in doubt, and ready until it notices that it is cut off.
fn missed_beside_roster<'a>(release: &'a Release, view: &'a View) -> impl Iterator<Item = &'a NodeId> {
    let concerned = |labels: &[(String, String)]| release.policy.subset.matches(labels);
    let missed = view.missed().filter(move |(_, seen, report)| concerned(&seen.labels) && !report.held);
    missed.map(|(node, _, _)| node).filter(|node| release.policy.entry(node).is_none())
}

/// Whether some engine of the group is still about to pause for the release: those that answer from
/// the new one wait a moment for it, so that requests see no mixture either.
pub(super) fn somebody_pauses(release: &Release, view: &View) -> bool {
    let pauses = |report: &Report| {
        report.wanted == release.id() && report.phase == Phase::Staged && report.step == Step::Going && !report.held
    };
    let concerned = |node: &NodeId, labels: &[(String, String)]| {
        release.policy.entry(node).is_some() || release.policy.subset.matches(labels)
    };
    view.reports().any(|(node, seen, report)| concerned(node, &seen.labels) && pauses(report))
}

/// What a publisher is to say of its synchronous release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Commit,
    Abort(String),
    /// For how many.
    Wait {
        answered: usize,
        prepared: usize,
        required: usize,
        roster: usize,
    },
}

/// Counts the roster. `reports` are its own, as far as there are any now; `answered`, how many have
/// ever reported on the release. `in_time`: the deadline has not passed.
pub(super) fn verdict<'a>(
    release: &Release,
    required: Required,
    reports: impl Iterator<Item = &'a Report>,
    answered: usize,
    in_time: bool,
) -> Verdict {
    let roster = release.policy.roster.len();
    let required = required.of(roster);
    let about: Vec<&Report> = reports.filter(|r| r.wanted == release.id()).collect();
    let prepared = about.iter().filter(|r| r.phase.is_prepared()).count();
    let failed: Vec<&&Report> = about.iter().filter(|r| r.phase == Phase::Failed).collect();
    if prepared >= required && answered == roster {
        return Verdict::Commit;
    }
    if let Some(first) = failed.first().filter(|_| failed.len() > roster - required) {
        return Verdict::Abort(format!("{} of {roster} nodes cannot take it; one: {}", failed.len(), first.reason));
    }
    if in_time {
        return Verdict::Wait { answered, prepared, required, roster };
    }
    Verdict::Abort(match answered == roster {
        true => format!("only {prepared} of {roster} nodes were prepared in time, {required} had to be"),
        false => {
            format!("only {answered} of {roster} nodes answered in time: release again without those that are gone")
        }
    })
}
