//! What an agent has a device do, whichever kind of device it is.

use crate::apply::apply;
use crate::device::{Device, DeviceSpan, HostSpan, Stream};
use crate::error::DeviceError;
use crate::landing::{Landing, Placement};
use crate::limits;
use crate::region::RegionHandle;
use crate::uuid::DeviceUuid;
use aquifer_core::ChunkHash;
use aquifer_memory::{Mapping, Span};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where a chunk goes in an engine's memory on one device.
#[derive(Clone, Debug)]
pub enum Goes {
    /// All of it to one place, where it is verified.
    Whole(DeviceSpan),
    /// Ranges of it, each from that byte of the chunk on: it is verified in memory of this process on the
    /// device, and copied from there.
    Parts(Vec<(u64, DeviceSpan)>),
}

/// A device, at work for as many engines as there are.
pub trait DeviceWorker: fmt::Debug + Send + Sync {
    fn uuid(&self) -> DeviceUuid;

    /// See [`Device::open`].
    fn open(&self, region: &RegionHandle) -> Result<DeviceSpan, DeviceError>;

    /// See [`Device::reaches`].
    fn reaches(&self, memory: &DeviceSpan) -> bool;

    /// Copies chunks from host memory to where they go. They are hashed on the device; those that are not what
    /// their names say are returned, by their place in the list, and of them nothing is copied on.
    fn land(&self, chunks: &[(Span, ChunkHash, Goes)]) -> Result<Vec<usize>, DeviceError>;

    /// The same from the memory of this or of another device, which an engine may write to meanwhile.
    fn land_across(&self, chunks: &[(DeviceSpan, ChunkHash, Goes)]) -> Result<Vec<usize>, DeviceError>;

    /// Puts chunks into memory of this process on the device, and verifies them there: where each is, or `None` if
    /// it is not what its name says.
    fn stage(&self, chunks: &[(Span, ChunkHash)]) -> Result<Vec<Option<DeviceSpan>>, DeviceError>;

    /// The same from the memory of this or of another device.
    fn stage_across(&self, chunks: &[(DeviceSpan, ChunkHash)]) -> Result<Vec<Option<DeviceSpan>>, DeviceError>;

    /// Copies chunks out to host memory. Whether they are right is not looked at: an engine may write to its own
    /// meanwhile.
    fn bring_out(&self, chunks: &[(DeviceSpan, Span)]) -> Result<(), DeviceError>;

    /// Copies what was staged to where it goes, at once.
    fn apply(&self, chunks: &[(DeviceSpan, Goes)]) -> Result<(), DeviceError>;

    /// The BLAKE3 hash of each.
    fn hash(&self, spans: &[DeviceSpan]) -> Result<Vec<ChunkHash>, DeviceError>;

    /// Copies bytes out; for the few that cannot be looked at where they are.
    fn read(&self, from: &DeviceSpan, into: &mut [u8]) -> Result<(), DeviceError>;
}

/// The worker of a device.
pub fn worker<D: Device>(device: D) -> Arc<dyn DeviceWorker> {
    let landing = Mutex::new(Landing::new(device.clone()));
    let outward = Mutex::default();
    Arc::new(Worker { device, landing, copies: Mutex::new(None), outward, registered: Mutex::default() })
}

#[derive(Debug)]
struct Worker<D: Device> {
    device: D,
    landing: Mutex<Landing<D>>,
    /// For copies on the device: an engine waits while these are made.
    copies: Mutex<Option<D::Stream>>,
    /// For copies out and from other devices: idle ones, one for each that works at a time.
    outward: Mutex<Vec<D::Stream>>,
    registered: Mutex<Registered>,
}

/// Host memory that was registered, such as a store's slabs: as long as anybody else keeps it.
#[derive(Debug, Default)]
struct Registered {
    all: Vec<HostSpan>,
    /// The device refused once: what it refuses is copied by way of staging memory, and nobody need hear of
    /// it for each chunk.
    refused: bool,
}

/// What keeps a mapping that nobody else does: a registration, and the span it is of.
const OWN_REFERENCES: usize = 2;

impl<D: Device> Worker<D> {
    /// A chunk's host memory, registered with all that it is a part of if that is worth it.
    fn host(&self, span: &Span) -> HostSpan {
        let (mapping, begin) = span.mapping();
        let mut registered = lock(&self.registered);
        let is = |whole: &&HostSpan| Arc::ptr_eq(whole.span().mapping().0, mapping);
        let known = match registered.all.iter().find(is) {
            Some(whole) => Some(whole.clone()),
            None => self.register(&mut registered, mapping),
        };
        let part = known.and_then(|whole| whole.slice(begin..begin + span.len()).ok());
        part.unwrap_or_else(|| HostSpan::pageable(span.clone()))
    }

