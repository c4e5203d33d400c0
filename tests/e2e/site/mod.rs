//! One test's world: a directory, keys, and the processes started in it.

mod checkpoint;
mod member;
mod own_engine;
mod process;
mod programs;
mod proxy;
mod status;
mod wiretap;

pub(crate) use checkpoint::{Checkpoint, files_in, stored_chunks};
pub(crate) use member::Member;
pub(crate) use own_engine::{OwnEngine, Told};
pub(crate) use process::Process;
pub(crate) use programs::{Agent, Publisher};
pub(crate) use proxy::{Proxy, free_address};
pub(crate) use status::Status;
pub(crate) use wiretap::Wiretap;

use aquifer_core::PublisherSecret;
use std::cell::Cell;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The channel of tests that need only one.
pub(crate) const CHANNEL: &str = "test/model";

/// Longer than anything takes on a machine that does something else besides; then it is a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Made first and so dropped last: by then every process is dead, and its log complete.
pub(crate) struct Site {
    dir: tempfile::TempDir,
    mesh_key: PathBuf,
    publisher: (PathBuf, PublisherSecret),
    publishers: Cell<u8>,
}

/// What a command that ends by itself left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) output: String,
    pub(crate) errors: String,
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("aquifer-e2e-").tempdir().expect("a temporary directory");
        let mesh_key = dir.path().join("mesh.key");
        let publishers = Cell::new(0);
        let publisher = publisher_key(dir.path(), &publishers);
        let site = Site { dir, mesh_key, publisher, publishers };
        site.new_mesh_key("mesh.key");
        site
    }

    /// A path of that name in this site's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn mesh_key(&self) -> &Path {
        &self.mesh_key
    }

    /// The publisher that agents trust unless told otherwise.
    pub(crate) fn publisher_secret(&self) -> &PublisherSecret {
        &self.publisher.1
    }

    pub(crate) fn publisher_key(&self) -> &Path {
        &self.publisher.0
    }

    /// Another publisher: the file with its secret, and the secret.
    pub(crate) fn new_publisher(&self) -> (PathBuf, PublisherSecret) {
        publisher_key(self.dir.path(), &self.publishers)
    }

    /// Another mesh's key, in a file of that name.
    pub(crate) fn new_mesh_key(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let ended = self.run(|command| command.args(["keygen", "mesh", "--out"]).arg(&path));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        path
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, arguments: impl FnOnce(&mut Command) -> &mut Command) -> Ended {
        let mut command = program(&[]);
        let output = arguments(&mut command).stdin(Stdio::null()).output().expect("the program starts");
        Ended {
            code: output.status.code(),
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let mut logs = files_in(self.dir.path());
        logs.retain(|path| path.extension().is_some_and(|e| e == "log"));
        for log in logs {
            let text = fs::read_to_string(&log).unwrap_or_default();
            eprintln!("--- {}\n{text}", log.file_name().unwrap_or_default().display());
        }
    }
}

/// Looks until there is something to see, or panics with `what` was waited for.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(POLL);
    }
}

/// The program under test, deaf to whatever this machine's user configured.
fn program(wrapper: &[OsString]) -> Command {
    let mut words = wrapper.to_vec();
    words.push(env!("CARGO_BIN_EXE_aquifer").into());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AQUIFER_")) {
        command.env_remove(name);
    }
    command.args(["--config", "/dev/null"]);
    command
}

fn publisher_key(dir: &Path, count: &Cell<u8>) -> (PathBuf, PublisherSecret) {
    count.set(count.get() + 1);
    let secret = PublisherSecret::from_seed([count.get(); 32]);
    let path = dir.join(format!("publisher-{}.key", count.get()));
    fs::write(&path, format!("aquifer-publisher-key-v1:{}\n", hex::encode(secret.seed()))).expect("a key file");
    let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(&path, owner_only).expect("its permissions");
    (path, secret)
}
