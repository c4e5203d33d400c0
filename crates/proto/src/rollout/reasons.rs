//! What a node waits for, in words for people.

use super::turns::Wait;
use super::{Override, Rollout, Stand};
use aquifer_core::{How, NodeId, Phase, Release, Step};

impl Rollout {
    /// Empty if there is nothing to say.
    pub(super) fn reason(&self) -> String {
        let (Some(stand), Some(release)) = (&self.stand, self.release()) else { return String::new() };
        if let Some(failed) = &stand.failed {
            return failed.clone();
        }
        if self.overridden != Override::Follow {
            return "pinned by this node's configuration".to_string();
        }
        match stand.step {
            Step::Done => String::new(),
            Step::Waiting => self.reason_to_wait(stand, release),
            Step::Going if release.policy.is_synchronous() && self.opened.is_none() => {
                "committed; some have not left the release before".to_string()
            }
            Step::Going => "switching".to_string(),
            Step::GoingBack => "going back".to_string(),
            Step::Halted => "given up".to_string(),
        }
    }

    fn reason_to_wait(&self, stand: &Stand, release: &Release) -> String {
        let phase = self.engines.phase(&stand.wanted.manifest);
        if let Some(statement) = self.lane.aborted(&stand.wanted) {
            return format!("aborted: {}", statement.reason);
        }
        if !self.is_sure(stand) {
            return "it may be committed already: too few of its nodes are heard, or some have switched".to_string();
        }
        if self.engines.is_empty() {
            return "no engine".to_string();
        }
        if phase < Phase::Staged && !self.engines.none_serves() {
            return format!("getting it ready: {phase}");
        }
        match release.policy.how {
            How::AtOnce => String::new(),
            How::Manual => "waits for `commit`".to_string(),
            How::Synchronous { .. } => "prepared; waits for the publisher's word".to_string(),
            How::Rolling { .. } => self.may_go(release).map_or_else(
                |wait| match wait {
                    Wait::Canary(node) => format!("waits for the canary {}", self.name(&node)),
                    Wait::Group(node, 1) => format!("waits for {}", self.name(&node)),
                    Wait::Group(node, out) => format!("waits for {} and {} more", self.name(&node), out - 1),
                    Wait::Roster(node) => format!("came later; waits for {}", self.name(&node)),
                },
                |()| "it is its turn, once it serves what it should".to_string(),
            ),
        }
    }

    fn name(&self, node: &NodeId) -> String {
        match self.view.is_there(node) {
            true => node.short(),
            false => format!("{} (not heard of)", node.short()),
        }
    }
}

/// Cuts at a character's edge.
pub(super) fn shorten(text: &mut String, bytes_max: usize) {
    let end = (0..=bytes_max.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.truncate(end);
}
