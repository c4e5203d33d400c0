//! A GPU, through the CUDA driver.

use crate::device::{Device, DeviceSpan, HostSpan, Stream};
use crate::driver::{Context, check, launch, sys};
use crate::error::DeviceError;
use crate::hashing::{DIGEST_BYTES, JOINERS, Plan, TILE_LEAVES};
use crate::limits::{COPY_BYTES, DRIVER_VERSION_BATCHES, PUT_BYTES_MAX, SCRATCH_KEPT_MAX};
use crate::region::{self, Opened, RegionHandle};
use crate::registered;
use crate::uuid::DeviceUuid;
use aquifer_core::{ChunkHash, Hash};
use aquifer_memory::{Mapping, Span};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

/// Threads of one block of `copy_spans` and of `put`; blocks for each copy; bytes that one `put` carries.
const COPY_THREADS: u32 = 256;
const COPY_SLICES: u32 = 16;
const PUT_BYTES: usize = 240 * 16;
/// Scratch memory is never shorter, so that it serves most batches.
const SCRATCH_BYTES_MIN: u64 = 64 << 10;

/// One GPU of this machine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gpu {
    context: Arc<Context>,
}

impl Gpu {
    /// The GPUs that this process sees, with their products' names.
    pub fn list() -> Result<Vec<(DeviceUuid, String)>, DeviceError> {
        Context::devices()
    }

    pub fn open(uuid: DeviceUuid) -> Result<Self, DeviceError> {
        Ok(Gpu { context: Context::open(uuid)? })
    }

    /// The product's name.
    pub fn name(&self) -> &str {
        &self.context.name
    }

    /// Free and all memory, in bytes.
    pub fn memory(&self) -> Result<(u64, u64), DeviceError> {
        self.context.memory()
    }
}

impl Device for Gpu {
    type Stream = GpuStream;

    fn uuid(&self) -> DeviceUuid {
        self.context.uuid
    }

    fn allocate(&self, len: u64) -> Result<DeviceSpan, DeviceError> {
        let allocation = Allocation::new(&self.context, len)?;
        let address = allocation.address;
        Ok(DeviceSpan::new(self.context.uuid, Arc::new(allocation), address, len))
    }

    fn open(&self, region: &RegionHandle) -> Result<DeviceSpan, DeviceError> {
        region::open(&self.context, region)
    }

    fn reaches(&self, memory: &DeviceSpan) -> bool {
        let reach = || context_of(memory).is_ok_and(|other| self.context.reach(other));
        memory.device() == self.context.uuid || reach()
    }

    fn register(&self, span: &Span) -> Result<HostSpan, DeviceError> {
        registered::register(&self.context, span)
    }

    fn stream(&self) -> Result<GpuStream, DeviceError> {
        GpuStream::new(self)
    }
}

/// Memory of this process on a GPU, freed on drop.
struct Allocation {
    context: Arc<Context>,
    address: u64,
}

impl Allocation {
    fn new(context: &Arc<Context>, len: u64) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut address = 0;
        let size = usize::try_from(len).expect("this is for machines of 64 bits");
        // SAFETY: the address is live. A length of zero is none the driver takes.
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut address, size.max(1)) };
        if code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, total) = context.memory()?;
            let device = format!("{} {}", context.name, context.uuid);
            return Err(DeviceError::OutOfMemory { needed: len, device, free, total });
        }
        check(code, "cuMemAlloc", || format!("{len} bytes on {}", context.name))?;
        Ok(Allocation { context: context.clone(), address })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let freed = self.context.enter().and_then(|()| {
            // SAFETY: allocated by `new`, freed only here; queued work keeps its spans, and so this, until it is done.
            check(unsafe { sys::cuMemFree_v2(self.address) }, "cuMemFree", || self.context.name.clone())
        });
        if let Err(error) = freed {
            tracing::error!("GPU memory stays allocated: {error}");
        }
    }
}

