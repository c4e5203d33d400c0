//! One data connection as its own thread sees it: a socket, or TLS over it.
//!
//! Plain bytes are sent from the memory they lie in; encrypted ones pass through a buffer that stays in cache.
//! Somebody who cuts the stream cannot make less look like more: lengths are known.

use crate::socket::{self, Timed};
use crate::tls::{self, Tls};
use aquifer_core::NodeId;
use aquifer_memory::Span;
use rustls::Connection;
use std::cell::RefCell;
use std::io::{self, BufRead, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::limits::TLS_PIECE_BYTES;

/// What a TLS record of a handshake begins with; no frame of ours does.
const TLS_HANDSHAKE: u8 = 0x16;

pub(super) struct Link {
    stream: Arc<TcpStream>,
    session: Option<RefCell<Session>>,
}

impl Link {
    pub(super) fn plain(stream: Arc<TcpStream>) -> Self {
        Link { stream, session: None }
    }

    /// Encrypts what goes to `peer`; fails where somebody else is at the other end.
    pub(super) fn to(stream: Arc<TcpStream>, tls: &Tls, peer: NodeId, deadline: Instant) -> io::Result<Self> {
        Self::encrypted(stream, tls.client(peer).map_err(tls::broken)?, deadline)
    }

    /// The serving end of an encrypted connection.
    pub(super) fn from_anybody(stream: Arc<TcpStream>, tls: &Tls, deadline: Instant) -> io::Result<Self> {
        Self::encrypted(stream, tls.server().map_err(tls::broken)?, deadline)
    }

    fn encrypted(stream: Arc<TcpStream>, connection: Connection, deadline: Instant) -> io::Result<Self> {
        let mut session = Session::new(connection);
        session.shake_hands(&stream, deadline)?;
        Ok(Link { stream, session: Some(RefCell::new(session)) })
    }

    /// Who has proved to be at the other end of an encrypted one.
    pub(super) fn peer(&self) -> Option<NodeId> {
        tls::peer(&self.session.as_ref()?.borrow().connection)
    }

    /// Sends at most `len` bytes from byte `at` of `span`, of which more will follow. EFAULT says that
    /// the file behind the span was truncated.
    pub(super) fn send(&self, span: &Span, at: u64, len: u64) -> io::Result<u64> {
        let Some(session) = &self.session else { return socket::send(&*self.stream, span, at, len, true) };
        session.borrow_mut().send(&self.stream, span, at, len)
    }

    /// Sends a few bytes that more will follow at once.
    pub(super) fn send_before(&self, bytes: &[u8]) -> io::Result<()> {
        match &self.session {
            None => socket::send_before(&self.stream, bytes),
            Some(session) => session.borrow_mut().connection.writer().write_all(bytes),
        }
    }
}

/// Whether the other end of a fresh connection begins to speak TLS. Waits for its first byte.
pub(super) fn speaks_tls(stream: &TcpStream, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    let mut first = [0];
    match stream.peek(&mut first)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(first == [TLS_HANDSHAKE]),
    }
}

impl Timed for Link {
    fn set_read_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(time)
    }
}

impl Read for &Link {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(session) = &self.session else { return (&*self.stream).read(into) };
        session.borrow_mut().read(&self.stream, |plain| {
            let n = plain.len().min(into.len());
            into[..n].copy_from_slice(&plain[..n]);
            Ok(n)
        })
    }
}

impl Write for &Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(session) = &self.session else { return (&*self.stream).write(bytes) };
        let mut session = session.borrow_mut();
        session.connection.writer().write_all(bytes)?;
        session.flush(&self.stream)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // every write leaves at once
    }
}

/// TLS over a socket that is passed to each call.
struct Session {
    connection: Connection,
    /// Received and not yet decrypted: `unread` of `received`.
    received: Vec<u8>,
    unread: Range<usize>,
    /// On its way from a span to be encrypted.
    plain: Vec<u8>,
}

impl Session {
    fn new(mut connection: Connection) -> Self {
        // What is written is sent before more is: the buffer holds one piece at most.
        connection.set_buffer_limit(None);
        Session { connection, received: vec![0; TLS_PIECE_BYTES], unread: 0..0, plain: Vec::new() }
    }

    fn shake_hands(&mut self, stream: &TcpStream, deadline: Instant) -> io::Result<()> {
        self.flush(stream)?;
        while self.connection.is_handshaking() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            if self.unread.is_empty() && self.receive(stream)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let fed = self.feed();
            // Also an alert that says why not.
            let flushed = self.flush(stream);
            fed.and(flushed)?;
        }
        self.flush(stream)
    }

    /// Hands decrypted bytes to `take`, which returns how many it took. Receives at most once: `Interrupted`
    /// says that what came completes no record yet, so that the caller can look at its clock.
    fn read(&mut self, stream: &TcpStream, take: impl FnOnce(&[u8]) -> io::Result<usize>) -> io::Result<usize> {
        let mut received = false;
        loop {
            let mut reader = self.connection.reader();
            match reader.fill_buf() {
                Ok(plain) => {
                    let n = take(plain)?;
                    reader.consume(n);
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if self.unread.is_empty() {
                if std::mem::replace(&mut received, true) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                self.receive(stream)?;
            }
            self.feed()?;
            self.flush(stream)?;
        }
    }

    fn receive(&mut self, mut stream: &TcpStream) -> io::Result<usize> {
        let n = stream.read(&mut self.received)?;
        self.unread = 0..n;
        Ok(n)
    }

    /// Decrypts some of what was received; nothing received is the end of the stream.
    fn feed(&mut self) -> io::Result<()> {
        let mut unread = &self.received[self.unread.clone()];
        let n = self.connection.read_tls(&mut unread)?;
        self.unread.start += n;
        self.connection.process_new_packets().map(drop).map_err(tls::broken)
    }

    fn send(&mut self, stream: &TcpStream, span: &Span, at: u64, len: u64) -> io::Result<u64> {
        let n = usize::try_from(len).unwrap_or(usize::MAX).min(TLS_PIECE_BYTES);
        self.plain.resize(n, 0);
        span.read(at, &mut self.plain).map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
        self.connection.writer().write_all(&self.plain)?;
        self.flush(stream)?;
        Ok(n as u64)
    }

    fn flush(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut stream) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => drop(done?),
            }
        }
        Ok(())
    }
}
