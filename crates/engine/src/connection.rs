//! One engine's connection, from accept to end.

use crate::frame::{self, Frame, FrameError};
use crate::limits::CLOSE_GRACE;
use crate::outbox::{Kind, Outbox, State};
use crate::protocol::{self, ErrorReply, PROTOCOL_VERSION, RegionSpec, Request, code};
use crate::server::{ConnId, EngineEvent};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use std::io;
use std::os::fd::OwnedFd;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// Answers frames that are no requests with this number.
const NO_REQUEST: u64 = 0;

/// Reads and writes until either side ends it.
pub(crate) async fn serve(socket: &UnixStream, conn: ConnId, outbox: &Outbox, events: &mpsc::Sender<EngineEvent>) {
    let ended = tokio::select! {
        ended = read_all(socket, conn, outbox, events) => ended,
        written = write_all(socket, outbox) => written.map_err(Ended::Io),
        state = outbox.ended() => finish(socket, outbox, state).await,
        () = events.closed() => Ok(()),
    };
    match ended {
        Ok(()) => {}
        Err(Ended::Io(error)) => tracing::debug!(%conn, %error, "engine's connection lost"),
        Err(Ended::Overflow) => tracing::warn!(%conn, "engine does not read what it is sent: disconnected"),
        Err(Ended::Fault(error)) => {
            tracing::warn!(%conn, %error, "engine does not keep to the protocol: disconnected");
            outbox.push(Kind::Owed, protocol::encode_reply(NO_REQUEST, &Err(error)));
            outbox.finish();
            let _told_or_not = finish(socket, outbox, State::Finishing).await;
        }
    }
}

/// Tells a caller that will not be served why, as far as it listens.
pub(crate) async fn turn_away(socket: &UnixStream, error: ErrorReply) {
    let outbox = Outbox::new();
    outbox.push(Kind::Owed, protocol::encode_reply(NO_REQUEST, &Err(error)));
    outbox.finish();
    let _told_or_not = finish(socket, &outbox, State::Finishing).await;
}

enum Ended {
    Io(io::Error),
    Overflow,
    Fault(ErrorReply),
}

async fn finish(socket: &UnixStream, outbox: &Outbox, state: State) -> Result<(), Ended> {
    if state == State::Overflowed {
        return Err(Ended::Overflow);
    }
    let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, format!("not read within {CLOSE_GRACE:?}"));
    let written = tokio::time::timeout(CLOSE_GRACE, write_all(socket, outbox)).await;
    written.map_err(timed_out).and_then(std::convert::identity).map_err(Ended::Io)
}

