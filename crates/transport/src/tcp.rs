//! The transport over TCP: its own listener and its own connections, a blocking thread for each.
//!
//! Measured on loopback, blocking threads with large buffers tie with io_uring. A reader's thread hashes
//! each piece, while it is in cache, on its way to its landing place; a holder's thread sends straight from
//! the mapped chunk. With TLS both pass through one buffer more.

use crate::tls::{self, Tls};
use crate::{Completion, Grants, Operation, Transport, limits};
use aquifer_core::NodeSecret;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

mod book;
mod congestion;
mod greeting;
mod holder;
mod link;
mod pace;
mod reader;
#[cfg(test)]
mod tests;
mod wire;

/// What may be tuned. The defaults are those of [`limits`].
#[derive(Clone, Debug)]
pub struct TcpConfig {
    /// Opened as soon as reads wait for them; 1 to [`limits::CONNECTIONS_PER_PEER_MAX`].
    pub connections_per_peer: usize,
    /// Opened when reads wait and the threads of all those that are there are what is slow, not the network;
    /// up to [`limits::CONNECTIONS_PER_PEER_MAX`].
    pub connections_per_peer_max: usize,
    pub connect_timeout: Duration,
    pub handshake_timeout: Duration,
    /// A reader closes a connection unused for so long.
    pub idle_timeout: Duration,
    /// A holder closes a connection without a request for so long.
    pub accepted_idle_timeout: Duration,
    /// A holder gives up on a reader that takes no byte for so long.
    pub write_timeout: Duration,
    /// Connections accepted in all, and those of them without a valid ticket yet.
    pub accepted_max: usize,
    pub unauthenticated_max: usize,
    /// The congestion control that chunks are sent by. None: the system's, unless another of those it
    /// allows suits a swarm better.
    pub congestion: Option<String>,
    pub encryption: Encryption,
    /// What this node proves to be over TLS. None: it speaks no TLS.
    pub identity: Option<NodeSecret>,
}

/// Whether bytes travel in TLS. They are verified either way; this hides them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encryption {
    /// Only with whoever demands it.
    #[default]
    Off,
    /// Always: readers without it are turned away.
    Tls,
}

impl FromStr for Encryption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Encryption::Off, Encryption::Tls]
            .into_iter()
            .find(|encryption| encryption.to_string() == text)
            .ok_or_else(|| format!("'{text}': it is 'off' or 'tls'"))
    }
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Encryption::Off => "off",
            Encryption::Tls => "tls",
        })
    }
}

impl Default for TcpConfig {
    fn default() -> Self {
        TcpConfig {
            connections_per_peer: 1,
            connections_per_peer_max: limits::CONNECTIONS_PER_PEER_MAX,
            connect_timeout: limits::CONNECT_TIMEOUT,
            handshake_timeout: limits::HANDSHAKE_TIMEOUT,
            idle_timeout: limits::IDLE_TIMEOUT,
            accepted_idle_timeout: limits::ACCEPTED_IDLE_TIMEOUT,
            write_timeout: limits::WRITE_TIMEOUT,
            accepted_max: limits::ACCEPTED_MAX,
            unauthenticated_max: limits::UNAUTHENTICATED_MAX,
            congestion: None,
            encryption: Encryption::Off,
            identity: None,
        }
    }
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpStats {
    /// Payload received, whole chunks or not.
    pub received_bytes: u64,
    /// Payload handed to the kernel.
    pub sent_bytes: u64,
    /// Connections opened to peers, up to the end of the handshake.
    pub connected: u64,
    /// Connections accepted from peers, up to the end of the handshake.
    pub accepted: u64,
    /// Connections turned away or ended for what the other side did.
    pub rejected: u64,
}

#[derive(Debug, Default)]
struct Counters {
    received: AtomicU64,
    sent: AtomicU64,
    connected: AtomicU64,
}

/// See the module. Dropping it ends every read and closes every connection.
pub struct TcpTransport {
    local: SocketAddr,
    counters: Arc<Counters>,
    reader: Arc<reader::Reader>,
    holder: holder::Holder,
}

impl TcpTransport {
    /// Listens on `listen` and serves what `grants` allow. `completions` is called from this
    /// transport's threads, and from within `submit`, with no lock held; it may submit, but must
    /// not panic nor call `shutdown`.
    pub fn start(
        listen: SocketAddr,
        grants: Arc<dyn Grants>,
        completions: impl Fn(Completion) + Send + Sync + 'static,
        config: TcpConfig,
    ) -> io::Result<Arc<Self>> {
        let listener = TcpListener::bind(listen)?;
        congestion::choose(&listener, config.congestion.as_deref())?;
        let local = listener.local_addr()?;
        let counters = Arc::new(Counters::default());
        let tls = config.identity.as_ref().map(Tls::of).transpose().map_err(tls::broken)?;
        if tls.is_none() && config.encryption == Encryption::Tls {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "TLS needs an identity"));
        }
        let reader = reader::Reader::new(config.clone(), tls.clone(), Box::new(completions), counters.clone());
        let holder = holder::Holder::start(listener, config, tls, grants, counters.clone())?;
        Ok(Arc::new(TcpTransport { local, counters, reader: Arc::new(reader), holder }))
    }

    /// Where it listens; the port is the real one if 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    pub fn stats(&self) -> TcpStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TcpStats {
            received_bytes: of(&self.counters.received),
            sent_bytes: of(&self.counters.sent),
            connected: of(&self.counters.connected),
            accepted: self.holder.room().accepted(),
            rejected: self.holder.room().rejected(),
        }
    }

    /// Ends every read, closes every connection and waits for the threads. Reads submitted later
    /// complete at once. May take as long as connecting may; not to be called from a completion.
    pub fn shutdown(&self) {
        self.holder.room().close();
        self.reader.close();
        self.reader.join();
        self.holder.room().join();
    }
}

impl Transport for TcpTransport {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn submit(&self, operation: Operation) {
        match operation {
            Operation::Read(op) => self.reader.read(op),
            Operation::Cancel(id) => self.reader.cancel(id),
            Operation::Disconnect(peer) => self.reader.disconnect(peer),
        }
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        self.holder.room().close();
        self.reader.close();
    }
}

impl fmt::Debug for TcpTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpTransport({}, {:?})", self.local, self.stats())
    }
}
