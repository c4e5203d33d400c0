//! The suite that every transport passes, on a real device.

use aquifer_core::NodeSecret;
use aquifer_rdma::{RdmaConfig, RdmaTransport};
use aquifer_transport::conformance::{Node, OnCompletion};
use aquifer_transport::{Endpoint, Grants};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

fn start(grants: Arc<dyn Grants>, completions: OnCompletion, config: RdmaConfig) -> Node {
    // What a device says of a failure is seen nowhere else.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let transport = RdmaTransport::start(listen, grants, completions, config).expect("an RDMA device is here");
    let endpoints = vec![Endpoint::Rdma(transport.local_addr())];
    Node { transport, endpoints }
}

mod by_windows {
    use super::*;

    fn node(_: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
        start(grants, completions, RdmaConfig::default())
    }

    aquifer_transport::conformance_tests!(node);
}

/// As on devices without memory windows, and with chunks in many pieces.
mod by_copies {
    use super::*;

    fn node(_: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
        start(grants, completions, RdmaConfig { windows: false, piece_bytes: 100_000, ..RdmaConfig::default() })
    }

    aquifer_transport::conformance_tests!(node);
}
