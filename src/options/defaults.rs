//! What is taken where nothing was said: it depends on the machine and the user.

use std::path::PathBuf;

pub(crate) fn default_socket() -> PathBuf {
    match directory("XDG_RUNTIME_DIR") {
        Some(dir) => dir.join("aquifer.sock"),
        None => PathBuf::from(format!("/tmp/aquifer-{}.sock", rustix::process::getuid().as_raw())),
    }
}

pub(super) fn default_shm_dir() -> PathBuf {
    match directory("XDG_RUNTIME_DIR") {
        Some(dir) => dir.join("aquifer-shm"),
        None => PathBuf::from(format!("/tmp/aquifer-{}-shm", rustix::process::getuid().as_raw())),
    }
}

/// Where an agent called `name` remembers, unless told otherwise; None for a user without a home.
pub(crate) fn default_state(name: Option<&str>) -> Option<PathBuf> {
    let home = directory("XDG_STATE_HOME").or_else(|| Some(directory("HOME")?.join(".local/state")))?;
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = name.map_or_else(host_name, str::to_string).chars().map(plain).collect();
    Some(home.join("aquifer").join(name.trim_start_matches('.')))
}

pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The directory an environment variable names; an empty one names none.
pub(super) fn directory(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}
