//! The demo's processes. Each is killed when its handle is dropped.

use super::{CHANNEL, PATIENCE, Site};
use crate::agent::view::View;
use crate::cli::Over;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

const LOOPBACK: &str = "127.0.0.1:0";
const POLL: Duration = Duration::from_millis(20);

/// A child that does not outlive its handle, and the JSON lines it prints.
#[derive(Debug)]
struct Process {
    child: Child,
    lines: Receiver<Value>,
    log: PathBuf,
}

#[derive(Debug)]
pub(in crate::commands) struct Publisher {
    process: Process,
    pub(in crate::commands) manifest: String,
    pub(in crate::commands) address: String,
    /// When the checkpoint was hashed.
    pub(in crate::commands) hashed: Instant,
}

#[derive(Debug)]
pub(in crate::commands) struct Node {
    process: Process,
    pub(in crate::commands) name: String,
    pub(in crate::commands) address: String,
    pub(in crate::commands) socket: PathBuf,
    pub(in crate::commands) started: Instant,
}

#[derive(Debug)]
pub(in crate::commands) struct Engine {
    process: Process,
    input: ChildStdin,
    /// The manifest it serves, and when it began to.
    pub(in crate::commands) serving: Option<(String, Instant)>,
}

impl Process {
    fn start(site: &Site, name: &str, command: &mut Command) -> Result<(Self, ChildStdin)> {
        let log = site.dir.join(format!("{name}.log"));
        let errors = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors).spawn();
        let mut child = child.with_context(|| format!("cannot start {name}"))?;
        let (Some(output), Some(input)) = (child.stdout.take(), child.stdin.take()) else {
            bail!("{name} was started without its pipes");
        };
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                // A line that is not JSON is for people; one that nobody waits for is dropped.
                if let Ok(value) = serde_json::from_str(&line)
                    && sender.send(value).is_err()
                {
                    return;
                }
            }
        });
        Ok((Process { child, lines, log }, input))
    }

    /// The next line whose `event` is one of `events`.
    fn wait_for(&self, events: &[&str]) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if events.iter().any(|e| line["event"] == *e) => return Ok(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("nothing heard for {PATIENCE:?}{}", self.last_words()),
                Err(RecvTimeoutError::Disconnected) => bail!("it ended early{}", self.last_words()),
            }
        }
    }

    fn check_alive(&mut self, name: &str) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("{name} ended early ({status}){}", self.last_words()),
            None => Ok(()),
        }
    }

    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(5).collect();
        let lines: Vec<&str> = lines.into_iter().rev().collect();
        if lines.is_empty() { String::new() } else { format!("; its last words:\n{}", lines.join("\n")) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Either call fails only if the process has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Publisher {
    pub(in crate::commands) fn start(site: &Site, name: &str, checkpoint: &Path, peers: &[String]) -> Result<Self> {
        let mut publisher = Self::announce(site, name, checkpoint, peers)?;
        let published = publisher.process.wait_for(&["published"]);
        let published = published.with_context(|| format!("{name} did not publish"))?;
        publisher.address = published["addresses"][0].as_str().unwrap_or_default().to_string();
        Ok(publisher)
    }

    /// Returns as soon as it has hashed the checkpoint; it has no address yet.
    pub(in crate::commands) fn announce(site: &Site, name: &str, checkpoint: &Path, peers: &[String]) -> Result<Self> {
        let mut command = program()?;
        command.arg("publish").arg(checkpoint).args(["--channel", CHANNEL, "--json"]);
        command.arg("--publisher-key").arg(&site.publisher_key).args(["--name", name]);
        on_loopback(&mut command, site, peers);
        let (process, input) = Process::start(site, name, &mut command)?;
        drop(input);
        // Counted from here: what follows is joining, signing, and the mesh's part.
        let hashed = process.wait_for(&["hashed"]).with_context(|| format!("{name} could not hash the checkpoint"))?;
        let manifest = hashed["manifest"].as_str().unwrap_or_default().to_string();
        Ok(Publisher { process, manifest, address: String::new(), hashed: Instant::now() })
    }

    pub(in crate::commands) fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// As if the machine had lost power.
    pub(in crate::commands) fn kill(self) {
        drop(self.process);
    }
}

impl Node {
    pub(in crate::commands) fn start(site: &Site, name: &str, peers: &[String]) -> Result<Self> {
        let socket = site.dir.join(format!("{name}.sock"));
        let mut command = program()?;
        command.args(["agent", "--channel", CHANNEL, "--name", name, "--trust", &site.trust]);
        command.arg("--socket").arg(&socket).arg("--state").arg(site.dir.join(format!("{name}.state")));
        on_loopback(&mut command, site, peers);
        let (process, input) = Process::start(site, name, &mut command)?;
        drop(input);
        let started = Instant::now();
        let mut node = Node { process, name: name.to_string(), address: String::new(), socket, started };
        let deadline = Instant::now() + PATIENCE;
        while node.address.is_empty() {
            node.process.check_alive(name)?;
            if Instant::now() > deadline {
                bail!("{name} did not start within {PATIENCE:?}");
            }
            if let Ok(view) = node.view() {
                node.address = view.addresses.first().cloned().unwrap_or_default();
            }
            std::thread::sleep(POLL);
        }
        Ok(node)
    }

    pub(in crate::commands) fn pid(&self) -> u32 {
        self.process.child.id()
    }

    pub(in crate::commands) fn view(&self) -> Result<View> {
        let value = aquifer_engine::request_status(&self.socket)?;
        serde_json::from_value(value).context("cannot read the agent's status")
    }

    pub(in crate::commands) fn check_alive(&mut self) -> Result<()> {
        let name = self.name.clone();
        self.process.check_alive(&name)
    }
}

impl Engine {
    pub(in crate::commands) fn start(site: &Site, node: &Node) -> Result<Self> {
        let name = format!("{}-engine", node.name);
        let mut command = program()?;
        command.args(["demo-engine", "--channel", CHANNEL, "--name", &name]).arg("--socket").arg(&node.socket);
        let (process, input) = Process::start(site, &name, &mut command)?;
        Ok(Engine { process, input, serving: None })
    }

    pub(in crate::commands) fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Takes in what the engine has told since.
    pub(in crate::commands) fn update(&mut self) -> Result<()> {
        self.process.check_alive("an engine")?;
        while let Ok(line) = self.process.lines.try_recv() {
            let event = line["event"].as_str().unwrap_or_default();
            match event {
                "hydrated" | "switched" => {
                    let manifest = line["manifest"].as_str().unwrap_or_default().to_string();
                    self.serving = Some((manifest, Instant::now()));
                }
                "paused" => self.serving = None,
                "failed" => bail!("an engine failed: {}", line["message"].as_str().unwrap_or_default()),
                _ => {}
            }
        }
        Ok(())
    }

    /// Each tensor's hash, as the engine process finds it in its memory.
    pub(in crate::commands) fn memory(&mut self) -> Result<BTreeMap<String, String>> {
        self.update()?;
        writeln!(self.input, "memory").context("an engine is gone")?;
        let line = self.process.wait_for(&["memory", "error"])?;
        if line["event"] == "error" {
            bail!("an engine cannot read its memory: {}", line["message"].as_str().unwrap_or_default());
        }
        Ok(serde_json::from_value(line["tensors"].clone())?)
    }
}

fn program() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    // What the user configured for a real mesh must not reach into the demo.
    for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("AQUIFER_")) {
        command.env_remove(name);
    }
    command.args(["tethered", &std::process::id().to_string(), "--", "--config", "/dev/null"]);
    Ok(command)
}

fn on_loopback(command: &mut Command, site: &Site, peers: &[String]) {
    command.args(["--listen", LOOPBACK, "--data-listen", LOOPBACK]).arg("--mesh-key").arg(&site.mesh_key);
    command.arg("--shm-dir").arg(site.dir.join("shm")).args(["--rdma-listen", LOOPBACK]);
    if let Some(over) = site.over {
        command.args(["--shm", if over == Over::Shm { "true" } else { "false" }]);
        command.args(["--rdma", if over == Over::Rdma { "auto" } else { "off" }]);
    }
    for peer in peers {
        command.args(["--peer", peer]);
    }
}
