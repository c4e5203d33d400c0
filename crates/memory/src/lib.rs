//! Where bytes lie: regions that engines registered, chunk stores in memory and on disk, files
//! to serve from and to rebuild; and the reading, writing and hashing of them.
//!
//! Nothing here knows a peer, a socket or a release. All bounds are checked on every access, so
//! that the crates above need no `unsafe` to move a byte.

pub mod allocator;
pub mod checkpoint;
pub mod disk;
pub mod error;
pub mod generate;
pub mod limits;
pub mod mapping;
pub mod reservation;
pub mod shared;
pub mod span;
pub mod staging;
pub mod store;
pub mod tree;

mod at;
mod copy;
mod huge;
mod seal;
mod slabs;

pub use checkpoint::{PublishError, Published, Source, SourceFile};
pub use disk::DiskStore;
pub use error::{MemoryError, StoreError};
pub use generate::{Modified, generate_checkpoint, modify_checkpoint};
pub use mapping::Mapping;
pub use reservation::Reservation;
pub use shared::{Known, Shared};
pub use span::{Guard, Span};
pub use staging::StagingPool;
pub use store::MemoryStore;
pub use tree::FileTree;
