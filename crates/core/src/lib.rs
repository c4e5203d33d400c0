//! The words of Aquifer as values: hashes, chunks, manifests, releases, status records,
//! bindings, and the messages that carry them.
//!
//! Nothing here reads a file, a clock or a socket, starts a thread or draws a random number.
//! Every value that can be decoded has been validated: a `Manifest` that exists is one whose
//! lengths add up and whose paths stay inside their directory.
#![forbid(unsafe_code)]

pub mod binding;
pub mod blueprint;
mod checked;
pub mod chunkset;
pub mod codec;
pub mod cut;
pub mod dtype;
pub mod hash;
pub mod id;
pub mod layout;
pub mod limits;
pub mod manifest;
pub mod message;
pub mod policy;
pub mod release;
pub mod report;
pub mod row;
pub mod safetensors;
pub mod statement;
pub mod status;
pub mod text;
pub mod time;
pub mod times;

pub use binding::{Binding, BindingError, CheckedBinding, Run};
pub use chunkset::ChunkSet;
pub use dtype::Dtype;
pub use hash::{ChunkHash, Hash, ManifestHash};
pub use id::{ChannelName, NodeId, NodeSecret, PublisherKey, PublisherSecret};
pub use layout::{Extent, Layout};
pub use manifest::{Chunk, Content, FileEntry, Manifest, ManifestError, Packed, Part, TensorEntry};
pub use message::{Access, GossipMessage, PeerMessage};
pub use policy::{How, OnFailure, Policy, Selector};
pub use release::{Release, ReleaseId, SignedRelease};
pub use report::{Phase, Report, Step};
pub use row::Row;
pub use statement::{SignedStatement, Statement, Word};
pub use status::{ChannelStatus, SignedStatus, Status};
pub use time::Time;
pub use times::Times;
