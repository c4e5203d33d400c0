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
    let mut command = Command::new("python3");
    command.arg(root().join("tests/netns/swarm.py")).arg("--program").arg(program()).args(args);
    Ok(command.status()?.success())
}
