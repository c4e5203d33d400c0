//! Bytes between a stream socket and memory that others may write: the only unsafe code of this crate.

use aquifer_memory::Span;
use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A stream whose reads can be given a time.
pub(crate) trait Timed {
    fn set_read_timeout(&self, time: Option<Duration>) -> io::Result<()>;
}

impl Timed for TcpStream {
    fn set_read_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        TcpStream::set_read_timeout(self, time)
    }
}

impl Timed for UnixStream {
    fn set_read_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        UnixStream::set_read_timeout(self, time)
    }
}

/// Sends at most `len` bytes from byte `at` of `span`. With `more`, the kernel may hold them back
/// until more come. EFAULT says that the file behind the span was truncated.
pub(crate) fn send(stream: &impl AsRawFd, span: &Span, at: u64, len: u64, more: bool) -> io::Result<u64> {
    let source = span.slice(at..at.saturating_add(len)).map_err(io::Error::other)?;
    let flags = libc::MSG_NOSIGNAL | if more { libc::MSG_MORE } else { 0 };
    retry(|| {
        // SAFETY: `source` is `len` mapped bytes and keeps them mapped during the call. The kernel
        // reads them and answers EFAULT for a page that no longer exists.
        unsafe { libc::send(stream.as_raw_fd(), source.as_ptr().cast(), size(len), flags) }
    })
}

/// Sends a few bytes that more will follow at once.
pub(crate) fn send_before(stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        let sent = retry(|| {
            // SAFETY: `rest` is a live slice.
            unsafe {
                libc::send(stream.as_raw_fd(), rest.as_ptr().cast(), rest.len(), libc::MSG_NOSIGNAL | libc::MSG_MORE)
            }
        })?;
        done += size(sent);
    }
    Ok(())
}

/// Fills `bytes` until `deadline`; the stream's read timeout is spent in doing so.
pub(crate) fn read_exact_by<S: Timed>(stream: &S, bytes: &mut [u8], deadline: Instant) -> io::Result<()>
where
    for<'a> &'a S: Read,
{
    let mut reader = stream;
    let mut done = 0;
    while done < bytes.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match reader.read(&mut bytes[done..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether an error says that a socket's own timeout ran out.
pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<u64> {
    loop {
        match u64::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Lengths inside a span fit the address space.
fn size(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
