//! Frames: a length, that many bytes, and the descriptors that came with them.
//!
//! A reader never asks the kernel for bytes beyond the frame it is in, so a descriptor that
//! arrives belongs to that frame: the kernel does not read across the end of a message that
//! carried descriptors (unix(7)).

use crate::limits::{FRAME_BYTES_MAX, FRAME_FDS_ROOM, FRAME_STALL, READ_STEP_BYTES};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use thiserror::Error;

const HEADER_BYTES: usize = 4;

/// A frame's content and what came with it.
#[derive(Debug, Default)]
pub(crate) struct Frame {
    pub(crate) content: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

#[derive(Debug, Error)]
pub enum FrameError {
    #[error("a frame of {0} bytes, allowed are {FRAME_BYTES_MAX}")]
    TooLong(usize),
    #[error("the connection ended inside a frame")]
    Cut,
    #[error("a frame was begun and not finished within {} s", FRAME_STALL.as_secs())]
    Stalled,
    #[error("it cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl FrameError {
    /// The other side is there, and did not answer in the time it had.
    pub(crate) fn is_timeout(&self) -> bool {
        match self {
            FrameError::Io(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
            FrameError::TooLong(_) | FrameError::Cut | FrameError::Stalled | FrameError::Json(_) => false,
        }
    }
}

/// Header and content, ready to be sent.
pub(crate) fn encode(message: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; HEADER_BYTES];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - HEADER_BYTES;
    match u32::try_from(length) {
        Ok(header) if length <= FRAME_BYTES_MAX => frame[..HEADER_BYTES].copy_from_slice(&header.to_le_bytes()),
        _ => return Err(FrameError::TooLong(length)),
    }
    Ok(frame)
}

/// The next frame; `None` at the end of the stream, if that is between two frames.
pub(crate) async fn receive(socket: &tokio::net::UnixStream) -> Result<Option<Frame>, FrameError> {
    let mut frame = Frame::default();
    let mut header = [0; HEADER_BYTES];
    let begun = recv(socket, &mut header, &mut frame.fds).await?;
    if begun == 0 {
        return Ok(None);
    }
    let rest = async {
        fill(socket, &mut header[begun..], &mut frame.fds).await?;
        let length = content_length(header)?;
        while frame.content.len() < length {
            let from = frame.content.len();
            frame.content.resize(length.min(from + READ_STEP_BYTES), 0);
            fill(socket, &mut frame.content[from..], &mut frame.fds).await?;
        }
        Ok(Some(frame))
    };
    tokio::time::timeout(FRAME_STALL, rest).await.map_err(|_| FrameError::Stalled)?
}

async fn fill(socket: &tokio::net::UnixStream, mut into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<(), FrameError> {
    while !into.is_empty() {
        match recv(socket, into, fds).await? {
            0 => return Err(FrameError::Cut),
            n => into = &mut into[n..],
        }
    }
    Ok(())
}

async fn recv(socket: &tokio::net::UnixStream, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    loop {
        socket.readable().await?;
        match socket.try_io(tokio::io::Interest::READABLE, || recv_now(socket.as_fd(), into, fds)) {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            result => return result,
        }
    }
}

fn recv_now(socket: BorrowedFd<'_>, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_ROOM))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let received = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(received.bytes)
}

/// Sends a frame made by [`encode`], the descriptor with its first byte.
pub(crate) fn send_blocking(mut socket: &UnixStream, frame: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let sent = match fd {
        Some(fd) => send_with(socket, frame, fd)?,
        None => 0,
    };
    socket.write_all(&frame[sent..])
}

fn send_with(socket: &UnixStream, frame: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let fds = [fd];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "the room is for one descriptor");
    loop {
        match sendmsg(socket, &[IoSlice::new(frame)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// The next frame's content, by a reader that expects no descriptors.
pub(crate) fn receive_blocking(mut socket: &UnixStream) -> Result<Vec<u8>, FrameError> {
    let mut header = [0; HEADER_BYTES];
    socket.read_exact(&mut header).map_err(cut)?;
    let length = content_length(header)?;
    let mut content = Vec::new();
    while content.len() < length {
        let from = content.len();
        content.resize(length.min(from + READ_STEP_BYTES), 0);
        socket.read_exact(&mut content[from..]).map_err(cut)?;
    }
    Ok(content)
}

fn cut(error: io::Error) -> FrameError {
    match error.kind() == io::ErrorKind::UnexpectedEof {
        true => FrameError::Cut,
        false => FrameError::Io(error),
    }
}

fn content_length(header: [u8; HEADER_BYTES]) -> Result<usize, FrameError> {
    let length = usize::try_from(u32::from_le_bytes(header)).expect("Linux has no 16-bit machines");
    match length > FRAME_BYTES_MAX {
        true => Err(FrameError::TooLong(length)),
        false => Ok(length),
    }
}
