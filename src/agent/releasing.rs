//! The publisher's part: numbering and signing a release once the mesh has been heard.

use super::view::PublicationView;
use super::{Agent, Publish};
use crate::state::unix_ms;
use anyhow::{Context, Result, bail};
use aquifer_core::limits::{RELEASE_NOTE_BYTES_MAX, ROSTER_MAX};
use aquifer_core::text::shorten;
use aquifer_core::{
    ChannelName, How, Policy, PublisherSecret, Release, ReleaseId, SignedRelease, SignedStatement, Statement, Word,
};
use aquifer_memory::Published;
use aquifer_proto::Input;
use aquifer_proto::rollout::Verdict;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a publisher waits for the mesh to say what the channel is at, before it numbers its
/// release by what it knows itself. Guess: ten times a slow connection's set-up.
const HEAR_TIME: Duration = Duration::from_secs(5);

/// How often a release is numbered anew before its publisher gives in. Guess.
const RENUMBER_MAX: u32 = 3;

#[derive(Debug)]
pub(super) struct Publication {
    pub(super) channel: ChannelName,
    secret: PublisherSecret,
    note: String,
    /// Without its roster, which is that of the moment of release.
    policy: Policy,
    pub(super) source: Arc<Published>,
    /// A peer has told what it knows.
    pub(super) heard_the_mesh: bool,
    /// Something was heard, or time has passed, since it was last looked what is to be said.
    pub(super) may_decide: bool,
    /// There is nobody to hear.
    alone: bool,
    since: Instant,
    /// What was released, and how often it had to be numbered anew.
    released: Option<Release>,
    renumbered: u32,
    /// What a person must mend before all of it can be had from here.
    pub(super) problem: Option<String>,
}

impl Publication {
    /// Whether its release is out: it is the newest of its channel, or older.
    fn is_out(&self, newest: u64) -> bool {
        self.released.as_ref().is_some_and(|released| released.seq <= newest)
    }

    /// Why not all of it can be had from here.
    pub(super) fn lacks(&self, newest: u64) -> Option<String> {
        let waits = || "looks which releases the mesh knows before it makes its own".to_string();
        self.problem.clone().or_else(|| (!self.is_out(newest)).then(waits))
    }

    pub(super) fn new(publish: Publish, alone: bool) -> Self {
        Publication {
            channel: publish.channel,
            secret: publish.secret,
            note: publish.note,
            policy: publish.policy,
            source: publish.source,
            heard_the_mesh: false,
            may_decide: false,
            alone,
            since: Instant::now(),
            released: None,
            renumbered: 0,
            problem: None,
        }
    }
}

impl Agent {
    /// Makes the release as soon as its number is certain to be the next.
    pub(super) fn publish_when_ready(&mut self) -> Result<()> {
        let Some(publication) = &mut self.publication else { return Ok(()) };
        if publication.released.is_some() {
            return Ok(());
        }
        let newest = self.node.newest_release(&publication.channel);
        // Somebody may know of a release that has not reached us.
        let claimed = self.node.highest_seq_claimed(&publication.channel);
        let all_heard = publication.heard_the_mesh && claimed.is_none_or(|c| newest.is_some_and(|n| n.seq >= c));
        if !publication.alone && !all_heard && publication.since.elapsed() < HEAR_TIME {
            return Ok(());
        }
        if let Some(newest) = newest.filter(|r| r.manifest == publication.source.hash) {
            tracing::info!("{} is at this manifest already; serving it", publication.channel);
            publication.released = Some(newest.clone());
            return Ok(());
        }
        let (channel, policy) = (publication.channel.clone(), publication.policy.clone());
        let policy = self.with_roster(&channel, policy)?;
        let Some(publication) = &mut self.publication else { return Ok(()) };
        let newest = self.node.newest_release(&publication.channel);
        let release = Release {
            channel: publication.channel.clone(),
            seq: newest.map_or(1, |r| r.seq.saturating_add(1)),
            manifest: publication.source.hash,
            manifest_bytes: publication.source.manifest_bytes.len() as u64,
            rolls_back_to: None,
            policy,
            created_unix_ms: unix_ms(),
            note: publication.note.clone(),
        };
        publication.released = Some(release.clone());
        let release = SignedRelease::sign(&release, &publication.secret);
        self.input(Input::Publish { release });
        Ok(())
    }

    /// The policy with the nodes that are there, where it goes by them.
    pub(super) fn with_roster(&mut self, channel: &ChannelName, policy: Policy) -> Result<Policy> {
        if matches!(policy.how, How::AtOnce | How::Manual) {
            return Ok(policy);
        }
        let selector = policy.subset.clone();
        self.input(Input::LookOn { channel: channel.clone(), selector: selector.clone() });
        let onlooker = self.node.onlooker(channel, &selector);
        let onlooker = onlooker.context("too many selectors are looked after here already: ask another agent")?;
        match onlooker.with_roster(policy) {
            Some(policy) => Ok(policy),
            None => bail!(
                "more than {ROSTER_MAX} nodes with engines would take part, and a release cannot name more: roll it \
                 out to parts of them with --subset, or with --policy at-once"
            ),
        }
    }

