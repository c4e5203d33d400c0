//! The bytes on a side connection: what is said about READs, which carry the bytes themselves past it.
//! Integers are little endian.
//!
//! ```text
//! reader                                         holder
//! the handshake of every data connection (`aquifer_transport::side`)
//! Offer     its queue pair's address           →
//!                                              ← Accept    status, its queue pair's address
//! Request   number chunk length lease          →                   (several may be under way)
//!                                              ← Granted   number address length key
//!                                                or Refused, or Unavailable
//!           (READs)
//! Done      number; read, failed or let be     →
//!                                              ← Verdict   number, valid all the while or not
//! ```
//!
//! A holder keeps what it granted readable until it hears Done. It gives its Verdict on what was read,
//! and on what failed to be: its lease may have ended under it. What was let be needs none.

use crate::verbs::{Address, RemoteRegion};
use aquifer_transport::Refusal;

const OFFER_MAGIC: [u8; 4] = *b"AQRD";
const VERSION: u16 = 1;

pub(crate) const OFFER_BYTES: usize = 40;
pub(crate) const FRAME_BYTES: usize = 24;

/// What a peer sent that no honest one of this version would.
pub(crate) type Malformed = &'static str;

/// An Offer, or an Accept that is one.
pub(crate) fn encode_offer(address: &Address) -> [u8; OFFER_BYTES] {
    let mut bytes = encode_status(0);
    bytes[7] = address.mtu_code;
    bytes[8..12].copy_from_slice(&address.queue_pair.to_le_bytes());
    bytes[12..16].copy_from_slice(&address.sequence.to_le_bytes());
    bytes[16..18].copy_from_slice(&address.lid.to_le_bytes());
    bytes[18] = address.reads_in;
    bytes[19] = address.reads_out;
    bytes[20..36].copy_from_slice(&address.gid);
    bytes
}

/// An Accept that is none: the holder has no port to serve by.
pub(crate) fn encode_no_port() -> [u8; OFFER_BYTES] {
    encode_status(1)
}

fn encode_status(status: u8) -> [u8; OFFER_BYTES] {
    let mut bytes = [0; OFFER_BYTES];
    bytes[..4].copy_from_slice(&OFFER_MAGIC);
    bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
    bytes[6] = status;
    bytes
}

pub(crate) fn decode_offer(bytes: &[u8; OFFER_BYTES]) -> Result<Address, Malformed> {
    if bytes[..4] != OFFER_MAGIC {
        return Err("it does not speak of queue pairs");
    }
    if u16::from_le_bytes(at(bytes, 4)) != VERSION {
        return Err("it speaks of queue pairs in another version");
    }
    if bytes[6] != 0 {
        return Err("it has no port to serve by at the moment");
    }
    let address = Address {
        mtu_code: bytes[7],
        queue_pair: u32::from_le_bytes(at(bytes, 8)),
        sequence: u32::from_le_bytes(at(bytes, 12)),
        lid: u16::from_le_bytes(at(bytes, 16)),
        reads_in: bytes[18],
        reads_out: bytes[19],
        gid: at(bytes, 20),
    };
    let plausible = (1..=5).contains(&address.mtu_code)
        && address.queue_pair < 1 << 24
        && address.sequence < 1 << 24
        && address.reads_in > 0
        && address.reads_out > 0;
    if plausible { Ok(address) } else { Err("its queue pair has an address that none can have") }
}

/// What a reader says. Each is about one read, by the reader's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FromReader {
    Request { number: u32, chunk: u32, len: u32, lease: u64 },
    Done { number: u32, outcome: Outcome },
}

/// What a reader made of a chunk it was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    LetBe,
    Read,
    Failed,
}

/// What a holder says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FromHolder {
    Granted {
        number: u32,
        remote: RemoteRegion,
    },
    Refused {
        number: u32,
        refusal: Refusal,
    },
    /// The chunk is there and may be read, but not in this way at the moment.
    Unavailable {
        number: u32,
    },
    Verdict {
        number: u32,
        valid: bool,
    },
}

impl FromReader {
    pub(crate) fn encode(self) -> [u8; FRAME_BYTES] {
        match self {
            FromReader::Request { number, chunk, len, lease } => frame(1, 0, number, lease, chunk, len),
            FromReader::Done { number, outcome } => frame(2, outcome.code(), number, 0, 0, 0),
        }
    }

    pub(crate) fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, Malformed> {
        let number = u32::from_le_bytes(at(bytes, 4));
        match (bytes[0], bytes[1]) {
            (1, 0) => Ok(FromReader::Request {
                number,
                lease: u64::from_le_bytes(at(bytes, 8)),
                chunk: u32::from_le_bytes(at(bytes, 16)),
                len: u32::from_le_bytes(at(bytes, 20)),
            }),
            (2, code) => Ok(FromReader::Done { number, outcome: Outcome::of_code(code)? }),
            _ => Err("it sent something that is not a request"),
        }
    }
}

