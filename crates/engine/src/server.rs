//! The agent's half: the socket, who may connect, and everybody's messages in one stream.
//!
//! It checks what can be checked without knowing anything about weights (the frame, the request's
//! shape, that a region is sealed memory) and hands the rest to the agent as [`EngineEvent`]s.

use crate::connection;
use crate::limits::{ACCEPT_WAIT, CONNECTIONS_MAX, EVENTS_QUEUED_MAX, SOCKET_PATH_BYTES_MAX};
use crate::outbox::{Kind, Outbox};
use crate::protocol::{self, ErrorReply, Event, ManifestReply, Request, code};
use crate::table::ManifestPage;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::process::geteuid;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// One connection of one engine; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What engines do. Each `Opened` is followed, in the end, by exactly one `Closed`.
#[derive(Debug)]
pub enum EngineEvent {
    Opened {
        conn: ConnId,
        /// As the kernel knows it; absent where the process lives in another pid namespace.
        pid: Option<i32>,
        uid: u32,
    },
    /// Owes exactly one reply ([`Engines::reply`], [`Engines::reply_manifest`] or [`Engines::reply_page`]).
    /// `fd` is there if it is a `Region` of host memory, and is then a memfd sealed against shrinking and growing that has at least the bytes it claims.
    Request {
        conn: ConnId,
        id: u64,
        request: Request,
        fd: Option<OwnedFd>,
    },
    Closed {
        conn: ConnId,
    },
}

#[derive(Debug, Error)]
pub enum ServeError {
    #[error("another agent is listening on {path} (pid {pid}): stop it, or give this one a socket of its own")]
    Busy { path: PathBuf, pid: String },
    #[error("cannot listen on {path}: {reason}")]
    Path { path: PathBuf, reason: String },
    #[error("cannot listen on {path}: {call}: {source}")]
    Io { path: PathBuf, call: &'static str, source: io::Error },
}

/// A socket that this process alone listens on. Its file is removed when the server ends.
#[derive(Debug)]
pub struct EngineServer {
    listener: UnixListener,
    path: PathBuf,
    /// Locked as long as it is open. The lock file stays: removing it would let two agents hold
    /// locks on two files of one name.
    _lock: File,
}

impl EngineServer {
    /// Listens on `path`, for this user and root. What a dead agent left there is replaced. Must
    /// be called inside a tokio runtime.
    pub fn bind(path: &Path) -> Result<EngineServer, ServeError> {
        check_path(path)?;
        let lock = lock(path)?;
        clear(path)?;
        let fail = |call| move |source| ServeError::Io { path: path.to_path_buf(), call, source };
        let listener = UnixListener::bind(path).map_err(fail("bind"))?;
        let server = EngineServer { listener, path: path.to_path_buf(), _lock: lock };
        // Whoever connects before this is asked for their uid all the same.
        std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(fail("chmod"))?;
        Ok(server)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves until the receiver is dropped.
    pub fn run(self) -> (Engines, mpsc::Receiver<EngineEvent>) {
        let engines = Engines::default();
        let (sender, receiver) = mpsc::channel(EVENTS_QUEUED_MAX);
        tokio::spawn(self.accept_all(engines.clone(), sender));
        (engines, receiver)
    }

    async fn accept_all(self, engines: Engines, events: mpsc::Sender<EngineEvent>) {
        let mut next = 1;
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = events.closed() => return,
            };
            match accepted {
                Ok((socket, _)) => {
                    tokio::spawn(engines.clone().welcome(socket, ConnId(next), events.clone()));
                    next += 1;
                }
                Err(error) => {
                    tracing::warn!(%error, "accept on the engines' socket failed");
                    tokio::time::sleep(ACCEPT_WAIT).await;
                }
            }
        }
    }
}

impl Drop for EngineServer {
    fn drop(&mut self) {
        // The lock is still held, so the file is ours. If it is gone already, so much the better.
        let _gone_or_not = std::fs::remove_file(&self.path);
    }
}

/// Everyone connected: the way to answer them.
#[derive(Clone, Debug, Default)]
pub struct Engines {
    outboxes: Arc<Mutex<BTreeMap<ConnId, Arc<Outbox>>>>,
}

impl Engines {
    /// Answers the request `id` of `conn`. Nothing happens if the connection is gone.
    pub fn reply(&self, conn: ConnId, id: u64, result: Result<Value, ErrorReply>) {
        self.send(conn, Kind::Owed, || protocol::encode_reply(id, &result));
    }

    /// Answers a request for the manifest, like [`Engines::reply`].
    pub fn reply_manifest(&self, conn: ConnId, id: u64, manifest: &ManifestReply) {
        self.send(conn, Kind::Owed, || protocol::encode_answer(id, Ok(manifest)));
    }

    /// The same in pages.
    pub fn reply_page(&self, conn: ConnId, id: u64, page: &ManifestPage<&str>) {
        self.send(conn, Kind::Owed, || protocol::encode_answer(id, Ok(page)));
    }

