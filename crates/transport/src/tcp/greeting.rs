//! The reader's half of the handshake, over TCP.

use super::link::Link;
use crate::socket::is_timeout;
use crate::tls::Tls;
use crate::{ReadError, handshake};
use aquifer_core::{Access, NodeId};
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Makes a fresh connection one to `peer`, encrypted where `tls` is given.
pub(super) fn greet(
    stream: &Arc<TcpStream>,
    tls: Option<&Tls>,
    (peer, access): (NodeId, &Access),
    timeout: Duration,
) -> Result<Link, ReadError> {
    let failed = |error: io::Error| match is_timeout(&error) {
        true => ReadError::Unreachable("it did not finish the handshake in time".into()),
        false => ReadError::Unreachable(format!("handshake: {error}")),
    };
    let deadline = Instant::now() + timeout;
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_write_timeout(Some(timeout)).map_err(failed)?;
    let link = match tls {
        Some(tls) => Link::to(stream.clone(), tls, peer, deadline).map_err(failed)?,
        None => Link::plain(stream.clone()),
    };
    handshake::greet(&link, access, deadline)?;
    Ok(link)
}
