//! The protocol between an engine and its agent: what is said over the node's Unix socket.
//!
//! [`protocol`] holds the messages, [`server`] the half the agent uses, [`client`] the half an
//! engine written in Rust uses; `python/` has the same for Python, and `docs/engine-protocol.md`
//! is for anyone who writes a third. This crate moves messages and file descriptors. It does not
//! know what is in a manifest's chunks, maps no memory, and decides nothing about releases.
#![forbid(unsafe_code)]

pub mod client;
mod connection;
mod frame;
pub mod limits;
pub mod operator;
mod outbox;
pub mod protocol;
pub mod server;
pub mod table;

pub use client::{ClientError, EngineClient, Stopper, Switch, layout_for, request, request_drain, request_status};
pub use frame::FrameError;
pub use protocol::{
    BindingSpec, Conduct, DuringPause, ErrorReply, Event, Failure, Hello, ManifestReply, PROTOCOL_VERSION, Progress,
    Refusal, RegionSpec, ReleaseInfo, Request, RowSpec, Stage, Standing, TensorInfo, Welcome,
};
pub use server::{ConnId, EngineEvent, EngineServer, Engines, ServeError};
pub use table::{Kind, ManifestPage, TensorTable};
