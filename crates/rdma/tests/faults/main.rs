//! What happens when something breaks or somebody lies, on real devices: each case ends with the right
//! bytes or an error in time, and harms nothing that comes after it. For the guest of `cargo xtask
//! rdma-vm -n 2`, as root and one at a time: the tests take network interfaces down.

use aquifer_core::{ChunkHash, NodeId, NodeSecret};
use aquifer_memory::{MemoryStore, Span};
use aquifer_rdma::limits::SHOW_PATIENCE;
use aquifer_rdma::verbs::{
    Access, Address, Completion, CompletionQueue, Device, ProtectionDomain, QueuePair, QueuePairConfig,
    REGISTERING_LASTS, Region, RemoteRegion, Window, WorkError,
};
use aquifer_rdma::{RdmaConfig, RdmaTransport};
use aquifer_transport::conformance::{self, Book, HOLDER, OnCompletion, Reading, access, content, memory, noise};
use aquifer_transport::conformance::{Holding, Node};
use aquifer_transport::{Endpoint, Grants, Operation, ReadDone, ReadError, ReadOp, Refusal, Transport};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

mod registering;

const MIB: usize = 1 << 20;

/// Devices and interfaces are the machine's: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn node(grants: Arc<dyn Grants>, completions: OnCompletion, devices: &[&str]) -> Node {
    start(grants, completions, devices, RdmaConfig::default())
}

fn start(grants: Arc<dyn Grants>, completions: OnCompletion, devices: &[&str], config: RdmaConfig) -> Node {
    // What a device says of a failure is seen nowhere else.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    let devices = Some(devices.iter().map(|d| (*d).to_string()).collect());
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let config = RdmaConfig { devices, ..config };
    let transport = RdmaTransport::start(listen, grants, completions, config).expect("the devices are here");
    Node { endpoints: vec![Endpoint::Rdma(transport.local_addr())], transport }
}

fn on_one(_: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
    node(grants, completions, &["rxe0"])
}

fn in_pieces(_: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
    let config = RdmaConfig { region_bytes: MIB as u64, ..RdmaConfig::default() };
    start(grants, completions, &["rxe0", "rxe1"], config)
}

fn on_both(_: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
    node(grants, completions, &["rxe0", "rxe1"])
}

/// A read of `chunk`, numbered like it, that is not patient.
fn read_of(endpoints: &[Endpoint], chunk: u32, into: Span) -> ReadOp {
    ReadOp { stall: Duration::from_secs(20), ..conformance::read_of(endpoints, chunk, into) }
}

/// A holder in a process of its own.
struct OtherProcess {
    child: Child,
    endpoint: SocketAddr,
}

impl OtherProcess {
    fn hold(devices: &str, chunks: u32, len: usize) -> Self {
        let mut child = Command::new(peer())
            .args(["hold", devices, &chunks.to_string(), &len.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        let said = child.stdout.take().expect("piped");
        BufReader::new(said).read_line(&mut line).expect("it says where it listens");
        OtherProcess { endpoint: line.trim().parse().expect("ip:port"), child }
    }

    fn read(&self, chunk: u32, len: usize) -> ReadOp {
        read_of(&[Endpoint::Rdma(self.endpoint)], chunk, memory(len))
    }
}

impl Drop for OtherProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The example beside this test.
fn peer() -> PathBuf {
    let test = std::env::current_exe().expect("this program has a path");
    test.parent().and_then(|deps| deps.parent()).expect("target/PROFILE/deps").join("examples/peer")
}

fn run(command: &str) -> String {
    let output = Command::new("bash").args(["-c", command]).output().expect("bash runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {text}");
    text
}

/// The interface is up again at the end, however the test ends.
struct Down(&'static str);

impl Down {
    fn take(interface: &'static str) -> Self {
        run(&format!("ip link set {interface} down"));
        Down(interface)
    }
}

impl Drop for Down {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "set", self.0, "up"]).status();
    }
}

