//! How a holder's connections share a link: by the system's congestion control, or another.
//!
//! A reader has chunks under way from a dozen holders, each sending it one or two at a time. BBR
//! (its first version, the one in Linux) takes little notice of losses, and so many short flows of
//! it overfill a shallow queue: over links of 25 Mbit/s 7 % of all bytes were sent again, 2.5 % with
//! Reno, and the swarm was 4 % slower (docs/measured/links.md). So where BBR is the system's choice
//! one that heeds losses is preferred.

use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};
use std::io;
use std::net::TcpListener;
use tracing::debug;

/// Heedless of losses.
const AVOIDED: &str = "bbr";
/// Taken instead, the first that the system has and allows.
const PREFERRED: [&str; 2] = ["cubic", "reno"];

/// Sets what the connections that `listener` accepts use: `wanted`, which must then be there, or
/// what suits a swarm.
pub(super) fn choose(listener: &TcpListener, wanted: Option<&str>) -> io::Result<()> {
    if let Some(wanted) = wanted {
        return set_tcp_congestion(listener, wanted).map_err(|error| {
            let hint = "see /proc/sys/net/ipv4/tcp_allowed_congestion_control";
            io::Error::new(error.kind(), format!("TCP congestion control '{wanted}' cannot be used: {error}; {hint}"))
        });
    }
    let default = tcp_congestion(listener)?;
    if default != AVOIDED {
        return Ok(());
    }
    match PREFERRED.into_iter().find(|name| set_tcp_congestion(listener, name).is_ok()) {
        Some(instead) => debug!("chunks are sent by {instead}, not by the system's {default}"),
        None => debug!("chunks are sent by {default}: the system allows nothing else"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    fn accepted(wanted: Option<&str>) -> io::Result<String> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        choose(&listener, wanted)?;
        let _reader = TcpStream::connect(listener.local_addr()?)?;
        Ok(tcp_congestion(&listener.accept()?.0)?)
    }

    #[test]
    fn accepted_connections_send_as_chosen() {
        // Every Linux has Reno, and allows it to everybody.
        assert_eq!(accepted(Some("reno")).unwrap(), "reno");
        assert_ne!(accepted(None).unwrap(), AVOIDED);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = accepted(Some("no-such")).unwrap_err().to_string();
        assert!(error.contains("'no-such' cannot be used") && error.contains("tcp_allowed"), "{error}");
    }
}
