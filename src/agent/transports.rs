//! The ways bytes come to this node: which one a read takes, and the next one when that fails.
//!
//! A read has one way at a time, and goes to another only when the one before has ended it. The peer is
//! not blamed for a way that failed: whoever asked is told what the last one came to.

use super::AgentConfig;
use super::grants::GrantTable;
use super::view::TransportView;
use anyhow::{Context, Result};
use aquifer_core::NodeId;
use aquifer_transport::{
    Completion, Endpoint, OpId, Operation, ReadError, ReadOp, Refusal, ShmConfig, ShmTransport, TcpConfig,
    TcpTransport, Transport,
};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Shared memory that failed with a peer is not tried again with it for so long. Guess: a chunk a
/// minute that takes two attempts is nothing.
const SHM_PAUSE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    Shm,
    Tcp,
}

impl Way {
    pub(super) fn name(self) -> &'static str {
        match self {
            Way::Shm => "shm",
            Way::Tcp => "tcp",
        }
    }
}

#[derive(Debug)]
pub(super) struct Transports {
    tcp: Arc<TcpTransport>,
    /// None where it is off.
    shm: Option<Arc<ShmTransport>>,
    choice: Choice,
}

/// What is under way, and what is known of the ways.
#[derive(Debug, Default)]
struct Choice {
    reads: BTreeMap<OpId, Underway>,
    /// Sockets that led nowhere, and when they may be tried again.
    paused: BTreeMap<NodeId, (PathBuf, Instant)>,
}

#[derive(Debug)]
struct Underway {
    way: Way,
    /// What the next way needs, if there is one.
    op: Option<ReadOp>,
    cancelled: bool,
}

impl Transports {
    pub(super) fn start(
        config: &AgentConfig,
        grants: &Arc<GrantTable>,
        completion: impl Fn(Completion) + Clone + Send + Sync + 'static,
    ) -> Result<Self> {
        let tcp = TcpConfig {
            congestion: config.tcp_congestion.clone(),
            encryption: config.data_encryption,
            identity: Some(config.identity.clone()),
            ..TcpConfig::default()
        };
        let tcp =
            TcpTransport::start(config.data_listen, grants.clone(), completion.clone(), tcp).with_context(|| {
                format!(
                    "cannot serve chunks on {}: if the port is taken, choose another --data-listen",
                    config.data_listen
                )
            })?;
        let start = |directory: &PathBuf| {
            let started = ShmTransport::start(directory, grants.clone(), completion, ShmConfig::default());
            let shown = directory.display();
            started.inspect_err(|error| {
                tracing::warn!("no chunks through shared memory: cannot use {shown}: {error}; choose another --shm-dir, or say --shm false");
            })
        };
        let shm = config.shm_dir.as_ref().and_then(|directory| start(directory).ok());
        Ok(Transports { tcp, shm, choice: Choice::default() })
    }

    /// Where TCP listens.
    pub(super) fn local_addr(&self) -> SocketAddr {
        self.tcp.local_addr()
    }

    /// What to tell others besides where TCP listens.
    pub(super) fn shm_endpoint(&self) -> Option<String> {
        self.shm.as_ref().map(|shm| Endpoint::Shm(shm.path().to_path_buf()).to_string())
    }

    /// Whether an endpoint may lead somewhere from here. A socket is looked for in this node's own
    /// directory and nowhere else: a peer may name any path, and some that are looked at do not answer.
    pub(super) fn can_try(&self, endpoint: &Endpoint) -> bool {
        let Some(path) = endpoint.shm() else { return true };
        self.shm.as_ref().is_some_and(|shm| path.parent() == shm.path().parent() && path.exists())
    }

    pub(super) fn read(&mut self, op: ReadOp) {
        let way = self.choice.begin(&op, Instant::now());
        self.transport(way).submit(Operation::Read(op));
    }

    pub(super) fn cancel(&mut self, id: OpId) {
        if let Some(way) = self.choice.cancel(id) {
            self.transport(way).submit(Operation::Cancel(id));
        }
    }

