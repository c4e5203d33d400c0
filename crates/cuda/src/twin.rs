//! A device made of host memory. It does as late as it may what a GPU does at some time: queued work runs when
//! somebody waits for it, so what a program forgets to wait for is not done, and shows.

use crate::device::{Device, DeviceSpan, HostSpan, Stream};
use crate::error::DeviceError;
use crate::region::{HandleError, RegionHandle};
use crate::registered;
use crate::uuid::DeviceUuid;
use aquifer_core::ChunkHash;
use aquifer_memory::{Mapping, Span};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Cheap to clone; clones are the same device.
#[derive(Clone, Debug)]
pub struct Twin {
    uuid: DeviceUuid,
    /// What was exported, by handle.
    exported: Arc<Mutex<BTreeMap<[u8; 64], DeviceSpan>>>,
    /// More cannot be allocated in one piece.
    piece_bytes_max: u64,
    upload_bytes_per_s: u64,
}

impl Twin {
    pub fn new(uuid: DeviceUuid) -> Self {
        Twin { uuid, exported: Arc::default(), piece_bytes_max: u64::MAX, upload_bytes_per_s: u64::MAX }
    }

    /// One that is nearly full: of which so much can be had at a time.
    pub fn with_little_memory(self, piece_bytes_max: u64) -> Self {
        Twin { piece_bytes_max, ..self }
    }

    /// One behind a slow link.
    pub fn with_slow_uploads(self, upload_bytes_per_s: u64) -> Self {
        Twin { upload_bytes_per_s, ..self }
    }

    /// Host memory, an engine's perhaps, as memory of the device called `uuid`.
    pub fn of_host(uuid: DeviceUuid, memory: Span) -> DeviceSpan {
        let (address, len) = (memory.as_ptr() as u64, memory.len());
        DeviceSpan::new(uuid, Arc::new(memory), address, len)
    }

    /// As an engine would: a handle to memory of this device.
    pub fn export(&self, span: &DeviceSpan) -> RegionHandle {
        let mut exported = lock(&self.exported);
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(&(exported.len() as u64).to_le_bytes());
        exported.insert(handle, span.clone());
        RegionHandle { device: self.uuid, handle, offset: 0, len: span.len() }
    }
}

impl Device for Twin {
    type Stream = TwinStream;

    fn uuid(&self) -> DeviceUuid {
        self.uuid
    }

    fn allocate(&self, len: u64) -> Result<DeviceSpan, DeviceError> {
        if len > self.piece_bytes_max {
            let (device, free) = (format!("the twin {}", self.uuid), self.piece_bytes_max);
            return Err(DeviceError::OutOfMemory { needed: len, device, free, total: free });
        }
        Ok(Self::of_host(self.uuid, Mapping::anonymous(len)?.span()))
    }

    fn open(&self, region: &RegionHandle) -> Result<DeviceSpan, DeviceError> {
        region.check_device(self.uuid)?;
        let known = lock(&self.exported).get(&region.handle).cloned();
        let span = known.ok_or_else(|| HandleError::Dead { code: "no such handle".into() })?;
        span.slice(region.range_in(span.len())?)
    }

    fn reaches(&self, _memory: &DeviceSpan) -> bool {
        true
    }

    fn register(&self, span: &Span) -> Result<HostSpan, DeviceError> {
        match span.as_mut_ptr() {
            Some(_) => Ok(registered::pretend(span)),
            None => Err(DeviceError::NotMemory),
        }
    }

    fn stream(&self) -> Result<TwinStream, DeviceError> {
        let upload_bytes_per_s = self.upload_bytes_per_s;
        Ok(TwinStream { uuid: self.uuid, queue: Arc::default(), queued: 0, upload_bytes_per_s })
    }
}

type Work = Box<dyn FnOnce() -> Result<(), DeviceError> + Send>;

#[derive(Default)]
struct Queue {
    work: Mutex<VecDeque<Work>>,
    done: AtomicU64,
}

impl Queue {
    /// Does what was queued, up to the given number. The lock is kept, so that it is done in order.
    fn run(&self, until: u64) -> Result<(), DeviceError> {
        // Without the lock: a queue may wait for one that waits for an earlier part of itself.
        if self.done.load(Ordering::Acquire) >= until {
            return Ok(());
        }
        let mut work = lock(&self.work);
        while self.done.load(Ordering::Acquire) < until {
            let Some(next) = work.pop_front() else { return Ok(()) };
            let outcome = next();
            self.done.fetch_add(1, Ordering::AcqRel);
            outcome?;
        }
        Ok(())
    }
}

/// A queue of work in host memory.
pub struct TwinStream {
    uuid: DeviceUuid,
    queue: Arc<Queue>,
    queued: u64,
    upload_bytes_per_s: u64,
}

