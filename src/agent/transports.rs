//! The ways bytes come to this node: which one a read takes, and the next one when that fails.
//!
//! A read has one way at a time, and goes to another only when the one before has ended it. The peer is
//! not blamed for a way that failed: whoever asked is told what the last one came to.

use super::grants::{ByWay, GrantTable};
use super::view::TransportView;
use super::{AgentConfig, endpoints};
use anyhow::{Context, Result};
use aquifer_core::NodeId;
use aquifer_rdma::{RdmaConfig, RdmaError, RdmaTransport};
use aquifer_transport::{
    Completion, Encryption, Endpoint, OpId, Operation, ReadError, ReadOp, Refusal, ShmConfig, ShmTransport, TcpConfig,
    TcpTransport, Transport,
};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A way that failed with a peer is not tried again with it for so long. Guess: a chunk a minute that
/// takes two attempts is nothing.
const WAY_PAUSE: Duration = Duration::from_secs(60);

/// Best first. TCP is always there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    Shm,
    Rdma,
    Tcp,
}

const WAYS: [Way; 3] = [Way::Shm, Way::Rdma, Way::Tcp];

impl Way {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Shm => "shm",
            Way::Rdma => "rdma",
            Way::Tcp => "tcp",
        }
    }

    /// For people.
    fn words(self) -> &'static str {
        match self {
            Way::Shm => "shared memory",
            Way::Rdma => "RDMA",
            Way::Tcp => "TCP",
        }
    }

    /// Where a read would go by it.
    fn endpoint(self, op: &ReadOp) -> Option<&Endpoint> {
        op.endpoints.iter().find(|endpoint| match self {
            Way::Shm => endpoint.shm().is_some(),
            Way::Rdma => endpoint.rdma().is_some(),
            Way::Tcp => endpoint.tcp().is_some(),
        })
    }
}

/// What is asked of RDMA, where it is not off.
#[derive(Clone, Debug)]
pub(crate) struct RdmaOptions {
    /// Where to listen for what is said beside the devices.
    pub(crate) listen: SocketAddr,
    /// The devices to use; all that can be used, if none are named. One that is named must be there.
    pub(crate) devices: Vec<String>,
    pub(crate) gid_index: Option<u32>,
}

#[derive(Debug)]
pub(super) struct Transports {
    tcp: Arc<TcpTransport>,
    /// None where it is off.
    shm: Option<Arc<ShmTransport>>,
    /// None where it is off, or this machine has no use for it.
    rdma: Option<Arc<RdmaTransport>>,
    choice: Choice,
}

