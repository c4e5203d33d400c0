//! The publisher's part: numbering and signing a release once the mesh has been heard.

use super::{Agent, Publish};
use crate::state::unix_ms;
use aquifer_core::{ChannelName, PublisherSecret, Release, SignedRelease};
use aquifer_memory::Published;
use aquifer_proto::Input;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a publisher waits for the mesh to say what the channel is at, before it numbers its
/// release by what it knows itself. Guess: ten times a slow connection's set-up.
const HEAR_TIME: Duration = Duration::from_secs(5);

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
    released: bool,
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
            released: false,
        }
    }
}

impl Agent {
    /// Makes the release as soon as its number is certain to be the next.
    pub(super) fn publish_when_ready(&mut self) {
        let Some(publication) = &mut self.publication else { return };
        let ready = publication.alone || publication.heard_the_mesh || publication.since.elapsed() > HEAR_TIME;
        if publication.released || !ready {
            return;
        }
        publication.released = true;
        let newest = self.node.newest_release(&publication.channel);
        if newest.is_some_and(|r| r.manifest == publication.source.hash) {
            tracing::info!("{} is at this manifest already; serving it", publication.channel);
            return;
        }
        let release = Release {
            channel: publication.channel.clone(),
            seq: newest.map_or(1, |r| r.seq + 1),
            manifest: publication.source.hash,
            manifest_bytes: publication.source.manifest_bytes.len() as u64,
            rollback: false,
            created_unix_ms: unix_ms(),
            note: publication.note.clone(),
        };
        let release = SignedRelease::sign(&release, &publication.secret);
        self.input(Input::Publish { release });
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