/// A CUDA stream.
pub struct GpuStream {
    gpu: Gpu,
    raw: sys::CUstream,
    /// What queued work needs, with the number of that work.
    held: VecDeque<(u64, Held)>,
    queued: u64,
    scratch: Vec<Scratch>,
}

// SAFETY: a stream may be used from any thread, and only one has this value.
unsafe impl Send for GpuStream {}

/// Kept until work is done, and never looked at.
#[allow(dead_code, reason = "held for its drop")]
enum Held {
    Device(DeviceSpan),
    Devices(Arc<[DeviceSpan]>),
    Host(HostSpan),
    Hosts(Vec<(HostSpan, DeviceSpan)>),
    Pairs(Vec<(DeviceSpan, DeviceSpan)>),
    /// Used again afterwards.
    Scratch(Scratch),
}

/// A point in a GPU's stream.
#[derive(Clone)]
pub struct GpuMark {
    event: Arc<Event>,
    queued: u64,
}

impl GpuMark {
    /// What the GPU took from an earlier mark to this one; both must have been waited for.
    fn seconds_since(&self, earlier: &GpuMark) -> Result<f64, DeviceError> {
        self.event.context.enter()?;
        let mut ms = 0.0;
        // SAFETY: both events are live and were recorded.
        let code = unsafe { sys::cuEventElapsedTime(&raw mut ms, earlier.event.raw, self.event.raw) };
        check(code, "cuEventElapsedTime", || self.event.context.name.clone())?;
        Ok(f64::from(ms) / 1e3)
    }
}

struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: an event may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: it is recorded once, before it is shared.
unsafe impl Sync for Event {}

impl Event {
    fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let mut raw = std::ptr::null_mut();
        // Waiting sleeps: the cores have better things to do.
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        // SAFETY: the event is live.
        check(unsafe { sys::cuEventCreate(&raw mut raw, flags) }, "cuEventCreate", || context.name.clone())?;
        Ok(Event { context: context.clone(), raw })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: created by `new`; the driver keeps it as long as a stream waits for it.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

/// Where the kernels find their arguments and leave their results, and the same for the host.
#[derive(Clone)]
struct Scratch {
    device: DeviceSpan,
    host: HostSpan,
}

/// Chunks to hash, known to the GPU.
struct PreparedHash {
    /// The one that it was prepared on, which has to do it in order.
    stream: sys::CUstream,
    plan: Plan,
    scratch: Option<Scratch>,
    spans: Arc<[DeviceSpan]>,
}

// SAFETY: the stream is only compared.
unsafe impl Send for PreparedHash {}

/// Digests that a GPU computes.
pub struct GpuHashing {
    prepared: PreparedHash,
    mark: GpuMark,
}

impl GpuStream {
    fn new(gpu: &Gpu) -> Result<Self, DeviceError> {
        gpu.context.enter()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the stream is live.
        check(unsafe { sys::cuStreamCreate(&raw mut raw, flags) }, "cuStreamCreate", || gpu.context.name.clone())?;
        Ok(GpuStream { gpu: gpu.clone(), raw, held: VecDeque::new(), queued: 0, scratch: Vec::new() })
    }

    /// Tells the GPU what to hash.
    fn prepare(&mut self, spans: &[DeviceSpan]) -> Result<PreparedHash, DeviceError> {
        let uuid = self.gpu.uuid();
        spans.iter().try_for_each(|span| span.check_device(uuid))?;
        let plan = Plan::new(spans)?;
        if plan.chunks == 0 {
            return Ok(PreparedHash { stream: self.raw, plan, scratch: None, spans: Arc::default() });
        }
        let scratch = self.scratch_of(plan.device_bytes())?;
        self.put(&plan.arguments, &scratch)?;
        Ok(PreparedHash { stream: self.raw, plan, scratch: Some(scratch), spans: spans.into() })
    }