fn assert_right(op: &ReadOp) {
    let len = usize::try_from(op.into.len()).expect("small");
    assert!(content(&op.into) == noise(u64::from(op.chunk), len), "chunk {} has other bytes", op.chunk);
}

#[test]
fn a_killed_holder_fails_its_reads_soon_and_the_next_serves() {
    let _turn = alone();
    const CHUNKS: u32 = 24;
    let mut holding = OtherProcess::hold("rxe0", CHUNKS, MIB);
    let reading = Reading::start(on_one);
    let ops: Vec<ReadOp> = (0..CHUNKS).map(|chunk| holding.read(chunk, MIB)).collect();
    ops.iter().for_each(|op| reading.read(op));
    let (first, result) = reading.next();
    result.expect("the holder lives");
    holding.child.kill().expect("SIGKILL");
    let killed = Instant::now();
    let mut failed = Vec::new();
    for _ in 1..CHUNKS {
        match reading.next() {
            (id, Ok(_)) => assert_right(&ops[usize::try_from(id).expect("small")]),
            (id, Err(ReadError::Disconnected(_) | ReadError::Unreachable(_))) => failed.push(id),
            (id, Err(error)) => panic!("read {id}: {error}"),
        }
    }
    assert_right(&ops[usize::try_from(first).expect("small")]);
    assert!(!failed.is_empty(), "it was killed too late for this test to mean anything");
    assert!(killed.elapsed() < Duration::from_secs(10), "it took {:?}", killed.elapsed());

    let next = OtherProcess::hold("rxe0", CHUNKS, MIB);
    for id in failed {
        let op = next.read(u32::try_from(id).expect("small"), MIB);
        reading.outcome(&op).expect("the next holder serves");
        assert_right(&op);
    }
}

#[test]
fn readers_that_are_killed_leave_the_holder_serving() {
    let _turn = alone();
    let holding = Holding::start(on_one, HOLDER);
    for chunk in 0..16 {
        holding.book.put(chunk, &noise(u64::from(chunk), 4 * MIB));
    }
    let Some(Endpoint::Rdma(endpoint)) = holding.node.endpoints.first() else { panic!("it listens") };
    for chunk in 0..3 {
        let mut reader = Command::new(peer())
            .args(["read", "rxe0", &endpoint.to_string(), "16", &(4 * MIB).to_string()])
            .spawn()
            .expect("it starts");
        holding.wait_asked(chunk); // it is reading now
        reader.kill().expect("SIGKILL");
        reader.wait().expect("it ends");
    }
    let reading = Reading::start(on_one);
    let op = holding.read(15, 4 * MIB);
    reading.outcome(&op).expect("it serves whoever is next");
    assert_right(&op);
}

#[test]
fn an_interface_that_goes_down_and_comes_back() {
    let _turn = alone();
    let holding = Holding::start(on_one, HOLDER);
    let reading = Reading::start(on_one);
    for chunk in 0..16 {
        holding.book.put(chunk, &noise(u64::from(chunk), MIB));
    }
    let ops: Vec<ReadOp> = (0..16).map(|chunk| holding.read(chunk, MIB)).collect();
    ops.iter().for_each(|op| reading.read(op));
    reading.next().1.expect("the interface is up");
    let down = Down::take("rx0");
    for _ in 1..16 {
        match reading.next() {
            (id, Ok(_)) => assert_right(&ops[usize::try_from(id).expect("small")]),
            (_, Err(ReadError::Disconnected(_) | ReadError::Unreachable(_))) => {}
            (id, Err(error)) => panic!("read {id}: {error}"),
        }
    }
    let op = holding.read(3, MIB);
    let result = reading.outcome(&op);
    assert!(matches!(result, Err(ReadError::Unreachable(_) | ReadError::Disconnected(_))), "{result:?}");
    drop(down);
    let op = holding.read(3, MIB);
    reading.outcome(&op).expect("the interface is up again");
    assert_right(&op);
}

