//! What every device must do: the same checks for the twin, on any machine, and for a GPU where there is one.

use aquifer_core::{ChunkHash, Hash};
use aquifer_cuda::apply::{apply, apply_from_host};
use aquifer_cuda::landing::{Landed, Landing, Placement};
use aquifer_cuda::limits::{BATCH_BYTES, REGISTERED_BYTES_MIN, STAGING_BUFFER_BYTES};
use aquifer_cuda::{Device, DeviceError, DeviceSpan, Goes, HostSpan, Stream};
use aquifer_memory::{Mapping, Span};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use std::cell::RefCell;

const TILE_BYTES: usize = 256 << 10;

/// Lengths around everything that the kernel treats differently.
pub fn hashes_at_every_boundary<D: Device>(device: &D) {
    let mut lens = vec![0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 960, 961, 1023, 1024, 1025];
    for power in 11..=22 {
        let len = 1usize << power;
        lens.extend([len - 1, len, len + 1]);
    }
    // Odd numbers of leaves, within a tile and beyond.
    lens.extend([3, 5, 7, 9, 31, 33, 127, 129, 253, 255, 257, 511, 513, 767, 769].map(|leaves| leaves * 1024));
    lens.extend([3, 5, 6, 7, 9, 15, 17, 31, 33].map(|tiles| tiles * TILE_BYTES));
    lens.extend([3, 5, 7].map(|tiles| tiles * TILE_BYTES + 1));
    // More tiles than one block joins in a round.
    lens.push(259 * TILE_BYTES + 77);
    let bytes = random(1, lens.iter().max().unwrap() + 64);
    let memory = uploaded(device, &bytes);
    // Every alignment that loads differ for, and every shift of a word.
    for offset in [0, 1, 2, 3, 4, 8, 12, 16, 61] {
        let spans: Vec<_> = lens.iter().map(|len| slice(&memory, offset, *len)).collect();
        let expected: Vec<_> = lens.iter().map(|len| ChunkHash::of(&bytes[offset..offset + len])).collect();
        let mut stream = device.stream().unwrap();
        let hashing = stream.hash(&spans).unwrap();
        let found = stream.digests(hashing).unwrap();
        for ((len, expected), found) in lens.iter().zip(&expected).zip(&found) {
            assert_eq!(found, expected, "{len} bytes at {offset}");
        }
        assert!(stream.hash_seconds(&spans).unwrap() > 0.0);
    }
    let mut stream = device.stream().unwrap();
    let hashing = stream.hash(&[]).unwrap();
    assert_eq!(stream.digests(hashing).unwrap(), []);
}

/// Many chunks of any length and place at once.
pub fn hashes_any_batch<D: Device>(device: &D, cases: u32) {
    const BYTES: usize = 3 << 20;
    let bytes = random(2, BYTES);
    let memory = uploaded(device, &bytes);
    let place = (0..BYTES, prop_oneof![0..200usize, 0..5_000usize, 0..2_000_000usize]);
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let stream = RefCell::new(device.stream().unwrap());
    runner
        .run(&proptest::collection::vec(place, 1..40), |places| {
            let places: Vec<_> = places.into_iter().map(|(at, len)| (at, len.min(BYTES - at))).collect();
            let spans: Vec<_> = places.iter().map(|(at, len)| slice(&memory, *at, *len)).collect();
            let expected: Vec<_> = places.iter().map(|(at, len)| ChunkHash::of(&bytes[*at..*at + *len])).collect();
            let mut stream = stream.borrow_mut();
            let hashing = stream.hash(&spans).unwrap();
            prop_assert_eq!(stream.digests(hashing).unwrap(), expected);
            Ok(())
        })
        .unwrap();
}

/// One bit anywhere, put back afterwards.
pub fn sees_a_flipped_bit<D: Device>(device: &D, flips: u32) {
    let mut rng = SmallRng::seed_from_u64(3);
    for len in [1, 63, 1024, 1025, 9_999, TILE_BYTES, 4 * TILE_BYTES + 333] {
        let mut bytes = random(len as u64, len);
        let host = registered(device, &bytes);
        let memory = device.allocate(len as u64).unwrap();
        let mut stream = device.stream().unwrap();
        let right = ChunkHash::of(&bytes);
        for _ in 0..flips {
            let (at, bit) = (rng.random_range(0..len), rng.random_range(0..8));
            for flipped in [true, false] {
                bytes[at] ^= 1 << bit;
                host.span().write(at as u64, &bytes[at..=at]).unwrap();
                stream.upload(&host, &memory).unwrap();
                let hashing = stream.hash(std::slice::from_ref(&memory)).unwrap();
                let found = stream.digests(hashing).unwrap()[0];
                assert_eq!(found, ChunkHash::of(&bytes), "bit {bit} of byte {at} of {len}");
                assert_eq!(found != right, flipped, "bit {bit} of byte {at} of {len}");
            }
        }
    }
}

