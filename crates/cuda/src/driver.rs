//! The CUDA driver, loaded at run time. `cudarc` panics where the library or a symbol is missing, so nothing of it is
//! called before [`initialized`] has said that the library is there and new enough to have what this crate calls.

use crate::error::DeviceError;
use crate::limits::DRIVER_VERSION_MIN;
use crate::region::Opened;
use crate::uuid::DeviceUuid;
pub(crate) use cudarc::driver::sys;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, PoisonError, Weak};

const BLAKE3: &CStr = text(concat!(include_str!("../kernels/blake3.ptx"), "\0"));
const COPY: &CStr = text(concat!(include_str!("../kernels/copy.ptx"), "\0"));

const fn text(ptx: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(ptx.as_bytes()) {
        Ok(ptx) => ptx,
        Err(_) => panic!("PTX is text"),
    }
}

/// The primary context of one device, which all of this process shares, and the kernels in it.
pub(crate) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    /// As `cuDriverGetVersion` says it: 12080 is CUDA 12.8.
    pub(crate) version: c_int,
    pub(crate) hash_tiles: sys::CUfunction,
    pub(crate) join_tiles: sys::CUfunction,
    pub(crate) copy_spans: sys::CUfunction,
    pub(crate) put: sys::CUfunction,
    pub(crate) uuid: DeviceUuid,
    pub(crate) name: String,
    /// Other processes' memory that is open here, by handle.
    pub(crate) opened: Mutex<BTreeMap<[u8; 64], Weak<Opened>>>,
    /// Other devices, and whether this one's work reaches their memory directly.
    reached: Mutex<BTreeMap<DeviceUuid, bool>>,
}

// SAFETY: the driver's objects may be used from any thread; none of them is changed after `open`.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Every device that this process sees.
    pub(crate) fn devices() -> Result<Vec<(DeviceUuid, String)>, DeviceError> {
        raw_devices()?.into_iter().map(|device| Ok((uuid_of(device)?, name_of(device)?))).collect()
    }

    pub(crate) fn open(wanted: DeviceUuid) -> Result<Arc<Self>, DeviceError> {
        let mut found = Vec::new();
        for device in raw_devices()? {
            let uuid = uuid_of(device)?;
            if uuid == wanted {
                return Self::of(device, uuid);
            }
            found.push(uuid.to_string());
        }
        let found = if found.is_empty() { "none".into() } else { found.join(", ") };
        Err(DeviceError::NotFound { wanted, found })
    }

    fn of(device: sys::CUdevice, uuid: DeviceUuid) -> Result<Arc<Self>, DeviceError> {
        let name = name_of(device)?;
        let what = || name.clone();
        let mut raw = MaybeUninit::uninit();
        // SAFETY: the device was just enumerated; the context is written on success alone.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(raw.as_mut_ptr(), device) }, "cuDevicePrimaryCtxRetain", what)?;
        // Until all of it is there, so that an error gives back what was taken.
        let mut context = Context {
            device,
            // SAFETY: written by the call above, which succeeded.
            raw: unsafe { raw.assume_init() },
            modules: Vec::new(),
            version: driver_version()?,
            hash_tiles: std::ptr::null_mut(),
            join_tiles: std::ptr::null_mut(),
            copy_spans: std::ptr::null_mut(),
            put: std::ptr::null_mut(),
            uuid,
            name: name.clone(),
            opened: Mutex::default(),
            reached: Mutex::default(),
        };
        context.enter()?;
        let blake3 = context.load(BLAKE3)?;
        context.hash_tiles = context.function(blake3, c"hash_tiles")?;
        context.join_tiles = context.function(blake3, c"join_tiles")?;
        let copy = context.load(COPY)?;
        context.copy_spans = context.function(copy, c"copy_spans")?;
        context.put = context.function(copy, c"put")?;
        Ok(Arc::new(context))
    }

    /// Makes this the current context of the calling thread.
    pub(crate) fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained as long as `self` lives.
        check(unsafe { sys::cuCtxSetCurrent(self.raw) }, "cuCtxSetCurrent", || self.name.clone())
    }

    pub(crate) fn raw(&self) -> sys::CUcontext {
        self.raw
    }

    /// Lets this device's work reach `other`'s memory over what joins the two, if anything does; otherwise copies
    /// between them go by way of the host, which the driver sees to. Says which it is.
    pub(crate) fn reach(&self, other: &Context) -> bool {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        *reached.entry(other.uuid).or_insert_with(|| {
            let direct = self.connect(other).unwrap_or_else(|error| {
                tracing::info!("{} does not reach {}: {error}", self.uuid, other.uuid);
                false
            });
            let how = if direct { "directly" } else { "by way of the host" };
            tracing::debug!("{} copies from {} {how}", self.uuid, other.uuid);
            direct
        })
    }

    fn connect(&self, other: &Context) -> Result<bool, DeviceError> {
        let mut can: c_int = 0;
        // SAFETY: both devices were enumerated; the answer is live.
        let code = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, self.device, other.device) };
        check(code, "cuDeviceCanAccessPeer", || format!("{} and {}", self.name, other.name))?;
        if can == 0 {
            return Ok(false);
        }
        self.enter()?;
        // SAFETY: both contexts are retained; no flags are defined.
        let code = unsafe { sys::cuCtxEnablePeerAccess(other.raw, 0) };
        // Others in this process use the same contexts.
        if code != sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED {
            check(code, "cuCtxEnablePeerAccess", || format!("{} to {}", self.name, other.name))?;
        }
        Ok(true)
    }

    /// Free and all memory, in bytes.
    pub(crate) fn memory(&self) -> Result<(u64, u64), DeviceError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are live.
        let code = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        check(code, "cuMemGetInfo", || self.name.clone())?;
        Ok((free as u64, total as u64))
    }

    fn load(&mut self, ptx: &CStr) -> Result<sys::CUmodule, DeviceError> {
        let mut module = std::ptr::null_mut();
        // SAFETY: the PTX is text that ends with a zero; the module is unloaded on drop.
        let code = unsafe { sys::cuModuleLoadData(&raw mut module, ptx.as_ptr().cast()) };
        check(code, "cuModuleLoadData", || format!("the kernels on {}", self.name))?;
        self.modules.push(module);
        Ok(module)
    }

    fn function(&self, module: sys::CUmodule, name: &CStr) -> Result<sys::CUfunction, DeviceError> {
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded, and lives as long as `self`.
        let code = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
        check(code, "cuModuleGetFunction", || name.to_string_lossy().into_owned())?;
        Ok(function)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        for module in &self.modules {
            // SAFETY: loaded by `load`, and nothing that uses it is left: streams hold this context.
            let _ = unsafe { sys::cuModuleUnload(*module) };
        }
        // SAFETY: retained once by `of`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.uuid)
    }
}

