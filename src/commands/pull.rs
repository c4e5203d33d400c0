//! `aquifer pull`: a release as files, bit for bit.

use super::{EXIT_TIMEOUT, StopSignal};
use crate::agent::view::{ChannelView, View};
use crate::agent::{self, Ended, Pull as Pulling, PullWhat};
use crate::cli::Pull;
use crate::options;
use crate::output::{Reader, plain, print_json, print_line, tell};
use crate::progress::Progress;
use crate::units;
use anyhow::{Result, bail};
use aquifer_core::{ChannelName, ManifestHash};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Hexadecimal digits from which on a word is taken for a hash, whole or not. Half a hash.
const HASH_DIGITS_MIN: usize = 32;

pub(crate) async fn run(config: Option<&Path>, args: Pull) -> Result<ExitCode> {
    let node = options::of_passing(config, args.node.clone())?;
    let what = meant(&args.what)?;
    let channels: Vec<ChannelName> = match &what {
        PullWhat::Channel(channel) => vec![channel.clone()],
        PullWhat::Manifest(_) => Vec::new(),
    };
    let mut config = node.config(&channels, (0, 0, 0))?;
    if let Some((channel, _)) = config.channels.iter().find(|(_, trusted)| trusted.is_empty()) {
        bail!("nobody is trusted to publish {channel}: give the publisher's public key with --trust");
    }
    if config.peers.is_empty() && !config.mdns {
        bail!("nobody to pull from: give a node of the mesh with --peer, or --mdns");
    }
    config.pull = Some(Pulling { what, dir: args.to.clone() });
    let started = Instant::now();
    let deadline = args.timeout.map(|s| started + Duration::from_secs(s));
    let mut stop = StopSignal::new()?;
    let running = agent::start(config).await?;
    let mut view = running.view.clone();
    let progress = Progress::new("pulling", 0, args.json);
    let mut told = BTreeSet::new();
    while !running.has_ended() {
        tokio::select! {
            () = stop.wait() => {
                running.stop().await?;
                bail!("interrupted; what has arrived is kept in {} and will not be fetched again", args.to.display());
            }
            () = passed(deadline) => {
                let now = view.borrow().clone();
                running.stop().await?;
                tell(&format!("aquifer: not done within {} s: {}", args.timeout.unwrap_or(0), why(&now)));
                return Ok(ExitCode::from(EXIT_TIMEOUT));
            }
            changed = view.changed() => {
                if changed.is_err() {
                    break;
                }
                let now = view.borrow_and_update().clone();
                show(&now, &progress);
                // The log tells as much, where it is not silenced.
                if let Some(problem) = new_problem(&now, &mut told) && !tracing::enabled!(tracing::Level::WARN) {
                    tell(&format!("aquifer: {}", plain(problem)));
                }
            }
        }
    }
    progress.finish();
    let last = view.borrow().clone();
    let Ended::Pulled(manifest) = running.ended().await? else {
        bail!("the node stopped before the pull was done");
    };
    report(&args, manifest, &last, started.elapsed())?;
    Ok(ExitCode::SUCCESS)
}

/// A channel's name may look like a hash that lost digits on its way; nobody means one that does.
fn meant(text: &str) -> Result<PullWhat> {
    let digits = text.len();
    match text.parse::<ManifestHash>() {
        Ok(manifest) => Ok(PullWhat::Manifest(manifest)),
        Err(_) if digits >= HASH_DIGITS_MIN && text.bytes().all(|b| b.is_ascii_hexdigit()) => {
            bail!("'{text}' looks like a manifest's hash, but has {digits} digits: a hash has 64")
        }
        Err(_) => Ok(PullWhat::Channel(text.parse()?)),
    }
}

fn report(args: &Pull, manifest: ManifestHash, view: &View, elapsed: Duration) -> Result<Reader> {
    let traffic = view.traffic;
    if args.json {
        return print_json(&json!({
            "event": "pulled", "manifest": manifest.to_string(), "dir": args.to,
            "bytes_in": traffic.bytes_in, "chunks_fetched": traffic.chunks_verified,
            "chunks_found": traffic.chunks_found, "chunks_corrupt": traffic.chunks_corrupt,
            "sources": traffic.sources, "seconds": elapsed.as_secs_f64(),
        }));
    }
    print_line(&format!(
        "{} is in {}\nmanifest {manifest}, every byte verified\n\
        {} in {} chunks from {} nodes in {:.1?}; {} chunks were here already",
        args.what,
        args.to.display(),
        units::bytes(traffic.bytes_in),
        traffic.chunks_verified,
        traffic.sources,
        elapsed,
        traffic.chunks_found
    ))
}

fn show(view: &View, progress: &Progress) {
    if let Some(channel) = view.channels.first() {
        let message = match channel.bytes_wanted {
            0 => format!("waiting, {} nodes known", view.peers.len()),
            _ => format!("from {} nodes", channel.sources),
        };
        progress.set(channel.bytes_have, channel.bytes_wanted, &message);
    }
}

/// What hinders the pull, if that has not been told.
fn new_problem<'a>(view: &'a View, told: &mut BTreeSet<String>) -> Option<&'a str> {
    let problem = view.channels.first()?.problem.as_deref()?;
    told.insert(problem.to_string()).then_some(problem)
}

/// What a pull that does not end is waiting for, in words.
fn why(view: &View) -> String {
    let connected = view.peers.iter().filter(|p| p.connected).count();
    let of = |channel: &ChannelView| match (&channel.problem, channel.state.as_str()) {
        (Some(problem), _) => plain(problem),
        (None, "waiting") if connected == 0 => {
            "no node of the mesh could be reached: check --peer and the mesh key (--log debug tells more)".into()
        }
        (None, "waiting") => format!(
            "connected to {connected} nodes, but no release of '{}' signed by a trusted publisher was heard",
            channel.channel
        ),
        (None, "manifest") => "no reachable node has the manifest".into(),
        (None, _) => format!(
            "{} of {} chunks are here, and no reachable node gives the rest ({} connected, {} avoided for wrong bytes)",
            channel.chunks_have,
            channel.chunks_wanted,
            connected,
            view.peers.iter().filter(|p| p.corrupt_chunks > 0).count()
        ),
    };
    view.channels.first().map_or_else(|| format!("connected to {connected} nodes"), of)
}

async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_told_once() {
        let with = |problem: Option<&str>| View {
            channels: vec![ChannelView { problem: problem.map(str::to_string), ..ChannelView::default() }],
            ..View::default()
        };
        let mut told = BTreeSet::new();
        for (problem, expected) in [
            (None, None),
            (Some("a"), Some("a")),
            (Some("a"), None),
            (None, None),
            (Some("b"), Some("b")),
            (Some("a"), None),
        ] {
            assert_eq!(new_problem(&with(problem), &mut told), expected);
        }
    }

    #[test]
    fn a_hash_that_lost_digits_is_no_channel() {
        let hash = ManifestHash::of(b"m").to_string();
        assert!(matches!(meant(&hash), Ok(PullWhat::Manifest(_))));
        for text in [&hash[1..], &hash[..32], &format!("{hash}0")] {
            let refusal = meant(text).expect_err(text).to_string();
            assert!(refusal.contains(&format!("{} digits: a hash has 64", text.len())), "{refusal}");
        }
        for text in ["prod/model", "cafe", &hash[..31], &format!("v{}", &hash[1..])] {
            assert!(matches!(meant(text), Ok(PullWhat::Channel(_))), "{text}");
        }
        assert!(meant("a b").is_err());
    }
}
