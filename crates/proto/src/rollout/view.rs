//! What a node has heard of the others: their reports, and since when they are silent.

use crate::limits::ROLLOUT_SILENCE;
use aquifer_core::{NodeId, Report, Time};
use std::collections::BTreeMap;

#[derive(Debug)]
pub(super) struct View {
    members: BTreeMap<NodeId, Seen>,
    /// Members that are not heard of any more, and since when. Those that never were are not in it.
    gone: BTreeMap<NodeId, (Time, Seen)>,
    start: Time,
}

#[derive(Debug)]
pub(super) struct Seen {
    pub(super) labels: Vec<(String, String)>,
    /// None: no engine of it follows the channel.
    pub(super) report: Option<Report>,
}

impl View {
    pub(super) fn new(start: Time) -> Self {
        View { members: BTreeMap::new(), gone: BTreeMap::new(), start }
    }

    pub(super) fn on_member(&mut self, node: NodeId, labels: Vec<(String, String)>, report: Option<Report>) {
        self.gone.remove(&node);
        self.members.insert(node, Seen { labels, report });
    }

    pub(super) fn on_gone(&mut self, now: Time, node: NodeId) {
        if let Some(seen) = self.members.remove(&node) {
            self.gone.insert(node, (now, seen));
        }
        if self.gone.len() > crate::limits::MEMBERS_MAX {
            let oldest = self.gone.iter().min_by_key(|(_, (since, _))| *since).map(|(node, _)| *node);
            oldest.map(|node| self.gone.remove(&node));
        }
    }

    /// Those that report, in the order of their ids.
    pub(super) fn reports(&self) -> impl Iterator<Item = (&NodeId, &Seen, &Report)> {
        self.members.iter().filter_map(|(node, seen)| Some((node, seen, seen.report.as_ref()?)))
    }

    /// Those that reported until they were missed.
    pub(super) fn missed(&self) -> impl Iterator<Item = (&NodeId, &Seen, &Report)> {
        self.gone.iter().filter_map(|(node, (_, seen))| Some((node, seen, seen.report.as_ref()?)))
    }

    pub(super) fn report(&self, node: &NodeId) -> Option<&Report> {
        self.members.get(node)?.report.as_ref()
    }

    /// Also of one that is missed.
    pub(super) fn last_report(&self, node: &NodeId) -> Option<&Report> {
        let seen = self.members.get(node).or_else(|| self.gone.get(node).map(|(_, seen)| seen))?;
        seen.report.as_ref()
    }

    pub(super) fn is_there(&self, node: &NodeId) -> bool {
        self.members.contains_key(node)
    }

    /// Silent for so long that, if it lives, it has noticed that it is cut off.
    pub(super) fn is_silent(&self, now: Time, node: &NodeId) -> bool {
        let since = self.gone.get(node).map_or(self.start, |(since, _)| *since);
        !self.is_there(node) && now.since(since) >= ROLLOUT_SILENCE
    }
}
