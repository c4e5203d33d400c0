//! A store's memory that was sealed: read, and kept, as it lies.

use super::*;
use aquifer_memory::limits::SLAB_BYTES;

const CHUNK: usize = 4 << 20;
const CHUNKS: u32 = 16;

/// A holder with a full slab of chunks; what they are. `None` where this system has no large pages to
/// share: then nothing is sealed.
fn full_slab() -> Option<(Holding, Vec<Vec<u8>>)> {
    let holding = Holding::start(plain, HOLDER);
    let store = MemoryStore::new(SLAB_BYTES);
    let chunks: Vec<Vec<u8>> = (0..CHUNKS).map(|i| noise(i.into(), CHUNK)).collect();
    for (chunk, bytes) in (0..).zip(&chunks) {
        let reservation = store.reserve(ChunkHash::of(bytes), bytes.len() as u64).unwrap();
        reservation.span().write_past_caches(0, bytes).unwrap();
        holding.book.put_span(chunk, Ok(reservation.commit().unwrap()));
    }
    let first = store.get(&ChunkHash::of(&chunks[0])).unwrap();
    let shares = first.mapping().0.share().unwrap().is_some();
    if !shares {
        eprintln!("this system has no large pages of shared memory: not tested");
    }
    shares.then_some((holding, chunks))
}

#[test]
fn it_is_left_where_it_lies_and_outlives_its_holder() {
    let Some((holding, chunks)) = full_slab() else { return };
    let reading = Reading::start(plain);
    let mut kept = Vec::new();
    for (chunk, bytes) in (0..CHUNKS).zip(&chunks) {
        let op = ReadOp { id: chunk.into(), adopts: true, ..holding.read(chunk, CHUNK) };
        let done = reading.outcome(&op).unwrap();
        assert_eq!((done.digest, done.bytes), (ChunkHash::of(bytes), CHUNK as u64));
        assert!(content(&op.into).iter().all(|byte| *byte == 0), "nothing was copied");
        kept.push(done.adopted.expect("it can never change"));
    }
    // Whoever does not want them so gets a copy, over the same connection.
    let op = ReadOp { id: 100, ..holding.read(5, CHUNK) };
    let done = reading.outcome(&op).unwrap();
    assert_eq!((done.digest, done.adopted), (ChunkHash::of(&chunks[5]), None));
    assert!(content(&op.into) == chunks[5]);
    assert_eq!(holding.book.sent_bytes(), u64::from(CHUNKS + 1) * CHUNK as u64);
    drop(holding);
    for (span, bytes) in kept.iter().zip(&chunks) {
        assert!(content(span) == *bytes);
    }
}

#[test]
fn a_slab_is_passed_once_whichever_connection_asks() {
    let Some((holding, chunks)) = full_slab() else { return };
    let path = holding.node.endpoints[0].shm().unwrap().to_path_buf();
    let reading = Reading::start(plain);
    let many: Vec<ReadOp> =
        (0..CHUNKS).map(|i| ReadOp { id: i.into(), adopts: true, ..holding.read(i, CHUNK) }).collect();
    many.iter().for_each(|op| reading.read(op));
    let kept: Vec<Span> = many.iter().map(|_| reading.next().1.unwrap().adopted.unwrap()).collect();
    assert!(kept.iter().all(|span| std::ptr::eq(&**span.mapping().0, &**kept[0].mapping().0)), "mapped once");
    // The wire says so, too.
    let stream = raw_reader(&path).unwrap();
    for (chunk, expected) in [(0, true), (1, false)] {
        let len = u32::try_from(CHUNK).unwrap();
        (&stream).write_all(&Request { chunk, lease: 1, len }.encode()).unwrap();
        let (header, fd) = receive_header(&stream).unwrap();
        let Place::Slot { fresh, .. } = Header::decode(&header).unwrap().place else { panic!("not shared") };
        assert_eq!((fresh, fd.is_some()), (expected, expected));
        (&stream).write_all(&[SETTLE]).unwrap();
        (&stream).read_exact(&mut [0]).unwrap();
    }
    drop(chunks);
}

/// Over one connection the next chunk is asked for while one is hashed. What was asked for and is not wanted any
/// more goes by.
#[test]
fn what_was_asked_for_ahead_may_go_by() {
    let Some((holding, chunks)) = full_slab() else { return };
    // One that is not shared but copied, and one that is refused.
    let small = noise(99, 70_000);
    holding.book.put(50, &small);
    holding.book.put_span(51, Err(Refusal::Expired));
    let reading = Reading::start(plain);
    let adopting = |id: u32, chunk| ReadOp { id: id.into(), adopts: true, ..holding.read(chunk, CHUNK) };
    for round in 0..20 {
        let id = |n: u32| 100 * round + n;
        let ops = [
            adopting(id(0), 0),
            adopting(id(1), 1),
            ReadOp { id: id(2).into(), adopts: true, ..holding.read(50, small.len()) },
            adopting(id(3), 51),
            adopting(id(4), 2),
            ReadOp { id: id(5).into(), ..holding.read(3, CHUNK) },
            adopting(id(6), 4),
        ];
        ops.iter().for_each(|op| reading.read(op));
        // Whichever of them is under way, asked for ahead, or neither.
        let gone: Vec<OpId> =
            [1, 2, 4].iter().filter(|n| (round >> (*n / 2)) & 1 == 1).map(|n| id(*n).into()).collect();
        gone.iter().for_each(|id| reading.node.transport.submit(Operation::Cancel(*id)));
        for _ in &ops {
            let (id, result) = reading.next();
            let bytes = match (id % 100, result) {
                (_, Err(ReadError::Cancelled)) if gone.contains(&id) => continue,
                (3, result) => {
                    assert_eq!(result, Err(ReadError::Refused(Refusal::Expired)));
                    continue;
                }
                (2, Ok(done)) => (done.digest, &small),
                (n, Ok(done)) => (done.digest, &chunks[[0, 1, 0, 0, 2, 3, 4][usize::try_from(n).unwrap()]]),
                (n, result) => panic!("{n}: {result:?}"),
            };
            assert_eq!(bytes.0, ChunkHash::of(bytes.1));
        }
    }
}
