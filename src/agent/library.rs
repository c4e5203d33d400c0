//! What this node knows of each manifest, and where its chunks lie.

use super::jobs::Job;
use super::{Agent, Hold, PullWhat};
use anyhow::{Context, Result};
use aquifer_core::limits::MANIFEST_PIECE_BYTES;
use aquifer_core::{
    ChannelName, ChunkSet, Layout, Manifest, ManifestHash, NodeId, PeerMessage, PublisherKey, Release, SignedRelease,
};
use aquifer_engine::protocol::{Event as EngineNews, ReleaseInfo};
use aquifer_memory::{FileTree, Published, Span};
use aquifer_proto::Input;
use std::sync::Arc;
use std::time::Duration;

/// A followed channel.
#[derive(Debug, Default)]
pub(super) struct Channel {
    pub(super) release: Option<(Release, PublisherKey)>,
    /// Why the newest release cannot be had, if a person must mend it.
    pub(super) problem: Option<String>,
}

/// A manifest whose bytes are here.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) channel: Option<ChannelName>,
    pub(super) manifest: Arc<Manifest>,
    pub(super) layout: Arc<Layout>,
    bytes: Arc<Vec<u8>>,
    published: Option<Arc<Published>>,
    /// What was on disk when it was loaded has been hashed.
    pub(super) checked: bool,
    /// Chunks told to the brain as held.
    held: ChunkSet,
}

/// Files being materialized.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    pub(super) manifest: ManifestHash,
    pub(super) files: Arc<FileTree>,
}

impl Agent {
    /// What there is to do before the first event.
    pub(super) fn begin(&mut self) -> Result<()> {
        if let Some(publication) = &self.publication {
            let source = publication.source.clone();
            let channel = publication.channel.clone();
            self.load(Some(channel), source.hash, source.manifest_bytes.clone(), Some(source))?;
        }
        if let Some(PullWhat::Manifest(manifest)) = self.pull.as_ref().map(|p| p.what.clone()) {
            match self.state.as_ref().and_then(|s| s.manifest(&manifest)) {
                Some(bytes) => self.load(None, manifest, bytes, None)?,
                None => self.input(Input::ManifestWanted { manifest, bytes: 0 }),
            }
        }
        Ok(())
    }

    pub(super) fn on_release(&mut self, signed: SignedRelease, release: Release) -> Result<()> {
        if let Some(state) = &self.state {
            state.save_release(&release.channel, &signed)?;
        }
        tracing::info!("{} is at release {}: manifest {}", release.channel, release.seq, release.manifest.short());
        let info = ReleaseInfo::new(&release, signed.publisher);
        let channel = release.channel.clone();
        self.tell_engines(&channel, &EngineNews::Release { release: info });
        let manifest = release.manifest;
        let bytes = release.manifest_bytes;
        let entry = self.channels.entry(channel.clone()).or_default();
        entry.release = Some((release, signed.publisher));
        entry.problem = None;
        if self.manifests.contains_key(&manifest) {
            self.turn_to(&channel);
            return Ok(());
        }
        let wants_it = match (self.hold, &self.pull) {
            (Hold::Own, Some(pull)) => matches!(&pull.what, PullWhat::Channel(c) if *c == channel),
            (Hold::Own, None) => false,
            (Hold::All | Hold::Engines, _) => true,
        };
        match self.state.as_ref().and_then(|s| s.manifest(&manifest)) {
            _ if !wants_it => {}
            Some(bytes) => self.load(Some(channel), manifest, bytes, None)?,
            None => self.input(Input::ManifestWanted { manifest, bytes }),
        }
        Ok(())
    }