    /// A way has ended a read: what it came to, and by which way, unless it goes on by another.
    pub(super) fn on_completion(&mut self, completion: Completion) -> Option<(Way, Completion)> {
        match self.choice.end(completion, Instant::now()) {
            Next::Done(way, completion) => Some((way, completion)),
            Next::Again { op, error, is_news } => {
                if is_news {
                    let peer = op.peer.short();
                    tracing::info!("shared memory with {peer} does not work ({error}): by TCP for {SHM_PAUSE:?}");
                }
                self.tcp.submit(Operation::Read(op));
                None
            }
            Next::Nothing => None,
        }
    }

    pub(super) fn shutdown(&self) {
        if let Some(shm) = &self.shm {
            shm.shutdown();
        }
        self.tcp.shutdown();
    }

    pub(super) fn views(&self) -> BTreeMap<String, TransportView> {
        let tcp = self.tcp.stats();
        let tcp = TransportView { received_bytes: tcp.received_bytes, sent_bytes: tcp.sent_bytes };
        let shm = self.shm.as_ref().map(|shm| shm.stats());
        let shm = shm.map(|s| TransportView { received_bytes: s.received_bytes, sent_bytes: s.sent_bytes });
        let named = |way: Way, view| (way.name().to_string(), view);
        shm.map(|view| named(Way::Shm, view)).into_iter().chain([named(Way::Tcp, tcp)]).collect()
    }

    fn transport(&self, way: Way) -> &dyn Transport {
        match (way, &self.shm) {
            (Way::Shm, Some(shm)) => &**shm,
            (Way::Shm | Way::Tcp, _) => &*self.tcp,
        }
    }
}

enum Next {
    Done(Way, Completion),
    Again {
        op: ReadOp,
        error: ReadError,
        /// The first for a while.
        is_news: bool,
    },
    /// Of a read that is not known.
    Nothing,
}

impl Choice {
    /// Endpoints are those that can be tried.
    fn begin(&mut self, op: &ReadOp, now: Instant) -> Way {
        let way = match op.endpoints.iter().find_map(Endpoint::shm) {
            Some(path) if !self.is_paused(&op.peer, path, now) => Way::Shm,
            Some(_) | None => Way::Tcp,
        };
        let kept = (way == Way::Shm).then(|| op.clone());
        self.reads.insert(op.id, Underway { way, op: kept, cancelled: false });
        way
    }

    fn cancel(&mut self, id: OpId) -> Option<Way> {
        let read = self.reads.get_mut(&id)?;
        read.cancelled = true;
        Some(read.way)
    }

    fn end(&mut self, completion: Completion, now: Instant) -> Next {
        let Some(read) = self.reads.get_mut(&completion.id) else { return Next::Nothing };
        let Some((op, error)) = read.op.take().zip(failure(&completion)) else {
            let way = read.way;
            self.reads.remove(&completion.id);
            return Next::Done(way, completion);
        };
        let cancelled = read.cancelled;
        read.way = Way::Tcp;
        let is_news = self.pause(&op, now);
        if cancelled {
            // The cancel crossed the failure: there is nothing left that could be cancelled.
            self.reads.remove(&completion.id);
            return Next::Done(Way::Shm, Completion { id: completion.id, result: Err(ReadError::Cancelled) });
        }
        Next::Again { op, error, is_news }
    }

    /// Leaves the peer's socket alone for a while; false if it was left alone already.
    fn pause(&mut self, op: &ReadOp, now: Instant) -> bool {
        self.paused.retain(|_, (_, until)| *until > now);
        let Some(path) = op.endpoints.iter().find_map(Endpoint::shm) else { return false };
        let is_news = !self.is_paused(&op.peer, path, now);
        self.paused.insert(op.peer, (path.to_path_buf(), now + SHM_PAUSE));
        is_news
    }

    fn is_paused(&self, peer: &NodeId, path: &Path, now: Instant) -> bool {
        self.paused.get(peer).is_some_and(|(failed, until)| failed == path && *until > now)
    }
}

