//! One connection to a holder, and how a chunk is had over it.

use super::Counters;
use super::directory::reach;
use super::wire::{Header, Place, Request, SETTLE, SlotSet, receive_header};
use crate::handshake::greet;
use crate::limits::{RECEIVE_PIECE_BYTES, SHM_SEALED_PIECE_BYTES, SHM_SLOTS};
use crate::pieces::Pieces;
use crate::socket::is_timeout;
use crate::{ReadDone, ReadError, ReadOp};
use aquifer_core::{Access, ChunkHash, Hash};
use aquifer_memory::{Known, Shared, Span};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Link {
    stream: Arc<UnixStream>,
    slots: [Option<Shared>; SHM_SLOTS],
    known: Arc<Known>,
    /// A verdict is on its way that nobody waits for.
    verdict_owed: bool,
    /// What was asked for ahead: its answer comes next.
    asked: Option<Request>,
    /// What is copied lies in one of these until it has been hashed and put where it belongs.
    pieces: Arc<Pieces>,
}

/// Why a connection cannot be used any more.
#[derive(Debug)]
pub(super) enum Loss {
    /// Nothing came for as long as the read wanted to wait.
    Stalled,
    Broken(String),
    /// Somebody here does not want the bytes any more.
    Unwanted,
}

impl From<io::Error> for Loss {
    fn from(error: io::Error) -> Self {
        match is_timeout(&error) {
            true => Loss::Stalled,
            false => Loss::Broken(error.to_string()),
        }
    }
}

/// Watches over a read while it is under way.
pub(super) trait Watch {
    /// The stream by which it can be cut; an error if it is not wanted any more.
    fn attach(&self, stream: &Arc<UnixStream>) -> Result<(), ReadError>;
    /// The answer is here, and bytes may be written from now on.
    fn begun(&self);
    /// Asked between pieces.
    fn is_wanted(&self) -> bool;
    /// What will most likely be read next over this connection.
    fn upcoming(&self) -> Option<Request>;
}

impl Link {
    pub(super) fn open(
        path: &Path,
        access: &Access,
        timeout: Duration,
        watch: &impl Watch,
        known: &Arc<Known>,
        pieces: &Arc<Pieces>,
    ) -> Result<Self, ReadError> {
        let failed = |error: io::Error| ReadError::Unreachable(format!("{}: {error}", path.display()));
        let stream = Arc::new(reach(path, timeout).map_err(failed)?);
        watch.attach(&stream)?;
        greet(&*stream, access, Instant::now() + timeout)?;
        let (known, pieces) = (known.clone(), pieces.clone());
        Ok(Link { stream, slots: Default::default(), known, verdict_owed: false, asked: None, pieces })
    }

