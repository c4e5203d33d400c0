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
use aquifer_transport::conformance::{Book, HOLDER, OnCompletion, Reading, access, content, holder, memory, noise};
use aquifer_transport::conformance::{Holding, Node};
use aquifer_transport::{Endpoint, Grants, Operation, ReadError, ReadOp, Refusal, Transport};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
        ReadOp {
            id: u64::from(chunk),
            peer: holder(),
            endpoints: vec![Endpoint::Rdma(self.endpoint)],
            access: access(),
            lease: 1,
            chunk,
            into: memory(len),
            adopts: false,
            stall: Duration::from_secs(20),
        }
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

#[test]
fn too_little_memory_may_be_locked() {
    let _turn = alone();
    let holding = OtherProcess::hold("rxe0", 2, MIB);
    run("chmod a+rw /dev/infiniband/*");
    let reader = format!("ulimit -l 512; exec {} read rxe0 {} 2 {MIB}", peer().display(), holding.endpoint);
    let said =
        run(&format!("setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set -all bash -c '{reader}'"));
    assert!(said.starts_with("failed") && said.contains("may lock 524288 bytes"), "{said}");
    assert!(said.contains("LimitMEMLOCK"), "it says what to do: {said}");
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

impl Grants for Fickle {
    fn secret(&self, ticket: u64) -> Option<(NodeId, [u8; 32])> {
        (ticket == access().ticket).then_some((NodeId([9; 32]), access().secret))
    }

    fn open(&self, _: NodeId, _: u64, chunk: u32) -> Result<Span, Refusal> {
        self.asked.lock().expect("nobody panics with it").insert(chunk);
        self.spans.get(&chunk).cloned().ok_or(Refusal::Unknown)
    }

    fn still_valid(&self, _: NodeId, _: u64, _: u32) -> bool {
        self.valid.load(Ordering::SeqCst)
    }

    fn sent(&self, _: NodeId, _: u64) {}
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
    let op = ReadOp {
        id: 1,
        peer: holder(),
        endpoints: holding.endpoints.clone(),
        access: access(),
        lease: 1,
        chunk: 1,
        into: memory(LEN),
        adopts: false,
        stall: Duration::from_secs(20),
    };
    reading.read(&op);
    let begun = packets("rxe0");
    while packets("rxe0") < begun + 100 {
        std::thread::yield_now(); // until bytes flow
    }
    grants.valid.store(false, Ordering::SeqCst);
    assert_eq!(reading.next(), (1, Err(ReadError::Revoked)));
    // 64 MiB take more than a second here: what came is what came before the window was closed.
    let received = counted(&reading.node.transport, "received_bytes");
    assert!(received < LEN as u64, "the read went on to its end");
    grants.valid.store(true, Ordering::SeqCst);
    let again = ReadOp { id: 2, ..op };
    reading.outcome(&again).expect("a lease that holds is served again");
    let end = again.into.slice(LEN as u64 - MIB as u64..LEN as u64).expect("inside");
    assert!(content(&end) == noise(1, MIB), "other bytes have arrived");
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

/// No registration comes to its end until this is dropped.
struct Slow;

impl Slow {
    fn registering() -> Self {
        REGISTERING_LASTS.store(true, Ordering::SeqCst);
        Slow
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        REGISTERING_LASTS.store(false, Ordering::SeqCst);
    }
}

/// A holder that registers for longer than its reader waits says so in time; a reader that does waits for
/// nobody but itself.
#[test]
fn registering_for_long_is_no_stall() {
    let _turn = alone();
    let holding = Holding::start(on_one, HOLDER);
    for chunk in [1, 2] {
        holding.book.put(chunk, &noise(u64::from(chunk), MIB));
    }
    let reading = Reading::start(on_one);
    let landing = memory(MIB);
    let first = ReadOp { into: landing.clone(), ..holding.read(1, MIB) };
    reading.outcome(&first).expect("nothing is slow yet");

    let slow = Slow::registering();
    let second = ReadOp { into: landing, ..holding.read(2, MIB) };
    let result = reading.outcome(&second);
    assert!(matches!(result, Err(ReadError::Unreachable(_))), "the holder registers: {result:?}");
    drop(slow);
    // The registration comes to its end, though nobody waits for it.
    await_that("what is registered at last is read", || reading.outcome(&second).is_ok());
    assert_right(&second);

    let slow = Slow::registering();
    let third = ReadOp { stall: Duration::from_secs(1), ..holding.read(2, MIB) };
    reading.read(&third);
    let early = reading.completions.recv_timeout(3 * third.stall);
    assert!(early.is_err(), "its own registration may take as long as it does: {early:?}");
    drop(slow);
    reading.next().1.expect("now it is registered");
    assert_right(&third);
}

/// A connection's other reads go on while memory is being registered for one, and their leases are looked at.
#[test]
fn registering_for_long_keeps_nobody_else_waiting() {
    let _turn = alone();
    const LEN: usize = 64 * MIB;
    let grants = Fickle::new([(1, memory(LEN)), (2, memory(MIB))]);
    let holding = node(grants.clone(), Box::new(|_| {}), &["rxe0"]);
    let reading = Reading::start(on_one);
    let op = |chunk: u32, into| ReadOp {
        id: u64::from(chunk),
        peer: holder(),
        endpoints: holding.endpoints.clone(),
        access: access(),
        lease: 1,
        chunk,
        into,
        adopts: false,
        stall: Duration::from_secs(60),
    };
    let long = op(1, memory(LEN));
    reading.outcome(&long).expect("now both sides have registered it");
    let before = counted(&reading.node.transport, "received_bytes");

    let slow = Slow::registering();
    reading.read(&op(2, memory(MIB)));
    await_that("the holder is asked for the other", || grants.was_asked(2));
    let begun = packets("rxe0");
    reading.read(&long);
    await_that("bytes flow", || packets("rxe0") >= begun + 100);
    grants.valid.store(false, Ordering::SeqCst);
    let mut results = BTreeMap::from([reading.next(), reading.next()]);
    drop(slow);
    assert_eq!(results.remove(&1), Some(Err(ReadError::Revoked)));
    // Its lease has ended as well: whichever is noticed first.
    let other = results.remove(&2);
    let unread = matches!(other, Some(Err(ReadError::Unreachable(_) | ReadError::Revoked | ReadError::Refused(_))));
    assert!(unread, "it was registered first: {other:?}");
    let received = counted(&reading.node.transport, "received_bytes") - before;
    assert!(received < LEN as u64, "the read went on to its end");
}

/// However long memory is, what is registered of it are pieces around what is read; and when nobody keeps it
/// any more, no port does.
#[test]
fn long_memory_is_registered_in_pieces_and_given_back() {
    let _turn = alone();
    const LEN: usize = 1 << 30; // hardly any of which is ever touched
    let holding = Holding::start(in_pieces, HOLDER);
    let reading = Reading::start(in_pieces);
    let (from, into) = (memory(LEN), memory(LEN));
    // At either end of it, and enough of them for two ports.
    let begins = (0..16).map(|at| at << 18).flat_map(|at| [at, LEN as u64 - (5 << 20) + at]);
    let mut ops: Vec<ReadOp> = Vec::new();
    for (chunk, begin) in (0..).zip(begins) {
        let part = |of: &Span| of.slice(begin..begin + (1 << 18)).expect("inside");
        part(&from).write(0, &noise(u64::from(chunk), 1 << 18)).expect("as long");
        holding.book.put_span(chunk, Ok(part(&from)));
        ops.push(ReadOp { into: part(&into), ..holding.read(chunk, 1 << 18) });
    }
    ops.iter().for_each(|op| reading.read(op));
    for _ in &ops {
        reading.next().1.expect("nothing is broken");
    }
    ops.iter().for_each(assert_right);
    for node in [&holding.node, &reading.node] {
        let registered = counted(&node.transport, "registered_bytes");
        // Each port has nine pieces at most, of 17 MiB and what is left to the end.
        assert!(0 < registered && registered <= 2 * 9 * (17 << 20), "{registered} bytes are registered");
    }
    (0..32).for_each(|chunk| holding.book.put_span(chunk, Err(Refusal::Gone)));
    drop((from, into, ops));
    for node in [&holding.node, &reading.node] {
        await_that("what nobody keeps is given back", || counted(&node.transport, "regions") == 0);
    }
}

/// A store's slab of sixteen chunks, which is full then.
fn full_slab() -> Vec<Span> {
    let store = MemoryStore::new(64 << 20);
    let put = |n: u64| {
        let bytes = noise(n, 4 * MIB);
        let room = store.reserve(ChunkHash::of(&bytes), bytes.len() as u64).expect("room for sixteen");
        room.span().write_past_caches(0, &bytes).expect("as long");
        room.commit().expect("it is kept")
    };
    (0..16).map(put).collect()
}

/// As an agent does for readers of its own machine.
fn seal(chunk: &Span) {
    let shared = chunk.mapping().0.share().expect("it can be asked for");
    assert!(shared.is_some() && !chunk.is_writable(), "a full slab of large pages is sealed");
}

/// Two chunks of a slab: one while it is being sealed, another when it is.
#[test]
fn sealed_memory_is_served_from_copies() {
    let _turn = alone();
    let slab = full_slab();
    let plain = memory(4 * MIB);
    plain.write(0, &noise(20, 4 * MIB)).expect("as long");
    let grants = Fickle::new([(1, slab[1].clone()), (2, slab[2].clone()), (20, plain)]);
    let holding = node(grants, Box::new(|_| {}), &["rxe0"]);
    let reading = Reading::start(on_one);
    let landing = memory(4 * MIB);
    let op = |chunk: u32| ReadOp {
        id: u64::from(chunk),
        peer: holder(),
        endpoints: holding.endpoints.clone(),
        access: access(),
        lease: 1,
        chunk,
        into: landing.clone(),
        adopts: false,
        stall: Duration::from_secs(20),
    };
    reading.outcome(&op(20)).expect("nothing is slow yet, and the landing place is registered now");
    let staged = || counted(&holding.transport, "staged_bytes");
    assert_eq!(staged(), 0);

    let begun = Instant::now();
    let slow = Slow::registering();
    [1, 99].iter().for_each(|chunk| reading.read(&op(*chunk)));
    // Requests are looked at in their order: when there is an answer, the slab is being registered.
    let mut results = BTreeMap::from([reading.next()]);
    seal(&slab[1]);
    drop(slow);
    results.extend([reading.next()]);
    assert_eq!(results.remove(&99), Some(Err(ReadError::Refused(Refusal::Unknown))));
    // Of a machine that took so long with this the holder may have said that it registers.
    if begun.elapsed() < SHOW_PATIENCE {
        assert!(matches!(results.remove(&1), Some(Ok(_))), "it is copied when it cannot be registered");
        assert_right(&op(1));
        assert_eq!(staged(), 4 * MIB as u64);
    }
    let before = staged();
    await_that("the holder is asked again", || reading.outcome(&op(2)).is_ok());
    assert_right(&op(2));
    assert!(staged() > before);

    let domain = ProtectionDomain::new(&Device::open("rxe0").expect("the device is here")).expect("a domain");
    let error = Region::register(&domain, slab[3].clone(), Access::Windows).expect_err("it is read-only");
    assert!(error.to_string().contains("Bad address"), "{error}");
}

/// Waits for something that others bring about.
fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(120), "{what}: not within two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Why chunks of files are copied first. Where a newer kernel in the guest makes this fail, think again.
#[test]
fn the_pages_of_a_file_cannot_be_registered() {
    let _turn = alone();
    let path = std::env::temp_dir().join(format!("aquifer-rdma-{}", std::process::id()));
    std::fs::write(&path, noise(1, MIB)).expect("room for a test's file");
    let span = aquifer_memory::Mapping::file(&path).expect("mapped").span();
    std::fs::remove_file(&path).expect("just made");
    let domain = ProtectionDomain::new(&Device::open("rxe0").expect("the device is here")).expect("a domain");
    for access in [Access::Read, Access::Windows] {
        let error = Region::register(&domain, span.clone(), access).expect_err("6.1 pins none of it");
        assert!(error.to_string().contains("Bad address"), "{error}");
    }
}
