//! What every transport must do, as tests written against [`Transport`] alone.
//!
//! A crate with a transport calls [`crate::conformance_tests!`] with a function that starts a node.
//! Nothing here sleeps: a test waits for a completion or for a call of the holder's [`Grants`].

use crate::{Completion, Endpoint, Grants, OpId, Operation, ReadDone, ReadError, ReadOp, Refusal, Transport};
use aquifer_core::{Access, ChunkHash, NodeId, NodeSecret};
use aquifer_memory::{Mapping, Span};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Long enough for anything that is going to happen on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

pub type OnCompletion = Box<dyn Fn(Completion) + Send + Sync>;

/// A running node of the transport under test.
#[derive(Debug)]
pub struct Node {
    pub transport: Arc<dyn Transport>,
    pub endpoints: Vec<Endpoint>,
}

/// Starts a node that serves `grants`.
pub type Factory = fn(NodeSecret, Arc<dyn Grants>, OnCompletion) -> Node;

/// Makes a `#[test]` of each requirement for the transport that a [`Factory`] starts.
#[macro_export]
macro_rules! conformance_tests {
    ($factory:expr) => {
        $crate::conformance_tests!(@ $factory,
            bytes_arrive_and_are_hashed_where_they_lie,
            files_are_served_as_well_as_memory,
            many_reads_of_many_peers,
            a_refusal_comes_through_and_harms_nothing_else,
            a_wrong_ticket_is_refused,
            a_lease_revoked_while_it_is_read,
            a_dead_peer_fails_every_read,
            no_endpoint_is_an_error,
            a_silent_holder_is_a_stall,
            a_cancelled_read_ends_and_the_others_go_on,
            cancelling_nothing_does_nothing,
            disconnecting_ends_every_read_and_no_later_one,
            a_truncated_source_ends_the_read,
            a_bad_landing_place_is_refused,
            exactly_one_completion_whatever_is_cancelled,
        );
    };
    (@ $factory:expr, $($name:ident,)*) => {
        $(#[test]
        fn $name() {
            $crate::conformance::$name($factory);
        })*
    };
}

/// What a holder of these tests grants, and the means to hold it up.
pub struct Book {
    /// Ticket to its peer and secret.
    tickets: Mutex<BTreeMap<u64, (NodeId, [u8; 32])>>,
    chunks: Mutex<BTreeMap<u32, Result<Span, Refusal>>>,
    revoked: Mutex<BTreeSet<u64>>,
    /// Chunks whose `open` waits, and news of who waits.
    held: Mutex<BTreeSet<u32>>,
    changed: Condvar,
    opened: Mutex<Sender<u32>>,
    sent: Mutex<u64>,
}

impl Book {
    /// A book, and the chunks that were asked for, as they are.
    pub fn new() -> (Arc<Self>, Receiver<u32>) {
        let (opened, asked) = channel();
        let book = Book {
            tickets: Mutex::default(),
            chunks: Mutex::default(),
            revoked: Mutex::default(),
            held: Mutex::default(),
            changed: Condvar::new(),
            opened: Mutex::new(opened),
            sent: Mutex::default(),
        };
        (Arc::new(book), asked)
    }

    pub fn put(&self, chunk: u32, bytes: &[u8]) {
        let span = memory(bytes.len());
        span.write(0, bytes).expect("the span is as long as the bytes");
        self.put_span(chunk, Ok(span));
    }

    pub fn put_span(&self, chunk: u32, span: Result<Span, Refusal>) {
        lock(&self.chunks).insert(chunk, span);
    }

    pub fn admit(&self, access: &Access) {
        lock(&self.tickets).insert(access.ticket, (reader(), access.secret));
    }

    /// Lets whoever asks for `chunk` wait.
    pub fn hold(&self, chunk: u32) {
        lock(&self.held).insert(chunk);
    }

    pub fn release(&self) {
        lock(&self.held).clear();
        self.changed.notify_all();
    }

    pub fn sent_bytes(&self) -> u64 {
        *lock(&self.sent)
    }
}

impl Grants for Book {
    fn secret(&self, ticket: u64) -> Option<(NodeId, [u8; 32])> {
        lock(&self.tickets).get(&ticket).copied()
    }

