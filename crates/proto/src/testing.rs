//! What tests of several modules begin with.

use aquifer_core::{NodeId, Status};

/// A record that says nothing but whose it is: the first of `node`'s first life.
pub(crate) fn bare_status(node: NodeId) -> Status {
    Status {
        node,
        incarnation: 1,
        seq: 1,
        name: String::new(),
        addresses: vec![],
        data_endpoints: vec![],
        labels: vec![],
        channels: vec![],
        leases: 0,
        leases_max: 0,
        engines: 0,
        engines_ready: 0,
        interval_ms: 3000,
        leaving: false,
        draining: false,
        upload_bytes_per_s: 0,
        uploading_bytes_per_s: 0,
        download_bytes_per_s: 0,
        version: String::new(),
    }
}
