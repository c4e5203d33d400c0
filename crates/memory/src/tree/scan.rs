//! Finding out what a directory already holds, by hashing it.

use super::{Inner, PARTIAL_DIR, Place};
use crate::at::Root;
use crate::error::StoreError;
use crate::span::with_piece;
use aquifer_core::{ChunkHash, Hash};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

/// Where chunks may be found at the offsets at which the manifest has them.
enum Site {
    /// The files that grow.
    Own,
    /// Those of a pull that was given up.
    Abandoned(Root),
    /// The files under their final names.
    Final,
}

pub(super) fn run(tree: &Inner, threads: usize, found: &mut dyn FnMut(u32, u64)) -> Result<(), StoreError> {
    let mut seen = BTreeSet::new();
    let mut tell = |chunk: u32| {
        if seen.insert(chunk) {
            found(chunk, u64::from(tree.chunks[chunk as usize].len));
        }
    };
    let mut sites = vec![Site::Own, Site::Final];
    sites.extend(abandoned(tree)?.into_iter().map(Site::Abandoned));
    for site in &sites {
        let before = stamps(tree, site)?;
        let hits = hash_site(tree, site, threads, &mut tell)?;
        take_over(tree, site, &hits)?;
        check_unchanged(tree, site, &before)?;
    }
    spread(tree)
}

/// Other directories beside that of the growing files.
fn abandoned(tree: &Inner) -> Result<Vec<Root>, StoreError> {
    let dir = tree.root.path_of(PARTIAL_DIR);
    let names = || -> io::Result<BTreeSet<String>> {
        let names = fs::read_dir(&dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    };
    let mut roots = Vec::new();
    for name in names().map_err(StoreError::io("list", &dir, 0))? {
        if name != tree.manifest {
            roots.extend(tree.root.subdir(&format!("{PARTIAL_DIR}/{name}"), false)?);
        }
    }
    Ok(roots)
}

impl Site {
    fn open(&self, tree: &Inner, file: usize) -> Result<Option<File>, StoreError> {
        let path = &tree.files[file].path;
        match self {
            Site::Own => tree.partial.open_file(path),
            Site::Abandoned(root) => root.open_file(path),
            Site::Final => tree.root.open_file(path),
        }
    }

    fn path(&self, tree: &Inner, file: usize) -> std::path::PathBuf {
        let root = match self {
            Site::Own => &tree.partial,
            Site::Abandoned(root) => root,
            Site::Final => &tree.root,
        };
        root.path_of(&tree.files[file].path)
    }
}

/// Length and time of last change of each file of a site that exists.
type Stamps = BTreeMap<usize, (u64, i64, i64)>;

fn stamps(tree: &Inner, site: &Site) -> Result<Stamps, StoreError> {
    let mut stamps = Stamps::new();
    for file in 0..tree.files.len() {
        if let Some(opened) = site.open(tree, file)? {
            let meta = opened.metadata().map_err(StoreError::io("read", &site.path(tree, file), 0))?;
            stamps.insert(file, (meta.len(), meta.mtime(), meta.mtime_nsec()));
        }
    }
    Ok(stamps)
}

/// What was hashed and then copied must not have been written to in between.
fn check_unchanged(tree: &Inner, site: &Site, before: &Stamps) -> Result<(), StoreError> {
    let after = match site {
        Site::Own => return Ok(()), // written to by ourselves, under the directory's lock
        Site::Abandoned(_) | Site::Final => stamps(tree, site)?,
    };
    match before.iter().find(|(file, stamp)| after.get(file) != Some(stamp)) {
        None => Ok(()),
        Some((&file, _)) => Err(StoreError::Refused {
            path: site.path(tree, file),
            reason: "was written to while it was read: stop what writes to it, and try again".into(),
        }),
    }
}

/// Hashes every place not yet right; returns the places that hold their chunk in this site.
fn hash_site(tree: &Inner, site: &Site, threads: usize, tell: &mut dyn FnMut(u32)) -> Result<Vec<usize>, StoreError> {
    let mut jobs: Vec<usize> = {
        let state = tree.lock();
        (0..tree.places.len()).filter(|&at| !state.right[at]).collect()
    };
    jobs.sort_unstable_by_key(|&at| (tree.places[at].file, tree.places[at].offset));
    let cursor = AtomicUsize::new(0);
    let (results, received) = mpsc::channel();
    let mut hits = Vec::new();
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            let (results, jobs, cursor) = (results.clone(), &jobs, &cursor);
            scope.spawn(move || worker(tree, site, jobs, cursor, &results));
        }
        drop(results);
        for result in received {
            let at: usize = result.inspect_err(|_| cursor.store(jobs.len(), Ordering::Relaxed))?;
            hits.push(at);
            tell(tree.places[at].chunk);
        }
        Ok(hits)
    })
}

