//! Members that lie, and bugs that are planted to prove that the checks find them.

use crate::plan::CANARY;
use crate::world::World;
use aquifer_core::{Phase, Release, Report, Step};
use aquifer_proto::rollout::{Facts, Order, Until};
use rand::Rng;

/// What one member does instead of what it says. None of them ever switches its engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    /// It says to be prepared, and no more, whatever it hears.
    Prepared,
    /// It says to be ready with whatever it is to get to.
    Done,
    /// It says to switch, and never to arrive.
    Going,
    /// It says that the release failed.
    Failed,
    /// Any of these, another at each time and to each other member.
    Fickle,
}

pub(crate) const LIES: [Lie; 5] = [Lie::Prepared, Lie::Done, Lie::Going, Lie::Failed, Lie::Fickle];

#[derive(Clone, Copy, Debug)]
pub(crate) struct Liar {
    pub(crate) node: usize,
    pub(crate) lie: Lie,
}

/// One wrong line in the program, imitated by what it is told, or by what becomes of its orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// Engines go on where they should wait for their turn, or for the commit.
    NoLimit,
    /// An engine is taken to serve what only waits beside what it serves.
    EarlyReady,
    /// A failed check is taken for a passed one.
    FailedPasses,
    /// Each node takes itself for the whole roster.
    OwnRoster,
    /// A synchronous release is committed before all have answered.
    CommitsUnasked,
    /// The canary is taken to be done; or the others are.
    SkipsCanary,
    PresumesDone,
    /// The others are taken not to be out.
    PresumesSettled,
    /// Nobody hears commits.
    Deaf,
}

impl World {
    pub(crate) fn is_honest(&self, node: usize) -> bool {
        self.liar.is_none_or(|liar| liar.node != node)
    }

    /// What `from` tells one of the others.
    pub(crate) fn lie(&mut self, from: usize, report: Report) -> Report {
        let Some(liar) = self.liar.filter(|liar| liar.node == from) else { return report };
        let lie = match liar.lie {
            Lie::Fickle => [Lie::Prepared, Lie::Done, Lie::Going, Lie::Failed][self.rng.random_range(0..4)],
            lie @ (Lie::Prepared | Lie::Done | Lie::Going | Lie::Failed) => lie,
        };
        let (step, phase) = match lie {
            Lie::Prepared | Lie::Fickle => (Step::Waiting, Phase::Staged),
            Lie::Done => (Step::Done, Phase::Ready),
            Lie::Going => (Step::Going, Phase::Staged),
            Lie::Failed => (Step::GoingBack, Phase::Failed),
        };
        let ready = step == Step::Done;
        let served = if ready { Some(report.wanted.manifest) } else { report.base.map(|base| base.manifest) };
        Report { step, phase, ready, served, settled: step != Step::Going, ..report }
    }

    /// What becomes of an order.
    pub(crate) fn disobey(&self, node: usize, order: Order) -> Order {
        let until = match self.bug {
            Some(Bug::NoLimit) => Until::Serving,
            _ if !self.is_honest(node) => Until::Staged,
            _ => order.until,
        };
        Order { until, ..order }
    }

    pub(crate) fn misread(&self, from: usize, report: Report) -> Report {
        match self.bug {
            Some(Bug::PresumesDone) if from != CANARY => Report { step: Step::Done, ..report },
            Some(Bug::SkipsCanary) if from == CANARY => Report { step: Step::Done, ..report },
            Some(Bug::PresumesSettled) => Report { settled: true, ..report },
            _ => report,
        }
    }

    pub(crate) fn misread_release(&self, node: usize, mut release: Release) -> Release {
        if self.bug == Some(Bug::OwnRoster) {
            release.policy.roster.retain(|e| e.node == self.nodes[node].id);
        }
        release
    }

    pub(crate) fn misread_facts(&self, facts: Facts) -> Facts {
        match self.bug {
            Some(Bug::EarlyReady) if facts.phase >= Phase::Staged => Facts { served: facts.target, ..facts },
            Some(Bug::FailedPasses) if facts.failed.is_some() => {
                Facts { served: facts.failed.map(|(manifest, _)| manifest), failed: None, ..facts }
            }
            _ => facts,
        }
    }
}
