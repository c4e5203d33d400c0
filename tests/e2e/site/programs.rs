//! The program in its parts: publisher, agent, engine, puller.

use super::{CHANNEL, Checkpoint, Process, Site, Status, until};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// A command about to be started on loopback, on ports of the system's choosing.
pub(crate) struct Launch<'s> {
    site: &'s Site,
    name: String,
    command: Vec<OsString>,
    flags: Vec<OsString>,
    channels: Vec<String>,
    trust: Option<String>,
    publisher_key: PathBuf,
    mesh_key: PathBuf,
    listen: String,
    data_listen: String,
    wrapper: Vec<OsString>,
    shares_memory: bool,
    shm_dir: PathBuf,
    state: Option<PathBuf>,
    socket: PathBuf,
}

pub(crate) struct Publisher {
    pub(crate) process: Process,
    pub(crate) manifest: String,
    pub(crate) address: String,
    pub(crate) chunks: u64,
    pub(crate) seq: u64,
}

pub(crate) struct Agent {
    pub(crate) process: Process,
    pub(crate) socket: PathBuf,
    pub(crate) address: String,
}

pub(crate) struct Engine {
    process: Process,
    events: Vec<Value>,
}

impl Site {
    pub(crate) fn agent(&self, name: &str) -> Launch<'_> {
        let state = self.path(&format!("{name}.state"));
        Launch { state: Some(state), ..Launch::new(self, name, &["agent".as_ref()]) }
    }

    pub(crate) fn publish(&self, name: &str, checkpoint: &Path) -> Launch<'_> {
        Launch::new(self, name, &["publish".as_ref(), checkpoint.as_os_str(), "--json".as_ref()])
    }

    /// A pull of the channel's newest release to `dir`.
    pub(crate) fn pull(&self, name: &str, dir: &Path) -> Launch<'_> {
        let to = ["--json".as_ref(), "--to".as_ref(), dir.as_os_str()];
        Launch::new(self, name, &[&["pull".as_ref()], &to[..]].concat())
    }
}

impl<'s> Launch<'s> {
    fn new(site: &'s Site, name: &str, command: &[&std::ffi::OsStr]) -> Self {
        Launch {
            site,
            name: name.to_string(),
            command: command.iter().map(|part| part.to_os_string()).collect(),
            flags: Vec::new(),
            channels: vec![CHANNEL.to_string()],
            trust: Some(site.publisher_secret().public().to_string()),
            publisher_key: site.publisher_key().to_path_buf(),
            mesh_key: site.mesh_key().to_path_buf(),
            listen: "127.0.0.1:0".to_string(),
            data_listen: "127.0.0.1:0".to_string(),
            wrapper: Vec::new(),
            shares_memory: true,
            shm_dir: site.path("shm"),
            state: None,
            socket: site.path(&format!("{name}.sock")),
        }
    }

    pub(crate) fn flag(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.flags.extend([name.into(), value.into()]);
        self
    }

    pub(crate) fn peer(self, address: &str) -> Self {
        self.flag("--peer", address)
    }

    pub(crate) fn channels(mut self, channels: &[&str]) -> Self {
        self.channels = channels.iter().map(ToString::to_string).collect();
        self
    }

    /// Trusts nobody but whom later flags name.
    pub(crate) fn distrustful(mut self) -> Self {
        self.trust = None;
        self
    }

    pub(crate) fn publisher_key(mut self, path: &Path) -> Self {
        self.publisher_key = path.to_path_buf();
        self
    }

    pub(crate) fn mesh_key(mut self, path: PathBuf) -> Self {
        self.mesh_key = path;
        self
    }

    /// Sends over TCP alone.
    pub(crate) fn without_shm(mut self) -> Self {
        self.shares_memory = false;
        self
    }

    pub(crate) fn shm_dir(mut self, path: PathBuf) -> Self {
        self.shm_dir = path;
        self
    }

    /// Serves data through `proxy`, which knows where to find it, and in no other way.
    pub(crate) fn behind(mut self, proxy: &super::Proxy) -> Self {
        self.shares_memory = false;
        self.data_listen = proxy.target().to_string();
        self.flag("--data-advertise", proxy.address().to_string())
    }

    /// Serves data through a wire that somebody listens to.
    pub(crate) fn tapped(mut self, tap: &super::Wiretap) -> Self {
        self.shares_memory = false;
        self.data_listen = tap.target().to_string();
        self.flag("--data-advertise", tap.address().to_string())
    }

