//! What only TCP can get wrong. The rest is in [`crate::conformance`].

mod encrypted;

use super::wire::{HEADER_BYTES, Header, REQUEST_BYTES, Request};
use super::*;
use crate::conformance::{
    Book, HOLDER, Holding, Node, OnCompletion, Reading, access, content, holder, memory, noise, read_of, reader,
};
use crate::handshake::{
    CHALLENGE_BYTES, CONFIRM_BYTES, Challenge, Confirm, HELLO_BYTES, Handshake, Hello, PROOF_BYTES, Transcript,
};
use crate::limits::{ACCEPTED_PER_PEER_MAX, PIPELINE_DEPTH};
use crate::{OpId, ReadError, ReadOp, Refusal};
use aquifer_core::{NodeId, NodeSecret};
use aquifer_memory::{Mapping, Span};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

fn node(config: TcpConfig, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
    let transport = start(config, grants, completions);
    Node { endpoints: vec![transport.local_addr().into()], transport }
}

fn start(
    config: TcpConfig,
    grants: Arc<dyn Grants>,
    completions: impl Fn(Completion) + Send + Sync + 'static,
) -> Arc<TcpTransport> {
    TcpTransport::start((Ipv4Addr::LOCALHOST, 0).into(), grants, completions, config).unwrap()
}

fn plain(_: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
    node(TcpConfig::default(), grants, completions)
}

mod one_connection {
    crate::conformance_tests!(super::plain);
}

mod four_connections {
    use super::*;
    crate::conformance_tests!(|_, grants, completions| {
        node(TcpConfig { connections_per_peer: 4, ..TcpConfig::default() }, grants, completions)
    });
}

/// A holder that does what a test tells it, to one connection after the other.
fn fake_holder<const N: usize>(scripts: [fn(TcpStream); N]) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let thread =
        std::thread::spawn(move || scripts.into_iter().for_each(|script| script(listener.accept().unwrap().0)));
    (address, thread)
}

fn greet(mut stream: &TcpStream) -> Transcript {
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello).unwrap();
    let hello = Hello::decode(&hello).unwrap();
    stream.write_all(&Challenge { status: Handshake::Good, nonce: [5; 32] }.encode()).unwrap();
    stream.read_exact(&mut [0; PROOF_BYTES]).unwrap();
    Transcript { ticket: hello.ticket, reader: hello.nonce, holder: [5; 32] }
}

fn welcome(mut stream: &TcpStream) {
    let proof = *greet(stream).holder_proof(&access().secret).as_bytes();
    stream.write_all(&Confirm { status: Handshake::Good, proof }.encode()).unwrap();
}

fn next_request(mut stream: &TcpStream) -> Request {
    let mut bytes = [0; REQUEST_BYTES];
    stream.read_exact(&mut bytes).unwrap();
    Request::decode(&bytes).unwrap()
}

/// The reader may hang up at any byte.
fn answer(mut stream: &TcpStream, request: Request) {
    let header = Header { answer: Ok(()), chunk: request.chunk, len: request.len }.encode();
    let _ = stream.write_all(&header);
    let _ = stream.write_all(&vec![9; request.len as usize]);
    let _ = stream.write_all(&[1]);
}

/// Blocks until the other side closes.
fn wait_closed(mut stream: &TcpStream) {
    while matches!(stream.read(&mut [0; 512]), Ok(n) if n > 0) {}
}

fn read_at(address: SocketAddr, id: OpId, len: usize) -> ReadOp {
    ReadOp { id, ..read_of(&[address.into()], 1, memory(len)) }
}

/// A reader without manners. `None` if it is turned away.
fn raw_reader(address: SocketAddr) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&Hello::new(access().ticket, [6; 32]).encode()).ok()?;
    let mut bytes = [0; CHALLENGE_BYTES];
    stream.read_exact(&mut bytes).ok()?;
    let holder = Challenge::decode(&bytes).unwrap().nonce;
    let transcript = Transcript { ticket: access().ticket, reader: [6; 32], holder };
    stream.write_all(transcript.reader_proof(&access().secret).as_bytes()).ok()?;
    let mut bytes = [0; CONFIRM_BYTES];
    stream.read_exact(&mut bytes).ok()?;
    let confirm = Confirm::decode(&bytes).unwrap();
    let good = confirm.status == Handshake::Good;
    assert!(!good || &confirm.proof == transcript.holder_proof(&access().secret).as_bytes());
    good.then_some(stream)
}

