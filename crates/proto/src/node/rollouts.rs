//! Releases and what is said of them: told to the rollouts of their channels, and what those decide passed on.

use super::Node;
use crate::io::{Notice, Output, Verdict};
use crate::limits::{ONLOOKERS_MAX, REPORT_SPACING, REPORT_TURN};
use crate::releases::{Heard, Rejection};
use crate::rollout::{History, Rollout, RolloutInput, RolloutOutput, Stand};
use aquifer_core::{
    ChannelName, ChannelStatus, GossipMessage, ManifestHash, NodeId, PeerMessage, Phase, Release, ReleaseId, Report,
    Selector, SignedRelease, SignedStatement, Statement, Step, Time, Word,
};
use rand::Rng;
use std::collections::BTreeMap;

type NewReleases = BTreeMap<ChannelName, Vec<Release>>;

impl Node {
    /// Where this node stands in a channel that it follows.
    pub fn rollout(&self, channel: &ChannelName) -> Option<&Rollout> {
        self.rollouts.get(channel)
    }

    /// What is known of a channel, oldest first.
    pub fn releases(&self, channel: &ChannelName) -> impl Iterator<Item = (&SignedRelease, &Release)> {
        self.releases.of_channel(channel).map(|(signed, release)| (signed, release))
    }

    pub fn statements(&self, channel: &ChannelName) -> impl Iterator<Item = (&SignedStatement, &Statement)> {
        self.releases.statements(channel).map(|(signed, statement)| (signed, statement))
    }

    /// What was said of a release.
    pub fn statement(&self, channel: &ChannelName, release: &ReleaseId) -> Option<&Statement> {
        self.releases.statement(channel, release)
    }

    /// The rollout of releases for `selector`, as who looks on sees it: see [`crate::Input::LookOn`].
    pub fn onlooker(&self, channel: &ChannelName, selector: &Selector) -> Option<&Rollout> {
        self.onlookers.get(&(channel.clone(), selector.clone()))
    }

    /// What became of the channel's last releases.
    pub fn history(&self, channel: &ChannelName) -> Option<&History> {
        self.histories.get(channel)
    }

    /// The manifests of the channel that nodes are to have now: the newest release's for everybody, and those that
    /// came for some after it, or stay with some.
    pub fn in_use(&self, channel: &ChannelName) -> Vec<ManifestHash> {
        let mut manifests: Vec<ManifestHash> = Vec::new();
        let mut later: Vec<&Release> = Vec::new();
        let releases: Vec<&Release> = self.releases.of_channel(channel).map(|(_, release)| release).collect();
        for release in releases.into_iter().rev() {
            let policy = &release.policy;
            let same = later.iter().any(|l| l.policy.subset == policy.subset);
            let covered = !policy.pinned && later.iter().any(|l| l.policy.subset.is_everybody());
            if !same && !covered {
                later.push(release);
                manifests.extend((!manifests.contains(&release.manifest)).then_some(release.manifest));
            }
        }
        manifests
    }

    pub(super) fn on_release(&mut self, now: Time, via: NodeId, signed: SignedRelease) -> Verdict {
        let mut new = BTreeMap::new();
        let verdict = self.take_in(via, signed, &mut new);
        self.turn_to(now, new);
        verdict
    }

    /// Those that come together are taken in before any is turned to.
    pub(super) fn on_releases(&mut self, now: Time, via: NodeId, signed: Vec<SignedRelease>) {
        let mut new = BTreeMap::new();
        for signed in signed {
            self.take_in(via, signed, &mut new);
        }
        self.turn_to(now, new);
    }

    fn take_in(&mut self, via: NodeId, signed: SignedRelease, new: &mut NewReleases) -> Verdict {
        let rollouts = &self.rollouts;
        let stand = |channel: &ChannelName| rollouts.get(channel)?.stand();
        let used = |channel: &ChannelName| stand(channel).map(Stand::used).unwrap_or_default();
        match self.releases.on_release(via, &signed, used) {
            Heard::Accepted(release) => {
                self.histories.entry(release.channel.clone()).or_default().on_release(&release, signed.publisher);
                new.entry(release.channel.clone()).or_default().push(*release.clone());
                self.out.push_back(Output::ReleaseAccepted { signed, release });
                Verdict::Accept
            }
            Heard::Elsewhere => Verdict::Accept,
            Heard::Known => Verdict::Ignore,
            Heard::Rejected { rejection, detail, first } => self.on_rejected(via, (rejection, detail, first)),
        }
    }

