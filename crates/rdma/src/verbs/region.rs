//! Memory a device may touch: regions that are registered once, and windows on parts of them.

use super::device::Device;
use crate::error::{RdmaError, check, check_pointer};
use crate::ibv::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_MW_BIND, IBV_ACCESS_REMOTE_READ, IBV_MW_TYPE_2, ibv_mr, ibv_mw, ibv_pd,
};
use aquifer_memory::Span;
use rustix::process::{Resource, getrlimit};
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// What keys and queue pairs have to do with each other: a key opens nothing through a queue pair of
/// another domain.
pub struct ProtectionDomain {
    device: Arc<Device>,
    pd: NonNull<ibv_pd>,
}

// SAFETY: libibverbs' calls on a protection domain may come from any thread at the same time; this value
// only ever hands the pointer to such calls.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub fn new(device: &Arc<Device>) -> Result<Arc<Self>, RdmaError> {
        // SAFETY: the context is open as long as `device` is.
        let pd = unsafe { (device.library.ibv_alloc_pd)(device.context.as_ptr()) };
        let pd = check_pointer(pd, "ibv_alloc_pd", device.name())?;
        Ok(Arc::new(ProtectionDomain { device: device.clone(), pd }))
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_pd {
        self.pd.as_ptr()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: nothing made in the domain is left: each holds an Arc of this.
        let code = unsafe { (self.device.library.ibv_dealloc_pd)(self.pd.as_ptr()) };
        if let Err(error) = check(code, "ibv_dealloc_pd", self.device.name()) {
            tracing::error!("{error}");
        }
    }
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProtectionDomain({})", self.device.name())
    }
}

/// What a region is registered for. There is no way to register one for others to write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// This node's READs land in it. Others cannot reach it.
    Land,
    /// Others may read all of it, whoever knows its key.
    Read,
    /// This node's READs land in it, where it is writable. Others reach no more of it than a
    /// [`Window`] shows them.
    Windows,
}

/// For tests of what goes on meanwhile: as long as this is set, no registration comes to its end.
#[cfg(feature = "device-tests")]
pub static REGISTERING_LASTS: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// Registered memory: pinned, and mapped, until this is dropped.
pub struct Region {
    domain: Arc<ProtectionDomain>,
    mr: NonNull<ibv_mr>,
    span: Span,
    access: Access,
}

// SAFETY: a registration is used by handing its keys and its pointer to calls that may come from any
// thread at the same time.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// What another node needs to read a region or a window by, and no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRegion {
    pub address: u64,
    pub len: u32,
    pub key: u32,
}

