//! A session with a driver, a node and an engine that do anything they may, in any order. What the engine would
//! answer from is looked at in a model of its memory.

use super::tests::{named, target};
use super::*;
use proptest::prelude::*;

/// Releases of two chunks each; some share one.
const RELEASES: [[u8; 2]; 4] = [[1, 2], [1, 9], [7, 9], [7, 2]];

#[derive(Clone, Debug)]
enum Event {
    Target(usize),
    Order(usize, Until),
    Until(Until),
    Unfit,
    /// A chunk comes to lie on the node.
    Arrives(u32),
    /// What was begun ends, well or not.
    Landing(u32),
    Driver(bool),
    /// The engine deals with the next thing it was told; if it is asked, it agrees or not.
    Engine(bool),
    /// It takes too long.
    Overdue,
}

fn event() -> impl Strategy<Value = Event> {
    let until = prop_oneof![Just(Until::Staged), Just(Until::Checked), Just(Until::Serving)];
    prop_oneof![
        2 => (0..RELEASES.len()).prop_map(Event::Target),
        2 => (0..RELEASES.len(), until.clone()).prop_map(|(release, until)| Event::Order(release, until)),
        2 => until.prop_map(Event::Until),
        1 => Just(Event::Unfit),
        6 => (0..2u32).prop_map(Event::Arrives),
        4 => (0..2u32).prop_map(Event::Landing),
        12 => prop::bool::weighted(0.85).prop_map(Event::Driver),
        12 => prop::bool::weighted(0.8).prop_map(Event::Engine),
        1 => Just(Event::Overdue),
    ]
}

/// Work of the driver that has begun.
#[derive(Debug)]
enum Work {
    Scan,
    Land(u32),
    Copy(u32),
    Prepare,
    Apply(ChunkSet),
}

#[derive(Debug, Default)]
struct World {
    session: EngineSession,
    memory: [u8; 2],
    works: Vec<Work>,
    /// What the engine was told and has not dealt with.
    told: VecDeque<Tell>,
    /// What it answers from, as it believes, and before that while it is paused.
    answers: Option<[u8; 2]>,
    before: Option<[u8; 2]>,
    aim: Option<usize>,
    until: Option<Until>,
    /// Failed, and not pointed at since.
    failed: BTreeSet<ManifestHash>,
    passed: BTreeSet<ManifestHash>,
}

fn content(manifest: &ManifestHash) -> [u8; 2] {
    *RELEASES.iter().find(|release| named(**release) == *manifest).expect("one of these")
}

impl World {
    /// `serving`: it was there before, and answers from that.
    fn new(serving: Option<usize>, memory: [u8; 2]) -> Self {
        let mut world = World { memory, ..World::default() };
        world.answers = serving.map(|release| RELEASES[release]);
        world.before = world.answers;
        world.memory = world.answers.unwrap_or(memory);
        let serving = world.answers.map(named);
        world.input(EngineInput::Hydrate { serving, fresh: false });
        world
    }

    fn input(&mut self, input: EngineInput) {
        self.session.handle(input);
        while let Some(output) = self.session.poll_output() {
            match output {
                EngineOutput::Scan => self.works.push(Work::Scan),
                EngineOutput::Copy { chunk } => self.works.push(Work::Copy(chunk)),
                EngineOutput::Prepare { .. } => self.works.push(Work::Prepare),
                EngineOutput::Apply { chunks } => self.works.push(Work::Apply(chunks)),
                EngineOutput::WantsChanged | EngineOutput::PlacesChanged => {}
                EngineOutput::Tell(tell) => self.tell(tell),
            }
        }
        self.look();
    }

    fn tell(&mut self, tell: Tell) {
        match &tell {
            Tell::Hydrated { manifest } | Tell::Applied { manifest } => {
                self.whole(manifest);
                assert!(!self.failed.contains(manifest), "what failed is served");
                assert!(self.passed.contains(manifest), "what was not checked is served");
                let goes_back = self.session.base().is_some_and(|base| base.manifest == *manifest);
                let is_aim = self.aim.is_some_and(|aim| named(RELEASES[aim]) == *manifest);
                let stays = self.answers.or(self.before) == Some(content(manifest));
                let leave = self.until.unwrap_or(Until::Serving);
                assert!(goes_back || stays || !is_aim || leave == Until::Serving, "served without leave");
            }
            Tell::Check { manifest } => self.whole(manifest),
            Tell::Pause { .. } | Tell::Aborted { .. } | Tell::Failed { .. } => {}
        }
        self.told.push_back(tell);
    }

    fn whole(&self, manifest: &ManifestHash) {
        assert_eq!(self.memory, content(manifest), "not every byte is in place");
    }

    /// What is said of it is so, whatever has happened.
    fn look(&mut self) {
        let facts = self.session.facts();
        if let Some(served) = facts.served {
            self.whole(&served);
        }
        assert!(facts.served.is_none() || facts.served != facts.target || facts.failed.is_some(), "{facts:?}");
        self.failed.extend(facts.failed.map(|(manifest, _)| manifest));
        if let Some(answers) = self.answers {
            assert_eq!(self.memory, answers, "a mixture is answered from");
        }
    }