    fn open(&self, peer: NodeId, _: u64, chunk: u32) -> Result<Span, Refusal> {
        assert_eq!(peer, reader());
        let _ = lock(&self.opened).send(chunk);
        let mut held = lock(&self.held);
        while held.contains(&chunk) {
            held = self.changed.wait(held).expect("nobody panics while holding a lock here");
        }
        drop(held);
        lock(&self.chunks).get(&chunk).cloned().unwrap_or(Err(Refusal::Unknown))
    }

    fn still_valid(&self, _: NodeId, lease: u64, _: u32) -> bool {
        !lock(&self.revoked).contains(&lease)
    }

    fn sent(&self, peer: NodeId, _: u64, bytes: u64) {
        assert_eq!(peer, reader());
        *lock(&self.sent) += bytes;
    }
}

impl fmt::Debug for Book {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Book")
    }
}

/// The key of one of the nodes of these tests.
pub fn identity(number: u8) -> NodeSecret {
    NodeSecret::from_seed([number; 32])
}

/// Every holder of these tests knows its one reader by this name.
pub fn reader() -> NodeId {
    identity(READER).public()
}

/// The holder, where there is one.
pub fn holder() -> NodeId {
    identity(HOLDER).public()
}

const READER: u8 = 0xaa;
pub const HOLDER: u8 = 1;

/// A reader and the completions of its reads.
#[derive(Debug)]
pub struct Reading {
    pub node: Node,
    pub completions: Receiver<Completion>,
}

impl Reading {
    pub fn start(factory: Factory) -> Self {
        let (sender, completions) = channel();
        let sender = Mutex::new(sender);
        let (book, _) = Book::new();
        let on_completion = move |completion| {
            let _ = lock(&sender).send(completion);
        };
        Reading { node: factory(identity(READER), book, Box::new(on_completion)), completions }
    }

    pub fn read(&self, op: &ReadOp) {
        self.node.transport.submit(Operation::Read(op.clone()));
    }

    /// The next completion.
    pub fn next(&self) -> (OpId, Result<ReadDone, ReadError>) {
        let completion = self.completions.recv_timeout(PATIENCE).expect("every read is completed");
        (completion.id, completion.result)
    }

    /// The completion of a single read.
    pub fn outcome(&self, op: &ReadOp) -> Result<ReadDone, ReadError> {
        self.read(op);
        let (id, result) = self.next();
        assert_eq!(id, op.id);
        result
    }

    pub fn assert_quiet(&self) {
        assert!(self.completions.try_recv().is_err(), "a read was completed twice");
    }
}

/// A holder, its book, and the chunks it is asked for.
#[derive(Debug)]
pub struct Holding {
    pub node: Node,
    pub book: Arc<Book>,
    pub asked: Receiver<u32>,
    pub id: NodeId,
}

impl Holding {
    pub fn start(factory: Factory, number: u8) -> Self {
        let (book, asked) = Book::new();
        book.admit(&access());
        let id = identity(number).public();
        Holding { node: factory(identity(number), book.clone(), Box::new(|_| {})), book, asked, id }
    }

    /// A read of `chunk`, numbered like it.
    pub fn read(&self, chunk: u32, len: usize) -> ReadOp {
        ReadOp { peer: self.id, ..read_of(&self.node.endpoints, chunk, memory(len)) }
    }

    pub fn wait_asked(&self, chunk: u32) {
        while self.asked.recv_timeout(PATIENCE).expect("the holder is asked") != chunk {}
    }
}

/// A read of `chunk` of the one holder, numbered like it.
pub fn read_of(endpoints: &[Endpoint], chunk: u32, into: Span) -> ReadOp {
    ReadOp {
        id: u64::from(chunk),
        peer: holder(),
        endpoints: endpoints.to_vec(),
        access: access(),
        lease: 1,
        chunk,
        into,
        adopts: false,
        stall: PATIENCE,
    }
}

pub fn access() -> Access {
    Access { ticket: 77, secret: [7; 32] }
}

pub fn memory(len: usize) -> Span {
    Mapping::anonymous(len as u64).expect("there is memory for a test").span()
}

/// `len` bytes that depend on `seed`.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

pub fn content(span: &Span) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(span.len()).expect("a test's span")];
    span.read(0, &mut bytes).expect("memory can be read");
    bytes
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics while holding a lock here")
}

fn pair(factory: Factory) -> (Holding, Reading) {
    (Holding::start(factory, HOLDER), Reading::start(factory))
}

