//! What a machine offers, for people: nothing is kept open, and nothing here decides.

use crate::config::RdmaConfig;
use crate::error::RdmaError;
use crate::rail::usable;
use crate::topology::{SYSFS, Topology, device_node, line};
use crate::verbs::{Device, DeviceLimits, Gid, Port, device_names};
use rustix::process::{Resource, getrlimit};
use std::fs;
use std::path::{Path, PathBuf};

/// A machine's RDMA devices. An error says why none can even be looked for.
#[derive(Debug)]
pub struct Survey {
    pub devices: Result<Vec<DeviceSurvey>, RdmaError>,
    /// Bytes this process may lock, and so register; `None` where there is no limit.
    pub memory_lock_bytes: Option<u64>,
}

#[derive(Debug)]
pub struct DeviceSurvey {
    pub name: String,
    /// An error says why it cannot be opened.
    pub found: Result<Found, RdmaError>,
    pub numa_node: Option<u32>,
}

#[derive(Debug)]
pub struct Found {
    pub limits: DeviceLimits,
    pub ports: Vec<PortSurvey>,
}

#[derive(Debug)]
pub struct PortSurvey {
    pub port: Port,
    /// As the kernel says it, such as `200 Gb/sec (4X HDR)`; empty where it does not.
    pub rate: String,
    pub interface: String,
    /// The address it would be used by, or why it cannot be used.
    pub choice: Result<Gid, String>,
}

impl Survey {
    /// Every port that can be used.
    pub fn usable(&self) -> Vec<(&DeviceSurvey, &PortSurvey)> {
        let devices = self.devices.iter().flatten();
        let ports = devices.flat_map(|d| d.found.iter().flat_map(move |found| found.ports.iter().map(move |p| (d, p))));
        ports.filter(|(_, port)| port.choice.is_ok()).collect()
    }

    /// Those of them that no other is nearer than to a NUMA node; none where the kernel does not tell them apart.
    pub fn nearest(&self, node: u32) -> Vec<(&DeviceSurvey, &PortSurvey)> {
        let (usable, topology) = (self.usable(), Topology::read(Path::new(SYSFS)));
        let nodes: Vec<_> = usable.iter().map(|(device, _)| device.numa_node).collect();
        topology.nearest(node, &nodes).into_iter().map(|at| usable[at]).collect()
    }
}

/// Looks at everything as the transport would with `config`.
pub fn survey(config: &RdmaConfig) -> Survey {
    let look = |name: String| {
        let found = look_at(&name, config);
        let numa_node = device_node(Path::new(SYSFS), &name);
        DeviceSurvey { name, found, numa_node }
    };
    Survey {
        devices: device_names().map(|names| names.into_iter().map(look).collect()),
        memory_lock_bytes: memory_lock_bytes(),
    }
}

fn look_at(name: &str, config: &RdmaConfig) -> Result<Found, RdmaError> {
    let device = Device::open(name)?;
    let ports: Result<Vec<_>, RdmaError> = (1..=device.limits().ports)
        .map(|number| {
            let port = device.port(number)?;
            let dir = class(name).join("ports").join(number.to_string());
            let gid = port.best_gid().map_or(0, |gid| gid.index);
            Ok(PortSurvey {
                rate: line(&dir.join("rate")),
                interface: line(&dir.join("gid_attrs/ndevs").join(gid.to_string())),
                choice: usable(&port, config.gid_index),
                port,
            })
        })
        .collect();
    Ok(Found { limits: device.limits().clone(), ports: ports? })
}

/// Processes with CAP_IPC_LOCK, as root has it, may lock all they want.
fn memory_lock_bytes() -> Option<u64> {
    const CAP_IPC_LOCK: u32 = 14;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    match capabilities >> CAP_IPC_LOCK & 1 {
        1 => None,
        _ => getrlimit(Resource::Memlock).current,
    }
}

fn class(device: &str) -> PathBuf {
    Path::new(SYSFS).join("class/infiniband").join(device)
}
