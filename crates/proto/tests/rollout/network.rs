//! What nodes tell each other: releases, statements, and records that also say what their sender lacks.

use crate::lies::Bug;
use crate::world::{Event, MS, TIMEOUT, World};
use aquifer_core::limits::ROSTER_MAX;
use aquifer_core::{ManifestHash, Policy, Release, ReleaseId, Report, Statement, Time, Word};
use aquifer_proto::rollout::{RolloutInput, Verdict};
use rand::Rng;
use std::rc::Rc;
use std::time::Duration;

/// Two that have not heard each other for so long meet anew: their connection broke.
const APART: Duration = Duration::from_secs(6);

pub(crate) struct Record {
    labels: Vec<(String, String)>,
    report: Option<Report>,
    releases: Vec<ReleaseId>,
    statements: Vec<(ReleaseId, Word)>,
}

impl World {
    pub(crate) fn release(&mut self, by: usize, seq: u64, manifest: &[u8], mut policy: Policy) -> ReleaseId {
        if let Some(agent) = &self.nodes[by].agent {
            policy = agent.publisher().with_roster(policy).unwrap();
            assert!(policy.roster.len() < ROSTER_MAX);
        }
        self.publish(by, seq, ManifestHash::of(manifest), None, policy)
    }

    fn publish(
        &mut self,
        by: usize,
        seq: u64,
        manifest: ManifestHash,
        rolls_back_to: Option<u64>,
        policy: Policy,
    ) -> ReleaseId {
        let release = Release {
            channel: "c".parse().unwrap(),
            seq,
            manifest,
            manifest_bytes: 1,
            rolls_back_to,
            policy,
            // Hours wrong, like the clocks. Nothing is decided by it.
            created_unix_ms: self.rng.random(),
            note: String::new(),
        };
        let id = release.id();
        self.releases.insert(id, release.clone());
        self.plan(Duration::ZERO, Event::Release { to: by, release: release.clone() });
        for to in (0..self.nodes.len()).filter(|to| *to != by) {
            self.plan_over(by, to, Event::Release { to, release: release.clone() });
        }
        id
    }

    pub(crate) fn say(&mut self, by: usize, release: ReleaseId, word: Word, reason: String) {
        self.changed |= self.said.insert((release, word));
        let channel = "c".parse().unwrap();
        let statement = Statement { channel, release, word, reason, created_unix_ms: self.rng.random() };
        self.plan(Duration::ZERO, Event::Statement { to: by, statement: statement.clone() });
        for to in (0..self.nodes.len()).filter(|to| *to != by) {
            self.plan_over(by, to, Event::Statement { to, statement: statement.clone() });
        }
    }

    /// The part of a publisher's agent.
    pub(crate) fn give_word(&mut self, node: usize) {
        if self.committer != Some(node) {
            return;
        }
        let now = self.local(node);
        let Some(agent) = &self.nodes[node].agent else { return };
        let Some(newest) = self.nodes[node].disk.releases.keys().next_back().copied() else { return };
        let (verdict, remedy) = (agent.publisher().verdict(now), agent.publisher().remedy(now));
        let is_hasty = self.bug == Some(Bug::CommitsUnasked) && matches!(verdict, Some(Verdict::Wait { .. }));
        match verdict {
            Some(_) if is_hasty => self.say(node, newest, Word::Commit, String::new()),
            Some(Verdict::Commit) => self.say(node, newest, Word::Commit, String::new()),
            Some(Verdict::Abort(why)) => self.say(node, newest, Word::Abort, why),
            Some(Verdict::Wait { .. }) | None => {}
        }
        if let Some(remedy) = remedy {
            self.remedies += 1;
            let to = &remedy.to;
            self.publish(node, newest.seq + 1, to.manifest, Some(to.seq), remedy.policy);
        }
    }

