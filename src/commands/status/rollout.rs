//! A rollout as a person reads it: a line for each node, and what holds it up.

use super::picture::{Picture, count};
use crate::agent::view::{ChannelView, RolloutView, View};
use crate::output::plain;

/// Steps of the bar: one for each phase up to ready.
const PHASES: [&str; 8] = ["heard", "planned", "fetched", "verified", "staged", "paused", "checked", "ready"];
/// Nodes with a line of their own. The rest is counted: a fleet of thousands is read from `aquifer releases`.
const ROWS_MAX: usize = 64;

impl Picture {
    /// This node first, then the others: those that are behind before those that are done.
    pub(super) fn rollout(&mut self, view: &View, channel: &ChannelView) {
        let own = channel.rollout.iter().map(|rollout| (view.name.as_str(), rollout));
        let of =
            |peer: &'_ crate::agent::view::PeerView| peer.rollouts.iter().position(|r| r.channel == channel.channel);
        let others = view.peers.iter().filter_map(|p| Some((p.name.as_str(), &p.rollouts[of(p)?])));
        let mut others: Vec<(&str, &RolloutView)> = others.collect();
        others.sort_by_key(|(name, rollout)| (rollout.seq, rank(rollout), *name));
        let nodes: Vec<(&str, &RolloutView)> = own.chain(others).collect();
        if nodes.is_empty() {
            return;
        }
        let newest = nodes.iter().map(|(_, r)| r.seq).max().unwrap_or(0);
        let at_newest = nodes.iter().filter(|(_, r)| r.seq == newest);
        let ready = at_newest.clone().filter(|(_, r)| r.ready && r.served == r.wanted).count();
        let said = match channel.word.as_deref() {
            Some("commit") => "committed",
            Some(_) => "given up",
            None => "",
        };
        let nodes_with = count(nodes.len() as u64, "node");
        self.row(
            2,
            [
                format!("release {newest} is served by {ready} of {nodes_with} with engines"),
                plain(&channel.policy),
                said.to_string(),
            ],
        );
        for (name, rollout) in nodes.iter().take(ROWS_MAX) {
            self.node(name, rollout, newest);
        }
        if nodes.len() > ROWS_MAX {
            self.row(4, [format!("and {} more", count((nodes.len() - ROWS_MAX) as u64, "node"))]);
        }
    }

    fn node(&mut self, name: &str, rollout: &RolloutView, newest: u64) {
        let ready = if rollout.ready { "ready" } else { "not ready" };
        let behind = (rollout.seq != newest).then(|| format!("at release {}", rollout.seq));
        let step = (rollout.step != "waiting" && rollout.step != "done").then(|| rollout.step.clone());
        let head = [format!("{:<16}", plain(name)), bar(rollout), format!("{:<9}", ready)];
        let reason = (!rollout.reason.is_empty()).then(|| plain(&rollout.reason));
        self.row(4, head.into_iter().chain(step).chain(behind).chain(reason));
    }
}

fn bar(rollout: &RolloutView) -> String {
    match rank(rollout) {
        Some(reached) => {
            format!("[{}{}] {:<8}", "#".repeat(reached + 1), "-".repeat(PHASES.len() - 1 - reached), rollout.phase)
        }
        None => format!("[{}] {:<8}", "x".repeat(PHASES.len()), rollout.phase),
    }
}

/// How far; None: it failed, or was given up.
fn rank(rollout: &RolloutView) -> Option<usize> {
    PHASES.iter().position(|phase| *phase == rollout.phase)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::view::PeerView;

    fn rollout(phase: &str, ready: bool, reason: &str) -> RolloutView {
        RolloutView {
            channel: "c".into(),
            seq: 4,
            wanted: "m4".into(),
            served: if phase == "ready" { "m4".into() } else { "m3".into() },
            step: "waiting".into(),
            phase: phase.into(),
            ready,
            reason: reason.into(),
            ..RolloutView::default()
        }
    }

    #[test]
    fn a_line_for_each_node_says_what_it_waits_for() {
        let peer = |name: &str, of| PeerView { name: name.into(), rollouts: vec![of], ..PeerView::default() };
        let channel = ChannelView {
            channel: "c".into(),
            policy: "rolling: 1 out at a time".into(),
            rollout: Some(rollout("staged", true, "waits for b")),
            ..ChannelView::default()
        };
        let failed = rollout("failed", false, "the check failed: wrong\x1b[2J");
        let view = View {
            name: "me".into(),
            peers: vec![peer("c", rollout("ready", true, "")), peer("b", failed)],
            ..View::default()
        };
        let mut picture = Picture::default();
        picture.rollout(&view, &channel);
        let text = picture.text();
        assert!(text.contains("release 4 is served by 1 of 3 nodes with engines  rolling: 1 out at a time"), "{text}");
        assert!(text.contains("[#####---] staged") && text.contains("waits for b"), "{text}");
        assert!(text.contains("[xxxxxxxx] failed") && text.contains("wrong\\u{1b}[2J"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.find("  me").unwrap() < text.find("  b").unwrap(), "{text}");
    }
}
