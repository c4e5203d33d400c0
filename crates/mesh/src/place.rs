//! Addresses as people and status records write them: `host:port` or a multiaddress over TCP.

use libp2p::multiaddr::{Multiaddr, PeerId, Protocol};
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use thiserror::Error;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) host: Host,
    pub(crate) port: u16,
    /// Who must answer there, if the address says so.
    pub(crate) peer: Option<PeerId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Ip(IpAddr),
    Name(String),
}

#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is not an address: expected host:port, /ip4/1.2.3.4/tcp/7000 or /dns/name/tcp/7000")]
pub struct AddressError(String);

impl Place {
    /// All the socket addresses the place has now; asks the system's resolver for names.
    pub(crate) async fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        match &self.host {
            Host::Ip(ip) => Ok(vec![SocketAddr::new(*ip, self.port)]),
            Host::Name(name) => {
                let found: BTreeSet<_> = tokio::net::lookup_host((name.as_str(), self.port)).await?.collect();
                Ok(found.into_iter().collect())
            }
        }
    }

    pub(crate) fn multiaddr(&self) -> Multiaddr {
        let host = match &self.host {
            Host::Ip(ip) => Multiaddr::from(*ip),
            Host::Name(name) => Multiaddr::empty().with(Protocol::Dns(name.as_str().into())),
        };
        host.with(Protocol::Tcp(self.port))
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "of the many protocols, these are the ones we speak")]
    fn from_multiaddr(address: &Multiaddr) -> Option<Place> {
        let mut parts = address.iter();
        let host = match parts.next()? {
            Protocol::Ip4(ip) => Host::Ip(ip.into()),
            Protocol::Ip6(ip) => Host::Ip(ip.into()),
            Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name) => Host::Name(name.into_owned()),
            _ => return None,
        };
        let Protocol::Tcp(port) = parts.next()? else { return None };
        let peer = match parts.next() {
            None => None,
            Some(Protocol::P2p(peer)) => Some(peer),
            Some(_) => return None,
        };
        parts.next().is_none().then_some(Place { host, port, peer })
    }

    fn from_host_and_port(text: &str) -> Option<Place> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Some(Place { host: Host::Ip(address.ip()), port: address.port(), peer: None });
        }
        let (name, port) = text.rsplit_once(':')?;
        let of_a_name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        let named = !name.is_empty() && name.len() <= 253 && name.bytes().all(of_a_name);
        named.then_some(Place { host: Host::Name(name.to_string()), port: port.parse().ok()?, peer: None })
    }
}

impl FromStr for Place {
    type Err = AddressError;
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let text = text.trim();
        let place = if text.starts_with('/') {
            text.parse().ok().as_ref().and_then(Place::from_multiaddr)
        } else {
            Place::from_host_and_port(text)
        };
        place.ok_or_else(|| AddressError(text.chars().take(256).collect()))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

pub(crate) fn multiaddr_of(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// The address itself, without who should answer there; None if it is not an IP address over TCP.
pub(crate) fn socket_addr_of(address: &Multiaddr) -> Option<SocketAddr> {
    let Place { host: Host::Ip(ip), port, .. } = Place::from_multiaddr(address)? else { return None };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_writing_mean_the_same() {
        for (short, long) in [
            ("10.0.0.1:7000", "/ip4/10.0.0.1/tcp/7000"),
            ("[::1]:7000", "/ip6/::1/tcp/7000"),
            ("mesh.svc:7000", "/dns/mesh.svc/tcp/7000"),
        ] {
            let place: Place = short.parse().unwrap();
            assert_eq!(Ok(&place), long.parse().as_ref());
            assert_eq!(place.multiaddr().to_string(), long);
            assert_eq!(place.to_string(), short);
        }
    }

    #[test]
    fn a_multiaddress_may_name_its_peer() {
        let peer = PeerId::random();
        let place: Place = format!("/ip4/10.0.0.1/tcp/7000/p2p/{peer}").parse().unwrap();
        assert_eq!(place.peer, Some(peer));
    }

    #[test]
    fn the_rest_is_refused() {
        for bad in ["", "host", ":7000", "host:", "host:99999", "a b:1", "::1:x", "/ip4/10.0.0.1", "/ip4/1.2.3.4/udp/1"]
        {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }
}
