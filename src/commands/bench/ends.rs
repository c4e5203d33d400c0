//! The two ends of a transfer: a holder of chunks and a puller, with a real transport each.
//!
//! A transport is added with a variant of [`Kind`] that says how it is started.

use super::content;
use super::cores::Took;
use crate::keys;
use anyhow::{Context, Result, bail};
use aquifer_core::{Access, ChunkHash, NodeId, NodeSecret};
use aquifer_memory::limits::SLAB_BYTES;
use aquifer_memory::{Mapping, MemoryStore, Reservation, Span};
use aquifer_rdma::{RdmaConfig, RdmaTransport};
use aquifer_transport::limits::CONNECTIONS_PER_PEER_MAX;
use aquifer_transport::{
    Completion, Encryption, Endpoint, Grants, Operation, ReadOp, Refusal, ShmConfig, ShmTransport, TcpConfig,
    TcpTransport, Transport,
};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// The nodes at either end: their keys are nobody's secret.
const HOLDER: [u8; 32] = [1; 32];
const PULLER: [u8; 32] = [2; 32];
const LEASE: u64 = 1;
/// As an agent waits for a byte, about.
const STALL: Duration = Duration::from_secs(30);
/// Longest chunk: what fits the field that carries its length, with room to spare.
const CHUNK_BYTES_MAX: u64 = 1 << 30;

/// A transport that can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// TCP over loopback, as between agents
    Tcp,
    /// TLS over TCP, as with `--data-encryption tls`
    Tls,
    /// Memory shared between the two, as between agents of one machine
    Shm,
    /// RDMA READs by this machine's devices, as between agents that have such
    Rdma,
}

/// Where a holder has its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Origin {
    /// Shared memory, as an engine's
    Memory,
    /// A file in the page cache, as a publisher's
    File,
    /// A chunk store in memory, as a node's
    Store,
}

/// Where a puller wants them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Destination {
    /// Shared memory, as an engine's
    Region,
    /// A chunk store in memory, as a node's
    Store,
}

/// A running transport, and where others reach it.
#[derive(Debug)]
struct Started {
    transport: Arc<dyn Transport>,
    endpoints: Vec<Endpoint>,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Tcp => "tcp",
            Kind::Tls => "tls",
            Kind::Shm => "shm",
            Kind::Rdma => "rdma",
        }
    }

    fn start(
        self,
        identity: [u8; 32],
        terms: &Terms,
        grants: Arc<dyn Grants>,
        completions: impl Fn(Completion) + Send + Sync + 'static,
    ) -> Result<Started> {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let encryption = match self {
            Kind::Tcp => Encryption::Off,
            Kind::Tls => Encryption::Tls,
            Kind::Shm => {
                // Beside one thread's copies and hashes.
                let connections_per_peer = usize::from(terms.connections.unwrap_or(1));
                let config = ShmConfig { connections_per_peer, ..ShmConfig::default() };
                let shm = ShmTransport::start(&terms.sockets, grants, completions, config);
                let shm = shm.context("cannot start shared memory")?;
                let endpoints = vec![Endpoint::Shm(shm.path().to_path_buf())];
                return Ok(Started { endpoints, transport: shm });
            }
            Kind::Rdma => {
                let rdma = RdmaTransport::start(loopback, grants, completions, RdmaConfig::default());
                let rdma = rdma.context("cannot start RDMA; `aquifer doctor` says what this machine has")?;
                return Ok(Started { endpoints: vec![Endpoint::Rdma(rdma.local_addr())], transport: rdma });
            }
        };
        let identity = Some(NodeSecret::from_seed(identity));
        let mut config = TcpConfig { encryption, identity, ..TcpConfig::default() };
        if let Some(connections) = terms.connections {
            config.connections_per_peer = usize::from(connections);
            config.connections_per_peer_max = config.connections_per_peer;
        }
        let tcp = TcpTransport::start(loopback, grants, completions, config).context("cannot start TCP")?;
        Ok(Started { endpoints: vec![tcp.local_addr().into()], transport: tcp })
    }
}

