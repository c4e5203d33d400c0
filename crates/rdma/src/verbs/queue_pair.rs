//! Reliable connections between two queue pairs, and what is posted on them.

use super::completion::CompletionQueue;
use super::device::{Gid, LinkLayer, Port};
use super::region::{ProtectionDomain, Region, RemoteRegion, Window};
use crate::error::{RdmaError, check, check_pointer};
use crate::ibv::{
    IBV_ACCESS_REMOTE_READ, IBV_QP_ACCESS_FLAGS, IBV_QP_AV, IBV_QP_DEST_QPN, IBV_QP_MAX_DEST_RD_ATOMIC,
    IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER, IBV_QP_PATH_MTU, IBV_QP_PKEY_INDEX, IBV_QP_PORT, IBV_QP_RETRY_CNT,
    IBV_QP_RNR_RETRY, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE, IBV_QP_TIMEOUT, IBV_QPS_ERR, IBV_QPS_INIT,
    IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPT_RC, IBV_SEND_SIGNALED, IBV_WR_BIND_MW, IBV_WR_LOCAL_INV, IBV_WR_RDMA_READ,
    ibv_gid, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_send_wr, ibv_sge, wr_bind_mw, wr_rdma,
};
use crate::limits::{HOP_LIMIT, RETRY_COUNT_MAX, RNR_TIMER};
use aquifer_memory::Span;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How one side of a connection is reached: told to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub queue_pair: u32,
    /// The first packet sequence number it sends; random, so that packets of an earlier connection fit none.
    pub sequence: u32,
    pub gid: [u8; 16],
    pub lid: u16,
    /// As [`Port::mtu_code`].
    pub mtu_code: u8,
    /// READs it answers at a time, and READs it has under way at a time.
    pub reads_in: u8,
    pub reads_out: u8,
}

/// What may be tuned of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePairConfig {
    /// The longest time until a request is repeated is 4.096 µs × 2^this, at 1 to 31.
    pub ack_timeout_exponent: u8,
    /// At most [`RETRY_COUNT_MAX`]; a higher one is that.
    pub retry_count: u8,
    /// For networks that sort by it: DSCP and ECN bits of the packets.
    pub traffic_class: u8,
}

/// One end of a reliable connection. Nothing is ever received on it, and the other end may read only.
pub struct QueuePair {
    domain: Arc<ProtectionDomain>,
    completions: Arc<CompletionQueue>,
    qp: NonNull<ibv_qp>,
    /// Memory of requests whose completions have not been seen: registered until then.
    in_use: Mutex<BTreeMap<u64, Arc<Region>>>,
}

