//! Host memory whose pages the driver has pinned, so that the copy engine reads it where it lies.

use crate::device::HostSpan;
use crate::driver::{Context, check, sys};
use crate::error::DeviceError;
use crate::limits::REGISTER_PIECE_BYTES;
use aquifer_memory::Span;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Undone on drop. A twin's is of no driver.
#[derive(Debug)]
pub(crate) struct Registration {
    /// Keeps the memory mapped while it is registered.
    span: Span,
    context: Option<Arc<Context>>,
    /// Those that are registered, by the address where they begin.
    pieces: Vec<u64>,
}

/// Registers all of `span`, in pieces and from many threads: the kernel pins pages on whichever asks.
pub(crate) fn register(context: &Arc<Context>, span: &Span) -> Result<HostSpan, DeviceError> {
    if span.as_mut_ptr().is_none() {
        return Err(DeviceError::NotMemory);
    }
    let count = (span.as_ptr() as u64 - origin(span) + span.len()).div_ceil(REGISTER_PIECE_BYTES);
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64).min(count);
    let outcomes: Vec<(Vec<u64>, Result<(), DeviceError>)> = std::thread::scope(|scope| {
        let work = || {
            let mut done = Vec::new();
            loop {
                let piece = next.fetch_add(1, Ordering::Relaxed);
                if piece >= count {
                    return (done, Ok(()));
                }
                match register_piece(context, span, piece) {
                    Ok(begin) => done.push(begin),
                    Err(error) => return (done, Err(error)),
                }
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("registering does not panic")).collect()
    });
    let (pieces, results): (Vec<_>, Vec<_>) = outcomes.into_iter().unzip();
    let registration = Registration {
        span: span.clone(),
        context: Some(context.clone()),
        pieces: pieces.into_iter().flatten().collect(),
    };
    // What was registered before an error is undone with it.
    results.into_iter().collect::<Result<(), _>>()?;
    Ok(HostSpan::registered(span.clone(), Arc::new(registration)))
}

/// As a registered span, for a device that has nothing to register.
pub(crate) fn pretend(span: &Span) -> HostSpan {
    let registration = Registration { span: span.clone(), context: None, pieces: Vec::new() };
    HostSpan::registered(span.clone(), Arc::new(registration))
}

impl Registration {
    /// Splits the range of `len` bytes at `address`, which lies in this one, where two registered pieces meet: no
    /// copy may cross that. Answers offsets into the range.
    pub(crate) fn pieces_of(&self, address: u64, len: u64) -> impl Iterator<Item = Range<u64>> {
        let begin = address - origin(&self.span);
        let mut at = 0;
        std::iter::from_fn(move || {
            let from = at;
            at = len.min((begin + from + 1).next_multiple_of(REGISTER_PIECE_BYTES) - begin);
            (from < len).then_some(from..at)
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let Some(context) = &self.context else { return };
        for piece in &self.pieces {
            let undone = context.enter().and_then(|()| {
                // SAFETY: this address was registered by `register_piece`, and is unregistered only here. Queued copies
                // keep their spans, and so this, until they are done.
                let code = unsafe { sys::cuMemHostUnregister(*piece as *mut _) };
                check(code, "cuMemHostUnregister", || "host memory".into())
            });
            if let Err(error) = undone {
                tracing::error!("host memory stays registered: {error}");
            }
        }
    }
}

/// From where pieces are counted: two of them never share a page.
fn origin(span: &Span) -> u64 {
    const PAGE_BYTES: u64 = 4096;
    let address = span.as_ptr() as u64;
    address - address % PAGE_BYTES
}

/// Answers the address where it begins.
fn register_piece(context: &Context, span: &Span, piece: u64) -> Result<u64, DeviceError> {
    let (address, from) = (span.as_ptr() as u64, origin(span) + piece * REGISTER_PIECE_BYTES);
    let begin = from.max(address);
    let len = (from + REGISTER_PIECE_BYTES).min(address + span.len()) - begin;
    context.enter()?;
    // SAFETY: the range lies in `span`, which the registration keeps mapped until it is undone.
    let code = unsafe {
        sys::cuMemHostRegister_v2(
            begin as *mut _,
            usize::try_from(len).expect("a mapping fits the address space"),
            sys::CU_MEMHOSTREGISTER_PORTABLE,
        )
    };
    check(code, "cuMemHostRegister", || {
        format!("{len} bytes of host memory (is memory locking limited? ulimit -l, LimitMEMLOCK= in the unit)")
    })?;
    Ok(begin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_memory::Mapping;

    #[test]
    fn copies_are_split_where_pieces_meet() {
        // No page of it is ever touched.
        let span = Mapping::anonymous(3 * REGISTER_PIECE_BYTES).unwrap().span();
        let host = pretend(&span);
        let split = |from: u64, len: u64| -> Vec<_> {
            host.registration().unwrap().pieces_of(span.as_ptr() as u64 + from, len).collect()
        };
        assert_eq!(split(0, 0), []);
        let (sub, address) = (pretend(&span.slice(100..2 * REGISTER_PIECE_BYTES).unwrap()), span.as_ptr() as u64);
        let mut cut = sub.registration().unwrap().pieces_of(address + 100, REGISTER_PIECE_BYTES);
        assert_eq!(cut.next(), Some(0..REGISTER_PIECE_BYTES - 100));
        assert_eq!(split(0, REGISTER_PIECE_BYTES).len(), 1);
        assert_eq!(split(REGISTER_PIECE_BYTES - 1, 2), [0..1, 1..2]);
        assert_eq!(
            split(5, 2 * REGISTER_PIECE_BYTES),
            [
                0..REGISTER_PIECE_BYTES - 5,
                REGISTER_PIECE_BYTES - 5..2 * REGISTER_PIECE_BYTES - 5,
                2 * REGISTER_PIECE_BYTES - 5..2 * REGISTER_PIECE_BYTES
            ]
        );
    }
}
