//! The reading side, seen from outside: commands go to the one thread that owns it.

mod driver;
mod flight;
mod join;
mod link;
mod peer;

use crate::config::{Counters, RdmaConfig};
use crate::error::RdmaError;
use crate::limits::{COMPLETIONS_MAX, HASHING_THREADS_MAX, THREAD_STACK_BYTES};
use crate::rail::Rail;
use crate::topology::Nearness;
use crate::verbs::{CompletionQueue, Region};
use crate::workers::Workers;
use aquifer_core::{Access, ChunkHash, NodeId};
use aquifer_transport::{Completion, OpId, ReadError, ReadOp};
use driver::{Driver, World};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

pub(crate) type Completions = Box<dyn Fn(Completion) + Send + Sync>;

pub(crate) const SHUTTING_DOWN: &str = "this node's transport is shutting down";
const ASKED_TO: &str = "this node closed its connections to the peer";

/// Names one connection of the reading side, from the attempt to connect on.
pub(crate) type LinkId = u64;

/// What the driver is told.
pub(crate) enum Command {
    Read(ReadOp),
    Cancel(OpId),
    Disconnect(NodeId),
    Close,
    /// A connection was made, or could not be, by that way in.
    Joined {
        link: LinkId,
        peer: NodeId,
        access: Access,
        result: Box<Result<join::Joined, ReadError>>,
    },
    /// The landing place of a read is registered, or cannot be.
    Registered {
        link: LinkId,
        number: u32,
        result: Result<Arc<Region>, RdmaError>,
    },
    Hashed {
        link: LinkId,
        number: u32,
        result: io::Result<ChunkHash>,
    },
}

/// Where commands wait for the driver.
pub(crate) struct Inbox {
    state: Mutex<Waiting>,
    wake: OwnedFd,
}

#[derive(Default)]
struct Waiting {
    commands: VecDeque<Command>,
    /// The driver has ended and takes no more.
    closed: bool,
}

impl Inbox {
    fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Inbox { state: Mutex::default(), wake })
    }

    /// False, if there is no driver any more.
    pub(crate) fn put(&self, command: Command) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        let first = state.commands.is_empty();
        state.commands.push_back(command);
        drop(state);
        if first {
            // It can fail only where the counter is full, and then the driver is awake.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
        true
    }

    fn take(&self) -> VecDeque<Command> {
        std::mem::take(&mut self.lock().commands)
    }

    fn close(&self) -> VecDeque<Command> {
        let mut state = self.lock();
        state.closed = true;
        std::mem::take(&mut state.commands)
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Each change is a single push, take or store.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct Reader {
    inbox: Arc<Inbox>,
    completions: Arc<Completions>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Reader {
    pub(crate) fn start(
        config: RdmaConfig,
        rails: Arc<Vec<Arc<Rail>>>,
        nearness: Nearness,
        registering: Arc<Workers>,
        completions: Completions,
        counters: Arc<Counters>,
    ) -> Result<Self, RdmaError> {
        let inbox = Arc::new(Inbox::new().map_err(RdmaError::system("eventfd"))?);
        let completions = Arc::new(completions);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let hashing = Workers::start("hash", cores.clamp(2, HASHING_THREADS_MAX));
        let hashing = hashing.map_err(RdmaError::system("starting a thread"))?;
        let queues: Result<Vec<_>, RdmaError> =
            rails.iter().map(|rail| CompletionQueue::new(rail.device(), COMPLETIONS_MAX).map(Arc::new)).collect();
        let world = World { config, rails, queues: queues?, nearness, hashing, registering };
        let mut driver = Driver::new(world, inbox.clone(), completions.clone(), counters);
        let spawned = thread::Builder::new().name("aquifer-rdma".into()).stack_size(THREAD_STACK_BYTES);
        let thread = spawned.spawn(move || driver.run()).map_err(RdmaError::system("starting a thread"))?;
        Ok(Reader { inbox, completions, thread: Mutex::new(Some(thread)) })
    }

    pub(crate) fn read(&self, op: ReadOp) {
        let id = op.id;
        if let Err(reason) = check_landing(&op) {
            return (self.completions)(Completion { id, result: Err(ReadError::Landing(reason)) });
        }
        if !self.inbox.put(Command::Read(op)) {
            (self.completions)(Completion { id, result: Err(ReadError::Disconnected(SHUTTING_DOWN.into())) });
        }
    }

    pub(crate) fn cancel(&self, id: OpId) {
        // Where the driver has ended, so has every read.
        self.inbox.put(Command::Cancel(id));
    }

    pub(crate) fn disconnect(&self, peer: NodeId) {
        self.inbox.put(Command::Disconnect(peer));
    }

    pub(crate) fn close(&self) {
        self.inbox.put(Command::Close);
    }

    pub(crate) fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that drives the RDMA devices panicked");
        }
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reader({} commands wait)", self.inbox.lock().commands.len())
    }
}

fn check_landing(op: &ReadOp) -> Result<(), String> {
    match u32::try_from(op.into.len()) {
        _ if !op.into.is_writable() => Err("the landing place is read-only".into()),
        Ok(0) | Err(_) => Err(format!("a chunk has no {} bytes", op.into.len())),
        Ok(_) => Ok(()),
    }
}