    pub(super) fn on_manifest_fetched(&mut self, manifest: ManifestHash, bytes: Vec<u8>) {
        if let Some(state) = &self.state
            && let Err(error) = state.save_manifest(&manifest, &bytes)
        {
            tracing::warn!("the manifest will be fetched again after a restart: {error:#}");
        }
        let of = |c: &Channel| c.release.as_ref().is_some_and(|(r, _)| r.manifest == manifest);
        let channel = self.channels.iter().find(|(_, c)| of(c)).map(|(name, _)| name.clone());
        if let Err(error) = self.load(channel.clone(), manifest, bytes, None) {
            let problem = format!("{error:#}");
            tracing::warn!("manifest {}: {problem}", manifest.short());
            if let Some(channel) = channel.and_then(|c| self.channels.get_mut(&c)) {
                channel.problem = Some(problem);
            }
        }
    }

    pub(super) fn send_manifest(&mut self, to: NodeId, manifest: ManifestHash, offset: u64) {
        let piece = |loaded: &Loaded| {
            let begin = usize::try_from(offset).ok().filter(|b| *b < loaded.bytes.len())?;
            let end = (begin + MANIFEST_PIECE_BYTES).min(loaded.bytes.len());
            Some((loaded.bytes.len() as u64, loaded.bytes[begin..end].to_vec()))
        };
        let (total, bytes) = self.manifests.get(&manifest).and_then(piece).unwrap_or_default();
        self.mesh.send(to, PeerMessage::ManifestPiece { manifest, offset, total, bytes });
    }

    /// Takes in a manifest's bytes, and has what lies on disk checked against it.
    fn load(
        &mut self,
        channel: Option<ChannelName>,
        hash: ManifestHash,
        bytes: Vec<u8>,
        published: Option<Arc<Published>>,
    ) -> Result<()> {
        let manifest = match &published {
            Some(published) => published.manifest.clone(),
            None => Manifest::decode_named(&bytes, hash).context("the manifest cannot be used")?,
        };
        let layout = Arc::new(Layout::of(&manifest));
        let chunk_bytes = layout.chunks.iter().map(|c| c.len).collect();
        let held = ChunkSet::empty(layout.len());
        let loaded = Loaded {
            channel: channel.clone(),
            manifest: Arc::new(manifest),
            layout,
            bytes: Arc::new(bytes),
            published,
            checked: false,
            held,
        };
        let for_swarm = channel.clone().unwrap_or_else(|| "pull".parse().expect("'pull' is a channel name"));
        let pulls = match self.pull.as_ref().map(|p| &p.what) {
            Some(PullWhat::Manifest(wanted)) => *wanted == hash,
            Some(PullWhat::Channel(wanted)) => channel.as_ref() == Some(wanted),
            None => false,
        };
        self.manifests.insert(hash, loaded);
        self.input(Input::ManifestLoaded { channel: for_swarm, manifest: hash, chunk_bytes });
        if pulls {
            self.open_tree(hash)?;
        }
        self.start_check(hash);
        Ok(())
    }

    /// Hashes what may be here already: nothing on disk is believed because it was there.
    fn start_check(&mut self, hash: ManifestHash) {
        let tree = self.tree.clone().filter(|t| t.manifest == hash);
        let Some(loaded) = self.manifests.get(&hash) else { return };
        if self.disk.is_none() && tree.is_none() {
            self.on_checked(hash, None);
            return;
        }
        let (layout, disk) = (loaded.layout.clone(), self.disk.clone());
        self.job(Job::Check { manifest: hash, layout, disk, tree });
    }

    /// Checked: everything that lies here can be counted, and the rest asked for.
    pub(super) fn on_checked(&mut self, hash: ManifestHash, found: Option<ChunkSet>) {
        let Some(loaded) = self.manifests.get_mut(&hash) else { return };
        loaded.checked = true;
        let found = found.map_or(0, |f| f.count());
        self.traffic.chunks_found += u64::from(found);
        if found > 0 {
            tracing::info!("{found} of {} chunks of {} are here already", loaded.layout.len(), hash.short());
        }
        let channel = loaded.channel.clone();
        self.refresh_held(hash);
        match channel {
            Some(channel) => self.turn_to(&channel),
            None => self.refresh_wants(hash),
        }
    }

