//! One side of a transfer in a process of its own, and what is measured of one: for the tests that end
//! processes, and for docs/measured/rdma.md. Needs an RDMA device, as in `cargo xtask rdma-vm`.
#![allow(clippy::print_stdout, reason = "a program for people and tests")]

use aquifer_core::NodeId;
use aquifer_memory::Span;
use aquifer_rdma::verbs::{Access, Address, CompletionQueue, Device, ProtectionDomain, QueuePair, Region};
use aquifer_rdma::{RdmaConfig, RdmaTransport};
use aquifer_transport::conformance::{Book, access, memory, noise, read_of};
use aquifer_transport::{Completion, Endpoint, Operation, ReadOp, Transport};
use rustix::event::{PollFd, PollFlags, poll};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const USAGE: &str = "usage: peer COMMAND DEVICES ...   (DEVICES: names with commas, or `all`)
  hold DEVICES CHUNKS BYTES            serves chunks of noise; says where; ends with its standard input
  read DEVICES ENDPOINT CHUNKS BYTES   reads them all, and says what came of it
  measure DEVICES CHUNKS BYTES ROUNDS  reads chunks from itself, and hashes them alone
  verbs DEVICE MIB ROUNDS              the same by READs alone, 1 MiB each and 16 in flight
  cycles DEVICES COUNT                 connects, reads and tears down, over and over";

fn main() {
    // What a side connection ended with is seen nowhere else: RUST_LOG=aquifer_transport=debug.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["hold", devices, chunks, len] => hold(devices, number(chunks), number(len)),
        ["read", devices, endpoint, chunks, len] => read(devices, endpoint, number(chunks), number(len)),
        ["measure", devices, chunks, len, rounds] => measure(devices, number(chunks), number(len), number(rounds)),
        ["verbs", device, mib, rounds] => verbs(device, number(mib), number(rounds)),
        ["cycles", devices, count] => cycles(devices, number(count)),
        _ => panic!("{USAGE}"),
    }
}

fn number(word: &str) -> u32 {
    word.parse().expect("a number")
}

fn config(devices: &str) -> RdmaConfig {
    let named = (devices != "all").then(|| devices.split(',').map(String::from).collect());
    RdmaConfig { devices: named, ..RdmaConfig::default() }
}

fn start(devices: &str, book: Arc<Book>) -> (Arc<RdmaTransport>, Receiver<Completion>) {
    let (sender, completions) = channel();
    let on_completion = move |completion| drop(sender.send(completion));
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    match RdmaTransport::start(listen, book, on_completion, config(devices)) {
        Ok(transport) => (transport, completions),
        Err(error) => {
            println!("no RDMA: {error}");
            std::process::exit(77);
        }
    }
}

fn holder(devices: &str, chunks: u32, len: u32) -> Arc<RdmaTransport> {
    let (book, _) = Book::new();
    book.admit(&access());
    // All of one memory, as in a store's slab.
    let all = memory(chunks as usize * len as usize);
    for chunk in 0..chunks {
        let begin = u64::from(chunk) * u64::from(len);
        let span = all.slice(begin..begin + u64::from(len)).expect("inside");
        span.write(0, &noise(u64::from(chunk), len as usize)).expect("as long as the chunk");
        book.put_span(chunk, Ok(span));
    }
    start(devices, book).0
}

fn op(endpoint: SocketAddr, id: u64, chunk: u32, into: Span) -> ReadOp {
    let stall = Duration::from_secs(20);
    ReadOp { id, peer: NodeId([1; 32]), stall, ..read_of(&[Endpoint::Rdma(endpoint)], chunk, into) }
}

fn hold(devices: &str, chunks: u32, len: u32) {
    let transport = holder(devices, chunks, len);
    println!("{}", transport.local_addr());
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    transport.shutdown();
}

fn read(devices: &str, endpoint: &str, chunks: u32, len: u32) {
    let (transport, completions) = start(devices, Book::new().0);
    let endpoint = endpoint.parse().expect("ip:port");
    let into = memory(chunks as usize * len as usize);
    let took = read_all(&*transport, &completions, endpoint, chunks, len, &into);
    match took {
        Ok(took) => println!("ok: {} bytes in {took:?}", into.len()),
        Err(error) => println!("failed: {error}"),
    }
    transport.shutdown();
}

fn read_all(
    transport: &dyn Transport,
    completions: &Receiver<Completion>,
    endpoint: SocketAddr,
    chunks: u32,
    len: u32,
    into: &Span,
) -> Result<Duration, String> {
    let begun = Instant::now();
    for chunk in 0..chunks {
        let begin = u64::from(chunk) * u64::from(len);
        let landing = into.slice(begin..begin + u64::from(len)).expect("inside");
        transport.submit(Operation::Read(op(endpoint, u64::from(chunk), chunk, landing)));
    }
    let mut result = Ok(());
    for _ in 0..chunks {
        let completion = completions.recv().expect("every read is completed");
        let expected = noise(completion.id, len as usize);
        match completion.result {
            Ok(done) if done.digest == aquifer_core::ChunkHash::of(&expected) => {}
            Ok(_) => result = Err("other bytes have arrived".to_string()),
            Err(error) => result = Err(error.to_string()),
        }
    }
    result.map(|()| begun.elapsed())
}

