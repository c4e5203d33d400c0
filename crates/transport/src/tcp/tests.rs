//! What only TCP can get wrong. The rest is in [`crate::conformance`].

use super::*;
use crate::conformance::Node;
use std::net::Ipv4Addr;

fn node(config: TcpConfig, grants: Arc<dyn Grants>, completions: crate::conformance::OnCompletion) -> Node {
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let transport = TcpTransport::start(listen, grants, completions, config).unwrap();
    Node { endpoints: vec![transport.local_addr()], transport }
}

mod one_connection {
    use super::*;
    crate::conformance_tests!(|grants, completions| node(TcpConfig::default(), grants, completions));
}

mod four_connections {
    use super::*;
    crate::conformance_tests!(|grants, completions| {
        node(TcpConfig { connections_per_peer: 4, ..TcpConfig::default() }, grants, completions)
    });
}
