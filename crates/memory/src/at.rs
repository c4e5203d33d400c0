//! Files below a directory, reached without ever following a symbolic link: a link planted in
//! the tree must not lead a write out of it.

use crate::error::StoreError;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, mkdirat, openat, renameat};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// An open directory. Relative paths given to it are those of a manifest: `/`-separated, without
/// `..`.
#[derive(Debug)]
pub(crate) struct Root {
    fd: OwnedFd,
    path: PathBuf,
}

impl Root {
    /// Opens `path`, which may itself be a link: the user named it.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(StoreError::io("open", path, 0))?;
        let is_dir = file.metadata().map_err(StoreError::io("read", path, 0))?.is_dir();
        match is_dir {
            true => Ok(Root { fd: file.into(), path: path.to_path_buf() }),
            false => Err(StoreError::Refused { path: path.to_path_buf(), reason: "is not a directory".into() }),
        }
    }

    /// Takes the directory for this process, until `self` is dropped.
    pub(crate) fn lock(&self) -> Result<(), StoreError> {
        match flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) => Err(StoreError::Locked { path: self.path.clone(), owner: String::new() }),
            Err(errno) => {
                // Some network file systems cannot lock a directory; the user was told to run one pull.
                tracing::warn!("{} cannot be locked ({errno}): run only one pull into it", self.path.display());
                Ok(())
            }
        }
    }

    pub(crate) fn path_of(&self, relative: &str) -> PathBuf {
        self.path.join(relative)
    }

    /// Opens a file to read; `None` where there is none, or something that is not a plain file.
    pub(crate) fn open_file(&self, relative: &str) -> Result<Option<File>, StoreError> {
        self.open_with(relative, OFlags::RDONLY, false)
    }

    /// Opens a file to read and write, and creates it and its directories where needed.
    pub(crate) fn create_file(&self, relative: &str) -> Result<File, StoreError> {
        let refuse = || StoreError::Refused { path: self.path_of(relative), reason: "is not a plain file".into() };
        self.open_with(relative, OFlags::RDWR | OFlags::CREATE, true)?.ok_or_else(refuse)
    }

    /// Moves a file of `from` here, replacing what has its name.
    pub(crate) fn adopt(&self, from: &Root, from_relative: &str, relative: &str) -> Result<(), StoreError> {
        let (from_dir, from_name) = from.parent(from_relative, false)?.ok_or_else(|| from.missing(from_relative))?;
        let (dir, name) = self.parent(relative, true)?.ok_or_else(|| self.missing(relative))?;
        let moved = renameat(&from_dir, from_name, &dir, name);
        moved.map_err(StoreError::io("move a finished file to", &self.path_of(relative), 0))
    }

    /// The subdirectory `relative`, as a root of its own.
    pub(crate) fn subdir(&self, relative: &str, create: bool) -> Result<Option<Root>, StoreError> {
        let fd = self.descend(relative, create)?;
        Ok(fd.map(|fd| Root { fd, path: self.path_of(relative) }))
    }

    fn open_with(&self, relative: &str, flags: OFlags, create: bool) -> Result<Option<File>, StoreError> {
        let Some((dir, name)) = self.parent(relative, create)? else { return Ok(None) };
        // NONBLOCK: a fifo of that name must not hang us.
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let path = self.path_of(relative);
        let file = match openat(&dir, name, flags, Mode::from_raw_mode(0o666)) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(None),
            Err(Errno::ISDIR) => return Err(is_a_directory(path)),
            Err(errno) => return Err(StoreError::io("open", &path, 0)(errno)),
        };
        let kind = file.metadata().map_err(StoreError::io("read", &path, 0))?.file_type();
        match kind.is_dir() {
            true => Err(is_a_directory(path)),
            false => Ok(kind.is_file().then_some(file)),
        }
    }

    /// The directory that holds `relative`, and the name in it.
    fn parent<'a>(&self, relative: &'a str, create: bool) -> Result<Option<(OwnedFd, &'a str)>, StoreError> {
        let (dir, name) = relative.rsplit_once('/').unwrap_or(("", relative));
        Ok(self.descend(dir, create)?.map(|fd| (fd, name)))
    }

    fn descend(&self, relative: &str, create: bool) -> Result<Option<OwnedFd>, StoreError> {
        let mut fd = self.fd.try_clone().map_err(StoreError::io("open", &self.path, 0))?;
        let mut reached = self.path.clone();
        for name in relative.split('/').filter(|n| !n.is_empty()) {
            reached.push(name);
            fd = match enter(&fd, name, create) {
                Ok(Some(next)) => next,
                Ok(None) => return Ok(None),
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let reason = "is a link or a file where the checkpoint needs a directory: remove it, or choose another directory";
                    return Err(StoreError::Refused { path: reached, reason: reason.into() });
                }
                Err(errno) => return Err(StoreError::io("enter", &reached, 0)(errno)),
            };
        }
        Ok(Some(fd))
    }

    fn missing(&self, relative: &str) -> StoreError {
        StoreError::io("find", &self.path_of(relative), 0)(io::Error::from(io::ErrorKind::NotFound))
    }
}

fn enter(fd: &impl AsFd, name: &str, create: bool) -> rustix::io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(fd, name, flags, Mode::empty()) {
        Err(Errno::NOENT) if create => {
            match mkdirat(fd, name, Mode::from_raw_mode(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
            openat(fd, name, flags, Mode::empty()).map(Some)
        }
        Err(Errno::NOENT) => Ok(None),
        other => other.map(Some),
    }
}

fn is_a_directory(path: PathBuf) -> StoreError {
    let reason = "is a directory where the checkpoint needs a file: remove it, or choose another directory";
    StoreError::Refused { path, reason: reason.into() }
}
