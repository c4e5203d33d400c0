//! Copies on one device, as few as possible: what changed goes from shadow memory to where an engine reads it.

use crate::device::{DeviceSpan, HostSpan, Stream};
use crate::error::DeviceError;

/// Queues a copy of each first span to its second one. Neighbours that stay neighbours are copied as one. No second
/// span may lie in another one.
pub fn apply<S: Stream>(stream: &mut S, pairs: &[(DeviceSpan, DeviceSpan)]) -> Result<(), DeviceError> {
    stream.copy_all(&runs(pairs.iter().cloned(), DeviceSpan::joined, keep_device))
}

/// The same, from host memory.
pub fn apply_from_host<S: Stream>(stream: &mut S, pairs: &[(HostSpan, DeviceSpan)]) -> Result<(), DeviceError> {
    stream.upload_all(&runs(pairs.iter().cloned(), HostSpan::joined, HostSpan::keeping))
}

/// Joins pairs whose both sides follow those of the pair before; `keep` makes what was joined keep its parts.
pub(crate) fn runs<F: Clone>(
    pairs: impl Iterator<Item = (F, DeviceSpan)>,
    joined: impl Fn(&F, &F) -> Option<F>,
    keep: impl Fn(F, Vec<F>) -> F,
) -> Vec<(F, DeviceSpan)> {
    let mut runs: Vec<(F, DeviceSpan, Vec<F>)> = Vec::new();
    for (from, to) in pairs {
        let both = runs.last().and_then(|(a, b, _)| Some((joined(a, &from)?, b.joined(&to)?)));
        match (both, runs.last_mut()) {
            (Some(both), Some((last_from, last_to, parts))) => {
                (*last_from, *last_to) = both;
                parts.push(from);
            }
            _ => runs.push((from.clone(), to, vec![from])),
        }
    }
    runs.into_iter().map(|(from, to, parts)| (keep(from, parts), to)).collect()
}

/// Spans of one allocation keep that, joined or not.
fn keep_device(joined: DeviceSpan, _: Vec<DeviceSpan>) -> DeviceSpan {
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, DeviceUuid, Twin};
    use aquifer_memory::Mapping;
    use std::sync::Arc;

    #[test]
    fn what_was_joined_keeps_the_guards_of_its_parts() {
        let twin = Twin::new(DeviceUuid([1; 16]));
        let registered = twin.register(&Mapping::anonymous(30).unwrap().span()).unwrap();
        let memory = twin.allocate(30).unwrap();
        let guard = Arc::new(());
        let part = |at: u64| {
            let from = registered.slice(at..at + 10).unwrap().guarded(guard.clone());
            (from, memory.slice(at..at + 10).unwrap())
        };
        let joined = runs([part(0), part(10), part(20)].into_iter(), HostSpan::joined, HostSpan::keeping);
        assert_eq!((joined.len(), joined[0].0.len(), joined[0].1.len()), (1, 30, 30));
        assert_eq!(Arc::strong_count(&guard), 4);
        drop(joined);
        assert_eq!(Arc::strong_count(&guard), 1);
        let apart = runs([part(0), part(20), part(10)].into_iter(), HostSpan::joined, HostSpan::keeping);
        assert_eq!(apart.len(), 3);
    }
}
