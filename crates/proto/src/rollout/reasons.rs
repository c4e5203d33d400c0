//! What a node waits for, in words for people.

use super::together::Doubt;
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
        if self.engines.len() < self.expected {
            return format!(
                "waits for {} of {} engines to come back",
                self.expected - self.engines.len(),
                self.expected
            );
        }
        match stand.step {
            Step::Done if self.is_settled() => String::new(),
            Step::Done => "an engine begins anew with it".to_string(),
            Step::Waiting => self.reason_to_wait(stand, release),
            Step::Going => match self.awaited {
                Some(node) if self.opened.is_none() => {
                    format!("committed; waits for {}", self.to_hear(&node))
                }
                _ => "switching".to_string(),
            },
            Step::GoingBack => format!("going back to {}", base_of(stand)),
            Step::Halted => "given up".to_string(),
        }
    }

    fn reason_to_wait(&self, stand: &Stand, release: &Release) -> String {
        if let Some((unheard, doubt)) = self.doubt(stand) {
            return match doubt {
                Doubt::Past(node) => {
                    format!("{} says that release {} is committed; no word of it here", self.name(&node), unheard.seq)
                }
                Doubt::Few { heard, roster } => {
                    format!("hears {heard} of {roster} nodes: release {} may be committed unheard", unheard.seq)
                }
            };
        }
        if let Some(reason) = self.reason_not_at_base(stand) {
            return reason;
        }
        if let Some(statement) = self.lane.aborted(&stand.wanted) {
            return format!(
                "aborted: {}",
                if statement.reason.is_empty() { "no reason given" } else { &statement.reason }
            );
        }
        if self.engines.is_empty() {
            return "no engine".to_string();
        }
        let phase = self.engines.phase(&stand.wanted.manifest);
        if phase < Phase::Staged && !self.engines.none_serves() {
            return format!("getting it ready: {phase}");
        }
        match release.policy.how {
            How::AtOnce => String::new(),
            How::Manual => "prepared; waits for a commit by hand".to_string(),
            How::Synchronous { .. } => match self.unprepared(release) {
                Some((node, true)) => format!("prepared; {} cannot take it", self.name(&node)),
                Some((node, false)) => format!("prepared; waits for {} to be", self.name(&node)),
                None => "prepared, as all are; waits for the publisher's word".to_string(),
            },
            How::Rolling { .. } => self.may_go(release).map_or_else(
                |wait| match wait {
                    Wait::Canary(node) => format!("waits for the canary {}", self.name(&node)),
                    Wait::Group(node, 1) => format!("waits for {}", self.name(&node)),
                    Wait::Group(node, out) => {
                        format!("waits for {} and {} more of its group", self.name(&node), out - 1)
                    }
                    Wait::Roster(node) => format!("came later; waits for {}", self.name(&node)),
                },
                |()| "it is its turn".to_string(),
            ),
        }
    }

    /// Its way to the release that it is to serve until then, or to being ready with that.
    fn reason_not_at_base(&self, stand: &Stand) -> Option<String> {
        let base = stand.base?;
        if let Some(failure) = self.engines.failure(&base.manifest) {
            return Some(format!("{} failed here: {failure}", base_of(stand)));
        }
        if !self.engines.is_empty() && !self.is_settled() {
            return Some(format!("goes to {} first: {}", base_of(stand), self.engines.phase(&base.manifest)));
        }
        let awaited = self.awaited.filter(|_| !stand.is_base_open)?;
        Some(format!("{} is committed; waits for {}", base_of(stand), self.to_hear(&awaited)))
    }

    /// The first of the roster that is not prepared, as far as is known, and whether it cannot be.
    fn unprepared(&self, release: &Release) -> Option<(NodeId, bool)> {
        let others = release.policy.roster.iter().map(|e| e.node).filter(|node| *node != self.me);
        let about = |node: &NodeId| self.view.report(node).filter(|r| r.wanted == release.id());
        let mut unprepared = others.filter(|node| !about(node).is_some_and(|r| r.phase.is_prepared()));
        unprepared.next().map(|node| (node, about(&node).is_some_and(|r| r.phase == Phase::Failed)))
    }

    fn to_hear(&self, node: &NodeId) -> String {
        match *node == self.me {
            true => "who may be there: it has just started".to_string(),
            false => format!("{} to hear that", self.name(node)),
        }
    }

    fn name(&self, node: &NodeId) -> String {
        match self.view.is_there(node) {
            true => node.short(),
            false => format!("{} (not heard of)", node.short()),
        }
    }
}

fn base_of(stand: &Stand) -> String {
    match stand.base {
        Some(base) if base.seq > 0 => format!("release {}", base.seq),
        Some(base) => format!("{}", base.manifest),
        None => "nothing".to_string(),
    }
}