    fn turn_to(&mut self, now: Time, new: NewReleases) {
        for (channel, releases) in new {
            self.rollout_input(now, &channel, RolloutInput::Releases(releases));
            self.status_soon(now);
        }
    }

    pub(super) fn on_statement(&mut self, now: Time, via: NodeId, signed: SignedStatement) -> Verdict {
        match self.releases.on_statement(via, &signed) {
            Heard::Accepted(statement) => {
                let channel = statement.channel.clone();
                self.histories.entry(channel.clone()).or_default().on_statement(&statement, signed.publisher);
                self.out.push_back(Output::StatementAccepted { signed });
                self.rollout_input(now, &channel, RolloutInput::Statement(*statement));
                Verdict::Accept
            }
            Heard::Elsewhere => Verdict::Accept,
            Heard::Known => Verdict::Ignore,
            Heard::Rejected { rejection, detail, first } => self.on_rejected(via, (rejection, detail, first)),
        }
    }

    fn on_rejected(&mut self, via: NodeId, (rejection, detail, first): (Rejection, String, bool)) -> Verdict {
        if first {
            self.out.push_back(Output::Notice(Notice::ReleaseRejected { via, rejection, detail }));
        }
        match rejection {
            Rejection::Forged => Verdict::Reject,
            Rejection::Untrusted | Rejection::Older => Verdict::Ignore,
        }
    }

    /// What a node's own driver brings is passed on to everybody.
    pub(super) fn publish(&mut self, now: Time, release: SignedRelease) {
        if self.on_release(now, self.me, release.clone()) == Verdict::Accept {
            self.out.push_back(Output::Gossip(GossipMessage::Release(release)));
        }
        self.status_soon(now);
    }

    pub(super) fn say(&mut self, now: Time, statement: SignedStatement) {
        if self.on_statement(now, self.me, statement.clone()) == Verdict::Accept {
            self.out.push_back(Output::Gossip(GossipMessage::Statement(statement)));
        }
    }

    /// All that is known of releases, for a peer that lacks something of it.
    pub(super) fn remind(&mut self, now: Time, node: NodeId) {
        if self.reminded.contains_key(&node) {
            return;
        }
        self.reminded.insert(node, now);
        let (releases, statements) = self.releases.all();
        self.send(node, PeerMessage::Snapshot { statuses: Vec::new(), releases, statements });
    }

    /// Whether a member waits for a word that was said.
    pub(super) fn lacks_a_word(&self, channel: &ChannelName, report: &Report) -> bool {
        let said = self.releases.statement(channel, &report.wanted).map(|statement| statement.word);
        report.step == Step::Waiting
            && match said {
                Some(Word::Commit) => true,
                Some(Word::Abort) => report.phase != Phase::RolledBack,
                None => false,
            }
    }

    /// What a member says of itself, told to the rollouts that it matters to.
    pub(super) fn tell_rollouts(&mut self, now: Time, node: NodeId) {
        let Some(status) = self.members.member(&node).map(|m| m.status.clone()) else {
            return self.tell_all(now, &RolloutInput::Gone { node });
        };
        let report = |channel: &ChannelName| status.channels.iter().find(|c| c.channel == *channel)?.report.clone();
        let concerned = |(channel, rollout): (&ChannelName, &Rollout)| {
            let report = report(channel);
            rollout.concerns(&node, report.as_ref()).then(|| (channel.clone(), report))
        };
        let told: Vec<_> = self.rollouts.iter().filter_map(concerned).collect();
        for (channel, report) in told {
            if let Some(report) = &report {
                self.histories.entry(channel.clone()).or_default().on_report(node, report);
            }
            let labels = status.labels.clone();
            self.rollout_input(now, &channel, RolloutInput::Member { node, labels, report });
        }
    }

    fn tell_all(&mut self, now: Time, input: &RolloutInput) {
        let channels: Vec<ChannelName> = self.rollouts.keys().cloned().collect();
        channels.iter().for_each(|channel| self.rollout_input(now, channel, input.clone()));
    }

    pub(super) fn rollout_input(&mut self, now: Time, channel: &ChannelName, input: RolloutInput) {
        self.tell_onlookers(now, channel, &input);
        if let Some(rollout) = self.rollouts.get_mut(channel) {
            rollout.handle(now, input);
            self.drain_rollout(now, channel);
        }
    }

