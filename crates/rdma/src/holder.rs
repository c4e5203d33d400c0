//! The serving side: shows readers what they were granted, and hides it again. Its threads move no
//! payload, but for chunks that cannot be shown where they lie.

use crate::config::{Counters, RdmaConfig, count};
use crate::error::RdmaError;
use crate::limits::{
    ACCEPT_BACKOFF, ACCEPTED_PER_PEER_MAX, SCOLDED_MAX, SHOW_PATIENCE, SHOW_RETRY, THREAD_STACK_BYTES, WRITE_TIMEOUT,
};
use crate::rail::{Rail, nearest};
use crate::serving::{Serving, Shown};
use crate::verbs::Region;
use crate::wire::{
    FRAME_BYTES, FromHolder, FromReader, OFFER_BYTES, Outcome, decode_offer, encode_no_port, encode_offer,
};
use crate::workers::Workers;
use aquifer_core::NodeId;
use aquifer_memory::{Span, StagingPool};
use aquifer_transport::side::{Fault, examine};
use aquifer_transport::{Grants, Refusal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) struct Holder {
    config: RdmaConfig,
    grants: Arc<dyn Grants>,
    counters: Arc<Counters>,
    rails: Arc<Vec<Arc<Rail>>>,
    staging: StagingPool,
    registering: Arc<Workers>,
    listener: TcpListener,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    closing: bool,
    next: u64,
    connections: BTreeMap<u64, Arc<TcpStream>>,
    unauthenticated: usize,
    per_peer: BTreeMap<NodeId, usize>,
    /// Who misbehaved and was logged.
    scolded: BTreeSet<IpAddr>,
    threads: usize,
}

/// Why a connection ended, other than by the reader's wish.
enum End {
    /// The reader did what an honest one would not.
    Misbehaved(&'static str),
    /// This machine's own trouble.
    Own(String),
    /// The network's, or nothing to speak of.
    Lost(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        End::Lost(error)
    }
}

impl From<Fault> for End {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Misbehaved(reason) => End::Misbehaved(reason),
            Fault::Lost(error) => End::Lost(error),
        }
    }
}

impl Holder {
    pub(crate) fn start(
        listener: TcpListener,
        config: RdmaConfig,
        rails: Arc<Vec<Arc<Rail>>>,
        registering: Arc<Workers>,
        grants: Arc<dyn Grants>,
        counters: Arc<Counters>,
    ) -> io::Result<Arc<Self>> {
        let state = Mutex::new(State { threads: 1, ..State::default() });
        let staging = StagingPool::new(config.staging_bytes);
        let ended = Condvar::new();
        let holder = Arc::new(Holder { config, grants, counters, rails, staging, registering, listener, state, ended });
        let accepting = holder.clone();
        thread::Builder::new().name("aquifer-rdma-in".into()).stack_size(THREAD_STACK_BYTES).spawn(move || {
            accepting.accept_all();
            accepting.leave();
        })?;
        Ok(holder)
    }

    /// Stops accepting and cuts every connection.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        // On Linux this wakes accept(2) with EINVAL.
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        for stream in state.connections.values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    pub(crate) fn join(&self) {
        let mut state = self.lock();
        while state.threads > 0 {
            state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counts and maps change together without anything between that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self) {
        self.lock().threads -= 1;
        self.ended.notify_all();
    }

    fn accept_all(self: &Arc<Self>) {
        loop {
            match self.listener.accept() {
                Ok((stream, from)) => self.admit(stream, from),
                Err(_) if self.lock().closing => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!("cannot accept RDMA side connections: {error}");
                    thread::sleep(ACCEPT_BACKOFF);
                }
            }
        }
    }

    /// Starts a thread for a new connection, if there is room for one.
    fn admit(self: &Arc<Self>, stream: TcpStream, from: SocketAddr) {
        let stream = Arc::new(stream);
        let id = {
            let mut state = self.lock();
            let full = state.connections.len() >= self.config.accepted_max
                || state.unauthenticated >= self.config.unauthenticated_max;
            if full || state.closing {
                count(&self.counters.rejected, 1);
                tracing::debug!("no room for an RDMA side connection from {from}");
                return;
            }
            state.next += 1;
            state.unauthenticated += 1;
            state.threads += 1;
            let id = state.next;
            state.connections.insert(id, stream.clone());
            id
        };
        let seat = Seat { holder: self.clone(), id, peer: None, waiting: VecDeque::new(), answered: Instant::now() };
        let serving = move || {
            let mut seat = seat;
            if let Err(end) = seat.serve(&stream) {
                seat.holder.report(from, end);
            }
            let _ = stream.shutdown(std::net::Shutdown::Both);
        };
        let name = format!("aquifer-show-{id}");
        if let Err(error) = thread::Builder::new().name(name).stack_size(THREAD_STACK_BYTES).spawn(serving) {
            tracing::warn!("cannot start a thread for an RDMA side connection: {error}"); // and the seat is dropped
        }
    }

