//! A device with memory of its own, as far as the program above it needs one.

use crate::error::DeviceError;
use crate::region::RegionHandle;
use crate::registered::Registration;
use crate::uuid::DeviceUuid;
use aquifer_core::ChunkHash;
use aquifer_memory::{Guard, Span};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// One GPU, or its twin in host memory.
pub trait Device: fmt::Debug + Clone + Send + Sync + 'static {
    type Stream: Stream;

    fn uuid(&self) -> DeviceUuid;

    /// Memory of this process on the device. What is in it is not said.
    fn allocate(&self, len: u64) -> Result<DeviceSpan, DeviceError>;

    /// Memory of another process on the device, as long as it keeps it.
    fn open(&self, region: &RegionHandle) -> Result<DeviceSpan, DeviceError>;

    /// Whether copies from this memory, of this or of another device, need not go by way of the host.
    fn reaches(&self, memory: &DeviceSpan) -> bool;

    /// Makes host memory fast to copy from and to: its pages stay where they are, until the last span made from
    /// what is returned is gone.
    fn register(&self, span: &Span) -> Result<HostSpan, DeviceError>;

    fn stream(&self) -> Result<Self::Stream, DeviceError>;
}

/// A queue of work for a device, done in the order in which it was queued. All calls return at once, but those that
/// say that they wait. Spans are kept as long as queued work needs them.
pub trait Stream: fmt::Debug + Send {
    /// A point in the queue.
    type Mark: fmt::Debug + Clone + Send;
    /// Digests that are to come.
    type Hashing: Send;

    fn upload(&mut self, from: &HostSpan, to: &DeviceSpan) -> Result<(), DeviceError>;
    /// Many of them, in any order.
    fn upload_all(&mut self, pairs: &[(HostSpan, DeviceSpan)]) -> Result<(), DeviceError> {
        pairs.iter().try_for_each(|(from, to)| self.upload(from, to))
    }
    fn copy(&mut self, from: &DeviceSpan, to: &DeviceSpan) -> Result<(), DeviceError>;
    /// Many of them, in any order. No target may lie in another's source or target.
    fn copy_all(&mut self, pairs: &[(DeviceSpan, DeviceSpan)]) -> Result<(), DeviceError> {
        pairs.iter().try_for_each(|(from, to)| self.copy(from, to))
    }
    /// From memory of another device, over what joins the two where they are joined, else by way of the host. Waits
    /// for no work of the other's.
    fn copy_across(&mut self, from: &DeviceSpan, to: &DeviceSpan) -> Result<(), DeviceError>;
    fn download(&mut self, from: &DeviceSpan, to: &HostSpan) -> Result<(), DeviceError>;
    /// The BLAKE3 hashes of many spans, of any lengths.
    fn hash(&mut self, spans: &[DeviceSpan]) -> Result<Self::Hashing, DeviceError>;
    /// Waits for them. They come in the order of the spans.
    fn digests(&mut self, hashing: Self::Hashing) -> Result<Vec<ChunkHash>, DeviceError>;
    /// Hashes them and waits: the seconds that the hashing itself took on the device, by its own clock.
    fn hash_seconds(&mut self, spans: &[DeviceSpan]) -> Result<f64, DeviceError>;

    /// Everything queued so far.
    fn mark(&mut self) -> Result<Self::Mark, DeviceError>;
    /// What is queued here from now on is done after `mark`, of any stream of this device.
    fn after(&mut self, mark: &Self::Mark) -> Result<(), DeviceError>;
    /// Waits until what is before `mark`, which must be of this stream, is done.
    fn wait(&mut self, mark: &Self::Mark) -> Result<(), DeviceError>;
}

/// A range of a device's memory, which it keeps. Cheap to clone; clones are the same bytes.
#[derive(Clone)]
pub struct DeviceSpan {
    device: DeviceUuid,
    owner: Guard,
    address: u64,
    len: u64,
}

impl DeviceSpan {
    pub(crate) fn new(device: DeviceUuid, owner: Guard, address: u64, len: u64) -> Self {
        DeviceSpan { device, owner, address, len }
    }

    pub fn device(&self) -> DeviceUuid {
        self.device
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn slice(&self, range: Range<u64>) -> Result<DeviceSpan, DeviceError> {
        if range.start > range.end || range.end > self.len {
            return Err(DeviceError::Bounds { begin: range.start, end: range.end, len: self.len });
        }
        Ok(DeviceSpan { address: self.address + range.start, len: range.end - range.start, ..self.clone() })
    }

    /// Whether these are the same bytes of the same device.
    pub fn is_same(&self, other: &DeviceSpan) -> bool {
        (self.device, self.address, self.len) == (other.device, other.address, other.len)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn owner(&self) -> &Guard {
        &self.owner
    }

    /// Both as one, where `next` begins where this ends.
    pub(crate) fn joined(&self, next: &DeviceSpan) -> Option<DeviceSpan> {
        let adjacent = Arc::ptr_eq(&self.owner, &next.owner) && self.address + self.len == next.address;
        adjacent.then(|| DeviceSpan { len: self.len + next.len, ..self.clone() })
    }

    pub(crate) fn check_device(&self, wanted: DeviceUuid) -> Result<(), DeviceError> {
        if self.device == wanted { Ok(()) } else { Err(DeviceError::OtherDevice { wanted, found: self.device }) }
    }
}

impl fmt::Debug for DeviceSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceSpan({} bytes of {})", self.len, self.device)
    }
}

/// A range of host memory to copy from or to, and whether it is registered for that.
#[derive(Clone, Debug)]
pub struct HostSpan {
    span: Span,
    registration: Option<Arc<Registration>>,
}

impl HostSpan {
    /// Memory that is not registered: it is copied by way of staging memory.
    pub fn pageable(span: Span) -> Self {
        HostSpan { span, registration: None }
    }

    pub(crate) fn registered(span: Span, registration: Arc<Registration>) -> Self {
        HostSpan { span, registration: Some(registration) }
    }

    pub fn is_registered(&self) -> bool {
        self.registration.is_some()
    }

    pub fn span(&self) -> &Span {
        &self.span
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.span.len()
    }

    pub fn is_empty(&self) -> bool {
        self.span.is_empty()
    }

    pub fn slice(&self, range: Range<u64>) -> Result<HostSpan, DeviceError> {
        Ok(HostSpan { span: self.span.slice(range)?, registration: self.registration.clone() })
    }

    /// The same bytes; `guard` is dropped with the last span made from this one, and when no copy needs it any more.
    pub fn guarded(self, guard: Guard) -> Self {
        HostSpan { span: self.span.guarded(guard), ..self }
    }

    /// The same bytes, which keep all of `parts` and their guards.
    pub(crate) fn keeping(self, parts: Vec<HostSpan>) -> Self {
        if parts.len() > 1 { self.guarded(Arc::new(parts)) } else { self }
    }

    pub(crate) fn registration(&self) -> Option<&Registration> {
        self.registration.as_deref()
    }

    /// Both as one, where `next` begins where this ends.
    pub(crate) fn joined(&self, next: &HostSpan) -> Option<HostSpan> {
        let same = match (&self.registration, &next.registration) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        let ((mapping, begin), (other, next_begin)) = (self.span.mapping(), next.span.mapping());
        if !same || !Arc::ptr_eq(mapping, other) || begin + self.len() != next_begin {
            return None;
        }
        let span = mapping.span().slice(begin..next_begin + next.len()).ok()?;
        Some(HostSpan { span, registration: self.registration.clone() })
    }
}
