//! Where we listen, and which of those addresses are worth telling others.

use crate::behaviour::Behaviour;
use crate::driver::places;
use crate::place::{Place, multiaddr_of, socket_addr_of};
use crate::{MeshError, limits::LOOKUP};
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Multiaddr;
use libp2p::swarm::Swarm;
use std::net::{IpAddr, SocketAddr, TcpListener};
use tokio::time::timeout;

#[derive(Debug)]
pub(crate) struct Listeners {
    open: Vec<Listener>,
    external: Vec<Place>,
    told: Vec<Multiaddr>,
}

#[derive(Debug)]
struct Listener {
    id: ListenerId,
    /// It listens on all interfaces, some of which lead nowhere.
    everywhere: bool,
}

impl Listeners {
    pub(crate) async fn open(
        swarm: &mut Swarm<Behaviour>,
        listen: &[String],
        external: &[String],
    ) -> Result<Self, MeshError> {
        let external = places("external", external)?;
        let mut addresses = Vec::new();
        for place in places("listen", listen)? {
            addresses.extend(resolve(&place).await?);
        }
        addresses.iter().try_for_each(|address| check_free(*address))?;
        let open = addresses.into_iter().map(|address| listen_on(swarm, address)).collect::<Result<_, _>>()?;
        Ok(Listeners { open, external, told: Vec::new() })
    }

    pub(crate) fn external(&self) -> impl Iterator<Item = String> {
        self.external.iter().map(|place| place.multiaddr().to_string())
    }

    /// The address to tell others, if it is for others.
    pub(crate) fn on_new(&mut self, id: ListenerId, address: &Multiaddr) -> Option<String> {
        let everywhere = self.open.iter().any(|listener| listener.id == id && listener.everywhere);
        let ip = socket_addr_of(address)?.ip();
        if (everywhere && !leads_somewhere(ip)) || self.told.contains(address) {
            return None;
        }
        self.told.push(address.clone());
        Some(address.to_string())
    }

    pub(crate) fn on_expired(&mut self, address: &Multiaddr) -> Option<String> {
        let index = self.told.iter().position(|told| told == address)?;
        Some(self.told.swap_remove(index).to_string())
    }

    pub(crate) fn close(&mut self, swarm: &mut Swarm<Behaviour>) {
        self.open.drain(..).for_each(|listener| {
            swarm.remove_listener(listener.id);
        });
    }
}

async fn resolve(place: &Place) -> Result<Vec<SocketAddr>, MeshError> {
    let failed = |reason: String| MeshError::Listen { address: place.to_string(), reason };
    let found = timeout(LOOKUP, place.resolve()).await.map_err(|_| failed("the name could not be looked up".into()))?;
    found.map_err(|error| failed(error.to_string()))
}

/// libp2p shares ports (SO_REUSEPORT), so a second agent on this one would take half of the first
/// one's connections instead of failing. The socket opened here does not share.
fn check_free(address: SocketAddr) -> Result<(), MeshError> {
    if address.port() == 0 {
        return Ok(());
    }
    let failed = |reason: String| MeshError::Listen { address: address.to_string(), reason };
    TcpListener::bind(address).map(drop).map_err(|error| failed(error.to_string()))
}

fn listen_on(swarm: &mut Swarm<Behaviour>, address: SocketAddr) -> Result<Listener, MeshError> {
    let failed = |reason: String| MeshError::Listen { address: address.to_string(), reason };
    let id = swarm.listen_on(multiaddr_of(address)).map_err(|error| failed(error.to_string()))?;
    Ok(Listener { id, everywhere: address.ip().is_unspecified() })
}

/// An IPv6 link-local address means something only together with an interface of the reader's.
fn leads_somewhere(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unspecified() && !ip.is_unicast_link_local(),
    }
}