fn assert_arrived(op: &ReadOp, result: &Result<ReadDone, ReadError>, bytes: &[u8]) {
    let done = result.as_ref().expect("the read succeeds");
    assert_eq!(done.bytes, bytes.len() as u64);
    assert_eq!(done.digest, ChunkHash::of(bytes));
    assert!(content(&op.into) == bytes, "other bytes have arrived");
}

pub fn bytes_arrive_and_are_hashed_where_they_lie(factory: Factory) {
    let (holding, reading) = pair(factory);
    for (chunk, len) in (0..).zip([1, 2, 4095, 4096, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, 5_000_000, 16 << 20])
    {
        let bytes = noise(u64::from(chunk), len);
        holding.book.put(chunk, &bytes);
        let op = holding.read(chunk, len);
        assert_arrived(&op, &reading.outcome(&op), &bytes);
    }
    let around = memory(30);
    let op = ReadOp { into: around.slice(10..12).expect("inside"), ..holding.read(1, 2) };
    assert_arrived(&op, &reading.outcome(&op), &noise(1, 2));
    assert_eq!(content(&around)[..10], [0; 10]);
    assert_eq!(content(&around)[12..], [0; 18]);
}

pub fn files_are_served_as_well_as_memory(factory: Factory) {
    let (holding, reading) = pair(factory);
    let bytes = noise(1, 3_000_000);
    let (_file, span) = file(&bytes);
    holding.book.put_span(1, span.slice(1000..2_000_000).map_err(|_| Refusal::Gone));
    let op = holding.read(1, 1_999_000);
    assert_arrived(&op, &reading.outcome(&op), &bytes[1000..2_000_000]);
}

pub fn many_reads_of_many_peers(factory: Factory) {
    let holders: Vec<Holding> = (1..4).map(|i| Holding::start(factory, i)).collect();
    let reading = Reading::start(factory);
    let mut ops = BTreeMap::new();
    for chunk in 0..120u32 {
        let bytes = noise(u64::from(chunk), 1 + (chunk as usize * 7919) % 300_000);
        let holding = &holders[chunk as usize % holders.len()];
        holding.book.put(chunk, &bytes);
        ops.insert(u64::from(chunk), (holding.read(chunk, bytes.len()), bytes));
    }
    ops.values().for_each(|(op, _)| reading.read(op));
    while !ops.is_empty() {
        let (id, result) = reading.next();
        let (op, bytes) = ops.remove(&id).expect("completed once");
        assert_arrived(&op, &result, &bytes);
    }
    assert!(holders.iter().all(|h| h.book.sent_bytes() > 0));
    reading.assert_quiet();
}

pub fn a_refusal_comes_through_and_harms_nothing_else(factory: Factory) {
    let (holding, reading) = pair(factory);
    let refusals = [Refusal::Expired, Refusal::Unknown, Refusal::Gone];
    let bytes = noise(9, 100_000);
    holding.book.put(9, &bytes);
    for (chunk, refusal) in (0..).zip(refusals) {
        holding.book.put_span(chunk, Err(refusal));
        let (bad, good) = (holding.read(chunk, 10), holding.read(9, bytes.len()));
        reading.read(&bad);
        reading.read(&good);
        for _ in 0..2 {
            match reading.next() {
                (9, result) => assert_arrived(&good, &result, &bytes),
                (_, result) => assert_eq!(result, Err(ReadError::Refused(refusal))),
            }
        }
    }
}

pub fn a_wrong_ticket_is_refused(factory: Factory) {
    let (holding, reading) = pair(factory);
    holding.book.put(1, b"secret");
    let unknown = Access { ticket: 78, ..access() };
    let guessed = Access { secret: [8; 32], ..access() };
    for access in [unknown, guessed] {
        let op = ReadOp { access, ..holding.read(1, 6) };
        assert_eq!(reading.outcome(&op), Err(ReadError::Refused(Refusal::Ticket)));
        assert_eq!(content(&op.into), [0; 6]);
    }
    let op = holding.read(1, 6);
    assert_arrived(&op, &reading.outcome(&op), b"secret");
}

pub fn a_lease_revoked_while_it_is_read(factory: Factory) {
    let (holding, reading) = pair(factory);
    let bytes = noise(1, 600_000);
    holding.book.put(1, &bytes);
    lock(&holding.book.revoked).insert(5);
    let revoked = ReadOp { lease: 5, ..holding.read(1, bytes.len()) };
    assert_eq!(reading.outcome(&revoked), Err(ReadError::Revoked));
    let valid = ReadOp { lease: 6, ..revoked };
    assert_arrived(&valid, &reading.outcome(&valid), &bytes);
}