/// Takes jobs until none is left. Jobs are in the order of the files, so one open file is enough.
fn worker(
    tree: &Inner,
    site: &Site,
    jobs: &[usize],
    cursor: &AtomicUsize,
    results: &mpsc::Sender<Result<usize, StoreError>>,
) {
    let mut open: Option<(usize, Option<File>)> = None;
    while let Some(&at) = jobs.get(cursor.fetch_add(1, Ordering::Relaxed)) {
        let place = tree.places[at];
        if open.as_ref().is_none_or(|(file, _)| *file != place.file) {
            match site.open(tree, place.file) {
                Ok(file) => open = Some((place.file, file)),
                Err(error) => return drop(results.send(Err(error))),
            }
        }
        let Some((_, Some(file))) = &open else { continue };
        match holds(tree, site, file, place) {
            Ok(false) => {}
            Ok(true) => drop(results.send(Ok(at))),
            Err(error) => {
                let path = site.path(tree, place.file);
                return drop(results.send(Err(StoreError::io("read", &path, 0)(error))));
            }
        }
    }
}

fn holds(tree: &Inner, site: &Site, file: &File, place: Place) -> io::Result<bool> {
    let growing = !matches!(site, Site::Final);
    if growing && begins_with_a_hole(file, place.offset) {
        return Ok(false);
    }
    let chunk = tree.chunks[place.chunk as usize];
    Ok(hash_range(file, place.offset, u64::from(chunk.len))? == Some(chunk.hash))
}

/// Nothing was written there yet. File systems that do not know say that all is data.
fn begins_with_a_hole(file: &File, offset: u64) -> bool {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
        Ok(data) => data > offset,
        Err(errno) => errno == rustix::io::Errno::NXIO,
    }
}

/// `None` if the file ends before the range does.
fn hash_range(file: &File, offset: u64, len: u64) -> io::Result<Option<ChunkHash>> {
    let mut hasher = blake3::Hasher::new();
    let read = with_piece(|piece| {
        let mut done = 0;
        while done < len {
            let n = piece.len().min(crate::span::clamped(len - done));
            file.read_exact_at(&mut piece[..n], offset + done)?;
            hasher.update(&piece[..n]);
            done += n as u64;
        }
        Ok(())
    });
    match read {
        Ok(()) => Ok(Some(ChunkHash(Hash(*hasher.finalize().as_bytes())))),
        Err(error) if io::Error::kind(&error) == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes what was found in a site ours: marks it where it is, or copies it to the growing file.
fn take_over(tree: &Inner, site: &Site, hits: &[usize]) -> Result<(), StoreError> {
    let mut by_file: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for &at in hits {
        by_file.entry(tree.places[at].file).or_default().push(at);
    }
    if matches!(site, Site::Final) {
        settle_whole_files(tree, &mut by_file)?;
    }
    for (file, places) in by_file {
        if !matches!(site, Site::Own) {
            let source = site.open(tree, file)?;
            let source = source.ok_or_else(|| StoreError::Refused {
                path: site.path(tree, file),
                reason: "was removed while it was read".into(),
            })?;
            for &at in &places {
                copy(tree, &source, tree.places[at])?;
            }
        }
        let mut state = tree.lock();
        places.iter().for_each(|&at| state.right[at] = true);
    }
    Ok(())
}

/// Final files that are right from the first byte to the last stay as they are.
fn settle_whole_files(tree: &Inner, by_file: &mut BTreeMap<usize, Vec<usize>>) -> Result<(), StoreError> {
    let mut needed = vec![0; tree.files.len()];
    tree.places.iter().for_each(|p| needed[p.file] += 1);
    for (file, &needed) in needed.iter().enumerate() {
        if by_file.get(&file).map_or(0, Vec::len) != needed {
            continue;
        }
        let Some(opened) = Site::Final.open(tree, file)? else { continue };
        let len = opened.metadata().map_err(StoreError::io("read", &Site::Final.path(tree, file), 0))?.len();
        if len != tree.files[file].len {
            continue;
        }
        let mut state = tree.lock();
        state.settled[file] = true;
        state.open.remove(&file);
        by_file.remove(&file).unwrap_or_default().iter().for_each(|&at| state.right[at] = true);
    }
    Ok(())
}

/// Copies one place of a file to the growing file, in the kernel where it can.
fn copy(tree: &Inner, source: &File, place: Place) -> Result<(), StoreError> {
    let target = tree.mapping(place.file)?;
    let Some(mapped) = target.mapped_file() else { return Ok(()) };
    let (mut from, mut to) = (place.offset, place.offset);
    let end = place.offset + tree.place_len(place);
    while to < end {
        let left = crate::span::clamped(end - to);
        match rustix::fs::copy_file_range(source, Some(&mut from), &mapped.file, Some(&mut to), left) {
            Ok(n) if n > 0 => {}
            _ => break,
        }
    }
    let read = |at: u64, buffer: &mut [u8]| source.read_exact_at(buffer, to + at);
    let path = tree.partial.path_of(&tree.files[place.file].path);
    let written = super::write_at(&target, to, end - to, &read);
    written.map_err(|error| StoreError::io("write", &path, tree.missing_bytes())(error))
}

/// Brings every chunk that is right at one place to all its places.
fn spread(tree: &Inner) -> Result<(), StoreError> {
    for chunk in 0..tree.chunk_count() {
        let range = tree.places_of(chunk);
        let source = {
            let state = tree.lock();
            range.clone().find(|&at| state.right[at])
        };
        if let Some(at) = source {
            let span = tree.span_of(tree.places[at])?;
            tree.write_chunk(chunk, &|at, buffer| span.read(at, buffer))?;
        }
    }
    Ok(())
}
