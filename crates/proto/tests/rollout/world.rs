//! Nodes with engines, a network that loses and parts, disks that stay, clocks that disagree.

use crate::engine::{Engine, Fault, duration};
use crate::lies::{Bug, Liar};
use crate::network::Record;
use aquifer_core::{ManifestHash, NodeId, Policy, Release, ReleaseId, Report, Selector, Statement, Time, Word};
use aquifer_proto::rollout::{EngineId, Override, Rollout, RolloutInput, RolloutOutput, Stand};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

pub(crate) const MS: Duration = Duration::from_millis(1);
/// As in `limits`: how often records are said, and how long silence is borne.
const INTERVAL: Duration = Duration::from_secs(3);
pub(crate) const TIMEOUT: Duration = Duration::from_secs(15);
const TICK: Duration = Duration::from_millis(500);

pub(crate) struct World {
    pub(crate) rng: SmallRng,
    pub(crate) now: Time,
    pub(crate) nodes: Vec<Machine>,
    events: BTreeMap<(Time, u64), Event>,
    pub(crate) next: u64,
    /// Nodes on different sides do not hear each other.
    pub(crate) side: Vec<u32>,
    pub(crate) loss: f64,
    /// What goes wrong at which node's engines with which manifest; at the first of them, or at all.
    pub(crate) faults: BTreeMap<(usize, ManifestHash), Fault>,
    pub(crate) all_engines_fail: bool,
    pub(crate) liar: Option<Liar>,
    /// How often a release was undone because it failed.
    pub(crate) remedies: usize,
    /// Planted.
    pub(crate) bug: Option<Bug>,
    /// What was ever said of which release; and every release that was ever made.
    pub(crate) said: BTreeSet<(ReleaseId, Word)>,
    pub(crate) releases: BTreeMap<ReleaseId, Release>,
    /// Who holds the key and is to use it.
    pub(crate) committer: Option<usize>,
    pub(crate) index: BTreeMap<NodeId, usize>,
    /// All releases but the first are rolling, with one `max_unavailable`.
    pub(crate) all_rolling: bool,
    /// Who was ever done with what; and whether somebody went before the canaries were.
    pub(crate) done: BTreeSet<(ReleaseId, NodeId)>,
    pub(crate) rushed: bool,
    /// Something that is looked at, since it was looked at.
    pub(crate) changed: bool,
}

pub(crate) struct Machine {
    pub(crate) id: NodeId,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) engines: Vec<Engine>,
    pub(crate) agent: Option<Agent>,
    pub(crate) disk: Disk,
    pub(crate) life: u64,
    clock: (Duration, f64),
}

impl Machine {
    pub(crate) fn rack(&self) -> Option<&str> {
        self.labels.iter().find(|(key, _)| key == "rack").map(|(_, rack)| rack.as_str())
    }
}

#[derive(Default)]
pub(crate) struct Disk {
    pub(crate) stand: Option<Stand>,
    pub(crate) releases: BTreeMap<ReleaseId, Release>,
    pub(crate) statements: BTreeMap<(ReleaseId, Word), Statement>,
}

pub(crate) struct Agent {
    pub(crate) rollout: Rollout,
    /// Of one that publishes, and has no engines: what it names and says.
    pub(crate) desk: Option<Rollout>,
    pub(crate) heard: BTreeMap<usize, Time>,
    /// Of the last record, so that none overtakes a later one.
    pub(crate) order: BTreeMap<usize, u64>,
    /// The last records of those that are there, to be told to whom it meets anew; and when it last heard whom itself.
    pub(crate) records: BTreeMap<usize, (u64, Rc<Record>)>,
    pub(crate) met: BTreeMap<usize, Time>,
}

impl Agent {
    pub(crate) fn publisher(&self) -> &Rollout {
        self.desk.as_ref().unwrap_or(&self.rollout)
    }
}

#[derive(Clone)]
pub(crate) enum Event {
    /// It comes from another node, if the network has not parted meanwhile.
    Over {
        to: usize,
        from: usize,
        event: Box<Event>,
    },
    Record {
        to: usize,
        from: usize,
        order: u64,
        record: Rc<Record>,
    },
    /// The record of one that may be elsewhere, and how long ago it was heard.
    Told {
        to: usize,
        of: usize,
        order: u64,
        age: Duration,
        record: Rc<Record>,
    },
    Release {
        to: usize,
        release: Release,
    },
    Statement {
        to: usize,
        statement: Statement,
    },
    Engine {
        node: usize,
        engine: usize,
        token: u64,
    },
    Say {
        node: usize,
        life: u64,
    },
    Tick {
        node: usize,
        life: u64,
    },
    Start {
        node: usize,
    },
    StartEngine {
        node: usize,
        engine: usize,
    },
    /// Who is on the other side from now on.
    Part(Vec<usize>),
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
            faults: BTreeMap::new(),
            all_engines_fail: false,
            liar: None,
            remedies: 0,
            bug: None,
            said: BTreeSet::new(),
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
        let clock = (Duration::from_secs(self.rng.random_range(0..36_000)), self.rng.random_range(0.8..1.25));
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

    pub(crate) fn part_after(&mut self, after: Duration, away: &[usize]) {
        self.plan(after, Event::Part(away.to_vec()));
    }