async fn write_all(socket: &UnixStream, outbox: &Outbox) -> io::Result<()> {
    while let Some(frame) = outbox.next().await {
        let mut rest = &frame[..];
        while !rest.is_empty() {
            socket.writable().await?;
            match socket.try_write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

async fn read_all(
    socket: &UnixStream,
    conn: ConnId,
    outbox: &Outbox,
    events: &mpsc::Sender<EngineEvent>,
) -> Result<(), Ended> {
    let mut greeted = false;
    while let Some(frame) = receive(socket).await? {
        let (id, request) = Request::decode(&frame.content).map_err(Ended::Fault)?;
        match request.and_then(|request| admit(request, frame.fds, &mut greeted)) {
            Ok((request, fd)) => {
                if events.send(EngineEvent::Request { conn, id, request, fd }).await.is_err() {
                    return Ok(());
                }
            }
            Err(error) => outbox.push(Kind::Owed, protocol::encode_reply(id, &Err(error))),
        }
    }
    Ok(())
}

async fn receive(socket: &UnixStream) -> Result<Option<Frame>, Ended> {
    frame::receive(socket).await.map_err(|error| match error {
        FrameError::Io(error) => Ended::Io(error),
        FrameError::Cut => Ended::Io(io::ErrorKind::UnexpectedEof.into()),
        FrameError::TooLong(_) | FrameError::Stalled | FrameError::Json(_) => {
            Ended::Fault(ErrorReply::new(code::BAD_FRAME, error.to_string()))
        }
    })
}

/// What can be checked of a request without knowing any state but the connection's own.
fn admit(
    request: Request,
    mut fds: Vec<OwnedFd>,
    greeted: &mut bool,
) -> Result<(Request, Option<OwnedFd>), ErrorReply> {
    match &request {
        Request::Hello(hello) if hello.protocol != PROTOCOL_VERSION => {
            let message = format!(
                "{} speaks version {} of the engine protocol, this agent speaks {PROTOCOL_VERSION}: \
                 update the older of the two",
                hello.client, hello.protocol
            );
            return Err(ErrorReply::new(code::PROTOCOL_VERSION, message));
        }
        Request::Hello(_) if *greeted => return Err(ErrorReply::new(code::HELLO, "'hello' was said already")),
        Request::Hello(_) => *greeted = true,
        Request::Status
        | Request::Drain(_)
        | Request::Releases(_)
        | Request::Draft(_)
        | Request::Announce(_)
        | Request::Word(_) => {}
        Request::Conduct(_)
        | Request::Manifest { .. }
        | Request::Region(_)
        | Request::Bind { .. }
        | Request::BindRow(_)
        | Request::Hydrate
        | Request::Paused { .. }
        | Request::Checked { .. }
        | Request::Resumed { .. }
        | Request::Refused(_)
            if !*greeted =>
        {
            return Err(ErrorReply::new(code::HELLO, "the first request of an engine must be 'hello'"));
        }
        // Where its GPU is a twin's, its memory is a memfd after all: the agent knows.
        Request::Region(region) if region.gpu.is_none() || !fds.is_empty() => {
            let fd = sole_fd(&mut fds, region)?;
            check_region(region, &fd)?;
            return Ok((request, Some(fd)));
        }
        Request::Conduct(_)
        | Request::Manifest { .. }
        | Request::Region(_)
        | Request::Bind { .. }
        | Request::BindRow(_)
        | Request::Hydrate
        | Request::Paused { .. }
        | Request::Checked { .. }
        | Request::Resumed { .. }
        | Request::Refused(_) => {}
    }
    match fds.is_empty() {
        true => Ok((request, None)),
        false => Err(ErrorReply::new(code::BAD_REQUEST, "a descriptor came with a request that takes none")),
    }
}

fn sole_fd(fds: &mut Vec<OwnedFd>, region: &RegionSpec) -> Result<OwnedFd, ErrorReply> {
    match (fds.pop(), fds.len()) {
        (Some(fd), 0) => Ok(fd),
        (None, _) => Err(bad_region(region, "came without a descriptor: attach its memfd with SCM_RIGHTS")),
        (Some(_), more) => Err(bad_region(region, format!("came with {} descriptors, one is needed", more + 1))),
    }
}

/// A region must be memory whose length cannot change under the agent, which maps it.
fn check_region(region: &RegionSpec, fd: &OwnedFd) -> Result<(), ErrorReply> {
    let seals = fcntl_get_seals(fd).map_err(|e| bad_region(region, format!("is not a memfd (F_GET_SEALS: {e})")))?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return Err(bad_region(region, "is not sealed: add F_SEAL_SHRINK and F_SEAL_GROW before registering it"));
    }
    if seals.contains(SealFlags::WRITE) {
        return Err(bad_region(region, "is sealed against writing, so no weights can land in it"));
    }
    let size = fstat(fd).map_err(|e| bad_region(region, format!("cannot be examined (fstat: {e})")))?.st_size;
    match u64::try_from(size) {
        Ok(size) if region.bytes > 0 && region.bytes <= size => Ok(()),
        _ => Err(bad_region(region, format!("is said to have {} bytes, its memfd has {size}", region.bytes))),
    }
}

fn bad_region(region: &RegionSpec, what: impl std::fmt::Display) -> ErrorReply {
    ErrorReply::new(code::BAD_REGION, format!("region {} {what}", region.region))
}
