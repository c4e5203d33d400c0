//! `aquifer demo`: the main job, on this machine, with nothing left to the imagination.
//!
//! Publisher, agents and engines are separate processes on loopback that share one address, two keys
//! and a directory to share memory through. What the engines hold at the end is compared with the checkpoint's files, read here
//! without any of the machinery that moved them.

mod checkpoint;
pub(super) mod process;
mod show;

use crate::agent::view::View;
use crate::cli::{Demo, Over};
use crate::output::{print_json, print_line, tell};
use crate::{keys, units};
use anyhow::{Context, Result, bail};
use checkpoint::TensorHashes;
use process::{Engine, Node, Publisher};
use show::{Row, Watch};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

pub(super) const CHANNEL: &str = "demo/model";
/// Longer than anything here takes on a slow machine; then it is a failure, and said so.
const PATIENCE: Duration = Duration::from_secs(600);
/// How many tensors the second version changes.
const CHANGED_TENSORS: usize = 3;

/// What all processes of the demo share.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) dir: PathBuf,
    pub(super) mesh_key: PathBuf,
    pub(super) publisher_key: PathBuf,
    pub(super) trust: String,
    /// The only way for chunks, if there is to be only one.
    pub(super) over: Option<Over>,
}

pub(crate) fn run(args: Demo) -> Result<ExitCode> {
    let temporary = tempfile::Builder::new().prefix("aquifer-demo-").tempdir().context("cannot make a directory")?;
    let dir = temporary.path().to_path_buf();
    if args.keep {
        // The directory is the user's now.
        let _ = temporary.keep();
        tell(&format!("working directory: {}", dir.display()));
        return demo(&args, &dir);
    }
    let result = demo(&args, &dir);
    drop(temporary);
    result
}

