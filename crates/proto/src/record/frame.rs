//! Events in a stream of bytes: each frame is checked against all that came before it, so that
//! what was changed, left out or moved is found, and what was cut off in the middle is told apart.
//!
//! A recording is a header, then frames: the body's length (u32, little endian), four bytes that
//! check the length, the body, eight bytes that check the body. Checks are the first bytes of a
//! BLAKE3 hash over the chain so far and what is checked; they are no protection against somebody
//! who writes a recording of his own.

use super::{FORMAT, RecordError};
use crate::limits::RECORD_FRAME_BYTES_MAX;
use aquifer_core::Hash;
use aquifer_core::codec::{self, Kind};

const HEADER_BYTES: usize = 8;
const LENGTH_BYTES: usize = 8;
const CHECK_BYTES: usize = 8;

pub(super) fn header() -> Vec<u8> {
    codec::encode(Kind::Recording, &FORMAT)
}

/// The hash of all bytes before the next frame.
#[derive(Clone, Copy, Debug)]
struct Chain(Hash);

impl Chain {
    fn with(self, bytes: &[u8]) -> Chain {
        Chain(Hash::of(&[&self.0.0[..], bytes].concat()))
    }

    fn check<const N: usize>(self) -> [u8; N] {
        let mut check = [0; N];
        check.copy_from_slice(&self.0.0[..N]);
        check
    }

    /// The first bytes of a frame whose body has this length.
    fn length(self, bytes: u32) -> [u8; LENGTH_BYTES] {
        let length = bytes.to_le_bytes();
        let mut head = [0; LENGTH_BYTES];
        head[..4].copy_from_slice(&length);
        head[4..].copy_from_slice(&self.with(&length).check::<4>());
        head
    }
}

#[derive(Debug)]
pub(super) struct Writer(Chain);

impl Writer {
    pub(super) fn after(header: &[u8]) -> Self {
        Writer(Chain(Hash::of(header)))
    }

    /// Appends a frame. The body is at most [`RECORD_FRAME_BYTES_MAX`] long.
    pub(super) fn seal(&mut self, body: &[u8], into: &mut Vec<u8>) {
        let length = u32::try_from(body.len()).expect("the longest frame is far below 4 GiB");
        into.extend(self.0.length(length));
        self.0 = self.0.with(body);
        into.extend(body);
        into.extend(self.0.check::<CHECK_BYTES>());
    }
}

/// Cuts the stream into frames' bodies.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// Received and not yet read, from `begin` on; at most one frame and one piece are kept.
    buffer: Vec<u8>,
    begin: usize,
    /// Where in the stream `begin` is.
    offset: u64,
    chain: Option<Chain>,
}

impl Reader {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.begin);
        self.begin = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next body and where its frame began; None if there is none whole yet.
    pub(super) fn next(&mut self) -> Result<Option<(u64, &[u8])>, RecordError> {
        let chain = match self.chain {
            Some(chain) => chain,
            None => match self.header()? {
                Some(chain) => chain,
                None => return Ok(None),
            },
        };
        let (offset, rest) = (self.offset, &self.buffer[self.begin..]);
        let damaged = Err(RecordError::Damaged { offset });
        let Some((head, rest)) = rest.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        if *head != chain.length(length) || length as usize > RECORD_FRAME_BYTES_MAX {
            return damaged;
        }
        let Some((body, rest)) = rest.split_at_checked(length as usize) else { return Ok(None) };
        let Some(check) = rest.first_chunk::<CHECK_BYTES>() else { return Ok(None) };
        let chain = chain.with(body);
        if *check != chain.check() {
            return damaged;
        }
        self.chain = Some(chain);
        self.advance(LENGTH_BYTES + length as usize + CHECK_BYTES);
        let end = self.begin - CHECK_BYTES;
        Ok(Some((offset, &self.buffer[end - length as usize..end])))
    }

    /// Bytes that are no whole frame: the end of a recording whose writer was stopped.
    pub(super) fn torn_bytes(&self) -> usize {
        self.buffer.len() - self.begin
    }

    fn header(&mut self) -> Result<Option<Chain>, RecordError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let found = codec::decode::<u16, HEADER_BYTES>(Kind::Recording, header).map_err(RecordError::Foreign)?;
        if found != FORMAT {
            return Err(RecordError::Format { found });
        }
        let chain = Chain(Hash::of(header));
        self.chain = Some(chain);
        self.advance(HEADER_BYTES);
        Ok(Some(chain))
    }

    fn advance(&mut self, bytes: usize) {
        self.begin += bytes;
        self.offset += bytes as u64;
    }
}