    /// Sends an event. Of progress that was not read yet only the newest is kept.
    pub fn event(&self, conn: ConnId, event: &Event) {
        let kind = match event {
            Event::Progress(_) => Kind::Progress,
            Event::Release { .. }
            | Event::Hydrated { .. }
            | Event::Pause { .. }
            | Event::Check { .. }
            | Event::Applied { .. }
            | Event::Failed(_)
            | Event::Standing(_)
            | Event::Aborted { .. }
            | Event::Unknown => Kind::Owed,
        };
        self.send(conn, kind, || protocol::encode_event(event));
    }

    /// Ends the connection once it was sent what it is owed. `Closed` follows.
    pub fn close(&self, conn: ConnId) {
        if let Some(outbox) = self.outbox(conn) {
            outbox.finish();
        }
    }

    fn send(&self, conn: ConnId, kind: Kind, frame: impl FnOnce() -> Vec<u8>) {
        if let Some(outbox) = self.outbox(conn) {
            outbox.push(kind, frame());
        }
    }

    fn outbox(&self, conn: ConnId) -> Option<Arc<Outbox>> {
        self.lock().get(&conn).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ConnId, Arc<Outbox>>> {
        self.outboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn welcome(self, socket: UnixStream, conn: ConnId, events: mpsc::Sender<EngineEvent>) {
        let (outbox, pid, uid) = match self.admit(&socket, conn) {
            Ok(admitted) => admitted,
            Err(error) => {
                tracing::warn!(%error, "a connection to the engines' socket was refused");
                return connection::turn_away(&socket, error).await;
            }
        };
        if events.send(EngineEvent::Opened { conn, pid, uid }).await.is_ok() {
            connection::serve(&socket, conn, &outbox, &events).await;
        }
        self.lock().remove(&conn);
        let _agent_is_gone = events.send(EngineEvent::Closed { conn }).await;
    }

    fn admit(&self, socket: &UnixStream, conn: ConnId) -> Result<(Arc<Outbox>, Option<i32>, u32), ErrorReply> {
        let peer = socket.peer_cred().map_err(|e| {
            ErrorReply::new(code::NOT_PERMITTED, format!("your identity cannot be told (SO_PEERCRED: {e})"))
        })?;
        let (own, uid) = (geteuid().as_raw(), peer.uid());
        if uid != own && uid != 0 {
            let message = format!("user {uid} may not use this agent, which serves user {own} and root only");
            return Err(ErrorReply::new(code::NOT_PERMITTED, message));
        }
        let mut outboxes = self.lock();
        if outboxes.len() >= CONNECTIONS_MAX {
            return Err(ErrorReply::new(
                code::BUSY,
                format!("{CONNECTIONS_MAX} connections are open, no more are taken"),
            ));
        }
        let outbox = Arc::new(Outbox::new());
        outboxes.insert(conn, outbox.clone());
        Ok((outbox, peer.pid(), uid))
    }
}

fn check_path(path: &Path) -> Result<(), ServeError> {
    let refuse = |reason: String| Err(ServeError::Path { path: path.to_path_buf(), reason });
    let bytes = path.as_os_str().as_bytes().len();
    if bytes > SOCKET_PATH_BYTES_MAX {
        return refuse(format!("the path has {bytes} bytes, a socket's may have {SOCKET_PATH_BYTES_MAX}"));
    }
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match directory.is_dir() {
        true => Ok(()),
        false => refuse(format!("{} is not a directory", directory.display())),
    }
}

/// Takes the lock file beside the socket, which says whose the socket is, also when the socket's
/// file was removed by someone.
fn lock(path: &Path) -> Result<File, ServeError> {
    let fail = |call, source: io::Error| ServeError::Io { path: path.to_path_buf(), call, source };
    let mut name = path.as_os_str().to_os_string();
    name.push(".lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd =
        rustix::fs::open(&name, flags, Mode::RUSR | Mode::WUSR).map_err(|e| fail("open of its lock file", e.into()))?;
    let mut file = File::from(fd);
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(busy(path, &mut file)),
        Err(e) => return Err(fail("flock", e.into())),
    }
    file.set_len(0).map_err(|e| fail("ftruncate of its lock file", e))?;
    writeln!(file, "{}", std::process::id()).map_err(|e| fail("write to its lock file", e))?;
    Ok(file)
}

fn busy(path: &Path, lock: &mut File) -> ServeError {
    let mut text = String::new();
    // The number is for people: where it cannot be read, the rest is still true.
    let pid = match lock.take(20).read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_string(),
        _ => "unknown".to_string(),
    };
    ServeError::Busy { path: path.to_path_buf(), pid }
}

/// Removes the socket of an agent that is gone. The lock is ours, so nobody of our kind listens;
/// anything else is asked, and left alone if it answers.
fn clear(path: &Path) -> Result<(), ServeError> {
    let fail = |call, source: io::Error| ServeError::Io { path: path.to_path_buf(), call, source };
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fail("stat", e)),
        Ok(found) if !found.file_type().is_socket() => {
            let reason = "something that is not a socket is there".to_string();
            return Err(ServeError::Path { path: path.to_path_buf(), reason });
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(listening) => {
            let peer = rustix::net::sockopt::socket_peercred(&listening);
            let pid = peer.map_or("unknown".to_string(), |peer| peer.pid.as_raw_nonzero().to_string());
            Err(ServeError::Busy { path: path.to_path_buf(), pid })
        }
        Err(_) => std::fs::remove_file(path).map_err(|e| fail("unlink of the old socket", e)),
    }
}
