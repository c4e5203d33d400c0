//! How two nodes that are to move bytes prove to each other who they are. Integers are little endian.
//!
//! ```text
//! reader                                   holder
//! Hello      magic version 0 ticket nonce  →
//!                                          ← Challenge  magic version status nonce
//! Proof      keyed hash                    →
//!                                          ← Confirm    status, keyed hash
//! ```
//!
//! The ticket's secret came over the authenticated control connection and never crosses this one:
//! each side proves that it knows it by hashing both nonces with it as the key.

use crate::socket::{Timed, is_timeout, read_exact_by};
use crate::{ReadError, Refusal};
use aquifer_core::{Access, NodeId};
use std::io::{self, Read, Write};
use std::time::Instant;

const MAGIC: [u8; 4] = *b"AQDP";
const VERSION: u16 = 1;

const READER_CONTEXT: &[u8] = b"aquifer data plane 1: the reader knows the secret";
const HOLDER_CONTEXT: &[u8] = b"aquifer data plane 1: the holder knows the secret";

pub(crate) const HELLO_BYTES: usize = 48;
pub(crate) const CHALLENGE_BYTES: usize = 40;
pub(crate) const PROOF_BYTES: usize = 32;
pub(crate) const CONFIRM_BYTES: usize = 36;

pub(crate) type Nonce = [u8; 32];

/// What a peer sent that no honest one of this version would.
pub(crate) type Malformed = &'static str;