    fn aims(&mut self, release: usize) {
        if self.aim != Some(release) {
            self.failed.remove(&named(RELEASES[release]));
        }
        self.aim = Some(release);
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Target(release) => {
                self.aims(release);
                self.input(EngineInput::Target(target(RELEASES[release])));
            }
            Event::Order(release, until) => {
                self.aims(release);
                self.until = Some(until);
                self.input(EngineInput::Order { target: target(RELEASES[release]), until });
            }
            Event::Until(until) => {
                self.until = Some(until);
                self.input(EngineInput::Until(until));
            }
            Event::Unfit => {
                self.aim = None;
                self.input(EngineInput::Unfit { manifest: named([0, 0]), reason: String::new() });
            }
            Event::Arrives(chunk) => {
                self.input(EngineInput::Available { chunks: ChunkSet::from_indices(2, [chunk]) });
            }
            Event::Driver(ok) => self.work(ok),
            Event::Landing(chunk) => self.land(chunk),
            Event::Engine(agrees) => self.engine(agrees),
            Event::Overdue => self.input(EngineInput::Overdue { reason: "too late".into() }),
        }
    }

    /// Once everything goes well again it serves what it is pointed at, whatever went before.
    fn comes_to(&mut self, release: usize) {
        // One that failed is tried again if it was pointed elsewhere.
        self.step(Event::Order((release + 1) % RELEASES.len(), Until::Staged));
        self.step(Event::Order(release, Until::Serving));
        for _ in 0..50 {
            [Event::Arrives(0), Event::Arrives(1), Event::Driver(true), Event::Engine(true)]
                .into_iter()
                .for_each(|event| self.step(event));
        }
        assert_eq!(self.session.facts().served, Some(named(RELEASES[release])), "{:?}", self.session);
        assert_eq!(self.answers, Some(RELEASES[release]));
    }

    fn land(&mut self, chunk: u32) {
        let target = self.session.target().map(|target| target.manifest);
        if target.is_some_and(|target| self.session.landing_place(&target, chunk).is_some()) {
            self.works.push(Work::Land(chunk));
            self.input(EngineInput::Landing { chunk });
        }
    }

    fn work(&mut self, ok: bool) {
        if self.works.is_empty() {
            return;
        }
        let work = self.works.remove(0);
        let target = content(&self.session.target().expect("what it is done for").manifest);
        match work {
            Work::Scan => {
                let right = (0..2u32).filter(|c| self.memory[*c as usize] == target[*c as usize]);
                let in_place = ChunkSet::from_indices(2, right);
                self.input(EngineInput::Scanned { in_place });
            }
            Work::Land(chunk) => {
                self.memory[chunk as usize] = if ok { target[chunk as usize] } else { 0 };
                self.input(EngineInput::Landed { chunk, verified: ok });
            }
            Work::Copy(chunk) => {
                self.memory[chunk as usize] = if ok { target[chunk as usize] } else { 0 };
                self.input(EngineInput::Copied { chunk, ok });
            }
            Work::Prepare => self.input(EngineInput::Prepared { ok }),
            Work::Apply(chunks) => {
                for chunk in chunks.iter() {
                    self.memory[chunk as usize] = if ok { target[chunk as usize] } else { 0 };
                }
                self.input(EngineInput::Applied { ok });
            }
        }
    }

    /// The engine is slow, and does as it was told in the order it was told.
    fn engine(&mut self, agrees: bool) {
        let Some(tell) = self.told.pop_front() else { return };
        let reason = || "no".to_string();
        match tell {
            Tell::Hydrated { manifest } => {
                self.answers = Some(content(&manifest));
                self.before = self.answers;
            }
            Tell::Pause { manifest, .. } if agrees => {
                self.answers = None;
                self.input(EngineInput::Paused { manifest });
            }
            Tell::Pause { manifest, .. } => {
                self.input(EngineInput::Refused { asked: Asked::Pause, manifest, reason: reason() });
            }
            Tell::Check { manifest } => {
                if agrees && self.session.asked() == Some(Asked::Check) {
                    self.passed.insert(manifest);
                }
                let result = if agrees { Ok(()) } else { Err(reason()) };
                self.input(EngineInput::Checked { manifest, result });
            }
            Tell::Applied { manifest } if agrees => {
                self.answers = Some(content(&manifest));
                self.before = self.answers;
                self.input(EngineInput::Resumed { manifest });
            }
            Tell::Applied { manifest } => {
                self.before = Some(content(&manifest));
                self.input(EngineInput::Refused { asked: Asked::Resume, manifest, reason: reason() });
            }
            Tell::Aborted { .. } => self.answers = self.answers.or(self.before),
            Tell::Failed { .. } => {}
        }
        self.look();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn never_a_mixture_never_too_far_never_what_failed(
        serving in prop::option::of(0..RELEASES.len()),
        events in prop::collection::vec(event(), 1..120),
    ) {
        let mut world = World::new(serving, [0, 0]);
        world.passed.extend(serving.map(|release| named(RELEASES[release])));
        for event in events {
            world.step(event);
        }
        world.comes_to(0);
        world.comes_to(3);
    }
}
