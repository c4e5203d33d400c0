//! What can go wrong between this machine and its RDMA devices.

use std::ffi::c_int;
use std::io;
use thiserror::Error;

/// A fact about this machine, with the foreign function's name and code and what can be done.
#[derive(Debug, Error)]
pub enum RdmaError {
    #[error("libibverbs cannot be used: {reason}; install rdma-core (on Debian: libibverbs1 and ibverbs-providers)")]
    Library { reason: String },
    #[error(
        "ibv_get_device_list: {source}: this kernel has no RDMA, or its modules are not loaded (ib_uverbs, and the card's own)"
    )]
    Kernel { source: io::Error },
    #[error("no RDMA device is here")]
    NoDevice,
    #[error("no RDMA device named {wanted}; there are: {found}")]
    NotFound { wanted: String, found: String },
    #[error("no port of {device} can be used: {reason}")]
    NoPort { device: String, reason: String },
    #[error("{call} on {device}: {source}")]
    Call { call: &'static str, device: String, source: io::Error },
    #[error(
        "ibv_reg_mr of {len} bytes on {device}: {source}; this process may lock {limit} of memory: raise it (ulimit -l, LimitMEMLOCK= in the service's unit) or give it CAP_IPC_LOCK"
    )]
    Memlock { len: u64, device: String, limit: String, source: io::Error },
    #[error("the device {device} went wrong with a request of ours: {reason}")]
    Work { device: String, reason: String },
    #[error("{call}: {source}")]
    System { call: &'static str, source: io::Error },
}

impl RdmaError {
    pub(crate) fn system(call: &'static str) -> impl FnOnce(io::Error) -> RdmaError {
        move |source| RdmaError::System { call, source }
    }

    /// Whether memory was not there as it was said to be.
    pub(crate) fn is_fault(&self) -> bool {
        matches!(self, RdmaError::Call { source, .. } if source.raw_os_error() == Some(libc::EFAULT))
    }
}

/// The outcome of a call that returns zero, an error number, or -1 with `errno` set.
pub(crate) fn check(code: c_int, call: &'static str, device: &str) -> Result<(), RdmaError> {
    let source = match code {
        0 => return Ok(()),
        -1 => io::Error::last_os_error(),
        code => io::Error::from_raw_os_error(code),
    };
    Err(RdmaError::Call { call, device: device.into(), source })
}

/// What a call returned that answers null, with `errno` set, when it fails.
pub(crate) fn check_pointer<T>(
    pointer: *mut T,
    call: &'static str,
    device: &str,
) -> Result<std::ptr::NonNull<T>, RdmaError> {
    let source = io::Error::last_os_error();
    std::ptr::NonNull::new(pointer).ok_or_else(|| RdmaError::Call { call, device: device.into(), source })
}
