//! One run: what is released, what goes wrong at which moment, and what must have come of it in the end.

use crate::engine::Fault;
use crate::lies::{Bug, Liar, Lie};
use crate::world::{MS, World};
use aquifer_core::policy::{Entry, Required, Unavailable};
use aquifer_core::{How, ManifestHash, NodeId, OnFailure, Phase, Policy, ReleaseId, Report, Step, Time, Word};
use rand::Rng;
use std::time::Duration;

pub(crate) const S: Duration = Duration::from_secs(1);
/// When the release is made that it is all about; when faults have ended; and when all is to be well.
const RELEASED: u64 = 14;
const HEALED: u64 = 160;
const END: u64 = 420;
/// So long after whoever lies was removed, it is missed, and there is another release.
const REMOVED: u64 = 25;
/// How often, in seconds, it is looked whether all is well, and how often it has to be in a row.
const ROUND: usize = 5;
const WELL_FOR: u32 = 2;

/// Node 0 publishes, and has no engines; node 1 is the canary.
pub(crate) const PUBLISHER: usize = 0;
pub(crate) const CANARY: usize = 1;
pub(crate) const MEMBER: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    AtOnce,
    Synchronous(Required),
    Rolling(Unavailable),
    Manual,
}

pub(crate) const KINDS: [Kind; 4] = [
    Kind::Synchronous(Required::All),
    Kind::Synchronous(Required::PerMille(600)),
    Kind::Rolling(Unavailable::Count(1)),
    Kind::Rolling(Unavailable::Percent(70)),
];

/// When something happens: as soon as the node that is watched says so.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Moment {
    In(Phase),
    At(Step),
    /// The commit is said, and nobody has heard it.
    Committed,
}

pub(crate) const MOMENTS: [Moment; 9] = [
    Moment::In(Phase::Heard),
    Moment::In(Phase::Planned),
    Moment::In(Phase::Fetched),
    Moment::In(Phase::Verified),
    Moment::In(Phase::Staged),
    Moment::At(Step::Going),
    Moment::In(Phase::Paused),
    Moment::In(Phase::Checked),
    Moment::At(Step::Done),
];

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mishap {
    /// For ever; or for some time.
    Crash,
    Restart,
    /// The agent's process alone, for ever or for some time; or an engine's.
    AgentCrash,
    AgentRestarts,
    EngineRestarts,
    /// It is cut off from all others; half of them are from the other half; the canary is from the rest.
    CutOff,
    Halves,
    CanaryCutOff,
    /// The network parts, for long, and again between others, at once or after a moment.
    Flaps,
    /// A release that follows; of the same number from another publisher; one that goes back.
    Superseded,
    Rivalled,
    RolledBack,
    Aborted,
    Joined,
}

pub(crate) const DEATHS: [Mishap; 8] = [
    Mishap::Crash,
    Mishap::Restart,
    Mishap::AgentCrash,
    Mishap::AgentRestarts,
    Mishap::EngineRestarts,
    Mishap::CutOff,
    Mishap::Halves,
    Mishap::CanaryCutOff,
];

pub(crate) const NEWS: [Mishap; 5] =
    [Mishap::Superseded, Mishap::Rivalled, Mishap::RolledBack, Mishap::Aborted, Mishap::Joined];

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) kind: Kind,
    /// Of a synchronous release.
    pub(crate) on_failure: OnFailure,
    pub(crate) members: usize,
    pub(crate) loss: f64,
    /// What is wrong with which release, and where; at all engines there, or at the first.
    pub(crate) bad: &'static [u8],
    pub(crate) faults: Vec<(usize, Fault)>,
    pub(crate) all_engines_fail: bool,
    pub(crate) liar: Option<(usize, Lie)>,
    /// Who uses the key in the end, if the publisher is dead.
    pub(crate) heir: Option<usize>,
    pub(crate) bug: Option<Bug>,
    pub(crate) mishaps: Vec<(Moment, usize, Mishap)>,
}

