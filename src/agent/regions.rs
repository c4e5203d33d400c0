//! Engines' memory: of the host or of a GPU.

use anyhow::{Context, Result, bail};
use aquifer_cuda::{DeviceError, DeviceSpan, DeviceUuid, DeviceWorker, Gpu, RegionHandle, Twin, worker};
use aquifer_engine::protocol::{GpuMemory, RegionSpec};
use aquifer_memory::{Mapping, Span};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// By the numbers that an engine gave them.
pub(super) type Regions = BTreeMap<u32, Region>;

#[derive(Clone, Debug)]
pub(super) enum Region {
    Host(Span),
    Gpu(DeviceSpan, Arc<dyn DeviceWorker>),
}

impl Region {
    pub(super) fn len(&self) -> u64 {
        match self {
            Region::Host(span) => span.len(),
            Region::Gpu(span, _) => span.len(),
        }
    }

    /// Its memory, where this process can touch it.
    pub(super) fn host(&self) -> Option<&Span> {
        match self {
            Region::Host(span) => Some(span),
            Region::Gpu(..) => None,
        }
    }

    /// Who works where it lies, if that is a GPU.
    pub(super) fn worker(&self) -> Option<&Arc<dyn DeviceWorker>> {
        match self {
            Region::Host(_) => None,
            Region::Gpu(_, worker) => Some(worker),
        }
    }

    /// A range of a GPU's, and who works there.
    pub(super) fn gpu(&self, range: Range<u64>) -> Option<(DeviceSpan, &Arc<dyn DeviceWorker>)> {
        match self {
            Region::Host(_) => None,
            Region::Gpu(span, worker) => span.slice(range).ok().map(|span| (span, worker)),
        }
    }

    /// Copies bytes out, from byte `at` on.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        match self {
            Region::Host(span) => span.read(at, into),
            Region::Gpu(span, worker) => {
                let part = span.slice(at..at.saturating_add(into.len() as u64)).map_err(io::Error::other)?;
                worker.read(&part, into).map_err(io::Error::other)
            }
        }
    }

    /// Feeds `len` bytes from byte `at` on to `hasher`.
    pub(super) fn hash_into(&self, at: u64, len: u64, hasher: &mut blake3::Hasher) -> io::Result<()> {
        match self {
            Region::Host(span) => span.hash_into(at, len, hasher),
            Region::Gpu(..) => {
                let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
                self.read(at, &mut bytes)?;
                hasher.update(&bytes);
                Ok(())
            }
        }
    }
}

/// The GPUs that engines have named so far. Cheap to clone; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Gpus {
    workers: Arc<Mutex<BTreeMap<DeviceUuid, Arc<dyn DeviceWorker>>>>,
    /// The names of GPUs that are made of host memory, to try what is done with GPUs where there are none.
    twins: Vec<DeviceUuid>,
    /// What can be had of their memory at a time.
    twin_bytes: u64,
    twin_bytes_per_s: u64,
}

impl Gpus {
    pub(super) fn new(twins: Vec<DeviceUuid>, twin_bytes: u64, twin_bytes_per_s: u64) -> Self {
        Gpus { twins, twin_bytes, twin_bytes_per_s, ..Gpus::default() }
    }

    /// The region that an engine tells of. Of a GPU that was not used before this takes some tenths of a second.
    pub(super) fn region(&self, spec: &RegionSpec, fd: Option<OwnedFd>) -> Result<Region> {
        let Some(memory) = &spec.gpu else {
            let fd = fd.context("it came without its memfd")?;
            return Ok(Region::Host(Mapping::from_memfd(fd, spec.bytes)?.span()));
        };
        let device: DeviceUuid = memory.device.parse()?;
        let worker = self.worker(device)?;
        match (fd, self.twins.contains(&device)) {
            (Some(fd), true) => {
                let host = Mapping::from_memfd(fd, spec.bytes)?.span();
                Ok(Region::Gpu(Twin::of_host(device, host), worker))
            }
            (None, false) => {
                let span = worker.open(&handle(device, memory, spec.bytes)?)?;
                Ok(Region::Gpu(span, worker))
            }
            (Some(_), false) => bail!("GPU memory came with a descriptor: it is named by its IPC handle"),
            (None, true) => bail!("memory of a GPU that is a twin is a memfd, and none came"),
        }
    }

    fn worker(&self, device: DeviceUuid) -> Result<Arc<dyn DeviceWorker>, DeviceError> {
        // Kept while a device is opened: two engines of one GPU are not to open it twice.
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = workers.get(&device) {
            return Ok(known.clone());
        }
        let opened = match self.twins.contains(&device) {
            true => {
                let twin = Twin::new(device).with_little_memory(self.twin_bytes);
                worker(twin.with_slow_uploads(self.twin_bytes_per_s))
            }
            false => {
                let gpu = Gpu::open(device)?;
                tracing::info!("{device} is a {}", gpu.name());
                worker(gpu)
            }
        };
        workers.insert(device, opened.clone());
        Ok(opened)
    }
}

fn handle(device: DeviceUuid, memory: &GpuMemory, bytes: u64) -> Result<RegionHandle> {
    let handle = hex::decode(&memory.handle).context("its handle is not hexadecimal")?;
    Ok(RegionHandle::parse(device, &handle, memory.offset, bytes)?)
}
