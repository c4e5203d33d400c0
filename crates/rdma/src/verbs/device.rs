//! Devices, their ports and their addresses.

use crate::error::{RdmaError, check, check_pointer};
use crate::ibv::{
    IBV_DEVICE_MEM_WINDOW_TYPE_2B, IBV_GID_TYPE_IB, IBV_GID_TYPE_ROCE_V1, IBV_GID_TYPE_ROCE_V2,
    IBV_LINK_LAYER_ETHERNET, IBV_PORT_ACTIVE, Library, ibv_context, ibv_device, ibv_device_attr, ibv_gid_entry,
    ibv_port_attr,
};
use std::ffi::CStr;
use std::fmt;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv6Addr};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

/// GIDs asked for at most, whatever a port claims to have. mlx5 has 256, others fewer.
const GIDS_MAX: usize = 1024;

/// The library, loaded once for the process.
pub(crate) fn library() -> Result<&'static Library, RdmaError> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(Library::load).as_ref().map_err(|reason| RdmaError::Library { reason: reason.clone() })
}

/// The names of all RDMA devices that this process can see.
pub fn device_names() -> Result<Vec<String>, RdmaError> {
    let library = library()?;
    Ok(DeviceList::new(library)?.entries().map(|(name, _)| name).collect())
}

struct DeviceList {
    library: &'static Library,
    list: NonNull<*mut ibv_device>,
    len: usize,
}

impl DeviceList {
    fn new(library: &'static Library) -> Result<Self, RdmaError> {
        let mut len = 0;
        // SAFETY: the count is written to a live integer.
        let list = unsafe { (library.ibv_get_device_list)(&raw mut len) };
        let source = io::Error::last_os_error();
        let list = NonNull::new(list).ok_or(RdmaError::Kernel { source })?;
        Ok(DeviceList { library, list, len: usize::try_from(len).unwrap_or(0) })
    }

    fn entries(&self) -> impl Iterator<Item = (String, *mut ibv_device)> {
        (0..self.len).map(|at| {
            // SAFETY: the list has `len` entries until it is freed, when this value is dropped.
            let device = unsafe { *self.list.as_ptr().add(at) };
            // SAFETY: the device is of a live list; its name is a C string inside of it.
            let name = unsafe { CStr::from_ptr((self.library.ibv_get_device_name)(device)) };
            (name.to_string_lossy().into_owned(), device)
        })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list came from ibv_get_device_list and is freed once. Opened devices outlive it.
        unsafe { (self.library.ibv_free_device_list)(self.list.as_ptr()) };
    }
}

/// An open device. Closed when everything made from it is gone.
pub struct Device {
    pub(super) library: &'static Library,
    pub(super) context: NonNull<ibv_context>,
    name: String,
    limits: DeviceLimits,
}

// SAFETY: libibverbs' calls on a context may come from any thread at the same time (ibv_open_device(3),
// rdma-core's Documentation/libibverbs.md); this value only ever hands the pointer to such calls.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What a device can do, as far as this crate asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    pub firmware: String,
    pub ports: u8,
    /// Longest memory region.
    pub region_bytes_max: u64,
    /// READs that one queue pair may have under way towards others.
    pub reads_out_max: u8,
    /// READs of others that one queue pair answers at a time.
    pub reads_in_max: u8,
    pub completions_max: u32,
    /// Whether it has memory windows bound by a queue pair's requests and for that queue pair alone (type 2B).
    pub windows: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    InfiniBand,
    Ethernet,
}

/// A port as it is at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// From one on.
    pub number: u8,
    pub active: bool,
    /// As the library counts: 1 is 256 bytes, 5 is 4096.
    pub mtu_code: u32,
    pub link: LinkLayer,
    /// Zero on Ethernet.
    pub lid: u16,
    pub message_bytes_max: u32,
    pub gids: Vec<Gid>,
}

impl Port {
    /// Bytes of payload in a packet.
    pub fn mtu_bytes(&self) -> u32 {
        128_u32.checked_shl(self.mtu_code).unwrap_or(0)
    }

    /// The address to be reached by: RoCE v2 on IPv4, then on a routable IPv6 address, then any
    /// RoCE v2; on InfiniBand the first. A table's later entries win among equals: IPv6 link-local
    /// ones come first.
    pub fn best_gid(&self) -> Option<&Gid> {
        match self.link {
            LinkLayer::InfiniBand => self.gids.first(),
            LinkLayer::Ethernet => self.gids.iter().filter(|g| g.rank() > 0).max_by_key(|g| (g.rank(), g.index)),
        }
    }

