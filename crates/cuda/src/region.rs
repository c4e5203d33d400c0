//! GPU memory of another process: an engine's region, by CUDA IPC handle.

use crate::device::DeviceSpan;
use crate::driver::{Context, check, sys};
use crate::error::DeviceError;
use crate::uuid::DeviceUuid;
use std::sync::{Arc, PoisonError};

const HANDLE_BYTES: usize = 64;
/// PyTorch writes a version and a letter before the handle: 'c' for memory of cudaMalloc, 'e' for expandable segments.
const FRAMED_BYTES: usize = HANDLE_BYTES + 2;
const FRAME_PLAIN: u8 = b'c';
const FRAME_EXPANDABLE: u8 = b'e';

/// What an engine tells of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionHandle {
    pub(crate) device: DeviceUuid,
    pub(crate) handle: [u8; HANDLE_BYTES],
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HandleError {
    #[error(
        "the tensor lies in an expandable segment, which has no plain CUDA IPC handle: run the engine without expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF"
    )]
    Expandable,
    #[error(
        "a handle of {0} bytes is of no kind known here: expected cudaIpcMemHandle_t (64 bytes), or PyTorch's form of it (66)"
    )]
    OtherKind(usize),
    #[error("the region is on {wanted}, and was to be opened on {here}")]
    OtherDevice { wanted: DeviceUuid, here: DeviceUuid },
    #[error(
        "the engine's memory cannot be opened (cuIpcOpenMemHandle: {code}): the engine has ended or freed it, or the handle is of this very process, or of one in another container without a shared IPC namespace; bind it again"
    )]
    Dead { code: String },
    #[error("the region is said to be bytes {begin}..{end} of an allocation that has {found}")]
    TooShort { begin: u64, end: u64, found: u64 },
}

impl RegionHandle {
    /// `handle` as the driver made it, or as PyTorch's `untyped_storage()._share_cuda_()` gives it; `offset` into
    /// the allocation that it names; both and `len` in bytes.
    pub fn parse(device: DeviceUuid, handle: &[u8], offset: u64, len: u64) -> Result<Self, HandleError> {
        let plain = match (handle.len(), handle) {
            (HANDLE_BYTES, plain) => plain,
            (FRAMED_BYTES, [_, FRAME_PLAIN, plain @ ..]) => plain,
            (len, [_, FRAME_EXPANDABLE, ..]) if len != HANDLE_BYTES => return Err(HandleError::Expandable),
            (len, _) => return Err(HandleError::OtherKind(len)),
        };
        let handle = plain.try_into().map_err(|_| HandleError::OtherKind(plain.len()))?;
        Ok(RegionHandle { device, handle, offset, len })
    }

    pub fn device(&self) -> DeviceUuid {
        self.device
    }

    pub(crate) fn check_device(&self, here: DeviceUuid) -> Result<(), HandleError> {
        if self.device == here { Ok(()) } else { Err(HandleError::OtherDevice { wanted: self.device, here }) }
    }

    /// Where it lies in an allocation of `found` bytes.
    pub(crate) fn range_in(&self, found: u64) -> Result<std::ops::Range<u64>, HandleError> {
        let end = self.offset.saturating_add(self.len);
        match end <= found {
            true => Ok(self.offset..end),
            false => Err(HandleError::TooShort { begin: self.offset, end, found }),
        }
    }
}

/// An allocation of another process, closed on drop. It stays while it is open here, whatever becomes of that process.
#[derive(Debug)]
pub(crate) struct Opened {
    context: Arc<Context>,
    address: u64,
    len: u64,
}

pub(crate) fn open(context: &Arc<Context>, region: &RegionHandle) -> Result<DeviceSpan, DeviceError> {
    region.check_device(context.uuid)?;
    let opened = allocation(context, region.handle)?;
    let range = region.range_in(opened.len)?;
    let (address, len) = (opened.address, opened.len);
    DeviceSpan::new(context.uuid, opened, address, len).slice(range)
}

/// Each allocation is opened once, however many regions lie in it: PyTorch puts many tensors in one.
fn allocation(context: &Arc<Context>, handle: [u8; HANDLE_BYTES]) -> Result<Arc<Opened>, DeviceError> {
    let mut all = context.opened.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|_, opened| opened.strong_count() > 0);
    if let Some(opened) = all.get(&handle).and_then(std::sync::Weak::upgrade) {
        return Ok(opened);
    }
    let opened = Arc::new(Opened::new(context, handle)?);
    all.insert(handle, Arc::downgrade(&opened));
    Ok(opened)
}

impl Opened {
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn new(context: &Arc<Context>, handle: [u8; HANDLE_BYTES]) -> Result<Self, DeviceError> {
        context.enter()?;
        let raw = sys::CUipcMemHandle { reserved: handle.map(u8::cast_signed) };
        let mut address = 0;
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: the handle is 64 bytes that the driver checks; the address is live.
        let code = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, raw, flags) };
        if let Err(error) = check(code, "cuIpcOpenMemHandle", || "an engine's memory".into()) {
            let DeviceError::Call { code, .. } = error else { return Err(error) };
            return Err(HandleError::Dead { code }.into());
        }
        // Closed again where the next call fails.
        let mut opened = Opened { context: context.clone(), address, len: 0 };
        let (mut base, mut len) = (0, 0);
        // SAFETY: both are live, and the address is of an open allocation.
        let code = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut len, address) };
        check(code, "cuMemGetAddressRange", || "an engine's memory".into())?;
        opened.len = len as u64;
        Ok(opened)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let closed = self.context.enter().and_then(|()| {
            // SAFETY: opened by `new`, closed only here; queued work keeps its spans, and so this, until it is done.
            check(unsafe { sys::cuIpcCloseMemHandle(self.address) }, "cuIpcCloseMemHandle", || "a region".into())
        });
        if let Err(error) = closed {
            tracing::error!("an engine's memory stays open: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: DeviceUuid = DeviceUuid([7; 16]);

    #[test]
    fn both_forms_of_a_handle_are_read() {
        let plain = [3; 64];
        let framed = [&[1, b'c'][..], &plain].concat();
        let parsed = RegionHandle::parse(HERE, &plain, 8, 16).unwrap();
        assert_eq!(RegionHandle::parse(HERE, &framed, 8, 16), Ok(parsed));
        assert_eq!(parsed.handle, plain);
    }

    #[test]
    fn other_kinds_of_handles_are_told_apart() {
        // As PyTorch 2.11 makes them: longer the more segments there are.
        for len in [30, 66, 234] {
            let mut expandable = vec![0; len];
            expandable[1] = b'e';
            assert_eq!(RegionHandle::parse(HERE, &expandable, 0, 1), Err(HandleError::Expandable));
        }
        for len in [0, 1, 63, 65, 66, 67, 234] {
            assert_eq!(RegionHandle::parse(HERE, &vec![0; len], 0, 1), Err(HandleError::OtherKind(len)));
        }
    }

    #[test]
    fn a_region_must_lie_in_its_allocation_and_on_its_device() {
        let region = RegionHandle::parse(HERE, &[0; 64], 100, 28).unwrap();
        assert_eq!(region.range_in(128), Ok(100..128));
        assert_eq!(region.range_in(127), Err(HandleError::TooShort { begin: 100, end: 128, found: 127 }));
        let region = RegionHandle::parse(HERE, &[0; 64], u64::MAX, 2).unwrap();
        assert!(region.range_in(u64::MAX - 1).is_err());
        let here = DeviceUuid([8; 16]);
        assert_eq!(region.check_device(here), Err(HandleError::OtherDevice { wanted: HERE, here }));
    }
}
