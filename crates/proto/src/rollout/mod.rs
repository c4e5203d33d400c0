//! Rollouts: which release each engine of this node is to serve, and when it may switch.
//!
//! One [`Rollout`] is one node's part in one channel. Nobody leads: each node decides by the policy
//! that the publisher signed, by what the publisher said of it since ([`aquifer_core::Statement`]), and by the
//! reports of the others, which travel in their status records. What it relies on of another node's report
//! stays true once it was said (see `turns` and `together`), so late, lost and repeated records
//! do no harm, and who hears too little waits.
//!
//! What always holds, of the nodes that do not lie, and is checked by `tests/rollout`:
//! 1. Synchronous: once the release is open to one node (see `together`), none of its group is ready
//!    with an older one.
//! 2. Rolling: of a group of the roster, never more than `max_unavailable` are out because of it.
//! 3. A node is ready only if all its engines answer from the release it is due to serve, whole and
//!    checked; and never with one that failed its check there.
//! 4. Once faults have stopped, everybody gets to an end: what was released, or what was served before; but for who
//!    cannot take what is committed, and is not ready.

mod engines;
pub mod history;
mod lane;
mod reasons;
mod remedy;
mod roster;
mod state;
mod steps;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod together;
mod turns;
mod view;

pub use engines::{EngineId, Facts, Order, Until};
pub use history::{History, Progress};
pub use remedy::Remedy;
pub use state::Stand;
pub use together::Verdict;

use crate::limits::{REVIEW_INTERVAL, ROLLOUT_HOLD, ROLLOUT_SILENCE};
use aquifer_core::limits::REPORT_REASON_BYTES_MAX;
use aquifer_core::text::shorten;
use aquifer_core::{
    How, ManifestHash, NodeId, Phase, Release, ReleaseId, Report, Selector, Statement, Step, Time, Times,
};
use bincode::{Decode, Encode};
use engines::Engines;
use lane::Lane;
use remedy::Accounts;
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;
use together::{Doubt, Past};
use turns::{Heard, Turns};
use view::View;

/// What happened. Signatures are checked, and signers trusted, before it comes here.
#[derive(Clone, Debug)]
pub enum RolloutInput {
    Release(Release),
    /// Those that became known together: none of them is turned to but the last.
    Releases(Vec<Release>),
    Statement(Statement),
    /// What a member says of itself; `report`: of this channel.
    Member {
        node: NodeId,
        labels: Vec<(String, String)>,
        report: Option<Report>,
    },
    /// It is not heard of any more, or has said goodbye.
    Gone {
        node: NodeId,
    },
    Engine {
        engine: EngineId,
        facts: Facts,
    },
    EngineGone {
        engine: EngineId,
    },
}

/// What to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RolloutOutput {
    /// Remember this over restarts, before anything else is done.
    Keep(Stand),
    Order {
        engine: EngineId,
        order: Order,
    },
    /// What to say of this channel in the status record. None: nothing any more.
    Report(Option<Report>),
}

/// What an operator wants of this node alone, whatever releases say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum Override {
    #[default]
    Follow,
    /// To stay with this manifest, or go to it, by itself.
    Pinned(ManifestHash),
}

/// One node's part in the rollouts of one channel. See the module.
#[derive(Debug)]
pub struct Rollout {
    me: NodeId,
    lane: Lane,
    overridden: Override,
    view: View,
    engines: Engines,
    /// How many there have to be before it is known what all of them do.
    expected: usize,
    /// Whether there was one, in this life or when the last ended. Who only publishes has none.
    had_engines: bool,
    start: Time,
    /// It had never heard of a release when it started.
    is_first_life: bool,
    /// None until a release was heard.
    stand: Option<Stand>,
    /// Since when this life stands there: the publisher's deadline counts from it.
    since: Time,
    /// Since then. Empty if an earlier life heard of the release, and knows.
    times: Times,
    /// Of the wanted release, as those after it.
    ranked: Option<ReleaseId>,
    turns: Turns,
    heard: Heard,
    past: Past,
    /// Since when the wanted release is open here, if it is synchronous.
    opened: Option<Time>,
    /// Who was not past a release that is to be open here, when it was looked last.
    awaited: Option<NodeId>,
    /// Whether the wanted release was given up because its time was up. None: it was not given up.
    ran_out: Option<bool>,
    accounts: Accounts,
    /// What a publisher should undo, and since when.
    troubled: Option<(ReleaseId, Time)>,
    kept: Option<Stand>,
    said: Option<Report>,
    out: VecDeque<RolloutOutput>,
    review_at: Option<Time>,
}