    fn report(&self, from: SocketAddr, end: End) {
        let reason: &dyn fmt::Display = match &end {
            End::Lost(error) => return tracing::debug!("RDMA side connection from {from} ended: {error}"),
            End::Own(reason) => return tracing::warn!("cannot serve {from} over RDMA: {reason}"),
            End::Misbehaved(reason) => reason,
        };
        count(&self.counters.rejected, 1);
        let mut state = self.lock();
        let first = state.scolded.len() < SCOLDED_MAX && state.scolded.insert(from.ip());
        drop(state);
        match first {
            true => tracing::warn!("closed an RDMA side connection from {from}: {reason}; more is not logged"),
            false => tracing::debug!("closed an RDMA side connection from {from}: {reason}"),
        }
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Holder({} connections)", self.lock().connections.len())
    }
}

/// One connection's place in the holder's counts.
struct Seat {
    holder: Arc<Holder>,
    id: u64,
    /// Known once it has shown a ticket.
    peer: Option<NodeId>,
    waiting: VecDeque<Waiting>,
    answered: Instant,
}

/// A request without an answer: for want of staging memory, or while its memory is being registered.
struct Waiting {
    number: u32,
    shown: Shown,
    since: Instant,
    preparing: Option<Preparing>,
}

/// What is to be shown, and the news of its registration.
struct Preparing {
    source: Span,
    registered: Receiver<Result<Arc<Region>, RdmaError>>,
}

/// What became of a request.
enum Step {
    Answered(FromHolder),
    /// There is no staging memory for it now, nor for those behind it.
    Crowded,
    Registering,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.holder.lock();
        state.connections.remove(&self.id);
        match self.peer {
            None => state.unauthenticated -= 1,
            Some(peer) => {
                let count = state.per_peer.entry(peer).or_insert(1);
                *count -= 1;
                if *count == 0 {
                    state.per_peer.remove(&peer);
                }
            }
        }
        drop(state);
        self.holder.leave();
    }
}

impl Seat {
    fn serve(&mut self, stream: &TcpStream) -> Result<(), End> {
        let holder = self.holder.clone();
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let peer = examine(stream, &*holder.grants, holder.config.handshake_timeout, |peer| self.sit(peer))?;
        let mut serving = self.connect(stream)?;
        count(&holder.counters.accepted, 1);
        loop {
            if serving.is_review_due() {
                self.review(&mut serving, peer)?;
            }
            self.answer_waiting(stream, &mut serving, peer)?;
            match await_frame(stream, self.until_next(&serving))? {
                None if serving.until_review().is_none() && self.waiting.is_empty() => {
                    return Err(End::Lost(io::ErrorKind::TimedOut.into()));
                }
                None => {}
                Some(FromReader::Request { number, chunk, len, lease }) => {
                    self.on_request(&serving, number, Shown { lease, chunk, len })?;
                }
                Some(FromReader::Done { number, outcome }) => {
                    if let Some(valid) = self.finish(&mut serving, peer, number, outcome)? {
                        say(stream, FromHolder::Verdict { number, valid })?;
                    }
                }
            }
        }
    }

    /// How long the reader may be silent before there is something else to do.
    fn until_next(&self, serving: &Serving) -> Duration {
        let retry = (!self.waiting.is_empty()).then_some(SHOW_RETRY);
        let next = [retry, serving.until_review()].into_iter().flatten().min();
        next.unwrap_or(self.holder.config.accepted_idle_timeout)
    }

    /// Counts the connection as the peer's, unless that has too many.
    fn sit(&mut self, peer: NodeId) -> bool {
        let mut state = self.holder.lock();
        let count = state.per_peer.entry(peer).or_insert(0);
        if *count >= ACCEPTED_PER_PEER_MAX {
            return false;
        }
        *count += 1;
        state.unauthenticated -= 1;
        self.peer = Some(peer);
        true
    }