/// Registered memory and other, chunks longer than a staging buffer, empty ones, and wrong ones among them.
pub fn lands_and_verifies<D: Device>(device: &D) {
    let piece = usize::try_from(STAGING_BUFFER_BYTES).unwrap();
    let batch = usize::try_from(BATCH_BYTES).unwrap();
    let mut lens = vec![0, 1, 1000, piece - 1, piece, piece + 1, 3 * piece + 5];
    // Two batches, so that some are under way beside each other, and buffers are used again.
    lens.extend(std::iter::repeat_n(piece, batch / piece + 3));
    let total: usize = lens.iter().sum();
    let bytes = random(4, total);
    let mut landing = Landing::new(device.clone());
    for kinds in [[true, true], [false, false], [true, false]] {
        let sources = kinds.map(|is_registered| match is_registered {
            true => registered(device, &bytes),
            false => HostSpan::pageable(host(&bytes)),
        });
        let memory = device.allocate(total as u64).unwrap();
        let mut at = 0;
        let mut chunks: Vec<_> = (0..)
            .zip(&lens)
            .map(|(index, len)| {
                let range = at..at + len;
                at += len;
                let from = sources[index % 2].slice(range.start as u64..range.end as u64).unwrap();
                Placement { from, to: slice(&memory, range.start, *len), hash: ChunkHash::of(&bytes[range]) }
            })
            .collect();
        let right = landing.land(&chunks).unwrap();
        assert_eq!(right, Landed { bytes: total as u64, wrong: Vec::new() });
        assert!(downloaded(device, &memory) == bytes, "what landed is what was sent");

        let last = chunks.len() - 1;
        for wrong in [0, 5, last] {
            chunks[wrong].hash = ChunkHash(Hash([0; 32]));
        }
        assert_eq!(landing.land(&chunks).unwrap().wrong, [0, 5, last]);
    }
    assert_eq!(landing.land(&[]).unwrap(), Landed::default());
}

/// From shadow memory, and from the host: what is neighbours on both sides, and what is not.
pub fn applies<D: Device>(device: &D) {
    const CHUNK: usize = 10_000;
    let (before, after) = (random(5, 20 * CHUNK), random(6, 20 * CHUNK));
    let source = registered(device, &after);
    for changed in [vec![0, 1, 2, 5, 7, 8, 19], (0..20).collect(), vec![]] {
        let mut expected = before.clone();
        for at in changed.iter().map(|chunk| chunk * CHUNK) {
            expected[at..at + CHUNK].copy_from_slice(&after[at..at + CHUNK]);
        }
        let mut stream = device.stream().unwrap();
        let (region, shadow) = (uploaded(device, &before), uploaded(device, &after));
        let pairs = |from: &DeviceSpan| -> Vec<_> {
            changed.iter().map(|c| (slice(from, c * CHUNK, CHUNK), slice(&region, c * CHUNK, CHUNK))).collect()
        };
        apply(&mut stream, &pairs(&shadow)).unwrap();
        finish(&mut stream);
        assert!(downloaded(device, &region) == expected);

        let region = uploaded(device, &before);
        let at = |chunk: usize| (chunk * CHUNK) as u64..((chunk + 1) * CHUNK) as u64;
        let pairs: Vec<_> =
            changed.iter().map(|c| (source.slice(at(*c)).unwrap(), slice(&region, c * CHUNK, CHUNK))).collect();
        apply_from_host(&mut stream, &pairs).unwrap();
        finish(&mut stream);
        assert!(downloaded(device, &region) == expected);
    }
}

