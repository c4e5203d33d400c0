//! The bytes on a TCP data connection. Integers are little endian.
//!
//! ```text
//! reader                                   holder
//!                     (see `crate::handshake`)
//! Request    magic chunk lease length      →            (several may be under way)
//!                                          ← Header     magic status chunk length
//!                                          ← the bytes, if the status is "data"
//!                                          ← Trailer    1: they were valid all the while; 0: revoked
//! ```
//!
//! The bytes are neither encrypted nor authenticated; the reader knows what they must hash to.

use crate::handshake::{Answer, Malformed, answer_code, answer_of_code, at};

const REQUEST_MAGIC: [u8; 4] = *b"AQRQ";
const HEADER_MAGIC: [u8; 4] = *b"AQRS";

pub(super) const REQUEST_BYTES: usize = 20;
pub(super) const HEADER_BYTES: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) chunk: u32,
    pub(super) lease: u64,
    pub(super) len: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) answer: Answer,
    pub(super) chunk: u32,
    pub(super) len: u32,
}

impl Request {
    pub(super) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC);
        bytes[4..8].copy_from_slice(&self.chunk.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.lease.to_le_bytes());
        bytes[16..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Malformed> {
        if bytes[..4] != REQUEST_MAGIC {
            return Err("it sent something that is not a request");
        }
        Ok(Request {
            chunk: u32::from_le_bytes(at(bytes, 4)),
            lease: u64::from_le_bytes(at(bytes, 8)),
            len: u32::from_le_bytes(at(bytes, 16)),
        })
    }
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&HEADER_MAGIC);
        bytes[4] = answer_code(self.answer);
        bytes[8..12].copy_from_slice(&self.chunk.to_le_bytes());
        bytes[12..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        if bytes[..4] != HEADER_MAGIC {
            return Err("it answered with something that is not a header");
        }
        Ok(Header {
            answer: answer_of_code(bytes[4])?,
            chunk: u32::from_le_bytes(at(bytes, 8)),
            len: u32::from_le_bytes(at(bytes, 12)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Refusal;

    #[test]
    fn frames_survive_their_bytes() {
        let request = Request { chunk: 1, lease: u64::MAX, len: 4 << 20 };
        assert_eq!(Request::decode(&request.encode()), Ok(request));
        let header = Header { answer: Err(Refusal::Gone), chunk: 4, len: 5 };
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn garbage_is_refused() {
        assert!(Request::decode(&[0; REQUEST_BYTES]).is_err());
        assert!(Header::decode(&[0; HEADER_BYTES]).is_err());
    }
}