impl Outcome {
    fn code(self) -> u8 {
        match self {
            Outcome::LetBe => 0,
            Outcome::Read => 1,
            Outcome::Failed => 2,
        }
    }

    fn of_code(code: u8) -> Result<Self, Malformed> {
        [Outcome::LetBe, Outcome::Read, Outcome::Failed]
            .into_iter()
            .find(|outcome| outcome.code() == code)
            .ok_or("it is done with a chunk in an unknown way")
    }
}

impl FromHolder {
    pub(crate) fn encode(self) -> [u8; FRAME_BYTES] {
        match self {
            FromHolder::Granted { number, remote } => frame(3, 0, number, remote.address, remote.key, remote.len),
            FromHolder::Refused { number, refusal } => frame(4, refusal_code(refusal), number, 0, 0, 0),
            FromHolder::Unavailable { number } => frame(5, 0, number, 0, 0, 0),
            FromHolder::Verdict { number, valid } => frame(6, u8::from(valid), number, 0, 0, 0),
        }
    }

    pub(crate) fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, Malformed> {
        let number = u32::from_le_bytes(at(bytes, 4));
        match (bytes[0], bytes[1]) {
            (3, 0) => {
                let address = u64::from_le_bytes(at(bytes, 8));
                let (key, len) = (u32::from_le_bytes(at(bytes, 16)), u32::from_le_bytes(at(bytes, 20)));
                address.checked_add(u64::from(len)).ok_or("it granted memory beyond all addresses")?;
                Ok(FromHolder::Granted { number, remote: RemoteRegion { address, len, key } })
            }
            (4, code) => Ok(FromHolder::Refused { number, refusal: refusal_of_code(code)? }),
            (5, 0) => Ok(FromHolder::Unavailable { number }),
            (6, valid @ (0 | 1)) => Ok(FromHolder::Verdict { number, valid: valid == 1 }),
            _ => Err("it answered with something that is not an answer"),
        }
    }
}

fn frame(kind: u8, detail: u8, number: u32, long: u64, first: u32, second: u32) -> [u8; FRAME_BYTES] {
    let mut bytes = [0; FRAME_BYTES];
    (bytes[0], bytes[1]) = (kind, detail);
    bytes[4..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..16].copy_from_slice(&long.to_le_bytes());
    bytes[16..20].copy_from_slice(&first.to_le_bytes());
    bytes[20..24].copy_from_slice(&second.to_le_bytes());
    bytes
}

fn refusal_code(refusal: Refusal) -> u8 {
    match refusal {
        Refusal::Expired => 1,
        Refusal::Unknown => 2,
        Refusal::Gone => 3,
        Refusal::Ticket => 4,
    }
}

fn refusal_of_code(code: u8) -> Result<Refusal, Malformed> {
    [Refusal::Expired, Refusal::Unknown, Refusal::Gone, Refusal::Ticket]
        .into_iter()
        .find(|refusal| refusal_code(*refusal) == code)
        .ok_or("it refuses for an unknown reason")
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
        let address = Address {
            queue_pair: 0xff_ffff,
            sequence: 7,
            gid: [9; 16],
            lid: 12,
            mtu_code: 5,
            reads_in: 16,
            reads_out: 128,
        };
        assert_eq!(decode_offer(&encode_offer(&address)), Ok(address));
        for said in [
            FromReader::Request { number: u32::MAX, chunk: 1, len: 2, lease: u64::MAX },
            FromReader::Done { number: 4, outcome: Outcome::Failed },
        ] {
            assert_eq!(FromReader::decode(&said.encode()), Ok(said));
        }
        for said in [
            FromHolder::Granted { number: 1, remote: RemoteRegion { address: 1 << 47, len: 3, key: 4 } },
            FromHolder::Refused { number: 2, refusal: Refusal::Gone },
            FromHolder::Unavailable { number: 3 },
            FromHolder::Verdict { number: 4, valid: true },
        ] {
            assert_eq!(FromHolder::decode(&said.encode()), Ok(said));
        }
    }

    #[test]
    fn garbage_is_refused() {
        assert!(FromReader::decode(&[0; FRAME_BYTES]).is_err());
        assert!(FromHolder::decode(&[9; FRAME_BYTES]).is_err());
        assert!(decode_offer(&[0; OFFER_BYTES]).is_err());
        assert!(decode_offer(&encode_no_port()).is_err());
        let beyond = FromHolder::Granted { number: 1, remote: RemoteRegion { address: u64::MAX, len: 1, key: 0 } };
        assert!(FromHolder::decode(&beyond.encode()).is_err());
        let mtu = Address { mtu_code: 6, queue_pair: 1, sequence: 1, gid: [0; 16], lid: 0, reads_in: 1, reads_out: 1 };
        assert!(decode_offer(&encode_offer(&mtu)).is_err());
    }
}
