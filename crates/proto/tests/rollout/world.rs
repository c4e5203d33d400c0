//! Nodes with engines, a network that loses and parts, disks that stay, clocks that disagree.

use crate::engine::{Engine, duration};
use aquifer_core::limits::ROSTER_MAX;
use aquifer_core::{How, ManifestHash, NodeId, Policy, Release, ReleaseId, Report, Statement, Step, Time, Word};
use aquifer_proto::rollout::{EngineId, Override, Rollout, RolloutInput, RolloutOutput, Stand, Verdict};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

pub(crate) const MS: Duration = Duration::from_millis(1);
/// As in `limits`: how often records are said, and how long silence is borne.
const INTERVAL: Duration = Duration::from_secs(3);
const TIMEOUT: Duration = Duration::from_secs(15);
const TICK: Duration = Duration::from_millis(500);

pub(crate) struct World {
    pub(crate) rng: SmallRng,
    pub(crate) now: Time,
    pub(crate) nodes: Vec<Machine>,
    events: BTreeMap<(Time, u64), Event>,
    next: u64,
    /// Nodes on different sides do not hear each other.
    pub(crate) side: Vec<u32>,
    pub(crate) loss: f64,
    /// At which nodes the check of which manifest fails.
    pub(crate) bad: BTreeSet<(usize, ManifestHash)>,
    /// Every release that was ever made.
    pub(crate) releases: BTreeMap<ReleaseId, Release>,
    /// Who holds the key and is to use it.
    pub(crate) committer: Option<usize>,
    index: BTreeMap<NodeId, usize>,
    /// All releases but the first are rolling, with one `max_unavailable`.
    pub(crate) all_rolling: bool,
    /// Who was ever done with what; and whether somebody went before the canaries were.
    done: BTreeSet<(ReleaseId, NodeId)>,
    rushed: bool,
    /// Something that is looked at, since it was looked at.
    changed: bool,
}

pub(crate) struct Machine {
    pub(crate) id: NodeId,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) engines: Vec<Engine>,
    pub(crate) agent: Option<Agent>,
    pub(crate) disk: Disk,
    life: u64,
    clock: (Duration, f64),
}

#[derive(Default)]
pub(crate) struct Disk {
    pub(crate) stand: Option<Stand>,
    pub(crate) releases: BTreeMap<ReleaseId, Release>,
    pub(crate) statements: BTreeMap<(ReleaseId, Word), Statement>,
}

pub(crate) struct Agent {
    pub(crate) rollout: Rollout,
    heard: BTreeMap<usize, Time>,
    /// Of the last record, so that none overtakes a later one.
    order: BTreeMap<usize, u64>,
}

struct Record {
    labels: Vec<(String, String)>,
    report: Option<Report>,
    releases: Vec<ReleaseId>,
    statements: Vec<(ReleaseId, Word)>,
}

