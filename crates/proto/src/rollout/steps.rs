//! A node's steps through a release: what each policy lets it do next.

use super::turns::{Heard, Turns, Wait};
use super::{Override, Rollout, Stand, together};
use crate::limits::ROLLOUT_SILENCE;
use aquifer_core::{How, NodeId, Phase, Release, ReleaseId, Report, Step, Time, Times};

impl Rollout {
    /// Turns to the release that is to be had now, if it is another one than before.
    pub(super) fn choose(&mut self, now: Time) {
        let next = match self.overridden {
            Override::Follow => self.lane.wanted(),
            Override::Pinned(manifest) => self.lane.newest_first().find(|r| r.manifest == manifest),
        };
        let Some(next) = next.map(Release::id) else { return };
        match &self.stand {
            // What it stood for in an earlier life has not been heard of again yet.
            Some(stand) if self.lane.get(&stand.wanted).is_none() && next < stand.wanted => return,
            Some(stand) if stand.wanted == next => {}
            stand => {
                self.stand = Some(superseded(stand.as_ref(), self.is_synchronous(), next));
                (self.since, self.ranked, self.ran_out, self.times) = (now, None, None, Times::default());
                self.times.reach(Phase::Heard, 0);
            }
        }
        if self.ranked != Some(next) {
            (self.ranked, self.opened, self.heard) = (Some(next), None, Heard::default());
            self.turns = match self.release().map(|r| (&r.policy.how, &r.policy.roster)) {
                Some((How::Rolling { max_unavailable, .. }, roster)) => Turns::of(next, roster, *max_unavailable),
                _ => Turns::default(),
            };
            self.hear_again(now);
        }
    }

    /// Takes one step, if there is one to take.
    pub(super) fn take_step(&mut self, now: Time) -> bool {
        let (Some(before), Some(release)) = (self.stand.clone(), self.release().cloned()) else { return false };
        let (mut stand, always) = (before.clone(), || true);
        self.find_base(&mut stand, &release);
        self.open_base(now, &mut stand);
        if stand.failed.is_none() {
            stand.failed = self.failure(&release);
        }
        stand.step = match release.policy.how {
            _ if self.overridden != Override::Follow => self.step_alone(&stand, always, always),
            How::AtOnce => self.step_alone(&stand, always, always),
            How::Manual => self.step_alone(&stand, || self.lane.is_committed(&release.id()), always),
            How::Rolling { .. } => {
                let may_return = || self.turns.may_return(&self.me, &self.heard).is_ok();
                self.step_alone(&stand, || self.is_in_turn(&release), may_return)
            }
            How::Synchronous { .. } => self.step_together(now, &stand, &release),
        };
        // It came to serve it after all: where all switch together, that is all that is asked.
        if stand.step == Step::Done && release.policy.is_synchronous() && self.all_serve(&release.manifest) {
            stand.failed = None;
        }
        let changed = stand != before;
        self.stand = Some(stand);
        changed
    }

    /// Where a node goes by itself: `may_go`, once it is prepared; `may_return`, once it failed.
    fn step_alone(&self, stand: &Stand, may_go: impl Fn() -> bool, may_return: impl Fn() -> bool) -> Step {
        let failed = stand.failed.is_some();
        match stand.step {
            Step::Waiting if failed && self.is_at_rest() => Step::Halted,
            Step::Waiting if !failed && self.is_prepared(stand) && may_go() => Step::Going,
            Step::Going if failed => Step::GoingBack,
            Step::Going if self.all_serve(&stand.wanted.manifest) => Step::Done,
            Step::Done if failed && stand.base.is_some() && may_return() => Step::GoingBack,
            Step::GoingBack if self.is_at_rest() => Step::Halted,
            step @ (Step::Waiting | Step::Going | Step::Done | Step::GoingBack | Step::Halted) => step,
        }
    }

    /// Not before what it serves now is what it should, for it might be out for an earlier release.
    fn is_in_turn(&self, release: &Release) -> bool {
        let joins = self.engines.none_serves();
        let turn = (joins || self.is_at_rest()) && self.may_go(release).is_ok();
        let came_later = release.policy.entry(&self.me).is_none();
        turn || (joins && came_later && self.is_everywhere(release))
    }

    pub(super) fn may_go(&self, release: &Release) -> Result<(), Wait> {
        let others = together::group_beside_roster(release, &self.view);
        self.turns.may_go(&self.me, &self.heard, others)
    }

    fn step_together(&mut self, now: Time, stand: &Stand, release: &Release) -> Step {
        match stand.step {
            Step::Waiting if self.lane.is_committed(&release.id()) => Step::Going,
            Step::Going => {
                if self.opened.is_none() {
                    self.awaited = self.look(now, release).err();
                    self.opened = self.awaited.is_none().then_some(now);
                }
                let done = self.opened.is_some() && self.all_serve(&stand.wanted.manifest);
                if done { Step::Done } else { Step::Going }
            }
            step @ (Step::Waiting | Step::Done | Step::GoingBack | Step::Halted) => step,
        }
    }

