//! The channels this node follows: what it remembers of their releases, and which manifests it is to have.

use super::{Agent, Hold, PullWhat};
use crate::errors::reasons;
use anyhow::Result;
use aquifer_core::{
    ChannelName, ManifestHash, PublisherKey, Release, ReleaseId, SignedRelease, SignedStatement, Statement, Word,
};
use aquifer_engine::protocol::{Event as EngineNews, ReleaseInfo};
use aquifer_proto::Input;
use aquifer_proto::rollout::Stand;
use std::collections::BTreeSet;

/// A followed channel.
#[derive(Debug, Default)]
pub(super) struct Channel {
    /// The release that is for this node: to be got to, or arrived at.
    pub(super) release: Option<(Release, PublisherKey)>,
    /// The manifests that it is to have now.
    needed: BTreeSet<ManifestHash>,
    /// Why the release cannot be had, if a person must mend it.
    pub(super) problem: Option<String>,
}

impl Agent {
    pub(super) fn on_release(&mut self, signed: &SignedRelease, release: &Release) -> Result<()> {
        let channel = &release.channel;
        self.remember(channel);
        self.release_again_if_overtaken(release);
        match self.node.newest_release(channel).map(Release::id) == Some(release.id()) {
            true => tracing::info!("{channel} is at release {}: manifest {}", release.seq, release.manifest.short()),
            false => tracing::debug!("{channel} had release {}, by {}", release.seq, signed.publisher),
        }
        self.turn(channel)
    }

    pub(super) fn on_statement(&mut self, signed: &SignedStatement) -> Result<()> {
        let Statement { channel, release, word, reason, .. } = signed.open()?;
        let said = match word {
            Word::Commit => "is committed".to_string(),
            Word::Abort => format!("is given up: {reason}"),
        };
        tracing::info!("{channel}: release {} {said}", release.seq);
        self.remember(&channel);
        Ok(())
    }

    pub(super) fn on_stand(&mut self, channel: &ChannelName, stand: &Stand) -> Result<()> {
        if let Some(state) = &self.state {
            let saved = state.save_stand(channel, stand);
            self.warn_of_state(saved);
        }
        self.turn(channel)
    }

    /// Turns to the release that is for this node, if that is another one than before.
    pub(super) fn turn(&mut self, channel: &ChannelName) -> Result<()> {
        let wanted = self.node.rollout(channel).and_then(|rollout| rollout.wanted()).map(Release::id);
        let known = wanted.and_then(|wanted| self.release_of(channel, &wanted));
        let Some(entry) = self.channels.get_mut(channel) else { return Ok(()) };
        let turned = entry.release.as_ref().map(|(r, _)| r.id()) != known.as_ref().map(|(r, _)| r.id());
        if turned && let Some((release, publisher)) = known {
            entry.problem = None;
            let news = EngineNews::Release { release: ReleaseInfo::new(&release, publisher) };
            entry.release = Some((release, publisher));
            self.tell_engines(channel, &news);
        }
        self.refresh_needs(channel)?;
        self.turn_to(channel);
        Ok(())
    }

    /// What a restart is to know.
    fn remember(&mut self, channel: &ChannelName) {
        let Some(state) = &self.state else { return };
        let releases: Vec<_> = self.node.releases(channel).map(|(signed, r)| (r.id(), signed.encode())).collect();
        let statements: Vec<_> =
            self.node.statements(channel).map(|(signed, s)| (s.release, signed.encode())).collect();
        let saved = state.save_releases(channel, &releases).and(state.save_statements(channel, &statements));
        self.warn_of_state(saved);
    }

    /// Engines go on being served; what is lost is the memory of it after a restart.
    fn warn_of_state(&mut self, saved: Result<()>) {
        if let Err(error) = saved {
            self.tell_once("state".into(), || {
                tracing::warn!("a restart will not remember this release: {}", reasons(&error))
            });
        }
    }

    pub(super) fn release_of(&self, channel: &ChannelName, id: &ReleaseId) -> Option<(Release, PublisherKey)> {
        let found = self.node.releases(channel).find(|(_, release)| release.id() == *id);
        found.map(|(signed, release)| (release.clone(), signed.publisher))
    }

    /// The manifest of the release that is for this node.
    pub(super) fn current_manifest(&self, channel: &ChannelName) -> Option<ManifestHash> {
        self.channels.get(channel)?.release.as_ref().map(|(release, _)| release.manifest)
    }

    /// Channels of which this node is to have this manifest.
    pub(super) fn channels_at(&self, manifest: &ManifestHash) -> BTreeSet<ChannelName> {
        self.channels.iter().filter(|(_, c)| c.needed.contains(manifest)).map(|(name, _)| name.clone()).collect()
    }

    /// The channel that bytes of a manifest are counted for: where two have it, the first by name.
    pub(super) fn channel_of(&self, manifest: &ManifestHash) -> Option<ChannelName> {
        let has = |loaded: &super::Loaded| loaded.channels.first().cloned();
        self.channels_at(manifest).pop_first().or_else(|| self.manifests.get(manifest).and_then(has))
    }

    pub(super) fn is_needed(&self, channel: &ChannelName, manifest: &ManifestHash) -> bool {
        self.channels.get(channel).is_some_and(|c| c.needed.contains(manifest))
    }

    pub(super) fn needed(&self, channel: &ChannelName) -> impl Iterator<Item = &ManifestHash> {
        self.channels.get(channel).into_iter().flat_map(|c| &c.needed)
    }

    /// Has the manifests fetched that are needed now and are not here, and gives up those that are not needed any
    /// more before they came.
    fn refresh_needs(&mut self, channel: &ChannelName) -> Result<()> {
        let now = self.needs(channel);
        let Some(entry) = self.channels.get_mut(channel) else { return Ok(()) };
        let before = std::mem::replace(&mut entry.needed, now.clone());
        for old in before.difference(&now) {
            if !self.manifests.contains_key(old) && self.channels_at(old).is_empty() {
                self.input(Input::Forget { manifest: *old });
            }
        }
        for manifest in now {
            if let Some(loaded) = self.manifests.get_mut(&manifest) {
                loaded.channels.insert(channel.clone());
                continue;
            }
            if before.contains(&manifest) {
                continue;
            }
            match self.state.as_ref().and_then(|s| s.manifest(&manifest)) {
                Some(bytes) => self.take_in(manifest, bytes)?,
                None => {
                    let of = self.node.releases(channel).find(|(_, r)| r.manifest == manifest);
                    let bytes = of.map_or(0, |(_, release)| release.manifest_bytes);
                    self.input(Input::ManifestWanted { manifest, bytes });
                }
            }
        }
        Ok(())
    }

    fn needs(&self, channel: &ChannelName) -> BTreeSet<ManifestHash> {
        let stand = self.node.rollout(channel).and_then(|rollout| rollout.stand());
        let wanted = stand.map(|stand| stand.wanted.manifest);
        let due = stand.and_then(Stand::due).map(|due| due.manifest);
        match (self.hold, &self.pull) {
            (Hold::All, _) => self.node.in_use(channel).into_iter().chain(wanted).chain(due).collect(),
            (Hold::Engines, _) => wanted.into_iter().chain(due).collect(),
            (Hold::Own, Some(pull)) => match &pull.what {
                PullWhat::Channel(pulled) if pulled == channel => wanted.into_iter().collect(),
                PullWhat::Channel(_) | PullWhat::Manifest(_) => BTreeSet::new(),
            },
            (Hold::Own, None) => BTreeSet::new(),
        }
    }
}
