//! The transport over RDMA verbs: a reader READs granted chunks straight out of the holder's memory.
//!
//! libibverbs is loaded when it is needed (`ibv` is the part of its ABI that is used), so the same
//! program runs where there is none. [`verbs`] makes it safe; [`RdmaTransport`] is a
//! [`aquifer_transport::Transport`] on top. What a manifest, a swarm or a release is, nothing here knows.
//!
//! Beside each pair of queue pairs there is a small TCP connection, opened as every data connection is,
//! over which a reader says what it wants to read and the holder where it lies (`wire`). The holder's
//! threads answer that; the bytes themselves pass them by.

pub mod limits;
pub mod verbs;

mod config;
mod error;
mod holder;
mod ibv;
mod rail;
mod reader;
mod regions;
mod serving;
mod survey;
mod topology;
mod transport;
mod wire;
mod workers;

pub use config::{RdmaConfig, RdmaStats};
pub use error::RdmaError;
pub use survey::{DeviceSurvey, Found, PortSurvey, Survey, survey};
pub use transport::RdmaTransport;