    /// Whether something is down that will come back, or the network is parted.
    pub(crate) fn has_faults(&self) -> bool {
        let returns =
            |e: &Event| matches!(e, Event::Start { .. } | Event::StartEngine { .. } | Event::Part(_) | Event::Heal);
        self.events.values().any(returns)
    }

    /// How many members with engines a node knows.
    pub(crate) fn seen_by(&self, node: usize) -> usize {
        let policy = self.nodes[node].agent.as_ref().and_then(|a| a.publisher().with_roster(Policy::default()));
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
            Event::Over { to, from, event } if self.side[from] == self.side[to] => self.on_event(*event),
            Event::Over { .. } => {}
            Event::Record { to, from, order, record } => self.on_record(to, from, order, record),
            Event::Told { to, of, order, age, record } => self.on_told(to, of, order, (age, record)),
            Event::Release { to, release } => self.on_release(to, release),
            Event::Statement { to, statement } => self.on_statement(to, statement),
            Event::Engine { node, engine, token } => self.on_engine(node, engine, token),
            Event::Say { node, life } if self.lives(node, life) => {
                self.broadcast(node);
                let after = INTERVAL.mul_f64(self.rng.random_range(0.75..1.25));
                self.plan(self.by_clock(node, after), Event::Say { node, life });
            }
            Event::Tick { node, life } if self.lives(node, life) => {
                self.on_tick(node);
                self.plan(self.by_clock(node, TICK), Event::Tick { node, life });
            }
            Event::Say { .. } | Event::Tick { .. } => {}
            Event::Start { node } => self.start(node),
            Event::StartEngine { node, engine } if self.nodes[node].engines[engine].up => {}
            Event::StartEngine { node, engine } => {
                self.nodes[node].engines[engine].start();
                self.changed = true;
                self.tell_engine(node, engine);
            }
            Event::Part(away) => {
                (0..).zip(&mut self.side).for_each(|(node, side)| *side = u32::from(away.contains(&node)))
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
        let desk = machine.engines.is_empty().then(|| Rollout::onlooker(&Selector::default(), now));
        machine.agent = Some(Agent {
            rollout,
            desk,
            heard: BTreeMap::new(),
            order: BTreeMap::new(),
            records: BTreeMap::new(),
            met: BTreeMap::new(),
        });
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

    fn on_tick(&mut self, node: usize) {
        let now = self.local(node);
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let silent: Vec<usize> =
            agent.heard.iter().filter(|(_, at)| now.since(**at) >= TIMEOUT).map(|(n, _)| *n).collect();
        agent.heard.retain(|n, _| !silent.contains(n));
        agent.records.retain(|n, _| !silent.contains(n));
        for gone in silent {
            self.tell(node, RolloutInput::Gone { node: self.nodes[gone].id });
        }
        if let Some(agent) = &mut self.nodes[node].agent {
            agent.rollout.handle_timeout(now);
            agent.desk.iter_mut().for_each(|desk| desk.handle_timeout(now));
            self.drain(node);
        }
        self.give_word(node);
    }

    fn on_engine(&mut self, node: usize, engine: usize, token: u64) {
        let machine = &mut self.nodes[node];
        let it = &mut machine.engines[engine];
        let Some(target) = it.order.map(|o| o.manifest).filter(|_| it.token == token) else { return };
        it.step(self.faults.get(&(node, target)).copied().filter(|_| engine == 0 || self.all_engines_fail));
        self.changed = true;
        self.tell_engine(node, engine);
        self.go_on(node, engine);
    }

    fn go_on(&mut self, node: usize, engine: usize) {
        let dice = self.rng.random();
        let it = &mut self.nodes[node].engines[engine];
        it.token += 1;
        let (next, token) = (it.next(), it.token);
        let Some(pace) = next else { return };
        let fault = it.order.and_then(|order| self.faults.get(&(node, order.manifest)));
        let fault = fault.copied().filter(|_| engine == 0 || self.all_engines_fail);
        let after = it.delay(fault, duration(pace, dice));
        after.into_iter().for_each(|after| self.plan(after, Event::Engine { node, engine, token }));
    }

    fn tell_engine(&mut self, node: usize, engine: usize) {
        let it = &self.nodes[node].engines[engine];
        if it.up {
            let facts = self.misread_facts(it.facts());
            self.tell(node, RolloutInput::Engine { engine: engine as EngineId, facts });
        }
    }

    pub(crate) fn tell(&mut self, node: usize, input: RolloutInput) {
        let now = self.local(node);
        let Some(agent) = &mut self.nodes[node].agent else { return };
        if let Some(desk) = &mut agent.desk {
            desk.handle(now, input.clone());
            while desk.poll_output().is_some() {}
        }
        agent.rollout.handle(now, input);
        self.drain(node);
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
                    let order = self.disobey(node, order);
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

    pub(crate) fn plan(&mut self, after: Duration, event: Event) {
        self.next += 1;
        self.events.insert((self.now + after, self.next), event);
    }

    /// What a node takes for so long.
    fn by_clock(&self, node: usize, after: Duration) -> Duration {
        after.div_f64(self.nodes[node].clock.1)
    }

    fn lives(&self, node: usize, life: u64) -> bool {
        self.nodes[node].agent.is_some() && self.nodes[node].life == life
    }

    pub(crate) fn local(&self, node: usize) -> Time {
        let (offset, rate) = self.nodes[node].clock;
        Time::from_origin(offset + self.now.since(Time::ZERO).mul_f64(rate))
    }
}