    /// Queues the hashing of what was prepared on this stream; a panic on any other.
    fn launch(&mut self, prepared: &PreparedHash) -> Result<(), DeviceError> {
        let (Some(scratch), plan) = (&prepared.scratch, &prepared.plan) else { return Ok(()) };
        assert_eq!(prepared.stream, self.raw, "what one stream was told is launched on that one");
        self.queued += 1;
        self.held.push_back((self.queued, Held::Devices(prepared.spans.clone())));
        self.held.push_back((self.queued, Held::Device(scratch.device.clone())));
        let context = &self.gpu.context;
        context.enter()?;
        let base = scratch.device.address();
        let (mut chunks, mut tiles) = (base, base + plan.tiles_at());
        let (mut values, mut digests) = (base + plan.values_at(), base + plan.digests_at());
        let mut one: u32 = 1;
        let (chunks, values, digests, one) =
            (argument(&mut chunks), argument(&mut values), argument(&mut digests), argument(&mut one));
        let mut all = [chunks, argument(&mut tiles), values, digests, one];
        // SAFETY: four addresses and a 32-bit number are what `hash_tiles` declares. The arguments' memory has the layout
        // that `Plan` and the kernel share, and it and the chunks' are held until this work is done.
        unsafe { launch(context, context.hash_tiles, plan.tiles, TILE_LEAVES, self.raw, &mut all)? };
        if plan.joins {
            let mut all = [chunks, values, digests, one];
            // SAFETY: as above, and `join_tiles` declares three addresses and a 32-bit number.
            unsafe { launch(context, context.join_tiles, plan.chunks, JOINERS, self.raw, &mut all)? };
        }
        Ok(())
    }

    /// Queues the way back of the digests of what was launched.
    fn collect(&mut self, prepared: PreparedHash) -> Result<GpuHashing, DeviceError> {
        if let Some(scratch) = &prepared.scratch {
            let plan = &prepared.plan;
            let digests = plan.digests_at()..plan.device_bytes();
            let place = scratch.host.slice(digests.clone())?;
            self.download(&scratch.device.slice(digests)?, &place)?;
        }
        Ok(GpuHashing { mark: self.mark()?, prepared })
    }

    /// Queues the way of arguments to the GPU.
    fn put(&mut self, arguments: &[u8], scratch: &Scratch) -> Result<(), DeviceError> {
        if arguments.len() > PUT_BYTES_MAX {
            let range = 0..arguments.len() as u64;
            scratch.host.span().write(0, arguments)?;
            return self.upload(&scratch.host.slice(range.clone())?, &scratch.device.slice(range)?);
        }
        let context = &self.gpu.context;
        context.enter()?;
        self.queued += 1;
        self.held.push_back((self.queued, Held::Device(scratch.device.clone())));
        let mut to = scratch.device.address();
        for part in arguments.chunks(PUT_BYTES) {
            let mut words = [0u8; PUT_BYTES];
            words[..part.len()].copy_from_slice(part);
            // Zeros after the last byte go where results will.
            let mut count = u32::try_from(part.len().div_ceil(16)).expect("at most 240");
            let mut all = [argument(&mut to), argument(&mut count), argument(&mut words)];
            // SAFETY: an address, a 32-bit number and 240 words of 16 bytes are what `put` declares; they are copied by this
            // call. What is written lies in the scratch memory, whose length is a power of two and so a multiple of 16
            // from the arguments' length on; it is held until this is done.
            unsafe { launch(context, context.put, 1, COPY_THREADS, self.raw, &mut all)? };
            to += PUT_BYTES as u64;
        }
        Ok(())
    }

    fn scratch_of(&mut self, len: u64) -> Result<Scratch, DeviceError> {
        if let Some(at) = self.scratch.iter().position(|scratch| scratch.device.len() >= len) {
            return Ok(self.scratch.swap_remove(at));
        }
        // Rounded up, so that the next batch finds it long enough.
        let len = len.max(SCRATCH_BYTES_MIN).next_power_of_two();
        let host = Mapping::anonymous(len)?.span();
        host.prefault();
        Ok(Scratch { device: self.gpu.allocate(len)?, host: self.gpu.register(&host)? })
    }

