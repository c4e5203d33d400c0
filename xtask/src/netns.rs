//! The program itself, over shaped links in network namespaces.

use crate::run::{cargo, program, root, show};
use anyhow::{Result, bail};
use std::process::Command;

/// Builds the program and hands `args` to `tests/netns/swarm.py`. Whether that was content.
pub(crate) fn run(args: impl Iterator<Item = String>) -> Result<bool> {
    let (built, _) = show("release build", &mut cargo(&["build", "--release", "--locked"]))?;
    if !built {
        bail!("the program does not build");
    }
    Ok(command(args).status()?.success())
}

/// Runs `tests/netns/swarm.py` on the program as it was built last.
pub(crate) fn command(args: impl IntoIterator<Item = String>) -> Command {
    script("tests/netns/swarm.py", args)
}

/// The same of `tests/netns/storm.py`.
pub(crate) fn storm(args: impl IntoIterator<Item = String>) -> Command {
    script("tests/netns/storm.py", args)
}

fn script(path: &str, args: impl IntoIterator<Item = String>) -> Command {
    let mut command = Command::new("python3");
    command.arg(root().join(path)).arg("--program").arg(program()).args(args);
    command
}

/// Only root makes network namespaces.
pub(crate) fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.and_then(|uids| uids.split_whitespace().nth(1)) == Some("0")
}