pub fn a_dead_peer_fails_every_read(factory: Factory) {
    let (holding, reading) = pair(factory);
    let ops: Vec<ReadOp> = (0..20).map(|chunk| holding.read(chunk, 10)).collect();
    drop(holding);
    ops.iter().for_each(|op| reading.read(op));
    let mut ids = BTreeSet::new();
    for _ in &ops {
        let (id, result) = reading.next();
        assert!(matches!(result, Err(ReadError::Unreachable(_))), "{result:?}");
        assert!(ids.insert(id));
    }
    reading.assert_quiet();
}

pub fn no_endpoint_is_an_error(factory: Factory) {
    let (holding, reading) = pair(factory);
    let op = ReadOp { endpoints: vec![], ..holding.read(1, 10) };
    assert!(matches!(reading.outcome(&op), Err(ReadError::Unreachable(_))));
}

pub fn a_silent_holder_is_a_stall(factory: Factory) {
    let (holding, reading) = pair(factory);
    let stall = Duration::from_millis(100);
    holding.book.put(1, b"late");
    holding.book.hold(1);
    let ops: Vec<ReadOp> = (0..6).map(|id| ReadOp { id, stall, ..holding.read(1, 4) }).collect();
    ops.iter().for_each(|op| reading.read(op));
    for _ in &ops {
        assert_eq!(reading.next().1, Err(ReadError::Stalled));
    }
    holding.book.release();
    let op = holding.read(1, 4);
    assert_arrived(&op, &reading.outcome(&op), b"late");
    assert!(ops.iter().all(|op| content(&op.into) == [0; 4]), "written to after the completion");
}

pub fn a_cancelled_read_ends_and_the_others_go_on(factory: Factory) {
    let (holding, reading) = pair(factory);
    for chunk in 0..8 {
        holding.book.put(chunk, &noise(u64::from(chunk), 50_000));
    }
    let stuck = [0, 2, 7];
    stuck.into_iter().for_each(|chunk| holding.book.hold(chunk));
    let ops: Vec<ReadOp> = (0..8).map(|chunk| holding.read(chunk, 50_000)).collect();
    ops.iter().for_each(|op| reading.read(op));
    holding.wait_asked(0);
    stuck.into_iter().for_each(|chunk| reading.node.transport.submit(Operation::Cancel(u64::from(chunk))));
    for _ in &ops {
        match reading.next() {
            (0 | 2 | 7, result) => assert_eq!(result, Err(ReadError::Cancelled)),
            (_, result) => assert!(result.is_ok(), "{result:?}"),
        }
    }
    holding.book.release();
    let after = ReadOp { id: 8, ..holding.read(0, 50_000) };
    assert_arrived(&after, &reading.outcome(&after), &noise(0, 50_000));
    for (chunk, op) in (0..).zip(&ops) {
        let expected = if stuck.contains(&chunk) { vec![0; 50_000] } else { noise(op.id, 50_000) };
        assert!(content(&op.into) == expected, "read {}", op.id);
    }
    reading.assert_quiet();
}

pub fn cancelling_nothing_does_nothing(factory: Factory) {
    let (holding, reading) = pair(factory);
    holding.book.put(1, b"x");
    reading.node.transport.submit(Operation::Cancel(1));
    reading.node.transport.submit(Operation::Disconnect(holder()));
    let op = holding.read(1, 1);
    assert_arrived(&op, &reading.outcome(&op), b"x");
    reading.node.transport.submit(Operation::Cancel(1));
    assert_arrived(&op, &reading.outcome(&op), b"x");
    reading.assert_quiet();
}

pub fn disconnecting_ends_every_read_and_no_later_one(factory: Factory) {
    let (holding, reading) = pair(factory);
    let other = Holding::start(factory, 2);
    for h in [&holding, &other] {
        h.book.put(1, b"slow");
        h.book.put(2, b"fast");
        h.book.hold(1);
    }
    let ops: Vec<ReadOp> = (10..20).map(|id| ReadOp { id, ..holding.read(1, 4) }).collect();
    ops.iter().for_each(|op| reading.read(op));
    let survivor = other.read(1, 4);
    reading.read(&survivor);
    holding.wait_asked(1);
    other.wait_asked(1);
    reading.node.transport.submit(Operation::Disconnect(holder()));
    for _ in &ops {
        assert!(matches!(reading.next(), (10..20, Err(ReadError::Disconnected(_)))));
    }
    let later = holding.read(2, 4);
    assert_arrived(&later, &reading.outcome(&later), b"fast");
    other.book.release();
    assert_arrived(&survivor, &reading.next().1, b"slow");
    holding.book.release();
}

