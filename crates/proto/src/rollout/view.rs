//! What a node has heard of the others: their reports, since when they are there without a break,
//! and since when they are silent.

use crate::limits::{ROLLOUT_RETURN, ROLLOUT_SILENCE};
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
    since: Time,
    /// Last.
    heard: Time,
}

impl View {
    pub(super) fn new(start: Time) -> Self {
        View { members: BTreeMap::new(), gone: BTreeMap::new(), start }
    }

    pub(super) fn on_member(&mut self, now: Time, node: NodeId, labels: Vec<(String, String)>, report: Option<Report>) {
        self.gone.remove(&node);
        let since = self.members.get(&node).map_or(now, |seen| seen.since);
        self.members.insert(node, Seen { labels, report, since, heard: now });
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

    pub(super) fn is_there(&self, node: &NodeId) -> bool {
        self.members.contains_key(node)
    }

    /// Silent for so long that, if it lives, it has noticed that it is cut off.
    pub(super) fn is_silent(&self, now: Time, node: &NodeId) -> bool {
        let since = self.gone.get(node).map_or(self.start, |(since, _)| *since);
        !self.is_there(node) && now.since(since) >= ROLLOUT_SILENCE
    }

    /// Heard over so long a time that whoever counts this node out has heard that it is back, and its word
    /// of that has come here. Silence since the first record does not count: it may be cut off again.
    pub(super) fn is_steady(&self, node: &NodeId) -> bool {
        self.members.get(node).is_some_and(|seen| seen.heard.since(seen.since) >= ROLLOUT_RETURN)
    }
}
