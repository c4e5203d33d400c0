//! What the driver and the kernel say of this machine's GPUs. None is opened for it: no memory of theirs is used.

use crate::driver::{check, dotted, driver_version, name_of, raw_devices, sys, uuid_of};
use crate::error::DeviceError;
use crate::limits::DRIVER_VERSION_BATCHES;
use crate::uuid::DeviceUuid;
use std::ffi::{CStr, c_int};
use std::fs;
use std::path::Path;

const SYSFS: &str = "/sys";
/// A PCI address, such as `00000000:3B:00.0`, and the zero that ends it, fit well.
const PCI_ADDRESS_BYTES: usize = 32;

/// The GPUs that this process sees.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Of the kernel module, such as `580.159.04`; `None` where the kernel does not say.
    pub driver: Option<String>,
    /// The newest CUDA that the driver knows, such as `13.0`.
    pub cuda: String,
    /// Whether the driver can be told of many copies at once.
    pub is_told_of_batches: bool,
    pub gpus: Vec<GpuSurvey>,
}

#[derive(Clone, Debug)]
pub struct GpuSurvey {
    pub uuid: DeviceUuid,
    /// The product's.
    pub name: String,
    pub memory_bytes: u64,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// As sysfs writes it: `0000:3b:00.0`.
    pub pci: String,
    pub numa_node: Option<u32>,
    /// Whether its memory can be given to other devices' drivers as a dma-buf.
    pub dma_buf: bool,
    /// GPUs whose memory this one can reach by itself.
    pub peers: Vec<DeviceUuid>,
}

/// Asks the driver. An error says why there is no GPU to be used.
pub fn survey() -> Result<Survey, DeviceError> {
    let devices = raw_devices()?;
    let named: Vec<_> = devices.iter().map(|d| Ok((*d, uuid_of(*d)?))).collect::<Result<_, DeviceError>>()?;
    let gpus = named.iter().map(|(device, uuid)| look_at(*device, *uuid, &named)).collect::<Result<_, _>>()?;
    let version = driver_version()?;
    Ok(Survey {
        driver: module_version(Path::new(SYSFS)),
        cuda: dotted(version),
        is_told_of_batches: version >= DRIVER_VERSION_BATCHES,
        gpus,
    })
}

fn look_at(
    device: sys::CUdevice,
    uuid: DeviceUuid,
    all: &[(sys::CUdevice, DeviceUuid)],
) -> Result<GpuSurvey, DeviceError> {
    use sys::CUdevice_attribute as Attribute;
    let pci = pci_address(device)?;
    let mut peers = Vec::new();
    for (other, peer) in all.iter().filter(|(other, _)| *other != device) {
        if can_reach(device, *other)? {
            peers.push(*peer);
        }
    }
    Ok(GpuSurvey {
        uuid,
        name: name_of(device)?,
        memory_bytes: memory_bytes(device)?,
        capability: (
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        numa_node: numa_node(Path::new(SYSFS), &pci),
        pci,
        dma_buf: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)? != 0,
        peers,
    })
}

fn memory_bytes(device: sys::CUdevice) -> Result<u64, DeviceError> {
    let mut bytes = 0;
    // SAFETY: the device was enumerated; the number is live.
    check(unsafe { sys::cuDeviceTotalMem_v2(&raw mut bytes, device) }, "cuDeviceTotalMem", || of(device))?;
    Ok(bytes as u64)
}

fn attribute(device: sys::CUdevice, attribute: sys::CUdevice_attribute) -> Result<c_int, DeviceError> {
    let mut value = 0;
    // SAFETY: the device was enumerated; the number is live. Of an attribute that it does not know the driver says so.
    let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) };
    check(code, "cuDeviceGetAttribute", || of(device))?;
    Ok(value)
}

fn can_reach(device: sys::CUdevice, other: sys::CUdevice) -> Result<bool, DeviceError> {
    let mut can = 0;
    // SAFETY: both were enumerated; the number is live.
    check(unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, device, other) }, "cuDeviceCanAccessPeer", || of(device))?;
    Ok(can != 0)
}

fn pci_address(device: sys::CUdevice) -> Result<String, DeviceError> {
    let mut text = [0u8; PCI_ADDRESS_BYTES];
    let len = c_int::try_from(text.len()).expect("it is 32");
    // SAFETY: the buffer has the length that is said, and the driver ends what it writes with a zero.
    let code = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), len, device) };
    check(code, "cuDeviceGetPCIBusId", || of(device))?;
    let text = CStr::from_bytes_until_nul(&text).map(CStr::to_string_lossy).unwrap_or_default();
    Ok(as_in_sysfs(&text))
}

fn of(device: sys::CUdevice) -> String {
    format!("device {device}")
}

/// Drivers write the domain with four or eight digits, and letters in capitals.
fn as_in_sysfs(address: &str) -> String {
    let address = address.to_lowercase();
    match address.split_once(':') {
        Some((domain, rest)) => format!("{:0>4}:{rest}", domain.trim_start_matches('0')),
        None => address,
    }
}

/// The kernel says -1 where it does not know.
fn numa_node(sysfs: &Path, pci: &str) -> Option<u32> {
    line(&sysfs.join("bus/pci/devices").join(pci).join("numa_node"))?.parse().ok()
}

fn module_version(sysfs: &Path) -> Option<String> {
    line(&sysfs.join("module/nvidia/version")).filter(|version| !version.is_empty())
}

fn line(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_sysfs_does() {
        assert_eq!(as_in_sysfs("00000000:3B:00.0"), "0000:3b:00.0");
        assert_eq!(as_in_sysfs("0000:3B:00.0"), "0000:3b:00.0");
        assert_eq!(as_in_sysfs("00010000:03:00.0"), "10000:03:00.0");
        assert_eq!(as_in_sysfs(""), "");
    }

    #[test]
    fn the_kernel_is_believed_where_it_speaks() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!((module_version(dir.path()), numa_node(dir.path(), "0000:3b:00.0")), (None, None));
        write("module/nvidia/version", "580.159.04\n");
        write("bus/pci/devices/0000:3b:00.0/numa_node", "1\n");
        write("bus/pci/devices/0000:5e:00.0/numa_node", "-1\n");
        assert_eq!(module_version(dir.path()).as_deref(), Some("580.159.04"));
        assert_eq!(["0000:3b:00.0", "0000:5e:00.0"].map(|pci| numa_node(dir.path(), pci)), [Some(1), None]);
    }

    #[test]
    fn a_machine_without_a_driver_says_so() {
        match survey() {
            Ok(found) => assert!(found.gpus.iter().all(|gpu| gpu.memory_bytes > 0 && !gpu.pci.is_empty())),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
