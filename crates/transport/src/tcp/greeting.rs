//! The reader's half of the handshake.

use super::socket::{is_timeout, read_exact_by};
use super::wire::{CHALLENGE_BYTES, CONFIRM_BYTES, Challenge, Confirm, Handshake, Hello, Transcript};
use crate::{ReadError, Refusal};
use aquifer_core::Access;
use std::io::{self, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Proves to the holder that we know the ticket's secret, and has it prove the same.
pub(super) fn handshake(mut stream: &TcpStream, access: &Access, timeout: Duration) -> Result<(), ReadError> {
    let failed = |error: io::Error| match is_timeout(&error) {
        true => ReadError::Unreachable("it did not finish the handshake in time".into()),
        false => ReadError::Unreachable(format!("handshake: {error}")),
    };
    let malformed = |reason: &str| ReadError::Unreachable(format!("handshake: {reason}"));
    let deadline = Instant::now() + timeout;
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_write_timeout(Some(timeout)).map_err(failed)?;
    let hello = Hello::new(access.ticket, rand::random());
    stream.write_all(&hello.encode()).map_err(failed)?;

    let mut bytes = [0; CHALLENGE_BYTES];
    read_exact_by(stream, &mut bytes, deadline).map_err(failed)?;
    let challenge = Challenge::decode(&bytes).map_err(malformed)?;
    check_status(challenge.status)?;
    let transcript = Transcript { ticket: access.ticket, reader: hello.nonce, holder: challenge.nonce };
    stream.write_all(transcript.reader_proof(&access.secret).as_bytes()).map_err(failed)?;

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
    }
}