/// What is under way, and what is known of the ways.
#[derive(Debug, Default)]
struct Choice {
    /// Those that this node has besides TCP.
    has: Vec<Way>,
    reads: BTreeMap<OpId, Underway>,
    /// Ways that led nowhere, and when they may be tried again.
    paused: BTreeMap<(NodeId, Way), (Endpoint, Instant)>,
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
        let by = |way| Arc::new(ByWay { table: grants.clone(), way });
        let tcp = TcpConfig {
            congestion: config.tcp_congestion.clone(),
            encryption: config.data_encryption,
            identity: Some(config.identity.clone()),
            ..TcpConfig::default()
        };
        let tcp =
            TcpTransport::start(config.data_listen, by(Way::Tcp), completion.clone(), tcp).with_context(|| {
                format!(
                    "cannot serve chunks on {}: if the port is taken, choose another --data-listen",
                    config.data_listen
                )
            })?;
        let start = |directory: &PathBuf| {
            let started = ShmTransport::start(directory, by(Way::Shm), completion.clone(), ShmConfig::default());
            let shown = directory.display();
            started.inspect_err(|error| {
                tracing::warn!("no chunks through shared memory: cannot use {shown}: {error}; choose another --shm-dir, or say --shm false");
            })
        };
        let shm = config.shm_dir.as_ref().and_then(|directory| start(directory).ok());
        let rdma = match (&config.rdma, config.data_encryption) {
            (Some(options), Encryption::Off) => start_rdma(options, by(Way::Rdma), completion.clone())?,
            // Nothing encrypts what goes over RDMA.
            (Some(_), Encryption::Tls) | (None, _) => None,
        };
        let has = [shm.is_some().then_some(Way::Shm), rdma.is_some().then_some(Way::Rdma)];
        let choice = Choice { has: has.into_iter().flatten().collect(), ..Choice::default() };
        Ok(Transports { tcp, shm, rdma, choice })
    }

    /// Where TCP listens.
    pub(super) fn local_addr(&self) -> SocketAddr {
        self.tcp.local_addr()
    }

    /// What to tell others besides where TCP listens, best first. An address without a host is one at this
    /// node's.
    pub(super) fn endpoints(&self) -> Vec<String> {
        let shm = self.shm.as_ref().map(|shm| Endpoint::Shm(shm.path().to_path_buf()).to_string());
        let rdma = self.rdma.as_ref().map(|rdma| endpoints::announced_rdma(rdma.local_addr()));
        shm.into_iter().chain(rdma).collect()
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
            Next::Again { failed, way, op, error, is_news } => {
                if is_news {
                    let (failed, next, peer) = (failed.words(), way.words(), op.peer.short());
                    tracing::info!("{failed} with {peer} does not work ({error}): by {next} for {WAY_PAUSE:?}");
                }
                self.transport(way).submit(Operation::Read(op));
                None
            }
            Next::Nothing => None,
        }
    }

    pub(super) fn shutdown(&self) {
        if let Some(shm) = &self.shm {
            shm.shutdown();
        }
        if let Some(rdma) = &self.rdma {
            rdma.shutdown();
        }
        self.tcp.shutdown();
    }

    pub(super) fn views(&self) -> BTreeMap<String, TransportView> {
        let view = |received_bytes, sent_bytes| TransportView { received_bytes, sent_bytes };
        let tcp = self.tcp.stats();
        let shm = self.shm.as_ref().map(|shm| shm.stats()).map(|s| view(s.received_bytes, s.sent_bytes));
        let rdma = self.rdma.as_ref().map(|rdma| rdma.stats()).map(|s| view(s.received_bytes, s.served_bytes));
        let tcp = Some(view(tcp.received_bytes, tcp.sent_bytes));
        let views = [(Way::Shm, shm), (Way::Rdma, rdma), (Way::Tcp, tcp)];
        views.into_iter().filter_map(|(way, view)| Some((way.name().to_string(), view?))).collect()
    }

    /// The ports that RDMA uses, in words.
    pub(super) fn rdma_ports(&self) -> Vec<String> {
        self.rdma.as_ref().map(|rdma| rdma.ports()).unwrap_or_default()
    }

    fn transport(&self, way: Way) -> &dyn Transport {
        match (way, &self.shm, &self.rdma) {
            (Way::Shm, Some(shm), _) => &**shm,
            (Way::Rdma, _, Some(rdma)) => &**rdma,
            (Way::Shm | Way::Rdma | Way::Tcp, _, _) => &*self.tcp,
        }
    }
}

/// Without a device there is none, and nobody need know; one that was asked for by name must be there.
fn start_rdma(
    options: &RdmaOptions,
    grants: Arc<ByWay>,
    completion: impl Fn(Completion) + Send + Sync + 'static,
) -> Result<Option<Arc<RdmaTransport>>> {
    let devices = (!options.devices.is_empty()).then(|| options.devices.clone());
    let named = devices.is_some() || options.gid_index.is_some();
    let config = RdmaConfig { devices, gid_index: options.gid_index, ..RdmaConfig::default() };
    match RdmaTransport::start(options.listen, grants, completion, config) {
        Ok(rdma) => {
            rdma.ports().iter().for_each(|port| tracing::info!("rdma: {port}"));
            Ok(Some(rdma))
        }
        Err(error) if named => Err(error).context("cannot use the RDMA devices that were asked for"),
        Err(error @ (RdmaError::Library { .. } | RdmaError::Kernel { .. } | RdmaError::NoDevice)) => {
            tracing::debug!("no chunks over RDMA: {error}");
            Ok(None)
        }
        Err(error) => {
            tracing::warn!("no chunks over RDMA: {error}; `aquifer doctor` says more");
            Ok(None)
        }
    }
}

