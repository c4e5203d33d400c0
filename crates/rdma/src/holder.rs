//! The serving side: shows readers what they were granted, and hides it again. Its threads move no
//! payload, but for chunks that cannot be shown where they lie.

use crate::config::{Counters, RdmaConfig, count};
use crate::error::RdmaError;
use crate::limits::{ACCEPTED_PER_PEER_MAX, SHOW_PATIENCE, SHOW_RETRY, WRITE_TIMEOUT};
use crate::rail::{Rail, nearest};
use crate::serving::{Serving, Shown};
use crate::verbs::Region;
use crate::wire::{
    FRAME_BYTES, FromHolder, FromReader, OFFER_BYTES, Outcome, decode_offer, encode_no_port, encode_offer,
};
use crate::workers::Workers;
use aquifer_core::NodeId;
use aquifer_memory::{Span, StagingPool};
use aquifer_transport::room::{End, Room, RoomTerms, Seat};
use aquifer_transport::side::examine;
use aquifer_transport::{Grants, Refusal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

/// Serves readers over RDMA.
#[derive(Debug)]
pub(crate) struct Holder(Arc<Room<TcpListener>>);

/// What all connections serve from.
struct Showing {
    config: RdmaConfig,
    grants: Arc<dyn Grants>,
    counters: Arc<Counters>,
    rails: Arc<Vec<Arc<Rail>>>,
    staging: StagingPool,
    registering: Arc<Workers>,
}

impl Holder {
    pub(crate) fn start(
        listener: TcpListener,
        config: RdmaConfig,
        rails: Arc<Vec<Arc<Rail>>>,
        registering: Arc<Workers>,
        grants: Arc<dyn Grants>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let terms = RoomTerms {
            accepted_max: config.accepted_max,
            unauthenticated_max: config.unauthenticated_max,
            per_peer_max: ACCEPTED_PER_PEER_MAX,
            what: "an RDMA side connection",
            threads: "aquifer-show",
        };
        let staging = StagingPool::new(config.staging_bytes);
        let showing = Showing { config, grants, counters, rails, staging, registering };
        Room::open(listener, terms, move |seat, stream| showing.serve(seat, stream)).map(Holder)
    }

    pub(crate) fn room(&self) -> &Room<TcpListener> {
        &self.0
    }
}

impl Showing {
    fn serve(&self, seat: &mut Seat<TcpListener>, stream: &TcpStream) -> Result<(), End> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let peer = examine(stream, &*self.grants, self.config.handshake_timeout, |peer| seat.sit(peer))?;
        let serving = self.connect(stream)?;
        let (waiting, answered) = (VecDeque::new(), Instant::now());
        Reader { showing: self, stream, peer, serving, waiting, answered }.serve()
    }

    /// Connects queue pairs, over the port that is nearest to the reader's.
    fn connect(&self, mut stream: &TcpStream) -> Result<Serving, End> {
        let mut offer = [0; OFFER_BYTES];
        stream.set_read_timeout(Some(self.config.handshake_timeout))?;
        stream.read_exact(&mut offer)?;
        let remote = decode_offer(&offer).map_err(End::Misbehaved)?;
        let made = match nearest(&self.rails, &remote.gid) {
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
}

/// The reader at the other end of one connection, and what it asked for.
struct Reader<'a> {
    showing: &'a Showing,
    stream: &'a TcpStream,
    peer: NodeId,
    serving: Serving,
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

impl Reader<'_> {
    fn serve(mut self) -> Result<(), End> {
        loop {
            if self.serving.is_review_due() {
                self.review()?;
            }
            self.answer_waiting()?;
            match await_frame(self.stream, self.until_next())? {
                None if self.serving.until_review().is_none() && self.waiting.is_empty() => {
                    return Err(End::Lost(io::ErrorKind::TimedOut.into()));
                }
                None => {}
                Some(FromReader::Request { number, chunk, len, lease }) => {
                    self.on_request(number, Shown { lease, chunk, len })?;
                }
                Some(FromReader::Done { number, outcome }) => {
                    if let Some(valid) = self.finish(number, outcome)? {
                        say(self.stream, FromHolder::Verdict { number, valid })?;
                    }
                }
            }
        }
    }

    /// How long the reader may be silent before there is something else to do.
    fn until_next(&self) -> Duration {
        let retry = (!self.waiting.is_empty()).then_some(SHOW_RETRY);
        let next = [retry, self.serving.until_review()].into_iter().flatten().min();
        next.unwrap_or(self.showing.config.accepted_idle_timeout)
    }

    fn on_request(&mut self, number: u32, shown: Shown) -> Result<(), End> {
        let is_known = self.waiting.iter().any(|waiting| waiting.number == number);
        if is_known || !self.serving.has_room_for(number, self.waiting.len()) {
            return Err(End::Misbehaved("it asks for more at a time than was agreed, or twice by one number"));
        }
        self.waiting.push_back(Waiting { number, shown, since: Instant::now(), preparing: None });
        Ok(())
    }

    /// Answers requests in their order: those whose memory is being registered are passed by, and behind one
    /// that finds no staging memory none takes any. The thread does not wait: it may be this very reader that
    /// gives some back.
    fn answer_waiting(&mut self) -> Result<(), End> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let mut crowded = false;
        while let Some(mut request) = waiting.pop_front() {
            let step = match crowded && request.preparing.is_none() {
                true => Step::Crowded,
                false => self.answer(&mut request)?,
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
            say(self.stream, answer)?;
            self.answered = Instant::now();
        }
        Ok(())
    }

    fn answer(&mut self, request: &mut Waiting) -> Result<Step, End> {
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
                let source = match self.source(shown)? {
                    Ok(Some(source)) => source,
                    Ok(None) => return Ok(Step::Crowded),
                    Err(refusal) => return Ok(Step::Answered(FromHolder::Refused { number, refusal })),
                };
                match self.serving.rail().regions.registered(&source, self.serving.rail().serving_access()) {
                    Some(region) => (source, Ok(region)),
                    None => {
                        request.preparing = Some(self.prepare(source));
                        return Ok(Step::Registering);
                    }
                }
            }
        };
        // A store has sealed it meanwhile: it is copied, then.
        if registered.is_err() && !source.is_writable() {
            return self.answer(request);
        }
        let remote = registered.and_then(|region| self.serving.show(number, shown, source, region));
        match remote {
            Ok(remote) => Ok(Step::Answered(FromHolder::Granted { number, remote })),
            Err(error) if self.serving.is_broken() => Err(End::Own(error.to_string())),
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
    fn source(&self, shown: Shown) -> Result<Result<Option<Span>, Refusal>, End> {
        let span = match self.showing.grants.open(self.peer, shown.lease, shown.chunk).and_then(whole) {
            Ok(span) if span.len() != u64::from(shown.len) => {
                return Err(End::Misbehaved("it asks for a chunk by the wrong length"));
            }
            Ok(span) => span,
            Err(refusal) => return Ok(Err(refusal)),
        };
        // Memory around a chunk is nobody's business, and what can only be read cannot be shown through windows:
        // to the kernel binding one is writing (`ib_access_writable`), and shared pages that this process may
        // not write to it pins for no writer. So files and sealed slabs are copied. A file would not do anyway:
        // truncation leaves whoever pinned its pages with bytes that are nobody's any more.
        Ok(match span.is_writable() && self.serving.shows_parts() {
            true => Ok(Some(span)),
            false => self.staged(&span).map_err(|_| Refusal::Gone),
        })
    }

    /// Has memory registered, on another thread: this one has leases to look at.
    fn prepare(&self, source: Span) -> Preparing {
        let (news, registered) = channel();
        let (rail, wanted) = (self.serving.rail().clone(), source.clone());
        self.showing.registering.give(move || {
            // A connection that has ended has no use for it.
            let _ = news.send(rail.regions.of(&wanted, rail.serving_access()));
        });
        Preparing { source, registered }
    }

    /// A copy of a chunk that cannot be shown where it lies; `None` while there is no room for one.
    fn staged(&self, span: &Span) -> io::Result<Option<Span>> {
        let Some(copy) = self.showing.staging.try_take(span.len()) else { return Ok(None) };
        span.copy_to(0, &copy, 0, span.len())?;
        count(&self.showing.counters.staged, span.len());
        Ok(Some(copy))
    }

    /// The reader is done with a chunk: it is hidden first, then the lease looked at, so that what is
    /// called valid was so for as long as it could be read.
    fn finish(&mut self, number: u32, outcome: Outcome) -> Result<Option<bool>, End> {
        let hidden = self.serving.hide(number).map_err(stopped)?;
        let Some(Shown { lease, chunk, len }) = hidden else {
            return match self.serving.was_withdrawn(number) {
                true => Ok((outcome != Outcome::LetBe).then_some(false)),
                false => Err(End::Misbehaved("it is done with what it did not ask for")),
            };
        };
        if outcome == Outcome::LetBe {
            return Ok(None);
        }
        if outcome == Outcome::Read {
            count(&self.showing.counters.served, u64::from(len));
            self.showing.grants.sent(self.peer, lease, u64::from(len));
        }
        Ok(Some(self.showing.grants.still_valid(self.peer, lease, chunk)))
    }

    /// Hides what is no longer under its lease, though its reader is not done.
    fn review(&mut self) -> Result<(), End> {
        let (grants, peer) = (&self.showing.grants, self.peer);
        let ended = self.serving.numbers(|shown| !grants.still_valid(peer, shown.lease, shown.chunk));
        for number in ended {
            self.serving.withdraw(number).map_err(stopped)?;
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