    /// Keeps both until the next work that is queued is done, and makes the GPU this thread's.
    fn copying(&mut self, device: &DeviceSpan, host: Held) -> Result<(), DeviceError> {
        device.check_device(self.gpu.uuid())?;
        self.queued += 1;
        self.held.push_back((self.queued, Held::Device(device.clone())));
        self.held.push_back((self.queued, host));
        self.gpu.context.enter()
    }

    fn release(&mut self, done: u64) {
        while self.held.front().is_some_and(|(queued, _)| *queued <= done) {
            if let Some((_, Held::Scratch(scratch))) = self.held.pop_front() {
                self.keep(scratch);
            }
        }
    }

    fn keep(&mut self, scratch: Scratch) {
        if self.scratch.len() < SCRATCH_KEPT_MAX {
            self.scratch.push(scratch);
        }
    }

    /// Copies by one kernel.
    fn copy_many(&mut self, pairs: &[(DeviceSpan, DeviceSpan)]) -> Result<(), DeviceError> {
        let (mut arguments, mut count) = (Vec::new(), 0u32);
        for (from, to) in pairs {
            let mut at = 0;
            while at < from.len() {
                let len = COPY_BYTES.min(from.len() - at);
                arguments.extend([from.address() + at, to.address() + at, len].map(u64::to_le_bytes).as_flattened());
                count += 1;
                at += len;
            }
        }
        if count == 0 {
            return Ok(());
        }
        let scratch = self.scratch_of(arguments.len() as u64)?;
        self.put(&arguments, &scratch)?;
        self.queued += 1;
        let mut address = scratch.device.address();
        self.held.push_back((self.queued, Held::Pairs(pairs.to_vec())));
        self.held.push_back((self.queued, Held::Scratch(scratch)));
        let context = &self.gpu.context;
        let mut all = [argument(&mut address)];
        // SAFETY: one address is what `copy_spans` declares, of as many copies as the grid is wide. They and the memory they
        // name are held until this work is done.
        unsafe { launch(context, context.copy_spans, count * COPY_SLICES, COPY_THREADS, self.raw, &mut all) }
    }

    /// Copies that the driver is told of at once.
    fn upload_batch(&mut self, pairs: &[(HostSpan, DeviceSpan)]) -> Result<(), DeviceError> {
        let (mut targets, mut sources, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
        for (from, to) in pairs {
            for range in pieces(from) {
                sources.push(from.span().as_ptr() as u64 + range.start);
                targets.push(to.address() + range.start);
                sizes.push(size(&range));
            }
        }
        if sizes.is_empty() {
            return Ok(());
        }
        self.queued += 1;
        self.held.push_back((self.queued, Held::Hosts(pairs.to_vec())));
        self.gpu.context.enter()?;
        // SAFETY: numbers and enumerations, of which zero is a value.
        let mut attributes: sys::CUmemcpyAttributes = unsafe { std::mem::zeroed() };
        attributes.srcAccessOrder = sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
        let (mut first, mut failed) = (0, 0);
        // SAFETY: the three lists are equally long, and read before the call returns; every range lies in a span that is
        // held until this is done.
        let code = unsafe {
            sys::cuMemcpyBatchAsync(
                targets.as_mut_ptr(),
                sources.as_mut_ptr(),
                sizes.as_mut_ptr(),
                sizes.len(),
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                self.raw,
            )
        };
        check(code, "cuMemcpyBatchAsync", || self.name())
    }

    fn name(&self) -> String {
        self.gpu.context.name.clone()
    }
}

impl Stream for GpuStream {
    type Mark = GpuMark;
    type Hashing = GpuHashing;

