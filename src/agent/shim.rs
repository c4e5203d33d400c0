#![allow(dead_code)]
use aquifer_core::{ChannelName, NodeId, Time};
use std::time::Duration;
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters { pub grants: u64, pub leases_granted: u64, pub leases_revoked: u64, pub leases_expired: u64, pub chunks_refetched: u64 }
#[derive(Clone, Debug, Default)]
pub(crate) struct Forecast { pub hydrated: usize, pub ready: usize, pub hydrating: Vec<(NodeId, f64)>, pub spare_upload_bytes_per_s: u64 }
impl Forecast { pub fn seconds_for(&self, _k: u32) -> Option<f64> { None } }
#[derive(Clone, Debug, Default)]
pub(crate) struct Eta;
impl Eta { pub fn reach(&mut self, _: Time, _: u64, _: u64) {} pub fn left(&self) -> Option<Duration> { None } }
pub(crate) trait Soon { fn counters(&self) -> Counters { Counters::default() }  fn forecast(&self, _: &ChannelName) -> Forecast { Forecast::default() } fn spare_upload(&self) -> u64 { 0 } }
impl Soon for aquifer_proto::Recorded {}