    fn register(&self, registered: &mut Registered, mapping: &Arc<Mapping>) -> Option<HostSpan> {
        if mapping.len() < limits::REGISTERED_BYTES_MIN || !mapping.is_writable() {
            return None;
        }
        match self.device.register(&mapping.span()) {
            Ok(whole) => {
                registered.all.push(whole.clone());
                Some(whole)
            }
            Err(error) => {
                if !std::mem::replace(&mut registered.refused, true) {
                    tracing::warn!("host memory is copied to {} twice: {error}", self.device.uuid());
                }
                None
            }
        }
    }

    /// Gives up registrations of memory that nobody else keeps.
    fn tidy(&self) {
        let all = &mut lock(&self.registered).all;
        all.retain(|whole| Arc::strong_count(whole.span().mapping().0) > OWN_REFERENCES);
    }

    /// Chunks one after the other in new memory on the device.
    fn allocate(&self, lengths: impl Iterator<Item = u64>) -> Result<Vec<DeviceSpan>, DeviceError> {
        let (mut places, mut end) = (Vec::new(), 0);
        for len in lengths {
            places.push(end..end + len);
            // The hashing kernel reads words.
            end = (end + len).next_multiple_of(limits::STAGED_ALIGN_BYTES);
        }
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let all = self.device.allocate(end)?;
        places.into_iter().map(|place| all.slice(place)).collect()
    }

    /// Does `work` on a stream of its own, which is used again unless that failed.
    fn on_a_stream<T>(&self, work: impl FnOnce(&mut D::Stream) -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        let idle = lock(&self.outward).pop();
        let mut stream = idle.map_or_else(|| self.device.stream(), Ok)?;
        let outcome = work(&mut stream)?;
        lock(&self.outward).push(stream);
        Ok(outcome)
    }

    /// Copies each to its place and hashes it there; those that are wrong.
    fn place_across(&self, chunks: &[(DeviceSpan, ChunkHash, DeviceSpan)]) -> Result<Vec<usize>, DeviceError> {
        let digests = self.on_a_stream(|stream| {
            chunks.iter().try_for_each(|(from, _, to)| stream.copy_across(from, to))?;
            let places: Vec<DeviceSpan> = chunks.iter().map(|(_, _, to)| to.clone()).collect();
            let hashing = stream.hash(&places)?;
            stream.digests(hashing)
        })?;
        let wrong = chunks.iter().zip(digests).enumerate().filter(|(_, ((_, hash, _), found))| found != hash);
        Ok(wrong.map(|(at, _)| at).collect())
    }

    fn land_together(&self, chunks: &[(Span, ChunkHash, Goes)]) -> Result<Vec<usize>, DeviceError> {
        let in_parts = chunks.iter().filter(|(_, _, goes)| matches!(goes, Goes::Parts(_)));
        let mut staged = self.allocate(in_parts.map(|(from, _, _)| from.len()))?.into_iter();
        let mut placements = Vec::with_capacity(chunks.len());
        for (from, hash, goes) in chunks {
            let to = match goes {
                Goes::Whole(to) => Some(to.clone()),
                Goes::Parts(_) => staged.next(),
            };
            let Some(to) = to else { continue };
            placements.push(Placement { from: self.host(from), to, hash: *hash });
        }
        let wrong = self.place(&placements)?;
        let right = placements.iter().zip(chunks).enumerate().filter(|(at, _)| wrong.binary_search(at).is_err());
        let parts = right.filter(|(_, (_, (_, _, goes)))| matches!(goes, Goes::Parts(_)));
        let copies: Vec<_> = parts.map(|(_, (placed, (_, _, goes)))| (placed.to.clone(), goes.clone())).collect();
        self.apply(&copies)?;
        Ok(wrong)
    }

