//! What can go wrong between this machine and its GPUs, and what the user can do about it.

use crate::region::HandleError;
use crate::uuid::DeviceUuid;
use aquifer_memory::MemoryError;
use std::io;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum DeviceError {
    #[error("no NVIDIA driver is here (libcuda.so.1 cannot be loaded); install one to use GPUs")]
    NoDriver,
    #[error("the NVIDIA driver is of CUDA {found}, and {needed} is needed: install driver 525 or newer")]
    OldDriver { found: String, needed: String },
    #[error("no GPU {wanted} is visible to this process (CUDA_VISIBLE_DEVICES?); there are: {found}")]
    NotFound { wanted: DeviceUuid, found: String },
    #[error("no GPU is visible to this process (CUDA_VISIBLE_DEVICES?)")]
    NoGpu,
    #[error("{call} for {what}: {code} ({text})")]
    Call { call: &'static str, what: String, code: String, text: String },
    #[error(
        "{needed} bytes of GPU memory are not to be had on {device}: {free} of {total} are free; leave the engine less, or land in host memory"
    )]
    OutOfMemory { needed: u64, device: String, free: u64, total: u64 },
    #[error("bytes {begin}..{end} do not lie in a span of {len}")]
    Bounds { begin: u64, end: u64, len: u64 },
    #[error("{from} bytes were to be copied to a place of {to}")]
    Lengths { from: u64, to: u64 },
    #[error("memory of {found} was given to {wanted}")]
    OtherDevice { wanted: DeviceUuid, found: DeviceUuid },
    #[error("memory of {device} was to be copied to a GPU, and no GPU of the driver's has it")]
    NoSuchGpu { device: DeviceUuid },
    #[error("{len} bytes are more than the GPU hashes in one launch ({max})")]
    TooLong { len: u64, max: u64 },
    #[error("only memory can be registered for copies, and this is a file or cannot be written to; copy it to memory")]
    NotMemory,
    #[error("a copy of host memory: {0}")]
    Host(#[from] io::Error),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Handle(#[from] HandleError),
}