impl Rollout {
    /// `saved`: what the last [`RolloutOutput::Keep`] of an earlier life said.
    pub fn new(
        me: NodeId,
        labels: Vec<(String, String)>,
        overridden: Override,
        saved: Option<Stand>,
        now: Time,
    ) -> Self {
        Rollout {
            me,
            lane: Lane::new(labels),
            overridden,
            view: View::new(now),
            engines: Engines::default(),
            expected: saved.as_ref().map_or(0, |stand| usize::try_from(stand.engines).unwrap_or(usize::MAX)),
            had_engines: saved.as_ref().is_some_and(|stand| stand.engines > 0),
            start: now,
            is_first_life: saved.is_none(),
            stand: saved.clone(),
            since: now,
            times: Times::default(),
            ranked: None,
            turns: Turns::default(),
            heard: Heard::default(),
            past: Past::default(),
            opened: None,
            awaited: None,
            ran_out: None,
            accounts: Accounts::default(),
            troubled: None,
            kept: saved,
            said: None,
            out: VecDeque::new(),
            review_at: None,
        }
    }

    /// The view of one that takes no part, for a publisher: whom it may name, what it is to say of a release for
    /// `selector`, and what to do if that fails. Its own node may have other labels, be pinned, or have no engines.
    /// It is told releases, statements and members, its own node among them, and no engines; of what it puts out nothing
    /// is needed.
    pub fn onlooker(selector: &Selector, now: Time) -> Self {
        Rollout::new(NodeId([0; 32]), selector.labels().to_vec(), Override::Follow, None, now)
    }

    pub fn handle(&mut self, now: Time, input: RolloutInput) {
        match input {
            RolloutInput::Release(release) => self.on_releases(now, vec![release]),
            RolloutInput::Releases(releases) => self.on_releases(now, releases),
            RolloutInput::Statement(statement) => self.lane.on_statement(statement),
            RolloutInput::Member { node, .. } if node == self.me => {}
            RolloutInput::Member { node, labels, report } => {
                self.hear(now, node, report.as_ref());
                self.view.on_member(node, labels, report);
            }
            RolloutInput::Gone { node } => self.view.on_gone(now, node),
            RolloutInput::Engine { engine, facts } => {
                self.engines.on_facts(engine, facts);
                self.had_engines = true;
                self.expected = self.expected.max(self.engines.len());
            }
            RolloutInput::EngineGone { engine } => {
                self.expected = self.expected.saturating_sub(usize::from(self.engines.on_gone(engine)));
            }
        }
        self.settle(now);
    }

    pub fn handle_timeout(&mut self, now: Time) {
        self.settle(now);
    }

