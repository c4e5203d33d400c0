//! What only shared memory can get wrong. The rest is in [`crate::conformance`].

mod sealed;

use super::wire::{Header, Place, REQUEST_BYTES, Request, SETTLE, receive_header, send_header};
use super::*;
use crate::conformance::{Book, HOLDER, Holding, Node, OnCompletion, Reading, access, content, holder, memory, noise};
use crate::handshake::{Fault, examine, greet};
use crate::limits::{SHM_ACCEPTED_PER_PEER_MAX, SHM_SLOTS};
use crate::{Endpoint, OpId, ReadError, ReadOp, Refusal};
use aquifer_core::{ChunkHash, NodeSecret};
use aquifer_memory::{Mapping, MemoryStore, Span};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Instant;

/// One for all tests of a process: it is for many.
fn directory() -> PathBuf {
    static DIRECTORY: Mutex<Option<tempfile::TempDir>> = Mutex::new(None);
    let mut directory = DIRECTORY.lock().unwrap();
    directory.get_or_insert_with(|| tempfile::tempdir().unwrap()).path().to_path_buf()
}

fn start(
    config: ShmConfig,
    grants: Arc<dyn Grants>,
    completions: impl Fn(Completion) + Send + Sync + 'static,
) -> Arc<ShmTransport> {
    ShmTransport::start(&directory(), grants, completions, config).unwrap()
}

fn node(config: ShmConfig, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
    let transport = start(config, grants, completions);
    Node { endpoints: vec![Endpoint::Shm(transport.path().to_path_buf())], transport }
}

fn plain(_: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
    node(ShmConfig { connections_per_peer: 1, ..ShmConfig::default() }, grants, completions)
}

mod two_connections {
    use super::*;
    crate::conformance_tests!(|_, grants, completions| {
        node(ShmConfig { connections_per_peer: 2, ..ShmConfig::default() }, grants, completions)
    });
}

mod four_connections {
    use super::*;
    crate::conformance_tests!(|_, grants, completions| {
        node(ShmConfig { connections_per_peer: 4, ..ShmConfig::default() }, grants, completions)
    });
}

mod all_through_the_socket {
    use super::*;
    crate::conformance_tests!(|_, grants, completions| {
        node(ShmConfig { windows_bytes_max: 0, ..ShmConfig::default() }, grants, completions)
    });
}

/// A holder that does what a test tells it, to one connection after the other.
fn fake_holder<const N: usize>(scripts: [fn(UnixStream); N]) -> (PathBuf, JoinHandle<()>) {
    let path = directory().join(format!("fake-{:x}", rand::random::<u64>()));
    let listener = UnixListener::bind(&path).unwrap();
    let serve = move || scripts.into_iter().for_each(|script| script(listener.accept().unwrap().0));
    (path, std::thread::spawn(serve))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn welcome(stream: &UnixStream) {
    examine(stream, soon(), |_| Some((holder(), access().secret)), |_| true).unwrap();
}

fn next_request(mut stream: &UnixStream) -> Request {
    let mut bytes = [0; REQUEST_BYTES];
    stream.read_exact(&mut bytes).unwrap();
    Request::decode(&bytes).unwrap()
}

/// Answers the next request with a place, and a descriptor if there is one.
fn answer(stream: &UnixStream, place: Place, fd: Option<OwnedFd>) {
    let Request { chunk, len, .. } = next_request(stream);
    let header = Header { answer: Ok(()), place, chunk, len, dropped: 0 };
    send_header(stream, &header, fd.as_ref().map(AsFd::as_fd)).unwrap();
}

fn fresh(offset: u64) -> Place {
    Place::Slot { slot: 0, offset, fresh: true }
}

fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("t", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, len).unwrap();
    fd
}

/// Lets what was copied count.
fn settle(mut stream: &UnixStream) {
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [SETTLE]);
    stream.write_all(&[1]).unwrap();
}

/// Blocks until the other side closes.
fn wait_closed(mut stream: &UnixStream) {
    while matches!(stream.read(&mut [0; 512]), Ok(n) if n > 0) {}
}

fn read_at(path: &Path, id: OpId, len: usize) -> ReadOp {
    ReadOp {
        id,
        peer: holder(),
        endpoints: vec![Endpoint::Shm(path.to_path_buf())],
        access: access(),
        lease: 1,
        chunk: 1,
        into: memory(len),
        adopts: false,
        stall: Duration::from_secs(60),
    }
}

