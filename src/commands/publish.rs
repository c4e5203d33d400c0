//! `aquifer publish`: hash a checkpoint, announce it, and go on serving it.

use super::StopSignal;
use super::agent::{ended, leaving};
use crate::agent::view::{PublicationView, View};
use crate::agent::{self, Publish as Publication};
use crate::cli::Publish;
use crate::errors::reasons;
use crate::options;
use crate::output::{plain, print_json, print_line};
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
    let policy = args.rollout.policy()?;
    let secret = keys::read_publisher_secret(&args.publisher_key)?;
    let mut config = node.config(std::slice::from_ref(&channel), (0, 0, 0))?;
    args.operation.configure(&mut config)?;
    args.operation.at(None)?; // a mistake in it is told before minutes of hashing
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
    config.publish = Some(Publication { channel, secret, note: args.note.clone(), policy, source });
    // Not before: nobody would answer while it hashes, which may take minutes.
    let http = args.operation.bind(&mut config, None)?;
    let mut stop = StopSignal::new()?;
    let running = agent::start(config).await?;
    if let Some(http) = http {
        http.serve(running.handle.clone())?;
    }
    let mut view = running.view.clone();
    let mut told = Told::default();
    loop {
        tokio::select! {
            () = leaving(&mut stop, &running) => {
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
                told.tell(&args, &now);
                if args.until_held_by.is_some_and(|n| told.holders >= n as u64) {
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
    released: Option<u64>,
    word: bool,
    prepared: u64,
    superseded: bool,
    holders: u64,
}

impl Told {
    fn tell(&mut self, args: &Publish, view: &View) {
        // Nobody can join through a node that does not listen yet.
        let Some(of) = view.publication.as_ref().filter(|_| !view.addresses.is_empty()) else { return };
        if self.released.is_some_and(|seq| seq != of.seq) && of.rolls_back_to.is_some() {
            (self.released, self.word, self.prepared) = (Some(of.seq), false, 0);
            let to = of.rolls_back_to.unwrap_or_default();
            let event = json!({"event": "rolls_back", "seq": of.seq, "to": to, "reason": of.note});
            let text = format!("{} goes back to release {to}, as release {}: {}", of.channel, of.seq, plain(&of.note));
            say(args.json, &event, &text);
        }
        if self.released.is_none() {
            self.released = Some(of.seq);
            let event = json!({
                "event": "published", "channel": of.channel, "seq": of.seq, "manifest": of.manifest,
                "publisher": of.publisher, "addresses": view.addresses, "http": view.http,
            });
            let text = format!(
                "{} is at release {}, signed by {}\nserving it; Ctrl-C to stop",
                of.channel, of.seq, of.publisher
            );
            say(args.json, &event, &text);
        }
        self.tell_of_rollout(args, of);
        if let Some((seq, manifest)) = of.superseded_by.as_ref().filter(|_| !self.superseded) {
            self.superseded = true;
            let event = json!({"event": "superseded", "seq": seq, "manifest": manifest});
            let text = format!("{} has moved on to release {seq}; this one is still served", of.channel);
            say(args.json, &event, &text);
        }
        if of.holders != self.holders && !self.superseded {
            self.holders = of.holders;
            let sent = view.traffic.bytes_out;
            let event = json!({"event": "held", "nodes": of.holders, "bytes_out": sent});
            let text = format!("held by {} other nodes; {} sent from here", of.holders, units::bytes(sent));
            say(args.json, &event, &text);
        }
    }

    fn tell_of_rollout(&mut self, args: &Publish, of: &PublicationView) {
        if let Some((prepared, required, nodes)) = of.prepared.filter(|(n, ..)| *n != self.prepared) {
            self.prepared = prepared;
            let event = json!({"event": "prepared", "nodes": prepared, "required": required, "roster": nodes});
            say(args.json, &event, &format!("prepared: {prepared} of {nodes} nodes; {required} have to be"));
        }
        if let Some(word) = of.word.as_ref().filter(|_| !self.word) {
            self.word = true;
            let text = match word.as_str() {
                "commit" => format!("release {} is committed", of.seq),
                _ => format!("release {} is given up: {}", of.seq, plain(&of.reason)),
            };
            say(args.json, &json!({"event": "said", "word": word, "reason": of.reason}), &text);
        }
    }
}