/// Prints the rate of whole rounds, and that of hashing the same bytes alone.
fn measure(devices: &str, chunks: u32, len: u32, rounds: u32) {
    let holding = holder(devices, chunks, len);
    let (reading, completions) = start(devices, Book::new().0);
    let into = memory(chunks as usize * len as usize);
    into.prefault();
    let mib = into.len() as f64 / f64::from(1 << 20);
    for round in 0..rounds {
        let begun = Instant::now();
        for chunk in 0..chunks {
            let begin = u64::from(chunk) * u64::from(len);
            let landing = into.slice(begin..begin + u64::from(len)).expect("inside");
            let id = u64::from(round) << 32 | u64::from(chunk);
            reading.submit(Operation::Read(op(holding.local_addr(), id, chunk, landing)));
        }
        for _ in 0..chunks {
            completions.recv().expect("every read is completed").result.expect("it succeeds");
        }
        let all = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        into.hash().expect("memory can be hashed");
        let hashing = begun.elapsed().as_secs_f64();
        println!(
            "round {round}: {mib} MiB in {all:.3} s = {:.1} MiB/s; hashing alone {hashing:.3} s = {:.1} MiB/s",
            mib / all,
            mib / hashing
        );
    }
    reading.shutdown();
    holding.shutdown();
}

/// The transport's own queue pairs and completion queue, without anything around them.
fn verbs(device: &str, mib: u32, rounds: u32) {
    const DEPTH: u32 = 16;
    const PIECE: u32 = 1 << 20;
    let device = Device::open(device).expect("the device is here");
    let port = device.port(1).expect("port 1");
    let gid = *port.best_gid().expect("an address");
    let domain = ProtectionDomain::new(&device).expect("a domain");
    let completions = Arc::new(CompletionQueue::new(&device, 2 * DEPTH).expect("a completion queue"));
    let make = || {
        let pair = QueuePair::new(&domain, &completions, DEPTH).expect("a queue pair");
        let (queue_pair, mtu_code) = (pair.number(), u8::try_from(port.mtu_code).expect("small"));
        let reads = u8::try_from(DEPTH).expect("small");
        let address = Address {
            queue_pair,
            sequence: 1,
            gid: gid.raw,
            lid: port.lid,
            mtu_code,
            reads_in: reads,
            reads_out: reads,
        };
        (pair, address)
    };
    let ((holder, theirs), (reader, ours)) = (make(), make());
    let config = RdmaConfig::default().queue_pair;
    holder.connect(&port, &gid, &theirs, &ours, config).expect("it connects");
    reader.connect(&port, &gid, &ours, &theirs, config).expect("it connects");
    let [from, into] = [memory(mib as usize * PIECE as usize), memory(mib as usize * PIECE as usize)];
    let source = Region::register(&domain, from.clone(), Access::Read).expect("registered");
    let landing = Region::register(&domain, into.clone(), Access::Land).expect("registered");
    for round in 0..rounds {
        let begun = Instant::now();
        let (mut posted, mut done) = (0, 0);
        let mut found = Vec::new();
        while done < mib {
            while posted < mib && posted - done < DEPTH {
                let at = u64::from(posted) * u64::from(PIECE)..u64::from(posted + 1) * u64::from(PIECE);
                let part = from.slice(at.clone()).expect("inside");
                let remote = source.remote(&part).expect("it may be read");
                let id = u64::from(posted);
                reader.read(id, &landing, &into.slice(at).expect("inside"), remote).expect("it is posted");
                posted += 1;
            }
            if !completions.poll(&mut found).expect("it can be polled") {
                poll(&mut [PollFd::new(&*completions, PollFlags::IN)], None).expect("poll");
                completions.rearm().expect("it can be armed");
            }
            for completion in found.drain(..) {
                completion.result.expect("it succeeds");
                reader.completed(completion.id);
                done += 1;
            }
        }
        let took = begun.elapsed().as_secs_f64();
        println!("round {round}: {mib} MiB by READs alone in {took:.3} s = {:.1} MiB/s", f64::from(mib) / took);
    }
}

/// A reader comes, reads a chunk and goes, that many times; every tenth is gone before its chunk is.
fn cycles(devices: &str, count: u32) {
    const BYTES: u32 = 64 << 10;
    let holding = holder(devices, 1, BYTES);
    let begun = Instant::now();
    for cycle in 0..count {
        let (reading, completions) = start(devices, Book::new().0);
        reading.submit(Operation::Read(op(holding.local_addr(), 0, 0, memory(BYTES as usize))));
        if cycle % 10 != 9 {
            completions.recv().expect("every read is completed").result.expect("it succeeds");
        }
        reading.shutdown();
        if cycle % 100 == 99 || cycle + 1 == count {
            println!("{} cycles in {:?}: {}", cycle + 1, begun.elapsed(), footprint());
        }
    }
    holding.shutdown();
}

/// What this process holds of the system's.
fn footprint() -> String {
    let fds = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map_or("?".into(), |value| value.trim().to_string())
    };
    format!("{fds} fds, {} threads, {} resident, {} pinned", of("Threads:"), of("VmRSS:"), of("VmPin:"))
}