pub fn a_truncated_source_ends_the_read(factory: Factory) {
    let (holding, reading) = pair(factory);
    let bytes = noise(1, 3_000_000);
    let (file, span) = file(&bytes);
    holding.book.put_span(1, Ok(span));
    file.set_len(100_000).expect("truncate");
    let op = holding.read(1, bytes.len());
    let result = reading.outcome(&op);
    assert!(matches!(result, Err(ReadError::Refused(Refusal::Gone) | ReadError::Disconnected(_))), "{result:?}");
    holding.book.put(2, b"fine");
    let op = holding.read(2, 4);
    assert_arrived(&op, &reading.outcome(&op), b"fine");
}

pub fn a_bad_landing_place_is_refused(factory: Factory) {
    let (holding, reading) = pair(factory);
    let (_file, read_only) = file(b"abc");
    for into in [read_only, memory(0)] {
        let op = ReadOp { into, ..holding.read(1, 1) };
        assert!(matches!(reading.outcome(&op), Err(ReadError::Landing(_))));
    }
}

/// A thousand reads of three holders, with cancels and disconnects wherever a seeded generator
/// puts them.
pub fn exactly_one_completion_whatever_is_cancelled(factory: Factory) {
    const READS: u64 = 1000;
    let holders: Vec<Holding> = (1..4).map(|i| Holding::start(factory, i)).collect();
    let bytes: Vec<Vec<u8>> = (0..8).map(|i| noise(i, 1 + usize::try_from(i).expect("small") * 60_000)).collect();
    for holding in &holders {
        (0..).zip(&bytes).for_each(|(chunk, bytes)| holding.book.put(chunk, bytes));
    }
    let reading = Reading::start(factory);
    let mut dice = blake3::Hasher::new().update(b"seed 1").finalize_xof();
    let mut throw = |below: u64| {
        let mut bytes = [0; 8];
        dice.fill(&mut bytes);
        u64::from_le_bytes(bytes) % below
    };
    let mut results = BTreeMap::new();
    let mut ops = Vec::new();
    for id in 0..READS {
        let holding = &holders[usize::try_from(throw(3)).expect("small")];
        let chunk = u32::try_from(throw(8)).expect("small");
        let op = ReadOp { id, ..holding.read(chunk, bytes[chunk as usize].len()) };
        reading.read(&op);
        ops.push(op);
        match throw(12) {
            0..4 => reading.node.transport.submit(Operation::Cancel(id.saturating_sub(throw(16)))),
            4 => reading.node.transport.submit(Operation::Disconnect(holding.id)),
            _ => {}
        }
        // As a caller with bounded memory would: no more than some reads at once.
        while ops.len() > results.len() + 64 {
            let (id, result) = reading.next();
            assert!(results.insert(id, result).is_none(), "read {id} completed twice");
        }
    }
    while results.len() < ops.len() {
        let (id, result) = reading.next();
        assert!(results.insert(id, result).is_none(), "read {id} completed twice");
    }
    drop(holders);
    reading.assert_quiet();
    let mut good = 0;
    for op in &ops {
        match &results[&op.id] {
            Ok(_) => {
                assert_arrived(op, &results[&op.id], &bytes[op.chunk as usize]);
                good += 1;
            }
            Err(ReadError::Cancelled | ReadError::Disconnected(_)) => {}
            Err(error) => panic!("read {}: {error}", op.id),
        }
    }
    assert!(good > READS / 10, "only {good} reads got through");
}

/// A file without a name, and a span of it.
fn file(bytes: &[u8]) -> (std::fs::File, Span) {
    use std::io::Write;
    let path =
        std::env::temp_dir().join(format!("aquifer-conformance-{}-{:x}", std::process::id(), rand::random::<u64>()));
    let mut file = std::fs::File::create_new(&path).expect("a temporary file");
    file.write_all(bytes).expect("room for a test's file");
    let span = Mapping::file(&path).expect("mapped").span();
    std::fs::remove_file(&path).expect("just made");
    (file, span)
}