/// What both ends must agree on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Terms {
    pub(super) kind: Kind,
    /// `None`: one of shared memory, and of TCP as many as an agent opens.
    pub(super) connections: Option<u16>,
    pub(super) bytes: u64,
    pub(super) chunk_bytes: u64,
    pub(super) origin: Origin,
    pub(super) destination: Destination,
    /// Where shared memory keeps its sockets.
    sockets: PathBuf,
    /// What a puller shows and a holder asks for.
    secret: [u8; 32],
}

impl Terms {
    /// From an engine's memory to another's.
    pub(super) fn new(kind: Kind, connections: Option<u16>, bytes: u64, chunk_bytes: u64, dir: &Path) -> Result<Self> {
        if chunk_bytes == 0 || chunk_bytes > CHUNK_BYTES_MAX {
            bail!("--chunk {chunk_bytes} is not a length of chunks: 1 to {CHUNK_BYTES_MAX} bytes are");
        }
        if let Some(connections) = connections.filter(|n| usize::from(*n) > CONNECTIONS_PER_PEER_MAX) {
            bail!("--conns {connections} is too many: {CONNECTIONS_PER_PEER_MAX} are the most to one peer");
        }
        let sockets = dir.join("shm");
        let (origin, destination) = (Origin::Memory, Destination::Region);
        Ok(Terms { kind, connections, bytes, chunk_bytes, origin, destination, sockets, secret: keys::random_bytes()? })
    }

    /// A store with room for all there is, and for as much again.
    fn store(&self) -> MemoryStore {
        MemoryStore::new(2 * self.bytes + SLAB_BYTES)
    }

    fn access(&self) -> Access {
        Access { ticket: 1, secret: self.secret }
    }

    fn chunks(&self, whole: &Span) -> Result<Vec<Span>> {
        let begins = (0..self.bytes).step_by(usize::try_from(self.chunk_bytes)?);
        begins.map(|begin| Ok(whole.slice(begin..(begin + self.chunk_bytes).min(self.bytes))?)).collect()
    }
}

/// Grants every chunk to the one puller there is.
#[derive(Debug)]
struct Open {
    access: Access,
    chunks: Vec<Span>,
}

impl Grants for Open {
    fn secret(&self, ticket: u64) -> Option<(NodeId, [u8; 32])> {
        (ticket == self.access.ticket).then_some((node(PULLER), self.access.secret))
    }

    fn open(&self, _: NodeId, lease: u64, chunk: u32) -> Result<Span, Refusal> {
        let chunk = self.chunks.get(chunk as usize).filter(|_| lease == LEASE);
        chunk.cloned().ok_or(Refusal::Unknown)
    }

    fn still_valid(&self, _: NodeId, lease: u64, _: u32) -> bool {
        lease == LEASE
    }

    fn sent(&self, _: NodeId, _: u64, _: u64) {}
}

/// How a puller finds what a holder has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Offer {
    /// As a status record says them.
    endpoints: Vec<String>,
    /// Of each chunk, in hexadecimal.
    digests: Vec<String>,
}

/// A holder, for as long as this lives.
#[derive(Debug)]
pub(super) struct Holding {
    _started: Started,
}

impl Holding {
    /// Makes the bytes, in memory or in a new file at `file`, and serves them.
    pub(super) fn start(terms: &Terms, file: &Path) -> Result<(Self, Offer)> {
        let whole = match terms.origin {
            Origin::File => {
                let mut new = std::fs::File::create_new(file).with_context(|| format!("cannot write {file:?}"))?;
                content::write(&mut new, terms.bytes).with_context(|| format!("cannot write {file:?}"))?;
                Mapping::file(file)?.span()
            }
            Origin::Memory | Origin::Store => {
                let (mapping, _) = Mapping::memfd("aquifer-bench-holder", terms.bytes)?;
                content::fill(&mapping.span())?;
                mapping.span()
            }
        };
        let mut chunks = terms.chunks(&whole)?;
        drop(whole);
        let hashes = chunks.iter().map(Span::hash).collect::<io::Result<Vec<_>>>()?;
        if terms.origin == Origin::Store {
            let store = terms.store();
            chunks =
                chunks.iter().zip(&hashes).map(|(chunk, hash)| put(&store, *hash, chunk)).collect::<Result<_>>()?;
        }
        let grants = Arc::new(Open { access: terms.access(), chunks });
        let started = terms.kind.start(HOLDER, terms, grants, |_| {})?;
        let endpoints = started.endpoints.iter().map(ToString::to_string).collect();
        let offer = Offer { endpoints, digests: hashes.iter().map(ToString::to_string).collect() };
        Ok((Holding { _started: started }, offer))
    }
}