enum Next {
    Done(Way, Completion),
    Again {
        failed: Way,
        way: Way,
        op: ReadOp,
        error: ReadError,
        /// The first for a while.
        is_news: bool,
    },
    /// Of a read that is not known.
    Nothing,
}

impl Choice {
    fn begin(&mut self, op: &ReadOp, now: Instant) -> Way {
        let way = self.next_way(op, None, now);
        let kept = (way != Way::Tcp).then(|| op.clone());
        self.reads.insert(op.id, Underway { way, op: kept, cancelled: false });
        way
    }

    fn cancel(&mut self, id: OpId) -> Option<Way> {
        let read = self.reads.get_mut(&id)?;
        read.cancelled = true;
        Some(read.way)
    }

    fn end(&mut self, completion: Completion, now: Instant) -> Next {
        let Some(mut read) = self.reads.remove(&completion.id) else { return Next::Nothing };
        let failed = read.way;
        let Some((op, error)) = read.op.take().zip(failure(&completion)) else {
            return Next::Done(failed, completion);
        };
        let is_news = self.pause(failed, &op, now);
        if read.cancelled {
            // The cancel crossed the failure: there is nothing left that could be cancelled.
            return Next::Done(failed, Completion { id: completion.id, result: Err(ReadError::Cancelled) });
        }
        let way = self.next_way(&op, Some(failed), now);
        let kept = (way != Way::Tcp).then(|| op.clone());
        self.reads.insert(completion.id, Underway { way, op: kept, cancelled: false });
        Next::Again { failed, way, op, error, is_news }
    }

    /// Leaves a way to the peer alone for a while; false if it was left alone already.
    fn pause(&mut self, way: Way, op: &ReadOp, now: Instant) -> bool {
        self.paused.retain(|_, (_, until)| *until > now);
        let Some(endpoint) = way.endpoint(op) else { return false };
        let is_news = !self.is_paused(&op.peer, way, endpoint, now);
        self.paused.insert((op.peer, way), (endpoint.clone(), now + WAY_PAUSE));
        is_news
    }

    /// The best way that both sides have and that did not fail lately, of those behind `after`.
    fn next_way(&self, op: &ReadOp, after: Option<Way>, now: Instant) -> Way {
        let mut ways = WAYS.into_iter().filter(|way| Some(*way) > after && self.has.contains(way));
        let leads = |way: &Way| way.endpoint(op).is_some_and(|endpoint| !self.is_paused(&op.peer, *way, endpoint, now));
        ways.find(leads).unwrap_or(Way::Tcp)
    }

    fn is_paused(&self, peer: &NodeId, way: Way, endpoint: &Endpoint, now: Instant) -> bool {
        self.paused.get(&(*peer, way)).is_some_and(|(failed, until)| failed == endpoint && *until > now)
    }
}

