//! Thousands of nodes in one process, in virtual time, on a modelled network.
//!
//! A scenario (TOML) expands to nodes with their faults; the network moves bytes between them; the
//! world drives the agent's own decisions over it, and the baselines other people's strategies.
//! Each run ends in an [`outcome::Outcome`], and the report shows those. A seed repeats a run.
#![forbid(unsafe_code)]

pub mod baselines;
pub mod chaos;
pub mod network;
pub mod outcome;
pub mod replay;
pub mod report;
pub mod scenario;
mod spread;
mod svg;
mod wheel;
pub mod world;

#[cfg(test)]
mod tests;
