//! Connecting to a holder: a thread of its own for each attempt, since it waits for the network.

use super::{Command, Inbox, LinkId};
use crate::config::RdmaConfig;
use crate::limits::{DEPTH, WRITE_TIMEOUT};
use crate::rail::Rail;
use crate::verbs::{CompletionQueue, QueuePair};
use crate::wire::{OFFER_BYTES, decode_offer, encode_offer};
use aquifer_core::{Access, NodeId};
use aquifer_transport::side::greet;
use aquifer_transport::{Endpoint, ReadError};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

/// A connected pair of queue pairs, and what is said beside it.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(super) stream: TcpStream,
    pub(super) queue_pair: QueuePair,
    pub(super) endpoint: SocketAddr,
    /// READs that both devices allow at a time.
    pub(super) depth: u32,
}

/// One attempt.
pub(super) struct Attempt {
    pub(super) link: LinkId,
    pub(super) peer: NodeId,
    pub(super) access: Access,
    /// Of any kind.
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) config: RdmaConfig,
    pub(super) rail: Arc<Rail>,
    pub(super) completions: Arc<CompletionQueue>,
    pub(super) inbox: Arc<Inbox>,
}

impl Attempt {
    pub(super) fn run(self) {
        let result = Box::new(self.try_endpoints());
        // The driver waits for every attempt before it ends.
        self.inbox.put(Command::Joined { link: self.link, peer: self.peer, access: self.access, result });
    }

    fn try_endpoints(&self) -> Result<Joined, ReadError> {
        let mut failures = Vec::new();
        for endpoint in self.endpoints.iter().filter_map(Endpoint::rdma) {
            match self.try_endpoint(endpoint) {
                Ok(joined) => return Ok(joined),
                Err(error @ (ReadError::Refused(_) | ReadError::Disconnected(_))) => return Err(error),
                Err(error) => failures.push(format!("{endpoint}: {error}")),
            }
        }
        match failures.is_empty() {
            true => Err(ReadError::Unreachable("the peer announced no endpoint for this transport".into())),
            false => Err(ReadError::Unreachable(failures.join("; "))),
        }
    }

    fn try_endpoint(&self, endpoint: SocketAddr) -> Result<Joined, ReadError> {
        let failed = |error: io::Error| ReadError::Unreachable(error.to_string());
        let mut stream = TcpStream::connect_timeout(&endpoint, self.config.connect_timeout).map_err(failed)?;
        greet(&stream, &self.access, self.config.handshake_timeout)?;
        let own = |error: crate::RdmaError| ReadError::Unreachable(error.to_string());
        let made = self.rail.queue_pair(&self.completions, DEPTH).map_err(own)?;
        let local = made.address;
        stream.write_all(&encode_offer(&local)).map_err(failed)?;
        let mut answer = [0; OFFER_BYTES];
        stream.set_read_timeout(Some(self.config.handshake_timeout)).map_err(failed)?;
        stream.read_exact(&mut answer).map_err(failed)?;
        let remote = decode_offer(&answer).map_err(|reason| ReadError::Unreachable(reason.into()))?;
        let queue_pair = self.rail.connect(made, &remote).map_err(own)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT)).map_err(failed)?;
        stream.set_nonblocking(true).map_err(failed)?;
        let depth = u32::from(local.reads_out.min(remote.reads_in)).clamp(1, DEPTH);
        Ok(Joined { stream, queue_pair, endpoint, depth })
    }
}
