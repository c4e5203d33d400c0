//! `aquifer publish`: hash a checkpoint, announce it, and go on serving it.

use super::{StopSignal, agent::ended};
use crate::agent::view::View;
use crate::agent::{self, Publish as Publication};
use crate::cli::Publish;
use crate::errors::reasons;
use crate::options;
use crate::output::{print_json, print_line};
use crate::progress::Progress;
use crate::{keys, units};
use anyhow::{Context, Result, bail};
use aquifer_core::ChannelName;
use aquifer_core::limits::RELEASE_NOTE_BYTES_MAX;
use aquifer_memory::{Published, Source};
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

pub(crate) async fn run(config: Option<&Path>, args: Publish) -> Result<ExitCode> {
    let node = options::of_passing(config, args.node.clone())?;
    let channel: ChannelName = args.channel.parse()?;
    if args.note.len() > RELEASE_NOTE_BYTES_MAX {
        bail!("--note has {} bytes; it may have {RELEASE_NOTE_BYTES_MAX}", args.note.len());
    }
    let secret = keys::read_publisher_secret(&args.publisher_key)?;
    let mut config = node.config(std::slice::from_ref(&channel), (0, 0, 0))?;
    let source = hash(&args)?;
    let summary = json!({
        "event": "hashed",
        "manifest": source.hash.to_string(),
        "bytes": source.manifest.bytes(),
        "files": source.manifest.files().len(),
        "tensors": source.manifest.tensors().len(),
        "chunks": source.layout.len(),
    });
    let text = format!(
        "manifest {}\n{} files, {} tensors, {} in {} chunks",
        source.hash,
        source.manifest.files().len(),
        source.manifest.tensors().len(),
        units::bytes(source.manifest.bytes()),
        source.layout.len()
    );
    say(args.json, &summary, &text);
    let manifest = source.hash.to_string();
    config.publish = Some(Publication { channel, secret, note: args.note.clone(), source });
    let mut stop = StopSignal::new()?;
    let running = agent::start(config).await?;
    let mut view = running.view.clone();
    let mut told = Told::default();
    loop {
        tokio::select! {
            () = stop.wait() => {
                tracing::info!("leaving the mesh");
                running.stop().await?;
                return Ok(ExitCode::SUCCESS);
            }
            () = ended(&running) => {
                running.ended().await?;
                return Ok(ExitCode::SUCCESS);
            }
            changed = view.changed() => {
                if changed.is_err() {
                    continue;
                }
                let now = view.borrow_and_update().clone();
                told.tell(&args, &manifest, &now);
                if args.until_held_by.is_some_and(|n| told.holders >= n) {
                    running.stop().await?;
                    return Ok(ExitCode::SUCCESS);
                }
            }
        }
    }
}

fn hash(args: &Publish) -> Result<Arc<Published>> {
    let source =
        Source::open(&args.path, &args.exclude).with_context(|| format!("cannot publish {}", args.path.display()))?;
    let progress = Progress::new("hashing", source.bytes(), args.json);
    let (bytes, started) = (source.bytes(), Instant::now());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let published = source.hash(threads, &|n| progress.add(n))?;
    progress.finish();
    tracing::info!("hashed {} in {:.1?}", units::bytes(bytes), started.elapsed());
    Ok(Arc::new(published))
}

/// Tells programs or people. Serving goes on, whether or not anybody can be told.
fn say(json: bool, event: &Value, text: &str) {
    let said = if json { print_json(event) } else { print_line(text) };
    if let Err(error) = said {
        tracing::warn!("{}", reasons(&error));
    }
}

/// What has been told, so that each change is told once.
#[derive(Debug, Default)]
struct Told {
    released: bool,
    superseded: bool,
    holders: usize,
}

impl Told {
    fn tell(&mut self, args: &Publish, manifest: &str, view: &View) {
        let Some(channel) = view.channel(&args.channel).filter(|c| c.seq > 0) else { return };
        if !self.released && channel.manifest == manifest {
            self.released = true;
            let event = json!({
                "event": "published", "channel": args.channel, "seq": channel.seq, "manifest": manifest,
                "publisher": channel.publisher, "addresses": view.addresses,
            });
            let text = format!(
                "{} is at release {}, signed by {}\nserving it; Ctrl-C to stop",
                args.channel, channel.seq, channel.publisher
            );
            say(args.json, &event, &text);
        }
        if self.released && !self.superseded && channel.manifest != manifest {
            self.superseded = true;
            let event = json!({"event": "superseded", "seq": channel.seq, "manifest": channel.manifest});
            let text = format!("{} has moved on to release {}; this one is still served", args.channel, channel.seq);
            say(args.json, &event, &text);
        }
        let whole = |(name, seq, have, wanted): &(String, u64, u32, u32)| {
            *name == args.channel && *seq == channel.seq && *wanted > 0 && have >= wanted
        };
        let holders = view.peers.iter().filter(|p| p.channels.iter().any(whole)).count();
        if holders != self.holders && !self.superseded {
            self.holders = holders;
            let sent = view.traffic.bytes_out;
            let event = json!({"event": "held", "nodes": holders, "bytes_out": sent});
            say(args.json, &event, &format!("held by {holders} other nodes; {} sent from here", units::bytes(sent)));
        }
    }
}
