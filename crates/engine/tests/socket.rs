//! Both halves over real sockets.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests")]

use aquifer_core::{ChannelName, ManifestHash, NodeId, PublisherKey};
use aquifer_engine::limits::{CONNECTIONS_MAX, FRAME_BYTES_MAX, OUTBOX_FRAMES_MAX};
use aquifer_engine::protocol::code;
use aquifer_engine::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::mpsc::Receiver;

/// Longer than any wait that succeeds, on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Agent {
    engines: Engines,
    events: Receiver<EngineEvent>,
    /// Events that came before one that was waited for.
    early: VecDeque<EngineEvent>,
}

/// Directory and path of a socket that nobody listens on.
fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    (directory, path)
}

impl Agent {
    fn start(path: &Path) -> Agent {
        let (engines, events) = EngineServer::bind(path).unwrap().run();
        Agent { engines, events, early: VecDeque::new() }
    }

    async fn next(&mut self) -> EngineEvent {
        match self.early.pop_front() {
            Some(event) => event,
            None => self.receive().await,
        }
    }

    async fn receive(&mut self) -> EngineEvent {
        tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("an event").expect("a server")
    }

    async fn opened(&mut self) -> ConnId {
        let event = self.next().await;
        let EngineEvent::Opened { conn, uid, .. } = event else { panic!("{event:?}") };
        assert_eq!(uid, rustix::process::geteuid().as_raw());
        conn
    }

    async fn request(&mut self) -> (ConnId, u64, Request, Option<OwnedFd>) {
        let event = self.next().await;
        let EngineEvent::Request { conn, id, request, fd } = event else { panic!("{event:?}") };
        (conn, id, request, fd)
    }

    /// Waits for the end of a connection. The engine may be back on another before it is told;
    /// what that one says is kept for later.
    async fn closed(&mut self, expected: ConnId) {
        let mut others = VecDeque::new();
        loop {
            let event = self.next().await;
            match &event {
                EngineEvent::Closed { conn } => {
                    assert_eq!(*conn, expected);
                    break;
                }
                EngineEvent::Opened { conn, .. } | EngineEvent::Request { conn, .. } => {
                    assert_ne!(*conn, expected, "{event:?}");
                    others.push_back(event);
                }
            }
        }
        others.append(&mut self.early);
        self.early = others;
    }

    /// Takes the next request, which must be `expected`, and answers it with nothing.
    async fn expect(&mut self, expected: Request) {
        let (conn, id, request, _) = self.request().await;
        assert_eq!(request, expected);
        self.engines.reply(conn, id, Ok(json!({})));
    }

    async fn greet(&mut self) -> (ConnId, Hello) {
        let opened = self.opened().await;
        let (conn, id, request, _) = self.request().await;
        assert_eq!(conn, opened);
        let Request::Hello(hello) = request else { panic!("{request:?}") };
        let welcome = Welcome { node: NodeId([1; 32]), agent_name: "node".into(), version: "1".into() };
        self.engines.reply(conn, id, Ok(serde_json::to_value(welcome).unwrap()));
        (conn, hello)
    }
}

fn channel() -> ChannelName {
    "a/b".parse().unwrap()
}

fn release(seq: u64) -> ReleaseInfo {
    ReleaseInfo {
        channel: channel(),
        seq,
        manifest: ManifestHash::of(&seq.to_le_bytes()),
        rollback: false,
        note: String::new(),
        created_unix_ms: 0,
        publisher: PublisherKey([2; 32]),
    }
}