/// Where a handshake stands, as the holder tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handshake {
    Good,
    /// The ticket is unknown, or the proof is wrong.
    Ticket,
    Version,
    /// The holder has as many connections as it wants.
    Busy,
    /// The holder takes none but encrypted ones.
    Plain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) version: u16,
    pub(crate) ticket: u64,
    pub(crate) nonce: Nonce,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Challenge {
    pub(crate) status: Handshake,
    pub(crate) nonce: Nonce,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Confirm {
    pub(crate) status: Handshake,
    pub(crate) proof: [u8; PROOF_BYTES],
}

/// How a holder turned a reader away.
#[derive(Debug)]
pub enum Fault {
    /// The reader did what an honest one would not.
    Misbehaved(&'static str),
    Lost(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match is_timeout(&error) {
            true => Fault::Misbehaved("it does not finish the handshake"),
            false => Fault::Lost(error),
        }
    }
}

/// The reader's half: proves to the holder that we know the ticket's secret, and has it prove the same.
pub(crate) fn greet<S: Timed>(stream: &S, access: &Access, deadline: Instant) -> Result<(), ReadError>
where
    for<'a> &'a S: Read + Write,
{
    let failed = |error: io::Error| match is_timeout(&error) {
        true => ReadError::Unreachable("it did not finish the handshake in time".into()),
        false => ReadError::Unreachable(format!("handshake: {error}")),
    };
    let malformed = |reason: &str| ReadError::Unreachable(format!("handshake: {reason}"));
    let mut writer = stream;
    let hello = Hello::new(access.ticket, rand::random());
    writer.write_all(&hello.encode()).map_err(failed)?;

    let mut bytes = [0; CHALLENGE_BYTES];
    read_exact_by(stream, &mut bytes, deadline).map_err(failed)?;
    let challenge = Challenge::decode(&bytes).map_err(malformed)?;
    check_status(challenge.status)?;
    let transcript = Transcript { ticket: access.ticket, reader: hello.nonce, holder: challenge.nonce };
    writer.write_all(transcript.reader_proof(&access.secret).as_bytes()).map_err(failed)?;

    let mut bytes = [0; CONFIRM_BYTES];
    read_exact_by(stream, &mut bytes, deadline).map_err(failed)?;
    let confirm = Confirm::decode(&bytes).map_err(malformed)?;
    check_status(confirm.status)?;
    match transcript.holder_proof(&access.secret) == blake3::Hash::from_bytes(confirm.proof) {
        true => Ok(()),
        false => Err(malformed("it does not know the secret of the ticket: another node has this address now")),
    }
}

fn check_status(status: Handshake) -> Result<(), ReadError> {
    match status {
        Handshake::Good => Ok(()),
        Handshake::Ticket => Err(ReadError::Refused(Refusal::Ticket)),
        Handshake::Version => Err(ReadError::Unreachable("it speaks another version of the data protocol".into())),
        Handshake::Busy => Err(ReadError::Unreachable("it has too many data connections already".into())),
        Handshake::Plain => Err(ReadError::Unreachable("it takes none but encrypted data connections".into())),
    }
}

/// The holder's half: whom the reader proves to be. `secret` knows tickets; `sit` says whether there
/// is room for that peer.
pub(crate) fn examine<S: Timed>(
    stream: &S,
    deadline: Instant,
    secret: impl FnOnce(u64) -> Option<(NodeId, [u8; 32])>,
    sit: impl FnOnce(NodeId) -> bool,
) -> Result<NodeId, Fault>
where
    for<'a> &'a S: Read + Write,
{
    let mut writer = stream;
    let mut hello = [0; HELLO_BYTES];
    read_exact_by(stream, &mut hello, deadline)?;
    let hello = Hello::decode(&hello).map_err(Fault::Misbehaved)?;
    let nonce = rand::random();
    let known = secret(hello.ticket);
    let (status, ended) = match known {
        _ if !hello.is_our_version() => (Handshake::Version, "it speaks another version of the data protocol"),
        None => (Handshake::Ticket, "it shows a ticket that is not known"),
        Some(_) => (Handshake::Good, ""),
    };
    writer.write_all(&Challenge { status, nonce }.encode()).map_err(Fault::Lost)?;
    let (Handshake::Good, Some((peer, secret))) = (status, known) else { return Err(Fault::Misbehaved(ended)) };

    let mut proof = [0; PROOF_BYTES];
    read_exact_by(stream, &mut proof, deadline)?;
    let transcript = Transcript { ticket: hello.ticket, reader: hello.nonce, holder: nonce };
    let refusal = match transcript.reader_proof(&secret) == blake3::Hash::from_bytes(proof) {
        false => Some((Handshake::Ticket, "it does not know the secret of its ticket")),
        true if !sit(peer) => Some((Handshake::Busy, "it opens too many data connections")),
        true => None,
    };
    if let Some((status, reason)) = refusal {
        writer.write_all(&Confirm { status, proof: [0; 32] }.encode()).map_err(Fault::Lost)?;
        return Err(Fault::Misbehaved(reason));
    }
    let proof = *transcript.holder_proof(&secret).as_bytes();
    writer.write_all(&Confirm { status: Handshake::Good, proof }.encode()).map_err(Fault::Lost)?;
    Ok(peer)
}

/// Tells a reader why it is not even asked for a proof.
pub(crate) fn turn_away<S: Timed>(stream: &S, deadline: Instant, status: Handshake) -> io::Result<()>
where
    for<'a> &'a S: Read + Write,
{
    let mut writer = stream;
    read_exact_by(stream, &mut [0; HELLO_BYTES], deadline)?;
    writer.write_all(&Challenge { status, nonce: [0; 32] }.encode())
}

/// Both sides' nonces and the ticket, from which either proof follows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transcript {
    pub(crate) ticket: u64,
    pub(crate) reader: Nonce,
    pub(crate) holder: Nonce,
}

impl Transcript {
    pub(crate) fn reader_proof(&self, secret: &[u8; 32]) -> blake3::Hash {
        self.proof(secret, READER_CONTEXT)
    }

    pub(crate) fn holder_proof(&self, secret: &[u8; 32]) -> blake3::Hash {
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
    pub(crate) fn new(ticket: u64, nonce: Nonce) -> Self {
        Hello { version: VERSION, ticket, nonce }
    }

    pub(crate) fn is_our_version(&self) -> bool {
        self.version == VERSION
    }

    pub(crate) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.ticket.to_le_bytes());
        bytes[16..].copy_from_slice(&self.nonce);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, Malformed> {
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
    pub(crate) fn encode(&self) -> [u8; CHALLENGE_BYTES] {
        let mut bytes = [0; CHALLENGE_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.status.code();
        bytes[8..].copy_from_slice(&self.nonce);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; CHALLENGE_BYTES]) -> Result<Self, Malformed> {
        if bytes[..4] != MAGIC {
            return Err("it does not speak the data protocol");
        }
        Ok(Challenge { status: Handshake::of_code(bytes[6])?, nonce: at(bytes, 8) })
    }
}

impl Confirm {
    pub(crate) fn encode(&self) -> [u8; CONFIRM_BYTES] {
        let mut bytes = [0; CONFIRM_BYTES];
        bytes[0] = self.status.code();
        bytes[4..].copy_from_slice(&self.proof);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; CONFIRM_BYTES]) -> Result<Self, Malformed> {
        Ok(Confirm { status: Handshake::of_code(bytes[0])?, proof: at(bytes, 4) })
    }
}

impl Handshake {
    fn code(self) -> u8 {
        match self {
            Handshake::Good => 0,
            Handshake::Ticket => 1,
            Handshake::Version => 2,
            Handshake::Busy => 3,
            Handshake::Plain => 4,
        }
    }

    fn of_code(code: u8) -> Result<Self, Malformed> {
        [Handshake::Good, Handshake::Ticket, Handshake::Version, Handshake::Busy, Handshake::Plain]
            .into_iter()
            .find(|h| h.code() == code)
            .ok_or("it answered the handshake with an unknown status")
    }
}

/// What a holder answers a request with: bytes, or why not.
pub(crate) type Answer = Result<(), Refusal>;

pub(crate) fn answer_code(answer: Answer) -> u8 {
    match answer {
        Ok(()) => 0,
        Err(Refusal::Expired) => 1,
        Err(Refusal::Unknown) => 2,
        Err(Refusal::Gone) => 3,
        Err(Refusal::Ticket) => 4,
    }
}

pub(crate) fn answer_of_code(code: u8) -> Result<Answer, Malformed> {
    [Ok(()), Err(Refusal::Expired), Err(Refusal::Unknown), Err(Refusal::Gone), Err(Refusal::Ticket)]
        .into_iter()
        .find(|answer| answer_code(*answer) == code)
        .ok_or("it answered with an unknown status")
}

/// `N` bytes from `offset` on. Offsets here are constants inside constant lengths.
pub(crate) fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
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
    }

    #[test]
    fn garbage_is_refused() {
        assert!(Hello::decode(&[0; HELLO_BYTES]).is_err());
        assert!(Challenge::decode(&[0; CHALLENGE_BYTES]).is_err());
        assert!(Confirm::decode(&[9; CONFIRM_BYTES]).is_err());
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
