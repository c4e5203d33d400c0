//! Developer commands. `cargo xtask ci` is the README's test command and runs everything that
//! needs no special hardware, installing what it lacks.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a command for people")]

mod apt;
mod ci;
mod crates;
mod deploy;
mod fixtures;
mod netns;
mod ptx;
mod rdma_vm;
mod run;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND

  ci        everything CI runs; ends with the totals
  crates    the table of crates and whom each may know, as in ARCHITECTURE.md
  deploy    check what is in deploy/, and run the program under its systemd unit; wants a release build
  fixtures  fetch what the tests need: a real model, Python packages
  netns     how long a release takes over shaped links, in network namespaces; needs root.
            Options, such as --nodes 8 --mbit 50 --mib 64 --runs 5 --kill 2, go to
            tests/netns/swarm.py (--help lists them)
  ptx       make the GPU kernels' PTX anew from their CUDA source; fetches NVRTC with pip, and needs
            no GPU and no CUDA toolkit
  rdma-vm   run a command in a throw-away guest with software RDMA devices; fetches what that
            needs with apt, and needs no root: cargo xtask rdma-vm -- rdma link show.
            Options before `--` go to tests/rdma-vm/guest.sh
  rdma-tests
            what CI runs in that guest, after a release build of the program";

fn main() -> ExitCode {
    let result = match std::env::args().nth(1).as_deref() {
        Some("ci") => ci::run(),
        Some("crates") => crates::table().map(|t| println!("{t}")).map(|()| true),
        Some("deploy") => deploy::run().map(|totals| totals.failed == 0),
        Some("fixtures") => fixtures::prepare().map(|f| println!("{f:#?}")).map(|()| true),
        Some("netns") => netns::run(std::env::args().skip(2)),
        Some("ptx") => ptx::generate().map(|()| true),
        Some("rdma-tests") => rdma_vm::tests().map(|totals| totals.is_some_and(|totals| totals.failed == 0)),
        Some("rdma-vm") => rdma_vm::run(std::env::args().skip(2)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
