//! Whom each crate may know. A rule without a gate decays.

use crate::run::cargo;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A crate, what it is for, which of our crates it may use, and whether it may use `unsafe`.
struct Room {
    name: &'static str,
    purpose: &'static str,
    may_know: &'static [&'static str],
    may_unsafe: bool,
}

const ROOMS: &[Room] = &[
    Room {
        name: "aquifer-core",
        purpose: "hashes, manifests, releases, bindings, chunk sets, messages: pure values",
        may_know: &[],
        may_unsafe: false,
    },
    Room {
        name: "aquifer-proto",
        purpose: "the decisions of one node, without IO",
        may_know: &["aquifer-core"],
        may_unsafe: false,
    },
    Room {
        name: "aquifer-mesh",
        purpose: "libp2p: identity, discovery, gossip, control messages",
        may_know: &["aquifer-core"],
        may_unsafe: false,
    },
    Room {
        name: "aquifer-memory",
        purpose: "regions, chunk stores, files to publish and to rebuild",
        may_know: &["aquifer-core"],
        may_unsafe: true,
    },
    Room {
        name: "aquifer-transport",
        purpose: "moving bytes between nodes: the trait, TCP, shared memory",
        may_know: &["aquifer-core", "aquifer-memory"],
        may_unsafe: true,
    },
    Room {
        name: "aquifer-rdma",
        purpose: "the transport over RDMA verbs",
        may_know: &["aquifer-core", "aquifer-memory", "aquifer-transport"],
        may_unsafe: true,
    },
    Room {
        name: "aquifer-cuda",
        purpose: "GPU memory: copies, regions of engines, the BLAKE3 kernel",
        may_know: &["aquifer-core", "aquifer-memory"],
        may_unsafe: true,
    },
    Room {
        name: "aquifer-engine",
        purpose: "the protocol between an engine and its agent",
        may_know: &["aquifer-core"],
        may_unsafe: false,
    },
    Room {
        name: "aquifer-hooks",
        purpose: "events delivered to commands and webhooks, in order and at least once",
        may_know: &[],
        may_unsafe: false,
    },
    Room {
        name: "aquifer",
        purpose: "the program: command line, and the agent that wires the crates together",
        may_know: &[
            "aquifer-core",
            "aquifer-cuda",
            "aquifer-engine",
            "aquifer-hooks",
            "aquifer-memory",
            "aquifer-mesh",
            "aquifer-proto",
            "aquifer-rdma",
            "aquifer-transport",
        ],
        may_unsafe: false,
    },
    Room {
        name: "simulations",
        purpose: "thousands of nodes in one process: `proto` on a modelled network",
        may_know: &["aquifer-core", "aquifer-proto"],
        may_unsafe: false,
    },
    Room { name: "xtask", purpose: "developer commands", may_know: &[], may_unsafe: false },
];

/// Crates that do IO, keep time or draw randomness: not for the pure ones.
const IMPURE: &[&str] = &["tokio", "libp2p", "rustix", "libc", "tracing", "tempfile"];
const PURE: &[&str] = &["aquifer-core", "aquifer-proto"];

/// The table as ARCHITECTURE.md shows it.
pub(crate) fn table() -> Result<String> {
    let mut lines = vec!["| crate | what it is for | may know | unsafe |".to_string(), "|---|---|---|---|".to_string()];
    for room in ROOMS {
        let know: Vec<_> = room.may_know.iter().map(|n| n.trim_start_matches("aquifer-")).collect();
        let know = if know.is_empty() { "–".into() } else { know.join(", ") };
        lines.push(format!(
            "| {} | {} | {know} | {} |",
            room.name,
            room.purpose,
            if room.may_unsafe { "yes" } else { "no" }
        ));
    }
    Ok(lines.join("\n"))
}

/// Compares the workspace with the table; an error names what breaks it.
pub(crate) fn check() -> Result<()> {
    let packages = packages()?;
    let rooms: BTreeMap<_, _> = ROOMS.iter().map(|r| (r.name, r)).collect();
    for (name, package) in &packages {
        let Some(room) = rooms.get(name.as_str()) else {
            bail!("crate {name} is not in the table of xtask/src/crates.rs");
        };
        check_edges(room, package, &packages)?;
        check_unsafe(room, package)?;
    }
    let architecture = std::fs::read_to_string(crate::run::root().join("ARCHITECTURE.md"))?;
    if !architecture.contains(&table()?) {
        bail!("ARCHITECTURE.md does not contain the table that `cargo xtask crates` prints");
    }
    Ok(())
}

struct Package {
    /// Names of dependencies, without those of tests.
    uses: BTreeSet<String>,
    sources: Vec<String>,
}

fn check_edges(room: &Room, package: &Package, packages: &BTreeMap<String, Package>) -> Result<()> {
    for used in package.uses.iter().filter(|u| packages.contains_key(*u)) {
        if !room.may_know.contains(&used.as_str()) {
            bail!("{} uses {used}, which it may not know", room.name);
        }
    }
    if let Some(impure) = package.uses.iter().find(|u| PURE.contains(&room.name) && IMPURE.contains(&u.as_str())) {
        bail!("{} is pure and may not use {impure}", room.name);
    }
    Ok(())
}

fn check_unsafe(room: &Room, package: &Package) -> Result<()> {
    for source in package.sources.iter().filter(|_| !room.may_unsafe) {
        let text = std::fs::read_to_string(source).with_context(|| format!("cannot read {source}"))?;
        if !text.contains("#![forbid(unsafe_code)]") {
            bail!("{source} must say #![forbid(unsafe_code)]: {} has no need of it", room.name);
        }
    }
    Ok(())
}

fn packages() -> Result<BTreeMap<String, Package>> {
    let output = cargo(&["metadata", "--format-version", "1", "--no-deps"]).output().context("cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let package = |p: &Value| {
        let normal = list(&p["dependencies"]).into_iter().filter(|d| d["kind"].is_null());
        let program = |t: &Value| list(&t["kind"]).iter().any(|k| k == "lib" || k == "bin");
        let targets = list(&p["targets"]).into_iter().filter(program);
        Package {
            uses: normal.map(|d| text(&d["name"])).collect(),
            sources: targets.map(|t| text(&t["src_path"])).collect(),
        }
    };
    Ok(list(&metadata["packages"]).iter().map(|p| (text(&p["name"]), package(p))).collect())
}
