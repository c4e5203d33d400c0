//! A guest with software RDMA devices, and the tests that need one.

use crate::run::{Totals, cargo, count_cargo, program, root, show, target};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Wall-clock limit of the tests in the guest. Measured on two cores without KVM: two minutes, and five where
/// others use them too.
const LIMIT_S: &str = "1200";

/// Wall-clock limit of fetching what the guest is made of: 85 MB.
const FETCH_LIMIT_S: &str = "600";

/// Runs what `args` say in the guest, `[guest.sh's options] [--] COMMAND...`; whether it succeeded.
pub(crate) fn run(args: impl Iterator<Item = String>) -> Result<bool> {
    if let Err(reason) = prepare()? {
        bail!("{reason}");
    }
    Ok(guest().args(args).status().context("cannot run tests/rdma-vm/guest.sh")?.success())
}

/// Runs the tests of `aquifer-rdma` that need a device, and the program's meshes over RDMA. `None` where
/// this machine cannot run the guest, which is said.
pub(crate) fn tests() -> Result<Option<Totals>> {
    if let Err(reason) = prepare()? {
        println!("the tests over RDMA are skipped: {reason}");
        return Ok(None);
    }
    let (built, _) = show("release build", &mut cargo(&["build", "--release", "--locked"]))?;
    let Some(tests) = build()?.filter(|_| built) else { return Ok(Some(Totals { failed: 1, ..Totals::default() })) };
    let mut command = guest();
    command
        .args(["-n", "2", "-t", LIMIT_S, "--"])
        .arg(root().join("tests/rdma-vm/suite.sh"))
        .arg(program())
        .args(tests);
    let (ok, output) = show("RDMA, in the guest", &mut command)?;
    let counted = count_cargo(&output);
    // A test program that crashed, or a guest that died or took too long, fails without a line of its own.
    let unsaid = u64::from(!ok && counted.failed == 0);
    Ok(Some(Totals { failed: counted.failed + unsaid, ..counted }))
}

/// Fetches what the guest is made of, once; the inner error says why that cannot be.
fn prepare() -> Result<Result<(), String>> {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Ok(Err("the guest is made for x86-64 Linux".into()));
    }
    let mut setup = Command::new("timeout");
    setup.arg(FETCH_LIMIT_S).arg(root().join("tests/rdma-vm/setup.sh")).arg(rig()).stdin(Stdio::null());
    let why_not = match setup.status() {
        Ok(status) if status.success() => return Ok(Ok(())),
        Ok(status) if status.code() == Some(124) => format!("it took more than {FETCH_LIMIT_S} s"),
        Ok(_) => "see above".to_string(),
        Err(error) => format!("timeout(1): {error}"),
    };
    Ok(Err(format!("QEMU and what else the guest is made of could not be fetched: {why_not}")))
}

fn guest() -> Command {
    let mut command = Command::new(root().join("tests/rdma-vm/guest.sh"));
    command.arg("-d").arg(rig()).current_dir(root());
    command
}

fn rig() -> PathBuf {
    target().join("rdma-vm")
}

/// The test programs; `None` if they do not build.
fn build() -> Result<Option<Vec<PathBuf>>> {
    let what = ["test", "--locked", "--package", "aquifer-rdma", "--features", "device-tests", "--no-run"];
    let mut command = cargo(&what);
    let output = command.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit()).output()?;
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let tests = messages.filter(|m| m["profile"]["test"] == true);
    let programs = tests.filter_map(|m| m["executable"].as_str().map(PathBuf::from)).collect();
    Ok(output.status.success().then_some(programs))
}