/// Chunks go from `other`'s memory to this device, in place and beside it, and out to the host; what is wrong is told.
pub fn takes_from_another<D: Device>(device: &D, other: &D) {
    let lens = [0, 1, 1000, 100_001, 4 << 20];
    let bytes = random(9, lens.iter().sum());
    let (source, region) = (uploaded(other, &bytes), device.allocate(bytes.len() as u64).unwrap());
    let worker = aquifer_cuda::worker(device.clone());
    let mut at = 0;
    let places: Vec<_> = lens
        .iter()
        .map(|len| {
            at += len;
            (at - len, *len, ChunkHash::of(&bytes[at - len..at]))
        })
        .collect();
    let mut chunks: Vec<_> = places
        .iter()
        .map(|(at, len, hash)| (slice(&source, *at, *len), *hash, Goes::Whole(slice(&region, *at, *len))))
        .collect();
    assert!(worker.land_across(&chunks).unwrap().is_empty());
    assert!(downloaded(device, &region) == bytes, "what was taken is what was there");
    let (at, len, hash) = places[3];
    let part = device.allocate(500).unwrap();
    let goes = Goes::Parts(vec![(7, slice(&part, 0, 200)), (50_000, slice(&part, 200, 300))]);
    assert!(worker.land_across(&[(slice(&source, at, len), hash, goes)]).unwrap().is_empty());
    assert!(downloaded(device, &part) == [&bytes[at + 7..at + 207], &bytes[at + 50_000..at + 50_300]].concat());
    chunks[2].1 = ChunkHash(Hash([0; 32]));
    assert_eq!(worker.land_across(&chunks).unwrap(), [2]);
    let list: Vec<_> = chunks.iter().map(|(from, hash, _)| (from.clone(), *hash)).collect();
    let staged = worker.stage_across(&list).unwrap();
    assert!(staged[2].is_none());
    assert!(downloaded(device, staged[4].as_ref().unwrap()) == bytes[bytes.len() - (4 << 20)..]);

    // Into memory that is registered with all that it is a part of, and into other.
    let all = Mapping::anonymous(REGISTERED_BYTES_MIN + bytes.len() as u64).unwrap().span();
    let out = all.slice(77..77 + bytes.len() as u64).unwrap();
    let to = |at: usize, len: usize| out.slice(at as u64..(at + len) as u64).unwrap();
    let pairs: Vec<_> = places.iter().map(|(at, len, _)| (slice(&region, *at, *len), to(*at, *len))).collect();
    worker.bring_out(&pairs).unwrap();
    assert_eq!(out.hash().unwrap(), ChunkHash::of(&bytes));
    let alone = host(&vec![0; bytes.len()]);
    worker.bring_out(&[(region, alone.clone())]).unwrap();
    assert_eq!(alone.hash().unwrap(), ChunkHash::of(&bytes));
}

/// What a caller does wrong is an error, and the device goes on.
pub fn refuses_what_is_wrong<D: Device>(device: &D) {
    let memory = device.allocate(100).unwrap();
    assert!(matches!(memory.slice(50..101), Err(DeviceError::Bounds { begin: 50, end: 101, len: 100 })));
    let mut stream = device.stream().unwrap();
    let short = registered(device, &[1; 99]);
    let outcome = stream.upload(&short, &memory).and_then(|()| {
        let mark = stream.mark()?;
        stream.wait(&mark)
    });
    assert!(matches!(outcome, Err(DeviceError::Lengths { from: 99, to: 100 })));
    assert!(downloaded(device, &uploaded(device, b"still works")) == b"still works");
}

pub fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

pub fn slice(memory: &DeviceSpan, at: usize, len: usize) -> DeviceSpan {
    memory.slice(at as u64..(at + len) as u64).unwrap()
}

pub fn host(bytes: &[u8]) -> Span {
    let span = Mapping::anonymous(bytes.len() as u64).unwrap().span();
    span.write(0, bytes).unwrap();
    span
}

pub fn registered<D: Device>(device: &D, bytes: &[u8]) -> HostSpan {
    device.register(&host(bytes)).unwrap()
}

pub fn uploaded<D: Device>(device: &D, bytes: &[u8]) -> DeviceSpan {
    let memory = device.allocate(bytes.len() as u64).unwrap();
    let mut stream = device.stream().unwrap();
    stream.upload(&registered(device, bytes), &memory).unwrap();
    finish(&mut stream);
    memory
}

pub fn downloaded<D: Device>(device: &D, memory: &DeviceSpan) -> Vec<u8> {
    let place = registered(device, &vec![0; usize::try_from(memory.len()).unwrap()]);
    let mut stream = device.stream().unwrap();
    stream.download(memory, &place).unwrap();
    finish(&mut stream);
    let mut bytes = vec![0; usize::try_from(memory.len()).unwrap()];
    place.span().read(0, &mut bytes).unwrap();
    bytes
}

pub fn finish<S: Stream>(stream: &mut S) {
    let mark = stream.mark().unwrap();
    stream.wait(&mark).unwrap();
}