fn put(store: &MemoryStore, hash: ChunkHash, bytes: &Span) -> Result<Span> {
    let reservation = store.reserve(hash, bytes.len())?;
    bytes.copy_to(0, reservation.span(), 0, bytes.len())?;
    Ok(reservation.commit()?)
}

/// A puller, and the memory it lands in.
#[derive(Debug)]
pub(super) struct Pulling {
    terms: Terms,
    endpoints: Vec<Endpoint>,
    window: usize,
    names: Vec<ChunkHash>,
    landing: Landing,
    started: Started,
    completions: Receiver<Completion>,
    next_id: u64,
}

#[derive(Debug)]
enum Landing {
    /// Made as an engine's is, and touched.
    Region(Vec<Span>),
    Store(MemoryStore, BTreeMap<u64, Reservation>),
}

impl Pulling {
    pub(super) fn start(terms: Terms, offer: &Offer, window: u32) -> Result<Self> {
        let landing = match terms.destination {
            Destination::Region => {
                let (mapping, _) = Mapping::memfd("aquifer-bench-engine", terms.bytes)?;
                mapping.span().prefault();
                Landing::Region(terms.chunks(&mapping.span())?)
            }
            Destination::Store => Landing::Store(terms.store(), BTreeMap::new()),
        };
        let names = offer.digests.iter().map(|d| Ok(ChunkHash(d.parse()?))).collect::<Result<Vec<_>>>()?;
        let chunks = terms.bytes.div_ceil(terms.chunk_bytes);
        if names.len() as u64 != chunks {
            bail!("{} digests were given for {chunks} chunks", names.len());
        }
        let window = usize::try_from(window)?;
        let (sender, completions) = sync_channel(window);
        let completed = move |completion| {
            // Nobody listens once this puller is gone.
            let _ = sender.send(completion);
        };
        // A puller grants nothing.
        let grants = Arc::new(Open { access: terms.access(), chunks: Vec::new() });
        let started = terms.kind.start(PULLER, &terms, grants, completed)?;
        let endpoints = offer.endpoints.iter().filter_map(|text| Endpoint::parse(text)).collect();
        Ok(Pulling { terms, endpoints, window, names, landing, started, completions, next_id: 0 })
    }

    /// Reads every chunk and compares its digest. What is found in place came just now: a few bytes of
    /// each are spoilt before, or it is removed.
    pub(super) fn pull(&mut self) -> Result<Took> {
        match &self.landing {
            Landing::Region(spans) => {
                for span in spans {
                    span.write(0, &[0xff; 8][..usize::try_from(span.len().min(8))?])?;
                }
            }
            Landing::Store(store, _) => self.names.iter().for_each(|name| {
                store.remove(name);
            }),
        }
        let (start, first_id) = (Instant::now(), self.next_id);
        let last_id = first_id + self.names.len() as u64;
        while self.next_id < last_id.min(first_id + self.window as u64) {
            self.submit_next(first_id)?;
        }
        for _ in 0..self.names.len() {
            let Completion { id, result } = self.next_completion()?;
            let chunk = usize::try_from(id - first_id)?;
            let done = result.with_context(|| format!("chunk {chunk} was not read"))?;
            if done.digest != self.names[chunk] {
                bail!("chunk {chunk} came with other bytes than it should have");
            }
            if let Landing::Store(_, reservations) = &mut self.landing
                && let Some(reservation) = reservations.remove(&id)
            {
                match done.adopted {
                    Some(bytes) => reservation.adopt(bytes)?,
                    None => reservation.commit()?,
                };
            }
            if self.next_id < last_id {
                self.submit_next(first_id)?;
            }
        }
        Ok(Took::since(start, self.terms.bytes))
    }