impl Region {
    /// Registers the bytes of `span`, which stay mapped as long as the region is registered.
    pub fn register(domain: &Arc<ProtectionDomain>, span: Span, access: Access) -> Result<Arc<Self>, RdmaError> {
        let flags = match access {
            Access::Land => IBV_ACCESS_LOCAL_WRITE,
            Access::Read => IBV_ACCESS_REMOTE_READ,
            Access::Windows if span.is_writable() => IBV_ACCESS_MW_BIND | IBV_ACCESS_LOCAL_WRITE,
            Access::Windows => IBV_ACCESS_MW_BIND,
        };
        #[cfg(feature = "device-tests")]
        while REGISTERING_LASTS.load(std::sync::atomic::Ordering::Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let device = &domain.device;
        let len = usize::try_from(span.len()).unwrap_or(usize::MAX); // never longer than the address space
        let address = span.as_ptr().cast_mut().cast();
        // SAFETY: `span` is `len` mapped bytes and stays so until this region is dropped and the
        // registration with it. The device writes to them only where they are writable, by requests
        // of this node; no Rust reference to them exists (see `aquifer_memory::span`).
        let mr = unsafe { (device.library.ibv_reg_mr)(domain.as_ptr(), address, len, flags) };
        let Some(mr) = NonNull::new(mr) else {
            return Err(refused(device, span.len(), io::Error::last_os_error()));
        };
        Ok(Arc::new(Region { domain: domain.clone(), mr, span, access }))
    }

    pub fn span(&self) -> &Span {
        &self.span
    }

    pub fn access(&self) -> Access {
        self.access
    }

    /// How others read `part` by this region's own key; `None` where that opens nothing, or `part` is
    /// of other memory.
    pub fn remote(&self, part: &Span) -> Option<RemoteRegion> {
        let key = match self.access {
            // SAFETY: the registration is alive.
            Access::Read => unsafe { (*self.mr.as_ptr()).rkey },
            Access::Land | Access::Windows => return None,
        };
        let (address, len) = self.locate(part)?;
        Some(RemoteRegion { address, len, key })
    }

    /// Where `part` lies, if it lies in this region.
    pub(super) fn locate(&self, part: &Span) -> Option<(u64, u32)> {
        let (own, own_offset) = self.span.mapping();
        let (theirs, offset) = part.mapping();
        let begin = offset.checked_sub(own_offset)?;
        let inside = Arc::ptr_eq(own, theirs) && begin.checked_add(part.len())? <= self.span.len();
        if !inside {
            return None;
        }
        Some((part.as_ptr().addr() as u64, u32::try_from(part.len()).ok()?))
    }

    pub(super) fn local_key(&self) -> u32 {
        // SAFETY: the registration is alive.
        unsafe { (*self.mr.as_ptr()).lkey }
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_mr {
        self.mr.as_ptr()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let device = &self.domain.device;
        // SAFETY: the registration is alive, and no request or window uses it: each holds an Arc of this.
        let code = unsafe { (device.library.ibv_dereg_mr)(self.mr.as_ptr()) };
        if let Err(error) = check(code, "ibv_dereg_mr", device.name()) {
            // The device may still reach the memory: it must stay mapped for ever.
            tracing::error!("{error}; {} bytes stay in use", self.span.len());
            std::mem::forget(self.span.clone());
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({:?} for {:?} on {})", self.span, self.access, self.domain.device.name())
    }
}

/// A window on a part of a region: bound and closed by requests of one queue pair, and open to that
/// queue pair's other end alone (a type 2B memory window).
pub struct Window {
    domain: Arc<ProtectionDomain>,
    mw: NonNull<ibv_mw>,
    /// The key it has, or has next.
    key: u32,
    /// What it shows, from the moment its binding is posted until its closing has completed.
    shown: Option<Arc<Region>>,
}

// SAFETY: the window is used by handing its pointer to calls that may come from any thread.
unsafe impl Send for Window {}

impl Window {
    pub fn new(domain: &Arc<ProtectionDomain>) -> Result<Self, RdmaError> {
        let device = &domain.device;
        // SAFETY: the context is open.
        let ops = unsafe { &(*device.context.as_ptr()).ops };
        let Some(alloc) = ops.alloc_mw else {
            let source = io::Error::from(io::ErrorKind::Unsupported);
            return Err(RdmaError::Call { call: "ibv_alloc_mw", device: device.name().into(), source });
        };
        // SAFETY: the domain is alive.
        let mw = check_pointer(unsafe { alloc(domain.as_ptr(), IBV_MW_TYPE_2) }, "ibv_alloc_mw", device.name())?;
        // SAFETY: just made.
        let key = unsafe { (*mw.as_ptr()).rkey };
        Ok(Window { domain: domain.clone(), mw, key, shown: None })
    }

    /// The key for the next binding: its lowest byte is ours to change, and changes each time, so that
    /// an old key opens nothing (ibv_inc_rkey(3)).
    pub(super) fn next_key(&mut self) -> u32 {
        self.key = (self.key & !0xff) | (self.key.wrapping_add(1) & 0xff);
        self.key
    }

    /// The binding with that key has completed. The library learns a window's key from whoever bound
    /// it: rxe finds the window by it the next time.
    pub(super) fn note_bound(&mut self) {
        // SAFETY: the window is alive, and this member is for its user to keep current (verbs.h); nothing
        // else uses the window meanwhile, since this borrow is exclusive.
        unsafe { (*self.mw.as_ptr()).rkey = self.key };
    }

    pub(super) fn key(&self) -> u32 {
        self.key
    }

    pub(super) fn show(&mut self, region: Arc<Region>) {
        self.shown = Some(region);
    }

    pub(super) fn shown(&mut self) -> &mut Option<Arc<Region>> {
        &mut self.shown
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_mw {
        self.mw.as_ptr()
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let device = &self.domain.device;
        // SAFETY: the context is open, and the window alive.
        let code = unsafe { (*device.context.as_ptr()).ops.dealloc_mw.map_or(0, |dealloc| dealloc(self.mw.as_ptr())) };
        if let Err(error) = check(code, "ibv_dealloc_mw", device.name()) {
            tracing::error!("{error}");
            std::mem::forget(self.shown.take());
        }
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Window({:?})", self.shown)
    }
}

/// ENOMEM nearly always speaks of the limit on locked memory: said with the limit's value.
fn refused(device: &Device, len: u64, source: io::Error) -> RdmaError {
    if source.raw_os_error() == Some(libc::ENOMEM) {
        let limit = getrlimit(Resource::Memlock).current.map_or("any amount".into(), |bytes| format!("{bytes} bytes"));
        return RdmaError::Memlock { len, device: device.name().into(), limit, source };
    }
    RdmaError::Call { call: "ibv_reg_mr", device: device.name().into(), source }
}
