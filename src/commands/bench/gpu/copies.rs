//! Plain copies, one of all bytes at a time: what PCIe and a GPU's memory can do.

use super::super::content;
use super::super::cores::Took;
use super::super::part::Part;
use super::chosen::{self, Chosen};
use anyhow::Result;
use aquifer_cuda::{Device, DeviceError, DeviceSpan, Gpu, HostSpan, Stream, Twin};
use aquifer_memory::Mapping;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Instant;

#[derive(Debug)]
pub(in super::super) struct Copies(Box<dyn Copier>);

#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) struct Setup {
    pub(in super::super) device: Chosen,
    /// Less where the GPU has less free.
    pub(in super::super) bytes: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(in super::super) enum Task {
    /// From registered host memory to the GPU.
    In,
    /// And back.
    Out,
    /// From one place on the GPU to another.
    Within,
}

impl Part for Copies {
    const NAME: &'static str = "gpu-copies";
    type Setup = Setup;
    /// The GPU's name.
    type Ready = String;
    type Task = Task;
    type Reply = Took;

    fn set_up(setup: Setup) -> Result<(Self, String)> {
        let uuid = setup.device.uuid()?;
        if setup.device.is_twin {
            return Ok((Copies(Box::new(Memory::new(&Twin::new(uuid), setup.bytes)?)), format!("twin {uuid}")));
        }
        let gpu = Gpu::open(uuid)?;
        let bytes = setup.bytes.min(chosen::room(gpu.memory()?.0));
        Ok((Copies(Box::new(Memory::new(&gpu, bytes)?)), format!("{} {uuid}", gpu.name())))
    }

    fn work(&mut self, task: Task) -> Result<Took> {
        self.0.copy(task)
    }
}

trait Copier: fmt::Debug {
    fn copy(&mut self, task: Task) -> Result<Took>;
}

/// The same bytes in host memory, where an engine would read them, and beside that.
#[derive(Debug)]
pub(super) struct Memory<D: Device> {
    pub(super) stream: D::Stream,
    pub(super) host: HostSpan,
    pub(super) region: DeviceSpan,
    pub(super) shadow: DeviceSpan,
}

impl<D: Device> Memory<D> {
    pub(super) fn new(device: &D, bytes: u64) -> Result<Self> {
        let span = Mapping::memfd("aquifer-bench-gpu", bytes)?.0.span();
        span.prefault();
        content::fill_on_all_cores(&span)?;
        let (region, shadow) = (device.allocate(bytes)?, device.allocate(bytes)?);
        let mut memory = Memory::<D> { stream: device.stream()?, host: device.register(&span)?, region, shadow };
        memory.stream.upload(&memory.host, &memory.shadow)?;
        memory.stream.upload(&memory.host, &memory.region)?;
        finish(&mut memory.stream)?;
        Ok(memory)
    }

    /// The first `bytes` bytes.
    pub(super) fn plain(&mut self, task: Task, bytes: u64) -> Result<Took, DeviceError> {
        let (host, region, shadow) =
            (self.host.slice(0..bytes)?, self.region.slice(0..bytes)?, self.shadow.slice(0..bytes)?);
        let start = Instant::now();
        match task {
            Task::In => self.stream.upload(&host, &region)?,
            // What comes back is what was there: nothing but this writes to the shadow.
            Task::Out => self.stream.download(&shadow, &host)?,
            Task::Within => self.stream.copy(&shadow, &region)?,
        }
        finish(&mut self.stream)?;
        Ok(Took::since(start, bytes))
    }
}

impl<D: Device> Copier for Memory<D> {
    fn copy(&mut self, task: Task) -> Result<Took> {
        let bytes = self.host.len();
        Ok(self.plain(task, bytes)?)
    }
}

/// Waits for all that was queued.
pub(super) fn finish<S: Stream>(stream: &mut S) -> Result<(), DeviceError> {
    let all = stream.mark()?;
    stream.wait(&all)
}