    /// Connects queue pairs, over the port that is nearest to the reader's.
    fn connect(&self, mut stream: &TcpStream) -> Result<Serving, End> {
        let mut offer = [0; OFFER_BYTES];
        stream.set_read_timeout(Some(self.holder.config.handshake_timeout))?;
        stream.read_exact(&mut offer)?;
        let remote = decode_offer(&offer).map_err(End::Misbehaved)?;
        let made = match nearest(&self.holder.rails, &remote.gid) {
            Some(rail) => Serving::connect(rail, &remote),
            None => {
                stream.write_all(&encode_no_port())?;
                return Err(End::Own("no port is up".into()));
            }
        };
        match made {
            Ok((serving, address)) => {
                stream.write_all(&encode_offer(&address))?;
                Ok(serving)
            }
            Err(error) => {
                stream.write_all(&encode_no_port())?;
                Err(End::Own(error.to_string()))
            }
        }
    }

    fn on_request(&mut self, serving: &Serving, number: u32, shown: Shown) -> Result<(), End> {
        let is_known = self.waiting.iter().any(|waiting| waiting.number == number);
        if is_known || !serving.has_room_for(number, self.waiting.len()) {
            return Err(End::Misbehaved("it asks for more at a time than was agreed, or twice by one number"));
        }
        self.waiting.push_back(Waiting { number, shown, since: Instant::now(), preparing: None });
        Ok(())
    }

