//! Completion queues, and the events that say when to look at them.

use super::device::Device;
use crate::error::{RdmaError, check, check_pointer};
use crate::ibv::{IBV_WC_REM_ACCESS_ERR, IBV_WC_SUCCESS, IBV_WC_WR_FLUSH_ERR, ibv_comp_channel, ibv_cq, ibv_wc};
use crate::limits::POLL_BATCH;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::ffi::CStr;
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

/// The end of one posted request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// As it was posted.
    pub id: u64,
    pub result: Result<(), WorkError>,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkError {
    /// The holder's device does not let that address be read by that key.
    Access,
    /// The queue pair had stopped before.
    Flushed,
    /// In the library's words, with its code: 12 where the other side does not answer.
    Other(String),
}

impl fmt::Display for WorkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WorkError::Access => write!(f, "the holder's device refuses the read (remote access error, status 10)"),
            WorkError::Flushed => write!(f, "the queue pair had stopped (flushed, status 5)"),
            WorkError::Other(text) => write!(f, "{text}"),
        }
    }
}

/// A queue of completions with a channel of its own. One thread polls it.
pub struct CompletionQueue {
    device: Arc<Device>,
    channel: NonNull<ibv_comp_channel>,
    cq: NonNull<ibv_cq>,
}

// SAFETY: libibverbs' calls on a completion queue may come from any thread at the same time; this value
// only ever hands the pointers to such calls.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue for at least `len` completions, or as many as the device allows.
    pub fn new(device: &Arc<Device>, len: u32) -> Result<Self, RdmaError> {
        let (library, name) = (device.library, device.name());
        // SAFETY: the context is open as long as `device` is.
        let channel = unsafe { (library.ibv_create_comp_channel)(device.context.as_ptr()) };
        let channel = check_pointer(channel, "ibv_create_comp_channel", name)?;
        let len = i32::try_from(len.min(device.limits().completions_max)).unwrap_or(i32::MAX);
        // SAFETY: context and channel are open; the queue carries no pointer of ours.
        let cq =
            unsafe { (library.ibv_create_cq)(device.context.as_ptr(), len.max(1), null_mut(), channel.as_ptr(), 0) };
        let cq = match check_pointer(cq, "ibv_create_cq", name) {
            Ok(cq) => cq,
            Err(error) => {
                // SAFETY: the channel was just made and nothing uses it.
                unsafe { (library.ibv_destroy_comp_channel)(channel.as_ptr()) };
                return Err(error);
            }
        };
        let queue = CompletionQueue { device: device.clone(), channel, cq };
        let flags = fcntl_getfl(queue.fd()).and_then(|flags| fcntl_setfl(queue.fd(), flags | OFlags::NONBLOCK));
        flags.map_err(|errno| RdmaError::System { call: "fcntl F_SETFL", source: errno.into() })?;
        queue.arm()?;
        Ok(queue)
    }

    /// Readable when there are completions and the queue was armed. To be followed by [`CompletionQueue::rearm`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel, and so its descriptor, is open as long as this value lives.
        unsafe { BorrowedFd::borrow_raw((*self.channel.as_ptr()).fd) }
    }

    /// Takes the events that made the channel readable and asks for the next. Whoever calls this must
    /// poll afterwards: what completed before is not told again.
    pub fn rearm(&self) -> Result<(), RdmaError> {
        let (mut cq, mut context) = (null_mut(), null_mut());
        let mut events = 0;
        // SAFETY: the channel is open and does not block; both results are written to live pointers.
        while unsafe { (self.device.library.ibv_get_cq_event)(self.channel.as_ptr(), &raw mut cq, &raw mut context) }
            == 0
        {
            events += 1;
        }
        // SAFETY: that many events of this queue, the only one of its channel, were taken.
        unsafe { (self.device.library.ibv_ack_cq_events)(self.cq.as_ptr(), events) };
        self.arm()
    }

    fn arm(&self) -> Result<(), RdmaError> {
        // SAFETY: the context outlives the queue, and its table of calls is complete once it is open.
        let code = unsafe { ((*self.device.context.as_ptr()).ops.req_notify_cq)(self.cq.as_ptr(), 0) };
        check(code, "ibv_req_notify_cq", self.device.name())
    }

    /// Appends what has completed, a batch at most; false when there was nothing.
    pub fn poll(&self, into: &mut Vec<Completion>) -> Result<bool, RdmaError> {
        let mut batch = [MaybeUninit::<ibv_wc>::uninit(); POLL_BATCH];
        let len = i32::try_from(batch.len()).unwrap_or(0);
        // SAFETY: the queue is alive, and `batch` has room for `len` completions.
        let found =
            unsafe { ((*self.device.context.as_ptr()).ops.poll_cq)(self.cq.as_ptr(), len, batch.as_mut_ptr().cast()) };
        let Ok(found) = usize::try_from(found) else {
            return Err(RdmaError::Work { device: self.device.name().into(), reason: "ibv_poll_cq failed".into() });
        };
        for wc in &batch[..found.min(POLL_BATCH)] {
            // SAFETY: the library wrote the first `found` of them; `wr_id` and `status` are written
            // whatever the status is.
            let wc = unsafe { wc.assume_init() };
            into.push(Completion { id: wc.wr_id, result: self.result(wc.status) });
        }
        Ok(found > 0)
    }

    fn result(&self, status: u32) -> Result<(), WorkError> {
        match status {
            IBV_WC_SUCCESS => Ok(()),
            IBV_WC_REM_ACCESS_ERR => Err(WorkError::Access),
            IBV_WC_WR_FLUSH_ERR => Err(WorkError::Flushed),
            status => {
                // SAFETY: the call takes any number and returns a C string that is never freed.
                let text = unsafe { CStr::from_ptr((self.device.library.ibv_wc_status_str)(status)) };
                Err(WorkError::Other(format!("{} (status {status})", text.to_string_lossy())))
            }
        }
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_cq {
        self.cq.as_ptr()
    }
}

impl AsFd for CompletionQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        let (library, name) = (self.device.library, self.device.name());
        // SAFETY: no queue pair uses the queue any more, since each holds an Arc of it, and all events
        // taken from it are acknowledged.
        let code = unsafe { (library.ibv_destroy_cq)(self.cq.as_ptr()) };
        let queue = check(code, "ibv_destroy_cq", name);
        // SAFETY: its only queue is gone.
        let code = unsafe { (library.ibv_destroy_comp_channel)(self.channel.as_ptr()) };
        for error in [queue, check(code, "ibv_destroy_comp_channel", name)].into_iter().filter_map(Result::err) {
            tracing::error!("{error}");
        }
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CompletionQueue({})", self.device.name())
    }
}
