//! GPU memory: where chunks land, are hashed and are served from.
//!
//! What the program does with a GPU is written against the traits of [`device`]. [`Gpu`] implements them with CUDA,
//! loaded at run time; [`Twin`] with host memory, so that a machine without a GPU runs the same code above them.
//! Nothing here knows a peer, a manifest or a release.

pub mod apply;
pub mod device;
pub mod error;
pub mod landing;
pub mod limits;
pub mod region;
pub mod worker;

mod driver;
mod gpu;
mod hashing;
mod registered;
mod survey;
mod twin;
mod uuid;

pub use device::{Device, DeviceSpan, HostSpan, Stream};
pub use error::DeviceError;
pub use gpu::{Gpu, GpuHashing, GpuMark, GpuStream};
pub use region::{HandleError, RegionHandle};
pub use survey::{GpuSurvey, Survey, survey};
pub use twin::{Twin, TwinHashing, TwinMark, TwinStream};
pub use uuid::{DeviceUuid, UuidParseError};
pub use worker::{DeviceWorker, Goes, worker};
