//! What the demo shows: progress of each node, and the table at the end.

use super::process::{Engine, Node};
use super::seconds;
use crate::agent::view::View;
use crate::output::{BARS, tell};
use crate::units;
use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(50);
/// Where there is no terminal, a line this often.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// Waits for engines, and shows how far they are.
#[derive(Debug)]
pub(super) struct Watch {
    patience: Duration,
    terminal: bool,
    quiet: bool,
}

/// A node in the table.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    node: String,
    pub(super) bytes: u64,
    peers: usize,
    seconds: f64,
    chunks_verified: u64,
    state: String,
}

impl Watch {
    pub(super) fn new(patience: Duration, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal() && !quiet;
        Watch { patience, terminal, quiet }
    }

    /// Returns once every engine serves `manifest`.
    pub(super) fn until_serving(&mut self, nodes: &mut [(Node, Engine)], manifest: &str) -> Result<()> {
        let start = Instant::now();
        let bars: Vec<ProgressBar> = nodes.iter().map(|(node, _)| self.bar(&node.name)).collect();
        let mut told = Instant::now();
        loop {
            let mut waiting = Vec::new();
            for ((node, engine), bar) in nodes.iter_mut().zip(&bars) {
                node.check_alive()?;
                engine.update()?;
                let view = node.view()?;
                if let Some(channel) = view.channels.first().filter(|c| c.manifest == manifest) {
                    bar.set_length(channel.bytes_wanted.max(1));
                    bar.set_position(channel.bytes_have);
                    if let Some(problem) = &channel.problem {
                        bail!("{}: {problem}", node.name);
                    }
                }
                match &engine.serving {
                    Some((serving, _)) if serving == manifest => bar.set_message("serving"),
                    _ => waiting.push(node.name.clone()),
                }
            }
            if waiting.is_empty() {
                bars.iter().for_each(ProgressBar::finish_and_clear);
                if !self.quiet {
                    tell(&format!("   {} engines serve it after {:.2} s", nodes.len(), seconds(start)));
                }
                return Ok(());
            }
            if start.elapsed() > self.patience {
                bail!("{} did not serve {manifest} within {:?}", waiting.join(", "), self.patience);
            }
            if !self.terminal && !self.quiet && told.elapsed() > LINE_INTERVAL {
                told = Instant::now();
                let share = |b: &ProgressBar| (b.position() * 100).checked_div(b.length().unwrap_or(0)).unwrap_or(0);
                let shares: Vec<String> =
                    nodes.iter().zip(&bars).map(|((n, _), b)| format!("{} {} %", n.name, share(b))).collect();
                tell(&format!("   {}", shares.join("  ")));
            }
            std::thread::sleep(POLL);
        }
    }

    fn bar(&self, name: &str) -> ProgressBar {
        let bar = match self.terminal {
            true => BARS.add(ProgressBar::no_length()),
            false => ProgressBar::hidden(),
        };
        let template =
            "   {prefix:<12} {bar:16} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(name.to_string());
        bar
    }
}

impl Row {
    /// What happened since `before` was seen, and since `started`.
    pub(super) fn of(node: &Node, engine: &Engine, before: &View, started: Instant) -> Result<Self> {
        let view = node.view()?;
        let ready = !view.engines.is_empty() && view.engines.iter().all(|e| e.ready);
        let seconds = engine.serving.as_ref().map_or(0.0, |(_, at)| at.duration_since(started).as_secs_f64());
        let known = |node: &str| before.peers.iter().find(|p| p.node == node).map_or(0, |p| p.bytes_from);
        Ok(Row {
            node: node.name.clone(),
            bytes: view.traffic.bytes_in - before.traffic.bytes_in,
            peers: view.peers.iter().filter(|p| p.bytes_from > known(&p.node)).count(),
            seconds,
            chunks_verified: view.traffic.chunks_verified - before.traffic.chunks_verified,
            state: if ready { "ready" } else { "not ready" }.to_string(),
        })
    }
}

pub(super) fn table(rows: &[Row]) -> String {
    let mut lines = vec![format!(
        "{:<14}{:>12}{:>8}{:>10}{:>18}  {}",
        "node", "bytes", "peers", "seconds", "chunks verified", "state"
    )];
    for r in rows {
        lines.push(format!(
            "{:<14}{:>12}{:>8}{:>10.2}{:>18}  {}",
            r.node,
            units::bytes(r.bytes),
            r.peers,
            r.seconds,
            r.chunks_verified,
            r.state
        ));
    }
    lines.join("\n")
}