fn memory(bytes: u64) -> OwnedFd {
    let fd = memfd_create("region", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    fd
}

/// An engine that tells what is asked of it.
struct Told {
    told: blocking::Sender<String>,
    /// What `pause` and `resume` answer, once; then they agree.
    refuse: Vec<&'static str>,
}

impl Told {
    fn tell(&mut self, what: &str, release: &ReleaseInfo) -> Result<(), String> {
        self.told.send(format!("{what} {}", release.seq)).unwrap();
        match self.refuse.iter().position(|r| *r == what) {
            Some(at) => Err(format!("{} failed", self.refuse.remove(at))),
            None => Ok(()),
        }
    }
}

impl Switch for Told {
    fn hydrated(&mut self, release: &ReleaseInfo) {
        self.tell("hydrated", release).unwrap();
    }
    fn pause(&mut self, release: &ReleaseInfo) -> Result<(), String> {
        self.tell("pause", release)
    }
    fn check(&mut self, release: &ReleaseInfo) -> Result<(), String> {
        self.tell("check", release)
    }
    fn resume(&mut self, release: &ReleaseInfo) -> Result<(), String> {
        self.tell("resume", release)
    }
    fn released(&mut self, release: &ReleaseInfo) {
        self.tell("released", release).unwrap();
    }
    fn progress(&mut self, progress: &Progress) {
        self.told.send(format!("progress {}", progress.bytes_done)).unwrap();
    }
    fn failed(&mut self, failure: &Failure) {
        self.told.send(format!("failed {}", failure.code)).unwrap();
    }
}

fn conduct() -> Conduct {
    Conduct { checks: true, check_timeout_ms: Some(60_000), ..Conduct::default() }
}

fn binding() -> BindingSpec {
    BindingSpec {
        tensor: "t".into(),
        dtype: "F32".into(),
        shape: vec![4, 2],
        index: vec![(0, 2), (0, 2)],
        region: 3,
        offset: 0,
        strides: vec![],
    }
}

/// A client that registers one region and one binding and follows the agent, on its own thread.
struct Engine {
    thread: JoinHandle<()>,
    hears: blocking::Receiver<String>,
    stopper: blocking::Receiver<Stopper>,
}

impl Engine {
    fn start(path: &Path, fd: OwnedFd, refuse: &[&'static str]) -> Engine {
        let (told, hears) = blocking::channel();
        let (ready, stopper) = blocking::channel();
        let (path, refuse) = (path.to_path_buf(), refuse.to_vec());
        let thread = std::thread::spawn(move || {
            let mut client = EngineClient::connect_with(&path, "e", &channel(), conduct()).unwrap();
            ready.send(client.stopper()).unwrap();
            assert_eq!(client.manifest().unwrap().release, release(1));
            client.register(3, fd, 16, true).unwrap();
            client.bind(vec![binding()]).unwrap();
            client.hydrate().unwrap();
            client.run(&mut Told { told, refuse }).unwrap();
        });
        Engine { thread, hears, stopper }
    }

    fn hear(&self, expected: &str) {
        assert_eq!(self.hears.recv_timeout(PATIENCE).unwrap(), expected);
    }

    fn stop(self) {
        self.stopper.recv_timeout(PATIENCE).unwrap().stop();
        self.thread.join().unwrap();
    }
}

impl Agent {
    async fn registration(&mut self, fresh: bool) -> OwnedFd {
        let (conn, id, request, fd) = self.request().await;
        assert_eq!(request, Request::Region(RegionSpec { region: 3, bytes: 16, fresh, gpu: None }));
        self.engines.reply(conn, id, Ok(json!({})));
        self.expect(Request::Bind { bindings: vec![binding()] }).await;
        self.expect(Request::Hydrate).await;
        fd.unwrap()
    }

    /// What an agent hears from [`engine`] until it is registered: its connection and its memory.
    async fn registered(&mut self) -> (ConnId, OwnedFd) {
        let (conn, hello) = self.greet().await;
        assert_eq!((hello.name.as_str(), hello.pid, hello.serving), ("e", std::process::id(), None));
        assert_eq!(hello.conduct, conduct());
        let (_, id, request, _) = self.request().await;
        assert_eq!(request, Request::Manifest { from: None });
        let reply = ManifestReply { release: release(1), tensors: vec![] };
        self.engines.reply(conn, id, Ok(serde_json::to_value(reply).unwrap()));
        (conn, self.registration(true).await)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_hydrates_and_follows_a_release() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let fd = memory(16);
    let engine = Engine::start(&path, fd.try_clone().unwrap(), &[]);
    let (conn, theirs) = agent.registered().await;

    File::from(theirs).write_all_at(b"weights", 0).unwrap();
    let mut landed = [0; 7];
    File::from(fd).read_exact_at(&mut landed, 0).unwrap();
    assert_eq!(&landed, b"weights");

    let progress = Progress {
        manifest: release(1).manifest,
        bytes_done: 8,
        bytes_total: 16,
        chunks_done: 1,
        chunks_total: 2,
        peers: 1,
        bytes_per_s: 8,
    };
    agent.engines.event(conn, &Event::Progress(progress));
    engine.hear("progress 8");
    agent.engines.event(conn, &Event::Hydrated { release: release(1) });
    engine.hear("hydrated 1");
    agent.engines.event(conn, &Event::Release { release: release(2) });
    engine.hear("released 2");
    let manifest = release(2).manifest;
    agent.engines.event(conn, &Event::Pause { release: release(2), bytes: 8 });
    agent.expect(Request::Paused { manifest }).await;
    agent.engines.event(conn, &Event::Applied { release: release(2) });
    agent.expect(Request::Resumed { manifest }).await;
    engine.hear("pause 2");
    engine.hear("resume 2");

    agent.engines.event(conn, &Event::Pause { release: release(3), bytes: 8 });
    agent.expect(Request::Paused { manifest: release(3).manifest }).await;
    agent.engines.event(conn, &Event::Aborted { release: release(3) });
    engine.hear("pause 3");
    engine.hear("resume 2");
    let failure = Failure { manifest: release(4).manifest, code: "incompatible".into(), message: String::new() };
    agent.engines.event(conn, &Event::Failed(failure));
    engine.hear("failed incompatible");

    engine.stop();
    agent.closed(conn).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_says_when_its_own_code_fails() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let engine = Engine::start(&path, memory(16), &["pause", "resume"]);
    let (conn, _fd) = agent.registered().await;
    agent.engines.event(conn, &Event::Hydrated { release: release(1) });

    let manifest = release(2).manifest;
    let refused = |stage, message: &str| Request::Refused(Refusal { manifest, stage, message: message.into() });
    agent.engines.event(conn, &Event::Pause { release: release(2), bytes: 8 });
    agent.expect(refused(Stage::Pause, "pause failed")).await;
    agent.engines.event(conn, &Event::Pause { release: release(2), bytes: 8 });
    agent.expect(Request::Paused { manifest }).await;
    agent.engines.event(conn, &Event::Applied { release: release(2) });
    agent.expect(refused(Stage::Resume, "resume failed")).await;
    // The agent puts the old release back.
    agent.engines.event(conn, &Event::Applied { release: release(1) });
    agent.expect(Request::Resumed { manifest: release(1).manifest }).await;
    engine.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_checks_what_it_is_given() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let engine = Engine::start(&path, memory(16), &["check"]);
    let (conn, _fd) = agent.registered().await;
    let manifest = release(1).manifest;
    let refused = Refusal { manifest, stage: Stage::Check, message: "check failed".into() };
    agent.engines.event(conn, &Event::Check { release: release(1) });
    agent.expect(Request::Refused(refused)).await;
    agent.engines.event(conn, &Event::Check { release: release(1) });
    agent.expect(Request::Checked { manifest }).await;
    agent.engines.event(conn, &Event::Hydrated { release: release(1) });
    for expected in ["check 1", "check 1", "hydrated 1"] {
        engine.hear(expected);
    }
    let manifest = release(2).manifest;
    agent.engines.event(conn, &Event::Pause { release: release(2), bytes: 8 });
    agent.expect(Request::Paused { manifest }).await;
    agent.engines.event(conn, &Event::Check { release: release(2) });
    agent.expect(Request::Checked { manifest }).await;
    // Its agent is gone now: what it holds is not served by anybody.
    agent.engines.close(conn);
    agent.closed(conn).await;
    let (_, hello) = agent.greet().await;
    assert_eq!(hello.serving, None);
    agent.registration(false).await;
    engine.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_outlives_its_agent() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let engine = Engine::start(&path, memory(16), &[]);
    let (conn, _fd) = agent.registered().await;
    agent.engines.event(conn, &Event::Hydrated { release: release(1) });
    engine.hear("hydrated 1");

    // While it serves: it goes on, and says what it serves. Closing stands for a crash: the
    // engine cannot tell one from the other.
    agent.engines.close(conn);
    agent.closed(conn).await;
    let (conn, hello) = agent.greet().await;
    assert_eq!(hello.serving, Some(release(1).manifest));
    agent.registration(false).await;

    // An agent that does not want what it has is left for the next; it serves on.
    agent.engines.close(conn);
    agent.closed(conn).await;
    let (conn, _) = agent.greet().await;
    let (_, id, _, _) = agent.request().await;
    agent.engines.reply(conn, id, Err(ErrorReply::new("unwanted", "not here")));
    agent.closed(conn).await;
    let (conn, hello) = agent.greet().await;
    assert_eq!(hello.serving, Some(release(1).manifest));
    agent.registration(false).await;

    // While it is paused: it stays paused, and claims nothing.
    agent.engines.event(conn, &Event::Pause { release: release(2), bytes: 8 });
    agent.expect(Request::Paused { manifest: release(2).manifest }).await;
    engine.hear("pause 2");
    agent.engines.close(conn);
    agent.closed(conn).await;
    let (conn, hello) = agent.greet().await;
    assert_eq!(hello.serving, None);
    agent.registration(false).await;
    agent.engines.event(conn, &Event::Hydrated { release: release(2) });
    engine.hear("resume 2");

    agent.engines.close(conn);
    agent.closed(conn).await;
    let (_, hello) = agent.greet().await;
    assert_eq!(hello.serving, Some(release(2).manifest));
    engine.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_engine_finds_the_next_agent() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let engine = Engine::start(&path, memory(16), &[]);
    agent.greet().await;
    let (_, _, request, _) = agent.request().await;
    assert_eq!(request, Request::Manifest { from: None });
    drop(agent);
    let bound = async {
        loop {
            match EngineServer::bind(&path) {
                Ok(server) => return server,
                Err(ServeError::Busy { .. }) => tokio::task::yield_now().await,
                Err(other) => panic!("{other}"),
            }
        }
    };
    let (engines, events) = tokio::time::timeout(PATIENCE, bound).await.unwrap().run();
    let mut agent = Agent { engines, events, early: VecDeque::new() };
    let (conn, _fd) = agent.registered().await;
    agent.engines.event(conn, &Event::Hydrated { release: release(1) });
    engine.hear("hydrated 1");
    engine.stop();
}

#[tokio::test]
async fn status_needs_no_hello() {
    let (_directory, path) = place();
    let absent = request_status(&path).unwrap_err().to_string();
    assert!(absent.contains("start one with `aquifer agent`"), "{absent}");

    let mut agent = Agent::start(&path);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let asking = tokio::task::spawn_blocking(move || request_status(&path));
    agent.opened().await;
    let (conn, id, request, _) = agent.request().await;
    assert_eq!(request, Request::Status);
    agent.engines.reply(conn, id, Ok(json!({"peers": 3})));
    assert_eq!(asking.await.unwrap().unwrap(), json!({"peers": 3}));
    agent.closed(conn).await;
}

/// A peer that writes what it likes.
struct Stranger(UnixStream);

impl Stranger {
    fn connect(path: &Path) -> Stranger {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Stranger(socket)
    }

    fn send(&mut self, content: &[u8]) {
        self.0.write_all(&u32::try_from(content.len()).unwrap().to_le_bytes()).unwrap();
        self.0.write_all(content).unwrap();
    }

    fn hello(&mut self) {
        let hello =
            json!({"id": 1, "op": "hello", "protocol": 1, "client": "x", "pid": 1, "name": "x", "channel": "c"});
        self.send(hello.to_string().as_bytes());
    }

    fn receive(&mut self) -> Value {
        let mut header = [0; 4];
        self.0.read_exact(&mut header).unwrap();
        let mut content = vec![0; usize::try_from(u32::from_le_bytes(header)).unwrap()];
        self.0.read_exact(&mut content).unwrap();
        serde_json::from_slice(&content).unwrap()
    }

    fn error_code(&mut self) -> String {
        self.receive()["error"]["code"].as_str().unwrap().to_string()
    }

    fn is_at_end(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }

    fn region(&self, id: u64, fds: &[&OwnedFd]) {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let request = Request::Region(RegionSpec { region: 0, bytes: 16, fresh: true, gpu: None }).encode(id).unwrap();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
        let slices = [std::io::IoSlice::new(&request)];
        assert_eq!(sendmsg(&self.0, &slices, &mut control, SendFlags::empty()).unwrap(), request.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_answered_once_and_cut_off() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let frames: [&[u8]; 5] = [b"", b"{", b"\xff\xfe\0", b"[1,2]", br#"{"op":"status"}"#];
    for frame in frames {
        let mut stranger = Stranger::connect(&path);
        let conn = agent.opened().await;
        stranger.send(frame);
        assert_eq!(stranger.error_code(), code::BAD_FRAME);
        assert!(stranger.is_at_end());
        agent.closed(conn).await;
    }
    // A length alone is enough; nothing is reserved for it.
    for length in [u32::MAX, u32::try_from(FRAME_BYTES_MAX).unwrap() + 1] {
        let mut stranger = Stranger::connect(&path);
        let conn = agent.opened().await;
        stranger.0.write_all(&length.to_le_bytes()).unwrap();
        assert_eq!(stranger.error_code(), code::BAD_FRAME);
        assert!(stranger.is_at_end());
        agent.closed(conn).await;
    }
    // Cut in the middle of a frame.
    let mut stranger = Stranger::connect(&path);
    let conn = agent.opened().await;
    stranger.0.write_all(&[9, 0, 0, 0, b'{']).unwrap();
    drop(stranger);
    agent.closed(conn).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_out_of_place_are_refused_and_survived() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let mut stranger = Stranger::connect(&path);
    agent.opened().await;
    for (request, expected) in [
        (json!({"id": 1, "op": "manifest"}), code::HELLO),
        (json!({"id": 2, "op": "fly"}), code::UNKNOWN_OP),
        (json!({"id": 3, "op": "bind", "bindings": [{"tensor": 4}]}), code::BAD_REQUEST),
        (
            json!({"id": 4, "op": "hello", "protocol": 9, "client": "x", "pid": 1, "name": "x", "channel": "c"}),
            code::PROTOCOL_VERSION,
        ),
        (
            json!({"id": 5, "op": "hello", "protocol": 1, "client": "x", "pid": 1, "name": "x", "channel": "/"}),
            code::BAD_REQUEST,
        ),
    ] {
        stranger.send(request.to_string().as_bytes());
        let reply = stranger.receive();
        assert_eq!((&reply["re"], &reply["error"]["code"]), (&request["id"], &json!(expected)), "{reply}");
    }
    stranger.hello();
    let (conn, id, request, _) = agent.request().await;
    assert!(matches!(request, Request::Hello(_)));
    agent.engines.reply(conn, id, Ok(json!({})));
    assert_eq!(stranger.receive()["re"], 1);
    stranger.hello();
    assert_eq!(stranger.error_code(), code::HELLO);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_is_one_sealed_memfd_of_its_length() {
    let (directory, path) = place();
    let mut agent = Agent::start(&path);
    let mut stranger = Stranger::connect(&path);
    agent.opened().await;
    stranger.hello();
    let (conn, id, _, _) = agent.request().await;
    agent.engines.reply(conn, id, Ok(json!({})));
    stranger.receive();

    let file = OwnedFd::from(File::create(directory.path().join("file")).unwrap());
    let open = memfd_create("open", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&open, 16).unwrap();
    let (short, good) = (memory(15), memory(16));
    let bad: [&[&OwnedFd]; 6] = [&[], &[&file], &[&open], &[&short], &[&good, &good], &[&good; 16]];
    for (id, fds) in (2u64..).zip(bad) {
        stranger.region(id, fds);
        let reply = stranger.receive();
        assert_eq!((&reply["re"], &reply["error"]["code"]), (&json!(id), &json!(code::BAD_REGION)), "{reply}");
    }
    stranger.region(20, &[&good]);
    let (_, id, _, fd) = agent.request().await;
    assert_eq!(id, 20);
    assert_eq!(rustix::fs::fstat(fd.unwrap()).unwrap().st_ino, rustix::fs::fstat(&good).unwrap().st_ino);
}

#[tokio::test]
async fn one_path_has_one_agent() {
    let (directory, path) = place();
    let server = EngineServer::bind(&path).unwrap();
    let error = EngineServer::bind(&path).unwrap_err();
    let message = error.to_string();
    assert!(message.contains(&format!("another agent is listening on {}", path.display())), "{message}");
    assert!(message.contains(&format!("(pid {})", std::process::id())), "{message}");
    drop(server);
    assert!(!path.exists());
    drop(EngineServer::bind(&path).unwrap());

    // Someone else's socket, without our lock.
    let foreign = directory.path().join("foreign.sock");
    let listener = std::os::unix::net::UnixListener::bind(&foreign).unwrap();
    assert!(matches!(EngineServer::bind(&foreign), Err(ServeError::Busy { .. })));
    // A socket nobody listens on any more, as a killed agent leaves it.
    drop(listener);
    assert!(foreign.exists());
    drop(EngineServer::bind(&foreign).unwrap());

    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(EngineServer::bind(&file).unwrap_err().to_string().contains("not a socket"));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let absent = directory.path().join("absent/agent.sock");
    assert!(EngineServer::bind(&absent).unwrap_err().to_string().contains("is not a directory"));
    let long = directory.path().join("x".repeat(120));
    assert!(EngineServer::bind(&long).unwrap_err().to_string().contains("may have 107"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_does_not_read_loses_progress_first_and_then_its_place() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let mut stranger = Stranger::connect(&path);
    let conn = agent.opened().await;
    let progress = |bytes_done| {
        Event::Progress(Progress {
            manifest: release(1).manifest,
            bytes_done,
            bytes_total: 1,
            chunks_done: 0,
            chunks_total: 1,
            peers: 0,
            bytes_per_s: 0,
        })
    };
    // Far more than the socket's buffer and the queue hold, all of it droppable.
    let many = 100_000;
    for n in 0..=many {
        agent.engines.event(conn, &progress(n));
    }
    agent.engines.event(conn, &Event::Hydrated { release: release(1) });
    let (mut received, mut last) = (0, json!(null));
    loop {
        let message = stranger.receive();
        match message["event"].as_str().unwrap() {
            "progress" => (received, last) = (received + 1, message["bytes_done"].clone()),
            event => break assert_eq!(event, "hydrated"),
        }
    }
    assert_eq!(last, json!(many));
    assert!(received < many);

    let note = "x".repeat(8 << 10);
    for _ in 0..2 * OUTBOX_FRAMES_MAX {
        agent.engines.event(conn, &Event::Release { release: ReleaseInfo { note: note.clone(), ..release(2) } });
    }
    agent.closed(conn).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_have_a_bound() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        held.push(Stranger::connect(&path));
        agent.opened().await;
    }
    let mut one_more = Stranger::connect(&path);
    assert_eq!(one_more.error_code(), code::BUSY);
    held.pop();
    assert!(matches!(agent.next().await, EngineEvent::Closed { .. }));
    held.push(Stranger::connect(&path));
    agent.opened().await;
}

#[test]
fn tensors_are_laid_out_in_order_and_aligned() {
    let tensor = |name: &str, bytes| TensorInfo { name: name.into(), dtype: "U8".into(), shape: vec![bytes], bytes };
    let (bytes, bindings) = layout_for(&[tensor("a", 1), tensor("b", 0), tensor("c", 257)], 4).unwrap();
    let placed: Vec<_> = bindings.iter().map(|b| (b.tensor.as_str(), b.region, b.offset)).collect();
    assert_eq!(placed, [("a", 4, 0), ("b", 4, 256), ("c", 4, 256)]);
    assert_eq!(bytes, 256 + 257);
    assert_eq!(layout_for(&[], 0).unwrap().0, 256);
    assert!(layout_for(&[tensor("a", u64::MAX), tensor("b", 1)], 0).is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_is_said_one_by_one_to_an_agent_without_its_release() {
    let (_directory, path) = place();
    let mut agent = Agent::start(&path);
    let (socket, fd) = (path.clone(), memory(16));
    let engine = std::thread::spawn(move || {
        let mut client = EngineClient::connect(&socket, "e", &"a/b".parse().unwrap()).unwrap();
        let tensors = Arc::new(client.tensors().unwrap());
        client.register(3, fd, 16, true).unwrap();
        client.bind_row(tensors, 3).unwrap();
    });
    agent.greet().await;
    let kind = Kind { dtype: "U8".into(), shape: vec![8], bytes: 8 };
    // The release changes while its tensors are told.
    for (from, seq, names) in [(0, 1, ["x"]), (1, 2, ["b"]), (0, 2, ["a"]), (1, 2, ["b"])] {
        let (conn, id, request, _) = agent.request().await;
        assert_eq!(request, Request::Manifest { from: Some(from) });
        let (kind_of, kinds) = (vec![0], vec![kind.clone()]);
        let page = ManifestPage { release: release(seq), count: 2, from, names: names.to_vec(), kind_of, kinds };
        agent.engines.reply_page(conn, id, &page);
    }
    agent.expect(Request::Region(RegionSpec { region: 3, bytes: 16, fresh: true, gpu: None })).await;
    let (conn, id, request, _) = agent.request().await;
    let manifest = release(2).manifest;
    assert_eq!(request, Request::BindRow(RowSpec { manifest, tensors: None, region: 3, offset: 0, align: 256 }));
    agent.engines.reply(conn, id, Err(ErrorReply::new(code::UNKNOWN_MANIFEST, "not here")));
    let bind = |tensor: &str, offset| BindingSpec {
        tensor: tensor.into(),
        dtype: "U8".into(),
        shape: vec![8],
        index: vec![],
        region: 3,
        offset,
        strides: vec![],
    };
    agent.expect(Request::Bind { bindings: vec![bind("a", 0), bind("b", 256)] }).await;
    engine.join().unwrap();
}