impl Plan {
    pub(crate) fn new(seed: u64, kind: Kind) -> Self {
        Plan {
            seed,
            kind,
            on_failure: OnFailure::Stay,
            members: 5,
            loss: 0.05,
            bad: b"2",
            faults: vec![],
            all_engines_fail: true,
            liar: None,
            heir: None,
            bug: None,
            mishaps: vec![],
        }
    }

    /// How many of the mishaps did not happen, because their moment did not come; or what went wrong.
    pub(crate) fn run(&self) -> Result<usize, String> {
        self.play().map_err(|problem| format!("{problem}\n{self:?}"))
    }

    fn play(&self) -> Result<usize, String> {
        let mut world = self.begin()?;
        let release = world.release(PUBLISHER, 2, b"2", self.policy());
        let mut left = self.mishaps.clone();
        let mut well = 0;
        for until in (RELEASED..HEALED).step_by(ROUND) {
            world.run(at(until + ROUND as u64), &mut |world| {
                while let Some(i) = left.iter().position(|(moment, node, _)| has_come(world, *moment, *node, release)) {
                    let (_, node, mishap) = left.remove(i);
                    self.strike(world, node, mishap, release);
                }
                Ok(())
            })?;
            let goes_on = self.liar.is_some() || self.heir.is_some() || self.kind == Kind::Manual;
            well = if !goes_on && !world.has_faults() && self.check_end(&world).is_ok() { well + 1 } else { 0 };
            if well == WELL_FOR {
                return Ok(left.len());
            }
        }
        self.heal(&mut world)?;
        for until in (HEALED + REMOVED..END).step_by(ROUND) {
            world.run(at(until + ROUND as u64), &mut |_| Ok(()))?;
            well = if self.check_end(&world).is_ok() { well + 1 } else { 0 };
            if well == WELL_FOR {
                return Ok(left.len());
            }
        }
        self.check_end(&world).map(|()| left.len())
    }

    /// Everybody serves the first release.
    fn begin(&self) -> Result<World, String> {
        let mut world = World::new(self.seed);
        world.all_rolling = matches!(self.kind, Kind::Rolling(_));
        world.all_engines_fail = self.all_engines_fail;
        world.add(&[], 0);
        for i in 1..=self.members {
            self.join(&mut world, i);
        }
        world.run(at(1), &mut |_| Ok(()))?;
        world.release(PUBLISHER, 1, b"1", Policy::default());
        world.run(at(RELEASED), &mut |_| Ok(()))?;
        for node in 1..=self.members {
            if !world.is_ready(node) {
                return Err(format!("end: {node} is not ready with the first release: {:?}", world.report(node)));
            }
        }
        (world.committer, world.loss, world.bug) = (Some(PUBLISHER), self.loss, self.bug);
        world.liar = self.liar.map(|(node, lie)| Liar { node, lie });
        world.faults.extend(self.faults.iter().map(|(node, fault)| ((*node, ManifestHash::of(self.bad)), *fault)));
        Ok(world)
    }

    /// What an operator does in the end: the network is mended, what hangs is started anew, who lies is
    /// removed, and whoever holds the key says the word, if the publisher cannot.
    fn heal(&self, world: &mut World) -> Result<(), String> {
        world.side.fill(0);
        if world.nodes[PUBLISHER].agent.is_none() {
            let lives = |n: &usize| world.is_honest(*n) && world.nodes[*n].agent.is_some();
            world.committer = self.heir.into_iter().chain(1..=self.members).find(lives);
        }
        for (node, _) in self.faults.iter().filter(|(_, fault)| *fault == Fault::HangsUntilRestart) {
            if world.is_honest(*node) && world.nodes[*node].agent.is_some() {
                world.kill_agent(*node, Some(S));
            }
        }
        let newest = *world.releases.keys().next_back().unwrap();
        if let Some((liar, _)) = self.liar {
            world.kill(liar, None);
            world.run(at(HEALED + REMOVED), &mut |_| Ok(()))?;
            world.release(world.committer.unwrap(), newest.seq + 1, b"4", self.policy());
        }
        if self.kind == Kind::Manual {
            world.say(world.committer.unwrap(), newest, Word::Commit, String::new());
        }
        world.run(at(HEALED + REMOVED), &mut |_| Ok(()))
    }

