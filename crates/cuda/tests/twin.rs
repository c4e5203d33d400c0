//! The code above the trait of devices, on the twin in host memory; and a machine without a GPU.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

mod common;

use aquifer_cuda::{Device, DeviceError, DeviceUuid, Gpu, HandleError, RegionHandle, Twin};

fn twin() -> Twin {
    Twin::new(DeviceUuid([1; 16]))
}

#[test]
fn it_hashes_at_every_boundary() {
    common::hashes_at_every_boundary(&twin());
}

#[test]
fn it_hashes_any_batch() {
    common::hashes_any_batch(&twin(), 8);
}

#[test]
fn it_sees_a_flipped_bit() {
    common::sees_a_flipped_bit(&twin(), 2);
}

#[test]
fn it_lands_and_verifies() {
    common::lands_and_verifies(&twin());
}

#[test]
fn it_applies() {
    common::applies(&twin());
}

#[test]
fn it_takes_from_another() {
    common::takes_from_another(&twin(), &Twin::new(DeviceUuid([2; 16])));
}

#[test]
fn it_refuses_what_is_wrong() {
    common::refuses_what_is_wrong(&twin());
}

#[test]
fn a_region_is_opened_by_its_handle() {
    let twin = twin();
    let memory = common::uploaded(&twin, b"an engine's weights");
    let handle = twin.export(&memory);
    assert_eq!(common::downloaded(&twin, &twin.open(&handle).unwrap()), b"an engine's weights");
    let other = Twin::new(DeviceUuid([2; 16]));
    assert!(matches!(other.open(&handle), Err(DeviceError::Handle(HandleError::OtherDevice { .. }))));
    let unknown = RegionHandle::parse(twin.uuid(), &[9; 64], 0, 1).unwrap();
    assert!(matches!(twin.open(&unknown), Err(DeviceError::Handle(HandleError::Dead { .. }))));
}

#[test]
fn without_a_gpu_it_says_so_and_does_not_panic() {
    // Where there is one, this name is not its.
    let error = Gpu::open(DeviceUuid([0xee; 16])).unwrap_err();
    assert!(!error.to_string().is_empty());
    if let Err(error) = Gpu::list() {
        assert!(matches!(error, DeviceError::NoDriver | DeviceError::OldDriver { .. } | DeviceError::Call { .. }));
    }
}