#[derive(Clone)]
enum Event {
    Record { to: usize, from: usize, order: u64, record: Rc<Record> },
    Release { to: usize, release: Release },
    Statement { to: usize, statement: Statement },
    Engine { node: usize, engine: usize, token: u64 },
    Say { node: usize, life: u64 },
    Tick { node: usize, life: u64 },
    Start { node: usize },
    StartEngine { node: usize, engine: usize },
    Heal,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        World {
            rng: SmallRng::seed_from_u64(seed),
            now: Time::ZERO,
            nodes: Vec::new(),
            events: BTreeMap::new(),
            next: 0,
            side: Vec::new(),
            loss: 0.0,
            bad: BTreeSet::new(),
            releases: BTreeMap::new(),
            committer: None,
            index: BTreeMap::new(),
            all_rolling: false,
            done: BTreeSet::new(),
            rushed: false,
            changed: true,
        }
    }

    pub(crate) fn add(&mut self, labels: &[(&str, String)], engines: usize) -> usize {
        let node = self.nodes.len();
        let mut id = [0; 32];
        self.rng.fill(&mut id[..]);
        let clock = (Duration::from_secs(self.rng.random_range(0..36_000)), self.rng.random_range(0.98..1.02));
        self.nodes.push(Machine {
            id: NodeId(id),
            labels: labels.iter().map(|(key, value)| (key.to_string(), value.clone())).collect(),
            engines: (0..engines).map(|_| Engine::default()).collect(),
            agent: None,
            disk: Disk::default(),
            life: 0,
            clock,
        });
        self.side.push(0);
        self.index.insert(NodeId(id), node);
        self.start(node);
        (0..engines).for_each(|engine| self.plan(Duration::ZERO, Event::StartEngine { node, engine }));
        node
    }

    pub(crate) fn release(&mut self, by: usize, seq: u64, manifest: &[u8], mut policy: Policy) -> ReleaseId {
        if let Some(agent) = &self.nodes[by].agent {
            policy = agent.rollout.with_roster(policy).unwrap();
            assert!(policy.roster.len() < ROSTER_MAX);
        }
        let release = Release {
            channel: "c".parse().unwrap(),
            seq,
            manifest: ManifestHash::of(manifest),
            manifest_bytes: 1,
            rolls_back_to: None,
            policy,
            created_unix_ms: 0,
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

    pub(crate) fn say(&mut self, by: usize, release: ReleaseId, word: Word) {
        let (channel, reason) = ("c".parse().unwrap(), String::new());
        let statement = Statement { channel, release, word, reason, created_unix_ms: 0 };
        self.plan(Duration::ZERO, Event::Statement { to: by, statement: statement.clone() });
        for to in (0..self.nodes.len()).filter(|to| *to != by) {
            self.plan_over(by, to, Event::Statement { to, statement: statement.clone() });
        }
    }

    /// The agent's process ends. Its engines go on.
    pub(crate) fn kill_agent(&mut self, node: usize, back_after: Option<Duration>) {
        let machine = &mut self.nodes[node];
        machine.agent = None;
        machine.life += 1;
        self.changed = true;
        machine.engines.iter_mut().for_each(Engine::on_new_agent);
        back_after.into_iter().for_each(|after| self.plan(after, Event::Start { node }));
    }

    pub(crate) fn kill_engine(&mut self, node: usize, engine: usize, back_after: Option<Duration>) {
        self.nodes[node].engines[engine].crash();
        self.tell(node, RolloutInput::EngineGone { engine: engine as EngineId });
        back_after.into_iter().for_each(|after| self.plan(after, Event::StartEngine { node, engine }));
    }

    /// The whole node ends.
    pub(crate) fn kill(&mut self, node: usize, back_after: Option<Duration>) {
        self.kill_agent(node, back_after);
        (0..self.nodes[node].engines.len()).for_each(|engine| self.kill_engine(node, engine, back_after));
    }

    pub(crate) fn heal_after(&mut self, after: Duration) {
        self.plan(after, Event::Heal);
    }

    /// Whether something is down that will come back, or the network is parted.
    pub(crate) fn has_faults(&self) -> bool {
        let returns = |e: &Event| matches!(e, Event::Start { .. } | Event::StartEngine { .. } | Event::Heal);
        self.events.values().any(returns)
    }

    /// How many members with engines a node knows.
    pub(crate) fn seen_by(&self, node: usize) -> usize {
        let policy = self.nodes[node].agent.as_ref().and_then(|a| a.rollout.with_roster(Policy::default()));
        policy.map_or(0, |p| p.roster.len())
    }

    pub(crate) fn report(&self, node: usize) -> Option<&Report> {
        self.nodes[node].agent.as_ref()?.rollout.report()
    }

    pub(crate) fn is_ready(&self, node: usize) -> bool {
        self.report(node).is_some_and(|r| r.ready)
    }

    /// Runs until `end`, looking at everything after each step; `watch` may interfere, and complain.
    pub(crate) fn run(
        &mut self,
        end: Time,
        watch: &mut dyn FnMut(&mut World) -> Result<(), String>,
    ) -> Result<(), String> {
        while let Some(entry) = self.events.first_entry() {
            if entry.key().0 > end {
                break;
            }
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            self.on_event(event);
            if std::mem::take(&mut self.changed) {
                self.check()?;
                watch(self)?;
            }
        }
        self.now = end;
        Ok(())
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Record { to, from, order, record } => self.on_record(to, from, order, &record),
            Event::Release { to, release } => self.on_release(to, release),
            Event::Statement { to, statement } => self.on_statement(to, statement),
            Event::Engine { node, engine, token } => self.on_engine(node, engine, token),
            Event::Say { node, life } if self.lives(node, life) => {
                self.broadcast(node);
                let after = INTERVAL.mul_f64(self.rng.random_range(0.75..1.25));
                self.plan(after, Event::Say { node, life });
            }
            Event::Tick { node, life } if self.lives(node, life) => {
                self.on_tick(node);
                self.plan(TICK, Event::Tick { node, life });
            }
            Event::Say { .. } | Event::Tick { .. } => {}
            Event::Start { node } => self.start(node),
            Event::StartEngine { node, engine } if self.nodes[node].engines[engine].up => {}
            Event::StartEngine { node, engine } => {
                self.nodes[node].engines[engine].start();
                self.changed = true;
                self.tell_engine(node, engine);
            }
            Event::Heal => self.side.iter_mut().for_each(|side| *side = 0),
        }
    }

    fn start(&mut self, node: usize) {
        let now = self.local(node);
        let machine = &mut self.nodes[node];
        if machine.agent.is_some() {
            return;
        }
        machine.life += 1;
        let rollout =
            Rollout::new(machine.id, machine.labels.clone(), Override::Follow, machine.disk.stand.clone(), now);
        machine.agent = Some(Agent { rollout, heard: BTreeMap::new(), order: BTreeMap::new() });
        let life = machine.life;
        let releases: Vec<Release> = machine.disk.releases.values().cloned().collect();
        let statements: Vec<Statement> = machine.disk.statements.values().cloned().collect();
        for statement in statements {
            self.tell(node, RolloutInput::Statement(statement));
        }
        // A directory is read in any order.
        let from = if releases.is_empty() { 0 } else { self.rng.random_range(0..releases.len()) };
        for release in releases[from..].iter().chain(&releases[..from]) {
            self.tell(node, RolloutInput::Release(release.clone()));
        }
        (0..self.nodes[node].engines.len()).for_each(|engine| self.tell_engine(node, engine));
        self.plan(Duration::ZERO, Event::Say { node, life });
        self.plan(TICK, Event::Tick { node, life });
    }

    fn on_record(&mut self, to: usize, from: usize, order: u64, record: &Record) {
        let now = self.local(to);
        let Some(agent) = &mut self.nodes[to].agent else { return };
        let last = agent.order.entry(from).or_default();
        if order <= std::mem::replace(last, order.max(*last)) {
            return;
        }
        agent.heard.insert(from, now);
        let (labels, report) = (record.labels.clone(), record.report.clone());
        self.tell(to, RolloutInput::Member { node: self.nodes[from].id, labels, report });
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

    fn on_release(&mut self, to: usize, release: Release) {
        if self.nodes[to].agent.is_some() && !self.nodes[to].disk.releases.contains_key(&release.id()) {
            self.nodes[to].disk.releases.insert(release.id(), release.clone());
            self.tell(to, RolloutInput::Release(release));
        }
    }

    fn on_statement(&mut self, to: usize, statement: Statement) {
        let key = (statement.release, statement.word);
        if self.nodes[to].agent.is_some() && !self.nodes[to].disk.statements.contains_key(&key) {
            self.nodes[to].disk.statements.insert(key, statement.clone());
            self.tell(to, RolloutInput::Statement(statement));
        }
    }

    fn on_tick(&mut self, node: usize) {
        let now = self.local(node);
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let silent: Vec<usize> =
            agent.heard.iter().filter(|(_, at)| now.since(**at) >= TIMEOUT).map(|(n, _)| *n).collect();
        agent.heard.retain(|n, _| !silent.contains(n));
        for gone in silent {
            self.tell(node, RolloutInput::Gone { node: self.nodes[gone].id });
        }
        if let Some(agent) = &mut self.nodes[node].agent {
            agent.rollout.handle_timeout(now);
            self.drain(node);
        }
        self.give_word(node);
    }

    /// The part of a publisher's agent.
    fn give_word(&mut self, node: usize) {
        if self.committer != Some(node) {
            return;
        }
        let now = self.local(node);
        let Some(agent) = &self.nodes[node].agent else { return };
        let Some(newest) = self.nodes[node].disk.releases.keys().next_back().copied() else { return };
        match agent.rollout.verdict(now) {
            Some(Verdict::Commit) => self.say(node, newest, Word::Commit),
            Some(Verdict::Abort(_)) => self.say(node, newest, Word::Abort),
            Some(Verdict::Wait { .. }) | None => {}
        }
    }

    fn on_engine(&mut self, node: usize, engine: usize, token: u64) {
        let machine = &mut self.nodes[node];
        let it = &mut machine.engines[engine];
        let Some(target) = it.order.map(|o| o.manifest).filter(|_| it.token == token) else { return };
        it.step(self.bad.contains(&(node, target)));
        self.changed = true;
        self.tell_engine(node, engine);
        self.go_on(node, engine);
    }

    fn go_on(&mut self, node: usize, engine: usize) {
        let dice = self.rng.random();
        let it = &mut self.nodes[node].engines[engine];
        it.token += 1;
        let (next, token) = (it.next(), it.token);
        next.into_iter().for_each(|pace| self.plan(duration(pace, dice), Event::Engine { node, engine, token }));
    }

    fn tell_engine(&mut self, node: usize, engine: usize) {
        let it = &self.nodes[node].engines[engine];
        if it.up {
            let facts = it.facts();
            self.tell(node, RolloutInput::Engine { engine: engine as EngineId, facts });
        }
    }

    fn tell(&mut self, node: usize, input: RolloutInput) {
        let now = self.local(node);
        if let Some(agent) = &mut self.nodes[node].agent {
            agent.rollout.handle(now, input);
            self.drain(node);
        }
    }

    fn drain(&mut self, node: usize) {
        while let Some(output) = self.nodes[node].agent.as_mut().and_then(|a| a.rollout.poll_output()) {
            match output {
                RolloutOutput::Keep(stand) => {
                    assert_eq!(Stand::decode(&stand.encode()).as_ref(), Ok(&stand));
                    self.on_step(node, &stand);
                    self.nodes[node].disk.stand = Some(stand);
                }
                RolloutOutput::Order { engine, order } => {
                    let engine = usize::try_from(engine).unwrap();
                    self.nodes[node].engines[engine].obey(order);
                    self.go_on(node, engine);
                }
                RolloutOutput::Report(_) => {
                    self.changed = true;
                    self.broadcast(node);
                }
            }
        }
    }

    /// Nobody of a rolling release's roster goes before its canaries are done.
    fn on_step(&mut self, node: usize, stand: &Stand) {
        let me = self.nodes[node].id;
        if stand.step == Step::Done {
            self.done.insert((stand.wanted, me));
        }
        let policy = self.releases.get(&stand.wanted).map(|r| &r.policy);
        let Some(policy) = policy.filter(|p| matches!(p.how, How::Rolling { .. })) else { return };
        if stand.step == Step::Going && policy.entry(&me).is_some_and(|e| !e.canary) {
            let mut canaries = policy.roster.iter().filter(|e| e.canary);
            self.rushed |= canaries.any(|e| !self.done.contains(&(stand.wanted, e.node)));
        }
    }

    fn broadcast(&mut self, from: usize) {
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

    /// What is under way when the network parts still arrives.
    fn plan_over(&mut self, from: usize, to: usize, event: Event) {
        if self.side[from] == self.side[to] && !self.rng.random_bool(self.loss) {
            let after = MS * self.rng.random_range(1..60);
            self.plan(after, event);
        }
    }

    fn plan(&mut self, after: Duration, event: Event) {
        self.next += 1;
        self.events.insert((self.now + after, self.next), event);
    }

    fn lives(&self, node: usize, life: u64) -> bool {
        self.nodes[node].agent.is_some() && self.nodes[node].life == life
    }

    fn local(&self, node: usize) -> Time {
        let (offset, rate) = self.nodes[node].clock;
        Time::from_origin(offset + self.now.since(Time::ZERO).mul_f64(rate))
    }

    /// What must always hold; see `aquifer_proto::rollout`.
    fn check(&self) -> Result<(), String> {
        if self.rushed {
            return Err("somebody went before the canaries were done".to_string());
        }
        let ready: Vec<(usize, ReleaseId)> = (0..self.nodes.len())
            .filter(|n| self.is_ready(*n))
            .filter_map(|n| Some((n, self.report(n)?.due()?)))
            .collect();
        for (node, due) in &ready {
            for engine in self.nodes[*node].engines.iter().filter(|e| e.up) {
                if engine.served != Some(due.manifest) || engine.out || !engine.passed.contains(&due.manifest) {
                    return Err(format!("{node} is ready with {due:?}, and {engine:?}"));
                }
            }
        }
        for (a, newer) in
            ready.iter().filter(|(_, due)| self.releases.get(due).is_some_and(|r| r.policy.is_synchronous()))
        {
            let policy = &self.releases[newer].policy;
            let in_group = |n: usize| {
                let machine = &self.nodes[n];
                policy.entry(&machine.id).is_some() || machine.disk.releases.contains_key(newer)
            };
            if let Some((b, older)) = ready.iter().find(|(b, due)| due < newer && in_group(*b)) {
                return Err(format!("{a} is ready with {newer:?}, and {b} with {older:?}"));
            }
        }
        if self.all_rolling { self.check_out() } else { Ok(()) }
    }

    /// Of a group, no more are out than a release allows. Racks are the groups, so each has the same
    /// number in all releases; with a newcomer a percentage may allow one more than before.
    fn check_out(&self) -> Result<(), String> {
        let mut groups: BTreeMap<u32, (BTreeSet<usize>, usize)> = BTreeMap::new();
        for release in self.releases.values() {
            let How::Rolling { max_unavailable, .. } = &release.policy.how else { continue };
            for entry in &release.policy.roster {
                let of_group = release.policy.roster.iter().filter(|e| e.group == entry.group).count();
                let (nodes, most) = groups.entry(entry.group).or_default();
                nodes.insert(self.index[&entry.node]);
                *most = max_unavailable.of(of_group).max(*most);
            }
        }
        for (nodes, most) in groups.values() {
            let out: Vec<&usize> = nodes.iter().filter(|n| self.nodes[**n].engines.iter().any(|e| e.out)).collect();
            if out.len() > *most {
                return Err(format!("{out:?} are out at once, of {nodes:?}"));
            }
        }
        Ok(())
    }
}