#[test]
fn one_port_of_two_lost_half_way_only_slows() {
    let _turn = alone();
    const CHUNKS: u32 = 64;
    let holding = Holding::start(on_both, HOLDER);
    let reading = Reading::start(on_both);
    for chunk in 0..CHUNKS {
        holding.book.put(chunk, &noise(u64::from(chunk), MIB));
    }
    let ops: Vec<ReadOp> = (0..CHUNKS).map(|chunk| holding.read(chunk, MIB)).collect();
    let before = [packets("rxe0"), packets("rxe1")];
    ops.iter().for_each(|op| reading.read(op));
    for _ in 0..CHUNKS / 2 {
        reading.next().1.expect("both ports are up");
    }
    let after = [packets("rxe0"), packets("rxe1")];
    assert!(after[0] > before[0] && after[1] > before[1], "only one port was used: {before:?}, {after:?}");
    let _down = Down::take("rx1");
    for _ in CHUNKS / 2..CHUNKS {
        let (id, result) = reading.next();
        assert!(result.is_ok(), "read {id}: {result:?}");
    }
    ops.iter().for_each(assert_right);
}

fn packets(device: &str) -> u64 {
    let path = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/rcvd_pkts");
    std::fs::read_to_string(path).expect("rxe counts").trim().parse().expect("a number")
}

#[test]
fn one_packet_in_a_hundred_lost() {
    let _turn = alone();
    run("ip link show wa >/dev/null 2>&1 || tests/rdma-vm/two-devices.sh");
    run("tc qdisc add dev wa root netem loss 1%; tc qdisc add dev wb root netem loss 1%");
    let holding = OtherProcess::hold("rxeb", 4, MIB);
    let said = run(&format!("{} read rxea {} 4 {MIB}", peer().display(), holding.endpoint));
    let lost = run("tc -s qdisc show dev wb; tc qdisc del dev wa root; tc qdisc del dev wb root");
    assert!(said.starts_with("ok"), "{said}");
    assert!(lost.contains("dropped") && !lost.contains("dropped 0,"), "nothing was lost: {lost}");
}

/// Grants everything, until it takes it all back.
#[derive(Debug)]
struct Fickle {
    spans: BTreeMap<u32, Span>,
    valid: AtomicBool,
    asked: Mutex<BTreeSet<u32>>,
}

impl Fickle {
    fn new(spans: impl IntoIterator<Item = (u32, Span)>) -> Arc<Self> {
        let spans = spans.into_iter().collect();
        Arc::new(Fickle { spans, valid: AtomicBool::new(true), asked: Mutex::default() })
    }

    fn was_asked(&self, chunk: u32) -> bool {
        self.asked.lock().expect("nobody panics with it").contains(&chunk)
    }
}

/// A window that closes under a READ breaks the connection. Where the holder's word of it comes later than the
/// reader waits for one, the reader asks again over the next connection and hears it there.
fn lease_ended(result: Option<&Result<ReadDone, ReadError>>) -> bool {
    matches!(result, Some(Err(ReadError::Revoked | ReadError::Refused(Refusal::Expired))))
}

impl Grants for Fickle {
    fn secret(&self, ticket: u64) -> Option<(NodeId, [u8; 32])> {
        (ticket == access().ticket).then_some((NodeId([9; 32]), access().secret))
    }

    fn open(&self, _: NodeId, _: u64, chunk: u32) -> Result<Span, Refusal> {
        self.asked.lock().expect("nobody panics with it").insert(chunk);
        if !self.valid.load(Ordering::SeqCst) {
            return Err(Refusal::Expired);
        }
        self.spans.get(&chunk).cloned().ok_or(Refusal::Unknown)
    }

    fn still_valid(&self, _: NodeId, _: u64, _: u32) -> bool {
        self.valid.load(Ordering::SeqCst)
    }

    fn sent(&self, _: NodeId, _: u64, _: u64) {}
}

