//! Key files: one line of text, readable by their owner only.

use anyhow::{Context, Result, bail};
use aquifer_core::{NodeSecret, PublisherKey, PublisherSecret};
use aquifer_mesh::MeshKey;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

const PUBLISHER_PREFIX: &str = "aquifer-publisher-key-v1:";
const IDENTITY_PREFIX: &str = "aquifer-identity-v1:";

pub(crate) fn random_bytes() -> Result<[u8; 32]> {
    use rand::TryRngCore;
    let mut bytes = [0; 32];
    rand::rngs::OsRng.try_fill_bytes(&mut bytes).context("the system gives no randomness")?;
    Ok(bytes)
}

pub(crate) fn new_mesh_key() -> Result<MeshKey> {
    Ok(MeshKey::generate(random_bytes()?))
}

pub(crate) fn read_mesh_key(path: &Path) -> Result<MeshKey> {
    let text = read_secret(path, "mesh key")?;
    text.trim()
        .parse()
        .with_context(|| format!("{} is not a mesh key: make one with `aquifer keygen mesh`", path.display()))
}

pub(crate) fn new_publisher_secret() -> Result<PublisherSecret> {
    Ok(PublisherSecret::from_seed(random_bytes()?))
}

pub(crate) fn publisher_line(secret: &PublisherSecret) -> String {
    format!("{PUBLISHER_PREFIX}{}", hex::encode(secret.seed()))
}

pub(crate) fn read_publisher_secret(path: &Path) -> Result<PublisherSecret> {
    Ok(PublisherSecret::from_seed(read_seed(path, PUBLISHER_PREFIX, "publisher key", "`aquifer keygen publisher`")?))
}

/// The public key in `text`: 64 hexadecimal digits.
pub(crate) fn parse_publisher(text: &str) -> Result<PublisherKey> {
    Ok(text.parse::<PublisherKey>()?)
}

/// The node's identity in `path`, made there if there is none.
pub(crate) fn identity(path: &Path) -> Result<NodeSecret> {
    if path.exists() {
        return Ok(NodeSecret::from_seed(read_seed(path, IDENTITY_PREFIX, "node identity", "a new state directory")?));
    }
    let secret = NodeSecret::from_seed(random_bytes()?);
    write_secret(path, &format!("{IDENTITY_PREFIX}{}", hex::encode(secret.seed())))?;
    Ok(secret)
}

/// Writes `line` to a new file that only its owner can read. Never replaces a file.
pub(crate) fn write_secret(path: &Path, line: &str) -> Result<()> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent).with_context(|| format!("cannot make the directory {}", parent.display()))?;
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = match file {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            bail!("{} exists already; move it away first: a lost key cannot be had back", path.display())
        }
        other => other.with_context(|| format!("cannot write {}", path.display()))?,
    };
    writeln!(file, "{line}").with_context(|| format!("cannot write {}", path.display()))
}

fn read_seed(path: &Path, prefix: &str, what: &str, make: &str) -> Result<[u8; 32]> {
    let text = read_secret(path, what)?;
    let mut seed = [0; 32];
    let digits = text.trim().strip_prefix(prefix);
    match digits.map(|d| hex::decode_to_slice(d, &mut seed)) {
        Some(Ok(())) => Ok(seed),
        _ => bail!("{} is not a {what}: make one with {make}", path.display()),
    }
}

/// Whether others may read or change it. Root may show a file to a group, as Kubernetes does with its secrets: the process
/// then reads it as a member of that group, and cannot mend its mode.
fn is_open(mode: u32, owner: u32) -> bool {
    mode & 0o027 != 0 || (mode & 0o040 != 0 && owner != 0)
}

fn read_secret(path: &Path, what: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read the {what} {}", path.display()))?;
    let (mode, owner) = fs::metadata(path).map(|m| (m.permissions().mode(), m.uid())).unwrap_or((0, 0));
    if is_open(mode, owner) {
        tracing::warn!("{} can be read by others (mode {:o}): chmod 600 it", path.display(), mode & 0o777);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_see_a_key() {
        let open = [(0o644, 0), (0o604, 7), (0o660, 0), (0o640, 7)];
        assert!(open.into_iter().all(|(mode, owner)| is_open(mode, owner)));
        let closed = [(0o600, 7), (0o400, 0), (0o440, 0), (0o640, 0)];
        assert!(closed.into_iter().all(|(mode, owner)| !is_open(mode, owner)));
    }
}