    fn upload(&mut self, from: &HostSpan, to: &DeviceSpan) -> Result<(), DeviceError> {
        same_length(from.len(), to.len())?;
        self.copying(to, Held::Host(from.clone()))?;
        let address = from.span().as_ptr() as u64;
        for range in pieces(from) {
            let (host, len) = ((address + range.start) as *const c_void, size(&range));
            // SAFETY: both ranges lie in spans, which are held until this is done. Others may write to the host's
            // meanwhile: what arrives is hashed.
            let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to.address() + range.start, host, len, self.raw) };
            check(code, "cuMemcpyHtoDAsync", || self.name())?;
        }
        Ok(())
    }

    fn upload_all(&mut self, pairs: &[(HostSpan, DeviceSpan)]) -> Result<(), DeviceError> {
        for (from, to) in pairs {
            same_length(from.len(), to.len())?;
            to.check_device(self.gpu.uuid())?;
        }
        match pairs {
            [_, _, ..] if self.gpu.context.version >= DRIVER_VERSION_BATCHES && all_registered(pairs) => {
                self.upload_batch(pairs)
            }
            _ => pairs.iter().try_for_each(|(from, to)| self.upload(from, to)),
        }
    }

    fn copy_all(&mut self, pairs: &[(DeviceSpan, DeviceSpan)]) -> Result<(), DeviceError> {
        for (from, to) in pairs {
            same_length(from.len(), to.len())?;
            from.check_device(self.gpu.uuid())?;
            to.check_device(self.gpu.uuid())?;
        }
        match pairs {
            [(from, to)] => self.copy(from, to),
            _ => self.copy_many(pairs),
        }
    }

    fn copy(&mut self, from: &DeviceSpan, to: &DeviceSpan) -> Result<(), DeviceError> {
        same_length(from.len(), to.len())?;
        from.check_device(self.gpu.uuid())?;
        self.copying(to, Held::Device(from.clone()))?;
        // SAFETY: both ranges lie in spans of this device, which are held until this is done.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), size(&(0..from.len())), self.raw) };
        check(code, "cuMemcpyDtoDAsync", || self.name())
    }

    fn copy_across(&mut self, from: &DeviceSpan, to: &DeviceSpan) -> Result<(), DeviceError> {
        same_length(from.len(), to.len())?;
        if from.is_empty() {
            return to.check_device(self.gpu.uuid());
        }
        if from.device() == self.gpu.uuid() {
            return self.copy(from, to);
        }
        let other = context_of(from)?.clone();
        self.gpu.context.reach(&other);
        self.copying(to, Held::Device(from.clone()))?;
        let (len, own) = (size(&(0..from.len())), self.gpu.context.raw());
        // SAFETY: each range lies in a span of the device whose context is given with it; both are held until this is
        // done, and with them the contexts. What is read may be written to meanwhile: what arrives is hashed.
        let code = unsafe { sys::cuMemcpyPeerAsync(to.address(), own, from.address(), other.raw(), len, self.raw) };
        check(code, "cuMemcpyPeerAsync", || format!("{} to {}", other.name, self.name()))
    }

    fn download(&mut self, from: &DeviceSpan, to: &HostSpan) -> Result<(), DeviceError> {
        same_length(from.len(), to.len())?;
        let address = to.span().as_mut_ptr().ok_or(DeviceError::NotMemory)? as u64;
        self.copying(from, Held::Host(to.clone()))?;
        for range in pieces(to) {
            let (host, len) = ((address + range.start) as *mut c_void, size(&range));
            // SAFETY: both ranges lie in spans, which are held until this is done, and the host's is writable. No
            // reference to a span's bytes is ever made.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(host, from.address() + range.start, len, self.raw) };
            check(code, "cuMemcpyDtoHAsync", || self.name())?;
        }
        Ok(())
    }

    fn hash(&mut self, spans: &[DeviceSpan]) -> Result<GpuHashing, DeviceError> {
        let prepared = self.prepare(spans)?;
        self.launch(&prepared)?;
        self.collect(prepared)
    }

