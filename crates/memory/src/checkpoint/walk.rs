//! Which files of a directory belong to a checkpoint.

use super::{CHECKPOINT_DEPTH_MAX, CHECKPOINT_FILES_MAX, PublishError, in_path, refused};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Directories that are never part of a checkpoint: version control, our own and Hugging Face's
/// work in progress.
const SKIPPED_DIRS: [&str; 3] = [".git", ".cache", crate::tree::PARTIAL_DIR];

/// Paths of the files below `dir`, relative, `/`-separated, sorted. Links are followed: Hugging
/// Face's cache is made of them.
pub(super) fn files(dir: &Path, exclude: &[String]) -> Result<Vec<String>, PublishError> {
    let mut walk = Walk { root: dir, exclude, ancestors: Vec::new(), found: Vec::new() };
    walk.enter("")?;
    walk.found.sort_unstable();
    Ok(walk.found)
}

struct Walk<'a> {
    root: &'a Path,
    exclude: &'a [String],
    /// Device and inode of the directories entered: a link to one of them is a loop.
    ancestors: Vec<(u64, u64)>,
    found: Vec<String>,
}

impl Walk<'_> {
    fn enter(&mut self, relative: &str) -> Result<(), PublishError> {
        let dir = self.root.join(relative);
        let meta = fs::metadata(&dir).map_err(in_path("read", &dir))?;
        let id = (meta.dev(), meta.ino());
        if self.ancestors.contains(&id) {
            tracing::debug!("{} leads back to a directory above it: skipped", dir.display());
            return Ok(());
        }
        if self.ancestors.len() >= CHECKPOINT_DEPTH_MAX {
            return Err(refused(&dir, format!("lies more than {CHECKPOINT_DEPTH_MAX} directories deep")));
        }
        self.ancestors.push(id);
        for entry in fs::read_dir(&dir).map_err(in_path("list", &dir))? {
            let name = entry.map_err(in_path("list", &dir))?.file_name();
            let name = name.to_str().ok_or_else(|| refused(&dir.join(&name), "its name is not UTF-8"))?;
            self.visit(relative, name)?;
        }
        self.ancestors.pop();
        Ok(())
    }

    fn visit(&mut self, dir: &str, name: &str) -> Result<(), PublishError> {
        let relative = if dir.is_empty() { name.to_string() } else { format!("{dir}/{name}") };
        if is_temporary(name) || self.exclude.iter().any(|pattern| excludes(pattern, &relative)) {
            return Ok(());
        }
        let path = self.root.join(&relative);
        let kind = fs::metadata(&path).map_err(|error| unreadable(&path, &relative, error))?.file_type();
        if kind.is_dir() {
            return match SKIPPED_DIRS.contains(&name) {
                true => Ok(()),
                false => self.enter(&relative),
            };
        }
        if !kind.is_file() {
            tracing::debug!("{} is not a plain file: skipped", path.display());
            return Ok(());
        }
        if self.found.len() >= CHECKPOINT_FILES_MAX {
            return Err(refused(
                self.root,
                format!("holds more than {CHECKPOINT_FILES_MAX} files: is it a checkpoint?"),
            ));
        }
        self.found.push(relative);
        Ok(())
    }
}

/// A link that leads nowhere is common, as where a part of a cache was deleted.
fn unreadable(path: &Path, relative: &str, error: io::Error) -> PublishError {
    match fs::read_link(path) {
        Ok(target) => {
            let target = target.display();
            refused(path, format!("links to {target}: {error}; mend it, or leave it out with --exclude '{relative}'"))
        }
        Err(_) => in_path("read", path)(error),
    }
}

/// What editors, downloads and network file systems leave behind.
fn is_temporary(name: &str) -> bool {
    let hidden = name.starts_with('.');
    let ends = [".tmp", ".swp", ".part", ".lock", ".incomplete"].iter().any(|end| name.ends_with(end));
    hidden && (ends || name.starts_with(".nfs") || name.starts_with(".#") || name == ".DS_Store")
        || name.ends_with(".incomplete")
}

/// Whether `pattern` matches the path, one of the directories it lies in, or its last part.
fn excludes(pattern: &str, path: &str) -> bool {
    let pattern = pattern.trim_end_matches('/');
    let above = path.match_indices('/').map(|(end, _)| &path[..end]);
    let name = path.rsplit('/').next().unwrap_or(path);
    above.chain([path, name]).any(|text| matches(pattern.as_bytes(), text.as_bytes()))
}

/// `*` stands for any bytes, `?` for one. Linear but for backtracking to the last star.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                None => return false,
                Some((sp, st)) => {
                    star = Some((sp, st + 1));
                    p = sp + 1;
                    t = st + 1;
                }
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, path, expected) in [
            ("*.bin", "a.bin", true),
            ("*.bin", "sub/a.bin", true),
            ("onnx", "onnx/model.onnx", true),
            ("onnx/", "onnx/model.onnx", true),
            ("onnx/*", "onnx/model.onnx", true),
            ("o*l.?nnx", "onnx/model.onnx", true),
            ("*.bin", "a.bin.txt", false),
            ("model", "model.bin", false),
            ("", "a", false),
            ("*a*b*c", "xaybzbc", true),
            ("*a*b*c", "xaybzb", false),
        ] {
            assert_eq!(excludes(pattern, path), expected, "{pattern} {path}");
        }
    }
}
