//! What one node decides: whom to believe, whom to ask, whom to serve.
//!
//! A [`Node`] is a machine with three doors: [`Node::handle`] takes one input and the time,
//! [`Node::poll_output`] is drained to `None` after each, and [`Node::poll_timeout`] says when to
//! call [`Node::handle_timeout`] next, and why. It opens no file or socket, reads no clock and
//! draws randomness from the seed it was given, so the agent and a simulator drive the same code.
#![forbid(unsafe_code)]

pub mod engine;
pub mod forecast;
mod io;
pub mod limits;
mod manifests;
mod members;
mod node;
pub mod plan;
pub mod record;
mod releases;
pub mod rollout;
mod swarm;
#[cfg(test)]
mod testing;
mod trust;

pub use engine::{Asked, EngineInput, EngineOutput, EngineSession, Target, Tell};
pub use io::{Input, LocalStatus, Notice, OpId, Output, Rates, ReadOutcome, Verdict};
pub use members::Member;
pub use node::{Availability, Config, Counters, DrainProgress, Node, SwarmProgress};
pub use plan::Plan;
pub use record::Recorded;
pub use releases::{Rejection, RejectionCounts};
pub use swarm::CostlyLimit;
