//! Memory that takes long to register, is more than may be, or cannot be.

use super::*;

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
    let op = |chunk, into| ReadOp { stall: Duration::from_secs(60), ..read_of(&holding.endpoints, chunk, into) };
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
    let results = BTreeMap::from([reading.next(), reading.next()]);
    drop(slow);
    assert!(lease_ended(results.get(&1)), "{results:?}");
    // Its lease has ended as well; that, or that the holder registers, is noticed first.
    let unread = lease_ended(results.get(&2)) || matches!(results[&2], Err(ReadError::Unreachable(_)));
    assert!(unread, "it was registered first: {results:?}");
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
    let op = |chunk| read_of(&holding.endpoints, chunk, landing.clone());
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
