//! Copies on one device, as few as possible: what changed goes from shadow memory to where an engine reads it.

use crate::device::{DeviceSpan, HostSpan, Stream};
use crate::error::DeviceError;

/// Queues a copy of each first span to its second one. Neighbours that stay neighbours are copied as one.
pub fn apply<S: Stream>(stream: &mut S, pairs: &[(DeviceSpan, DeviceSpan)]) -> Result<(), DeviceError> {
    runs(pairs.iter().cloned(), |a, b| a.joined(b)).try_for_each(|(from, to)| stream.copy(&from, &to))
}

/// The same, from host memory.
pub fn apply_from_host<S: Stream>(stream: &mut S, pairs: &[(HostSpan, DeviceSpan)]) -> Result<(), DeviceError> {
    runs(pairs.iter().cloned(), |a, b| a.joined(b)).try_for_each(|(from, to)| stream.upload(&from, &to))
}

/// Joins pairs whose both sides follow those of the pair before.
pub(crate) fn runs<F>(
    pairs: impl Iterator<Item = (F, DeviceSpan)>,
    joined: impl Fn(&F, &F) -> Option<F>,
) -> impl Iterator<Item = (F, DeviceSpan)> {
    let mut pairs = pairs.peekable();
    std::iter::from_fn(move || {
        let (mut from, mut to) = pairs.next()?;
        while let Some((next_from, next_to)) = pairs.peek() {
            let (Some(both_from), Some(both_to)) = (joined(&from, next_from), to.joined(next_to)) else { break };
            (from, to) = (both_from, both_to);
            pairs.next();
        }
        Some((from, to))
    })
}
