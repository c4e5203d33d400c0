//! Frames of the control stream: four bytes of length, little endian, then so many bytes.

use crate::limits::{BUFFER_BYTES_KEPT, MESSAGE_BYTES_MAX};

const HEAD_BYTES: usize = 4;

/// Appends `body` as a frame.
pub(super) fn put(buffer: &mut Vec<u8>, body: &[u8]) {
    // A body that long is refused by whoever reads it; it must not pass for a short one.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(body);
}

/// Cuts what a stream delivers into frames. Holds what has arrived and never more: a length is
/// only believed as its bytes come in.
#[derive(Debug, Default)]
pub(super) struct Frames {
    arrived: Vec<u8>,
    taken: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong(pub(super) usize);

impl Frames {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.arrived.drain(..self.taken);
        self.taken = 0;
        if self.arrived.is_empty() && self.arrived.capacity() > BUFFER_BYTES_KEPT {
            self.arrived = Vec::new();
        }
        self.arrived.extend_from_slice(bytes);
    }

    /// The next whole frame's body.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, TooLong> {
        let waiting = &self.arrived[self.taken..];
        let Some((head, rest)) = waiting.split_first_chunk::<HEAD_BYTES>() else { return Ok(None) };
        let length = usize::try_from(u32::from_le_bytes(*head)).unwrap_or(usize::MAX);
        if length > MESSAGE_BYTES_MAX {
            return Err(TooLong(length));
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        self.taken += HEAD_BYTES + length;
        Ok(Some(body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_cutting() {
        let bodies = [vec![], vec![1], vec![2; 300], vec![3; 70_000]];
        let mut bytes = Vec::new();
        bodies.iter().for_each(|body| put(&mut bytes, body));
        for step in [1, 2, 3, 5, 64, 1000, bytes.len()] {
            let (mut frames, mut seen) = (Frames::default(), Vec::new());
            for piece in bytes.chunks(step) {
                frames.push(piece);
                while let Some(body) = frames.next().unwrap() {
                    seen.push(body.to_vec());
                }
            }
            assert_eq!(seen, bodies, "in pieces of {step}");
        }
    }

    #[test]
    fn a_hostile_length_is_refused_at_once() {
        let mut frames = Frames::default();
        frames.push(&u32::MAX.to_le_bytes());
        assert_eq!(frames.next(), Err(TooLong(u32::MAX as usize)));
        let mut frames = Frames::default();
        frames.push(&u32::try_from(MESSAGE_BYTES_MAX).unwrap().to_le_bytes());
        assert_eq!(frames.next(), Ok(None));
    }
}