    /// Its engines could switch at once, or have nothing to lose.
    pub(super) fn is_prepared(&self, stand: &Stand) -> bool {
        let prepared = self.engines.phase(&stand.wanted.manifest).is_prepared();
        self.are_all_here() && (prepared || self.engines.none_serves())
    }

    fn failure(&self, release: &Release) -> Option<String> {
        if let Some(reason) = self.engines.failure(&release.manifest) {
            return Some(reason.to_string());
        }
        if !matches!(release.policy.how, How::Rolling { .. }) {
            return None;
        }
        if let Some(statement) = self.lane.aborted(&release.id()) {
            return Some(format!("aborted: {}", statement.reason));
        }
        let node = self.heard.failed()?;
        let reason = self.view.report(&node).map_or("", |report| report.reason.as_str());
        // Told on as it was told, by whichever node failed.
        Some(if reason.contains(": ") { reason.to_string() } else { format!("{}: {reason}", node.short()) })
    }

    /// What to serve until the release may be: what the engines serve already, or what is called for
    /// where a node comes anew.
    fn find_base(&self, stand: &mut Stand, release: &Release) {
        let at_rest = matches!(stand.step, Step::Waiting | Step::Going | Step::Halted);
        if stand.base.is_none() && at_rest && self.are_all_here() {
            if let Some(served) = self.engines.served().filter(|served| *served != release.manifest) {
                let known = self.lane.newest_first().find(|r| r.manifest == served && r.id() < release.id());
                stand.base = Some(known.map_or(ReleaseId { seq: 0, manifest: served }, Release::id));
                stand.is_base_open = !known.is_some_and(|r| r.policy.is_synchronous());
            } else if stand.step != Step::Going && self.engines.none_serves() {
                let older = self.lane.newest_first().filter(|r| r.id() < release.id());
                let found = older.into_iter().find(|r| self.is_everywhere(r));
                stand.base = found.map(Release::id);
                // That it is committed says nothing of who has heard so.
                stand.is_base_open = !found.is_some_and(|r| r.policy.is_synchronous());
            }
        }
        // Its commit came late, or was never heard: it counts all the same.
        let between = self.lane.synchronous_between(stand.base, stand.wanted).filter(|r| r.id() != stand.wanted);
        if let Some(committed) = between.filter(|r| self.lane.is_committed(&r.id())).last()
            && at_rest
        {
            (stand.base, stand.is_base_open) = (Some(committed.id()), false);
        }
    }

    fn open_base(&mut self, now: Time, stand: &mut Stand) {
        if stand.is_base_open {
            return;
        }
        let base = stand.base.and_then(|base| self.lane.get(&base)).filter(|r| r.policy.is_synchronous()).cloned();
        let looked = base.map_or(Ok(()), |base| self.look(now, &base));
        (stand.is_base_open, self.awaited) = (looked.is_ok(), looked.err());
    }

    fn look(&mut self, now: Time, release: &Release) -> Result<(), NodeId> {
        let was_there = self.is_first_life && release.policy.entry(&self.me).is_some();
        let knows_all = was_there || now.since(self.start) >= ROLLOUT_SILENCE;
        self.past.look(now, &self.me, release, &self.view, knows_all)
    }

    /// Whether a newcomer takes this release without waiting for a turn: it is not on its way any
    /// more, as far as can be seen, and more than canaries have it.
    fn is_everywhere(&self, release: &Release) -> bool {
        let id = release.id();
        match release.policy.how {
            How::AtOnce => return true,
            How::Manual | How::Synchronous { .. } => return self.lane.is_committed(&id),
            How::Rolling { .. } => {}
        }
        let has = |report: &Report| {
            let arrived = report.wanted != id || report.step == Step::Done;
            arrived && report.settled && report.served == Some(id.manifest) && report.due() == Some(id)
        };
        let beyond = |report: &Report| report.base.is_some_and(|base| base > id);
        let concerned = |labels: &[(String, String)]| release.policy.subset.matches(labels);
        let mut seen = self.view.reports().filter(|(_, seen, report)| concerned(&seen.labels) && !report.held);
        if seen.any(|(_, _, report)| !has(report) && !beyond(report)) || self.heard.failed().is_some() {
            return false;
        }
        let roster = &release.policy.roster;
        let there = roster.iter().filter(|e| self.view.report(&e.node).is_some_and(&has));
        let (mut most, mut others) = (0, roster.iter().all(|e| e.canary));
        for entry in there {
            most += 1;
            others |= !entry.canary;
        }
        others && (most * 2 > roster.len() || roster.is_empty())
    }
}

/// Where a node stands that a newer release reaches: with what it served.
fn superseded(stand: Option<&Stand>, was_synchronous: bool, wanted: ReleaseId) -> Stand {
    let engines = stand.map_or(0, |stand| stand.engines);
    let (base, is_base_open) = match stand {
        None => (None, true),
        Some(stand) if stand.step == Step::Done => (Some(stand.wanted), true),
        // It has given its word never to be ready with the one before.
        Some(stand) if stand.step == Step::Going && was_synchronous => (Some(stand.wanted), false),
        Some(stand) => (stand.base, stand.is_base_open),
    };
    Stand { wanted, step: Step::Waiting, base, is_base_open, engines, failed: None }
}