    fn digests(&mut self, hashing: GpuHashing) -> Result<Vec<ChunkHash>, DeviceError> {
        self.wait(&hashing.mark)?;
        let GpuHashing { prepared: PreparedHash { plan, scratch, .. }, .. } = hashing;
        let Some(scratch) = scratch else { return Ok(Vec::new()) };
        let mut digests = vec![[0; DIGEST_BYTES]; plan.chunks as usize];
        scratch.host.span().read(plan.digests_at(), digests.as_flattened_mut())?;
        self.keep(scratch);
        Ok(digests.into_iter().map(|digest| ChunkHash(Hash(digest))).collect())
    }

    fn hash_seconds(&mut self, spans: &[DeviceSpan]) -> Result<f64, DeviceError> {
        let prepared = self.prepare(spans)?;
        let before = self.mark()?;
        self.launch(&prepared)?;
        let after = self.mark()?;
        self.wait(&after)?;
        if let Some(scratch) = prepared.scratch {
            self.keep(scratch);
        }
        after.seconds_since(&before)
    }

    fn mark(&mut self) -> Result<GpuMark, DeviceError> {
        self.gpu.context.enter()?;
        let event = Event::new(&self.gpu.context)?;
        // SAFETY: both are live and of one context.
        check(unsafe { sys::cuEventRecord(event.raw, self.raw) }, "cuEventRecord", || self.name())?;
        Ok(GpuMark { event: Arc::new(event), queued: self.queued })
    }

    fn after(&mut self, mark: &GpuMark) -> Result<(), DeviceError> {
        self.gpu.context.enter()?;
        // SAFETY: both are live.
        check(unsafe { sys::cuStreamWaitEvent(self.raw, mark.event.raw, 0) }, "cuStreamWaitEvent", || self.name())
    }

    fn wait(&mut self, mark: &GpuMark) -> Result<(), DeviceError> {
        self.gpu.context.enter()?;
        // SAFETY: the event is live.
        check(unsafe { sys::cuEventSynchronize(mark.event.raw) }, "cuEventSynchronize", || self.name())?;
        self.release(mark.queued);
        Ok(())
    }
}

impl Drop for GpuStream {
    fn drop(&mut self) {
        if let Err(error) = self.gpu.context.enter() {
            tracing::error!("a stream is left as it is: {error}");
        }
        // SAFETY: the stream is live, and ends here. What is held is dropped afterwards, when nothing uses it any more:
        // after an error of the device nothing runs either.
        let code = unsafe { sys::cuStreamSynchronize(self.raw) };
        if let Err(error) = check(code, "cuStreamSynchronize", || self.name()) {
            tracing::error!("work on the GPU failed: {error}");
        }
        // SAFETY: as above.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// As a launch takes it: the value behind it is copied.
fn argument<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

/// The device that a span lies on, as the driver knows it.
fn context_of(span: &DeviceSpan) -> Result<&Arc<Context>, DeviceError> {
    let owner = span.owner();
    let own = owner.downcast_ref::<Allocation>().map(|allocation| &allocation.context);
    let context = own.or_else(|| owner.downcast_ref::<Opened>().map(Opened::context));
    // A twin's is of no driver.
    context.ok_or_else(|| DeviceError::NoSuchGpu { device: span.device() })
}

fn same_length(from: u64, to: u64) -> Result<(), DeviceError> {
    if from == to { Ok(()) } else { Err(DeviceError::Lengths { from, to }) }
}

fn all_registered(pairs: &[(HostSpan, DeviceSpan)]) -> bool {
    pairs.iter().all(|(from, _)| from.is_registered())
}

/// No copy may cross from one registered piece to the next.
fn pieces(host: &HostSpan) -> Vec<std::ops::Range<u64>> {
    match host.registration() {
        Some(registration) => registration.pieces_of(host.span().as_ptr() as u64, host.len()).collect(),
        None => std::iter::once(0..host.len()).filter(|all| !all.is_empty()).collect(),
    }
}

fn size(range: &std::ops::Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("this is for machines of 64 bits")
}

macro_rules! plain_debug {
    ($($name:ident),*) => { $(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    )* };
}
plain_debug!(GpuStream, GpuMark, GpuHashing, PreparedHash);