    /// The channel's release is loaded and checked: want it, and stop wanting what came before.
    pub(super) fn turn_to(&mut self, channel: &ChannelName) {
        let Some(current) = self.current_manifest(channel) else { return };
        if self.manifests.get(&current).is_none_or(|l| !l.checked) {
            return;
        }
        let same_channel = |l: &Loaded| l.channel.as_ref() == Some(channel);
        let old: Vec<ManifestHash> =
            self.manifests.iter().filter(|(h, l)| **h != current && same_channel(l)).map(|(h, _)| *h).collect();
        for manifest in old {
            self.refresh_wants(manifest);
        }
        self.refresh_wants(current);
        self.answer_waiting_engines(channel);
        self.retarget_engines(channel);
        self.retire(channel);
    }

    pub(super) fn current_manifest(&self, channel: &ChannelName) -> Option<ManifestHash> {
        self.channels.get(channel)?.release.as_ref().map(|(release, _)| release.manifest)
    }

    /// Tells the brain what this node is to hold of a manifest.
    pub(super) fn refresh_wants(&mut self, hash: ManifestHash) {
        let Some(loaded) = self.manifests.get(&hash).filter(|l| l.checked) else { return };
        let len = loaded.layout.len();
        let current = loaded.channel.as_ref().is_none_or(|c| self.current_manifest(c) == Some(hash));
        let pulled = self.tree.as_ref().is_some_and(|t| t.manifest == hash);
        let chunks = if loaded.published.is_some() || pulled || (self.hold == Hold::All && current) {
            ChunkSet::full(len)
        } else {
            let mut wanted = ChunkSet::empty(len);
            for conn in self.sessions.values().filter(|c| c.session.target().is_some_and(|t| t.manifest == hash)) {
                for chunk in conn.session.needs().into_iter().flat_map(ChunkSet::iter) {
                    // What has reached the engine and is kept nowhere else is not wanted again.
                    if conn.session.is_gathering(&hash, chunk) || self.span_of(&hash, chunk).is_some() {
                        wanted.insert(chunk);
                    }
                }
            }
            wanted
        };
        self.input(Input::Wanted { manifest: hash, chunks });
    }

    /// Tells the brain which chunks of a manifest lie here, after something moved.
    pub(super) fn refresh_held(&mut self, hash: ManifestHash) {
        let Some(loaded) = self.manifests.get(&hash) else { return };
        let len = loaded.layout.len();
        let now = ChunkSet::from_indices(len, (0..len).filter(|c| self.has(&hash, *c)));
        let Some(loaded) = self.manifests.get_mut(&hash) else { return };
        let before = std::mem::replace(&mut loaded.held, now.clone());
        let mut lost = before.clone();
        lost.subtract(&now);
        let mut new = now;
        new.subtract(&before);
        if !lost.is_empty() {
            self.input(Input::Lost { manifest: hash, chunks: lost });
        }
        if !new.is_empty() {
            self.input(Input::Held { manifest: hash, chunks: new });
        }
    }

    /// A chunk was landed and verified in a store or a region: every manifest that has it gains.
    pub(super) fn note_held(&mut self, manifest: ManifestHash, chunk: u32) {
        let Some(hash) = self.manifests.get(&manifest).map(|l| l.layout.chunk(chunk).hash) else { return };
        let mut elsewhere = Vec::new();
        for (other, loaded) in &mut self.manifests {
            if let Some(index) = loaded.layout.index_of(&hash)
                && loaded.held.insert(index)
                && *other != manifest
            {
                elsewhere.push((*other, ChunkSet::from_indices(loaded.layout.len(), [index])));
            }
        }
        for (other, chunks) in elsewhere {
            self.input(Input::Held { manifest: other, chunks });
        }
    }

