//! A channel's releases as `aquifer releases` shows them.

use super::Agent;
use anyhow::Result;
use aquifer_core::policy::{OnFailure, Required, Unavailable};
use aquifer_core::{ChannelName, How, NodeId, Policy, Release, Report, Statement, Word};
use aquifer_proto::rollout::Progress;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// Newest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ReleasesView {
    pub(crate) channel: String,
    pub(crate) releases: Vec<ReleaseView>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ReleaseView {
    pub(crate) seq: u64,
    pub(crate) manifest: String,
    pub(crate) publisher: String,
    pub(crate) note: String,
    /// By the publisher's clock.
    pub(crate) created_unix_ms: u64,
    /// `at-once`, `synchronous`, `rolling` or `manual`, and its terms in words.
    pub(crate) policy: String,
    pub(crate) terms: String,
    /// Labels of the nodes that take it; empty: all of them.
    pub(crate) subset: String,
    pub(crate) pinned: bool,
    pub(crate) rolls_back_to: Option<u64>,
    /// Nodes that it names.
    pub(crate) roster: u64,
    /// `commit` or `abort`, once it was said, and why.
    pub(crate) word: Option<String>,
    pub(crate) reason: String,
    pub(crate) nodes: Vec<NodeView>,
}

/// How a node fares, or fared, with a release.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct NodeView {
    pub(crate) node: String,
    pub(crate) name: String,
    /// `waiting`, `going`, `done`, `going back` or `halted`.
    pub(crate) step: String,
    pub(crate) phase: String,
    /// Now, and with what it should serve; of an earlier release: false.
    pub(crate) ready: bool,
    /// Milliseconds from when it heard of the release until it first was in each phase.
    pub(crate) times: Vec<(String, u32)>,
    pub(crate) reason: String,
}

impl ReleaseView {
    pub(crate) fn waits_for_word(&self) -> bool {
        self.word.is_none() && ["synchronous", "manual"].contains(&self.policy.as_str())
    }

    fn new(release: &Release, publisher: String, said: Option<&Statement>) -> Self {
        let (policy, terms) = name_and_terms(&release.policy);
        let word = said.map(|statement| word(statement.word).to_string());
        ReleaseView {
            seq: release.seq,
            manifest: release.manifest.to_string(),
            publisher,
            note: release.note.clone(),
            created_unix_ms: release.created_unix_ms,
            policy,
            terms,
            subset: release.policy.subset.to_string(),
            pinned: release.policy.pinned,
            rolls_back_to: release.rolls_back_to,
            roster: release.policy.roster.len() as u64,
            word,
            reason: said.map(|statement| statement.reason.clone()).unwrap_or_default(),
            nodes: Vec::new(),
        }
    }
}

impl Agent {
    pub(super) fn releases_view(&self, channel: &ChannelName) -> Result<Value> {
        Ok(serde_json::to_value(self.releases_of(channel))?)
    }

    pub(super) fn releases_of(&self, channel: &ChannelName) -> ReleasesView {
        let of = |(signed, release): (&aquifer_core::SignedRelease, &Release)| {
            let said = self.node.statement(channel, &release.id());
            let mut view = ReleaseView::new(release, signed.publisher.to_string(), said);
            view.nodes = self.fared(channel, release);
            view
        };
        let mut releases: Vec<ReleaseView> = self.node.releases(channel).map(of).collect();
        releases.reverse();
        ReleasesView { channel: channel.to_string(), releases }
    }

    fn fared(&self, channel: &ChannelName, release: &Release) -> Vec<NodeView> {
        let entry = self.node.history(channel).and_then(|history| history.entry(&release.id()));
        let of = |(node, progress): (&NodeId, &Progress)| {
            let (name, report) = self.named(node, channel);
            NodeView {
                node: node.to_string(),
                name,
                step: progress.step.to_string(),
                phase: progress.phase.to_string(),
                ready: report.is_some_and(|report| report.ready && report.wanted == release.id()),
                times: progress.times.iter().map(|(phase, ms)| (phase.to_string(), ms)).collect(),
                reason: progress.reason.clone(),
            }
        };
        let mut nodes: Vec<NodeView> = entry.into_iter().flat_map(|entry| entry.members.iter().map(of)).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    /// What a node is called, and what it says now, if it is there.
    fn named(&self, node: &NodeId, channel: &ChannelName) -> (String, Option<&Report>) {
        if *node == self.node.id() {
            return (self.name.clone(), self.node.rollout(channel).and_then(|rollout| rollout.report()));
        }
        let Some(member) = self.node.member(node) else { return (node.short(), None) };
        let of = member.status.channels.iter().find(|c| c.channel == *channel);
        (member.status.name.clone(), of.and_then(|c| c.report.as_ref()))
    }
}

pub(super) fn word(word: Word) -> &'static str {
    match word {
        Word::Commit => "commit",
        Word::Abort => "abort",
    }
}

/// For people.
pub(super) fn in_words(policy: &Policy) -> String {
    match name_and_terms(policy) {
        (name, terms) if terms.is_empty() => name,
        (name, terms) => format!("{name}: {terms}"),
    }
}

fn name_and_terms(policy: &Policy) -> (String, String) {
    let (name, terms) = match &policy.how {
        How::AtOnce => ("at-once", String::new()),
        How::Manual => ("manual", String::new()),
        How::Synchronous { required, deadline_ms, on_failure } => {
            let required = match required {
                Required::All => "all".to_string(),
                Required::Count(n) => format!("{n}"),
                Required::PerMille(n) => format!("{} %", f64::from(*n) / 10.0),
            };
            let then = match on_failure {
                OnFailure::Stay => "",
                OnFailure::RollBack => ", back if one fails",
            };
            ("synchronous", format!("{required} prepared within {} s{then}", deadline_ms / 1000))
        }
        How::Rolling { canary, max_unavailable, by } => {
            let canary = canary.as_ref().map_or(String::new(), |c| format!("{c} first, "));
            let most = match max_unavailable {
                Unavailable::Count(n) => format!("{n} out at a time"),
                Unavailable::Percent(n) => format!("{n} % out at a time"),
            };
            let by = by.as_ref().map_or(String::new(), |by| format!(" of each {by}"));
            ("rolling", format!("{canary}{most}{by}"))
        }
    };
    (name.to_string(), terms)
}
