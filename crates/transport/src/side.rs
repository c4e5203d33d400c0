//! The handshake for a connection beside another way: transports that move bytes past sockets say over it
//! what is to be moved.

pub use crate::handshake::Fault;
use crate::{Grants, ReadError, handshake};
use aquifer_core::{Access, NodeId};
use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// The reader's half.
pub fn greet(stream: &TcpStream, access: &Access, timeout: Duration) -> Result<(), ReadError> {
    let failed = |error: io::Error| ReadError::Unreachable(format!("handshake: {error}"));
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_write_timeout(Some(timeout)).map_err(failed)?;
    handshake::greet(stream, access, Instant::now() + timeout)
}

/// The holder's half: whom the reader proves to be. `sit` says whether there is room for that peer.
pub fn examine(
    stream: &TcpStream,
    grants: &dyn Grants,
    timeout: Duration,
    sit: impl FnOnce(NodeId) -> bool,
) -> Result<NodeId, Fault> {
    handshake::examine(stream, Instant::now() + timeout, |ticket| grants.secret(ticket), sit)
}
