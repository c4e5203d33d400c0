//! Whom a publisher names in a release.

use super::Rollout;
use aquifer_core::How;
use aquifer_core::limits::ROSTER_MAX;
use aquifer_core::policy::{Entry, Policy};
use std::collections::BTreeSet;

impl Rollout {
    /// The policy with its roster: nodes that are there, have engines, match and are not held. None:
    /// there are more than a release may name.
    pub fn with_roster(&self, mut policy: Policy) -> Option<Policy> {
        let mine = (self.me, self.lane.labels(), self.said.as_ref());
        let others = self.view.reports().map(|(node, seen, report)| (*node, seen.labels.as_slice(), Some(report)));
        let fit = |labels: &[(String, String)]| policy.subset.matches(labels);
        let mut members: Vec<_> = others
            .chain([mine])
            .filter_map(|(node, labels, report)| Some((node, labels, report?)))
            .filter(|(_, labels, report)| fit(labels) && !report.held && report.engines > 0)
            .map(|(node, labels, _)| (node, labels))
            .collect();
        members.sort();
        let (canary, by) = match &policy.how {
            How::Rolling { canary, by, .. } => (canary.as_ref(), by.as_deref()),
            How::AtOnce | How::Synchronous { .. } | How::Manual => (None, None),
        };
        let group_of = |labels: &'_ [(String, String)]| {
            let value = labels.iter().find(|(key, _)| Some(key.as_str()) == by);
            value.map_or(String::new(), |(_, value)| value.clone())
        };
        let groups: BTreeSet<String> = members.iter().map(|(_, labels)| group_of(labels)).collect();
        let groups: Vec<String> = groups.into_iter().collect();
        let entry = |(node, labels): &(_, &[(String, String)])| Entry {
            node: *node,
            canary: canary.is_some_and(|canary| canary.matches(labels)),
            group: groups.binary_search(&group_of(labels)).ok().and_then(|g| u32::try_from(g).ok()).unwrap_or(0),
        };
        policy.roster = members.iter().map(entry).collect();
        (policy.roster.len() <= ROSTER_MAX).then_some(policy)
    }
}
