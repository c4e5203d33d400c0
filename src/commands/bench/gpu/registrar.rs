//! Host memory made ready to be copied to a GPU: fresh each time, in a process that has no other.

use super::super::cores::Took;
use super::super::part::Part;
use super::chosen::Chosen;
use anyhow::{Context, Result};
use aquifer_cuda::{Device, Gpu, HostSpan, Twin};
use aquifer_memory::{Mapping, Span};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Instant;

#[derive(Debug)]
pub(in super::super) struct Registrar {
    device: Box<dyn Registers>,
    bytes: u64,
    /// Memory that was touched, and is to be registered.
    touched: Option<Span>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) struct Setup {
    pub(super) device: Chosen,
    pub(super) bytes: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(in super::super) enum Task {
    /// Makes all pages of fresh shared memory present, as a chunk store has them.
    Touch,
    /// Registers what was touched. Then it is given back.
    Register,
}

trait Registers: fmt::Debug {
    fn register(&self, span: &Span) -> Result<HostSpan>;
}

impl<D: Device> Registers for D {
    fn register(&self, span: &Span) -> Result<HostSpan> {
        Ok(Device::register(self, span)?)
    }
}

impl Part for Registrar {
    const NAME: &'static str = "gpu-registrar";
    type Setup = Setup;
    type Ready = ();
    type Task = Task;
    type Reply = Took;

    fn set_up(setup: Setup) -> Result<(Self, ())> {
        let uuid = setup.device.uuid()?;
        let device: Box<dyn Registers> = match setup.device.is_twin {
            true => Box::new(Twin::new(uuid)),
            false => Box::new(Gpu::open(uuid)?),
        };
        Ok((Registrar { device, bytes: setup.bytes, touched: None }, ()))
    }

    fn work(&mut self, task: Task) -> Result<Took> {
        match task {
            Task::Touch => {
                let span = Mapping::memfd("aquifer-bench-gpu", self.bytes)?.0.span();
                let start = Instant::now();
                span.prefault();
                let took = Took::since(start, self.bytes);
                self.touched = Some(span);
                Ok(took)
            }
            Task::Register => {
                let span = self.touched.take().context("nothing was touched that could be registered")?;
                let start = Instant::now();
                let registered = self.device.register(&span)?;
                let took = Took::since(start, self.bytes);
                drop(registered);
                Ok(took)
            }
        }
    }
}
