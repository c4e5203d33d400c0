//! Where a node's data plane can be reached, and the words status records say it in.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const SHM: &str = "shm:";
const TLS: &str = "tls:";
const RDMA: &str = "rdma:";

/// One way to a holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Tcp(SocketAddr),
    /// TCP, and nothing but TLS over it.
    Tls(SocketAddr),
    /// A Unix socket on this very machine.
    Shm(PathBuf),
    /// Where a node with RDMA devices listens for what is said beside them.
    Rdma(SocketAddr),
}

impl Endpoint {
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Endpoint::Tcp(address) | Endpoint::Tls(address) => Some(*address),
            Endpoint::Shm(_) | Endpoint::Rdma(_) => None,
        }
    }

    pub fn shm(&self) -> Option<&Path> {
        match self {
            Endpoint::Tcp(_) | Endpoint::Tls(_) | Endpoint::Rdma(_) => None,
            Endpoint::Shm(path) => Some(path),
        }
    }

    pub fn rdma(&self) -> Option<SocketAddr> {
        match self {
            Endpoint::Tcp(_) | Endpoint::Tls(_) | Endpoint::Shm(_) => None,
            Endpoint::Rdma(address) => Some(*address),
        }
    }

    /// What a peer says, `ip:port`, `tls:ip:port`, `rdma:ip:port` or `shm:MACHINE:PATH`. `None` where it says
    /// nothing that leads anywhere from here, as the socket of another machine.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(address) = text.strip_prefix(TLS) {
            return address.parse().ok().map(Endpoint::Tls);
        }
        if let Some(address) = text.strip_prefix(RDMA) {
            return address.parse().ok().map(Endpoint::Rdma);
        }
        let Some(rest) = text.strip_prefix(SHM) else { return text.parse().ok().map(Endpoint::Tcp) };
        let (machine, path) = rest.split_once(':')?;
        let path = Path::new(path);
        let here = Some(machine) == this_machine() && path.is_absolute();
        here.then(|| Endpoint::Shm(path.to_path_buf()))
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Endpoint::Tcp(address)
    }
}

/// As [`Endpoint::parse`] reads it.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(address) => address.fmt(f),
            Endpoint::Tls(address) => write!(f, "{TLS}{address}"),
            Endpoint::Rdma(address) => write!(f, "{RDMA}{address}"),
            Endpoint::Shm(path) => write!(f, "{SHM}{}:{}", this_machine().unwrap_or("-"), path.display()),
        }
    }
}

/// One kernel, from its start to its end: all containers on a machine have it in common, and no two
/// machines. It only spares attempts; what proves a peer is the handshake.
fn this_machine() -> Option<&'static str> {
    static BOOT: OnceLock<Option<String>> = OnceLock::new();
    let read = || fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|text| text.trim().to_string());
    BOOT.get_or_init(read).as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_survives_its_words() {
        let here = Endpoint::Shm("/run/aquifer/0.sock".into());
        assert_eq!(Endpoint::parse(&here.to_string()), Some(here));
        let address = "10.0.0.1:7402".parse().unwrap();
        for there in [Endpoint::Tcp(address), Endpoint::Tls(address), Endpoint::Rdma(address)] {
            assert_eq!(Endpoint::parse(&there.to_string()), Some(there));
        }
    }

    #[test]
    fn what_leads_nowhere_from_here_is_left_out() {
        let machine = this_machine().unwrap();
        for text in [
            "",
            ":7402",
            "shm:",
            "rdma:",
            "rdma::7402",
            "shm:elsewhere:/proc",
            "shm::/proc",
            &format!("shm:{machine}:proc"),
            &format!("shm:{machine}"),
        ] {
            assert_eq!(Endpoint::parse(text), None, "{text}");
        }
    }
}