    /// Answers requests in their order: those whose memory is being registered are passed by, and behind one
    /// that finds no staging memory none takes any. The thread does not wait: it may be this very reader that
    /// gives some back.
    fn answer_waiting(&mut self, stream: &TcpStream, serving: &mut Serving, peer: NodeId) -> Result<(), End> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let mut crowded = false;
        while let Some(mut request) = waiting.pop_front() {
            let step = match crowded && request.preparing.is_none() {
                true => Step::Crowded,
                false => self.answer(serving, peer, &mut request)?,
            };
            crowded |= matches!(step, Step::Crowded);
            // As the reader sees it: any answer says that this node is not silent.
            let patient = self.answered.max(request.since).elapsed() < SHOW_PATIENCE;
            let answer = match step {
                Step::Answered(answer) => answer,
                Step::Crowded | Step::Registering if patient => {
                    self.waiting.push_back(request);
                    continue;
                }
                Step::Crowded | Step::Registering => FromHolder::Unavailable { number: request.number },
            };
            say(stream, answer)?;
            self.answered = Instant::now();
        }
        Ok(())
    }

    fn answer(&self, serving: &mut Serving, peer: NodeId, request: &mut Waiting) -> Result<Step, End> {
        let (number, shown) = (request.number, request.shown);
        let (source, registered) = match request.preparing.take() {
            Some(preparing) => match preparing.registered.try_recv() {
                Ok(registered) => (preparing.source, registered),
                Err(TryRecvError::Empty) => {
                    request.preparing = Some(preparing);
                    return Ok(Step::Registering);
                }
                Err(TryRecvError::Disconnected) => {
                    return Err(End::Own("a thread that registers memory panicked".into()));
                }
            },
            None => {
                let source = match self.source(serving, peer, shown)? {
                    Ok(Some(source)) => source,
                    Ok(None) => return Ok(Step::Crowded),
                    Err(refusal) => return Ok(Step::Answered(FromHolder::Refused { number, refusal })),
                };
                match serving.rail().regions.registered(&source, serving.rail().serving_access()) {
                    Some(region) => (source, Ok(region)),
                    None => {
                        request.preparing = Some(self.prepare(serving.rail(), source));
                        return Ok(Step::Registering);
                    }
                }
            }
        };
        let remote = registered.and_then(|region| serving.show(number, shown, source, region));
        match remote {
            Ok(remote) => Ok(Step::Answered(FromHolder::Granted { number, remote })),
            Err(error) if serving.is_broken() => Err(End::Own(error.to_string())),
            Err(error) => {
                // Of too little memory that may be locked, whoever ran into it was told.
                if !matches!(error, RdmaError::Memlock { .. }) {
                    tracing::warn!("a chunk is not served over RDMA: {error}");
                }
                Ok(Step::Answered(FromHolder::Unavailable { number }))
            }
        }
    }

    /// The memory that a chunk is shown in; `None` while there is no room to stage it.
    fn source(&self, serving: &Serving, peer: NodeId, shown: Shown) -> Result<Result<Option<Span>, Refusal>, End> {
        let span = match self.holder.grants.open(peer, shown.lease, shown.chunk).and_then(whole) {
            Ok(span) if span.len() != u64::from(shown.len) => {
                return Err(End::Misbehaved("it asks for a chunk by the wrong length"));
            }
            Ok(span) => span,
            Err(refusal) => return Ok(Err(refusal)),
        };
        // Memory around a chunk is nobody's business, and pages of a file cannot be registered: kernels
        // before 6.2 pin shared pages only where they may be written, and truncation leaves whoever pinned
        // them with bytes that are nobody's any more.
        Ok(match span.is_writable() && serving.shows_parts() {
            true => Ok(Some(span)),
            false => self.staged(&span).map_err(|_| Refusal::Gone),
        })
    }

    /// Has memory registered, on another thread: this one has leases to look at.
    fn prepare(&self, rail: &Arc<Rail>, source: Span) -> Preparing {
        let (news, registered) = channel();
        let (rail, wanted) = (rail.clone(), source.clone());
        self.holder.registering.give(move || {
            // A connection that has ended has no use for it.
            let _ = news.send(rail.regions.of(&wanted, rail.serving_access()));
        });
        Preparing { source, registered }
    }

    /// A copy of a chunk that cannot be shown where it lies; `None` while there is no room for one.
    fn staged(&self, span: &Span) -> io::Result<Option<Span>> {
        let Some(copy) = self.holder.staging.try_take(span.len()) else { return Ok(None) };
        span.copy_to(0, &copy, 0, span.len())?;
        count(&self.holder.counters.staged, span.len());
        Ok(Some(copy))
    }

    /// The reader is done with a chunk: it is hidden first, then the lease looked at, so that what is
    /// called valid was so for as long as it could be read.
    fn finish(&self, serving: &mut Serving, peer: NodeId, number: u32, outcome: Outcome) -> Result<Option<bool>, End> {
        let hidden = serving.hide(number).map_err(stopped)?;
        let Some(Shown { lease, chunk, len }) = hidden else {
            return match serving.was_withdrawn(number) {
                true => Ok((outcome != Outcome::LetBe).then_some(false)),
                false => Err(End::Misbehaved("it is done with what it did not ask for")),
            };
        };
        if outcome == Outcome::LetBe {
            return Ok(None);
        }
        if outcome == Outcome::Read {
            count(&self.holder.counters.served, u64::from(len));
            self.holder.grants.sent(peer, u64::from(len));
        }
        Ok(Some(self.holder.grants.still_valid(peer, lease, chunk)))
    }

    /// Hides what is no longer under its lease, though its reader is not done.
    fn review(&self, serving: &mut Serving, peer: NodeId) -> Result<(), End> {
        let ended = serving.numbers(|shown| !self.holder.grants.still_valid(peer, shown.lease, shown.chunk));
        for number in ended {
            serving.withdraw(number).map_err(stopped)?;
        }
        Ok(())
    }
}

/// The reader's next words, if it says any in time.
fn await_frame(mut stream: &TcpStream, patience: Duration) -> Result<Option<FromReader>, End> {
    if !is_readable(stream, patience)? {
        return Ok(None);
    }
    let mut frame = [0; FRAME_BYTES];
    // A frame is sent at once: its rest comes soon, or never.
    stream.set_read_timeout(Some(WRITE_TIMEOUT))?;
    stream.read_exact(&mut frame)?;
    FromReader::decode(&frame).map(Some).map_err(End::Misbehaved)
}

fn is_readable(stream: &TcpStream, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn say(mut stream: &TcpStream, answer: FromHolder) -> io::Result<()> {
    stream.write_all(&answer.encode())
}

/// A window that cannot be closed says that the queue pair has stopped, as it does when its reader reads
/// what it may not. The window goes with it.
fn stopped(error: RdmaError) -> End {
    End::Lost(io::Error::other(error))
}

/// A chunk whose file is too short by now is gone.
fn whole(span: Span) -> Result<Span, Refusal> {
    match span.is_backed() {
        Ok(true) => Ok(span),
        Ok(false) | Err(_) => Err(Refusal::Gone),
    }
}