#[test]
fn a_lease_that_ends_closes_its_window_under_the_read() {
    let _turn = alone();
    const LEN: usize = 64 * MIB;
    let source = memory(LEN);
    source.write(LEN as u64 - MIB as u64, &noise(1, MIB)).expect("as long");
    let grants = Fickle::new([(1, source)]);
    let holding = node(grants.clone(), Box::new(|_| {}), &["rxe0"]);
    let reading = Reading::start(on_one);
    let op = read_of(&holding.endpoints, 1, memory(LEN));
    reading.read(&op);
    let begun = packets("rxe0");
    while packets("rxe0") < begun + 100 {
        std::thread::yield_now(); // until bytes flow
    }
    grants.valid.store(false, Ordering::SeqCst);
    let (_, result) = reading.next();
    assert!(lease_ended(Some(&result)), "{result:?}");
    // 64 MiB take more than a second here: what came is what came before the window was closed.
    let received = counted(&reading.node.transport, "received_bytes");
    assert!(received < LEN as u64, "the read went on to its end");
    grants.valid.store(true, Ordering::SeqCst);
    let again = ReadOp { id: 2, ..op };
    reading.outcome(&again).expect("a lease that holds is served again");
    let end = again.into.slice(LEN as u64 - MIB as u64..LEN as u64).expect("inside");
    assert!(content(&end) == noise(1, MIB), "other bytes have arrived");
}

/// Waits for something that others bring about.
fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(120), "{what}: not within two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The transport tells only in words what it counts.
fn counted(transport: &Arc<dyn Transport>, what: &str) -> u64 {
    let said = format!("{transport:?}");
    let (_, rest) = said.split_once(&format!(" {what}: ")).expect("it counts");
    rest.split([',', ' ']).next().and_then(|n| n.parse().ok()).expect("a number")
}

/// Two queue pairs of this process, connected with each other.
struct Pair {
    domain: Arc<ProtectionDomain>,
    completions: Arc<CompletionQueue>,
    holder: QueuePair,
    reader: QueuePair,
}

impl Pair {
    fn new(device: &Arc<Device>, domain: &Arc<ProtectionDomain>) -> Self {
        let completions = Arc::new(CompletionQueue::new(device, 64).expect("a completion queue"));
        let port = device.port(1).expect("port 1");
        let gid = *port.best_gid().expect("an address");
        let make = || {
            let pair = QueuePair::new(domain, &completions, 8).expect("a queue pair");
            let address = Address {
                queue_pair: pair.number(),
                sequence: 7,
                gid: gid.raw,
                lid: port.lid,
                mtu_code: 3,
                reads_in: 8,
                reads_out: 8,
            };
            (pair, address)
        };
        let ((holder, theirs), (reader, ours)) = (make(), make());
        let config = QueuePairConfig { ack_timeout_exponent: 14, retry_count: 6, traffic_class: 0 };
        holder.connect(&port, &gid, &theirs, &ours, config).expect("it connects");
        reader.connect(&port, &gid, &ours, &theirs, config).expect("it connects");
        Pair { domain: domain.clone(), completions, holder, reader }
    }

    fn next(&self) -> Completion {
        let mut found = Vec::new();
        while !self.completions.poll(&mut found).expect("it can be polled") {
            poll(&mut [PollFd::new(&*self.completions, PollFlags::IN)], None).expect("poll");
            self.completions.rearm().expect("it can be armed");
        }
        found.remove(0)
    }

    fn show(&self, window: &mut Window, region: &Arc<Region>, part: &Span) -> RemoteRegion {
        let remote = self.holder.bind(1, window, region, part).expect("it is posted");
        assert_eq!(self.next().result, Ok(()));
        self.holder.bound(window);
        remote
    }

    /// Reads a page at an address by a key.
    fn try_read(&self, address: u64, key: u32) -> Result<Vec<u8>, WorkError> {
        let into = memory(4096);
        let region = Region::register(&self.domain, into.clone(), Access::Land).expect("registered");
        self.reader.read(2, &region, &into, RemoteRegion { address, len: 4096, key }).expect("it is posted");
        let result = self.next().result;
        self.reader.completed(2);
        result.map(|()| content(&into))
    }
}

