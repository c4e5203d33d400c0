//! Rolling releases: who may go next, decided by each node for itself.
//!
//! The nodes of the roster stand in one order that follows from the release: canaries first, then by
//! rendezvous hash. In each group as many may be out as the policy says, `k`. A node goes when of the
//! others of its group fewer than `k` may be out. These may be out, for all it knows:
//! - one before it that it has not heard to be done with this release;
//! - one after it that it has not heard to be settled under this release: until then it may be out for
//!   an earlier one.
//!
//! Once the release failed somewhere, nobody goes any more, and who is done goes back in the opposite
//! order. It may when fewer than `k` may be out of:
//! - those after it that it has not heard to be halted;
//! - those before it that it has heard neither to be done nor to be halted.
//!
//! One where an engine failed with what it served before is settled once its other engines are where they
//! should be: it is not ready, as if that engine had crashed, and nothing of it is out for a release.
//!
//! *Never more than `k` are out.* What is counted on (settled, done, halted) does not become
//! untrue until one has its turn, and turns obey these rules; so old news is safe news, and who hears
//! nothing waits. Take those out under this release. If some of them go back, the first of those
//! in the order counted all the others as out: those after it are not halted, and those before it go
//! forward, so were not done. If none goes back, the last of them in the order counted all the
//! others, because none is done. Either way it counted those that are out for an earlier release too,
//! since they had not settled under this one. It went, so it and all it counted are at most `k`.

use aquifer_core::codec;
use aquifer_core::hash::Hash;
use aquifer_core::policy::{Entry, Unavailable};
use aquifer_core::{NodeId, Phase, ReleaseId, Report, Step};
use std::collections::BTreeMap;

/// The most that was ever heard of each node about one release.
#[derive(Debug, Default)]
pub(super) struct Heard(BTreeMap<NodeId, Most>);

#[derive(Clone, Copy, Debug, Default)]
struct Most {
    step: Step,
    settled: bool,
    failed: bool,
}

impl Heard {
    pub(super) fn on_report(&mut self, node: NodeId, report: &Report) {
        let most = self.0.entry(node).or_default();
        most.step = most.step.max(report.step);
        most.settled |= report.settled;
        // One that is done, and fails then, may have to wait for others to go back before it.
        most.failed |= report.phase == Phase::Failed || report.step >= Step::GoingBack;
    }

    fn most(&self, node: &NodeId) -> Most {
        self.0.get(node).copied().unwrap_or_default()
    }

    pub(super) fn has_answered(&self, node: &NodeId) -> bool {
        self.0.contains_key(node)
    }

    /// One that gave the release up because it failed there, or elsewhere.
    pub(super) fn failed(&self) -> Option<NodeId> {
        self.0.iter().find(|(_, most)| most.failed).map(|(node, _)| *node)
    }

    pub(super) fn is_done(&self, node: &NodeId) -> bool {
        self.most(node).step == Step::Done
    }

    fn is_halted(&self, node: &NodeId) -> bool {
        self.most(node).step == Step::Halted
    }

    fn is_settled(&self, node: &NodeId) -> bool {
        let most = self.most(node);
        most.settled || most.step > Step::Waiting
    }
}

/// The order of one release.
#[derive(Debug, Default)]
pub(super) struct Turns {
    release: Option<ReleaseId>,
    order: Vec<Entry>,
    unavailable: Option<Unavailable>,
    /// Nodes of each group.
    groups: BTreeMap<u32, usize>,
}

/// Why a node waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// For a canary.
    Canary(NodeId),
    /// For one of its group, and how many of them.
    Group(NodeId, usize),
    /// For one of the roster, because it came later.
    Roster(NodeId),
}

impl Turns {
    pub(super) fn of(release: ReleaseId, roster: &[Entry], unavailable: Unavailable) -> Self {
        let mut order = roster.to_vec();
        order.sort_by_cached_key(|e| (!e.canary, weight(Some(release), &e.node), e.node));
        let mut groups = BTreeMap::new();
        roster.iter().for_each(|e| *groups.entry(e.group).or_default() += 1);
        Turns { release: Some(release), order, unavailable: Some(unavailable), groups }
    }