fn book() -> Arc<Book> {
    let (book, _) = Book::new();
    book.admit(&access());
    book
}

#[test]
fn a_holder_that_answers_garbage_is_unreachable_or_disconnected() {
    let (address, thread) = fake_holder([
        |mut s| s.write_all(&[b'x'; 400]).unwrap(),
        |s| {
            welcome(&s);
            next_request(&s);
            (&s).write_all(&[b'x'; HEADER_BYTES]).unwrap();
            wait_closed(&s);
        },
        |s| {
            welcome(&s);
            let request = next_request(&s);
            answer(&s, Request { len: request.len + 1, ..request });
            wait_closed(&s);
        },
        |s| {
            welcome(&s);
            let request = next_request(&s);
            (&s).write_all(&Header { answer: Ok(()), chunk: request.chunk, len: request.len }.encode()).unwrap();
            (&s).write_all(&[0; 50]).unwrap();
        },
    ]);
    let reading = Reading::start(plain);
    assert!(matches!(reading.outcome(&read_at(address, 1, 100)), Err(ReadError::Unreachable(_))));
    let retried = reading.outcome(&read_at(address, 2, 100));
    // Once for each of the two connections that broke before its answer began.
    assert!(matches!(&retried, Err(ReadError::Disconnected(reason)) if reason.contains("not made")), "{retried:?}");
    let cut = reading.outcome(&read_at(address, 3, 100));
    assert!(matches!(&cut, Err(ReadError::Disconnected(reason)) if reason.contains("in the middle")), "{cut:?}");
    thread.join().unwrap();
}

#[test]
fn a_holder_that_does_not_know_the_secret_gets_no_request() {
    let (address, thread) = fake_holder([|s| {
        let proof = *greet(&s).holder_proof(&[1; 32]).as_bytes();
        (&s).write_all(&Confirm { status: Handshake::Good, proof }.encode()).unwrap();
        assert_eq!((&s).read(&mut [0; 100]).unwrap(), 0);
    }]);
    let reading = Reading::start(plain);
    let result = reading.outcome(&read_at(address, 1, 100));
    assert!(matches!(&result, Err(ReadError::Unreachable(reason)) if reason.contains("another node")), "{result:?}");
    thread.join().unwrap();
}

#[test]
fn a_holder_that_is_silent_from_the_start_is_unreachable() {
    let (address, thread) = fake_holder([|s| wait_closed(&s)]);
    let reading = Reading::start(|_, grants, completions| {
        node(TcpConfig { handshake_timeout: Duration::from_millis(50), ..TcpConfig::default() }, grants, completions)
    });
    let result = reading.outcome(&read_at(address, 1, 100));
    assert!(matches!(&result, Err(ReadError::Unreachable(reason)) if reason.contains("handshake")), "{result:?}");
    thread.join().unwrap();
}

#[test]
fn a_holder_that_stops_in_the_middle_is_a_stall() {
    let (address, thread) = fake_holder([|s| {
        welcome(&s);
        let request = next_request(&s);
        (&s).write_all(&Header { answer: Ok(()), chunk: request.chunk, len: request.len }.encode()).unwrap();
        (&s).write_all(&[0; 50]).unwrap();
        wait_closed(&s);
    }]);
    let reading = Reading::start(plain);
    let op = ReadOp { stall: Duration::from_millis(50), ..read_at(address, 1, 100) };
    assert_eq!(reading.outcome(&op), Err(ReadError::Stalled));
    thread.join().unwrap();
}

#[test]
fn requests_are_sent_ahead() {
    let (address, thread) = fake_holder([|s| {
        welcome(&s);
        let ahead: Vec<Request> = (0..PIPELINE_DEPTH).map(|_| next_request(&s)).collect();
        ahead.into_iter().for_each(|request| answer(&s, request));
        (0..2).for_each(|_| answer(&s, next_request(&s)));
    }]);
    let reading = Reading::start(plain);
    let ops: Vec<ReadOp> = (0..6).map(|id| read_at(address, id, 1000)).collect();
    ops.iter().for_each(|op| reading.read(op));
    for op in &ops {
        let (id, result) = reading.next();
        assert_eq!((id, result.unwrap().bytes), (op.id, 1000));
        assert_eq!(content(&op.into), [9; 1000]);
    }
    thread.join().unwrap();
}