    /// Listens for the mesh at `address`, and for readers on another port of the same host.
    pub(crate) fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address.to_string();
        self.data_listen = SocketAddr::new(address.ip(), 0).to_string();
        self
    }

    /// Lets this command, whose arguments end with the program's, start the program.
    pub(crate) fn inside(mut self, wrapper: Vec<OsString>) -> Self {
        self.wrapper = wrapper;
        self
    }

    pub(crate) fn state(mut self, path: PathBuf) -> Self {
        self.state = Some(path);
        self
    }

    pub(crate) fn socket(mut self, path: PathBuf) -> Self {
        self.socket = path;
        self
    }

    /// The whole command line after the program's name.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let kind = self.command[0].to_string_lossy().into_owned();
        let mut all = self.command.clone();
        match kind.as_str() {
            "pull" => all.insert(1, self.channels[0].clone().into()),
            _ => self.channels.iter().for_each(|c| all.extend(["--channel".into(), c.into()])),
        }
        all.extend(
            ["--name", &self.name, "--listen", &self.listen, "--data-listen", &self.data_listen].map(Into::into),
        );
        all.extend(["--mesh-key".into(), self.mesh_key.clone().into()]);
        all.extend(["--shm".into(), self.shares_memory.to_string().into()]);
        all.extend(["--shm-dir".into(), self.shm_dir.clone().into()]);
        // Its tests need a guest, and are made there: what devices this machine has must not matter here.
        all.extend(["--rdma".into(), "off".into()]);
        match (kind.as_str(), &self.trust) {
            ("publish", _) => all.extend(["--publisher-key".into(), self.publisher_key.clone().into()]),
            (_, Some(trust)) => all.extend(["--trust".into(), trust.into()]),
            (_, None) => {}
        }
        if kind == "agent" {
            all.extend(["--socket".into(), self.socket.clone().into()]);
        }
        if let Some(state) = &self.state {
            all.extend(["--state".into(), state.clone().into()]);
        }
        all.extend(self.flags.clone());
        all
    }

    pub(crate) fn process(self) -> Process {
        Process::start_inside(self.site, &self.name, &self.wrapper, &self.arguments())
    }

    /// Runs it to its end.
    pub(crate) fn run(self) -> super::Ended {
        self.site.run(|command| command.args(self.arguments()))
    }

    /// Starts an agent without waiting for it.
    pub(crate) fn begin(self) -> Agent {
        let socket = self.socket.clone();
        Agent { process: self.process(), socket, address: String::new() }
    }

    /// Starts an agent; returns once it answers.
    pub(crate) fn agent(self) -> Agent {
        let mut agent = self.begin();
        agent.up();
        agent
    }

    /// Starts a publisher; returns once it has published.
    pub(crate) fn publisher(self) -> Publisher {
        Publisher::of(self.process())
    }
}

impl Publisher {
    /// Waits until the process has published.
    pub(crate) fn of(process: Process) -> Self {
        let hashed = process.next_event(&["hashed"]);
        let published = process.next_event(&["published"]);
        let text = |value: &Value| value.as_str().expect("a text").to_string();
        let number = |value: &Value| value.as_u64().expect("a number");
        Publisher {
            manifest: text(&published["manifest"]),
            address: text(&published["addresses"][0]),
            chunks: number(&hashed["chunks"]),
            seq: number(&published["seq"]),
            process,
        }
    }
}

impl Agent {
    /// Waits until it answers and has an address.
    pub(crate) fn up(&mut self) {
        let what = format!("{} is up", self.process.name);
        self.address = until(&what, || {
            self.process.assert_alive();
            Some(self.try_status()?.addresses.first()?.clone())
        });
    }

    /// What it says of itself now.
    pub(crate) fn status(&self) -> Status {
        self.process.assert_alive();
        until(&format!("{} answers", self.process.name), || self.try_status())
    }

    fn try_status(&self) -> Option<Status> {
        let value = aquifer_engine::request_status(&self.socket).ok()?;
        Some(serde_json::from_value(value).expect("a status as it always was"))
    }

    /// Waits until its status fulfils `condition`, and returns it.
    pub(crate) fn until(&self, what: &str, condition: impl Fn(&Status) -> bool) -> Status {
        let mut last = None;
        let deadline = std::time::Instant::now() + super::PATIENCE;
        while std::time::Instant::now() < deadline {
            self.process.assert_alive();
            if let Some(status) = self.try_status() {
                if condition(&status) {
                    return status;
                }
                last = Some(status);
            }
            std::thread::sleep(super::POLL);
        }
        panic!("{} not within {:?}: {what}; it says {last:#?}", self.process.name, super::PATIENCE);
    }

    /// Waits until it holds all of `manifest`.
    pub(crate) fn until_holds(&self, manifest: &str) -> Status {
        self.until("holds the release", |s| {
            s.channels.iter().any(|c| c.manifest == manifest && c.chunks_wanted > 0 && c.chunks_have == c.chunks_wanted)
        })
    }

    pub(crate) fn engine(&self, site: &Site, name: &str) -> Engine {
        self.engine_on(site, name, CHANNEL)
    }

    pub(crate) fn engine_on(&self, site: &Site, name: &str, channel: &str) -> Engine {
        let mut arguments: Vec<OsString> = ["demo-engine", "--channel", channel, "--name", name].map(Into::into).into();
        arguments.extend(["--socket".into(), self.socket.clone().into()]);
        Engine { process: Process::start(site, name, &arguments), events: Vec::new() }
    }
}

impl Engine {
    /// Waits until it serves `manifest`.
    pub(crate) fn until_serves(&mut self, manifest: &str) {
        loop {
            let event = self.process.next_event(&["hydrated", "switched", "failed"]);
            self.events.push(event.clone());
            assert_ne!(event["event"], "failed", "{event}");
            if event["manifest"] == manifest {
                return;
            }
        }
    }

    /// Everything it has told so far.
    pub(crate) fn events(&mut self) -> &[Value] {
        self.events.extend(self.process.events());
        &self.events
    }

    /// Checks that its memory is the checkpoint's, byte for byte, as the process itself finds it.
    pub(crate) fn assert_holds(&mut self, checkpoint: &Checkpoint) {
        self.process.write_line("memory");
        let line = loop {
            let line = self.process.next_event(&["memory", "error", "hydrated", "paused", "switched", "failed"]);
            match line["event"].as_str() {
                Some("memory" | "error") => break line,
                _ => self.events.push(line),
            }
        };
        let found: BTreeMap<String, String> =
            serde_json::from_value(line["tensors"].clone()).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert_eq!(found, checkpoint.tensors(), "the memory of {}", self.process.name);
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn kill(self) {
        self.process.kill();
    }
}