/// A reader without manners. `None` if it is turned away.
fn raw_reader(path: &Path) -> Option<UnixStream> {
    let stream = UnixStream::connect(path).unwrap();
    greet(&stream, &access(), soon()).ok().map(|()| stream)
}

fn book() -> Arc<Book> {
    let (book, _) = Book::new();
    book.admit(&access());
    book
}

/// A chunk in the memory store, as an agent has it.
fn stored(store: &MemoryStore, bytes: &[u8]) -> Span {
    let reservation = store.reserve(ChunkHash::of(bytes), bytes.len() as u64).unwrap();
    reservation.span().write(0, bytes).unwrap();
    reservation.commit().unwrap()
}

fn disconnected(result: &Result<crate::ReadDone, ReadError>, reason: &str) -> bool {
    matches!(result, Err(ReadError::Disconnected(text)) if text.contains(reason))
}

#[test]
fn a_window_is_passed_once_and_read_often() {
    let holding = Holding::start(plain, HOLDER);
    let store = MemoryStore::new(256 << 20);
    let chunks: Vec<Vec<u8>> = (0..20).map(|i| noise(i, 300_000 + usize::try_from(i).unwrap())).collect();
    for (chunk, bytes) in (0..).zip(&chunks) {
        holding.book.put_span(chunk, Ok(stored(&store, bytes)));
    }
    let path = holding.node.endpoints[0].shm().unwrap().to_path_buf();
    let stream = raw_reader(&path).unwrap();
    for (chunk, bytes) in (0..).zip(&chunks) {
        (&stream).write_all(&Request { chunk, lease: 1, len: u32::try_from(bytes.len()).unwrap() }.encode()).unwrap();
        let (header, fd) = receive_header(&stream).unwrap();
        let Place::Slot { fresh, .. } = Header::decode(&header).unwrap().place else { panic!("not shared") };
        assert_eq!((fresh, fd.is_some()), (chunk == 0, chunk == 0));
        (&stream).write_all(&[SETTLE]).unwrap();
        (&stream).read_exact(&mut [0]).unwrap();
    }
    let reading = Reading::start(plain);
    for (chunk, bytes) in (0..).zip(&chunks) {
        let op = holding.read(chunk, bytes.len());
        assert_eq!(reading.outcome(&op).unwrap().digest, ChunkHash::of(bytes));
        assert!(content(&op.into) == *bytes);
    }
}

#[test]
fn descriptors_are_bounded_and_go_with_the_memory() {
    let holding = Holding::start(plain, HOLDER);
    let reading = Reading::start(plain);
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let files = tempfile::Builder::new().prefix("aquifer-bound-test").tempdir().unwrap();
    let descriptors = || {
        let name = |entry: std::fs::DirEntry| std::fs::read_link(entry.path()).ok();
        open().filter_map(name).filter(|target| target.starts_with(files.path())).count()
    };
    let mut mappings: Vec<Arc<Mapping>> = Vec::new();
    for chunk in 0..3 * u32::try_from(SHM_SLOTS).unwrap() {
        let path = files.path().join(chunk.to_string());
        std::fs::write(&path, chunk.to_le_bytes()).unwrap();
        mappings.push(Mapping::file(&path).unwrap());
        holding.book.put_span(chunk, Ok(mappings[mappings.len() - 1].span()));
        let op = holding.read(chunk, 4);
        assert!(reading.outcome(&op).is_ok());
        assert_eq!(content(&op.into), chunk.to_le_bytes());
    }
    assert_eq!(descriptors(), mappings.len() + SHM_SLOTS, "the holder's own, and a reader's slots");
    let last = u32::try_from(mappings.len() - 1).unwrap();
    for chunk in 0..last {
        holding.book.put_span(chunk, Err(Refusal::Gone));
    }
    mappings.drain(..mappings.len() - 1);
    assert!(reading.outcome(&holding.read(last, 4)).is_ok());
    assert_eq!(descriptors(), 2, "what the holder dropped the reader dropped too");
}

