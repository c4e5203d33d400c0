//! What this node knows of each manifest, and where its chunks lie.

use super::engines::EngineConn;
use super::jobs::Job;
use super::{Agent, Hold, PullWhat};
use crate::errors::reasons;
use anyhow::{Context, Result};
use aquifer_core::limits::MANIFEST_PIECE_BYTES;
use aquifer_core::{ChannelName, ChunkHash, ChunkSet, Layout, Manifest, ManifestHash, NodeId, PeerMessage};
use aquifer_memory::{FileTree, Published, Span};
use aquifer_proto::Input;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// A manifest whose bytes are here.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Channels that are, or were, at this manifest.
    pub(super) channels: BTreeSet<ChannelName>,
    pub(super) manifest: Arc<Manifest>,
    pub(super) layout: Arc<Layout>,
    bytes: Arc<Vec<u8>>,
    published: Option<Arc<Published>>,
    /// What was on disk when it was loaded has been hashed.
    pub(super) checked: bool,
    /// Chunks told to the brain as held.
    held: ChunkSet,
    /// And those of them that are costly to give: they lie on GPUs alone.
    costly: ChunkSet,
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
        // What it stood for when the last life ended.
        for channel in self.channels.keys().cloned().collect::<Vec<_>>() {
            self.turn(&channel)?;
        }
        if let Some(publication) = &self.publication {
            let source = publication.source.clone();
            let channel = publication.channel.clone();
            self.load(BTreeSet::from([channel]), source.hash, source.manifest_bytes.clone(), Some(source))?;
        }
        if let Some(PullWhat::Manifest(manifest)) = self.pull.as_ref().map(|p| p.what.clone()) {
            match self.state.as_ref().and_then(|s| s.manifest(&manifest)) {
                Some(bytes) => self.load(BTreeSet::new(), manifest, bytes, None)?,
                None => self.input(Input::ManifestWanted { manifest, bytes: 0 }),
            }
        }
        Ok(())
    }

    pub(super) fn on_manifest_fetched(&mut self, manifest: ManifestHash, bytes: Vec<u8>) -> Result<()> {
        if let Some(state) = &self.state
            && let Err(error) = state.save_manifest(&manifest, &bytes)
        {
            tracing::warn!("the manifest will be fetched again after a restart: {}", reasons(&error));
        }
        self.take_in(manifest, bytes)
    }

    /// Loads a manifest that is wanted. One that cannot be used is a problem of its channels, and
    /// the end of a pull.
    pub(super) fn take_in(&mut self, manifest: ManifestHash, bytes: Vec<u8>) -> Result<()> {
        let channels = self.channels_at(&manifest);
        if channels.is_empty() && !self.is_pulled_by_hash(&manifest) {
            return Ok(());
        }
        let Err(error) = self.load(channels.clone(), manifest, bytes, None) else { return Ok(()) };
        if self.pull.is_some() {
            return Err(error);
        }
        let problem = reasons(&error);
        tracing::warn!("manifest {}: {problem}", manifest.short());
        for channel in channels {
            if let Some(entry) = self.channels.get_mut(&channel) {
                entry.problem = Some(problem.clone());
            }
            self.fail_engines(&channel, manifest, &problem);
            self.refuse_waiting_engines(&channel, &problem);
            self.unfit(&channel, manifest, &problem);
        }
        Ok(())
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
        channels: BTreeSet<ChannelName>,
        hash: ManifestHash,
        bytes: Vec<u8>,
        published: Option<Arc<Published>>,
    ) -> Result<()> {
        let (manifest, layout) = match &published {
            Some(published) => (published.manifest.clone(), published.layout.clone()),
            None => {
                let manifest = Manifest::decode_named(&bytes, hash).context("the manifest cannot be used")?;
                let layout = Arc::new(Layout::of(&manifest));
                (Arc::new(manifest), layout)
            }
        };
        let chunk_bytes = layout.chunks.iter().map(|c| c.len).collect();
        let held = ChunkSet::empty(layout.len());
        let loaded = Loaded {
            channels: channels.clone(),
            manifest,
            layout,
            bytes: Arc::new(bytes),
            published,
            checked: false,
            costly: held.clone(),
            held,
        };
        let pulls = match self.pull.as_ref().map(|p| &p.what) {
            Some(PullWhat::Manifest(wanted)) => *wanted == hash,
            Some(PullWhat::Channel(wanted)) => channels.contains(wanted),
            None => false,
        };
        self.manifests.insert(hash, loaded);
        self.input(Input::ManifestLoaded { manifest: hash, chunk_bytes });
        if pulls {
            self.next_tree = Some(hash);
            return self.turn_tree();
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
        self.tree_jobs += usize::from(tree.is_some());
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
        self.refresh_held(hash);
        let channels = self.channels_at(&hash);
        if channels.is_empty() {
            self.refresh_wants(hash);
        }
        channels.iter().for_each(|channel| self.turn_to(channel));
    }

    /// What this node is to do in the channel may be another thing than before, or a manifest for it has come:
    /// engines go on, and once the release that is for it is loaded and checked, it stops wanting what came before.
    pub(super) fn turn_to(&mut self, channel: &ChannelName) {
        self.obey_all(channel);
        let Some(current) = self.current_manifest(channel) else { return };
        if self.manifests.get(&current).is_none_or(|l| !l.checked) {
            return;
        }
        self.refresh_wants(current);
        self.answer_waiting_engines(channel);
        let of_channel = |l: &Loaded| l.channels.contains(channel);
        let others: Vec<ManifestHash> =
            self.manifests.iter().filter(|(h, l)| **h != current && of_channel(l)).map(|(h, _)| *h).collect();
        for manifest in others {
            self.refresh_wants(manifest);
        }
        self.retire();
    }

    /// Tells the brain what this node is to hold of a manifest.
    pub(super) fn refresh_wants(&mut self, hash: ManifestHash) {
        let Some(loaded) = self.manifests.get(&hash).filter(|l| l.checked) else { return };
        let len = loaded.layout.len();
        let current = !self.channels_at(&hash).is_empty();
        let superseded = self.next_tree.is_some();
        let pulled = self.tree.as_ref().is_some_and(|t| t.manifest == hash && !superseded);
        let chunks = if loaded.published.is_some() || pulled || (self.hold == Hold::All && current) {
            ChunkSet::full(len)
        } else {
            let mut wanted = ChunkSet::empty(len);
            let aims =
                |c: &&EngineConn| c.session.target().is_some_and(|t| t.manifest == hash) && !c.session.is_turning();
            for conn in self.sessions.values().filter(aims) {
                for chunk in conn.session.needs().into_iter().flat_map(ChunkSet::iter) {
                    // What has reached the engine and is kept nowhere else is not wanted again.
                    if conn.session.is_gathering(&hash, chunk) || self.has(&hash, chunk) {
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
        let mut now = ChunkSet::from_indices(len, (0..len).filter(|c| self.has_here(&hash, *c)));
        let on_gpus = |c: &u32| !now.contains(*c) && self.on_any_gpu(&loaded.layout.chunk(*c).hash).is_some();
        let costly = match self.sessions.values().any(EngineConn::has_gpu) {
            true => ChunkSet::from_indices(len, (0..len).filter(on_gpus)),
            false => ChunkSet::empty(len),
        };
        now.union_with(&costly);
        let Some(loaded) = self.manifests.get_mut(&hash) else { return };
        let before = std::mem::replace(&mut loaded.held, now.clone());
        if loaded.costly != costly {
            loaded.costly = costly.clone();
            self.input(Input::Costly { manifest: hash, chunks: costly });
        }
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
        let (mut elsewhere, mut cheaper) = (Vec::new(), Vec::new());
        // A pull's files are of one manifest each: what is in one tree is not in another.
        let pulls = self.pull.is_some();
        for (other, loaded) in self.manifests.iter_mut().filter(|(m, _)| !pulls || **m == manifest) {
            let Some(index) = loaded.layout.index_of(&hash) else { continue };
            if loaded.costly.remove(index) {
                cheaper.push((*other, loaded.costly.clone()));
            }
            if loaded.held.insert(index) && *other != manifest {
                elsewhere.push((*other, ChunkSet::from_indices(loaded.layout.len(), [index])));
            }
        }
        for (other, chunks) in cheaper {
            self.input(Input::Costly { manifest: other, chunks });
        }
        for (other, chunks) in elsewhere {
            self.found_room(&other);
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
            .or_else(|| self.outlet.get(&hash))
            .or_else(|| self.disk.as_ref()?.get(&hash))
            .or_else(tree)
    }

    fn has(&self, manifest: &ManifestHash, chunk: u32) -> bool {
        let hash = self.manifests.get(manifest).map(|l| l.layout.chunk(chunk).hash);
        self.has_here(manifest, chunk) || hash.is_some_and(|hash| self.on_any_gpu(&hash).is_some())
    }

    /// Where this process, or a reader, can touch it.
    fn has_here(&self, manifest: &ManifestHash, chunk: u32) -> bool {
        let Some(loaded) = self.manifests.get(manifest) else { return false };
        let hash = loaded.layout.chunk(chunk).hash;
        loaded.published.as_ref().is_some_and(|p| p.get(chunk).is_some())
            || self.memory.contains(&hash)
            || self.disk.as_ref().is_some_and(|d| d.contains(&hash))
            || self.region_span(manifest, chunk).is_some()
            || self.tree.as_ref().is_some_and(|t| t.manifest == *manifest && t.files.get(chunk).is_some())
    }

    fn region_span(&self, manifest: &ManifestHash, chunk: u32) -> Option<Span> {
        let hash = self.manifests.get(manifest)?.layout.chunks.get(chunk as usize)?.hash;
        self.sessions.keys().find_map(|id| self.in_region(*id, &hash))
    }

    pub(super) fn grant(
        &mut self,
        to: NodeId,
        manifest: ManifestHash,
        lease: u64,
        ttl: Duration,
        chunks: Vec<u32>,
    ) -> Result<()> {
        self.grants.count_for(lease, self.channel_of(&manifest), self.node.boundary_to(&to));
        let (mut there, mut gone) = (Vec::with_capacity(chunks.len()), Vec::new());
        for chunk in chunks {
            match self.span_of(&manifest, chunk) {
                Some(span) => {
                    self.lease_out(to, manifest, lease, chunk, span);
                    there.push(chunk);
                }
                None if self.promise(to, manifest, lease, ttl, chunk) => {}
                None => gone.push(chunk),
            }
        }
        if !gone.is_empty() {
            // Promised before an engine turned to another release: the brain is told what is there now.
            self.refresh_held(manifest);
            // What is said to be there all the same cannot be had: it is fetched again.
            gone.retain(|chunk| self.has(&manifest, *chunk));
            gone.into_iter().for_each(|chunk| self.discard(manifest, chunk));
        }
        match there.is_empty() {
            true => Ok(()),
            false => self.tell_grant(to, manifest, lease, ttl, there),
        }
    }

    pub(super) fn lease_out(&mut self, to: NodeId, manifest: ManifestHash, lease: u64, chunk: u32, span: Span) {
        self.grants.lease(lease, chunk, to, span);
        if let Some(hash) = self.manifests.get(&manifest).map(|l| l.layout.chunk(chunk).hash) {
            self.outlet.lease(lease, chunk, hash);
        }
    }

    pub(super) fn tell_grant(
        &mut self,
        to: NodeId,
        manifest: ManifestHash,
        lease: u64,
        ttl: Duration,
        chunks: Vec<u32>,
    ) -> Result<()> {
        tracing::trace!("granted {chunks:?} to {} under lease {lease}", to.short());
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
        if let Some(published) = &loaded.published {
            published.withdraw(chunk);
            self.published_files_changed(manifest, why);
        } else {
            tracing::warn!("chunk {chunk} of {} is fetched again: {why}", manifest.short());
        }
        self.discard(manifest, chunk);
    }

    /// Believes none of the places where this chunk is thought to lie, and has it fetched again
    /// if it is wanted.
    pub(super) fn discard(&mut self, manifest: ManifestHash, chunk: u32) {
        let Some(hash) = self.manifests.get(&manifest).map(|l| l.layout.chunk(chunk).hash) else { return };
        self.remove_stored(&hash);
        if let Some(tree) = self.tree.as_ref().filter(|t| t.manifest == manifest) {
            tree.files.forget(chunk);
        }
        self.spoiled.extend(self.sessions.keys().map(|conn| (*conn, hash)));
        let having = |l: &Loaded| l.layout.index_of(&hash).is_some();
        let manifests: Vec<ManifestHash> = self.manifests.iter().filter(|(_, l)| having(l)).map(|(m, _)| *m).collect();
        for manifest in manifests {
            self.refresh_held(manifest);
        }
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
        if let Some(publication) = self.publication.as_mut().filter(|p| p.source.hash == manifest) {
            publication.problem = Some(problem.clone());
        }
        for channel in self.channels_at(&manifest) {
            if let Some(entry) = self.channels.get_mut(&channel) {
                entry.problem = Some(problem.clone());
            }
        }
        self.refresh_held(manifest);
    }

    pub(super) fn on_hydrated(&mut self, manifest: ManifestHash) {
        let Some(loaded) = self.manifests.get(&manifest) else { return };
        if loaded.published.is_none() {
            tracing::info!("manifest {} is whole on this node", manifest.short());
        }
        if let Some(tree) = self.tree.clone().filter(|t| t.manifest == manifest) {
            self.tree_jobs += 1;
            self.job(Job::FinishTree { tree });
        }
        self.retire();
    }

    /// Forgets manifests that nothing here needs any more, and their chunks.
    pub(super) fn retire(&mut self) {
        let stale = |(hash, loaded): (&ManifestHash, &Loaded)| {
            let moved_on = loaded.channels.iter().all(|c| self.has_moved_on(c, hash));
            (moved_on && loaded.published.is_none() && !self.is_in_use(hash)).then_some(*hash)
        };
        let stale: Vec<ManifestHash> = self.manifests.iter().filter_map(stale).collect();
        let (bases, old): (Vec<_>, Vec<_>) = stale.into_iter().partition(|hash| self.is_a_base(hash));
        bases.into_iter().for_each(|manifest| self.drop_all_but_kept(manifest));
        if !old.is_empty() {
            old.into_iter().for_each(|manifest| self.forget(manifest));
            self.trim_memory(false);
        }
    }

    /// Whether this manifest is of no more need in the channel, and those that are needed are whole here.
    fn has_moved_on(&self, channel: &ChannelName, from: &ManifestHash) -> bool {
        let is_whole = |manifest: &ManifestHash| {
            let whole = self.node.progress(manifest).is_some_and(|p| p.chunks_have >= p.chunks_wanted);
            whole && self.manifests.get(manifest).is_some_and(|l| l.checked)
        };
        let mut needed = self.needed(channel).peekable();
        needed.peek().is_some() && !self.is_needed(channel, from) && needed.all(is_whole)
    }

    /// Whether an engine would go back to it.
    fn is_a_base(&self, hash: &ManifestHash) -> bool {
        self.sessions.values().any(|c| c.session.base().is_some_and(|base| base.manifest == *hash))
    }

    fn is_in_use(&self, hash: &ManifestHash) -> bool {
        let of_session = |c: &super::EngineConn| {
            let is = |t: Option<&aquifer_proto::Target>| t.is_some_and(|t| t.manifest == *hash);
            c.session.serving() == Some(*hash) || is(c.session.target()) || is(c.session.aim())
        };
        let in_tree = self.tree.as_ref().is_some_and(|t| t.manifest == *hash) || self.next_tree == Some(*hash);
        self.sessions.values().any(of_session) || self.is_pulled_by_hash(hash) || in_tree
    }

    fn is_pulled_by_hash(&self, hash: &ManifestHash) -> bool {
        matches!(self.pull.as_ref().map(|p| &p.what), Some(PullWhat::Manifest(m)) if m == hash)
    }

    /// Removes the chunks of a manifest that no other one names and no engine may have to go back to.
    fn drop_all_but_kept(&mut self, manifest: ManifestHash) {
        let Some(loaded) = self.manifests.get(&manifest) else { return };
        let others = || self.manifests.iter().filter(|(m, _)| **m != manifest);
        let named = |hash: &ChunkHash| others().any(|(_, l)| l.layout.index_of(hash).is_some());
        let stored =
            |hash: &ChunkHash| self.memory.contains(hash) || self.disk.as_ref().is_some_and(|disk| disk.contains(hash));
        let chunks = (0u32..).zip(&loaded.layout.chunks).map(|(chunk, named)| (chunk, named.hash));
        let dropped = chunks.filter(|(chunk, hash)| stored(hash) && !self.is_kept(&manifest, *chunk) && !named(hash));
        let dropped: Vec<ChunkHash> = dropped.map(|(_, hash)| hash).collect();
        if !dropped.is_empty() {
            dropped.iter().for_each(|hash| self.remove_stored(hash));
            self.refresh_held(manifest);
        }
    }

    /// Forgets a manifest, and removes the chunks that no other one names.
    fn forget(&mut self, manifest: ManifestHash) {
        self.input(Input::Forget { manifest });
        let Some(loaded) = self.manifests.remove(&manifest) else { return };
        self.found_room(&manifest);
        let named = |hash: &ChunkHash| self.manifests.values().any(|l| l.layout.index_of(hash).is_some());
        for chunk in loaded.layout.chunks.iter().filter(|c| !named(&c.hash)) {
            self.remove_stored(&chunk.hash);
        }
        // Chunks of releases of earlier lives, once every channel knows what it is at.
        let settled = |channel: &ChannelName| {
            let mut needed = self.needed(channel).peekable();
            needed.peek().is_some() && needed.all(|m| self.manifests.get(m).is_some_and(|l| l.checked))
        };
        if let Some(disk) = self.disk.as_ref().filter(|_| self.channels.keys().all(settled)) {
            for (hash, _) in disk.hashes_with_len().into_iter().filter(|(h, _)| !named(h)) {
                disk.remove(&hash);
            }
        }
    }

    /// Removes a chunk from this node's stores, whichever has it.
    fn remove_stored(&self, hash: &ChunkHash) {
        self.memory.remove(hash);
        self.outlet.remove(hash);
        if let Some(disk) = &self.disk {
            disk.remove(hash);
        }
    }

    /// Makes room at the cost of releases that were superseded: their chunks that no current or
    /// used manifest names. That an engine can go back to one without the network is the first thing to go.
    pub(super) fn evict_superseded(&mut self) {
        let kept = |m: &ManifestHash, l: &Loaded| {
            !self.channels_at(m).is_empty() || self.is_in_use(m) || l.published.is_some()
        };
        let (keep, drop): (Vec<_>, Vec<_>) = self.manifests.iter().partition(|(m, l)| kept(m, l));
        let named = |hash: &ChunkHash| keep.iter().any(|(_, l)| l.layout.index_of(hash).is_some());
        let chunks: Vec<ChunkHash> = drop.iter().flat_map(|(_, l)| l.layout.chunks.iter().map(|c| c.hash)).collect();
        let touched: Vec<ManifestHash> = drop.iter().map(|(m, _)| **m).collect();
        for hash in chunks.iter().filter(|h| !named(h)) {
            self.remove_stored(hash);
        }
        for manifest in touched {
            self.refresh_held(manifest);
        }
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
            let kept = !pressure && uses.iter().any(|(m, c)| self.is_kept(m, *c));
            if !awaited && !kept && (in_region || pressure) {
                self.memory.remove(&hash);
                touched.extend(uses.into_iter().map(|(m, _)| m));
            }
        }
        for manifest in touched {
            self.refresh_wants(manifest);
            self.refresh_held(manifest);
        }
    }

    /// Turns to the next manifest to pull, once nothing is under way for the one before: two trees
    /// cannot share the directory, and the new one takes over what the old one has.
    pub(super) fn turn_tree(&mut self) -> Result<()> {
        let (Some(next), Some(pull)) = (self.next_tree, &self.pull) else { return Ok(()) };
        let dir = pull.dir.clone();
        if let Some(old) = self.tree.as_ref().map(|t| t.manifest).filter(|m| *m != next) {
            if self.tree_jobs > 0 || self.has_reads_of(&old) {
                self.refresh_wants(old);
                return Ok(());
            }
            tracing::info!("release {} is superseded; pulling {} in its place", old.short(), next.short());
            self.tree = None;
            self.input(Input::Forget { manifest: old });
            self.manifests.remove(&old);
        }
        self.next_tree = None;
        let Some(loaded) = self.manifests.get(&next) else { return Ok(()) };
        let files = FileTree::open(&dir, &loaded.manifest, &loaded.layout)?;
        self.tree = Some(Tree { manifest: next, files: Arc::new(files) });
        self.start_check(next);
        Ok(())
    }
}
