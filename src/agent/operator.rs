//! What an operator's program asks: to see a channel's releases, to have a release drafted, to pass on what was
//! signed.

use super::Agent;
use super::engines::Reply;
use crate::errors::reasons;
use crate::state::unix_ms;
use anyhow::{Context, Result, bail};
use aquifer_core::{ChannelName, Policy, Release, SignedRelease, SignedStatement};
use aquifer_engine::ErrorReply;
use aquifer_engine::operator::{Announce, Draft, Drafted, Releases, Word, WordAnswer};
use aquifer_proto::Input;
use aquifer_proto::rollout::Verdict;
use serde_json::{Value, json};

impl Agent {
    pub(super) fn show_releases(&self, asked: &Releases) -> Reply {
        refusing(self.followed(&asked.channel).and_then(|()| self.releases_view(&asked.channel)))
    }

    pub(super) fn on_draft(&mut self, draft: Draft) -> Reply {
        refusing(self.draft(draft))
    }

    pub(super) fn on_announce(&mut self, announce: &Announce) -> Reply {
        refusing(self.announce(announce))
    }

    pub(super) fn on_word(&mut self, asked: &Word) -> Reply {
        refusing(self.followed(&asked.channel).and_then(|()| self.word(&asked.channel)))
    }

    fn followed(&self, channel: &ChannelName) -> Result<()> {
        if self.channels.contains_key(channel) {
            return Ok(());
        }
        let known: Vec<&str> = self.channels.keys().map(ChannelName::as_str).collect();
        bail!("this agent does not follow channel '{channel}' (it follows: {})", known.join(", "))
    }

    /// A release of what an earlier one had, with the next number and the nodes that are there.
    fn draft(&mut self, draft: Draft) -> Result<Value> {
        self.followed(&draft.channel)?;
        let releases: Vec<&Release> = self.node.releases(&draft.channel).map(|(_, release)| release).collect();
        let Some(newest) = releases.last() else { bail!("{} has no release yet", draft.channel) };
        let newest_seq = newest.seq;
        let back_to = match draft.to {
            Some(seq) => releases.iter().rev().find(|r| r.seq == seq).with_context(|| {
                let known: Vec<String> = releases.iter().map(|r| r.seq.to_string()).collect();
                format!("release {seq} of {} is not remembered here; known are {}", draft.channel, known.join(", "))
            })?,
            None => before(&releases, newest).with_context(|| {
                format!("nothing is remembered of {} before release {newest_seq}: name one with --to", draft.channel)
            })?,
        };
        if back_to.seq == newest_seq {
            bail!("{} is at release {newest_seq} already", draft.channel);
        }
        let policy = match &draft.policy {
            Some(encoded) => Policy::decode(&hex::decode(encoded).context("the policy is not hexadecimal")?)?,
            None => Policy { roster: Vec::new(), ..newest.policy.clone() },
        };
        let back_to = (*back_to).clone();
        let release = Release {
            channel: draft.channel.clone(),
            seq: newest_seq.saturating_add(1),
            manifest: back_to.manifest,
            manifest_bytes: back_to.manifest_bytes,
            rolls_back_to: Some(back_to.seq),
            policy: self.with_roster(&draft.channel, policy)?,
            created_unix_ms: unix_ms(),
            note: draft.note,
        };
        Ok(serde_json::to_value(Drafted { release: hex::encode(release.encode()) })?)
    }

    fn announce(&mut self, announce: &Announce) -> Result<Value> {
        if let Some(encoded) = &announce.release {
            let signed = SignedRelease::decode(&hex::decode(encoded).context("the release is not hexadecimal")?)?;
            let release = signed.open()?;
            self.followed(&release.channel)?;
            let key = signed.publisher;
            self.input(Input::Publish { release: signed });
            if !self.node.releases(&release.channel).any(|(_, known)| known.id() == release.id()) {
                bail!(
                    "release {} of {} is refused: this agent does not trust key {key} for it, or knows of a later one",
                    release.seq,
                    release.channel
                );
            }
        }
        if let Some(encoded) = &announce.statement {
            let signed = SignedStatement::decode(&hex::decode(encoded).context("the statement is not hexadecimal")?)?;
            let statement = signed.open()?;
            self.followed(&statement.channel)?;
            let key = signed.publisher;
            self.input(Input::Say { statement: signed });
            let said = self.node.statement(&statement.channel, &statement.release);
            match said.map(|known| known.word) {
                Some(word) if word == statement.word => {}
                Some(_) => bail!("release {} is committed already", statement.release.seq),
                None => bail!("refused: this agent does not trust key {key} for {}", statement.channel),
            }
        }
        Ok(json!({}))
    }

    fn word(&mut self, channel: &ChannelName) -> Result<Value> {
        let count = |n: usize| n as u64;
        let waits = |r: &&Release| r.policy.is_synchronous() && self.node.statement(channel, &r.id()).is_none();
        let release = self.node.releases(channel).map(|(_, release)| release).filter(waits).last();
        let verdict = match release.map(|release| (release.id(), release.policy.subset.clone())) {
            None => None,
            Some((id, selector)) => {
                self.input(Input::LookOn { channel: channel.clone(), selector: selector.clone() });
                let onlooker = self.node.onlooker(channel, &selector);
                let about = onlooker.filter(|onlooker| onlooker.wanted().map(Release::id) == Some(id));
                about.and_then(|onlooker| onlooker.verdict(self.now()))
            }
        };
        let answer = match verdict {
            None => WordAnswer::None,
            Some(Verdict::Commit) => WordAnswer::Commit,
            Some(Verdict::Abort(reason)) => WordAnswer::Abort { reason },
            Some(Verdict::Wait { answered, prepared, required, roster }) => WordAnswer::Wait {
                answered: count(answered),
                prepared: count(prepared),
                required: count(required),
                nodes: count(roster),
            },
        };
        Ok(serde_json::to_value(answer)?)
    }
}

fn refusing(done: Result<Value>) -> Reply {
    done.map_err(|error| ErrorReply::new("refused", reasons(&error)))
}

/// The last release before `newest`, for the same nodes, that was of something else.
fn before<'a>(releases: &[&'a Release], newest: &Release) -> Option<&'a Release> {
    let of_those = |r: &&&Release| {
        let concerned = r.policy.subset == newest.policy.subset || r.policy.subset.is_everybody();
        concerned && r.manifest != newest.manifest && r.id() < newest.id()
    };
    releases.iter().rev().find(of_those).copied()
}