    fn policy(&self) -> Policy {
        let deadline_ms = 60_000;
        let how = match self.kind {
            Kind::AtOnce => How::AtOnce,
            Kind::Manual => How::Manual,
            Kind::Synchronous(required) => How::Synchronous { required, deadline_ms, on_failure: self.on_failure },
            Kind::Rolling(max_unavailable) => {
                let (canary, by) = (Some("canary=yes".parse().unwrap()), Some("rack".to_string()));
                How::Rolling { canary, max_unavailable, by }
            }
        };
        Policy { how, ..Policy::default() }
    }

    fn join(&self, world: &mut World, i: usize) {
        let canary = if i == CANARY { "yes" } else { "no" };
        world.add(&[("canary", canary.to_string()), ("rack", format!("{}", i % 2))], 1 + i % 2);
    }

    fn strike(&self, world: &mut World, node: usize, mishap: Mishap, release: ReleaseId) {
        // Whoever has heard most: one that has just started would know of nobody to name.
        let publisher = (0..world.nodes.len()).max_by_key(|n| world.seen_by(*n)).unwrap_or(PUBLISHER);
        let while_ = MS * world.rng.random_range(500..50_000);
        match mishap {
            Mishap::Crash => world.kill(node, None),
            Mishap::Restart => world.kill(node, Some(while_)),
            Mishap::AgentCrash => world.kill_agent(node, None),
            Mishap::AgentRestarts => world.kill_agent(node, Some(while_)),
            Mishap::EngineRestarts if world.nodes[node].engines.is_empty() => {}
            Mishap::EngineRestarts => world.kill_engine(node, 0, Some(while_)),
            Mishap::CutOff => {
                world.side[node] = 1;
                world.heal_after(while_ * 2);
            }
            Mishap::CanaryCutOff => {
                world.side[CANARY] = 1;
                world.heal_after(while_ * 2);
            }
            Mishap::Halves => {
                (0..world.side.len()).for_each(|n| world.side[n] = world.rng.random_range(0..2));
                world.heal_after(while_ * 2);
            }
            Mishap::Flaps => {
                let mut after = Duration::ZERO;
                for _ in 0..3 {
                    let away: Vec<usize> = (0..world.side.len()).filter(|_| world.rng.random_bool(0.5)).collect();
                    world.part_after(after, &away);
                    after += MS * world.rng.random_range(10_000..60_000);
                    if world.rng.random_bool(0.5) {
                        world.heal_after(after);
                        after += MS * world.rng.random_range(20..5_000);
                    }
                }
                world.heal_after(after);
            }
            Mishap::Superseded => drop(world.release(publisher, 3, b"3", self.policy())),
            Mishap::Rivalled => drop(world.release(publisher, release.seq, b"rival", self.policy())),
            Mishap::RolledBack => drop(world.release(publisher, 3, b"1", self.policy())),
            Mishap::Aborted => world.say(MEMBER, release, Word::Abort, "by hand".to_string()),
            Mishap::Joined => self.join(world, world.nodes.len()),
        }
    }

