//! The transport, put together.

use crate::config::{Counters, RdmaConfig, RdmaStats};
use crate::error::RdmaError;
use crate::holder::Holder;
use crate::limits::{REGISTERING_THREADS_MAX, REGISTERING_THREADS_MIN};
use crate::rail::Rail;
use crate::reader::Reader;
use crate::topology::{Nearness, SYSFS, Topology};
use crate::workers::Workers;
use aquifer_transport::{Completion, Grants, Operation, Transport};
use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::thread;

/// See the crate. Dropping it ends every read and closes every connection.
pub struct RdmaTransport {
    local: SocketAddr,
    rails: Arc<Vec<Arc<Rail>>>,
    counters: Arc<Counters>,
    reader: Reader,
    holder: Holder,
}

impl RdmaTransport {
    /// Opens the devices that `config` names, listens for side connections on `listen` and serves what
    /// `grants` allow. `completions` is called from this transport's threads, and from within `submit`,
    /// with no lock held; it may submit, but must not panic nor call `shutdown`. An error says why this
    /// machine has no use for this transport.
    pub fn start(
        listen: SocketAddr,
        grants: Arc<dyn Grants>,
        completions: impl Fn(Completion) + Send + Sync + 'static,
        config: RdmaConfig,
    ) -> Result<Arc<Self>, RdmaError> {
        let rails = Arc::new(Rail::open_all(&config)?);
        let listener = TcpListener::bind(listen).map_err(RdmaError::system("listening for side connections"))?;
        let local = listener.local_addr().map_err(RdmaError::system("getsockname"))?;
        let counters = Arc::new(Counters::default());
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / 4).clamp(REGISTERING_THREADS_MIN, REGISTERING_THREADS_MAX);
        let registering = Workers::start("register", threads);
        let registering = Arc::new(registering.map_err(RdmaError::system("starting a thread"))?);
        let ports = rails.iter().map(|rail| rail.numa_node()).collect();
        let nearness = Nearness::new(Topology::read(Path::new(SYSFS)), ports);
        let reader = Reader::start(
            config.clone(),
            rails.clone(),
            nearness,
            registering.clone(),
            Box::new(completions),
            counters.clone(),
        )?;
        let holder = Holder::start(listener, config, rails.clone(), registering, grants, counters.clone())
            .map_err(RdmaError::system("starting a thread"))?;
        Ok(Arc::new(RdmaTransport { local, rails, counters, reader, holder }))
    }

    /// Where it listens for side connections; the port is the real one if 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The ports in use, in words.
    pub fn ports(&self) -> Vec<String> {
        self.rails.iter().map(|rail| rail.describe()).collect()
    }

    pub fn stats(&self) -> RdmaStats {
        let totals = self.rails.iter().map(|rail| rail.regions.totals());
        let (regions, registered_bytes) = totals.fold((0, 0), |(n, sum), (count, bytes)| (n + count, sum + bytes));
        let (accepted, rejected) = (self.holder.room().accepted(), self.holder.room().rejected());
        RdmaStats { accepted, rejected, regions, registered_bytes, ..self.counters.read() }
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

impl Transport for RdmaTransport {
    fn name(&self) -> &'static str {
        "rdma"
    }

    fn submit(&self, operation: Operation) {
        match operation {
            Operation::Read(op) => self.reader.read(op),
            Operation::Cancel(id) => self.reader.cancel(id),
            Operation::Disconnect(peer) => self.reader.disconnect(peer),
        }
    }
}

impl Drop for RdmaTransport {
    fn drop(&mut self) {
        self.holder.room().close();
        self.reader.close();
    }
}

impl fmt::Debug for RdmaTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RdmaTransport({}, {:?}, {:?})", self.local, self.rails, self.stats())
    }
}