/// A point in a twin's stream.
#[derive(Clone)]
pub struct TwinMark {
    queue: Arc<Queue>,
    until: u64,
}

/// Digests that a twin computes.
#[derive(Debug)]
pub struct TwinHashing {
    mark: TwinMark,
    digests: Arc<Mutex<Vec<ChunkHash>>>,
}

impl TwinStream {
    fn queue(&mut self, work: impl FnOnce() -> Result<(), DeviceError> + Send + 'static) {
        lock(&self.queue.work).push_back(Box::new(work));
        self.queued += 1;
    }
}

impl Stream for TwinStream {
    type Mark = TwinMark;
    type Hashing = TwinHashing;

    fn upload(&mut self, from: &HostSpan, to: &DeviceSpan) -> Result<(), DeviceError> {
        let (from, to) = (from.span().clone(), memory(to, self.uuid)?);
        let takes = Duration::from_micros(to.len().saturating_mul(1_000_000) / self.upload_bytes_per_s);
        self.queue(move || {
            std::thread::sleep(takes);
            copy(&from, &to)
        });
        Ok(())
    }

    fn copy(&mut self, from: &DeviceSpan, to: &DeviceSpan) -> Result<(), DeviceError> {
        let (from, to) = (memory(from, self.uuid)?, memory(to, self.uuid)?);
        self.queue(move || copy(&from, &to));
        Ok(())
    }

    fn copy_across(&mut self, from: &DeviceSpan, to: &DeviceSpan) -> Result<(), DeviceError> {
        let (from, to) = (memory(from, from.device())?, memory(to, self.uuid)?);
        self.queue(move || copy(&from, &to));
        Ok(())
    }

    fn download(&mut self, from: &DeviceSpan, to: &HostSpan) -> Result<(), DeviceError> {
        let (from, to) = (memory(from, self.uuid)?, to.span().clone());
        self.queue(move || copy(&from, &to));
        Ok(())
    }

    fn hash(&mut self, spans: &[DeviceSpan]) -> Result<TwinHashing, DeviceError> {
        let spans = spans.iter().map(|span| memory(span, self.uuid)).collect::<Result<Vec<_>, _>>()?;
        let digests: Arc<Mutex<Vec<ChunkHash>>> = Arc::default();
        let into = digests.clone();
        self.queue(move || {
            *lock(&into) = spans.iter().map(Span::hash).collect::<Result<_, _>>()?;
            Ok(())
        });
        Ok(TwinHashing { mark: self.mark()?, digests })
    }

    fn digests(&mut self, hashing: TwinHashing) -> Result<Vec<ChunkHash>, DeviceError> {
        self.wait(&hashing.mark)?;
        Ok(std::mem::take(&mut lock(&hashing.digests)))
    }

    fn hash_seconds(&mut self, spans: &[DeviceSpan]) -> Result<f64, DeviceError> {
        let queued = self.mark()?;
        self.wait(&queued)?;
        let hashing = self.hash(spans)?;
        let started = Instant::now();
        self.digests(hashing)?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn mark(&mut self) -> Result<TwinMark, DeviceError> {
        Ok(TwinMark { queue: self.queue.clone(), until: self.queued })
    }

    fn after(&mut self, mark: &TwinMark) -> Result<(), DeviceError> {
        let mark = mark.clone();
        self.queue(move || mark.queue.run(mark.until));
        Ok(())
    }

    fn wait(&mut self, mark: &TwinMark) -> Result<(), DeviceError> {
        mark.queue.run(mark.until)
    }
}

impl Drop for TwinStream {
    /// As a GPU's stream ends: with all that was queued.
    fn drop(&mut self) {
        if let Err(error) = self.queue.run(self.queued) {
            tracing::error!("work on a twin failed: {error}");
        }
    }
}

/// The host memory behind a span of a twin.
fn memory(span: &DeviceSpan, uuid: DeviceUuid) -> Result<Span, DeviceError> {
    let other = DeviceError::OtherDevice { wanted: uuid, found: span.device() };
    span.check_device(uuid)?;
    let whole = span.owner().downcast_ref::<Span>().ok_or(other)?;
    let begin = span.address() - whole.as_ptr() as u64;
    Ok(whole.slice(begin..begin + span.len())?)
}

fn copy(from: &Span, to: &Span) -> Result<(), DeviceError> {
    if from.len() != to.len() {
        return Err(DeviceError::Lengths { from: from.len(), to: to.len() });
    }
    Ok(from.copy_to(0, to, 0, from.len())?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for TwinStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TwinStream({} queued)", self.queued)
    }
}

impl fmt::Debug for TwinMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TwinMark({})", self.until)
    }
}
