//! Buffers that outlive the reads they serve.
//!
//! A connection needs one while bytes arrive, and is idle for most of its life: forty that each had their own were half of
//! what an agent had allocated. Connections come and go with each release, each on a thread of its own: were its buffer
//! freed and another allocated each time, the allocator would keep some of that for every thread that ever had one.

use crate::limits::RECEIVE_PIECE_BYTES;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers kept for the next read. Guess: reads that are under way at once where a node is busy.
const KEPT_MAX: usize = 16;

#[derive(Debug, Default)]
pub(crate) struct Pieces(Mutex<Vec<Box<[u8]>>>);

/// [`RECEIVE_PIECE_BYTES`], given back when it is dropped. What it holds is of no use to anybody.
#[derive(Debug)]
pub(crate) struct Piece {
    bytes: Box<[u8]>,
    home: Arc<Pieces>,
}

impl Pieces {
    pub(crate) fn take(self: &Arc<Self>) -> Piece {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = kept.unwrap_or_else(|| vec![0; RECEIVE_PIECE_BYTES].into_boxed_slice());
        Piece { bytes, home: self.clone() }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut kept = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(std::mem::take(&mut self.bytes));
        }
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_taken_again() {
        let pieces = Arc::new(Pieces::default());
        let first = pieces.take();
        let at = first.as_ptr();
        drop(first);
        let again = pieces.take();
        assert_eq!((again.as_ptr(), again.len()), (at, RECEIVE_PIECE_BYTES));
        let many: Vec<Piece> = (0..KEPT_MAX + 5).map(|_| pieces.take()).collect();
        drop((many, again));
        assert_eq!(pieces.0.lock().unwrap().len(), KEPT_MAX);
    }
}