    pub(crate) fn on_record(&mut self, to: usize, from: usize, order: u64, record: Rc<Record>) {
        let now = self.local(to);
        let Some(agent) = &mut self.nodes[to].agent else { return };
        let before = agent.met.insert(from, now);
        if before.is_none_or(|before| now.since(before) >= APART) {
            self.tell_of_others(to, from);
        }
        if !self.take_in(to, from, order, (Duration::ZERO, record.clone())) {
            return;
        }
        // Who lacks something is reminded.
        let disk = &self.nodes[to].disk;
        let releases: Vec<Release> =
            disk.releases.iter().filter(|(id, _)| !record.releases.contains(id)).map(|(_, r)| r.clone()).collect();
        let said = |key: &(ReleaseId, Word)| record.statements.contains(key);
        let statements: Vec<Statement> =
            disk.statements.iter().filter(|(key, _)| !said(key)).map(|(_, s)| s.clone()).collect();
        for release in releases {
            self.plan_over(to, from, Event::Release { to: from, release });
        }
        for statement in statements {
            self.plan_over(to, from, Event::Statement { to: from, statement });
        }
    }

    /// Who connects is told of all others, as `Node` does it.
    fn tell_of_others(&mut self, to: usize, from: usize) {
        let now = self.local(from);
        let Some(agent) = &self.nodes[from].agent else { return };
        let known = agent.records.iter().filter(|(of, _)| **of != to);
        let told = known.filter_map(|(of, (order, record))| {
            let age = now.since(*agent.heard.get(of)?);
            Some(Event::Told { to, of: *of, order: *order, age, record: record.clone() })
        });
        let told: Vec<Event> = told.collect();
        told.into_iter().for_each(|event| self.plan_over(from, to, event));
    }

    pub(crate) fn on_told(&mut self, to: usize, of: usize, order: u64, told: (Duration, Rc<Record>)) {
        self.take_in(to, of, order, told);
    }

    /// Whether it is news.
    fn take_in(&mut self, to: usize, of: usize, order: u64, (age, record): (Duration, Rc<Record>)) -> bool {
        let now = self.local(to);
        let Some(agent) = &mut self.nodes[to].agent else { return false };
        let last = agent.order.entry(of).or_default();
        if order <= std::mem::replace(last, order.max(*last)) || age >= TIMEOUT {
            return false;
        }
        agent.heard.insert(of, Time::from_origin(now.since(Time::ZERO).saturating_sub(age)));
        agent.records.insert(of, (order, record.clone()));
        let report = record.report.clone().map(|report| self.lie(of, report));
        let report = report.map(|report| self.misread(of, report));
        let labels = record.labels.clone();
        self.tell(to, RolloutInput::Member { node: self.nodes[of].id, labels, report });
        true
    }

    pub(crate) fn on_release(&mut self, to: usize, release: Release) {
        if self.nodes[to].agent.is_some() && !self.nodes[to].disk.releases.contains_key(&release.id()) {
            let release = self.misread_release(to, release);
            self.nodes[to].disk.releases.insert(release.id(), release.clone());
            self.tell(to, RolloutInput::Release(release));
        }
    }

    pub(crate) fn on_statement(&mut self, to: usize, statement: Statement) {
        let key = (statement.release, statement.word);
        if self.bug == Some(Bug::Deaf) && statement.word == Word::Commit {
            return;
        }
        if self.nodes[to].agent.is_some() && !self.nodes[to].disk.statements.contains_key(&key) {
            self.nodes[to].disk.statements.insert(key, statement.clone());
            self.tell(to, RolloutInput::Statement(statement));
        }
    }

    pub(crate) fn broadcast(&mut self, from: usize) {
        let machine = &self.nodes[from];
        let Some(agent) = &machine.agent else { return };
        let record = Rc::new(Record {
            labels: machine.labels.clone(),
            report: agent.rollout.report().cloned(),
            releases: machine.disk.releases.keys().copied().collect(),
            statements: machine.disk.statements.keys().copied().collect(),
        });
        self.next += 1;
        let order = self.next;
        for to in (0..self.nodes.len()).filter(|to| *to != from) {
            self.plan_over(from, to, Event::Record { to, from, order, record: record.clone() });
        }
    }

    fn plan_over(&mut self, from: usize, to: usize, event: Event) {
        if self.side[from] == self.side[to] && !self.rng.random_bool(self.loss) {
            let after = MS * self.rng.random_range(1..60);
            self.plan(after, Event::Over { to, from, event: Box::new(event) });
        }
    }
}
