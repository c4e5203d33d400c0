//! The engine's half, blocking, for engines written in Rust.
//!
//! The client keeps what was registered, so that it can say it all again: when the agent goes
//! away the engine keeps its memory, and keeps serving unless it was paused at that moment. Then
//! the memory may hold parts of two releases, and the engine stays paused until an agent has
//! looked at every byte and said `hydrated`.

use crate::frame::{self, FrameError};
use crate::limits::{BINDINGS_PER_REQUEST, RECONNECT_WAIT_MAX, RECONNECT_WAIT_MIN, STATUS_WAIT, TENSOR_ALIGN_BYTES};
use crate::operator::{Drain, Drained};
use crate::protocol::{
    BindingSpec, Conduct, ErrorReply, Event, Failure, FromAgent, Hello, ManifestReply, PROTOCOL_VERSION, Progress,
    Refusal, RegionSpec, ReleaseInfo, Request, RowSpec, Stage, Standing, TensorInfo, Welcome, code,
};
use crate::table::{ManifestPage, TensorTable};
use aquifer_core::{ChannelName, ManifestHash};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ClientError {
    #[error("no agent is listening on {0}: start one with `aquifer agent`")]
    NoAgent(PathBuf),
    #[error("cannot connect to the agent at {path}: {source}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("the agent is gone: {0}")]
    Lost(FrameError),
    #[error("{0}")]
    Refused(ErrorReply),
    #[error("the agent answered '{op}' with something else than this client expects: {reason}")]
    Answer { op: &'static str, reason: String },
    #[error("the tensors do not fit 64 bits")]
    Layout,
    #[error("stopped")]
    Stopped,
}

/// What an engine does when the agent speaks. Called by [`EngineClient::run`] on its thread.
pub trait Switch {
    /// This release is in place and verified, and served from now on: the first one, or what an
    /// agent found after it came back.
    fn hydrated(&mut self, _release: &ReleaseInfo) {}
    /// Stop reading the weights. They change once this has returned, unless it returns `Err`: then
    /// the engine goes on with the old release.
    fn pause(&mut self, release: &ReleaseInfo) -> Result<(), String>;
    /// See whether `release`, which is in place, is any good: run it, and answer nobody from it. After `Err`
    /// the release before is put back. Called of engines whose [`Conduct`] says that they have checks, and to
    /// return in the time it says.
    fn check(&mut self, _release: &ReleaseInfo) -> Result<(), String> {
        Ok(())
    }
    /// Serve `release`, which is in place: the new one, or the old if nothing was changed or it was put back.
    /// After `Err` the engine stays paused, and the release before is put back.
    fn resume(&mut self, release: &ReleaseInfo) -> Result<(), String>;
    /// A new release was announced.
    fn released(&mut self, _release: &ReleaseInfo) {}
    fn progress(&mut self, _progress: &Progress) {}
    /// A release cannot be served here.
    fn failed(&mut self, _failure: &Failure) {}

    /// Where the node stands with the channel: what readiness is to be reported by.
    fn standing(&mut self, _standing: &Standing) {}
    /// The agent is gone, or a new one refuses what the old one knew. The client goes on looking,
    /// and the engine serving, if it was.
    fn lost(&mut self, _error: &ClientError) {}
}

/// One engine's conversation with the agent of its node. Requests wait as long as it takes, over
/// restarts of the agent, until [`Stopper::stop`].
#[derive(Debug)]
pub struct EngineClient {
    path: PathBuf,
    name: String,
    channel: ChannelName,
    conduct: Conduct,
    link: Option<Link>,
    welcome: Welcome,
    stopper: Stopper,
    regions: Vec<Registered>,
    bindings: Vec<BindingSpec>,
    rows: Vec<Row>,
    registered: bool,
    /// What memory holds, if it is known.
    serving: Option<ReleaseInfo>,
    paused: bool,
}

#[derive(Debug)]
struct Registered {
    region: u32,
    fd: OwnedFd,
    bytes: u64,
}

/// All tensors of a release, in a region.
#[derive(Clone, Debug)]
struct Row {
    tensors: Arc<TensorTable>,
    region: u32,
}

impl EngineClient {
    /// Connects to the agent at `path`, once.
    pub fn connect(path: &Path, name: &str, channel: &ChannelName) -> Result<EngineClient, ClientError> {
        Self::connect_with(path, name, channel, Conduct::default())
    }

    /// The same for an engine that has checks, or lets it be known how long it takes.
    pub fn connect_with(
        path: &Path,
        name: &str,
        channel: &ChannelName,
        conduct: Conduct,
    ) -> Result<EngineClient, ClientError> {
        let stopper = Stopper::default();
        let (link, welcome) = greet(path, &hello(name, channel, None, &conduct), &stopper)?;
        Ok(EngineClient {
            path: path.to_path_buf(),
            name: name.to_string(),
            channel: channel.clone(),
            conduct,
            link: Some(link),
            welcome,
            stopper,
            regions: Vec::new(),
            bindings: Vec::new(),
            rows: Vec::new(),
            registered: false,
            serving: None,
            paused: false,
        })
    }

    /// The agent last spoken to.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// The release in memory, if it is served.
    pub fn serving(&self) -> Option<&ReleaseInfo> {
        self.serving.as_ref().filter(|_| !self.paused)
    }

    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// The channel's newest release and its tensors; waits until there is one.
    pub fn manifest(&mut self) -> Result<ManifestReply, ClientError> {
        let answer = self.persist(|link| link.call(&Request::Manifest { from: None }, None))?;
        parse("manifest", &answer)
    }

    /// The same, of a release of any size.
    pub fn tensors(&mut self) -> Result<TensorTable, ClientError> {
        let answer = |reason: String| ClientError::Answer { op: "manifest", reason };
        let mut table = TensorTable::begin(self.page(0)?).map_err(answer)?;
        while let Some(from) = table.next() {
            let page = self.page(from)?;
            match page.release.manifest == table.release.manifest {
                true => table.add(page).map_err(answer)?,
                // There is a newer release meanwhile.
                false => table = TensorTable::begin(self.page(0)?).map_err(answer)?,
            }
        }
        Ok(table)
    }

    fn page(&mut self, from: u32) -> Result<ManifestPage, ClientError> {
        let answer = self.persist(|link| link.call(&Request::Manifest { from: Some(from) }, None))?;
        parse("manifest", &answer)
    }

    /// Registers a memfd that is sealed against shrinking and growing, under a number not used
    /// before. `fresh` says that nothing was ever written to it.
    pub fn register(&mut self, region: u32, fd: OwnedFd, bytes: u64, fresh: bool) -> Result<(), ClientError> {
        let request = Request::Region(RegionSpec { region, bytes, fresh, gpu: None });
        self.persist(|link| link.call(&request, Some(fd.as_fd())))?;
        self.regions.push(Registered { region, fd, bytes });
        Ok(())
    }

    pub fn bind(&mut self, bindings: Vec<BindingSpec>) -> Result<(), ClientError> {
        self.persist(|link| link.bind(&bindings))?;
        self.bindings.extend(bindings);
        Ok(())
    }

    /// Binds all tensors of a release, where [`TensorTable::places`] says, in a region of
    /// [`TensorTable::region_bytes`].
    pub fn bind_row(&mut self, tensors: Arc<TensorTable>, region: u32) -> Result<(), ClientError> {
        let row = Row { tensors, region };
        self.persist(|link| link.bind_row(&row))?;
        self.rows.push(row);
        Ok(())
    }

    /// Says that registration is complete; weights land from now on. [`Self::run`] tells when
    /// they are there.
    pub fn hydrate(&mut self) -> Result<(), ClientError> {
        self.persist(|link| link.call(&Request::Hydrate, None))?;
        self.registered = true;
        Ok(())
    }

    /// Follows the agent until [`Stopper::stop`].
    pub fn run(&mut self, switch: &mut dyn Switch) -> Result<(), ClientError> {
        loop {
            match self.step(switch) {
                Ok(()) => {}
                Err(ClientError::Stopped) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    /// Waits for one event and deals with it.
    pub fn step(&mut self, switch: &mut dyn Switch) -> Result<(), ClientError> {
        let link = match &mut self.link {
            Some(link) => link,
            None => self.reconnect(&mut |refused| {
                switch.lost(&refused);
                Ok(())
            })?,
        };
        match link.event() {
            Ok(event) => self.handle(event, switch),
            Err(lost) => {
                switch.lost(&lost);
                self.link = None;
                self.stopper.check()
            }
        }
    }

    fn handle(&mut self, event: Event, switch: &mut dyn Switch) -> Result<(), ClientError> {
        match event {
            Event::Release { release } => switch.released(&release),
            Event::Progress(progress) => switch.progress(&progress),
            Event::Failed(failure) => switch.failed(&failure),
            Event::Standing(standing) => switch.standing(&standing),
            Event::Unknown => {}
            Event::Hydrated { release } if self.paused => return self.resume(release, switch, Reply::IfRefused),
            Event::Hydrated { release } => {
                switch.hydrated(&release);
                self.serving = Some(release);
            }
            Event::Pause { release, .. } => return self.pause(&release, switch),
            Event::Check { release } => return self.check(&release, switch),
            Event::Applied { release } => return self.resume(release, switch, Reply::Always),
            Event::Aborted { .. } => {
                if let Some(old) = self.serving.clone().filter(|_| self.paused) {
                    return self.resume(old, switch, Reply::IfRefused);
                }
            }
        }
        Ok(())
    }

    fn pause(&mut self, release: &ReleaseInfo, switch: &mut dyn Switch) -> Result<(), ClientError> {
        let manifest = release.manifest;
        let request = match switch.pause(release) {
            Ok(()) => {
                // From here on, whether or not the answer arrives, bytes may change.
                self.paused = true;
                Request::Paused { manifest }
            }
            Err(message) => Request::Refused(Refusal { manifest, stage: Stage::Pause, message }),
        };
        self.answer(&request)
    }

    fn check(&mut self, release: &ReleaseInfo, switch: &mut dyn Switch) -> Result<(), ClientError> {
        let manifest = release.manifest;
        // It is in memory now, and not served.
        self.serving = None;
        let request = match switch.check(release) {
            Ok(()) => Request::Checked { manifest },
            Err(message) => Request::Refused(Refusal { manifest, stage: Stage::Check, message }),
        };
        self.answer(&request)
    }

    fn resume(&mut self, release: ReleaseInfo, switch: &mut dyn Switch, reply: Reply) -> Result<(), ClientError> {
        let manifest = release.manifest;
        let resumed = switch.resume(&release);
        self.paused = resumed.is_err();
        self.serving = Some(release);
        match (resumed, reply) {
            (Ok(()), Reply::IfRefused) => Ok(()),
            (Ok(()), Reply::Always) => self.answer(&Request::Resumed { manifest }),
            (Err(message), _) => self.answer(&Request::Refused(Refusal { manifest, stage: Stage::Resume, message })),
        }
    }

    /// Answers an event. An agent that is gone, or has lost interest, needs no answer.
    fn answer(&mut self, request: &Request) -> Result<(), ClientError> {
        let Some(link) = &mut self.link else { return Ok(()) };
        match link.call(request, None) {
            Ok(_) | Err(ClientError::Refused(_)) => Ok(()),
            Err(ClientError::Lost(_)) => {
                self.link = None;
                self.stopper.check()
            }
            Err(other) => Err(other),
        }
    }

    /// Asks until it is answered, by this agent or a later one.
    fn persist<T>(&mut self, ask: impl Fn(&mut Link) -> Result<T, ClientError>) -> Result<T, ClientError> {
        loop {
            let link = match &mut self.link {
                Some(link) => link,
                None => self.reconnect(&mut Err)?,
            };
            match ask(link) {
                Err(ClientError::Lost(_)) => self.link = None,
                answered => return answered,
            }
            self.stopper.check()?;
        }
    }

    /// Finds an agent, however long it takes, and tells it all that the one before knew. `refused`
    /// says whether to go on when one does not want to hear it.
    fn reconnect(
        &mut self,
        refused: &mut dyn FnMut(ClientError) -> Result<(), ClientError>,
    ) -> Result<&mut Link, ClientError> {
        let mut wait = RECONNECT_WAIT_MIN;
        loop {
            self.stopper.check()?;
            match self.reintroduce() {
                Ok(link) => return Ok(self.link.insert(link)),
                Err(ClientError::NoAgent(_) | ClientError::Connect { .. } | ClientError::Lost(_)) => {}
                Err(ClientError::Stopped) => return Err(ClientError::Stopped),
                Err(other) => refused(other)?,
            }
            self.stopper.wait(wait)?;
            wait = RECONNECT_WAIT_MAX.min(wait * 2);
        }
    }

    fn greet(&self, serving: Option<ManifestHash>) -> Result<(Link, Welcome), ClientError> {
        greet(&self.path, &hello(&self.name, &self.channel, serving, &self.conduct), &self.stopper)
    }

    fn reintroduce(&mut self) -> Result<Link, ClientError> {
        let serving = self.serving().map(|r| r.manifest);
        let (mut link, welcome) = self.greet(serving)?;
        for Registered { region, fd, bytes } in &self.regions {
            let request = Request::Region(RegionSpec { region: *region, bytes: *bytes, fresh: false, gpu: None });
            link.call(&request, Some(fd.as_fd()))?;
        }
        link.bind(&self.bindings)?;
        self.rows.iter().try_for_each(|row| link.bind_row(row))?;
        if self.registered {
            link.call(&Request::Hydrate, None)?;
        }
        self.welcome = welcome;
        Ok(link)
    }
}

/// Places `tensors` one after the other in a region, aligned to [`TENSOR_ALIGN_BYTES`]: how long
/// the region must be, and the bindings.
pub fn layout_for(tensors: &[TensorInfo], region: u32) -> Result<(u64, Vec<BindingSpec>), ClientError> {
    let mut end = 0u64;
    let mut bindings = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let offset = end.checked_next_multiple_of(TENSOR_ALIGN_BYTES).ok_or(ClientError::Layout)?;
        end = offset.checked_add(tensor.bytes).ok_or(ClientError::Layout)?;
        bindings.push(BindingSpec {
            tensor: tensor.name.clone(),
            dtype: tensor.dtype.clone(),
            shape: tensor.shape.clone(),
            index: Vec::new(),
            region,
            offset,
            strides: Vec::new(),
        });
    }
    // Memory of no bytes cannot be mapped.
    Ok((end.max(TENSOR_ALIGN_BYTES), bindings))
}

/// The state of the node whose agent listens on `path`.
pub fn request_status(path: &Path) -> Result<Value, ClientError> {
    request(path, &Request::Status)
}

/// Asks the agent that listens on `path` one thing that needs no `hello`.
pub fn request<T: DeserializeOwned>(path: &Path, request: &Request) -> Result<T, ClientError> {
    let mut link = Link::open(path)?;
    link.wait_at_most(STATUS_WAIT)?;
    let answer = link.call(request, None)?;
    parse("the agent's answer", &answer)
}

/// Asks the agent that listens on `path` to drain, waits until it has ended, and returns what it said of it; None if
/// it ended without a word. `most` is how long that may take.
pub fn request_drain(path: &Path, drain: &Drain, most: Duration) -> Result<Option<Drained>, ClientError> {
    let mut link = Link::open(path)?;
    link.wait_at_most(most)?;
    let said = match link.call(&Request::Drain(drain.clone()), None) {
        Ok(answer) => Some(parse("the agent's answer", &answer)?),
        Err(ClientError::Lost(lost)) if !lost.is_timeout() => None,
        Err(error) => return Err(error),
    };
    // The connection is closed when the agent is about to be gone, and not before.
    while said.is_some() && link.receive().is_ok() {}
    Ok(said)
}

/// Ends an [`EngineClient`]'s waiting from another thread, for good.
#[derive(Clone, Debug, Default)]
pub struct Stopper(Arc<(Mutex<Stop>, Condvar)>);

#[derive(Debug, Default)]
struct Stop {
    stopped: bool,
    socket: Option<UnixStream>,
}

impl Stopper {
    pub fn stop(&self) {
        let mut stop = self.lock();
        stop.stopped = true;
        if let Some(socket) = stop.socket.take() {
            // It fails only if the agent was faster.
            let _closed_already = socket.shutdown(Shutdown::Both);
        }
        self.0.1.notify_all();
    }

    fn check(&self) -> Result<(), ClientError> {
        match self.lock().stopped {
            true => Err(ClientError::Stopped),
            false => Ok(()),
        }
    }

    fn wait(&self, time: Duration) -> Result<(), ClientError> {
        let wait = self.0.1.wait_timeout_while(self.lock(), time, |stop| !stop.stopped);
        drop(wait);
        self.check()
    }

    fn watch(&self, socket: &UnixStream) -> Result<(), ClientError> {
        let mut stop = self.lock();
        if stop.stopped {
            return Err(ClientError::Stopped);
        }
        stop.socket = Some(socket.try_clone().map_err(|e| ClientError::Lost(e.into()))?);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Stop> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether `resumed` is expected, or only a refusal is worth telling.
#[derive(Clone, Copy)]
enum Reply {
    Always,
    IfRefused,
}

/// A connection, and the events that came while a reply was waited for.
#[derive(Debug)]
struct Link {
    socket: UnixStream,
    last_id: u64,
    events: VecDeque<Event>,
}

impl Link {
    fn open(path: &Path) -> Result<Link, ClientError> {
        let absent = |e: &io::Error| matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
        let socket = UnixStream::connect(path).map_err(|source| match absent(&source) {
            true => ClientError::NoAgent(path.to_path_buf()),
            false => ClientError::Connect { path: path.to_path_buf(), source },
        })?;
        Ok(Link { socket, last_id: 0, events: VecDeque::new() })
    }

    fn wait_at_most(&self, time: Duration) -> Result<(), ClientError> {
        let set = self.socket.set_read_timeout(Some(time)).and_then(|()| self.socket.set_write_timeout(Some(time)));
        set.map_err(|e| ClientError::Lost(e.into()))
    }

    fn call(&mut self, request: &Request, fd: Option<BorrowedFd<'_>>) -> Result<Box<str>, ClientError> {
        self.last_id += 1;
        let frame = request.encode(self.last_id).map_err(ClientError::Lost)?;
        // An agent that turns a caller away says why and closes; its word is worth more than the
        // broken pipe.
        let sent = frame::send_blocking(&self.socket, &frame, fd);
        loop {
            match self.receive() {
                Ok(FromAgent::Reply { result, re }) if re == self.last_id || re == 0 => {
                    return result.map_err(ClientError::Refused);
                }
                Ok(FromAgent::Reply { .. }) => {}
                Ok(FromAgent::Event(event)) => self.events.push_back(event),
                Err(lost) => {
                    sent.map_err(|e| ClientError::Lost(e.into()))?;
                    return Err(lost);
                }
            }
        }
    }

    fn bind(&mut self, bindings: &[BindingSpec]) -> Result<(), ClientError> {
        for part in bindings.chunks(BINDINGS_PER_REQUEST) {
            self.call(&Request::Bind { bindings: part.to_vec() }, None)?;
        }
        Ok(())
    }

    fn bind_row(&mut self, row: &Row) -> Result<(), ClientError> {
        let Row { tensors, region } = row;
        let spec = RowSpec {
            manifest: tensors.release.manifest,
            tensors: None,
            region: *region,
            offset: 0,
            align: TENSOR_ALIGN_BYTES,
        };
        match self.call(&Request::BindRow(spec), None) {
            // An agent that came later may have a newer release only.
            Err(ClientError::Refused(error)) if error.code == code::UNKNOWN_MANIFEST => {
                self.bind(&tensors.bindings(*region))
            }
            answered => answered.map(drop),
        }
    }

    fn event(&mut self) -> Result<Event, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        loop {
            if let FromAgent::Event(event) = self.receive()? {
                return Ok(event);
            }
        }
    }

    fn receive(&mut self) -> Result<FromAgent, ClientError> {
        let content = frame::receive_blocking(&self.socket).map_err(ClientError::Lost)?;
        FromAgent::decode(&content).map_err(|e| ClientError::Lost(e.into()))
    }
}

fn hello(name: &str, channel: &ChannelName, serving: Option<ManifestHash>, conduct: &Conduct) -> Request {
    Request::Hello(Hello {
        protocol: PROTOCOL_VERSION,
        client: concat!("aquifer-engine ", env!("CARGO_PKG_VERSION")).to_string(),
        pid: std::process::id(),
        name: name.to_string(),
        channel: channel.clone(),
        serving,
        conduct: conduct.clone(),
    })
}

fn greet(path: &Path, hello: &Request, stopper: &Stopper) -> Result<(Link, Welcome), ClientError> {
    let mut link = Link::open(path)?;
    stopper.watch(&link.socket)?;
    let answer = link.call(hello, None)?;
    Ok((link, parse("hello", &answer)?))
}

fn parse<T: DeserializeOwned>(op: &'static str, answer: &str) -> Result<T, ClientError> {
    serde_json::from_str(answer).map_err(|e| ClientError::Answer { op, reason: e.to_string() })
}
