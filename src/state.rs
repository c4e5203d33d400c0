//! What a node must remember across restarts: who it is, what it has believed, and the manifests
//! it has seen. Every file is replaced whole, so a crash leaves the old one or the new one.

use anyhow::{Context, Result, bail};
use aquifer_core::limits::MANIFEST_BYTES_MAX;
use aquifer_core::{ChannelName, ManifestHash, NodeSecret, ReleaseId, SignedRelease, SignedStatement};
use aquifer_proto::rollout::Stand;
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
        for sub in ["", "releases", "statements", "stands", "manifests"] {
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

    /// Where events wait for hooks.
    pub(crate) fn spool(&self) -> PathBuf {
        self.dir.join("hooks")
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
        self.read_all("releases", |bytes| SignedRelease::decode(bytes).map_err(|e| e.to_string()))
    }

    /// What was said of them.
    pub(crate) fn statements(&self) -> Vec<SignedStatement> {
        self.read_all("statements", |bytes| SignedStatement::decode(bytes).map_err(|e| e.to_string()))
    }

    /// Where the node stood in a channel. What cannot be read is told, and as if it were not there: the node then
    /// goes by what its engines serve.
    pub(crate) fn stand(&self, channel: &ChannelName) -> Option<Stand> {
        let path = self.dir.join("stands").join(file_name(channel));
        let bytes = fs::read(&path).ok()?;
        Stand::decode(&bytes).inspect_err(|e| tracing::warn!("{} is left out: {e}", path.display())).ok()
    }

    /// Keeps these of the channel, and no others.
    pub(crate) fn save_releases(&self, channel: &ChannelName, encoded: &[(ReleaseId, Vec<u8>)]) -> Result<()> {
        self.replace_all("releases", channel, encoded, true)
    }

    /// Not waiting for the disk: a node that has heard a word says so in where it stands, which is kept at once.
    pub(crate) fn save_statements(&self, channel: &ChannelName, encoded: &[(ReleaseId, Vec<u8>)]) -> Result<()> {
        self.replace_all("statements", channel, encoded, false)
    }

    pub(crate) fn save_stand(&self, channel: &ChannelName, stand: &Stand) -> Result<()> {
        self.replace(&self.dir.join("stands").join(file_name(channel)), &stand.encode())
    }

    fn read_all<T>(&self, kind: &str, decode: impl Fn(&[u8]) -> Result<T, String>) -> Vec<T> {
        let entries = fs::read_dir(self.dir.join(kind)).into_iter().flatten().flatten();
        let read = |path: PathBuf| {
            let bytes = fs::read(&path).ok()?;
            decode(&bytes).inspect_err(|e| tracing::warn!("{} is left out: {e}", path.display())).ok()
        };
        entries.filter_map(|e| read(e.path())).collect()
    }

    fn replace_all(
        &self,
        kind: &str,
        channel: &ChannelName,
        encoded: &[(ReleaseId, Vec<u8>)],
        at_once: bool,
    ) -> Result<()> {
        let (dir, channel) = (self.dir.join(kind), file_name(channel));
        let name = |id: &ReleaseId| format!("{channel}-{}-{}", id.seq, &id.manifest.to_string()[..16]);
        let names: Vec<String> = encoded.iter().map(|(id, _)| name(id)).collect();
        for ((_, bytes), name) in encoded.iter().zip(&names) {
            let path = dir.join(name);
            if fs::read(&path).ok().as_ref() != Some(bytes) {
                self.write(&path, bytes, at_once)?;
            }
        }
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let old =
                entry.file_name().to_str().is_some_and(|n| n.starts_with(&channel) && !names.iter().any(|k| k == n));
            if old {
                // One that stays is read again after a restart, and found old.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
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
        self.write(path, bytes, true)
    }

    /// Replaces a file whole; `at_once`: it is on the disk when this returns.
    fn write(&self, path: &Path, bytes: &[u8], at_once: bool) -> Result<()> {
        let temporary = path.with_extension("new");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(bytes)?;
            if at_once {
                file.sync_all()?;
            }
            fs::rename(&temporary, path)
        };
        write().with_context(|| format!("cannot write {}: free some room, or give another --state", path.display()))
    }
}

/// A channel's name may hold slashes and have any length up to 128: its hash names the file.
fn file_name(channel: &ChannelName) -> String {
    blake3::hash(channel.as_str().as_bytes()).to_hex().to_string()
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