/// Why a way failed, if another may do better.
fn failure(completion: &Completion) -> Option<ReadError> {
    match &completion.result {
        Err(
            error @ (ReadError::Unreachable(_)
            | ReadError::Disconnected(_)
            | ReadError::Stalled
            | ReadError::Refused(Refusal::Ticket)
            // Memory that a device does not take, perhaps: TCP lands anywhere, or says the same.
            | ReadError::Landing(_)),
        ) => Some(error.clone()),
        Ok(_)
        | Err(
            ReadError::Refused(Refusal::Expired | Refusal::Unknown | Refusal::Gone)
            | ReadError::Revoked
            | ReadError::Cancelled,
        ) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_core::Access;
    use aquifer_memory::Mapping;

    const PEER: NodeId = NodeId([1; 32]);

    fn choice() -> Choice {
        Choice { has: vec![Way::Shm, Way::Rdma], ..Choice::default() }
    }

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
            adopts: false,
            stall: Duration::from_secs(1),
        }
    }

    fn broken(id: OpId) -> Completion {
        Completion { id, result: Err(ReadError::Disconnected("killed".into())) }
    }

    #[test]
    fn what_fails_goes_on_by_tcp_and_what_fails_there_is_the_end() {
        let (mut choice, now) = (choice(), Instant::now());
        assert_eq!(choice.begin(&op(1, Some("/a")), now), Way::Shm);
        choice.begin(&op(2, Some("/a")), now);
        assert!(
            matches!(choice.end(broken(1), now), Next::Again { op, way: Way::Tcp, is_news: true, .. } if op.id == 1)
        );
        assert!(matches!(choice.end(broken(2), now), Next::Again { op, is_news: false, .. } if op.id == 2));
        assert_eq!(choice.cancel(1), Some(Way::Tcp));
        assert!(matches!(choice.end(broken(1), now), Next::Done(Way::Tcp, done) if done.result.is_err()));
        assert!(matches!(choice.end(broken(1), now), Next::Nothing));
        assert_eq!(choice.cancel(1), None);
    }

    #[test]
    fn what_failed_is_left_alone_for_a_while_unless_the_peer_is_somewhere_new() {
        let (mut choice, now) = (choice(), Instant::now());
        choice.begin(&op(1, Some("/a")), now);
        choice.end(broken(1), now);
        assert_eq!(choice.begin(&op(2, Some("/a")), now), Way::Tcp);
        assert_eq!(choice.begin(&op(3, Some("/b")), now), Way::Shm);
        assert_eq!(choice.begin(&op(4, Some("/a")), now + WAY_PAUSE), Way::Shm);
    }

    #[test]
    fn words_of_the_holder_are_not_asked_for_twice() {
        let (mut choice, now) = (choice(), Instant::now());
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
        let (mut choice, now) = (choice(), Instant::now());
        choice.begin(&op(1, Some("/a")), now);
        assert_eq!(choice.cancel(1), Some(Way::Shm));
        let end = choice.end(broken(1), now);
        assert!(matches!(end, Next::Done(_, done) if done.result == Err(ReadError::Cancelled)));
    }

    #[test]
    fn without_a_socket_or_with_it_off_it_is_tcp() {
        let (mut with, mut without, now) = (choice(), Choice::default(), Instant::now());
        assert_eq!(with.begin(&op(1, None), now), Way::Tcp);
        assert_eq!(without.begin(&op(1, Some("/a")), now), Way::Tcp);
    }

    #[test]
    fn ways_are_tried_from_the_best_to_the_last() {
        let (mut choice, now) = (choice(), Instant::now());
        let rdma = Endpoint::Rdma(SocketAddr::from(([127, 0, 0, 1], 2)));
        let with_rdma = |id, path| {
            let op = op(id, path);
            ReadOp { endpoints: op.endpoints.iter().cloned().chain([rdma.clone()]).collect(), ..op }
        };
        assert_eq!(choice.begin(&with_rdma(1, Some("/a")), now), Way::Shm);
        assert!(matches!(choice.end(broken(1), now), Next::Again { way: Way::Rdma, .. }));
        assert_eq!(choice.cancel(1), Some(Way::Rdma));
        let full = Completion { id: 2, result: Err(ReadError::Landing("locked memory".into())) };
        assert_eq!(choice.begin(&with_rdma(2, Some("/a")), now), Way::Rdma);
        assert!(matches!(choice.end(full, now), Next::Again { failed: Way::Rdma, way: Way::Tcp, .. }));
        assert_eq!(choice.begin(&with_rdma(3, None), now), Way::Tcp);
        assert_eq!(choice.begin(&with_rdma(4, None), now + WAY_PAUSE), Way::Rdma);
    }
}
