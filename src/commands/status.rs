//! `aquifer status`: this machine's agent, for people and programs.

use crate::agent::view::View;
use crate::options::{self, AgentOptions, NodeOptions};
use crate::output::{Reader, print_json, print_line};
use crate::units;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const WATCH_INTERVAL: Duration = Duration::from_millis(500);

pub(crate) async fn run(config: Option<&Path>, socket: Option<PathBuf>, watch: bool, json: bool) -> Result<ExitCode> {
    let given = AgentOptions { socket, ..AgentOptions::default() };
    let (_, options) = options::of_agent(config, NodeOptions::default(), given)?;
    let socket = options.socket.unwrap_or_else(options::default_socket);
    loop {
        let value = {
            let socket = socket.clone();
            tokio::task::spawn_blocking(move || aquifer_engine::request_status(&socket)).await??
        };
        let reader = if json {
            print_json(&value)?
        } else {
            let view: View = serde_json::from_value(value).context("the agent is of another version")?;
            let clear = if watch { "\x1b[2J\x1b[H" } else { "" };
            print_line(&format!("{clear}{}", text(&view)))?
        };
        if !watch || reader == Reader::Gone {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

/// The view as a person reads it.
fn text(view: &View) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(&mut out, view);
    out
}

fn write_text(out: &mut String, view: &View) -> std::fmt::Result {
    let ready = if view.is_ready() { "ready" } else { "not ready" };
    writeln!(
        out,
        "{} ({})  aquifer {}, up {:.0} s, {ready}",
        view.name,
        short(&view.node),
        view.version,
        view.uptime_seconds
    )?;
    for c in &view.channels {
        let manifest = if c.manifest.is_empty() { "no release heard".into() } else { short(&c.manifest) };
        write!(out, "\nchannel {}  release {}  {manifest}  {}", c.channel, c.seq, c.state)?;
        if let Some(share) = (c.chunks_have * 100).checked_div(c.chunks_wanted) {
            let (have, wanted) = (units::bytes(c.bytes_have), units::bytes(c.bytes_wanted));
            write!(out, "  {} {have} of {wanted}", bar(share))?;
        }
        if c.sources > 0 {
            write!(out, "  from {} nodes", c.sources)?;
        }
        writeln!(out)?;
        if let Some(problem) = &c.problem {
            writeln!(out, "  problem: {problem}")?;
        }
    }
    for e in &view.engines {
        let serving = if e.serving.is_empty() { "nothing yet".into() } else { short(&e.serving) };
        let share = (e.chunks_done * 100).checked_div(e.chunks_total).unwrap_or(0);
        writeln!(out, "  engine {} (pid {})  {}  {}  serves {serving}", e.name, e.pid, e.phase, bar(share))?;
        if let Some(reason) = &e.reason {
            writeln!(out, "    {reason}")?;
        }
    }
    writeln!(out, "\n{} peers", view.peers.len())?;
    for p in &view.peers {
        let link = if p.connected { "connected" } else { "known" };
        let avoided = if p.avoided { "  avoided" } else { "" };
        let wrong = match p.corrupt_chunks {
            0 => String::new(),
            n => format!("  {n} wrong chunks"),
        };
        let channels = p.channels.iter().map(|(c, seq, have, wanted)| format!("{c}@{seq} {have}/{wanted}"));
        let (from, to) = (units::bytes(p.bytes_from), units::bytes(p.bytes_to));
        let channels = channels.collect::<Vec<_>>().join(" ");
        writeln!(
            out,
            "  {:<16} {}  {link:<9} {channels}  in {from}, out {to}{avoided}{wrong}",
            p.name,
            short(&p.node)
        )?;
    }
    let t = view.traffic;
    write!(
        out,
        "\nread {} ({} chunks verified, {} wrong, {} reads failed), sent {}, {} chunks found in place",
        units::bytes(t.bytes_in),
        t.chunks_verified,
        t.chunks_corrupt,
        t.reads_failed,
        units::bytes(t.bytes_out),
        t.chunks_found
    )
}

fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}

fn bar(percent: u64) -> String {
    let filled = usize::try_from(percent.min(100) / 5).unwrap_or(0);
    format!("[{}{}] {percent:>3} %", "#".repeat(filled), "-".repeat(20 - filled))
}
