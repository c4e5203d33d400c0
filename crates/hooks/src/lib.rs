//! Events delivered to commands and webhooks: in order for each hook, at least once, and never
//! at the cost of whoever sends them.
//!
//! [`Hooks::send`] puts an event into the bounded outbox of each hook that wants its kind; it waits
//! for no receiver and no disk. Each hook has a thread that carries its events away one by one, the
//! oldest first, and tries each until it is taken; with a spool, a second thread writes down what is
//! pending, so that a process that was killed delivers it when it runs again.
//!
//! Nothing here knows what an event means: it has an id, a kind and a body.

#![forbid(unsafe_code)]

pub mod limits;

mod carrier;
mod command;
mod desk;
mod error;
mod event;
mod hook;
mod hooks;
mod outbox;
mod scribe;
mod secret;
mod spool;
mod text;
mod webhook;

#[cfg(test)]
mod model;

pub use error::{HookError, StartError};
pub use event::Event;
pub use hook::{Hook, Kinds};
pub use hooks::{HookStats, Hooks};
pub use limits::Limits;
pub use secret::Secret;
