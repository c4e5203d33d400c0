//! Copies on one device, as few as possible: what changed goes from shadow memory to where an engine reads it.

use crate::device::{DeviceSpan, HostSpan, Stream};
use crate::error::DeviceError;

/// Queues a copy of each first span to its second one. Neighbours that stay neighbours are copied as one. No second
/// span may lie in another one.
pub fn apply<S: Stream>(stream: &mut S, pairs: &[(DeviceSpan, DeviceSpan)]) -> Result<(), DeviceError> {
    stream.copy_all(&runs(pairs.iter().cloned(), DeviceSpan::joined))
}

/// The same, from host memory.
pub fn apply_from_host<S: Stream>(stream: &mut S, pairs: &[(HostSpan, DeviceSpan)]) -> Result<(), DeviceError> {
    stream.upload_all(&runs(pairs.iter().cloned(), HostSpan::joined))
}

/// Joins pairs whose both sides follow those of the pair before.
pub(crate) fn runs<F>(
    pairs: impl Iterator<Item = (F, DeviceSpan)>,
    joined: impl Fn(&F, &F) -> Option<F>,
) -> Vec<(F, DeviceSpan)> {
    let mut runs: Vec<(F, DeviceSpan)> = Vec::new();
    for (from, to) in pairs {
        let both = runs.last().and_then(|(a, b)| Some((joined(a, &from)?, b.joined(&to)?)));
        match (both, runs.last_mut()) {
            (Some(both), Some(last)) => *last = both,
            _ => runs.push((from, to)),
        }
    }
    runs
}
