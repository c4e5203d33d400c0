//! What a node must remember across restarts: who it is, what it has believed, and the manifests
//! it has seen. Every file is replaced whole, so a crash leaves the old one or the new one.

use anyhow::{Context, Result, bail};
use aquifer_core::limits::MANIFEST_BYTES_MAX;
use aquifer_core::{ChannelName, ManifestHash, NodeSecret, SignedRelease};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Manifests kept; the oldest go first. Guess: a few channels, a few releases each.
const MANIFESTS_MAX: usize = 16;

#[derive(Debug)]
pub(crate) struct StateDir {
    dir: PathBuf,
    /// Held while the node runs, so that two nodes cannot share one identity.
    _lock: File,
}

impl StateDir {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        for sub in ["", "releases", "manifests"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).with_context(|| format!("cannot make the state directory {}", path.display()))?;
        }
        let path = dir.join("lock");
        let lock = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!(
                "another Aquifer process uses the state directory {}; give this one its own with --state",
                dir.display()
            );
        }
        Ok(StateDir { dir: dir.to_path_buf(), _lock: lock })
    }

    pub(crate) fn identity(&self) -> Result<NodeSecret> {
        crate::keys::identity(&self.dir.join("identity"))
    }

    /// A number greater than in any earlier life, also if the clock went back.
    pub(crate) fn next_incarnation(&self) -> Result<u64> {
        let path = self.dir.join("incarnation");
        let last: u64 = fs::read_to_string(&path).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0);
        let next = unix_ms().max(last.saturating_add(1));
        self.replace(&path, next.to_string().as_bytes())?;
        Ok(next)
    }

    /// Accepted releases of earlier lives. One that cannot be read is left out, and told.
    pub(crate) fn releases(&self) -> Vec<SignedRelease> {
        let entries = fs::read_dir(self.dir.join("releases")).into_iter().flatten().flatten();
        let read = |path: PathBuf| {
            let bytes = fs::read(&path).ok()?;
            SignedRelease::decode(&bytes).inspect_err(|e| tracing::warn!("{} is left out: {e}", path.display())).ok()
        };
        entries.filter_map(|e| read(e.path())).collect()
    }

    pub(crate) fn save_release(&self, channel: &ChannelName, signed: &SignedRelease) -> Result<()> {
        // A channel's name may hold slashes and have any length up to 128: its hash names the file.
        let name = blake3::hash(channel.as_str().as_bytes()).to_hex();
        self.replace(&self.dir.join("releases").join(name.as_str()), &signed.encode())
    }

    pub(crate) fn manifest(&self, hash: &ManifestHash) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = File::open(self.manifest_path(hash)).ok()?;
        file.take(MANIFEST_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).ok()?;
        (ManifestHash::of(&bytes) == *hash).then_some(bytes)
    }

    pub(crate) fn save_manifest(&self, hash: &ManifestHash, bytes: &[u8]) -> Result<()> {
        let path = self.manifest_path(hash);
        if !path.exists() {
            self.replace(&path, bytes)?;
            self.forget_old_manifests();
        }
        Ok(())
    }

    fn manifest_path(&self, hash: &ManifestHash) -> PathBuf {
        self.dir.join("manifests").join(hash.to_string())
    }

    fn forget_old_manifests(&self) {
        let entries = fs::read_dir(self.dir.join("manifests")).into_iter().flatten().flatten();
        let mut aged: Vec<_> = entries.filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path()))).collect();
        aged.sort();
        let surplus = aged.len().saturating_sub(MANIFESTS_MAX);
        for (_, path) in aged.into_iter().take(surplus) {
            // Only a cache: one that stays costs nothing but room.
            let _ = fs::remove_file(path);
        }
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let temporary = path.with_extension("new");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        };
        write().with_context(|| format!("cannot write {}: free some room, or give another --state", path.display()))
    }
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