    fn tell_onlookers(&mut self, now: Time, channel: &ChannelName, input: &RolloutInput) {
        if matches!(input, RolloutInput::Engine { .. } | RolloutInput::EngineGone { .. }) {
            return;
        }
        for (_, onlooker) in self.onlookers.iter_mut().filter(|((of, _), _)| of == channel) {
            onlooker.handle(now, input.clone());
            while onlooker.poll_output().is_some() {}
        }
    }

    pub(super) fn look_on(&mut self, now: Time, channel: ChannelName, selector: Selector) {
        let key = (channel.clone(), selector);
        if self.onlookers.contains_key(&key) || self.onlookers.len() >= ONLOOKERS_MAX {
            return;
        }
        let mut onlooker = Rollout::onlooker(&key.1, now);
        for (_, statement) in self.releases.statements(&channel) {
            onlooker.handle(now, RolloutInput::Statement(statement.clone()));
        }
        let of = |node, labels: &[(String, String)], report: Option<Report>| {
            let (labels, report) = (labels.to_vec(), Some(report?));
            Some(RolloutInput::Member { node, labels, report })
        };
        let report = |channels: &[ChannelStatus]| channels.iter().find(|c| c.channel == channel)?.report.clone();
        let others = self.members.iter().map(|(_, member)| &member.status);
        let others = others.filter_map(|status| of(status.node, &status.labels, report(&status.channels)));
        let own = of(self.me, &self.config.labels, self.reported.get(&channel).cloned());
        others.chain(own).for_each(|input| onlooker.handle(now, input));
        let releases = self.releases.of_channel(&channel).map(|(_, release)| release.clone()).collect();
        onlooker.handle(now, RolloutInput::Releases(releases));
        while onlooker.poll_output().is_some() {}
        self.onlookers.insert(key, onlooker);
    }

    /// What they make of silence need not be known sooner than at a review.
    pub(super) fn review_onlookers(&mut self, now: Time) {
        for onlooker in self.onlookers.values_mut() {
            onlooker.handle_timeout(now);
            while onlooker.poll_output().is_some() {}
        }
    }

    pub(super) fn rollouts_timeout(&mut self, now: Time) {
        let due = |r: &Rollout| r.poll_timeout().is_some_and(|(at, _)| at <= now);
        let channels: Vec<ChannelName> = self.rollouts.iter().filter(|(_, r)| due(r)).map(|(c, _)| c.clone()).collect();
        for channel in channels {
            self.rollouts.get_mut(&channel).into_iter().for_each(|rollout| rollout.handle_timeout(now));
            self.drain_rollout(now, &channel);
        }
    }

    fn drain_rollout(&mut self, now: Time, channel: &ChannelName) {
        let Some(rollout) = self.rollouts.get_mut(channel) else { return };
        let mut said = None;
        while let Some(output) = rollout.poll_output() {
            match output {
                RolloutOutput::Keep(stand) => self.out.push_back(Output::Stand { channel: channel.clone(), stand }),
                RolloutOutput::Order { engine, order } => {
                    self.out.push_back(Output::Order { channel: channel.clone(), engine, order });
                }
                RolloutOutput::Report(report) => said = Some(report),
            }
        }
        let Some(report) = said else { return };
        let before = match &report {
            Some(report) => {
                self.histories.entry(channel.clone()).or_default().on_report(self.me, report);
                self.reported.insert(channel.clone(), report.clone())
            }
            None => self.reported.remove(channel),
        };
        let (node, labels) = (self.me, self.config.labels.clone());
        self.tell_onlookers(now, channel, &RolloutInput::Member { node, labels, report: report.clone() });
        match decides(before.as_ref(), report.as_ref()) {
            true => self.report_soon(now),
            false => self.status_soon(now),
        }
    }

    /// Others wait for it.
    fn report_soon(&mut self, now: Time) {
        let within = self.members.turns_of(REPORT_TURN).mul_f64(self.rng.random());
        let earliest = self.status_sent.map_or(now, |sent| sent + REPORT_SPACING);
        self.status_at = self.status_at.min(earliest.max(now + within));
    }
}

/// Whether what a node says now is something that others decide by, and not just how far it is.
fn decides(before: Option<&Report>, now: Option<&Report>) -> bool {
    let (Some(before), Some(now)) = (before, now) else { return true };
    let of = |r: &Report| (r.wanted, r.base, r.step, r.served, r.settled, r.ready, r.held);
    let phases = [Phase::Staged, Phase::Paused, Phase::Failed];
    let passed = |r: &Report| phases.iter().filter(|p| r.phase >= **p).count();
    of(before) != of(now) || passed(before) != passed(now)
}