    /// Where a verified chunk lies, if it lies here.
    pub(super) fn span_of(&self, manifest: &ManifestHash, chunk: u32) -> Option<Span> {
        let loaded = self.manifests.get(manifest)?;
        let hash = loaded.layout.chunks.get(chunk as usize)?.hash;
        let published = || loaded.published.as_ref()?.get(chunk);
        let tree = || self.tree.as_ref().filter(|t| t.manifest == *manifest)?.files.get(chunk);
        published()
            .or_else(|| self.memory.get(&hash))
            .or_else(|| self.region_span(manifest, chunk))
            .or_else(|| self.disk.as_ref()?.get(&hash))
            .or_else(tree)
    }

    fn has(&self, manifest: &ManifestHash, chunk: u32) -> bool {
        let Some(loaded) = self.manifests.get(manifest) else { return false };
        let hash = loaded.layout.chunk(chunk).hash;
        loaded.published.as_ref().is_some_and(|p| p.get(chunk).is_some())
            || self.memory.contains(&hash)
            || self.disk.as_ref().is_some_and(|d| d.contains(&hash))
            || self.region_span(manifest, chunk).is_some()
            || self.tree.as_ref().is_some_and(|t| t.manifest == *manifest && t.files.get(chunk).is_some())
    }

    fn region_span(&self, manifest: &ManifestHash, chunk: u32) -> Option<Span> {
        self.sessions.values().find_map(|conn| {
            let (region, range) = conn.session.place(manifest, chunk)?;
            conn.region_slice(region, range)
        })
    }

