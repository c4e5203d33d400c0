//! The reader's half of the handshake, over TCP.

use crate::{ReadError, handshake};
use aquifer_core::Access;
use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

pub(super) fn handshake(stream: &TcpStream, access: &Access, timeout: Duration) -> Result<(), ReadError> {
    let failed = |error: io::Error| ReadError::Unreachable(format!("handshake: {error}"));
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_write_timeout(Some(timeout)).map_err(failed)?;
    handshake::greet(stream, access, Instant::now() + timeout)
}
