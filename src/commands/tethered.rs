//! This program, ended by the kernel with whoever started it: for the demo and the benches, whose
//! agents would go on for ever if they were killed.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// Runs the program with `args` for as long as `parent` lives. Returns only if it fails.
pub(super) fn run(parent: i32, args: &[OsString]) -> Result<ExitCode> {
    // Kept over execve(2). It comes when the thread ends that started this process; the demo and the
    // benches start all of theirs from one that lasts.
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot be tied to the process that started this")?;
    if getppid().map(Pid::as_raw_nonzero).is_none_or(|found| found.get() != parent) {
        bail!("process {parent} has ended");
    }
    let program = std::env::current_exe().context("cannot find this program")?;
    Err(Command::new(program).args(args).exec()).context("cannot start this program again")
}