// SAFETY: libibverbs' calls on a queue pair may come from any thread at the same time; this value only
// ever hands the pointer to such calls.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// A queue pair for `depth` requests at a time, whose completions go to `completions`.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        completions: &Arc<CompletionQueue>,
        depth: u32,
    ) -> Result<Self, RdmaError> {
        let device = domain.device();
        let mut attr = ibv_qp_init_attr {
            qp_context: null_mut(),
            send_cq: completions.as_ptr(),
            recv_cq: completions.as_ptr(),
            srq: null_mut(),
            cap: ibv_qp_cap {
                max_send_wr: depth,
                max_recv_wr: 1,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: the domain and the queue are alive and stay so as long as this value.
        let qp = unsafe { (device.library.ibv_create_qp)(domain.as_ptr(), &raw mut attr) };
        let qp = check_pointer(qp, "ibv_create_qp", device.name())?;
        Ok(QueuePair { domain: domain.clone(), completions: completions.clone(), qp, in_use: Mutex::default() })
    }

    pub fn number(&self) -> u32 {
        // SAFETY: the queue pair is alive.
        unsafe { (*self.qp.as_ptr()).qp_num }
    }

    /// Connects with the queue pair at `remote`, which connects with this one by `local`.
    pub fn connect(
        &self,
        port: &Port,
        gid: &Gid,
        local: &Address,
        remote: &Address,
        config: QueuePairConfig,
    ) -> Result<(), RdmaError> {
        let mut attr = attributes(IBV_QPS_INIT);
        attr.port_num = port.number;
        attr.qp_access_flags = IBV_ACCESS_REMOTE_READ.unsigned_abs();
        let init = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
        self.modify(&mut attr, init, "ibv_modify_qp to INIT")?;

        let mut attr = attributes(IBV_QPS_RTR);
        attr.path_mtu = u32::from(local.mtu_code.min(remote.mtu_code));
        attr.dest_qp_num = remote.queue_pair;
        attr.rq_psn = remote.sequence;
        attr.max_dest_rd_atomic = local.reads_in.min(remote.reads_out);
        attr.min_rnr_timer = RNR_TIMER;
        attr.ah_attr.is_global = u8::from(port.link == LinkLayer::Ethernet);
        attr.ah_attr.dlid = remote.lid;
        attr.ah_attr.port_num = port.number;
        attr.ah_attr.grh.dgid = ibv_gid { raw: remote.gid };
        attr.ah_attr.grh.sgid_index = u8::try_from(gid.index).unwrap_or(u8::MAX);
        attr.ah_attr.grh.hop_limit = HOP_LIMIT;
        attr.ah_attr.grh.traffic_class = config.traffic_class;
        let path = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
        self.modify(&mut attr, path | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER, "ibv_modify_qp to RTR")?;

        let mut attr = attributes(IBV_QPS_RTS);
        attr.sq_psn = local.sequence;
        attr.timeout = config.ack_timeout_exponent.clamp(1, 31);
        attr.retry_cnt = config.retry_count.min(RETRY_COUNT_MAX);
        attr.rnr_retry = RETRY_COUNT_MAX;
        attr.max_rd_atomic = local.reads_out.min(remote.reads_in);
        let patience = IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY;
        let sending = IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(&mut attr, sending | patience, "ibv_modify_qp to RTS")
    }

    /// Stops it: every request under way completes, as flushed if not otherwise.
    pub fn stop(&self) -> Result<(), RdmaError> {
        self.modify(&mut attributes(IBV_QPS_ERR), IBV_QP_STATE, "ibv_modify_qp to ERR")
    }

    /// Reads `from` into `into`, a part of `region`. The memory stays registered until
    /// [`QueuePair::completed`] is told of the completion, or this is dropped.
    pub fn read(&self, id: u64, region: &Arc<Region>, into: &Span, from: RemoteRegion) -> Result<(), RdmaError> {
        let place = into.is_writable().then(|| region.locate(into)).flatten();
        let Some((address, len)) = place.filter(|(_, len)| *len == from.len) else {
            return Err(self.wrong("a READ must land in writable memory of its region, as long as what it reads"));
        };
        let mut piece = ibv_sge { addr: address, length: len, lkey: region.local_key() };
        let mut request = self.request(id, IBV_WR_RDMA_READ);
        request.sg_list = &raw mut piece;
        request.num_sge = 1;
        request.wr.rdma = wr_rdma { remote_addr: from.address, rkey: from.key };
        self.lock().insert(id, region.clone());
        let posted = self.post(&mut request);
        if posted.is_err() {
            self.completed(id);
        }
        posted
    }

    /// Opens `window` on `part` of `region` for reading by the other end, and returns what that needs.
    /// It is open when the request has completed, of which [`QueuePair::bound`] is to be told.
    pub fn bind(
        &self,
        id: u64,
        window: &mut Window,
        region: &Arc<Region>,
        part: &Span,
    ) -> Result<RemoteRegion, RdmaError> {
        let Some((address, len)) = region.locate(part) else {
            return Err(self.wrong("a window must show a part of its region"));
        };
        if window.shown().is_some() {
            return Err(self.wrong("a window shows something already"));
        }
        let key = window.next_key();
        let mut request = self.request(id, IBV_WR_BIND_MW);
        request.bind_mw = wr_bind_mw {
            mw: window.as_ptr(),
            rkey: key,
            mr: region.as_ptr(),
            addr: address,
            length: u64::from(len),
            mw_access_flags: IBV_ACCESS_REMOTE_READ.unsigned_abs(),
        };
        window.show(region.clone());
        self.post(&mut request)?;
        Ok(RemoteRegion { address, len, key })
    }

    /// The binding of `window` has completed.
    pub fn bound(&self, window: &mut Window) {
        window.note_bound();
    }

    /// Closes `window`: once the request has completed and [`QueuePair::closed`] is told, its key opens
    /// nothing.
    pub fn close(&self, id: u64, window: &Window) -> Result<(), RdmaError> {
        let mut request = self.request(id, IBV_WR_LOCAL_INV);
        request.invalidate_rkey = window.key();
        self.post(&mut request)
    }

    /// The closing of `window` has completed.
    pub fn closed(&self, window: &mut Window) {
        *window.shown() = None;
    }

    /// The completion of a READ was seen: its memory is not this queue pair's any more.
    pub fn completed(&self, id: u64) {
        self.lock().remove(&id);
    }

    fn modify(&self, attr: &mut ibv_qp_attr, mask: i32, call: &'static str) -> Result<(), RdmaError> {
        let device = self.domain.device();
        // SAFETY: the queue pair is alive, and `attr` a whole structure of which the members that `mask`
        // names are set.
        check(unsafe { (device.library.ibv_modify_qp)(self.qp.as_ptr(), attr, mask) }, call, device.name())
    }

    fn request(&self, id: u64, opcode: u32) -> ibv_send_wr {
        // SAFETY: all of it are integers and pointers, for which zero is a value.
        let mut request: ibv_send_wr = unsafe { MaybeUninit::zeroed().assume_init() };
        request.wr_id = id;
        request.opcode = opcode;
        request.send_flags = IBV_SEND_SIGNALED;
        request
    }

    fn post(&self, request: &mut ibv_send_wr) -> Result<(), RdmaError> {
        let device = self.domain.device();
        let mut bad = null_mut();
        // SAFETY: the queue pair is alive and the request whole; the library copies it before it returns.
        // The memory it names is registered, and stays so until it has completed or the queue pair is
        // gone: see `in_use` and `Window::shown`.
        let code = unsafe { ((*device.context.as_ptr()).ops.post_send)(self.qp.as_ptr(), request, &raw mut bad) };
        check(code, "ibv_post_send", device.name())
    }

    fn wrong(&self, reason: &str) -> RdmaError {
        let source = io::Error::new(io::ErrorKind::InvalidInput, reason);
        RdmaError::Call { call: "ibv_post_send", device: self.domain.device().name().into(), source }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Region>>> {
        // Each change is a single insert or remove.
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        let device = self.domain.device();
        // SAFETY: the queue pair is alive and not used any more. Once it is destroyed, its requests
        // touch no memory (InfiniBand specification, 10.2.4.4), so what they used may go afterwards.
        let code = unsafe { (device.library.ibv_destroy_qp)(self.qp.as_ptr()) };
        if let Err(error) = check(code, "ibv_destroy_qp", device.name()) {
            // The device may still write: the memory must stay where it is for ever.
            tracing::error!("{error}");
            std::mem::forget(std::mem::take(&mut *self.lock()));
            std::mem::forget(self.completions.clone());
        }
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QueuePair({} on {}, {} reads)", self.number(), self.domain.device().name(), self.lock().len())
    }
}

fn attributes(state: u32) -> ibv_qp_attr {
    const _: () = assert!(size_of::<ibv_qp_attr>() == 144);
    // SAFETY: all of it are integers.
    let mut attr: ibv_qp_attr = unsafe { MaybeUninit::zeroed().assume_init() };
    attr.qp_state = state;
    attr
}
