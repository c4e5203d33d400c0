//! The publisher's part: numbering and signing a release once the mesh has been heard.

use super::{Agent, Publish};
use crate::state::unix_ms;
use aquifer_core::{ChannelName, Policy, PublisherSecret, Release, SignedRelease};
use aquifer_memory::Published;
use aquifer_proto::Input;
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
    pub(super) source: Arc<Published>,
    /// A peer has told what it knows.
    pub(super) heard_the_mesh: bool,
    /// There is nobody to hear.
    alone: bool,
    since: Instant,
    /// What was released, and how often it had to be numbered anew.
    released: Option<Release>,
    renumbered: u32,
}

impl Publication {
    pub(super) fn new(publish: Publish, alone: bool) -> Self {
        Publication {
            channel: publish.channel,
            secret: publish.secret,
            note: publish.note,
            source: publish.source,
            heard_the_mesh: false,
            alone,
            since: Instant::now(),
            released: None,
            renumbered: 0,
        }
    }
}

impl Agent {
    /// Makes the release as soon as its number is certain to be the next.
    pub(super) fn publish_when_ready(&mut self) {
        let Some(publication) = &mut self.publication else { return };
        if publication.released.is_some() {
            return;
        }
        let newest = self.node.newest_release(&publication.channel);
        // Somebody may know of a release that has not reached us.
        let claimed = self.node.highest_seq_claimed(&publication.channel);
        let all_heard = publication.heard_the_mesh && claimed.is_none_or(|c| newest.is_some_and(|n| n.seq >= c));
        if !publication.alone && !all_heard && publication.since.elapsed() < HEAR_TIME {
            return;
        }
        if let Some(newest) = newest.filter(|r| r.manifest == publication.source.hash) {
            tracing::info!("{} is at this manifest already; serving it", publication.channel);
            publication.released = Some(newest.clone());
            return;
        }
        let release = Release {
            channel: publication.channel.clone(),
            seq: newest.map_or(1, |r| r.seq.saturating_add(1)),
            manifest: publication.source.hash,
            manifest_bytes: publication.source.manifest_bytes.len() as u64,
            rolls_back_to: None,
            policy: Policy::default(),
            created_unix_ms: unix_ms(),
            note: publication.note.clone(),
        };
        publication.released = Some(release.clone());
        let release = SignedRelease::sign(&release, &publication.secret);
        self.input(Input::Publish { release });
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
