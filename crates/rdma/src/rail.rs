//! One port of one device, with everything that reading and serving by it share.

use crate::config::RdmaConfig;
use crate::error::RdmaError;
use crate::limits::{DEPTH, PORTS_MAX};
use crate::regions::Regions;
use crate::topology::{SYSFS, device_node};
use crate::verbs::{
    Access, Address, CompletionQueue, Device, Gid, LinkLayer, Port, ProtectionDomain, QueuePair, QueuePairConfig,
    device_names,
};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// A usable port.
pub(crate) struct Rail {
    device: Arc<Device>,
    port: u8,
    gid_index: Option<u32>,
    config: QueuePairConfig,
    /// Whether others read through windows; if not, by the keys of staging memory.
    windows: bool,
    numa_node: Option<u32>,
    pub(crate) domain: Arc<ProtectionDomain>,
    pub(crate) regions: Regions,
}

/// A queue pair that is not connected yet, and how the other side reaches it.
#[derive(Debug)]
pub(crate) struct Unconnected {
    queue_pair: QueuePair,
    port: Port,
    gid: Gid,
    pub(crate) address: Address,
}

impl Rail {
    /// All ports that the configuration names and that can be used now. An error says why there are none.
    pub(crate) fn open_all(config: &RdmaConfig) -> Result<Vec<Arc<Rail>>, RdmaError> {
        let names = match &config.devices {
            Some(named) => named.clone(),
            None => device_names()?,
        };
        let mut rails = Vec::new();
        let mut trouble = RdmaError::NoDevice;
        for name in names {
            match Self::open_ports(&name, config) {
                Ok(ports) => rails.extend(ports),
                // What a person named must be there.
                Err(error) if config.devices.is_some() => return Err(error),
                Err(error) => trouble = error,
            }
        }
        rails.truncate(PORTS_MAX);
        if rails.is_empty() { Err(trouble) } else { Ok(rails) }
    }

    fn open_ports(name: &str, config: &RdmaConfig) -> Result<Vec<Arc<Rail>>, RdmaError> {
        let device = Device::open(name)?;
        let mut rails = Vec::new();
        let mut reason = String::from("it has none");
        for number in 1..=device.limits().ports {
            match usable(&device.port(number)?, config.gid_index) {
                Ok(_) => rails.push(Arc::new(Self::new(device.clone(), number, config)?)),
                Err(why) => reason = format!("port {number}: {why}"),
            }
        }
        match rails.is_empty() {
            true => Err(RdmaError::NoPort { device: name.into(), reason }),
            false => Ok(rails),
        }
    }

    fn new(device: Arc<Device>, port: u8, config: &RdmaConfig) -> Result<Self, RdmaError> {
        let domain = ProtectionDomain::new(&device)?;
        let regions = Regions::new(domain.clone(), config.region_bytes);
        let windows = config.windows && device.limits().windows;
        let numa_node = device_node(Path::new(SYSFS), device.name());
        let (gid_index, config) = (config.gid_index, config.queue_pair);
        Ok(Rail { device, port, gid_index, config, windows, numa_node, domain, regions })
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The port, the address it is reached by, and how chunks are shown, in words.
    pub(crate) fn describe(&self) -> String {
        let address = self.look().map_or_else(|error| error.to_string(), |(_, gid)| gid.to_string());
        let shown = if self.windows { "chunks shown in place" } else { "chunks shown from copies" };
        let node = self.numa_node.map_or(String::new(), |node| format!(", NUMA node {node}"));
        format!("{self}, {address}{node}, {shown}")
    }

    /// The NUMA node its device is attached to, where that is known.
    pub(crate) fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }

    pub(crate) fn has_windows(&self) -> bool {
        self.windows
    }

    /// What memory is registered for that reads land in. Where there are windows, one registration does
    /// for both, as it shows others nothing.
    pub(crate) fn landing_access(&self) -> Access {
        if self.windows { Access::Windows } else { Access::Land }
    }

    pub(crate) fn serving_access(&self) -> Access {
        if self.windows { Access::Windows } else { Access::Read }
    }

    /// How the port is now, and the address it is reached by: both may change while it is used.
    pub(crate) fn look(&self) -> Result<(Port, Gid), RdmaError> {
        let port = self.device.port(self.port)?;
        match usable(&port, self.gid_index) {
            Ok(gid) => Ok((port, gid)),
            Err(reason) => Err(RdmaError::NoPort {
                device: self.device.name().into(),
                reason: format!("port {}: {reason}", self.port),
            }),
        }
    }

    /// A queue pair for `depth` requests at a time.
    pub(crate) fn queue_pair(&self, completions: &Arc<CompletionQueue>, depth: u32) -> Result<Unconnected, RdmaError> {
        let (port, gid) = self.look()?;
        let queue_pair = QueuePair::new(&self.domain, completions, depth)?;
        let limits = self.device.limits();
        let address = Address {
            queue_pair: queue_pair.number(),
            sequence: rand::random::<u32>() & 0xff_ffff,
            gid: gid.raw,
            lid: port.lid,
            mtu_code: u8::try_from(port.mtu_code).unwrap_or(1),
            reads_in: limits.reads_in_max.max(1),
            reads_out: limits.reads_out_max.max(1).min(u8::try_from(DEPTH).unwrap_or(u8::MAX)),
        };
        Ok(Unconnected { queue_pair, port, gid, address })
    }

    pub(crate) fn connect(&self, made: Unconnected, remote: &Address) -> Result<QueuePair, RdmaError> {
        let Unconnected { queue_pair, port, gid, address } = made;
        queue_pair.connect(&port, &gid, &address, remote, self.config)?;
        Ok(queue_pair)
    }
}

impl fmt::Debug for Rail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.device.name(), self.port)
    }
}

impl fmt::Display for Rail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {}", self.device.name(), self.port)
    }
}

/// The rail to answer a reader by: that whose network is the reader's, as far as addresses tell.
pub(crate) fn nearest<'a>(rails: &'a [Arc<Rail>], reader: &[u8; 16]) -> Option<&'a Arc<Rail>> {
    let usable = rails.iter().filter_map(|rail| Some((rail, rail.look().ok()?.1)));
    usable.max_by_key(|(_, gid)| common_bits(&gid.raw, reader)).map(|(rail, _)| rail)
}

fn common_bits(a: &[u8; 16], b: &[u8; 16]) -> u32 {
    (u128::from_be_bytes(*a) ^ u128::from_be_bytes(*b)).leading_zeros()
}

/// The address to use a port by, or why it cannot be used.
pub(crate) fn usable(port: &Port, gid_index: Option<u32>) -> Result<Gid, String> {
    if !port.active {
        return Err("its link is down".into());
    }
    let gid = match gid_index {
        Some(index) => port.gid(index),
        None => port.best_gid(),
    };
    gid.copied().ok_or_else(|| match (gid_index, port.link) {
        (Some(index), _) => format!("it has no GID {index}"),
        (None, LinkLayer::Ethernet) => "it has no RoCE v2 address: give its network interface an IP address".into(),
        (None, LinkLayer::InfiniBand) => "it has no address: is a subnet manager running?".into(),
    })
}
