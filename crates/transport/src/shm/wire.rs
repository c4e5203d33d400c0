//! The bytes on a connection to a holder on the same machine, after the handshake (see
//! `crate::handshake`). Integers are in the machine's own order: both sides are on it.
//!
//! ```text
//! reader                                   holder
//! Request    magic chunk lease length      →
//!                                          ← Answer   magic status place slot chunk length offset
//!                                            and a descriptor, if the slot is new
//!                                          ← the bytes, if the place is "here"
//! Settle     one byte                      →
//!                                          ← Verdict  1: they were valid all the while; 0: revoked
//! ```
//!
//! Of bytes that nobody can change the verdict says nothing: the reader may ask for the next chunk before it has come.
//!
//! A slot is a descriptor that the reader keeps: the holder chooses which it replaces, and so both know
//! the same without a word. Slots in `dropped` are of memory that the holder has given back: as long as
//! a descriptor is open, its pages stay.

use crate::handshake::{Answer, Malformed, answer_code, answer_of_code, at};
use crate::limits::SHM_SLOTS;
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

const REQUEST_MAGIC: [u8; 4] = *b"AQMQ";
const ANSWER_MAGIC: [u8; 4] = *b"AQMR";

pub(super) const REQUEST_BYTES: usize = 20;
pub(super) const HEADER_BYTES: usize = 32;
pub(super) const SETTLE: u8 = 0x5e;

/// One bit for each slot.
pub(super) type SlotSet = u32;
const _: () = assert!(SHM_SLOTS <= SlotSet::BITS as usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) chunk: u32,
    pub(super) lease: u64,
    pub(super) len: u32,
}

/// Where an answer's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// They follow.
    Here,
    /// From `offset` on in what the slot's descriptor stands for; `fresh`: which comes with this.
    Slot { slot: u8, offset: u64, fresh: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) answer: Answer,
    pub(super) place: Place,
    pub(super) chunk: u32,
    pub(super) len: u32,
    pub(super) dropped: SlotSet,
}

impl Request {
    pub(super) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC);
        bytes[4..8].copy_from_slice(&self.chunk.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.lease.to_ne_bytes());
        bytes[16..].copy_from_slice(&self.len.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Malformed> {
        if bytes[..4] != REQUEST_MAGIC {
            return Err("it sent something that is not a request");
        }
        Ok(Request {
            chunk: u32::from_ne_bytes(at(bytes, 4)),
            lease: u64::from_ne_bytes(at(bytes, 8)),
            len: u32::from_ne_bytes(at(bytes, 16)),
        })
    }
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let (place, slot, offset) = match self.place {
            Place::Here => (0, 0, 0),
            Place::Slot { slot, offset, fresh } => (1 + u8::from(fresh), slot, offset),
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&ANSWER_MAGIC);
        bytes[4] = answer_code(self.answer);
        bytes[5] = place;
        bytes[6] = slot;
        bytes[8..12].copy_from_slice(&self.chunk.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.len.to_ne_bytes());
        bytes[16..24].copy_from_slice(&offset.to_ne_bytes());
        bytes[24..28].copy_from_slice(&self.dropped.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        if bytes[..4] != ANSWER_MAGIC {
            return Err("it answered with something that is not a header");
        }
        let slot = bytes[6];
        let place = match bytes[5] {
            0 => Place::Here,
            fresh @ (1 | 2) if usize::from(slot) < SHM_SLOTS => {
                Place::Slot { slot, offset: u64::from_ne_bytes(at(bytes, 16)), fresh: fresh == 2 }
            }
            _ => return Err("it answered with a place that does not exist"),
        };
        Ok(Header {
            answer: answer_of_code(bytes[4])?,
            place,
            chunk: u32::from_ne_bytes(at(bytes, 8)),
            len: u32::from_ne_bytes(at(bytes, 12)),
            dropped: u32::from_ne_bytes(at(bytes, 24)),
        })
    }
}

/// Sends a header, with a descriptor or without.
pub(super) fn send_header(stream: &UnixStream, header: &Header, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = header.encode();
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a descriptor in a control message"));
    }
    let mut done = 0;
    while done < bytes.len() {
        let sent = sendmsg(stream, &[IoSlice::new(&bytes[done..])], &mut control, SendFlags::NOSIGNAL);
        match sent {
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        control.clear(); // it went with the first byte
    }
    Ok(())
}

/// Receives a header and at most one descriptor; more than that closes them all and is an error.
pub(super) fn receive_header(stream: &UnixStream) -> io::Result<([u8; HEADER_BYTES], Option<OwnedFd>)> {
    let mut bytes = [0; HEADER_BYTES];
    let mut received: Vec<OwnedFd> = Vec::new();
    let mut done = 0;
    while done < bytes.len() {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes[done..])];
        let message = match recvmsg(stream.as_fd(), &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => message,
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                received.extend(fds);
            }
        }
        if message.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        done += message.bytes;
    }
    match received.len() {
        0 | 1 => Ok((bytes, received.pop())),
        more => Err(io::Error::other(format!("it sent {more} descriptors with one answer"))),
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
        for place in [Place::Here, Place::Slot { slot: 3, offset: 1 << 40, fresh: true }] {
            let header = Header { answer: Err(Refusal::Gone), place, chunk: 4, len: 5, dropped: 9 };
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn garbage_is_refused() {
        assert!(Request::decode(&[0; REQUEST_BYTES]).is_err());
        assert!(Header::decode(&[0; HEADER_BYTES]).is_err());
        let header = Header { answer: Ok(()), place: Place::Here, chunk: 4, len: 5, dropped: 0 };
        for (at, byte) in [(4, 9), (5, 3)] {
            let mut bytes = header.encode();
            bytes[at] = byte;
            assert!(Header::decode(&bytes).is_err());
        }
        let beyond = Place::Slot { slot: u8::MAX, offset: 0, fresh: true };
        assert!(Header::decode(&Header { place: beyond, ..header }.encode()).is_err());
    }

    #[test]
    fn a_descriptor_travels_with_its_header() {
        let (holder, reader) = UnixStream::pair().unwrap();
        let header = Header { answer: Ok(()), place: Place::Here, chunk: 4, len: 5, dropped: 0 };
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        send_header(&holder, &header, None).unwrap();
        send_header(&holder, &header, Some(file.as_fd())).unwrap();
        let (bytes, none) = receive_header(&reader).unwrap();
        assert!(Header::decode(&bytes) == Ok(header) && none.is_none());
        let (bytes, fd) = receive_header(&reader).unwrap();
        assert_eq!(Header::decode(&bytes), Ok(header));
        let there = std::fs::File::from(fd.unwrap()).metadata().unwrap();
        assert_eq!(there.len(), file.metadata().unwrap().len());
    }

    #[test]
    fn descriptors_without_end_are_refused() {
        let (holder, reader) = UnixStream::pair().unwrap();
        let header = Header { answer: Ok(()), place: Place::Here, chunk: 4, len: 5, dropped: 0 }.encode();
        for byte in header {
            let fds = [holder.as_fd()];
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            sendmsg(&holder, &[IoSlice::new(&[byte])], &mut control, SendFlags::empty()).unwrap();
        }
        assert!(receive_header(&reader).unwrap_err().to_string().contains("descriptors"));
    }
}