#[test]
fn a_connection_lost_between_reads_is_opened_again() {
    let script: fn(TcpStream) = |s| {
        welcome(&s);
        answer(&s, next_request(&s));
    };
    let (address, thread) = fake_holder([script, script]);
    let reading = Reading::start(plain);
    for id in 0..2 {
        assert!(reading.outcome(&read_at(address, id, 10)).is_ok());
    }
    thread.join().unwrap();
}

#[test]
fn an_idle_connection_is_closed_and_opened_again() {
    let reading = Reading::start(|_, grants, completions| {
        node(TcpConfig { idle_timeout: Duration::from_millis(20), ..TcpConfig::default() }, grants, completions)
    });
    for id in 0..2 {
        let (address, thread) = fake_holder([|s| {
            welcome(&s);
            answer(&s, next_request(&s));
            assert_eq!((&s).read(&mut [0; 100]).unwrap(), 0);
        }]);
        assert!(reading.outcome(&read_at(address, id, 10)).is_ok());
        thread.join().unwrap(); // it has seen the connection close
    }
}

#[test]
fn the_next_endpoint_is_tried() {
    let holding = Holding::start(plain, HOLDER);
    holding.book.put(1, b"here");
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let reading = Reading::start(plain);
    let mut op = holding.read(1, 4);
    op.endpoints.insert(0, closed.into());
    assert!(reading.outcome(&op).is_ok());
    assert!(reading.outcome(&op).is_ok());
}

#[test]
fn garbage_closes_its_connection_and_no_other() {
    let grants = book();
    grants.put(1, b"fine");
    let holder = start(TcpConfig::default(), grants, |_| {});
    let mut stranger = TcpStream::connect(holder.local_addr()).unwrap();
    stranger.write_all(&[b'x'; HELLO_BYTES]).unwrap();
    wait_closed(&stranger);

    let mut rude = raw_reader(holder.local_addr()).unwrap();
    rude.write_all(&[b'x'; 10 * REQUEST_BYTES]).unwrap();
    wait_closed(&rude);

    let mut wrong = raw_reader(holder.local_addr()).unwrap();
    wrong.write_all(&Request { chunk: 1, lease: 1, len: 5 }.encode()).unwrap();
    wait_closed(&wrong);

    // One that never stops is not listened to for ever.
    let mut endless = raw_reader(holder.local_addr()).unwrap();
    while endless.write_all(&[b'x'; 65536]).is_ok() {}

    let reading = Reading::start(plain);
    assert!(reading.outcome(&read_at(holder.local_addr(), 1, 4)).is_ok());
    holder.shutdown();
    assert_eq!(holder.stats().rejected, 4);
}

#[test]
fn a_reader_that_takes_nothing_is_dropped() {
    let config = TcpConfig { write_timeout: Duration::from_millis(50), ..TcpConfig::default() };
    let (gone, dropped) = channel();
    let grants = book();
    // Far more than two sockets' buffers hold.
    grants.put_span(1, Ok(memory(16 << 20).guarded(Arc::new(OnDrop(Mutex::new(gone))))));
    let holder = start(config, grants.clone(), |_| {});
    let mut greedy = raw_reader(holder.local_addr()).unwrap();
    for _ in 0..8 {
        greedy.write_all(&Request { chunk: 1, lease: 1, len: 16 << 20 }.encode()).unwrap();
    }
    wait_let_go(&grants, &dropped);
    holder.shutdown();
    assert_eq!(holder.stats().rejected, 1);
}

/// Waits until the only other user of chunk 1, the sending thread, has dropped it.
fn wait_let_go(book: &Arc<Book>, dropped: &std::sync::mpsc::Receiver<()>) {
    while book.sent_bytes() == 0 {
        std::thread::yield_now();
    }
    book.put_span(1, Err(Refusal::Gone));
    dropped.recv_timeout(Duration::from_secs(60)).unwrap();
}

