//! What must always hold, looked at after each step; of the honest nodes. See `aquifer_proto::rollout`. What is
//! said of a break begins with the property's name.

use crate::world::World;
use aquifer_core::{How, NodeId, ReleaseId, Step};
use aquifer_proto::rollout::Stand;
use std::collections::BTreeMap;

impl World {
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.rushed {
            return Err("canary: somebody went before the canaries were done".to_string());
        }
        let ready: Vec<(usize, ReleaseId)> = (0..self.nodes.len())
            .filter(|n| self.is_honest(*n) && self.is_ready(*n))
            .filter_map(|n| Some((n, self.report(n)?.due()?)))
            .collect();
        self.check_checked(&ready)?;
        self.check_together(&ready)?;
        if self.all_rolling { self.check_out() } else { Ok(()) }
    }

    /// Who is ready answers from what it says, whole, and its check has passed.
    fn check_checked(&self, ready: &[(usize, ReleaseId)]) -> Result<(), String> {
        for (node, due) in ready {
            for engine in self.nodes[*node].engines.iter().filter(|e| e.up) {
                if engine.served != Some(due.manifest) || engine.out || !engine.passed.contains(&due.manifest) {
                    return Err(format!("checked: {node} is ready with {due:?}, and {engine:?}"));
                }
            }
        }
        Ok(())
    }

    /// Nobody of its group is ready with an older release than one who is ready with a synchronous one.
    fn check_together(&self, ready: &[(usize, ReleaseId)]) -> Result<(), String> {
        let synchronous = |due: &ReleaseId| self.releases.get(due).is_some_and(|r| r.policy.is_synchronous());
        for (a, newer) in ready.iter().filter(|(_, due)| synchronous(due)) {
            let policy = &self.releases[newer].policy;
            let in_group = |n: usize| {
                let machine = &self.nodes[n];
                policy.entry(&machine.id).is_some() || machine.disk.releases.contains_key(newer)
            };
            if let Some((b, older)) = ready.iter().find(|(b, due)| due < newer && in_group(*b)) {
                return Err(format!("together: {a} is ready with {newer:?}, and {b} with {older:?}"));
            }
        }
        Ok(())
    }

    /// Of a group of a release's roster, no more are out than it allows; of an older release, among those that have heard
    /// of none after it: a newer one does without whoever was dead or cut off when it was made, and so cannot
    /// count on it. Racks are the groups; the number of one is another in a release that names nobody of a rack before it.
    fn check_out(&self) -> Result<(), String> {
        let most = self.out_most();
        let newest = self.releases.keys().next_back();
        for (id, release) in &self.releases {
            let goes_by = |n: usize| {
                let wanted = self.nodes[n].disk.stand.as_ref().map(|stand| stand.wanted);
                Some(id) == newest || wanted.is_some_and(|wanted| wanted <= *id)
            };
            let is_out = |n: &usize| self.is_honest(*n) && goes_by(*n) && self.nodes[*n].engines.iter().any(|e| e.out);
            let mut out: BTreeMap<Option<&str>, Vec<usize>> = BTreeMap::new();
            for node in release.policy.roster.iter().map(|e| self.index[&e.node]).filter(is_out) {
                out.entry(self.nodes[node].rack()).or_default().push(node);
            }
            if let Some((rack, out)) =
                out.iter().find(|(rack, out)| most.get(*rack).is_some_and(|most| out.len() > *most))
            {
                return Err(format!("out: {out:?} are out at once, of rack {rack:?} of {id:?}"));
            }
        }
        Ok(())
    }

    /// How many may be out of each rack. With a newcomer a percentage may allow one more than before.
    fn out_most(&self) -> BTreeMap<Option<&str>, usize> {
        let mut most: BTreeMap<Option<&str>, usize> = BTreeMap::new();
        for release in self.releases.values() {
            let mut racks: BTreeMap<Option<&str>, usize> = BTreeMap::new();
            for entry in &release.policy.roster {
                *racks.entry(self.nodes[self.index[&entry.node]].rack()).or_default() += 1;
            }
            if let How::Rolling { max_unavailable, .. } = &release.policy.how {
                for (rack, nodes) in racks {
                    let most = most.entry(rack).or_default();
                    *most = max_unavailable.of(nodes).max(*most);
                }
            }
        }
        most
    }

    /// Nobody of a rolling release's roster goes before its canaries are done.
    pub(crate) fn on_step(&mut self, node: usize, stand: &Stand) {
        let me = self.nodes[node].id;
        if stand.step == Step::Done {
            self.done.insert((stand.wanted, me));
        }
        let policy = self.releases.get(&stand.wanted).map(|r| &r.policy);
        let Some(policy) = policy.filter(|p| matches!(p.how, How::Rolling { .. })) else { return };
        if stand.step == Step::Going && policy.entry(&me).is_some_and(|e| !e.canary) && self.is_honest(node) {
            let is_early =
                |canary: &NodeId| self.is_honest(self.index[canary]) && !self.done.contains(&(stand.wanted, *canary));
            self.rushed |= policy.roster.iter().any(|e| e.canary && is_early(&e.node));
        }
    }
}