fn demo(args: &Demo, dir: &Path) -> Result<ExitCode> {
    if args.nodes == 0 {
        bail!("--nodes must be at least 1");
    }
    let say = tell;
    let (checkpoint, updated, modified) = prepare(args, dir, &say)?;
    let site = make_keys(dir, args.over)?;

    say("\n1. A publisher cuts, hashes and signs the checkpoint, and serves it from its files.");
    let publisher = Publisher::start(&site, "publisher", &checkpoint, &[])?;
    say(&format!("   {CHANNEL} is at manifest {}", &publisher.manifest[..12]));

    say(&format!("\n2. {} agents, each with an engine, join through the publisher's address alone.", args.nodes));
    let mut nodes = Vec::new();
    for i in 1..=args.nodes {
        nodes.push(start_node(&site, &format!("node-{i}"), &publisher.address)?);
    }
    let mut watch = Watch::new(PATIENCE, args.json);
    watch.until_serving(&mut nodes, &publisher.manifest)?;
    let first = TensorHashes::of(&checkpoint)?;
    let mut wrong = check_memory(&mut nodes, &first, &say)?;

    say("\n3. The publisher is killed. One more node joins, through node-1, and hydrates from the others.");
    let manifest = publisher.manifest.clone();
    publisher.kill();
    let late = start_node(&site, "latecomer", &nodes[0].0.address)?;
    nodes.push(late);
    watch.until_serving(&mut nodes, &manifest)?;
    wrong += check_memory(&mut nodes, &first, &say)?;
    let nothing = View::default();
    let row = |(node, engine): &(Node, Engine)| Row::of(node, engine, &nothing, node.started);
    let first_rows = nodes.iter().map(row).collect::<Result<Vec<_>>>()?;
    let before = nodes.iter().map(|(node, _)| node.view()).collect::<Result<Vec<_>>>()?;

    say(&format!(
        "\n4. A second version: {} of {} tensors changed ({}). Engines serve the first while it is fetched,",
        modified.tensors.len(),
        first.len(),
        units::bytes(modified.bytes)
    ));
    say("   then pause, take the changed bytes, and go on.");
    let publisher = Publisher::start(&site, "publisher-2", &updated, &[nodes[0].0.address.clone()])?;
    let hashed = publisher.hashed;
    watch.until_serving(&mut nodes, &publisher.manifest)?;
    let second = TensorHashes::of(&updated)?;
    wrong += check_memory(&mut nodes, &second, &say)?;

    let row = |((node, engine), before): (&(Node, Engine), &View)| Row::of(node, engine, before, hashed);
    let update_rows = nodes.iter().zip(&before).map(row).collect::<Result<Vec<_>>>()?;
    let moved: u64 = update_rows.iter().map(|r| r.bytes).max().unwrap_or(0);
    say(&format!("   {} moved to each node, of a checkpoint of {}", units::bytes(moved), units::bytes(first.bytes())));
    let came_by = received(&nodes)?;
    if args.json {
        print_json(&serde_json::json!({
            "hydration": first_rows, "update": update_rows, "wrong_tensors": wrong, "received_bytes_by": came_by,
        }))?;
    } else {
        print_line(&format!("\nhydration\n{}", show::table(&first_rows)))?;
        print_line(&format!("\nupdate\n{}", show::table(&update_rows)))?;
    }
    if wrong > 0 {
        tell(&format!("{wrong} tensors in engines' memory are not the checkpoint's"));
        return Ok(ExitCode::FAILURE);
    }
    if let Some(over) = args.over {
        let others: u64 = came_by.iter().filter(|(way, _)| *way != over.name()).map(|(_, bytes)| bytes).sum();
        let own = came_by.get(over.name()).copied().unwrap_or(0);
        if others > 0 || own == 0 {
            tell(&format!("not all came over {}: {came_by:?} (in bytes)", over.name()));
            return Ok(ExitCode::FAILURE);
        }
    }
    if !args.json {
        print_line("\nevery byte of every engine's memory is the checkpoint's")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn prepare(args: &Demo, dir: &Path, say: &dyn Fn(&str)) -> Result<(PathBuf, PathBuf, aquifer_memory::Modified)> {
    let checkpoint = match &args.checkpoint {
        Some(path) => path.clone(),
        None => {
            let size = units::parse(&args.size)?;
            say(&format!("Making a small transformer checkpoint of about {} ...", units::bytes(size)));
            let path = dir.join("checkpoint");
            aquifer_memory::generate_checkpoint(&path, size, 1).context("cannot make the checkpoint")?;
            path
        }
    };
    let copy = dir.join("checkpoint-2");
    let modified = aquifer_memory::modify_checkpoint(&checkpoint, &copy, 2, CHANGED_TENSORS)?;
    // A single file is published under its name, so the second version must be a file too.
    let updated = match checkpoint.file_name() {
        Some(name) if checkpoint.is_file() => copy.join(name),
        _ => copy,
    };
    Ok((checkpoint, updated, modified))
}

pub(super) fn make_keys(dir: &Path, over: Option<Over>) -> Result<Site> {
    let (mesh_key, publisher_key) = (dir.join("mesh.key"), dir.join("publisher.key"));
    keys::write_secret(&mesh_key, &keys::new_mesh_key()?.to_text())?;
    let publisher = keys::new_publisher_secret()?;
    keys::write_secret(&publisher_key, &keys::publisher_line(&publisher))?;
    Ok(Site { dir: dir.to_path_buf(), mesh_key, publisher_key, trust: publisher.public().to_string(), over })
}

fn start_node(site: &Site, name: &str, peer: &str) -> Result<(Node, Engine)> {
    let node = Node::start(site, name, &[peer.to_string()])?;
    let engine = Engine::start(site, &node)?;
    Ok((node, engine))
}

/// Chunk bytes that the nodes received, by the way they came.
fn received(nodes: &[(Node, Engine)]) -> Result<BTreeMap<String, u64>> {
    let mut received = BTreeMap::new();
    for (node, _) in nodes {
        for (way, transport) in node.view()?.transports {
            *received.entry(way).or_default() += transport.received_bytes;
        }
    }
    Ok(received)
}

/// Asks every engine what its memory holds, and compares. Returns how many tensors are wrong.
fn check_memory(nodes: &mut [(Node, Engine)], expected: &TensorHashes, say: &dyn Fn(&str)) -> Result<usize> {
    let mut wrong = 0;
    for (node, engine) in nodes.iter_mut() {
        let differences = expected.differences(&engine.memory()?);
        for difference in differences.iter().take(3) {
            say(&format!("   {}: {difference}", node.name));
        }
        wrong += differences.len();
    }
    if wrong == 0 {
        say(&format!("   {} engines hold all {} tensors, byte for byte", nodes.len(), expected.len()));
    }
    Ok(wrong)
}

/// Seconds since `start`, for people.
pub(super) fn seconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}
