//! `aquifer manifest`: look inside, compare, verify.

use super::EXIT_DIFFERENT;
use crate::cli::ManifestCommand;
use crate::output::{plain, print_json, print_line};
use crate::progress::Progress;
use crate::units;
use anyhow::{Context, Result};
use aquifer_core::codec::Kind;
use aquifer_core::{Chunk, ChunkHash, Content, Layout, Manifest, ManifestHash, Packed, TensorEntry};
use aquifer_memory::Source;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub(crate) fn run(command: ManifestCommand) -> Result<ExitCode> {
    match command {
        ManifestCommand::Show { target, out, json } => show(&target, out, json),
        ManifestCommand::Diff { old, new, json } => diff(&old, &new, json),
        ManifestCommand::Verify { manifest, dir, json } => verify(&manifest, &dir, json),
    }
}

/// A manifest from a manifest file, or made from a checkpoint.
fn load(path: &Path, quiet: bool) -> Result<(Manifest, ManifestHash)> {
    if is_manifest_file(path)? {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let manifest = Manifest::decode(&bytes).with_context(|| format!("{} is no valid manifest", path.display()))?;
        return Ok((manifest, ManifestHash::of(&bytes)));
    }
    let source = Source::open(path, &[])?;
    let progress = Progress::new("hashing", source.bytes(), quiet);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let published = source.hash(threads, &|n| progress.add(n))?;
    progress.finish();
    Ok((std::sync::Arc::unwrap_or_clone(published.manifest), published.hash))
}

fn is_manifest_file(path: &Path) -> Result<bool> {
    if path.is_dir() {
        return Ok(false);
    }
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut head = [0; 4];
    Ok(file.read_exact(&mut head).is_ok() && head == [b'A', b'Q', b'F', Kind::Manifest as u8])
}