    pub fn gid(&self, index: u32) -> Option<&Gid> {
        self.gids.iter().find(|g| g.index == index)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidKind {
    InfiniBand,
    RoceV1,
    RoceV2,
    Other(u32),
}

/// One address of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gid {
    pub index: u32,
    pub kind: GidKind,
    pub raw: [u8; 16],
}

impl Gid {
    /// The IP address of a RoCE port; on InfiniBand what the bytes would be as one.
    pub fn ip(&self) -> IpAddr {
        let address = Ipv6Addr::from(self.raw);
        address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4)
    }

    fn rank(&self) -> u8 {
        match (self.kind, self.ip()) {
            (GidKind::RoceV2, IpAddr::V4(_)) => 3,
            (GidKind::RoceV2, IpAddr::V6(address)) if !address.is_unicast_link_local() => 2,
            (GidKind::RoceV2, IpAddr::V6(_)) => 1,
            (GidKind::InfiniBand | GidKind::RoceV1 | GidKind::Other(_), _) => 0,
        }
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            GidKind::InfiniBand => "InfiniBand",
            GidKind::RoceV1 => "RoCE v1",
            GidKind::RoceV2 => "RoCE v2",
            GidKind::Other(code) => return write!(f, "GID {} {} (kind {code})", self.index, self.ip()),
        };
        write!(f, "GID {} {} ({kind})", self.index, self.ip())
    }
}

