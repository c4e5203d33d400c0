//! What must always hold, looked at after each step; of the honest nodes. See `aquifer_proto::rollout`. What is
//! said of a break begins with the property's name.

use crate::world::World;
use aquifer_core::{How, NodeId, ReleaseId, Step};
use aquifer_proto::rollout::Stand;
use std::collections::{BTreeMap, BTreeSet};

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

    /// Of a group, no more are out than a release allows. Racks are the groups; the number of one is another in a
    /// release that names nobody of a rack before it. With a newcomer a percentage may allow one more than before.
    fn check_out(&self) -> Result<(), String> {
        let mut groups: BTreeMap<Option<&str>, (BTreeSet<usize>, usize)> = BTreeMap::new();
        for release in self.releases.values() {
            let How::Rolling { max_unavailable, .. } = &release.policy.how else { continue };
            for entry in &release.policy.roster {
                let of_group = release.policy.roster.iter().filter(|e| e.group == entry.group).count();
                let node = self.index[&entry.node];
                let (nodes, most) = groups.entry(self.nodes[node].rack()).or_default();
                nodes.insert(node);
                *most = max_unavailable.of(of_group).max(*most);
            }
        }
        for (nodes, most) in groups.values() {
            // Who is gone with its engines out is unavailable for good: a release that does without it goes on.
            let newest = self.releases.values().next_back();
            let given_up = |n: usize| {
                let is_named = newest.is_some_and(|r| r.policy.entry(&self.nodes[n].id).is_some());
                self.nodes[n].agent.is_none() && !is_named
            };
            let counts = |n: usize| self.is_honest(n) && !given_up(n);
            let is_out = |n: &usize| counts(*n) && self.nodes[*n].engines.iter().any(|e| e.out);
            let out: Vec<&usize> = nodes.iter().filter(|n| is_out(n)).collect();
            if out.len() > *most {
                return Err(format!("out: {out:?} are out at once, of {nodes:?}"));
            }
        }
        Ok(())
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