    /// Whether everybody is where it should be, and stays.
    fn check_end(&self, world: &World) -> Result<(), String> {
        let newest = *world.releases.keys().next_back().unwrap();
        let lives = |n: &usize| world.nodes[*n].agent.is_some() && world.nodes[*n].engines.iter().all(|e| e.up);
        let honest: Vec<usize> = (1..world.nodes.len()).filter(|n| world.is_honest(*n)).collect();
        let living: Vec<usize> = honest.iter().copied().filter(lives).collect();
        let Some(first) = living.first() else { return Ok(()) };
        let all_live = living.len() == honest.len();
        let report = |n: &usize| world.report(*n).ok_or_else(|| format!("end: {n} reports nothing"));
        let due: Vec<Option<ReleaseId>> =
            living.iter().map(|n| report(n).map(Report::due)).collect::<Result<_, String>>()?;
        // Who cannot take what is committed is not ready, nor is anybody in doubt without a majority.
        let synchronous = matches!(self.kind, Kind::Synchronous(_));
        let few = living.iter().any(|n| hears_few(world, *n));
        let stays = !self.is_undone(world);
        if world.remedies > 0 && self.liar.is_none() && !self.asks_to_be_undone(self.faults.len()) {
            return Err("end: it was undone, and nobody asked for it".to_string());
        }
        for node in &living {
            let it = report(node)?;
            let failed = self.fails(*node) && it.due().is_some_and(|due| due.manifest == ManifestHash::of(self.bad));
            if !(it.ready || hears_few(world, *node) || failed && stays) {
                return Err(format!("end: {node} is not ready in the end: {it:?}"));
            }
        }
        // One that died for ever may hold up a rolling release; nothing else leaves two releases served.
        let held_up = matches!(self.kind, Kind::Rolling(_)) && !all_live;
        let failing = (1..=self.members).any(|n| self.fails(n));
        let may_differ = failing && !synchronous;
        if !held_up && !may_differ && !few && due.iter().any(|d| *d != due[0]) {
            return Err(format!("end: they do not agree in the end: {due:?}"));
        }
        let failed = failing && newest.manifest == ManifestHash::of(self.bad);
        let all_is_back = due.iter().all(|d| d.is_some_and(|d| d != newest));
        if matches!(self.kind, Kind::Rolling(_)) && failed && all_live && !all_is_back {
            return Err(format!("end: it failed, and is served: {due:?}"));
        }
        let aborted = world.nodes[*first].disk.statements.keys().any(|(_, word)| *word == Word::Abort);
        if all_live && !failed && !aborted && due[0] != Some(newest) {
            return Err(format!("end: it went nowhere: {due:?}, {:?}", report(first)?));
        }
        Ok(())
    }

    fn fails(&self, node: usize) -> bool {
        self.faults.iter().any(|(n, fault)| *n == node && *fault != Fault::HangsUntilRestart)
    }

    /// Whether a holder of the key goes back from a synchronous release that failed.
    fn is_undone(&self, world: &World) -> bool {
        let lives = |n: &usize| world.nodes[*n].agent.is_some();
        let failing = (1..=self.members).filter(|n| self.fails(*n) && lives(n)).count();
        // That it failed may not be said, or not be remembered, where a person has made a newer release since.
        let by_people = world.releases.len() - world.remedies;
        let knows = |n: usize| lives(&n) && by_people == 2 && (world.nodes[n].life == 1 || world.remedies == 0);
        self.asks_to_be_undone(failing) && world.committer.is_some_and(knows)
    }

    fn asks_to_be_undone(&self, failing: usize) -> bool {
        let Kind::Synchronous(required) = self.kind else { return false };
        self.on_failure == OnFailure::RollBack && failing > self.members - required.of(self.members)
    }
}

/// Whether a majority is dead of the roster of a synchronous release that `node` may be in doubt of, or wait for others
/// to be past. It need not be the one it wants: others follow, and name whoever was there then.
fn hears_few(world: &World, node: usize) -> bool {
    let Some(report) = world.report(node) else { return false };
    let between = world.releases.range(..=report.wanted).filter(|(id, _)| report.base.is_none_or(|base| **id >= base));
    let lives = |id: &NodeId| world.is_honest(world.index[id]) && world.nodes[world.index[id]].agent.is_some();
    let few =
        |roster: &[Entry]| !roster.is_empty() && roster.iter().filter(|e| lives(&e.node)).count() * 2 <= roster.len();
    between.filter(|(_, r)| r.policy.is_synchronous()).any(|(_, r)| few(&r.policy.roster))
}

pub(crate) fn at(seconds: u64) -> Time {
    Time::ZERO + S * u32::try_from(seconds).unwrap()
}

/// The publisher has no phases of its own: what happens to it happens in those of a member.
fn has_come(world: &World, moment: Moment, node: usize, release: ReleaseId) -> bool {
    let node = if node == PUBLISHER { MEMBER } else { node };
    let about = world.report(node).filter(|r| r.wanted.seq >= release.seq);
    about.is_some_and(|r| match moment {
        Moment::In(phase) => r.phase == phase,
        Moment::At(step) => r.step == step,
        Moment::Committed => world.said.contains(&(release, Word::Commit)),
    })
}