    fn land_across_together(&self, chunks: &[(DeviceSpan, ChunkHash, Goes)]) -> Result<Vec<usize>, DeviceError> {
        let in_parts = chunks.iter().filter(|(_, _, goes)| matches!(goes, Goes::Parts(_)));
        let mut staged = self.allocate(in_parts.map(|(from, _, _)| from.len()))?.into_iter();
        let place = |goes: &Goes| match goes {
            Goes::Whole(to) => Some(to.clone()),
            Goes::Parts(_) => staged.next(),
        };
        let places: Vec<DeviceSpan> = chunks.iter().map(|(_, _, goes)| goes).filter_map(place).collect();
        let placed: Vec<_> =
            chunks.iter().zip(&places).map(|((from, hash, _), to)| (from.clone(), *hash, to.clone())).collect();
        let wrong = self.place_across(&placed)?;
        let right = places.into_iter().zip(chunks).enumerate().filter(|(at, _)| wrong.binary_search(at).is_err());
        let parts = right.filter(|(_, (_, (_, _, goes)))| matches!(goes, Goes::Parts(_)));
        self.apply(&parts.map(|(_, (placed, (_, _, goes)))| (placed, goes.clone())).collect::<Vec<_>>())?;
        Ok(wrong)
    }

    fn place(&self, placements: &[Placement]) -> Result<Vec<usize>, DeviceError> {
        self.tidy();
        Ok(lock(&self.landing).land(placements)?.wrong)
    }
}

impl<D: Device> DeviceWorker for Worker<D> {
    fn uuid(&self) -> DeviceUuid {
        self.device.uuid()
    }

    fn open(&self, region: &RegionHandle) -> Result<DeviceSpan, DeviceError> {
        self.device.open(region)
    }

    fn reaches(&self, memory: &DeviceSpan) -> bool {
        self.device.reaches(memory)
    }

    fn land(&self, chunks: &[(Span, ChunkHash, Goes)]) -> Result<Vec<usize>, DeviceError> {
        in_what_room_there_is(chunks, |(_, _, goes)| goes, |some| self.land_together(some))
    }

    fn land_across(&self, chunks: &[(DeviceSpan, ChunkHash, Goes)]) -> Result<Vec<usize>, DeviceError> {
        in_what_room_there_is(chunks, |(_, _, goes)| goes, |some| self.land_across_together(some))
    }

    fn stage_across(&self, chunks: &[(DeviceSpan, ChunkHash)]) -> Result<Vec<Option<DeviceSpan>>, DeviceError> {
        let places = self.allocate(chunks.iter().map(|(from, _)| from.len()))?;
        let placed: Vec<_> =
            chunks.iter().zip(&places).map(|((from, hash), to)| (from.clone(), *hash, to.clone())).collect();
        let wrong = self.place_across(&placed)?;
        let right = |(at, place)| wrong.binary_search(&at).is_err().then_some(place);
        Ok(places.into_iter().enumerate().map(right).collect())
    }

    fn bring_out(&self, chunks: &[(DeviceSpan, Span)]) -> Result<(), DeviceError> {
        self.tidy();
        let pairs: Vec<_> = chunks.iter().map(|(from, to)| (from, self.host(to))).collect();
        self.on_a_stream(|stream| {
            pairs.iter().try_for_each(|(from, to)| stream.download(from, to))?;
            let done = stream.mark()?;
            stream.wait(&done)
        })
    }

    fn stage(&self, chunks: &[(Span, ChunkHash)]) -> Result<Vec<Option<DeviceSpan>>, DeviceError> {
        let places = self.allocate(chunks.iter().map(|(from, _)| from.len()))?;
        let placed = chunks.iter().zip(places);
        let placements: Vec<Placement> =
            placed.map(|((from, hash), to)| Placement { from: self.host(from), to, hash: *hash }).collect();
        let wrong = self.place(&placements)?;
        let right = |(at, placed): (usize, Placement)| wrong.binary_search(&at).is_err().then_some(placed.to);
        Ok(placements.into_iter().enumerate().map(right).collect())
    }

    fn apply(&self, chunks: &[(DeviceSpan, Goes)]) -> Result<(), DeviceError> {
        let mut pairs = Vec::with_capacity(chunks.len());
        for (from, goes) in chunks {
            match goes {
                Goes::Whole(to) => pairs.push((from.clone(), to.clone())),
                Goes::Parts(parts) => {
                    for (begin, to) in parts {
                        pairs.push((from.slice(*begin..*begin + to.len())?, to.clone()));
                    }
                }
            }
        }
        if pairs.is_empty() {
            return Ok(());
        }
        let mut copies = lock(&self.copies);
        // Taken, so that after an error a new one is made.
        let mut stream = match copies.take() {
            Some(stream) => stream,
            None => self.device.stream()?,
        };
        apply(&mut stream, &pairs)?;
        let done = stream.mark()?;
        stream.wait(&done)?;
        *copies = Some(stream);
        Ok(())
    }

    fn hash(&self, spans: &[DeviceSpan]) -> Result<Vec<ChunkHash>, DeviceError> {
        let mut stream = self.device.stream()?;
        let hashing = stream.hash(spans)?;
        stream.digests(hashing)
    }