    pub(super) fn shut(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Reads one chunk. What it came to, or that the connection was lost.
    pub(super) fn read(
        &mut self,
        op: &ReadOp,
        watch: &impl Watch,
        counters: &Counters,
    ) -> Result<Result<ReadDone, ReadError>, Loss> {
        let asked = Instant::now();
        let stream = self.stream.clone();
        let mut stream = &*stream;
        stream.set_read_timeout(Some(op.stall.max(Duration::from_millis(1))))?;
        let len = u32::try_from(op.into.len()).unwrap_or(u32::MAX); // checked when it was submitted
        let request = Request { chunk: op.chunk, lease: op.lease, len };
        if self.asked != Some(request) {
            self.skip()?;
            stream.write_all(&request.encode())?;
        }
        self.asked = None;
        let header = self.hear(request)?;
        if let Err(refusal) = header.answer {
            return Ok(Err(ReadError::Refused(refusal)));
        }
        watch.begun();
        let landed = match header.place {
            Place::Here => Ok((self.take_in(op, watch, counters)?, None)),
            Place::Slot { slot, offset, .. } => self.copy(op, slot, offset, watch, counters)?,
        };
        let done = |digest, adopted| ReadDone { digest, bytes: op.into.len(), elapsed: asked.elapsed(), adopted };
        let landed = match landed {
            Ok((digest, adopted @ Some(_))) => return Ok(Ok(done(digest, adopted))),
            Ok((digest, None)) => Ok(done(digest, None)),
            Err(error) => Err(error),
        };
        stream.write_all(&[SETTLE])?;
        let mut verdict = [0];
        stream.read_exact(&mut verdict)?;
        match verdict {
            [0] => Ok(Err(ReadError::Revoked)),
            [1] => Ok(landed),
            _ => Err(Loss::Broken("its answer ended with an unknown status".into())),
        }
    }

    /// Waits for the answer to a request, and takes in what it says of descriptors.
    fn hear(&mut self, request: Request) -> Result<Header, Loss> {
        if std::mem::take(&mut self.verdict_owed) {
            (&*self.stream).read_exact(&mut [0])?;
        }
        let (bytes, fd) = receive_header(&self.stream)?;
        let header = Header::decode(&bytes).map_err(|reason| Loss::Broken(reason.into()))?;
        if header.chunk != request.chunk || header.len != request.len {
            return Err(Loss::Broken("it answered a request that was not made".into()));
        }
        self.keep(header.place, header.dropped, fd)?;
        Ok(header)
    }

    /// Lets what was asked for ahead go by, if that is not wanted any more.
    fn skip(&mut self) -> Result<(), Loss> {
        let Some(request) = self.asked.take() else { return Ok(()) };
        let header = self.hear(request)?;
        if header.answer.is_err() {
            return Ok(());
        }
        if header.place == Place::Here {
            let mut buffer = self.pieces.take();
            let mut left = u64::from(request.len);
            while left > 0 {
                let piece = next_piece(&mut buffer, left);
                (&*self.stream).read_exact(piece)?;
                left -= piece.len() as u64;
            }
        }
        (&*self.stream).write_all(&[SETTLE])?;
        self.verdict_owed = true;
        Ok(())
    }

    /// Says that bytes which nobody can change are taken, before they are hashed: they were right or wrong from the
    /// first, and no later word of the holder makes it otherwise. With that goes the next request, so that its
    /// answer is there when it is wanted: to wake the holder and be woken takes a tenth of hashing 4 MiB.
    fn settle_ahead(&mut self, watch: &impl Watch) -> Result<(), Loss> {
        self.asked = watch.upcoming();
        let mut bytes = vec![SETTLE];
        bytes.extend(self.asked.iter().flat_map(Request::encode));
        self.verdict_owed = true;
        Ok((&*self.stream).write_all(&bytes)?)
    }

    /// Takes in what an answer says of descriptors.
    fn keep(&mut self, place: Place, dropped: SlotSet, fd: Option<OwnedFd>) -> Result<(), Loss> {
        for (slot, kept) in self.slots.iter_mut().enumerate() {
            if dropped & (1 << slot) != 0 {
                *kept = None;
            }
        }
        let broken = |reason: &str| Err(Loss::Broken(reason.into()));
        match (place, fd) {
            (Place::Slot { slot, fresh: true, .. }, Some(fd)) => {
                let shared = Shared::receive_known(fd, &self.known).map_err(|error| Loss::Broken(error.to_string()))?;
                self.slots[usize::from(slot)] = Some(shared); // decoding checked the slot
                Ok(())
            }
            (Place::Slot { fresh: true, .. }, None) => {
                broken("no descriptor came with its answer: has this process too many files open?")
            }
            (Place::Here | Place::Slot { fresh: false, .. }, Some(_)) => broken("it sent a descriptor unasked"),
            (Place::Here | Place::Slot { fresh: false, .. }, None) => Ok(()),
        }
    }

    /// Copies from what the holder shares, or leaves it there. That it is too short is no fault of the connection.
    fn copy(
        &mut self,
        op: &ReadOp,
        slot: u8,
        offset: u64,
        watch: &impl Watch,
        counters: &Counters,
    ) -> Result<Result<(ChunkHash, Option<Span>), ReadError>, Loss> {
        let Some(Some(shared)) = self.slots.get(usize::from(slot)) else {
            return Err(Loss::Broken("it names memory that it did not share".into()));
        };
        if let Some(sealed) = shared.sealed(offset, op.into.len()) {
            if op.adopts {
                self.settle_ahead(watch)?;
            }
            let digest = take_over(op, &sealed, watch, counters)?;
            return Ok(Ok((digest, op.adopts.then_some(sealed))));
        }
        let mut hasher = blake3::Hasher::new();
        let mut buffer = self.pieces.take();
        let mut done = 0;
        while done < op.into.len() {
            if !watch.is_wanted() {
                return Err(Loss::Unwanted);
            }
            let piece = next_piece(&mut buffer, op.into.len() - done);
            let copied = offset.checked_add(done).ok_or(io::ErrorKind::InvalidInput.into());
            if let Err(error) = copied.and_then(|from| shared.read(from, piece)) {
                return Ok(Err(ReadError::Disconnected(format!("what it shares cannot be read: {error}"))));
            }
            hasher.update(piece);
            op.into.write_past_caches(done, piece)?;
            done += piece.len() as u64;
            counters.received.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Ok(Ok((digest(&hasher), None)))
    }

    /// Receives bytes that come through the socket.
    fn take_in(&mut self, op: &ReadOp, watch: &impl Watch, counters: &Counters) -> Result<ChunkHash, Loss> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = self.pieces.take();
        let mut done = 0;
        while done < op.into.len() {
            if !watch.is_wanted() {
                return Err(Loss::Unwanted);
            }
            let piece = next_piece(&mut buffer, op.into.len() - done);
            (&*self.stream).read_exact(piece).map_err(|error| match error.kind() == io::ErrorKind::UnexpectedEof {
                true => Loss::Broken("it closed the connection in the middle of a chunk".into()),
                false => error.into(),
            })?;
            hasher.update(piece);
            op.into.write_past_caches(done, piece)?;
            done += piece.len() as u64;
            counters.received.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Ok(digest(&hasher))
    }
}

/// Hashes memory that nobody can change where it lies, and copies it unless it may stay there.
fn take_over(op: &ReadOp, sealed: &Span, watch: &impl Watch, counters: &Counters) -> Result<ChunkHash, Loss> {
    let mut hasher = blake3::Hasher::new();
    let mut done = 0;
    let piece_len = if op.adopts { SHM_SEALED_PIECE_BYTES } else { RECEIVE_PIECE_BYTES };
    for piece in sealed.as_immutable().unwrap_or_default().chunks(piece_len) {
        if !watch.is_wanted() {
            return Err(Loss::Unwanted);
        }
        hasher.update(piece);
        if !op.adopts {
            op.into.write_past_caches(done, piece)?;
        }
        done += piece.len() as u64;
        counters.received.fetch_add(piece.len() as u64, Ordering::Relaxed);
    }
    Ok(digest(&hasher))
}

fn next_piece(piece: &mut [u8], left: u64) -> &mut [u8] {
    let len = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
    &mut piece[..len]
}

fn digest(hasher: &blake3::Hasher) -> ChunkHash {
    ChunkHash(Hash(*hasher.finalize().as_bytes()))
}
