//! Installing what tests need with the distribution's package manager, where the machine lets us.

use crate::run::show;
use anyhow::Result;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// Installs these packages. Where that cannot be done it says so, and whoever needs them skips what needs them.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if !crate::netns::is_root() || !Path::new("/usr/bin/apt-get").exists() {
        println!("not installing {packages:?}: that needs root and apt");
        return Ok(());
    }
    static UPDATED: OnceLock<()> = OnceLock::new();
    if UPDATED.set(()).is_ok() {
        show("package lists", apt().args(["update", "-qq"]))?;
    }
    let mut install = apt();
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages);
    show("packages", &mut install)?;
    Ok(())
}

/// Installs the packages of those programs that are not there.
pub(crate) fn programs(programs: &[(&str, &'static str)]) -> Result<()> {
    let here = |program: &str| Command::new("which").arg(program).output().is_ok_and(|o| o.status.success());
    let lacking: Vec<&str> = programs.iter().filter(|(name, _)| !here(name)).map(|(_, package)| *package).collect();
    install(&lacking)
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}