impl Device {
    pub fn open(name: &str) -> Result<Arc<Self>, RdmaError> {
        let library = library()?;
        let list = DeviceList::new(library)?;
        let Some((_, device)) = list.entries().find(|(n, _)| n == name) else {
            let found: Vec<String> = list.entries().map(|(n, _)| n).collect();
            return Err(RdmaError::NotFound { wanted: name.into(), found: found.join(", ") });
        };
        // SAFETY: the device is of the list, which is alive until the end of this function.
        let context = check_pointer(unsafe { (library.ibv_open_device)(device) }, "ibv_open_device", name)?;
        let mut opened = Device { library, context, name: name.into(), limits: DeviceLimits::none() };
        opened.limits = opened.query_limits()?;
        Ok(Arc::new(opened))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn limits(&self) -> &DeviceLimits {
        &self.limits
    }

    /// Port `number` as it is now; the first is 1.
    pub fn port(&self, number: u8) -> Result<Port, RdmaError> {
        let mut attr = MaybeUninit::<ibv_port_attr>::zeroed();
        // SAFETY: the context is open and `attr` at least as long as what this symbol writes.
        let code = unsafe { (self.library.ibv_query_port)(self.context.as_ptr(), number, attr.as_mut_ptr()) };
        check(code, "ibv_query_port", &self.name)?;
        // SAFETY: all of it are integers, zeroed and then written by the library.
        let attr = unsafe { attr.assume_init() };
        let ethernet = attr.link_layer == IBV_LINK_LAYER_ETHERNET;
        Ok(Port {
            number,
            active: attr.state == IBV_PORT_ACTIVE,
            mtu_code: attr.active_mtu,
            link: if ethernet { LinkLayer::Ethernet } else { LinkLayer::InfiniBand },
            lid: attr.lid,
            message_bytes_max: attr.max_msg_sz,
            gids: self.gids(number)?,
        })
    }

    fn gids(&self, port: u8) -> Result<Vec<Gid>, RdmaError> {
        let empty = ibv_gid_entry {
            gid: crate::ibv::ibv_gid { raw: [0; 16] },
            gid_index: 0,
            port_num: 0,
            gid_type: 0,
            ndev_ifindex: 0,
        };
        let mut entries = vec![empty; GIDS_MAX];
        // SAFETY: `entries` has room for as many entries of that size as are said.
        let found = unsafe {
            (self.library._ibv_query_gid_table)(
                self.context.as_ptr(),
                entries.as_mut_ptr(),
                entries.len(),
                0,
                size_of::<ibv_gid_entry>(),
            )
        };
        let found = match usize::try_from(found) {
            Ok(found) => found.min(GIDS_MAX),
            Err(_) => {
                let source = io::Error::from_raw_os_error(i32::try_from(-found).unwrap_or(0));
                return Err(RdmaError::Call { call: "ibv_query_gid_table", device: self.name.clone(), source });
            }
        };
        let of_port = entries[..found].iter().filter(|e| e.port_num == u32::from(port));
        Ok(of_port.map(|e| Gid { index: e.gid_index, kind: kind_of(e.gid_type), raw: e.gid.raw }).collect())
    }

    fn query_limits(&self) -> Result<DeviceLimits, RdmaError> {
        let mut attr = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: the context is open and `attr` a whole structure of the library's.
        let code = unsafe { (self.library.ibv_query_device)(self.context.as_ptr(), attr.as_mut_ptr()) };
        check(code, "ibv_query_device", &self.name)?;
        // SAFETY: all of it are integers, zeroed and then written by the library.
        let attr = unsafe { attr.assume_init() };
        let firmware = attr.fw_ver.iter().take_while(|c| **c != 0).map(|c| char::from(c.to_ne_bytes()[0])).collect();
        // SAFETY: the context is open.
        let ops = unsafe { &(*self.context.as_ptr()).ops };
        let has_calls = ops.alloc_mw.is_some() && ops.dealloc_mw.is_some();
        Ok(DeviceLimits {
            firmware,
            ports: attr.phys_port_cnt,
            region_bytes_max: attr.max_mr_size,
            reads_out_max: small(attr.max_qp_init_rd_atom),
            reads_in_max: small(attr.max_qp_rd_atom),
            completions_max: u32::try_from(attr.max_cqe).unwrap_or(0),
            windows: has_calls && attr.max_mw > 0 && attr.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2B != 0,
        })
    }
}

impl DeviceLimits {
    fn none() -> Self {
        DeviceLimits {
            firmware: String::new(),
            ports: 0,
            region_bytes_max: 0,
            reads_out_max: 0,
            reads_in_max: 0,
            completions_max: 0,
            windows: false,
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: the context is open, and nothing made from it is left: each holds an Arc of this.
        let code = unsafe { (self.library.ibv_close_device)(self.context.as_ptr()) };
        if let Err(error) = check(code, "ibv_close_device", &self.name) {
            tracing::error!("{error}");
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name)
    }
}

fn kind_of(code: u32) -> GidKind {
    match code {
        IBV_GID_TYPE_IB => GidKind::InfiniBand,
        IBV_GID_TYPE_ROCE_V1 => GidKind::RoceV1,
        IBV_GID_TYPE_ROCE_V2 => GidKind::RoceV2,
        other => GidKind::Other(other),
    }
}

/// A count that a queue pair's attributes hold in a byte.
fn small(count: i32) -> u8 {
    u8::try_from(count.clamp(0, 255)).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(index: u32, kind: GidKind, address: &str) -> Gid {
        let raw = match address.parse().expect("an address") {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        Gid { index, kind, raw }
    }

    fn port(link: LinkLayer, gids: Vec<Gid>) -> Port {
        Port { number: 1, active: true, mtu_code: 5, link, lid: 0, message_bytes_max: 1 << 31, gids }
    }

    #[test]
    fn roce_v2_on_ipv4_is_chosen_wherever_it_stands() {
        let gids = vec![
            gid(0, GidKind::RoceV1, "fe80::1"),
            gid(1, GidKind::RoceV2, "fe80::1"),
            gid(2, GidKind::RoceV1, "10.0.0.1"),
            gid(3, GidKind::RoceV2, "10.0.0.1"),
            gid(4, GidKind::RoceV2, "2001:db8::1"),
        ];
        let mut port = port(LinkLayer::Ethernet, gids);
        assert_eq!(port.best_gid().map(|g| g.index), Some(3));
        port.gids.remove(3);
        assert_eq!(port.best_gid().map(|g| g.index), Some(4));
        port.gids.remove(3);
        assert_eq!(port.best_gid().map(|g| g.index), Some(1));
        port.gids.remove(1);
        assert_eq!(port.best_gid(), None, "RoCE v1 does not leave its wire");
    }

    #[test]
    fn infiniband_takes_its_first_address() {
        let port = port(LinkLayer::InfiniBand, vec![gid(0, GidKind::InfiniBand, "fe80::1")]);
        assert_eq!(port.best_gid().map(|g| g.index), Some(0));
        assert_eq!(port.mtu_bytes(), 4096);
    }

    #[test]
    fn ipv4_addresses_are_told_as_such() {
        assert_eq!(gid(3, GidKind::RoceV2, "10.0.0.1").to_string(), "GID 3 10.0.0.1 (RoCE v2)");
    }
}