    pub(super) fn grant(
        &mut self,
        to: NodeId,
        manifest: ManifestHash,
        lease: u64,
        ttl: Duration,
        chunks: Vec<u32>,
    ) -> Result<()> {
        for &chunk in &chunks {
            if let Some(span) = self.span_of(&manifest, chunk) {
                self.grants.lease(lease, chunk, to, span);
            }
        }
        let access = self.grants.access(to, crate::keys::random_bytes()?);
        let ttl_ms = u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX);
        self.mesh.send(to, PeerMessage::Grant { manifest, lease, ttl_ms, chunks, access });
        Ok(())
    }

    /// A reader says that our chunk is wrong. Look at it: it may be us.
    pub(super) fn recheck(&mut self, manifest: ManifestHash, chunk: u32, reader: NodeId) {
        let (Some(span), Some(loaded)) = (self.span_of(&manifest, chunk), self.manifests.get(&manifest)) else {
            return;
        };
        let hash = loaded.layout.chunk(chunk).hash;
        self.job(Job::Recheck { manifest, chunk, hash, span, reader });
    }

    /// The chunk is not what it was when it was verified: stop serving it, from wherever it lay.
    pub(super) fn withdraw(&mut self, manifest: ManifestHash, chunk: u32, why: &str) {
        let Some(loaded) = self.manifests.get(&manifest) else { return };
        let hash = loaded.layout.chunk(chunk).hash;
        self.memory.remove(&hash);
        if let Some(disk) = &self.disk {
            disk.remove(&hash);
        }
        if let Some(published) = &loaded.published {
            published.withdraw(chunk);
            self.published_files_changed(manifest, why);
        } else {
            tracing::warn!("chunk {chunk} of {} is not served any more: {why}", manifest.short());
        }
        self.refresh_held(manifest);
    }

    /// Says what happened, once, and takes back what is not there any more.
    pub(super) fn published_files_changed(&mut self, manifest: ManifestHash, what: &str) {
        let key = format!("changed {manifest} {what}");
        if self.told.contains(&key) {
            return;
        }
        let problem =
            format!("the published files changed: {what}. What changed is not served any more; publish again");
        self.tell_once(key, || tracing::warn!("{problem}"));
        let channel = self.manifests.get(&manifest).and_then(|l| l.channel.clone());
        if let Some(channel) = channel.and_then(|c| self.channels.get_mut(&c)) {
            channel.problem = Some(problem);
        }
        self.refresh_held(manifest);
    }

    pub(super) fn on_hydrated(&mut self, manifest: ManifestHash) {
        let Some(loaded) = self.manifests.get(&manifest) else { return };
        let channel = loaded.channel.clone();
        if loaded.published.is_none() {
            tracing::info!("manifest {} is whole on this node", manifest.short());
        }
        if let Some(tree) = self.tree.clone().filter(|t| t.manifest == manifest) {
            self.job(Job::FinishTree { tree });
        }
        if let Some(channel) = channel {
            self.retire(&channel);
        }
    }

    /// Forgets manifests of the channel that nothing here needs any more, and their chunks.
    pub(super) fn retire(&mut self, channel: &ChannelName) {
        let Some(current) = self.current_manifest(channel) else { return };
        let whole = self.node.progress(&current).is_some_and(|p| p.chunks_have >= p.chunks_wanted);
        if !whole || self.manifests.get(&current).is_none_or(|l| !l.checked) {
            return;
        }
        let in_use = |hash: &ManifestHash| {
            let of_session = |c: &super::EngineConn| {
                c.session.serving() == Some(*hash) || c.session.target().is_some_and(|t| t.manifest == *hash)
            };
            self.sessions.values().any(of_session) || self.tree.as_ref().is_some_and(|t| t.manifest == *hash)
        };
        let stale = |(hash, loaded): (&ManifestHash, &Loaded)| {
            let stale = *hash != current
                && loaded.channel.as_ref() == Some(channel)
                && loaded.published.is_none()
                && !in_use(hash);
            stale.then_some(*hash)
        };
        let old: Vec<ManifestHash> = self.manifests.iter().filter_map(stale).collect();
        for manifest in old {
            self.input(Input::Forget { manifest });
            self.manifests.remove(&manifest);
        }
        self.sweep_stores();
    }

    /// Removes stored chunks that no known manifest names.
    fn sweep_stores(&mut self) {
        let named = |hash: &aquifer_core::ChunkHash| self.manifests.values().any(|l| l.layout.index_of(hash).is_some());
        for hash in self.memory.hashes().into_iter().filter(|h| !named(h)) {
            self.memory.remove(&hash);
        }
        let loading = self.channels.values().any(|c| {
            c.release.as_ref().is_some_and(|(r, _)| self.manifests.get(&r.manifest).is_none_or(|l| !l.checked))
        });
        if let Some(disk) = self.disk.as_ref().filter(|_| !loading) {
            for (hash, _) in disk.hashes_with_len().into_iter().filter(|(h, _)| !named(h)) {
                disk.remove(&hash);
            }
        }
        self.trim_memory(false);
    }

    /// Frees memory-store chunks that nothing waits for: those that lie in an engine's memory
    /// too, or, under `pressure`, any that are only kept to serve others.
    pub(super) fn trim_memory(&mut self, pressure: bool) {
        if self.hold == Hold::All {
            return;
        }
        let mut touched = std::collections::BTreeSet::new();
        for hash in self.memory.hashes() {
            let uses: Vec<(ManifestHash, u32)> =
                self.manifests.iter().filter_map(|(m, l)| Some((*m, l.layout.index_of(&hash)?))).collect();
            let awaited = uses.iter().any(|(m, c)| self.sessions.values().any(|s| s.session.is_gathering(m, *c)));
            let in_region = uses.iter().any(|(m, c)| self.region_span(m, *c).is_some());
            if !awaited && (in_region || pressure) {
                self.memory.remove(&hash);
                touched.extend(uses.into_iter().map(|(m, _)| m));
            }
        }
        for manifest in touched {
            self.refresh_wants(manifest);
            self.refresh_held(manifest);
        }
    }

    fn open_tree(&mut self, hash: ManifestHash) -> Result<()> {
        let (Some(pull), Some(loaded)) = (&self.pull, self.manifests.get(&hash)) else { return Ok(()) };
        // An older tree keeps its chunks on disk, where the new one finds them.
        self.tree = None;
        let files = FileTree::open(&pull.dir, &loaded.manifest, &loaded.layout)?;
        self.tree = Some(Tree { manifest: hash, files: Arc::new(files) });
        Ok(())
    }
}
