//! `aquifer releases`: what became of each release of a channel, as this machine's agent has heard.

use crate::agent::history::{NodeView, ReleaseView, ReleasesView};
use crate::output::{plain, print_json, print_line};
use anyhow::Result;
use aquifer_engine::operator;
use aquifer_engine::protocol::Request;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub(crate) async fn run(config: Option<&Path>, channel: &str, socket: Option<PathBuf>, json: bool) -> Result<ExitCode> {
    let socket = super::release::socket(config, socket)?;
    let asked = operator::Releases { channel: channel.parse()? };
    let answer: Value = super::release::ask(&socket, Request::Releases(asked)).await?;
    match json {
        true => print_json(&answer)?,
        false => print_line(&text(&serde_json::from_value(answer)?))?,
    };
    Ok(ExitCode::SUCCESS)
}

fn text(view: &ReleasesView) -> String {
    if view.releases.is_empty() {
        return format!("{}: no release is known yet", plain(&view.channel));
    }
    let mut lines = Vec::new();
    for release in &view.releases {
        lines.push(headline(release));
        lines.extend(release.nodes.iter().map(line));
        lines.push(String::new());
    }
    lines.pop();
    lines.join("\n")
}

fn headline(release: &ReleaseView) -> String {
    let mut parts = vec![format!("release {}", release.seq), release.manifest.chars().take(12).collect()];
    parts.extend(release.rolls_back_to.map(|to| format!("back to {to}")));
    let terms = if release.terms.is_empty() { String::new() } else { format!(" ({})", release.terms) };
    parts.push(format!("{}{}", release.policy, plain(&terms)));
    if !release.subset.is_empty() {
        let pinned = if release.pinned { ", pinned" } else { "" };
        parts.push(format!("for {}{pinned}", plain(&release.subset)));
    }
    match release.word.as_deref() {
        Some("commit") => parts.push("committed".to_string()),
        Some(_) => parts.push(format!("given up: {}", plain(&release.reason))),
        None if release.waits_for_word() => parts.push("waits for a word".to_string()),
        None => {}
    }
    parts.push(format!("by {}", release.publisher.chars().take(12).collect::<String>()));
    let note = if release.note.is_empty() { String::new() } else { format!("\n  {}", plain(&release.note)) };
    format!("{}{note}", parts.join("  "))
}

fn line(node: &NodeView) -> String {
    let times: Vec<String> = node.times.iter().map(|(phase, ms)| format!("{phase} {ms}")).collect();
    let times = if times.is_empty() { String::new() } else { format!("  [ms: {}]", times.join(", ")) };
    let reason = if node.reason.is_empty() { String::new() } else { format!("  {}", plain(&node.reason)) };
    format!("  {:<20} {:<11} {:<10}{reason}{times}", plain(&node.name), node.step, node.phase)
}
