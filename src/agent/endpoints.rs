//! What a peer says of where its data plane listens, and where that is.

use aquifer_transport::{Encryption, Endpoint};
use std::net::{IpAddr, SocketAddr};

const TLS: &str = "tls:";
const RDMA: &str = "rdma:";

type Kind = fn(SocketAddr) -> Endpoint;

/// What this node says of its TCP endpoint: where others reach it, or `port` on whatever host they reach
/// it at.
pub(super) fn announced(advertised: Option<&str>, port: u16, encryption: Encryption) -> String {
    let address = advertised.map_or_else(|| format!(":{port}"), str::to_string);
    match encryption {
        Encryption::Off => address,
        Encryption::Tls => format!("{TLS}{address}"),
    }
}

/// The same of where it listens for what is said beside RDMA.
pub(super) fn announced_rdma(listening: SocketAddr) -> String {
    match listening.ip().is_unspecified() {
        true => format!("{RDMA}:{}", listening.port()),
        false => Endpoint::Rdma(listening).to_string(),
    }
}

/// Where `text` leads, if a peer that is to be found at `hosts` says it. Words of a later version say
/// nothing.
pub(super) fn of(text: &str, hosts: &[IpAddr]) -> Vec<Endpoint> {
    let kinds: [(&str, Kind); 3] = [(TLS, Endpoint::Tls), (RDMA, Endpoint::Rdma), ("", Endpoint::Tcp)];
    let said = kinds.into_iter().find_map(|(prefix, kind)| Some((kind, text.strip_prefix(prefix)?)));
    let Some((kind, rest)) = said else { return Vec::new() };
    match rest.strip_prefix(':').map(str::parse) {
        Some(Ok(port)) => hosts.iter().map(|host| kind(SocketAddr::new(*host, port))).collect(),
        Some(Err(_)) => Vec::new(),
        None => Endpoint::parse(text).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_announced_leads_back() {
        let hosts: Vec<IpAddr> = ["10.0.0.1", "::1"].map(|host| host.parse().unwrap()).into();
        let at = |host: IpAddr| SocketAddr::new(host, 7402);
        let plain = of(&announced(None, 7402, Encryption::Off), &hosts);
        assert_eq!(plain, [Endpoint::Tcp(at(hosts[0])), Endpoint::Tcp(at(hosts[1]))]);
        let encrypted = of(&announced(None, 7402, Encryption::Tls), &hosts);
        assert_eq!(encrypted, [Endpoint::Tls(at(hosts[0])), Endpoint::Tls(at(hosts[1]))]);
        let rdma = of(&announced_rdma("0.0.0.0:7402".parse().unwrap()), &hosts);
        assert_eq!(rdma, [Endpoint::Rdma(at(hosts[0])), Endpoint::Rdma(at(hosts[1]))]);
        let there = "192.0.2.7:1".parse().unwrap();
        assert_eq!(of(&announced_rdma(there), &hosts), [Endpoint::Rdma(there)]);
        assert_eq!(of(&announced(Some("192.0.2.7:1"), 9, Encryption::Off), &hosts), [Endpoint::Tcp(there)]);
        assert_eq!(of(&announced(Some("192.0.2.7:1"), 9, Encryption::Tls), &hosts), [Endpoint::Tls(there)]);
    }

    #[test]
    fn other_words_lead_nowhere() {
        for text in ["", ":", ":x", "tls:", "tls::", "tls::70000", "tls:x:1", "rdma:", "rdma::x", "quic:10.0.0.1:1"] {
            assert_eq!(of(text, &["10.0.0.1".parse().unwrap()]), [], "{text}");
        }
    }
}
