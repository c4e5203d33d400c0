//! The bytes on a TCP data connection. Integers are little endian.
//!
//! ```text
//! reader                                   holder
//! Hello      magic version 0 ticket nonce  →
//!                                          ← Challenge  magic version status nonce
//! Proof      keyed hash                    →
//!                                          ← Confirm    status, keyed hash
//! Request    magic chunk lease length      →            (several may be under way)
//!                                          ← Header     magic status chunk length
//!                                          ← the bytes, if the status is "data"
//!                                          ← Trailer    1: they were valid all the while; 0: revoked
//! ```
//!
//! The ticket's secret came over the authenticated control connection and never crosses this one:
//! each side proves that it knows it by hashing both nonces with it as the key. The bytes that
//! follow are neither encrypted nor authenticated; the reader knows what they must hash to.

use crate::Refusal;

const MAGIC: [u8; 4] = *b"AQDP";
const VERSION: u16 = 1;
const REQUEST_MAGIC: [u8; 4] = *b"AQRQ";
const HEADER_MAGIC: [u8; 4] = *b"AQRS";

const READER_CONTEXT: &[u8] = b"aquifer data plane 1: the reader knows the secret";
const HOLDER_CONTEXT: &[u8] = b"aquifer data plane 1: the holder knows the secret";

pub(super) const HELLO_BYTES: usize = 48;
pub(super) const CHALLENGE_BYTES: usize = 40;
pub(super) const PROOF_BYTES: usize = 32;
pub(super) const CONFIRM_BYTES: usize = 36;
pub(super) const REQUEST_BYTES: usize = 20;
pub(super) const HEADER_BYTES: usize = 16;

pub(super) type Nonce = [u8; 32];

/// What a peer sent that no honest one of this version would.
pub(super) type Malformed = &'static str;

/// Where a handshake stands, as the holder tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handshake {
    Good,
    /// The ticket is unknown, or the proof is wrong.
    Ticket,
    Version,
    /// The holder has as many connections as it wants.
    Busy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) version: u16,
    pub(super) ticket: u64,
    pub(super) nonce: Nonce,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    pub(super) status: Handshake,
    pub(super) nonce: Nonce,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Confirm {
    pub(super) status: Handshake,
    pub(super) proof: [u8; PROOF_BYTES],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) chunk: u32,
    pub(super) lease: u64,
    pub(super) len: u32,
}

/// What follows a header: data, or nothing.
pub(super) type Answer = Result<(), Refusal>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) answer: Answer,
    pub(super) chunk: u32,
    pub(super) len: u32,
}

/// Both sides' nonces and the ticket, from which either proof follows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transcript {
    pub(super) ticket: u64,
    pub(super) reader: Nonce,
    pub(super) holder: Nonce,
}

impl Transcript {
    pub(super) fn reader_proof(&self, secret: &[u8; 32]) -> blake3::Hash {
        self.proof(secret, READER_CONTEXT)
    }

    pub(super) fn holder_proof(&self, secret: &[u8; 32]) -> blake3::Hash {
        self.proof(secret, HOLDER_CONTEXT)
    }

    /// Compare as `blake3::Hash`: its equality takes the same time whatever differs.
    fn proof(&self, secret: &[u8; 32], context: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(secret);
        hasher.update(context).update(&self.ticket.to_le_bytes()).update(&self.reader).update(&self.holder);
        hasher.finalize()
    }
}

impl Hello {
    pub(super) fn new(ticket: u64, nonce: Nonce) -> Self {
        Hello { version: VERSION, ticket, nonce }
    }

    pub(super) fn is_our_version(&self) -> bool {
        self.version == VERSION
    }

    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.ticket.to_le_bytes());
        bytes[16..].copy_from_slice(&self.nonce);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, Malformed> {
        if bytes[..4] != MAGIC {
            return Err("it does not speak the data protocol");
        }
        Ok(Hello {
            version: u16::from_le_bytes(at(bytes, 4)),
            ticket: u64::from_le_bytes(at(bytes, 8)),
            nonce: at(bytes, 16),
        })
    }
}

