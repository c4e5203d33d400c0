//! The directory that agents of one machine meet in, and a socket of one's own there.
//!
//! A socket has a name that no other one ever had, so that whoever finds it dead may remove it, and it
//! gets that name when it is listening, so that nobody finds it dead before. No lock is needed.

use crate::limits::SHM_SWEPT_MAX;
use crate::room::Listener;
use rustix::fs::{Mode, mkdir};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::geteuid;
use std::fs::{self, Permissions};
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LISTENING: &str = ".sock";
const STARTING: &str = ".new";
/// A new socket is taken for a dead one if somebody looks just before it listens.
const ATTEMPTS_MAX: u8 = 8;

/// A listening socket. Its file is removed with it.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens in `directory`, which is made if need be, and removes what the dead left there.
    pub(super) fn listen(directory: &Path) -> io::Result<Self> {
        prepare(directory)?;
        sweep(directory);
        for _ in 0..ATTEMPTS_MAX {
            match Self::try_listen(directory, rand::random()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => return other,
            }
        }
        Err(io::Error::other("somebody removes the socket as soon as it is made"))
    }

    fn try_listen(directory: &Path, number: u64) -> io::Result<Self> {
        let path = directory.join(format!("{number:016x}{LISTENING}"));
        let starting = path.with_extension(&STARTING[1..]);
        let listener = UnixListener::bind(&starting)?;
        let made = fs::set_permissions(&starting, Permissions::from_mode(0o600));
        if let Err(error) = made.and_then(|()| fs::rename(&starting, &path)) {
            let _gone_or_not = fs::remove_file(&starting);
            return Err(error);
        }
        Ok(Socket { listener, path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn remove(&self) {
        // The name was never anybody else's. If it is gone, so much the better.
        let _gone_or_not = fs::remove_file(&self.path);
    }
}

impl Listener for Socket {
    type Stream = UnixStream;

    fn accept(&self) -> io::Result<(UnixStream, Option<SocketAddr>)> {
        self.listener.accept().map(|(stream, _)| (stream, None))
    }

    fn close(&self) {
        self.remove();
        // On Linux this wakes accept(2) with EINVAL.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }

    fn cut(stream: &UnixStream) {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Connects to a socket of this user. A holder that accepts nobody is not waited for.
pub(super) fn reach(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    connect(&fd, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(timeout))?;
    check_user(&stream)?;
    Ok(stream)
}

/// Fails unless the process at the other end is of this user. Descriptors pass between equals only.
pub(super) fn check_user(stream: &UnixStream) -> io::Result<()> {
    let (own, peer) = (geteuid(), rustix::net::sockopt::socket_peercred(stream)?.uid);
    match own == peer {
        true => Ok(()),
        false => {
            let text = format!("it is of user {}, this process of user {}", peer.as_raw(), own.as_raw());
            Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
        }
    }
}

fn prepare(directory: &Path) -> io::Result<()> {
    match mkdir(directory, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let found = fs::symlink_metadata(directory)?;
    // Root may have made it for us, as a container's volume is made.
    let trusted = found.is_dir() && (found.uid() == geteuid().as_raw() || found.uid() == 0);
    match trusted {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is not a directory of this user's")),
    }
}

/// Removes sockets that nobody listens on any more. Best effort: those that stay are in nobody's way.
fn sweep(directory: &Path) {
    let ours = |path: &PathBuf| path.extension().is_some_and(|e| e == &LISTENING[1..] || e == &STARTING[1..]);
    let entries = fs::read_dir(directory).into_iter().flatten().take(SHM_SWEPT_MAX).flatten();
    for path in entries.map(|entry| entry.path()).filter(ours) {
        let is_socket = fs::symlink_metadata(&path).is_ok_and(|found| found.file_type().is_socket());
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        if is_socket && reach(&path, Duration::from_secs(1)).is_err_and(refused) {
            let _gone_or_not = fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<PathBuf> {
        let mut names: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
        names.sort();
        names
    }

    #[test]
    fn only_the_dead_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let first = Socket::listen(directory.path()).unwrap();
        let (stale, starting) = (directory.path().join("0.sock"), directory.path().join("1.new"));
        // A listener of std leaves its file.
        drop(UnixListener::bind(&stale).unwrap());
        drop(UnixListener::bind(&starting).unwrap());
        fs::write(directory.path().join("file.sock"), "somebody's").unwrap();
        let second = Socket::listen(directory.path()).unwrap();
        let mut expected =
            vec![first.path().to_path_buf(), second.path().to_path_buf(), directory.path().join("file.sock")];
        expected.sort();
        assert_eq!(names(directory.path()), expected);
        assert!(reach(first.path(), Duration::from_secs(1)).is_ok());
        drop((first, second));
        assert_eq!(names(directory.path()), [directory.path().join("file.sock")]);
    }

    #[test]
    fn directory_and_socket_are_the_users_own() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("shm");
        let socket = Socket::listen(&directory).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(socket.path())), (0o700, 0o600));
    }

    #[test]
    fn what_is_no_directory_of_ours_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let (file, link) = (parent.path().join("file"), parent.path().join("link"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(parent.path(), &link).unwrap();
        assert!(Socket::listen(&file).is_err());
        assert!(Socket::listen(&link).is_err());
        assert!(Socket::listen(&parent.path().join("no/such")).is_err());
        let long = parent.path().join("x".repeat(120));
        assert!(Socket::listen(&long).is_err());
    }
}