/// Why a way failed, if another may do better.
fn failure(completion: &Completion) -> Option<ReadError> {
    match &completion.result {
        Err(
            error @ (ReadError::Unreachable(_)
            | ReadError::Disconnected(_)
            | ReadError::Stalled
            | ReadError::Refused(Refusal::Ticket)),
        ) => Some(error.clone()),
        Ok(_)
        | Err(
            ReadError::Refused(Refusal::Expired | Refusal::Unknown | Refusal::Gone)
            | ReadError::Revoked
            | ReadError::Cancelled
            | ReadError::Landing(_),
        ) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_core::Access;
    use aquifer_memory::Mapping;

    const PEER: NodeId = NodeId([1; 32]);

    fn op(id: OpId, path: Option<&str>) -> ReadOp {
        let tcp = Endpoint::Tcp(SocketAddr::from(([127, 0, 0, 1], 1)));
        ReadOp {
            id,
            peer: PEER,
            endpoints: path.map(|p| Endpoint::Shm(p.into())).into_iter().chain([tcp]).collect(),
            access: Access { ticket: 1, secret: [0; 32] },
            lease: 1,
            chunk: 1,
            into: Mapping::anonymous(1).expect("a byte").span(),
            stall: Duration::from_secs(1),
        }
    }

    fn broken(id: OpId) -> Completion {
        Completion { id, result: Err(ReadError::Disconnected("killed".into())) }
    }

    #[test]
    fn what_fails_goes_on_by_tcp_and_what_fails_there_is_the_end() {
        let (mut choice, now) = (Choice::default(), Instant::now());
        assert_eq!(choice.begin(&op(1, Some("/a")), now), Way::Shm);
        choice.begin(&op(2, Some("/a")), now);
        assert!(matches!(choice.end(broken(1), now), Next::Again { op, is_news: true, .. } if op.id == 1));
        assert!(matches!(choice.end(broken(2), now), Next::Again { op, is_news: false, .. } if op.id == 2));
        assert_eq!(choice.cancel(1), Some(Way::Tcp));
        assert!(matches!(choice.end(broken(1), now), Next::Done(Way::Tcp, done) if done.result.is_err()));
        assert!(matches!(choice.end(broken(1), now), Next::Nothing));
        assert_eq!(choice.cancel(1), None);
    }

    #[test]
    fn what_failed_is_left_alone_for_a_while_unless_the_peer_is_somewhere_new() {
        let (mut choice, now) = (Choice::default(), Instant::now());
        choice.begin(&op(1, Some("/a")), now);
        choice.end(broken(1), now);
        assert_eq!(choice.begin(&op(2, Some("/a")), now), Way::Tcp);
        assert_eq!(choice.begin(&op(3, Some("/b")), now), Way::Shm);
        assert_eq!(choice.begin(&op(4, Some("/a")), now + SHM_PAUSE), Way::Shm);
    }

    #[test]
    fn words_of_the_holder_are_not_asked_for_twice() {
        let (mut choice, now) = (Choice::default(), Instant::now());
        for (id, error) in [(1, ReadError::Revoked), (2, ReadError::Refused(Refusal::Gone)), (3, ReadError::Cancelled)]
        {
            choice.begin(&op(id, Some("/a")), now);
            let end = choice.end(Completion { id, result: Err(error.clone()) }, now);
            assert!(matches!(end, Next::Done(Way::Shm, done) if done.result == Err(error)));
        }
        assert_eq!(choice.begin(&op(4, Some("/a")), now), Way::Shm);
    }

    #[test]
    fn a_cancel_that_crosses_a_failure_ends_the_read() {
        let (mut choice, now) = (Choice::default(), Instant::now());
        choice.begin(&op(1, Some("/a")), now);
        assert_eq!(choice.cancel(1), Some(Way::Shm));
        let end = choice.end(broken(1), now);
        assert!(matches!(end, Next::Done(_, done) if done.result == Err(ReadError::Cancelled)));
    }

    #[test]
    fn without_a_socket_it_is_tcp() {
        assert_eq!(Choice::default().begin(&op(1, None), Instant::now()), Way::Tcp);
    }
}
