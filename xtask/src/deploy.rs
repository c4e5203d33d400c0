//! What is in `deploy/`: units, manifests, rules, the dashboard, the image. Checked with the programs that will read
//! them, and the unit by a real systemd that runs the program.

use crate::apt;
use crate::run::{Totals, count_unittest, program, root, show, target};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// A program that the checks run, and the Debian package that brings it.
const PROGRAMS: [(&str, &str); 4] =
    [("promtool", "prometheus"), ("systemd-analyze", "systemd"), ("nsenter", "util-linux"), ("ip", "iproute2")];

/// Installs what it lacks and runs the tests; those that need what cannot be had are skipped, and say so.
pub(crate) fn run() -> Result<Totals> {
    apt::programs(&PROGRAMS)?;
    let packages = packages()?;
    let mut totals = Totals::default();
    for dir in ["tests/deploy", "tests/systemd"] {
        let mut command = Command::new("python3");
        command.args(["-m", "unittest", "discover", "-v", "-s", dir, "-t", dir]).current_dir(root());
        command.env("PYTHONPATH", &packages).env("PYTHONDONTWRITEBYTECODE", "1").env("AQUIFER_BIN", program());
        let (ok, output) = show(dir, &mut command)?;
        let counted = count_unittest(&output);
        let unsaid = u64::from(!ok && counted.failed == 0);
        totals.add(Totals { failed: counted.failed + unsaid, ..counted });
    }
    Ok(totals)
}

/// The directory of the Python packages that the checks import; made once for each list of them.
fn packages() -> Result<PathBuf> {
    let list = root().join("tests/deploy/requirements.txt");
    let directory = target().join("deploy-python");
    let stamp = directory.join("requirements.txt");
    let wanted = std::fs::read(&list)?;
    if std::fs::read(&stamp).is_ok_and(|made| made == wanted) {
        return Ok(directory);
    }
    let _not_there_or_gone = std::fs::remove_dir_all(&directory);
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "-q", "--target"]).arg(&directory).arg("-r").arg(&list);
    let (ok, _) = show("the checks' Python packages", &mut pip)?;
    if ok {
        std::fs::write(&stamp, wanted)?;
    } else {
        println!("the Python packages could not be fetched: the checks that need them are skipped");
    }
    Ok(directory)
}