impl Challenge {
    pub(super) fn encode(&self) -> [u8; CHALLENGE_BYTES] {
        let mut bytes = [0; CHALLENGE_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.status.code();
        bytes[8..].copy_from_slice(&self.nonce);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; CHALLENGE_BYTES]) -> Result<Self, Malformed> {
        if bytes[..4] != MAGIC {
            return Err("it does not speak the data protocol");
        }
        Ok(Challenge { status: Handshake::of_code(bytes[6])?, nonce: at(bytes, 8) })
    }
}

impl Confirm {
    pub(super) fn encode(&self) -> [u8; CONFIRM_BYTES] {
        let mut bytes = [0; CONFIRM_BYTES];
        bytes[0] = self.status.code();
        bytes[4..].copy_from_slice(&self.proof);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; CONFIRM_BYTES]) -> Result<Self, Malformed> {
        Ok(Confirm { status: Handshake::of_code(bytes[0])?, proof: at(bytes, 4) })
    }
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

impl Handshake {
    fn code(self) -> u8 {
        match self {
            Handshake::Good => 0,
            Handshake::Ticket => 1,
            Handshake::Version => 2,
            Handshake::Busy => 3,
        }
    }

    fn of_code(code: u8) -> Result<Self, Malformed> {
        [Handshake::Good, Handshake::Ticket, Handshake::Version, Handshake::Busy]
            .into_iter()
            .find(|h| h.code() == code)
            .ok_or("it answered the handshake with an unknown status")
    }
}

fn answer_code(answer: Answer) -> u8 {
    match answer {
        Ok(()) => 0,
        Err(Refusal::Expired) => 1,
        Err(Refusal::Unknown) => 2,
        Err(Refusal::Gone) => 3,
        Err(Refusal::Ticket) => 4,
    }
}

fn answer_of_code(code: u8) -> Result<Answer, Malformed> {
    [Ok(()), Err(Refusal::Expired), Err(Refusal::Unknown), Err(Refusal::Gone), Err(Refusal::Ticket)]
        .into_iter()
        .find(|answer| answer_code(*answer) == code)
        .ok_or("it answered with an unknown status")
}

/// `N` bytes from `offset` on. Offsets here are constants inside constant lengths.
fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    *bytes[offset..].first_chunk().expect("every caller's offset and length lie in its array")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_their_bytes() {
        let hello = Hello::new(7, [3; 32]);
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        let challenge = Challenge { status: Handshake::Busy, nonce: [9; 32] };
        assert_eq!(Challenge::decode(&challenge.encode()), Ok(challenge));
        let confirm = Confirm { status: Handshake::Good, proof: [1; 32] };
        assert_eq!(Confirm::decode(&confirm.encode()), Ok(confirm));
        let request = Request { chunk: 1, lease: u64::MAX, len: 4 << 20 };
        assert_eq!(Request::decode(&request.encode()), Ok(request));
        let header = Header { answer: Err(Refusal::Gone), chunk: 4, len: 5 };
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn garbage_is_refused() {
        assert!(Hello::decode(&[0; HELLO_BYTES]).is_err());
        assert!(Challenge::decode(&[0; CHALLENGE_BYTES]).is_err());
        assert!(Confirm::decode(&[9; CONFIRM_BYTES]).is_err());
        assert!(Request::decode(&[0; REQUEST_BYTES]).is_err());
        assert!(Header::decode(&[0; HEADER_BYTES]).is_err());
    }

    #[test]
    fn a_proof_is_for_one_side_and_one_pair_of_nonces() {
        let t = Transcript { ticket: 1, reader: [1; 32], holder: [2; 32] };
        let proof = t.reader_proof(&[7; 32]);
        assert_ne!(proof, t.holder_proof(&[7; 32]));
        assert_ne!(proof, t.reader_proof(&[8; 32]));
        assert_ne!(proof, Transcript { reader: [3; 32], ..t }.reader_proof(&[7; 32]));
        assert_ne!(proof, Transcript { holder: [3; 32], ..t }.reader_proof(&[7; 32]));
        assert_ne!(proof, Transcript { ticket: 2, ..t }.reader_proof(&[7; 32]));
    }
}