    /// Whether `me` may leave its base; if not, for whom it waits. Who is not in the roster comes after
    /// it, one after the other as far as such `others` are seen.
    pub(super) fn may_go<'a>(
        &'a self,
        me: &NodeId,
        heard: &Heard,
        others: impl Iterator<Item = &'a NodeId>,
    ) -> Result<(), Wait> {
        let Some(at) = self.order.iter().position(|e| e.node == *me) else {
            let first = |other: &&NodeId| weight(self.release, other) < weight(self.release, me);
            let mut before = self.order.iter().map(|e| &e.node).chain(others.filter(first));
            let waits = before.find(|node| !heard.is_done(node));
            return waits.map_or(Ok(()), |node| Err(Wait::Roster(*node)));
        };
        let canary = self.order.iter().find(|e| e.canary && !heard.is_done(&e.node));
        if let Some(canary) = canary.filter(|_| !self.order[at].canary) {
            return Err(Wait::Canary(canary.node));
        }
        self.few_out(at, |j, node| if j < at { heard.is_done(node) } else { heard.is_settled(node) })
    }

    /// Whether `me`, which serves a release that failed elsewhere, may go back.
    pub(super) fn may_return(&self, me: &NodeId, heard: &Heard) -> Result<(), Wait> {
        let Some(at) = self.order.iter().position(|e| e.node == *me) else { return Ok(()) };
        let is_in = |j: usize, node: &NodeId| heard.is_halted(node) || (j < at && heard.is_done(node));
        self.few_out(at, is_in)
    }

    fn few_out(&self, at: usize, is_in: impl Fn(usize, &NodeId) -> bool) -> Result<(), Wait> {
        let group = self.order[at].group;
        let others = self.order.iter().enumerate().filter(|(j, e)| *j != at && e.group == group);
        let out: Vec<NodeId> = others.filter(|(j, e)| !is_in(*j, &e.node)).map(|(_, e)| e.node).collect();
        let nodes = self.groups.get(&group).copied().unwrap_or(0);
        let most = self.unavailable.map_or(1, |u| u.of(nodes));
        match out.first() {
            Some(first) if out.len() >= most => Err(Wait::Group(*first, out.len())),
            _ => Ok(()),
        }
    }
}

/// Rendezvous hashing: another order for each release, the same at all nodes.
fn weight(release: Option<ReleaseId>, node: &NodeId) -> Hash {
    let mut bytes = Vec::new();
    codec::append(&mut bytes, &(release, node));
    Hash::of(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::testing::id;

    fn turns(groups: &[u32]) -> Turns {
        let entry = |(n, group): (u8, &u32)| Entry { node: NodeId([n; 32]), canary: false, group: *group };
        let roster: Vec<Entry> = (1..).zip(groups).map(entry).collect();
        Turns::of(id(2), &roster, Unavailable::Count(1))
    }

    fn all_settled(turns: &Turns) -> Heard {
        let most = Most { settled: true, ..Most::default() };
        Heard(turns.order.iter().map(|e| (e.node, most)).collect())
    }

    #[test]
    fn each_group_has_its_own_turn() {
        let turns = turns(&[0, 0, 0, 1, 1]);
        let heard = all_settled(&turns);
        let going = turns.order.iter().filter(|e| turns.may_go(&e.node, &heard, std::iter::empty()).is_ok());
        let mut groups: Vec<u32> = going.map(|e| e.group).collect();
        groups.sort();
        assert_eq!(groups, [0, 1]);
    }

    #[test]
    fn who_came_later_goes_last_and_one_by_one() {
        let turns = turns(&[0]);
        let mut heard = all_settled(&turns);
        let later: Vec<NodeId> = (7..10).map(|n| NodeId([n; 32])).collect();
        let going = |heard: &Heard| {
            later.iter().filter(|node| turns.may_go(node, heard, later.iter()).is_ok()).copied().collect::<Vec<_>>()
        };
        assert_eq!(going(&heard), [], "the roster comes first");
        let done = Most { step: Step::Done, ..Most::default() };
        heard.0.insert(NodeId([1; 32]), done);
        for _ in &later {
            let next = going(&heard).into_iter().find(|node| !heard.is_done(node)).unwrap();
            let others = going(&heard).into_iter().filter(|node| *node != next);
            assert!(others.into_iter().all(|node| heard.is_done(&node)), "one at a time");
            heard.0.insert(next, done);
        }
    }

    /// Records come late, and twice.
    #[test]
    fn what_was_said_once_counts() {
        let turns = turns(&[0, 0]);
        let (first, second) = (turns.order[0].node, turns.order[1].node);
        let report = |step, settled| Report {
            wanted: id(2),
            base: None,
            step,
            phase: Phase::Heard,
            served: None,
            settled,
            ready: false,
            engines: 1,
            held: false,
            reason: String::new(),
            times: Default::default(),
        };
        let mut heard = Heard::default();
        heard.on_report(second, &report(Step::Waiting, true));
        heard.on_report(second, &report(Step::Waiting, false));
        assert_eq!(turns.may_go(&first, &heard, std::iter::empty()), Ok(()));
        heard.on_report(first, &report(Step::Done, true));
        heard.on_report(first, &report(Step::Going, false));
        assert_eq!(turns.may_go(&second, &heard, std::iter::empty()), Ok(()));
    }
}
