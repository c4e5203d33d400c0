//! Safe types above the binding: whatever exists here keeps alive what it was made from, and memory
//! stays mapped and registered for as long as a device may touch it.

mod completion;
mod device;
mod queue_pair;
mod region;

pub use completion::{Completion, CompletionQueue, WorkError};
pub use device::{Device, DeviceLimits, Gid, GidKind, LinkLayer, Port, device_names};
pub use queue_pair::{Address, QueuePair, QueuePairConfig};
#[cfg(feature = "device-tests")]
pub use region::REGISTERING_LASTS;
pub use region::{Access, ProtectionDomain, Region, RemoteRegion, Window};