    /// A synchronous release waits for its publisher's word. Returns whether one was said.
    pub(super) fn say_what_is_decided(&mut self) -> bool {
        if !self.publication.as_mut().is_some_and(|publication| std::mem::take(&mut publication.may_decide)) {
            return false;
        }
        if let Some(statement) = self.decided() {
            self.input(Input::Say { statement });
            return true;
        }
        let Some(release) = self.way_back() else { return false };
        let Some(publication) = &mut self.publication else { return false };
        tracing::warn!("{} goes back, as release {}: {}", release.channel, release.seq, release.note);
        publication.released = Some(release.clone());
        let release = SignedRelease::sign(&release, &publication.secret);
        self.input(Input::Publish { release });
        true
    }

    /// What undoes the release that was made here, if it failed once it was committed.
    fn way_back(&self) -> Option<Release> {
        let released = self.publication.as_ref()?.released.as_ref()?;
        let onlooker = self.node.onlooker(&released.channel, &released.policy.subset)?;
        let remedy = onlooker.remedy(self.now()).filter(|r| r.failed == released.id())?;
        let newest = self.node.newest_release(&released.channel)?;
        let mut note = remedy.reason;
        shorten(&mut note, RELEASE_NOTE_BYTES_MAX);
        Some(Release {
            channel: released.channel.clone(),
            seq: newest.seq.saturating_add(1),
            manifest: remedy.to.manifest,
            manifest_bytes: remedy.to.manifest_bytes,
            rolls_back_to: Some(remedy.to.seq),
            policy: remedy.policy,
            created_unix_ms: unix_ms(),
            note,
        })
    }

    fn decided(&self) -> Option<SignedStatement> {
        let publication = self.publication.as_ref()?;
        let release = publication.released.as_ref().filter(|r| r.policy.is_synchronous())?;
        let (channel, id) = (release.channel.clone(), release.id());
        let onlooker = self.node.onlooker(&channel, &release.policy.subset)?;
        if onlooker.wanted().map(Release::id) != Some(id) {
            return None; // Another one has taken its place.
        }
        let (word, reason) = match onlooker.verdict(self.now())? {
            Verdict::Commit => (Word::Commit, String::new()),
            Verdict::Abort(reason) => (Word::Abort, reason),
            Verdict::Wait { .. } => return None,
        };
        Some(SignedStatement::sign(&statement(channel, id, word, reason), &publication.secret))
    }

    pub(super) fn publication_view(&self) -> Option<PublicationView> {
        let publication = self.publication.as_ref()?;
        let release = publication.released.as_ref()?;
        let (channel, id) = (&release.channel, release.id());
        let said = self.node.statement(channel, &id);
        let onlooker = self.node.onlooker(channel, &release.policy.subset);
        let prepared = match onlooker.and_then(|onlooker| onlooker.verdict(self.now())) {
            Some(Verdict::Wait { prepared, required, roster, .. }) => {
                Some((prepared as u64, required as u64, roster as u64))
            }
            Some(Verdict::Commit | Verdict::Abort(_)) | None => None,
        };
        let concerns = |r: &Release| r.policy.subset.is_everybody() || r.policy.subset == release.policy.subset;
        let later = self.node.releases(channel).map(|(_, r)| r).find(|r| r.id() > id && concerns(r));
        let whole = |member: &&aquifer_proto::Member| {
            let of = |c: &&aquifer_core::ChannelStatus| c.channel == *channel && c.manifest == id.manifest;
            member.status.channels.iter().find(of).is_some_and(aquifer_core::ChannelStatus::is_hydrated)
        };
        Some(PublicationView {
            channel: channel.to_string(),
            seq: id.seq,
            manifest: id.manifest.to_string(),
            publisher: self.release_of(channel, &id).map(|(_, key)| key.to_string()).unwrap_or_default(),
            rolls_back_to: release.rolls_back_to,
            note: release.note.clone(),
            word: said.map(|s| super::history::word(s.word).to_string()),
            reason: said.map(|s| s.reason.clone()).unwrap_or_default(),
            prepared,
            superseded_by: later.map(|r| (r.seq, r.manifest.to_string())),
            holders: self.node.members().filter(whole).count() as u64,
        })
    }

    /// A release that was made before ours, and reached us after it, had a number we did not know
    /// of: ours was refused where that one was known. It is numbered anew.
    pub(super) fn release_again_if_overtaken(&mut self, heard: &Release) {
        let Some(publication) = &mut self.publication else { return };
        let overtaken = publication.released.as_ref().is_some_and(|ours| {
            heard.channel == ours.channel
                && heard.manifest != ours.manifest
                && heard.created_unix_ms < ours.created_unix_ms
        });
        if overtaken && publication.renumbered < RENUMBER_MAX {
            publication.renumbered += 1;
            publication.released = None;
        }
    }

    /// Stops serving files that were changed under our feet, before a reader finds out.
    pub(super) fn check_published_files(&mut self) {
        let Some(publication) = &self.publication else { return };
        let changed = publication.source.changed();
        if !changed.is_empty() {
            let manifest = publication.source.hash;
            self.published_files_changed(manifest, &changed.join("; "));
        }
    }
}

pub(crate) fn statement(channel: ChannelName, release: ReleaseId, word: Word, mut reason: String) -> Statement {
    shorten(&mut reason, RELEASE_NOTE_BYTES_MAX);
    Statement { channel, release, word, reason, created_unix_ms: unix_ms() }
}