#[test]
fn of_an_engines_memory_nothing_is_seen_but_the_chunk() {
    let holding = Holding::start(plain, HOLDER);
    let (region, _fd) = Mapping::memfd("t", 600_000).unwrap();
    region.span().write(0, &noise(1, 600_000)).unwrap();
    holding.book.put_span(1, region.span().slice(1000..101_000).map_err(|_| Refusal::Gone));
    let stream = raw_reader(holding.node.endpoints[0].shm().unwrap()).unwrap();
    (&stream).write_all(&Request { chunk: 1, lease: 1, len: 100_000 }.encode()).unwrap();
    let (_, fd) = receive_header(&stream).unwrap();
    let mut seen = Vec::new();
    File::from(fd.expect("a window")).read_to_end(&mut seen).unwrap();
    assert!(seen[..100_000] == noise(1, 600_000)[1000..101_000]);
    assert!(seen[100_000..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_a_hostile_holder_shares_harms_only_its_read() {
    let (path, thread) = fake_holder([
        |s| {
            welcome(&s);
            answer(&s, fresh(0), Some(std::io::pipe().unwrap().0.into())); // would never end
            wait_closed(&s);
        },
        |s| {
            welcome(&s);
            answer(&s, fresh(0), Some(File::open("/proc/self/status").unwrap().into()));
            wait_closed(&s);
        },
        |s| {
            welcome(&s);
            answer(&s, fresh(0), None);
            wait_closed(&s);
        },
        |s| {
            welcome(&s);
            answer(&s, Place::Here, Some(memfd(4096)));
            wait_closed(&s);
        },
        |s| {
            welcome(&s);
            answer(&s, Place::Slot { slot: 3, offset: 0, fresh: false }, None);
            wait_closed(&s);
        },
        |s| {
            welcome(&s);
            // Not sealed, and too short: from the beginning, and from beyond its end.
            for place in [fresh(0), fresh(1 << 40), fresh(u64::MAX - 10)] {
                answer(&s, place, Some(memfd(10)));
                settle(&s);
            }
            answer(&s, fresh(0), Some(memfd(4096)));
            settle(&s);
        },
    ]);
    let reading = Reading::start(plain);
    // Each is tried once more where nothing was written yet.
    let first = reading.outcome(&read_at(&path, 1, 4096));
    assert!(disconnected(&first, "file system"), "{first:?}");
    let second = reading.outcome(&read_at(&path, 2, 4096));
    assert!(disconnected(&second, "unasked"), "{second:?}");
    let third = reading.outcome(&read_at(&path, 3, 4096));
    // The fifth names what it never shared; by then the answer has begun.
    assert!(disconnected(&third, "did not share"), "{third:?}");
    for id in 4..7 {
        let short = reading.outcome(&read_at(&path, id, 4096));
        assert!(disconnected(&short, "cannot be read"), "{short:?}");
    }
    assert!(reading.outcome(&read_at(&path, 7, 4096)).is_ok());
    thread.join().unwrap();
}

#[test]
fn a_holder_that_does_not_know_the_secret_gets_no_request() {
    let (path, thread) = fake_holder([|s| {
        let result = examine(&s, soon(), |_| Some((holder(), [1; 32])), |_| true);
        assert!(matches!(result, Err(Fault::Misbehaved(_))));
    }]);
    let reading = Reading::start(plain);
    let result = reading.outcome(&read_at(&path, 1, 100));
    assert_eq!(result, Err(ReadError::Refused(Refusal::Ticket)));
    thread.join().unwrap();
}

#[test]
fn a_holder_that_is_silent_from_the_start_fails_all_that_wait() {
    let (path, thread) = fake_holder([|s| wait_closed(&s)]);
    let reading = Reading::start(|_, grants, completions| {
        let timeout = Duration::from_millis(50);
        node(
            ShmConfig { connections_per_peer: 1, handshake_timeout: timeout, ..ShmConfig::default() },
            grants,
            completions,
        )
    });
    let ops: Vec<ReadOp> = (0..5).map(|id| read_at(&path, id, 100)).collect();
    ops.iter().for_each(|op| reading.read(op));
    for _ in &ops {
        let (_, result) = reading.next();
        assert!(matches!(&result, Err(ReadError::Unreachable(reason)) if reason.contains("handshake")), "{result:?}");
    }
    thread.join().unwrap();
}

#[test]
fn a_holder_that_dies_in_the_middle_ends_the_read() {
    let (path, thread) = fake_holder([|s| {
        welcome(&s);
        answer(&s, fresh(0), Some(memfd(4096)));
    }]);
    let reading = Reading::start(plain);
    let result = reading.outcome(&read_at(&path, 1, 4096));
    assert!(matches!(result, Err(ReadError::Disconnected(_))), "{result:?}");
    thread.join().unwrap();
    let after = reading.outcome(&read_at(&path, 2, 4096));
    assert!(matches!(after, Err(ReadError::Unreachable(_))), "{after:?}");
}

#[test]
fn a_holder_that_never_says_whether_it_was_valid_is_a_stall() {
    let (path, thread) = fake_holder([|s| {
        welcome(&s);
        answer(&s, fresh(0), Some(memfd(4096)));
        wait_closed(&s);
    }]);
    let reading = Reading::start(plain);
    let op = ReadOp { stall: Duration::from_millis(50), ..read_at(&path, 1, 4096) };
    assert_eq!(reading.outcome(&op), Err(ReadError::Stalled));
    thread.join().unwrap();
}

#[test]
fn a_connection_lost_between_reads_is_opened_again() {
    let script: fn(UnixStream) = |s| {
        welcome(&s);
        answer(&s, fresh(0), Some(memfd(10)));
        settle(&s);
    };
    let (path, thread) = fake_holder([script, script]);
    let reading = Reading::start(plain);
    for id in 0..2 {
        assert!(reading.outcome(&read_at(&path, id, 10)).is_ok());
    }
    thread.join().unwrap();
}

#[test]
fn garbage_closes_its_connection_and_no_other() {
    let grants = book();
    grants.put(1, b"fine");
    let holder = start(ShmConfig::default(), grants, |_| {});
    let mut stranger = UnixStream::connect(holder.path()).unwrap();
    stranger.write_all(&[b'x'; 48]).unwrap();
    wait_closed(&stranger);
    let mut rude = raw_reader(holder.path()).unwrap();
    rude.write_all(&[b'x'; 10 * REQUEST_BYTES]).unwrap();
    wait_closed(&rude);
    let mut wrong = raw_reader(holder.path()).unwrap();
    wrong.write_all(&Request { chunk: 1, lease: 1, len: 5 }.encode()).unwrap();
    wait_closed(&wrong);
    // One that asks again before it has settled.
    let mut hasty = raw_reader(holder.path()).unwrap();
    (0..2).for_each(|_| hasty.write_all(&Request { chunk: 1, lease: 1, len: 4 }.encode()).unwrap());
    wait_closed(&hasty);
    let reading = Reading::start(plain);
    assert!(reading.outcome(&read_at(holder.path(), 1, 4)).is_ok());
    holder.shutdown();
    assert_eq!(holder.stats().rejected, 4, "{:?}", holder.stats());
}

#[test]
fn a_reader_that_takes_nothing_is_dropped() {
    let write_timeout = Duration::from_millis(50);
    let config = ShmConfig { write_timeout, windows_bytes_max: 0, ..ShmConfig::default() };
    let grants = book();
    let holder = start(config, grants.clone(), |_| {});
    grants.put_span(1, Ok(memory(16 << 20)));
    let mut greedy = raw_reader(holder.path()).unwrap();
    greedy.write_all(&Request { chunk: 1, lease: 1, len: 16 << 20 }.encode()).unwrap();
    while holder.stats().rejected == 0 {
        std::thread::yield_now();
    }
    holder.shutdown();
    assert_eq!(holder.stats().sent_bytes, 0);
}

#[test]
fn connections_are_bounded() {
    let config = ShmConfig { unauthenticated_max: 1, ..ShmConfig::default() };
    let holder = start(config, book(), |_| {});
    let quiet = UnixStream::connect(holder.path()).unwrap();
    let mut second = UnixStream::connect(holder.path()).unwrap();
    assert_eq!(second.read(&mut [0; 1]).unwrap(), 0);
    drop(quiet);
    let mut connections = Vec::new();
    while connections.len() < SHM_ACCEPTED_PER_PEER_MAX {
        // The seat of the quiet one is free once its thread has noticed.
        connections.extend(raw_reader(holder.path()));
    }
    let before = holder.stats();
    while holder.stats().rejected == before.rejected {
        assert!(raw_reader(holder.path()).is_none());
    }
    assert_eq!(holder.stats().accepted, SHM_ACCEPTED_PER_PEER_MAX as u64);
}

fn counting() -> (Receiver<Completion>, impl Fn(Completion) + Send + Sync) {
    let (sender, completions) = channel();
    let sender = Mutex::new(sender);
    (completions, move |completion| {
        let _ = sender.lock().unwrap().send(completion);
    })
}

#[test]
fn shutting_down_completes_everything_and_leaves_no_socket() {
    let holding = Holding::start(plain, HOLDER);
    holding.book.put(1, b"late");
    holding.book.hold(1);
    let (completions, complete) = counting();
    let transport = start(ShmConfig { connections_per_peer: 2, ..ShmConfig::default() }, book(), complete);
    let submit = |id| transport.submit(Operation::Read(ReadOp { id, ..holding.read(1, 4) }));
    (0..10).for_each(submit);
    holding.wait_asked(1);
    transport.shutdown();
    submit(10);
    let ended: Vec<Completion> = completions.try_iter().collect();
    assert_eq!(ended.len(), 11, "all are complete when shutdown returns");
    assert!(ended.iter().all(|c| matches!(c.result, Err(ReadError::Disconnected(_)))));
    assert!(!transport.path().exists());
    holding.book.release();
    transport.shutdown();
}

#[test]
fn dropping_completes_everything() {
    let holding = Holding::start(plain, HOLDER);
    holding.book.put(1, b"late");
    holding.book.hold(1);
    let reading = Reading::start(plain);
    (0..6).for_each(|id| reading.read(&ReadOp { id, ..holding.read(1, 4) }));
    holding.wait_asked(1);
    let Reading { node, completions } = reading;
    drop(node);
    let ended: Vec<Completion> = completions.iter().take(6).collect();
    assert!(ended.iter().all(|c| matches!(c.result, Err(ReadError::Disconnected(_)))));
    holding.book.release();
}

#[test]
fn two_nodes_of_one_directory_are_not_taken_for_one_another() {
    let (first, second) = (Holding::start(plain, HOLDER), Holding::start(plain, 2));
    first.book.put(1, b"first");
    second.book.put(1, b"other");
    assert_ne!(first.node.endpoints, second.node.endpoints);
    let reading = Reading::start(plain);
    let ops = [&first, &second].map(|holding| holding.read(1, 5));
    assert!(ops.iter().all(|op| reading.outcome(op).is_ok()));
    assert_eq!(ops.map(|op| content(&op.into)), [b"first", b"other"]);
}

/// Where a test that runs itself once more, as another process, finds the holder's socket.
const SOCKET: &str = "AQUIFER_TEST_SHM_SOCKET";

fn given_socket() -> Option<PathBuf> {
    std::env::var_os(SOCKET).map(PathBuf::from)
}

/// Runs the test of that name once more, by `command`, which becomes this program.
fn once_more(mut command: Command, test: &str, path: &Path) {
    let output = command.args(["--exact", test, "--nocapture"]).env(SOCKET, path).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}

#[test]
fn containers_with_networks_of_their_own_share_memory() {
    if let Some(path) = given_socket() {
        let routes = std::fs::read_to_string("/proc/self/net/route").unwrap();
        assert!(routes.lines().count() <= 1, "there is a network here: {routes}");
        let op = read_at(&path, 1, 300_000);
        assert_eq!(Reading::start(plain).outcome(&op).unwrap().digest, ChunkHash::of(&noise(1, 300_000)));
        return;
    }
    let own_network = ["--user", "--map-current-user", "--net"];
    let possible = Command::new("unshare").args(own_network).arg("true").output();
    if !possible.as_ref().is_ok_and(|output| output.status.success()) {
        return eprintln!("not run: this machine lets us make no network namespace ({possible:?})");
    }
    let holding = Holding::start(plain, HOLDER);
    let store = MemoryStore::new(64 << 20);
    holding.book.put_span(1, Ok(stored(&store, &noise(1, 300_000))));
    let mut command = Command::new("unshare");
    command.args(own_network).arg(std::env::current_exe().unwrap());
    let name = "shm::tests::containers_with_networks_of_their_own_share_memory";
    once_more(command, name, holding.node.endpoints[0].shm().unwrap());
}

#[test]
fn a_process_of_another_user_gets_nothing() {
    if let Some(path) = given_socket() {
        assert!(raw_reader(&path).is_none());
        let result = Reading::start(plain).outcome(&read_at(&path, 1, 4));
        assert!(matches!(&result, Err(ReadError::Unreachable(reason)) if reason.contains("of user")), "{result:?}");
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return eprintln!("not run: only root can start a process of another user");
    }
    // As if somebody had opened the door: by default another user does not get as far.
    let parent = tempfile::tempdir().unwrap();
    let open = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    let grants = book();
    grants.put(1, b"mine");
    let holder = ShmTransport::start(parent.path(), grants, |_| {}, ShmConfig::default()).unwrap();
    open(parent.path(), 0o755);
    open(holder.path(), 0o666);
    // The program itself may lie where the other user may not look.
    let program = parent.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(program);
    command.uid(65534).gid(65534).current_dir("/");
    once_more(command, "shm::tests::a_process_of_another_user_gets_nothing", holder.path());
    assert!(holder.stats().accepted == 0 && holder.stats().rejected > 0);
}
