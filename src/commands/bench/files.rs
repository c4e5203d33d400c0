//! Files made for benches, and BLAKE3 of files that are in the page cache, on all cores: by mmap, as
//! b3sum does it, and by pread into a buffer. It shares no code with what hashes for `publish`.

use super::cores::{CHUNK_BYTES, Took};
use super::part::Part;
use super::{content, machine};
use anyhow::{Context, Result};
use aquifer_memory::Source;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Makes files.
#[derive(Debug)]
pub(super) struct Maker;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Make {
    /// A directory as Hugging Face lays checkpoints out, of about so many bytes.
    Checkpoint { dir: PathBuf, bytes: u64 },
    /// A directory with one file.
    File { dir: PathBuf, bytes: u64 },
}

impl Part for Maker {
    const NAME: &'static str = "maker";
    type Setup = ();
    type Ready = ();
    type Task = Make;
    type Reply = ();

    fn set_up((): ()) -> Result<(Self, ())> {
        Ok((Maker, ()))
    }

    fn work(&mut self, task: Make) -> Result<()> {
        match task {
            Make::Checkpoint { dir, bytes } => {
                aquifer_memory::generate_checkpoint(&dir, bytes, 1).context("cannot make a checkpoint")
            }
            Make::File { dir, bytes } => {
                let write = || {
                    std::fs::create_dir(&dir)?;
                    content::write(&mut File::create(dir.join("file"))?, bytes)
                };
                write().with_context(|| format!("cannot write a file in {}", dir.display()))
            }
        }
    }
}

/// Hashes files.
#[derive(Debug)]
pub(super) struct Files {
    paths: Vec<PathBuf>,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// Each file by all cores, one file after the other.
    Mmap,
    /// Chunks of all files, each by one of as many threads as there are cores.
    Pread,
}

impl Part for Files {
    const NAME: &'static str = "files";
    /// A file, or the directory of a checkpoint.
    type Setup = PathBuf;
    /// Bytes to hash.
    type Ready = u64;
    type Task = Task;
    type Reply = Took;

    fn set_up(path: PathBuf) -> Result<(Self, u64)> {
        let source = Source::open(&path, &[])?;
        let paths = source.files().iter().filter_map(|f| f.mapping.path().map(Path::to_path_buf)).collect();
        let bytes = source.bytes();
        Ok((Files { paths, bytes }, bytes))
    }

    fn work(&mut self, task: Task) -> Result<Took> {
        let start = Instant::now();
        match task {
            Task::Mmap => {
                for path in &self.paths {
                    let mut hasher = blake3::Hasher::new();
                    hasher.update_mmap_rayon(path).with_context(|| format!("cannot read {}", path.display()))?;
                    black_box(hasher.finalize());
                }
            }
            Task::Pread => self.pread()?,
        }
        Ok(Took::since(start, self.bytes))
    }
}

/// A chunk of an open file.
struct Place {
    file: usize,
    offset: u64,
    len: u64,
}

impl Files {
    fn pread(&self) -> Result<()> {
        let open = |path: &PathBuf| File::open(path).with_context(|| format!("cannot open {}", path.display()));
        let files = self.paths.iter().map(open).collect::<Result<Vec<_>>>()?;
        let mut places = Vec::new();
        for (at, file) in files.iter().enumerate() {
            let len = file.metadata()?.len();
            let chunks = (0..len).step_by(CHUNK_BYTES);
            places.extend(chunks.map(|offset| Place { file: at, offset, len: (len - offset).min(CHUNK_BYTES as u64) }));
        }
        let next = AtomicUsize::new(0);
        let work = |_| -> Result<()> {
            let mut piece = vec![0; content::PIECE_BYTES];
            while let Some(place) = places.get(next.fetch_add(1, Ordering::Relaxed)) {
                hash(&files[place.file], place, &mut piece)?;
            }
            Ok(())
        };
        machine::each(0..machine::cores(), work).map(drop)
    }
}

fn hash(file: &File, place: &Place, piece: &mut [u8]) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    let (mut at, end) = (place.offset, place.offset + place.len);
    while at < end {
        let n = usize::try_from(end - at).unwrap_or(usize::MAX).min(piece.len());
        file.read_exact_at(&mut piece[..n], at).context("cannot read a file")?;
        hasher.update(&piece[..n]);
        at += n as u64;
    }
    black_box(hasher.finalize());
    Ok(())
}