/// The outcome of a driver's call.
pub(crate) fn check(code: sys::CUresult, call: &'static str, what: impl FnOnce() -> String) -> Result<(), DeviceError> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    // SAFETY: these look a code up in a table of constant text, and leave the pointer null where they know none.
    let text = |look_up: unsafe fn(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult| unsafe {
        let mut text = std::ptr::null();
        let _ = look_up(code, &raw mut text);
        if text.is_null() { "unknown".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(DeviceError::Call { call, what: what(), code: text(sys::cuGetErrorName), text: text(sys::cuGetErrorString) })
}

/// Loads the driver, if there is one that will do.
fn initialized() -> Result<(), DeviceError> {
    // SAFETY: it opens and closes libraries of the driver's names.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver);
    }
    let version = driver_version()?;
    if version < DRIVER_VERSION_MIN {
        return Err(DeviceError::OldDriver { found: dotted(version), needed: dotted(DRIVER_VERSION_MIN) });
    }
    // SAFETY: may be called any number of times, from any thread.
    check(unsafe { sys::cuInit(0) }, "cuInit", || "the driver (is a GPU visible to this process?)".into())
}

/// A version as CUDA writes it in a number: 12080 is 12.8.
pub(crate) fn dotted(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

pub(crate) fn driver_version() -> Result<c_int, DeviceError> {
    let mut version = 0;
    // SAFETY: every libcuda has this one, and the one that names errors; the version is live.
    check(unsafe { sys::cuDriverGetVersion(&raw mut version) }, "cuDriverGetVersion", || "the driver".into())?;
    Ok(version)
}

pub(crate) fn raw_devices() -> Result<Vec<sys::CUdevice>, DeviceError> {
    initialized()?;
    let mut count: c_int = 0;
    // SAFETY: the driver is initialised; the count is live.
    check(unsafe { sys::cuDeviceGetCount(&raw mut count) }, "cuDeviceGetCount", || "the driver".into())?;
    let device = |at| {
        let mut device = 0;
        // SAFETY: `at` is below the count.
        check(unsafe { sys::cuDeviceGet(&raw mut device, at) }, "cuDeviceGet", || format!("device {at}"))?;
        Ok(device)
    };
    (0..count).map(device).collect()
}

pub(crate) fn uuid_of(device: sys::CUdevice) -> Result<DeviceUuid, DeviceError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the device was enumerated; the UUID is live.
    check(unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) }, "cuDeviceGetUuid", || format!("device {device}"))?;
    Ok(DeviceUuid(uuid.bytes.map(i8::cast_unsigned)))
}

pub(crate) fn name_of(device: sys::CUdevice) -> Result<String, DeviceError> {
    let mut name = [0u8; 128];
    // SAFETY: the buffer has the length that is said, and the driver ends what it writes with a zero.
    let code = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 128, device) };
    check(code, "cuDeviceGetName", || format!("device {device}"))?;
    let name = CStr::from_bytes_until_nul(&name).map(CString::from).unwrap_or_default();
    Ok(name.to_string_lossy().into_owned())
}

/// Queues a kernel.
///
/// # Safety
/// The function is of this context's module, the stream of this context, and the arguments are what the function
/// declares, their memory kept until the launch is done.
pub(crate) unsafe fn launch(
    context: &Context,
    function: sys::CUfunction,
    grid: u32,
    block: u32,
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
) -> Result<(), DeviceError> {
    // SAFETY: as this function demands; the argument list is read before the call returns.
    let code = unsafe {
        let (extra, shared) = (std::ptr::null_mut(), 0);
        sys::cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, stream, arguments.as_mut_ptr(), extra)
    };
    check(code, "cuLaunchKernel", || format!("a kernel on {}", context.name))
}
