//! Which NUMA node a device or memory belongs to, and how far apart nodes are. What is not known is
//! nobody's trouble: a far port does as well, only slower.

use aquifer_memory::Span;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::fs;
use std::path::Path;

/// Where sysfs is.
pub(crate) const SYSFS: &str = "/sys";

/// What Linux calls near and far where a machine does not say more (`LOCAL_DISTANCE` and `REMOTE_DISTANCE`
/// of its include/linux/topology.h).
const LOCAL: u32 = 10;
const REMOTE: u32 = 20;

/// The distances between NUMA nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Topology {
    distances: BTreeMap<(u32, u32), u32>,
}

impl Topology {
    /// Reads `devices/system/node/node*/distance` below `sysfs`: each a row with a number for every node, in
    /// their order.
    pub(crate) fn read(sysfs: &Path) -> Self {
        let entries = fs::read_dir(sysfs.join("devices/system/node")).into_iter().flatten().flatten();
        let named = entries.filter_map(|entry| {
            let node: u32 = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            Some((node, line(&entry.path().join("distance"))))
        });
        let rows: BTreeMap<u32, String> = named.collect();
        let mut distances = BTreeMap::new();
        for (from, row) in &rows {
            for (to, distance) in rows.keys().zip(row.split_whitespace()) {
                if let Ok(distance) = distance.parse() {
                    distances.insert((*from, *to), distance);
                }
            }
        }
        Topology { distances }
    }

    /// How far memory is from a device: less is nearer. A device that may be anywhere is taken for a far
    /// one; memory that may be is as far from all.
    pub(crate) fn distance(&self, memory: Option<u32>, device: Option<u32>) -> u32 {
        match (memory, device) {
            (None, _) => LOCAL,
            (Some(_), None) => REMOTE,
            (Some(memory), Some(device)) => match self.distances.get(&(memory, device)) {
                Some(distance) => *distance,
                None if memory == device => LOCAL,
                None => REMOTE,
            },
        }
    }
}

impl Topology {
    /// Which of `devices`, by their nodes, no other is nearer than to a node; none where it is not known of any.
    pub(crate) fn nearest(&self, node: u32, devices: &[Option<u32>]) -> Vec<usize> {
        let distances = devices.iter().map(|device| device.map(|_| self.distance(Some(node), *device)));
        let known: Vec<_> = distances.enumerate().filter_map(|(at, distance)| Some((at, distance?))).collect();
        let least = known.iter().map(|(_, distance)| *distance).min();
        known.into_iter().filter(|(_, distance)| Some(*distance) == least).map(|(at, _)| at).collect()
    }
}

/// How far the ports in use are from memory.
#[derive(Clone, Debug)]
pub(crate) struct Nearness {
    topology: Topology,
    /// The node of each.
    ports: Vec<Option<u32>>,
}

impl Nearness {
    pub(crate) fn new(topology: Topology, ports: Vec<Option<u32>>) -> Self {
        Nearness { topology, ports }
    }

    /// Where memory lies; `None` where it is not known, or no port is nearer than another.
    pub(crate) fn node_of(&self, span: &Span) -> Option<u32> {
        let first = self.ports.first()?;
        self.ports.iter().any(|port| port != first).then(|| memory_node(span)).flatten()
    }

    /// How far a port is from memory on that node: less is nearer.
    pub(crate) fn distance(&self, memory: Option<u32>, port: usize) -> u32 {
        self.topology.distance(memory, self.ports.get(port).copied().flatten())
    }
}

/// The NUMA node that an RDMA device is attached to. The kernel says -1 where it does not know.
pub(crate) fn device_node(sysfs: &Path, device: &str) -> Option<u32> {
    line(&sysfs.join("class/infiniband").join(device).join("device/numa_node")).parse().ok()
}