struct OnDrop(Mutex<std::sync::mpsc::Sender<()>>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        let _ = self.0.lock().unwrap().send(());
    }
}

#[test]
fn connections_are_bounded() {
    let config = TcpConfig { unauthenticated_max: 1, ..TcpConfig::default() };
    let holder = start(config, book(), |_| {});
    let quiet = TcpStream::connect(holder.local_addr()).unwrap();
    let mut second = TcpStream::connect(holder.local_addr()).unwrap();
    assert_eq!(second.read(&mut [0; 1]).unwrap(), 0);
    drop(quiet);
    let mut connections = Vec::new();
    while connections.len() < ACCEPTED_PER_PEER_MAX {
        // The seat of the quiet one is free once its thread has noticed.
        connections.extend(raw_reader(holder.local_addr()));
    }
    let before = holder.stats();
    while holder.stats().rejected == before.rejected {
        assert!(raw_reader(holder.local_addr()).is_none());
    }
    assert_eq!(holder.stats().accepted, ACCEPTED_PER_PEER_MAX as u64);
}

#[test]
fn a_file_truncated_while_it_is_sent_ends_the_read() {
    let path = std::env::temp_dir().join(format!("aquifer-truncate-{}", std::process::id()));
    std::fs::write(&path, noise(1, 16 << 20)).unwrap();
    let span = Mapping::file(&path).unwrap().span();
    let file = File::options().write(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let holder = start(TcpConfig::default(), Arc::new(Truncating { span, file }), |_| {});
    let reading = Reading::start(plain);
    let result = reading.outcome(&read_at(holder.local_addr(), 1, 16 << 20));
    assert!(matches!(result, Err(ReadError::Disconnected(_))), "{result:?}");
    let again = reading.outcome(&read_at(holder.local_addr(), 2, 16 << 20));
    assert_eq!(again, Err(ReadError::Refused(Refusal::Gone)));
}

/// Cuts its file short when the first bytes of it have been sent.
#[derive(Debug)]
struct Truncating {
    span: Span,
    file: File,
}

impl Grants for Truncating {
    fn secret(&self, _: u64) -> Option<(NodeId, [u8; 32])> {
        Some((reader(), access().secret))
    }
    fn open(&self, _: NodeId, _: u64, _: u32) -> Result<Span, Refusal> {
        Ok(self.span.clone())
    }
    fn still_valid(&self, _: NodeId, _: u64, _: u32) -> bool {
        true
    }
    fn sent(&self, _: NodeId, _: u64, _: u64) {
        self.file.set_len(4096).unwrap();
    }
}

#[test]
fn shutting_down_completes_everything() {
    let holding = Holding::start(plain, HOLDER);
    holding.book.put(1, b"late");
    holding.book.hold(1);
    let (sender, completions) = channel();
    let sender = Mutex::new(sender);
    let transport =
        start(TcpConfig::default(), book(), move |completion| sender.lock().unwrap().send(completion).unwrap());
    let submit = |id| transport.submit(Operation::Read(ReadOp { id, ..holding.read(1, 4) }));
    (0..10).for_each(submit);
    holding.wait_asked(1);
    transport.shutdown();
    submit(10);
    let ended: Vec<Completion> = completions.try_iter().collect();
    assert_eq!(ended.len(), 11, "all are complete when shutdown returns");
    assert!(ended.iter().all(|c| matches!(c.result, Err(ReadError::Disconnected(_)))));
    holding.book.release();
    transport.shutdown();
}

#[test]
fn a_panic_in_a_completion_loses_no_other_read() {
    let holding = Holding::start(plain, HOLDER);
    holding.book.put(1, b"x");
    holding.book.hold(1);
    let (sender, completions) = channel();
    let sender = Mutex::new(sender);
    let transport = start(TcpConfig::default(), book(), move |completion| {
        sender.lock().unwrap_or_else(std::sync::PoisonError::into_inner).send(completion.id).unwrap();
        assert_ne!(completion.id, 0, "on purpose");
    });
    (0..8).for_each(|id| transport.submit(Operation::Read(ReadOp { id, ..holding.read(1, 1) })));
    holding.book.release();
    let mut ids: Vec<OpId> = completions.iter().take(8).collect();
    ids.sort_unstable();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6, 7]);
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