    fn read(&self, from: &DeviceSpan, into: &mut [u8]) -> Result<(), DeviceError> {
        let host = Mapping::anonymous(from.len())?.span();
        let mut stream = self.device.stream()?;
        stream.download(from, &HostSpan::pageable(host.clone()))?;
        let done = stream.mark()?;
        stream.wait(&done)?;
        Ok(host.read(0, into)?)
    }
}

/// Does `land` with all chunks together. What goes to its place in parts is put together beside it first: where there
/// is no room for all of that, one after the other. Those that are wrong, by their place in the list.
fn in_what_room_there_is<C: Clone>(
    chunks: &[C],
    goes: impl Fn(&C) -> &Goes,
    land: impl Fn(&[C]) -> Result<Vec<usize>, DeviceError>,
) -> Result<Vec<usize>, DeviceError> {
    match land(chunks) {
        Err(DeviceError::OutOfMemory { .. }) if chunks.len() > 1 => {}
        other => return other,
    }
    let all: Vec<usize> = (0..chunks.len()).collect();
    let (whole, parts): (Vec<usize>, Vec<usize>) =
        all.iter().partition(|at| matches!(goes(&chunks[**at]), Goes::Whole(_)));
    let of_whole: Vec<C> = whole.iter().map(|at| chunks[*at].clone()).collect();
    let mut wrong: Vec<usize> = land(&of_whole)?.into_iter().map(|at| whole[at]).collect();
    for at in parts {
        if !land(&chunks[at..=at])?.is_empty() {
            wrong.push(at);
        }
    }
    wrong.sort_unstable();
    Ok(wrong)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Lists and lanes are replaced whole or not at all.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Twin;

    const HERE: DeviceUuid = DeviceUuid([7; 16]);

    fn chunk(seed: u8, len: usize) -> (Span, ChunkHash, Vec<u8>) {
        let bytes: Vec<u8> =
            (0..len).map(|i| seed.wrapping_mul(31).wrapping_add(u8::try_from(i % 251).unwrap())).collect();
        let span = Mapping::anonymous(len as u64).unwrap().span();
        span.write(0, &bytes).unwrap();
        (span, ChunkHash::of(&bytes), bytes)
    }

    fn content(worker: &dyn DeviceWorker, span: &DeviceSpan) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(span.len()).unwrap()];
        worker.read(span, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn chunks_land_whole_and_in_parts_and_wrong_ones_are_told() {
        let worker = worker(Twin::new(HERE));
        let memory = Mapping::anonymous(1 << 20).unwrap().span();
        let region = Twin::of_host(HERE, memory);
        let (a, a_hash, a_bytes) = chunk(1, 70_001);
        let (b, b_hash, b_bytes) = chunk(2, 5000);
        let (c, _, _) = chunk(3, 100);
        let whole = region.slice(0..70_001).unwrap();
        let parts =
            vec![(10, region.slice(100_000..100_100).unwrap()), (4000, region.slice(200_000..201_000).unwrap())];
        let nowhere = region.slice(300_000..300_100).unwrap();
        let wrong = worker
            .land(&[
                (a, a_hash, Goes::Whole(whole.clone())),
                (c, a_hash, Goes::Parts(vec![(0, nowhere.clone())])),
                (b, b_hash, Goes::Parts(parts.clone())),
            ])
            .unwrap();
        assert_eq!(wrong, [1]);
        assert!(content(&*worker, &whole) == a_bytes && worker.hash(&[whole]).unwrap() == [a_hash]);
        assert!(content(&*worker, &nowhere).iter().all(|byte| *byte == 0), "what is wrong is not copied on");
        assert_eq!(content(&*worker, &parts[0].1), b_bytes[10..110]);
        assert_eq!(content(&*worker, &parts[1].1), b_bytes[4000..5000]);
    }

    #[test]
    fn chunks_go_from_one_device_to_another_and_out_and_wrong_ones_are_told() {
        const THERE: DeviceUuid = DeviceUuid([8; 16]);
        let worker = worker(Twin::new(HERE));
        let of = |device| Twin::of_host(device, Mapping::anonymous(1 << 20).unwrap().span());
        let (engine, other) = (of(HERE), of(THERE));
        let (a, a_hash, a_bytes) = chunk(1, 70_001);
        let from = Mapping::anonymous(1 << 20).unwrap().span();
        from.write(5, &a_bytes).unwrap();
        let source = Twin::of_host(THERE, from.clone()).slice(5..70_006).unwrap();
        let (whole, part) = (engine.slice(0..70_001).unwrap(), engine.slice(100_000..100_100).unwrap());
        let nowhere = engine.slice(200_000..200_100).unwrap();
        let wrong = other.slice(0..70_001).unwrap();
        let landed = worker.land_across(&[
            (wrong.clone(), a_hash, Goes::Parts(vec![(0, nowhere.clone())])),
            (source.clone(), a_hash, Goes::Whole(whole.clone())),
            (source.clone(), a_hash, Goes::Parts(vec![(7, part.clone())])),
        ]);
        assert_eq!(landed.unwrap(), [0]);
        assert!(content(&*worker, &whole) == a_bytes);
        assert_eq!(content(&*worker, &part), a_bytes[7..107]);
        assert!(content(&*worker, &nowhere).iter().all(|byte| *byte == 0), "what is wrong is not copied on");

        let staged = worker.stage_across(&[(wrong, a_hash), (source.clone(), a_hash)]).unwrap();
        assert!(staged[0].is_none() && staged[1].as_ref().is_some_and(|place| content(&*worker, place) == a_bytes));
        assert!(worker.land_across(&[]).unwrap().is_empty() && worker.stage_across(&[]).unwrap().is_empty());

        let out = Mapping::anonymous(70_001).unwrap().span();
        worker.bring_out(&[(whole, out.clone())]).unwrap();
        assert_eq!((out.hash().unwrap(), a.hash().unwrap()), (a_hash, a_hash));
        worker.bring_out(&[]).unwrap();
    }

    #[test]
    fn where_memory_is_short_chunks_land_one_after_the_other() {
        let worker = worker(Twin::new(HERE).with_little_memory(8192));
        let region = Twin::of_host(HERE, Mapping::anonymous(1 << 20).unwrap().span());
        let chunks: Vec<_> = (0..4).map(|n| chunk(n, 6000)).collect();
        let place = |n: u64| region.slice(n * 10_000..n * 10_000 + 6000).unwrap();
        let goes = |n: u64| match n {
            1 => Goes::Whole(place(n)),
            _ => Goes::Parts(vec![(0, place(n).slice(0..1000).unwrap()), (1000, place(n).slice(1000..6000).unwrap())]),
        };
        let hash = |n: u64| chunks[if n == 2 { 0 } else { usize::try_from(n).unwrap() }].1;
        let listed: Vec<_> = (0..4).zip(&chunks).map(|(n, (span, _, _))| (span.clone(), hash(n), goes(n))).collect();
        assert_eq!(worker.land(&listed).unwrap(), [2]);
        for (n, (_, _, bytes)) in (0..4).zip(&chunks) {
            assert_eq!(content(&*worker, &place(n)) == *bytes, n != 2);
        }
        let sources = listed.iter().map(|(span, hash, goes)| (Twin::of_host(HERE, span.clone()), *hash, goes.clone()));
        assert_eq!(worker.land_across(&sources.collect::<Vec<_>>()).unwrap(), [2]);
        let stage: Vec<_> = chunks.iter().map(|(span, hash, _)| (span.clone(), *hash)).collect();
        let error = worker.stage(&stage).unwrap_err();
        assert!(matches!(error, DeviceError::OutOfMemory { .. }) && error.to_string().contains("8192"), "{error}");
        let (long, long_hash, _) = chunk(9, 9000);
        let error = worker.land(&[(long, long_hash, Goes::Parts(vec![(0, place(0))]))]).unwrap_err();
        assert!(matches!(error, DeviceError::OutOfMemory { .. }), "{error}");
    }

    #[test]
    fn what_was_staged_is_applied_at_once() {
        let worker = worker(Twin::new(HERE));
        let region = Twin::of_host(HERE, Mapping::anonymous(1 << 20).unwrap().span());
        let (a, a_hash, a_bytes) = chunk(1, 4097);
        let (b, b_hash, _) = chunk(2, 9);
        let staged = worker.stage(&[(a, a_hash), (b.clone(), a_hash), (b, b_hash)]).unwrap();
        assert!(staged[1].is_none());
        let to = region.slice(3..4100).unwrap();
        assert!(content(&*worker, &to).iter().all(|byte| *byte == 0), "nothing is there before it is applied");
        worker.apply(&[(staged[0].clone().unwrap(), Goes::Whole(to.clone()))]).unwrap();
        assert!(content(&*worker, &to) == a_bytes);
        worker.apply(&[]).unwrap();
        assert!(worker.stage(&[]).unwrap().is_empty());
    }
}