/// The NUMA node that the first byte of `span` lies on; `None` where it was never touched, or the kernel
/// does not say.
pub(crate) fn memory_node(span: &Span) -> Option<u32> {
    const OWN_PROCESS: c_int = 0;
    let pages = [span.as_ptr().cast::<c_void>()];
    let mut status: [c_int; 1] = [-1];
    // SAFETY: move_pages(2) with no nodes to move to moves nothing and makes no page present: it writes
    // the status of the one page, whose address it does not follow, to a live integer.
    let code = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            OWN_PROCESS,
            pages.len(),
            pages.as_ptr(),
            std::ptr::null::<c_int>(),
            status.as_mut_ptr(),
            0,
        )
    };
    if code == 0 { u32::try_from(status[0]).ok() } else { None }
}

/// A line of sysfs; empty where there is none.
pub(crate) fn line(path: &Path) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_memory::Mapping;

    /// Three nodes, whose numbers have a gap, and four devices.
    fn machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("devices/system/node/node0/distance", "10 12 32\n");
        write("devices/system/node/node1/distance", "12 10 32\n");
        write("devices/system/node/node4/distance", "32 33 10\n");
        write("devices/system/node/online", "0-1,4\n");
        for (device, node) in [("mlx5_0", "0"), ("mlx5_1", "1"), ("mlx5_2", "4"), ("rxe0", "-1")] {
            write(&format!("class/infiniband/{device}/device/numa_node"), &format!("{node}\n"));
        }
        dir
    }

    #[test]
    fn devices_and_distances_are_read_from_sysfs() {
        let dir = machine();
        let node = |device| device_node(dir.path(), device);
        assert_eq!([node("mlx5_0"), node("mlx5_2"), node("rxe0"), node("none")], [Some(0), Some(4), None, None]);
        let topology = Topology::read(dir.path());
        let from_four = |device| topology.distance(Some(4), node(device));
        assert_eq!(["mlx5_0", "mlx5_1", "mlx5_2", "rxe0"].map(from_four), [32, 33, 10, REMOTE]);
        let nodes = ["mlx5_0", "rxe0", "mlx5_1", "mlx5_0"].map(node);
        assert_eq!([0, 1, 4].map(|from| topology.nearest(from, &nodes)), [vec![0, 3], vec![2], vec![0, 3]]);
        assert!(topology.nearest(0, &[None]).is_empty() && topology.nearest(0, &[]).is_empty());
        let unknown = |device| topology.distance(None, node(device));
        assert_eq!(unknown("mlx5_0"), unknown("mlx5_2"), "memory that may be anywhere is near nothing");
    }

    #[test]
    fn the_ports_of_a_node_are_near_its_memory() {
        let dir = machine();
        let ports = ["mlx5_0", "mlx5_1", "mlx5_2"].map(|device| device_node(dir.path(), device));
        let near = Nearness::new(Topology::read(dir.path()), ports.to_vec());
        let nearest = |memory| (0..3).min_by_key(|port| near.distance(memory, *port));
        assert_eq!([Some(0), Some(1), Some(4), None].map(nearest), [Some(0), Some(1), Some(2), Some(0)]);
        let touched = Mapping::anonymous(1).unwrap().span();
        touched.write(0, b"x").unwrap();
        let alike = Nearness::new(Topology::read(dir.path()), vec![Some(0), Some(0)]);
        assert_eq!(alike.node_of(&touched), None, "nothing is to be asked where all ports are as near");
    }

    #[test]
    fn a_machine_that_says_nothing_still_knows_its_own_nodes() {
        let topology = Topology::read(Path::new("/nowhere"));
        assert!(topology.distance(Some(1), Some(1)) < topology.distance(Some(1), Some(0)));
    }

    #[test]
    fn memory_lies_nowhere_until_it_is_touched() {
        let span = Mapping::anonymous(3 << 20).unwrap().span();
        assert_eq!(memory_node(&span), None);
        span.write(2 << 20, b"x").unwrap();
        let touched = span.slice((2 << 20) + 1..3 << 20).unwrap();
        // A kernel without NUMA does not say; one with it says where.
        let says = Path::new("/sys/devices/system/node/node0").exists();
        assert!(!says || memory_node(&touched).is_some() || !can_ask(), "{:?}", memory_node(&touched));
    }

    /// Sandboxes forbid the call.
    fn can_ask() -> bool {
        // SAFETY: asks about no page.
        unsafe { libc::syscall(libc::SYS_move_pages, 0, 0, 0, 0, 0, 0) == 0 }
    }
}