    pub fn poll_output(&mut self) -> Option<RolloutOutput> {
        self.out.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<(Time, &'static str)> {
        self.review_at.map(|at| (at, "rollout"))
    }

    /// The release that is for this node: to be got to, or arrived at.
    pub fn wanted(&self) -> Option<&Release> {
        self.release()
    }

    /// Where it stands.
    pub fn stand(&self) -> Option<&Stand> {
        self.stand.as_ref()
    }

    /// The release that is to be served here now, if one may be ready with it: an engine is ready that serves it.
    pub fn vouched(&self) -> Option<ReleaseId> {
        self.stand.as_ref().filter(|stand| self.may_be_ready(stand))?.due()
    }

    /// Whether what a member says matters here: it reports, or was there when it did.
    pub fn concerns(&self, node: &NodeId, report: Option<&Report>) -> bool {
        report.is_some() || self.view.is_there(node)
    }

    /// What it says of itself now.
    pub fn report(&self) -> Option<&Report> {
        self.said.as_ref()
    }

    /// What a publisher is to say of the newest release, if it waits for a word.
    pub fn verdict(&self, now: Time) -> Option<Verdict> {
        let release = self.release()?;
        let How::Synchronous { required, deadline_ms, .. } = release.policy.how else { return None };
        if !self.lane.waits_for_word(release) || self.lane.aborted(&release.id()).is_some() {
            return None;
        }
        let roster = release.policy.roster.iter().map(|e| e.node);
        let report = |node: &NodeId| if *node == self.me { self.said.as_ref() } else { self.view.report(node) };
        let answered = roster.clone().filter(|node| *node == self.me || self.heard.has_answered(node)).count();
        let nodes: Vec<NodeId> = roster.collect();
        let in_time = now.since(self.since) < Duration::from_millis(deadline_ms);
        Some(together::verdict(release, required, nodes.iter().filter_map(report), answered, in_time))
    }

    /// The release to get to.
    fn release(&self) -> Option<&Release> {
        self.lane.get(&self.stand.as_ref()?.wanted)
    }

    fn on_releases(&mut self, now: Time, releases: Vec<Release>) {
        let used = self.stand.as_ref().map(Stand::used).unwrap_or_default();
        releases.into_iter().for_each(|release| self.lane.on_release(release, &used));
        self.hear_again(now);
    }

    fn hear(&mut self, now: Time, node: NodeId, report: Option<&Report>) {
        let (Some(report), Some(stand)) = (report, &self.stand) else { return };
        self.accounts.on_report(node, report);
        self.past.on_report(now, node, report);
        note(&mut self.heard, stand, node, report);
    }

    /// What was said before this node knew what it was about.
    fn hear_again(&mut self, now: Time) {
        let Some(stand) = &self.stand else { return };
        let synchronous = self.lane.newest_first().filter(|r| r.policy.is_synchronous()).map(Release::id);
        let kept: BTreeSet<ReleaseId> = synchronous.collect();
        self.past.keep(&kept);
        self.accounts.keep(&kept);
        for (node, _, report) in self.view.reports() {
            self.accounts.on_report(*node, report);
            self.past.on_report(now, *node, report);
            note(&mut self.heard, stand, *node, report);
        }
    }

    /// Whether every engine is here that was in an earlier life, or has had the time to come back.
    fn are_all_here(&self) -> bool {
        !self.engines.is_empty() && self.engines.len() >= self.expected
    }

    fn all_serve(&self, manifest: &ManifestHash) -> bool {
        self.are_all_here() && self.engines.all_serve(manifest)
    }

    /// After every input: where this node stands now, and what follows from it.
    fn settle(&mut self, now: Time) {
        if now.since(self.start) >= ROLLOUT_SILENCE {
            self.expected = self.engines.len();
        }
        self.choose(now);
        self.awaited = None;
        while self.take_step(now) {}
        if let Some(stand) = &mut self.stand {
            stand.engines = u32::try_from(self.expected).unwrap_or(u32::MAX);
        }
        if self.stand != self.kept
            && let Some(stand) = &self.stand
        {
            self.kept = Some(stand.clone());
            self.out.push_back(RolloutOutput::Keep(stand.clone()));
        }
        self.order(now);
        let report = self.account(now);
        if report != self.said {
            self.said.clone_from(&report);
            report.iter().for_each(|report| self.accounts.on_report(self.me, report));
            self.out.push_back(RolloutOutput::Report(report));
        }
        self.look_for_trouble(now);
        self.review_at = self.waits_for_time().then(|| now + REVIEW_INTERVAL);
        self.assert_invariants();
    }

    /// Tells the engines what is new for them.
    fn order(&mut self, now: Time) {
        let Some(stand) = self.stand.clone() else { return };
        let Some(release) = self.lane.get(&stand.wanted) else { return };
        let wanted = stand.wanted.manifest;
        let given_up = self.lane.aborted(&stand.wanted).is_some() || stand.failed.is_some();
        let going = match release.policy.is_synchronous() {
            true => self.until_together(now, release),
            false => Until::Serving,
        };
        let of = |facts: &Facts| match stand.step {
            Step::Going => Some(Order { manifest: wanted, until: going }),
            Step::Done => Some(Order { manifest: wanted, until: Until::Serving }),
            Step::Waiting | Step::GoingBack | Step::Halted => {
                let base = stand.base.map(|base| base.manifest);
                let at_base = facts.served.is_some() && facts.served == base;
                // There is no way to a base that failed here: it gets on from where it is.
                let lost = base.is_some_and(|base| facts.has_failed(&base));
                let prepares = stand.step == Step::Waiting && !given_up && (at_base || lost || base.is_none());
                match prepares {
                    true => Some(Order { manifest: wanted, until: Until::Staged }),
                    false => base.map(|manifest| Order { manifest, until: Until::Serving }),
                }
            }
        };
        let orders = self.engines.order(of);
        self.out.extend(orders.into_iter().map(|(engine, order)| RolloutOutput::Order { engine, order }));
    }

    /// How far an engine may go with a synchronous release that is committed.
    fn until_together(&self, now: Time, release: &Release) -> Until {
        let Some(opened) = self.opened else { return Until::Staged };
        let others_pause = || now.since(opened) < ROLLOUT_HOLD && together::somebody_pauses(release, &self.view);
        match self.engines.phase(&release.manifest) < Phase::Paused || others_pause() {
            true => Until::Checked,
            false => Until::Serving,
        }
    }

    fn account(&mut self, now: Time) -> Option<Report> {
        let stand = self.stand.as_ref()?;
        let release = self.release()?;
        let has_had_none = stand.base.is_none() || !self.had_engines;
        if self.engines.is_empty() && has_had_none && release.policy.entry(&self.me).is_none() {
            return None;
        }
        let ready = self.is_ready();
        let aborted = self.lane.aborted(&stand.wanted).is_some();
        let phase = match stand.step {
            Step::Halted => Phase::RolledBack,
            _ if stand.failed.is_some() => Phase::Failed,
            Step::Waiting if aborted => Phase::RolledBack,
            Step::Done if ready => Phase::Ready,
            Step::Waiting | Step::Going | Step::Done | Step::GoingBack => self.engines.phase(&stand.wanted.manifest),
        };
        let mut reason = self.reason();
        shorten(&mut reason, REPORT_REASON_BYTES_MAX);
        // Only when something has changed: a report is not said anew because time has passed.
        if !self.times.is_empty() {
            let after = now.since(self.since).as_millis();
            self.times.reach(phase, u32::try_from(after).unwrap_or(u32::MAX));
        }
        Some(Report {
            wanted: stand.wanted,
            base: stand.base,
            step: stand.step,
            phase,
            served: self.engines.served(),
            settled: self.is_at_rest(),
            ready,
            engines: u32::try_from(self.engines.len()).unwrap_or(u32::MAX),
            held: self.overridden != Override::Follow,
            reason,
            times: self.times,
        })
    }

    /// All engines serve what is due; or nothing is.
    fn is_settled(&self) -> bool {
        let Some(stand) = &self.stand else { return false };
        stand.due().is_none_or(|due| self.all_serve(&due.manifest))
    }

    /// As far as it can come by itself. Where its base failed it is not settled, not ready, and not out for a release
    /// either, like one whose engine has crashed: if it counted as out, those before it in a rolling release
    /// would wait for it, and it for them.
    fn is_at_rest(&self) -> bool {
        let Some(stand) = &self.stand else { return false };
        let due = |due: ReleaseId| self.are_all_here() && self.engines.are_at_rest(&due.manifest);
        stand.due().is_none_or(due)
    }

    fn is_ready(&self) -> bool {
        let Some(stand) = &self.stand else { return false };
        stand.due().is_some() && self.is_settled() && self.may_be_ready(stand)
    }

    /// But for what the engines serve.
    fn may_be_ready(&self, stand: &Stand) -> bool {
        let Some(release) = self.release() else { return false };
        match stand.step {
            Step::Done => true,
            Step::Going | Step::GoingBack => false,
            Step::Waiting => stand.is_base_open && self.is_sure(stand),
            // Where each node goes by itself, one that could not is not where it should be.
            Step::Halted => {
                let by_itself = matches!(release.policy.how, How::AtOnce | How::Manual);
                !by_itself && stand.is_base_open && self.is_sure(stand)
            }
        }
    }

    /// Whether no synchronous release can have been committed, and opened to others, unheard.
    fn is_sure(&self, stand: &Stand) -> bool {
        self.doubt(stand).is_none()
    }

    /// Which release may have been, and why that is not known.
    fn doubt(&self, stand: &Stand) -> Option<(&Release, Doubt)> {
        if self.overridden != Override::Follow {
            return None;
        }
        let mut unheard = self.lane.synchronous_between(stand.base, stand.wanted);
        unheard.find_map(|r| Some((r, self.past.doubt(&self.me, r, &self.view)?)))
    }

    /// Whether something may change though nothing happens.
    fn waits_for_time(&self) -> bool {
        let Some(stand) = &self.stand else { return false };
        let closed = !stand.is_base_open || (self.is_synchronous() && stand.step == Step::Going);
        let unsure = matches!(stand.step, Step::Waiting | Step::Halted) && !self.is_sure(stand);
        closed || unsure || self.engines.len() < self.expected
    }

    fn is_synchronous(&self) -> bool {
        self.release().is_some_and(|r| r.policy.is_synchronous())
    }

    fn assert_invariants(&self) {
        let Some(report) = &self.said else { return };
        let due = report.due().map(|due| due.manifest);
        assert!(!report.ready || (due.is_some() && report.served == due), "ready with what it is not due to serve");
        assert!(!report.ready || !matches!(report.step, Step::Going | Step::GoingBack), "ready while it switches");
        let failed = self.stand.as_ref().is_some_and(|s| s.failed.is_some() && s.step == Step::Done);
        assert!(
            !failed || !report.ready || self.engines.failure(&report.wanted.manifest).is_none(),
            "ready and failed"
        );
    }
}

/// What a report says that stays true.
fn note(heard: &mut Heard, stand: &Stand, node: NodeId, report: &Report) {
    if report.wanted == stand.wanted {
        heard.on_report(node, report);
    }
}
