//! The one place that turns values into bytes and back.
//!
//! Layout: three bytes of magic, one byte of kind, two bytes of format version (little endian),
//! then the value in bincode's `legacy` configuration (fixed-width little-endian integers, 64-bit
//! lengths, 32-bit enum tags). That configuration has exactly one encoding for each value, which
//! is what lets a manifest be named by the hash of its bytes.

use bincode::{Decode, Encode};
use thiserror::Error;

const MAGIC: [u8; 3] = *b"AQF";
const HEADER_BYTES: usize = 6;

/// What a blob claims to be, so that one kind of signed or hashed bytes can never stand in for
/// another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Manifest = 1,
    Release = 2,
    SignedRelease = 3,
    Status = 4,
    SignedStatus = 5,
    Gossip = 6,
    Peer = 7,
    Statement = 8,
    SignedStatement = 9,
    /// Where a node stands in a rollout, on its own disk.
    Stand = 10,
    /// A rollout's policy, on its way between an operator's program and an agent.
    Policy = 11,
    /// The beginning of a node's recording, and each frame after it.
    Recording = 16,
    RecordingFrame = 17,
}

impl Kind {
    /// The format that this build writes, and the only one it reads.
    fn version(self) -> u16 {
        match self {
            // 2: short tensors lie in packs.
            Kind::Manifest => 2,
            // 2: the rollout's policy, and to which release one goes back.
            Kind::Release => 2,
            // 2: reports of rollouts, and what is said of releases. 3: who drains, and how fast nodes are.
            Kind::Status | Kind::SignedStatus | Kind::Gossip | Kind::Peer => 3,
            Kind::SignedRelease
            | Kind::Statement
            | Kind::SignedStatement
            | Kind::Stand
            | Kind::Policy
            | Kind::Recording
            | Kind::RecordingFrame => 1,
        }
    }
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum CodecError {
    #[error("not an Aquifer {kind:?}: the first bytes are wrong")]
    Magic { kind: Kind },
    #[error(
        "format version {found} of a {kind:?}; this build reads version {}: the two ends need the same release of Aquifer",
        kind.version()
    )]
    Version { kind: Kind, found: u16 },
    #[error("{kind:?} of {len} bytes exceeds the limit of {limit}")]
    TooLong { kind: Kind, len: usize, limit: usize },
    #[error("malformed {kind:?}: {reason}")]
    Malformed { kind: Kind, reason: String },
}

/// The bytes of `value`, headed by `kind`.
pub fn encode<T: Encode>(kind: Kind, value: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(256);
    bytes.extend_from_slice(&MAGIC);
    bytes.push(kind as u8);
    bytes.extend_from_slice(&kind.version().to_le_bytes());
    append(&mut bytes, value);
    bytes
}

/// Adds `value` to `bytes` without a head: for what is hashed and never read back.
pub fn append<T: Encode>(bytes: &mut Vec<u8>, value: &T) {
    bincode::encode_into_std_write(value, bytes, bincode::config::legacy())
        .expect("encoding into a Vec cannot fail: no type here refuses to be encoded");
}

/// The value in `bytes`. `LIMIT` bounds both the input and what decoding may allocate, so a
/// hostile length cannot ask for more memory than an honest message of that size.
pub fn decode<T: Decode<()>, const LIMIT: usize>(kind: Kind, bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > LIMIT {
        return Err(CodecError::TooLong { kind, len: bytes.len(), limit: LIMIT });
    }
    let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(CodecError::Magic { kind });
    };
    if header[..3] != MAGIC || header[3] != kind as u8 {
        return Err(CodecError::Magic { kind });
    }
    let found = u16::from_le_bytes([header[4], header[5]]);
    if found != kind.version() {
        return Err(CodecError::Version { kind, found });
    }
    let config = bincode::config::legacy().with_limit::<LIMIT>();
    let malformed = |reason: String| CodecError::Malformed { kind, reason };
    let (value, used) = bincode::decode_from_slice(body, config).map_err(|e| malformed(e.to_string()))?;
    if used != body.len() {
        return Err(malformed(format!("{} bytes after its end", body.len() - used)));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_survives() {
        let bytes = encode(Kind::Gossip, &(7u32, "x".to_string()));
        assert_eq!(decode::<(u32, String), 1024>(Kind::Gossip, &bytes), Ok((7, "x".into())));
    }

    #[test]
    fn kinds_do_not_stand_in_for_each_other() {
        let bytes = encode(Kind::Status, &7u32);
        assert_eq!(decode::<u32, 64>(Kind::Release, &bytes), Err(CodecError::Magic { kind: Kind::Release }));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = encode(Kind::Status, &7u32);
        bytes.push(0);
        assert!(matches!(decode::<u32, 64>(Kind::Status, &bytes), Err(CodecError::Malformed { .. })));
    }

    #[test]
    fn a_hostile_length_is_refused_before_it_allocates() {
        let mut bytes = encode(Kind::Gossip, &0u64);
        let tail = bytes.len() - 8;
        bytes[tail..].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(decode::<Vec<u8>, 1024>(Kind::Gossip, &bytes).is_err());
    }

    #[test]
    fn an_older_reader_says_so() {
        let mut bytes = encode(Kind::Status, &7u32);
        bytes[4] = 9;
        assert_eq!(decode::<u32, 64>(Kind::Status, &bytes), Err(CodecError::Version { kind: Kind::Status, found: 9 }));
    }
}