fn show(target: &Path, out: Option<PathBuf>, json: bool) -> Result<ExitCode> {
    let (manifest, hash) = load(target, json)?;
    let layout = Layout::of(&manifest);
    if let Some(out) = out {
        std::fs::write(&out, manifest.encode()).with_context(|| format!("cannot write {}", out.display()))?;
    }
    if json {
        let tensors: Vec<Value> = manifest.tensors().iter().map(tensor_json).collect();
        let files: Vec<Value> =
            manifest.files().iter().map(|f| json!({"path": f.path, "bytes": manifest.file_bytes(f)})).collect();
        print_json(&json!({
            "manifest": hash.to_string(), "bytes": manifest.bytes(), "chunks": layout.len(),
            "distinct_bytes": layout.bytes(), "files": files, "tensors": tensors,
            "packs": chunks_json(manifest.packs()),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    print_line(&format!("manifest {hash}"))?;
    print_line(&format!(
        "{} in {} files, {} tensors, {} packs, {} distinct chunks of {} together",
        units::bytes(manifest.bytes()),
        manifest.files().len(),
        manifest.tensors().len(),
        manifest.packs().len(),
        layout.len(),
        units::bytes(layout.bytes())
    ))?;
    print_line("\nfiles")?;
    for file in manifest.files() {
        print_line(&format!("  {:>12}  {}", units::bytes(manifest.file_bytes(file)), plain(&file.path)))?;
    }
    print_line("\ntensors")?;
    for t in manifest.tensors() {
        let shape = t.shape.iter().map(u64::to_string).collect::<Vec<_>>().join("x");
        let chunks = match &t.content {
            Content::Chunks(chunks) => format!("{} chunks", chunks.len()),
            Content::Packed(Packed { pack, .. }) => format!("in pack {pack}"),
        };
        print_line(&format!(
            "  {:>12}  {:<8} {shape:<20} {chunks:>14}  {}",
            units::bytes(t.bytes()),
            plain(t.dtype.name()),
            plain(&t.name)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn tensor_json(t: &TensorEntry) -> Value {
    let mut json = json!({"name": t.name, "dtype": t.dtype.name(), "shape": t.shape, "bytes": t.bytes()});
    match &t.content {
        Content::Chunks(chunks) => json["chunks"] = chunks_json(chunks),
        Content::Packed(Packed { pack, begin, .. }) => json["packed"] = json!({"pack": pack, "begin": begin}),
    }
    json
}

fn chunks_json(chunks: &[Chunk]) -> Value {
    chunks.iter().map(|c| json!([c.hash.to_string(), c.len])).collect()
}

/// What can be told of a tensor that two manifests have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compared {
    Same,
    Changed,
    /// Its bytes have no hash of their own, and a pack that it is in is another: it, or a neighbour.
    PackChanged,
}

fn compare((old, before): (&Manifest, &TensorEntry), (new, after): (&Manifest, &TensorEntry)) -> Compared {
    let pack = |manifest: &Manifest, packed: &Packed| manifest.packs()[packed.pack as usize];
    let same = match (&before.content, &after.content) {
        _ if (&before.dtype, &before.shape) != (&after.dtype, &after.shape) => return Compared::Changed,
        (Content::Chunks(before), Content::Chunks(after)) if before != after => return Compared::Changed,
        (Content::Chunks(_), Content::Chunks(_)) => true,
        (Content::Packed(a), Content::Packed(b)) => a.begin == b.begin && pack(old, a) == pack(new, b),
        (Content::Chunks(_), Content::Packed(_)) | (Content::Packed(_), Content::Chunks(_)) => false,
    };
    if same { Compared::Same } else { Compared::PackChanged }
}

fn diff(old: &Path, new: &Path, json: bool) -> Result<ExitCode> {
    let ((old, old_hash), (new, new_hash)) = (load(old, json)?, load(new, json)?);
    let (old_layout, new_layout) = (Layout::of(&old), Layout::of(&new));
    let moved: Vec<_> = new_layout.chunks.iter().filter(|c| old_layout.index_of(&c.hash).is_none()).collect();
    let moved_bytes: u64 = moved.iter().map(|c| u64::from(c.len)).sum();
    let before: BTreeMap<_, _> = old.tensors().iter().map(|t| (t.name.as_str(), t)).collect();
    let after: BTreeMap<_, _> = new.tensors().iter().map(|t| (t.name.as_str(), t)).collect();
    let added: Vec<_> = after.keys().filter(|n| !before.contains_key(*n)).collect();
    let removed: Vec<_> = before.keys().filter(|n| !after.contains_key(*n)).collect();
    let with = |wanted: Compared| -> Vec<&&str> {
        let is = |(name, t): &(&&str, &&TensorEntry)| {
            before.get(*name).is_some_and(|b| compare((&old, b), (&new, t)) == wanted)
        };
        after.iter().filter(is).map(|(name, _)| name).collect()
    };
    let (changed, unsure) = (with(Compared::Changed), with(Compared::PackChanged));
    let same = old_hash == new_hash;
    if json {
        print_json(&json!({
            "same": same, "old": old_hash.to_string(), "new": new_hash.to_string(),
            "tensors_added": added, "tensors_removed": removed, "tensors_changed": changed,
            "tensors_in_changed_packs": unsure,
            "chunks_to_move": moved.len(), "bytes_to_move": moved_bytes, "bytes": new.bytes(),
        }))?;
    } else {
        for (sign, names) in [("+", &added), ("-", &removed), ("~", &changed), ("?", &unsure)] {
            for name in names {
                print_line(&format!("{sign} {}", plain(name)))?;
            }
        }
        print_line(&format!(
            "{} added, {} removed, {} changed, {} in packs that changed of {} tensors; {} chunks, {} of {} would move",
            added.len(),
            removed.len(),
            changed.len(),
            unsure.len(),
            new.tensors().len(),
            moved.len(),
            units::bytes(moved_bytes),
            units::bytes(new.bytes())
        ))?;
    }
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DIFFERENT) })
}

fn verify(manifest: &Path, dir: &Path, json: bool) -> Result<ExitCode> {
    let (manifest, hash) = load(manifest, json)?;
    let layout = Layout::of(&manifest);
    let progress = Progress::new("verifying", manifest.bytes(), json);
    let mut wrong: Vec<(String, String)> = Vec::new();
    for (file, extents) in manifest.files().iter().zip(&layout.files) {
        let path = dir.join(&file.path);
        let check = || -> std::io::Result<Option<String>> {
            let open = File::open(&path)?;
            let (found, expected) = (open.metadata()?.len(), manifest.file_bytes(file));
            if found != expected {
                return Ok(Some(format!("has {found} bytes, the manifest says {expected}")));
            }
            let mut buffer = Vec::new();
            let mut bad = 0;
            for extent in extents {
                let chunk = layout.chunk(extent.chunk);
                buffer.resize(chunk.len as usize, 0);
                open.read_exact_at(&mut buffer, extent.offset)?;
                bad += usize::from(ChunkHash::of(&buffer) != chunk.hash);
                progress.add(chunk.len.into());
            }
            Ok((bad > 0).then(|| format!("{bad} of {} chunks are wrong", extents.len())))
        };
        match check() {
            Ok(None) => {}
            Ok(Some(reason)) => wrong.push((file.path.clone(), reason)),
            Err(error) => wrong.push((file.path.clone(), error.to_string())),
        }
    }
    progress.finish();
    if json {
        let wrong: Vec<Value> = wrong.iter().map(|(f, r)| json!({"file": f, "reason": r})).collect();
        print_json(&json!({"manifest": hash.to_string(), "files": manifest.files().len(), "wrong": wrong}))?;
    } else {
        for (file, reason) in &wrong {
            print_line(&format!("{}: {}", plain(file), plain(reason)))?;
        }
        let (files, bytes) = (manifest.files().len(), units::bytes(manifest.bytes()));
        print_line(&match wrong.len() {
            0 => format!("all {files} files, {bytes}, are those of manifest {}", hash.short()),
            n => format!("{n} of {files} files are not those of manifest {}", hash.short()),
        })?;
    }
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DIFFERENT) })
}