    /// Hashes what lies in memory now, without the transport.
    pub(super) fn check(&self) -> Result<()> {
        for (chunk, name) in self.names.iter().enumerate() {
            let span = match &self.landing {
                Landing::Region(spans) => spans.get(chunk).cloned(),
                Landing::Store(store, _) => store.get(name),
            };
            if span.is_none_or(|span| !span.hash().is_ok_and(|hash| hash == *name)) {
                bail!("chunk {chunk} is said to be there and is not");
            }
        }
        Ok(())
    }

    pub(super) fn bytes(&self) -> u64 {
        self.terms.bytes
    }

    fn submit_next(&mut self, first_id: u64) -> Result<()> {
        let id = self.next_id;
        self.next_id += 1;
        let chunk = usize::try_from(id - first_id)?;
        let (into, adopts) = match &mut self.landing {
            Landing::Region(spans) => (spans[chunk].clone(), false),
            Landing::Store(store, reservations) => {
                let begin = chunk as u64 * self.terms.chunk_bytes;
                let reservation =
                    store.reserve(self.names[chunk], self.terms.chunk_bytes.min(self.terms.bytes - begin))?;
                let into = reservation.span().clone();
                let adopts = reservation.adopts();
                reservations.insert(id, reservation);
                (into, adopts)
            }
        };
        self.started.transport.submit(Operation::Read(ReadOp {
            id,
            peer: node(HOLDER),
            endpoints: self.endpoints.clone(),
            access: self.terms.access(),
            lease: LEASE,
            chunk: u32::try_from(chunk)?,
            into,
            adopts,
            stall: STALL,
        }));
        Ok(())
    }

    fn next_completion(&self) -> Result<Completion> {
        match self.completions.recv_timeout(2 * STALL) {
            Ok(completion) => Ok(completion),
            Err(RecvTimeoutError::Timeout) => bail!("the transport owes a completion and does not give it"),
            Err(RecvTimeoutError::Disconnected) => bail!("the transport has ended"),
        }
    }
}

fn node(seed: [u8; 32]) -> NodeId {
    NodeSecret::from_seed(seed).public()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RDMA is not everywhere.
    const HERE: [Kind; 3] = [Kind::Tcp, Kind::Tls, Kind::Shm];

    #[test]
    fn chunks_are_pulled_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        for kind in HERE {
            let terms = Terms::new(kind, Some(2), 1_000_001, 100_000, dir.path()).unwrap();
            let (_holding, offer) = Holding::start(&terms, dir.path()).unwrap();
            assert_eq!(offer.digests.len(), 11);
            let mut pulling = Pulling::start(terms, &offer, 3).unwrap();
            assert!(pulling.check().is_err());
            for _ in 0..3 {
                assert_eq!(pulling.pull().unwrap().bytes, 1_000_001);
                pulling.check().unwrap();
            }
        }
    }

    #[test]
    fn a_store_gets_what_a_store_has() {
        let dir = tempfile::tempdir().unwrap();
        for kind in HERE {
            let (origin, destination) = (Origin::Store, Destination::Store);
            let terms =
                Terms { origin, destination, ..Terms::new(kind, Some(2), 80 << 20, 1 << 20, dir.path()).unwrap() };
            let (_holding, offer) = Holding::start(&terms, dir.path()).unwrap();
            let mut pulling = Pulling::start(terms, &offer, 3).unwrap();
            assert!(pulling.check().is_err());
            for _ in 0..3 {
                pulling.pull().unwrap();
                pulling.check().unwrap();
            }
        }
    }

    #[test]
    fn wrong_bytes_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let origin = Origin::File;
        let terms = Terms { origin, ..Terms::new(Kind::Tcp, None, 100_000, 10_000, dir.path()).unwrap() };
        let (_holding, mut offer) = Holding::start(&terms, &dir.path().join("f")).unwrap();
        offer.digests[7] = ChunkHash::of(b"other").to_string();
        let error = Pulling::start(terms, &offer, 10).unwrap().pull().unwrap_err().to_string();
        assert!(error.contains("chunk 7 came with other bytes"), "{error}");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(Terms::new(Kind::Tcp, Some(99), 1, 1, Path::new("")).is_err());
        assert!(Terms::new(Kind::Tcp, None, 1, 0, Path::new("")).is_err());
        assert!(Terms::new(Kind::Tcp, None, 1, u64::MAX, Path::new("")).is_err());
    }
}