/// What ARCHITECTURE.md says of keys, but for the edges of a window: soft-RoCE lets a window's key read
/// all of the region behind it, as far as the kernel's `check_rkey` of rxe goes. What is outside of the
/// region is refused.
#[test]
fn a_key_opens_what_it_was_given_for_and_to_whom() {
    let _turn = alone();
    let device = Device::open("rxe0").expect("the device is here");
    let domain = ProtectionDomain::new(&device).expect("a domain");
    let slab = memory(16 * 4096);
    slab.write(0, &noise(1, 16 * 4096)).expect("as long");
    let region = Region::register(&domain, slab.clone(), Access::Windows).expect("registered");
    let chunk = slab.slice(4 * 4096..8 * 4096).expect("inside");
    let right = content(&chunk);
    assert!(region.remote(&chunk).is_none(), "the region has no key of its own to give away");

    // A refused read ends its connection, so there is one for each.
    let mut outcomes = BTreeMap::new();
    for case in ["chunk", "outside", "guessed", "closed", "other"] {
        let pair = Pair::new(&device, &domain);
        let mut window = Window::new(&domain).expect("rxe has windows");
        let shown = pair.show(&mut window, &region, &chunk);
        let other = Pair::new(&device, &domain);
        let result = match case {
            "chunk" => pair.try_read(shown.address + 4096, shown.key),
            "outside" => pair.try_read(shown.address + 16 * 4096, shown.key),
            "guessed" => pair.try_read(shown.address, shown.key ^ 0x5500),
            "closed" => {
                pair.holder.close(3, &window).expect("it is posted");
                assert_eq!(pair.next().result, Ok(()));
                pair.holder.closed(&mut window);
                pair.try_read(shown.address, shown.key)
            }
            _ => other.try_read(shown.address, shown.key),
        };
        outcomes.insert(case, result);
    }
    assert_eq!(outcomes.remove("chunk"), Some(Ok(right[4096..2 * 4096].to_vec())));
    for (case, result) in outcomes {
        assert_eq!(result, Err(WorkError::Access), "{case}");
    }
}

#[test]
fn whoever_comes_and_goes_leaves_nothing_behind() {
    let _turn = alone();
    await_that("what other tests left is gone", || run("rdma resource").lines().all(|line| line.contains("ctx 0")));
    let before = run("rdma resource");
    let said = run(&format!("{} cycles rxe0 200", peer().display()));
    let lines: Vec<&str> = said.lines().collect();
    let fds = |line: &str| line.split(": ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u32>().ok());
    assert_eq!(lines.len(), 2, "{said}");
    assert_eq!(fds(lines[0]), fds(lines[1]), "{said}");
    assert_eq!(run("rdma resource"), before);
}

#[test]
fn cancelled_reads_leave_their_memory_alone() {
    let _turn = alone();
    let (book, _) = Book::new();
    book.admit(&access());
    let holding = Holding::start(on_one, HOLDER);
    holding.book.put(1, &noise(1, 16 * MIB));
    let reading = Reading::start(on_one);
    let op = holding.read(1, 16 * MIB);
    reading.read(&op);
    let begun = packets("rxe0");
    while packets("rxe0") < begun + 50 {
        std::thread::yield_now(); // until bytes flow
    }
    reading.node.transport.submit(Operation::Cancel(1));
    assert_eq!(reading.next(), (1, Err(ReadError::Cancelled)));
    op.into.write(0, &vec![0; 16 * MIB]).expect("as long");
    let after = ReadOp { id: 2, into: memory(16 * MIB), ..op.clone() };
    reading.outcome(&after).expect("the connection is still good");
    assert_right(&after);
    assert!(content(&op.into).iter().all(|byte| *byte == 0), "written to after the completion");
}
