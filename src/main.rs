//! The `aquifer` program: its command line, and the agent that wires the crates together.
//!
//! Algorithms live in the crates. What is here reads options, moves events between the parts,
//! and tells people what happens.
#![forbid(unsafe_code)]

mod agent;
mod cli;
mod commands;
mod errors;
mod http;
mod keys;
mod options;
mod output;
mod policy;
mod progress;
mod state;
mod units;

use std::process::ExitCode;

/// Jobs (hashing, copying, disks) run on the blocking pool: a few at a time keep the cores busy, more would only
/// compete.
pub(crate) const BLOCKING_THREADS: usize = 16;

fn main() -> ExitCode {
    aquifer_memory::allocator::share_arenas();
    let cli = cli::Cli::from_arguments();
    cli::init_logging(cli.log.as_deref());
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            output::tell(&format!("aquifer: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(commands::run(cli));
    // A job that waits for a slow disk does not keep the program.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => {
            output::tell(&format!("aquifer: {}", errors::reasons(&error)));
            ExitCode::FAILURE
        }
    }
}

/// A checkpoint's files, connections and stored chunks are open files, and the usual soft limit of
/// 1,024 is for programs that use `select`, which this is not.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("the limit on open files stays as it is: {error}");
    }
}
