//! A range of a mapping: what is landed in, hashed, and served from.
//!
//! Bytes here may be changed at any moment by another process or another thread, so no Rust
//! reference to them ever exists. They are copied by foreign functions (`memmove`, `pread`), and
//! whatever is computed from them is computed from a private copy.

use crate::copy::{copy_past_caches, copy_shared};
use crate::error::MemoryError;
use crate::limits::{HASH_COPY_BYTES, PIECE_BYTES, PREFAULT_PARALLEL_BYTES};
use crate::mapping::{MappedFile, Mapping};
use aquifer_core::{ChunkHash, Hash};
use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Something that must outlive every span that carries it: its drop is the news that they are gone.
pub type Guard = Arc<dyn Any + Send + Sync>;

/// A range of bytes of a [`Mapping`], which it keeps mapped. Cheap to clone; clones are the same
/// bytes. All access is checked against its bounds.
#[derive(Clone)]
pub struct Span {
    mapping: Arc<Mapping>,
    offset: u64,
    len: u64,
    guard: Option<Guard>,
}

impl Span {
    pub(crate) fn whole(mapping: Arc<Mapping>) -> Self {
        let len = mapping.len();
        Span { mapping, offset: 0, len, guard: None }
    }

    /// The same bytes; `guard` is dropped with the last span made from this one.
    pub fn guarded(self, guard: Guard) -> Self {
        let guard: Guard = match self.guard {
            None => guard,
            Some(inner) => Arc::new((guard, inner)),
        };
        Span { guard: Some(guard), ..self }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn slice(&self, range: Range<u64>) -> Result<Span, MemoryError> {
        let bad = MemoryError::Bounds { begin: range.start, end: range.end, len: self.len };
        if range.start > range.end || range.end > self.len {
            return Err(bad);
        }
        Ok(Span { offset: self.offset + range.start, len: range.end - range.start, ..self.clone() })
    }

    /// What it is a range of, and from which byte on.
    pub fn mapping(&self) -> (&Arc<Mapping>, u64) {
        (&self.mapping, self.offset)
    }

    /// Address of the first byte, for system calls and devices. Valid for `len()` bytes while
    /// this span lives. Reading it directly is a SIGBUS where a file was truncated.
    pub fn as_ptr(&self) -> *const u8 {
        self.address()
    }

    /// The same, to write through; `None` where the span is read-only.
    pub fn as_mut_ptr(&self) -> Option<*mut u8> {
        self.is_writable().then(|| self.address())
    }

    pub fn is_writable(&self) -> bool {
        self.mapping.is_writable()
    }

    /// Copies bytes out, from byte `at` on.
    pub fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.check(at, into.len() as u64)?;
        if let Some(file) = self.mapping.mapped_file() {
            return file.file.read_exact_at(into, self.offset + at).map_err(|e| in_file(file, e));
        }
        // SAFETY: `check` proved that the source lies in the mapping, which this span keeps
        // mapped; `into` is ours alone.
        unsafe { copy_shared(self.address_at(at), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes in, from byte `at` on.
    pub fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.check(at, from.len() as u64)?;
        self.check_writable()?;
        // SAFETY: `check` proved that the destination lies in the mapping, which this span keeps
        // mapped and which is writable; `from` is a live slice.
        unsafe { copy_shared(from.as_ptr(), self.address_at(at), from.len()) };
        Ok(())
    }

    /// The same, past the caches where that is possible: for long pieces that nobody reads soon. Memory that
    /// was never touched is made in large pages first.
    pub fn write_past_caches(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.check(at, from.len() as u64)?;
        self.check_writable()?;
        self.make(at..at + from.len() as u64);
        // SAFETY: `check` proved that the destination lies in the mapping, which this span keeps
        // mapped and which is writable; `from` is a live slice, and no slice ever is of a mapping.
        unsafe { copy_past_caches(from, self.address_at(at)) };
        Ok(())
    }

    /// The BLAKE3 hash of its bytes.
    pub fn hash(&self) -> io::Result<ChunkHash> {
        let mut hasher = blake3::Hasher::new();
        self.hash_into(0, self.len, &mut hasher)?;
        Ok(ChunkHash(Hash(*hasher.finalize().as_bytes())))
    }

    /// Its bytes, where nobody can ever change them: they need not be copied to be looked at.
    pub fn as_immutable(&self) -> Option<&[u8]> {
        // SAFETY: `slice` and `whole` keep the range inside the mapping, which this span keeps mapped, to be read;
        // the kernel sealed its memory against shrinking and against every write, for good.
        self.mapping.is_immutable().then(|| unsafe { std::slice::from_raw_parts(self.address(), clamped(self.len)) })
    }

    /// Feeds `len` bytes from byte `at` on to `hasher`.
    pub fn hash_into(&self, at: u64, len: u64, hasher: &mut blake3::Hasher) -> io::Result<()> {
        self.check(at, len)?;
        if let Some(bytes) = self.as_immutable() {
            hasher.update(&bytes[clamped(at)..clamped(at + len)]);
            return Ok(());
        }
        if self.mapping.mapped_file().is_some() {
            return with_piece(|piece| self.feed(at, len, piece, hasher));
        }
        with_piece(|piece| self.feed(at, len, &mut piece[..HASH_COPY_BYTES], hasher))
    }

    fn feed(&self, at: u64, len: u64, buffer: &mut [u8], hasher: &mut blake3::Hasher) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let n = buffer.len().min(clamped(len - done));
            self.read(at + done, &mut buffer[..n])?;
            hasher.update(&buffer[..n]);
            done += n as u64;
        }
        Ok(())
    }

    /// Copies `len` bytes from byte `at` on to byte `dst_at` of another span. The two may overlap.
    pub fn copy_to(&self, at: u64, dst: &Span, dst_at: u64, len: u64) -> io::Result<()> {
        self.check(at, len)?;
        dst.check(dst_at, len)?;
        dst.check_writable()?;
        dst.make(dst_at..dst_at + len);
        let to = dst.address_at(dst_at);
        match self.mapping.mapped_file() {
            Some(mapped) => {
                // SAFETY: `check` proved that the destination lies in the mapping, which `dst` keeps mapped
                // and which is writable.
                let read = unsafe { pread_exact(&mapped.file, to, len, self.offset + at) };
                read.map_err(|error| in_file(mapped, error))
            }
            None => {
                // SAFETY: both ranges were checked against their mappings, which the spans keep mapped.
                unsafe { copy_shared(self.address_at(at), to, clamped(len)) };
                Ok(())
            }
        }
    }

    /// Whether every byte still exists: a file may have been truncated. Memory always does.
    pub fn is_backed(&self) -> io::Result<bool> {
        match self.mapping.mapped_file() {
            None => Ok(true),
            Some(file) => Ok(file.len_now()? >= self.offset + self.len),
        }
    }

    /// Makes its pages present, so that the first write is as fast as the second. Best effort;
    /// a file is read ahead. Long spans are touched by all cores.
    pub fn prefault(&self) {
        if let Some(file) = self.mapping.mapped_file() {
            let len = std::num::NonZeroU64::new(self.len);
            let _ = rustix::fs::fadvise(&file.file, self.offset, len, rustix::fs::Advice::WillNeed);
        }
        if !self.is_writable() {
            return;
        }
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let share = match self.len > PREFAULT_PARALLEL_BYTES {
            true => self.len.div_ceil(cores).next_multiple_of(PREFAULT_PARALLEL_BYTES),
            false => self.len.max(1),
        };
        std::thread::scope(|scope| {
            let mut begin = 0;
            while begin < self.len {
                let range = begin..(begin + share).min(self.len);
                begin = range.end;
                match begin < self.len {
                    true => {
                        scope.spawn(move || self.touch(range));
                    }
                    false => self.touch(range),
                }
            }
        });
    }

    /// Makes what a write to `range` needs in large pages, if it was never touched.
    fn make(&self, range: Range<u64>) {
        self.mapping.make(clamped(self.offset + range.start)..clamped(self.offset + range.end));
    }

    /// Touches one byte of every page without changing it.
    fn touch(&self, range: Range<u64>) {
        self.make(range.clone());
        for at in range.step_by(4096) {
            // SAFETY: `at` is below `len`, so the byte lies in the mapping, which is writable memory and
            // stays mapped; an atomic operation may race with any other access to it.
            let byte = unsafe { AtomicU8::from_ptr(self.address_at(at)) };
            // Of a zero that it could see the compiler would make nothing at all.
            byte.fetch_or(std::hint::black_box(0), Ordering::Relaxed);
        }
    }

    fn address(&self) -> *mut u8 {
        self.address_at(0)
    }

    /// Inside the mapping for every `at` up to `len`.
    fn address_at(&self, at: u64) -> *mut u8 {
        self.mapping.address().wrapping_add(clamped(self.offset + at))
    }

    fn check(&self, at: u64, len: u64) -> io::Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            end => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                MemoryError::Bounds { begin: at, end: end.unwrap_or(u64::MAX), len: self.len },
            )),
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        match self.is_writable() {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::PermissionDenied, "this span is mapped to be read")),
        }
    }
}

/// Equal are spans of the same bytes of the same mapping.
impl PartialEq for Span {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping) && (self.offset, self.len) == (other.offset, other.len)
    }
}

impl Eq for Span {}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Span({} bytes at {} of {:?})", self.len, self.offset, self.mapping)
    }
}

/// A length inside a mapping as `usize`: mappings are never longer than `isize::MAX`.
pub(crate) fn clamped(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Runs `f` with this thread's file buffer.
pub(crate) fn with_piece<T>(f: impl FnOnce(&mut [u8]) -> T) -> T {
    thread_local!(static PIECE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    PIECE.with(|piece| match piece.try_borrow_mut() {
        Ok(mut piece) => {
            piece.resize(PIECE_BYTES, 0);
            f(&mut piece)
        }
        Err(_) => f(&mut vec![0; PIECE_BYTES]),
    })
}

/// Reads exactly `len` bytes of a file to an address.
///
/// # Safety
/// `len` bytes must be writable at `to`, for as long as the call lasts.
unsafe fn pread_exact(file: &File, to: *mut u8, len: u64, offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let at = offset.checked_add(done).and_then(|at| i64::try_from(at).ok());
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        let left = clamped(len - done);
        // SAFETY: `left` bytes are writable `done` bytes beyond `to`, as the caller vouches.
        let n = unsafe { libc::pread(file.as_raw_fd(), to.wrapping_add(clamped(done)).cast(), left, at) };
        match u64::try_from(n) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

fn in_file(file: &MappedFile, error: io::Error) -> io::Error {
    let reason = match error.kind() == io::ErrorKind::UnexpectedEof {
        true => "it was truncated while in use".to_string(),
        false => error.to_string(),
    };
    io::Error::new(error.kind(), format!("{}: {reason}", file.path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
    }

    fn of_file(bytes: &[u8]) -> (tempfile::NamedTempFile, Span) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let span = Mapping::file(file.path()).unwrap().span();
        (file, span)
    }

    #[test]
    fn files_and_memory_hash_alike() {
        let bytes = pattern(3 * PIECE_BYTES + 17);
        let (_file, file) = of_file(&bytes);
        let memory = Mapping::anonymous(bytes.len() as u64).unwrap().span();
        memory.prefault();
        file.copy_to(0, &memory, 0, file.len()).unwrap();
        assert_eq!(file.hash().unwrap(), ChunkHash::of(&bytes));
        assert_eq!(memory.hash().unwrap(), ChunkHash::of(&bytes));
        assert_eq!(memory.slice(5..9).unwrap().hash().unwrap(), ChunkHash::of(&bytes[5..9]));
    }

    #[test]
    fn a_file_is_never_written() {
        let (_file, file) = of_file(b"abc");
        assert!(file.as_mut_ptr().is_none());
        assert!(file.write(0, b"x").is_err());
        let memory = Mapping::anonymous(3).unwrap().span();
        assert!(memory.copy_to(0, &file, 0, 3).is_err());
    }

    #[test]
    fn truncation_is_an_error_and_not_a_crash() {
        let (file, span) = of_file(&pattern(100_000));
        file.as_file().set_len(10).unwrap();
        let memory = Mapping::anonymous(100_000).unwrap().span();
        assert!(span.hash().unwrap_err().to_string().contains("truncated"));
        assert!(span.copy_to(0, &memory, 0, 100_000).is_err());
        assert!(!span.is_backed().unwrap());
        assert!(span.slice(0..10).unwrap().is_backed().unwrap());
    }

    #[test]
    fn a_guard_outlives_every_slice() {
        let guard: Guard = Arc::new(());
        let span = Mapping::anonymous(10).unwrap().span().guarded(guard.clone()).guarded(Arc::new(1));
        let slice = span.slice(2..3).unwrap();
        drop(span);
        assert_eq!(Arc::strong_count(&guard), 2);
        drop(slice);
        assert_eq!(Arc::strong_count(&guard), 1);
    }

    proptest! {
        #[test]
        fn bounds_hold(len in 0u64..50, a in any::<u64>(), b in 0u64..60, n in 0usize..60) {
            let span = Mapping::anonymous(50).unwrap().span().slice(0..len).unwrap();
            let mut buffer = vec![0; n];
            for at in [a, b] {
                let fits = at.checked_add(n as u64).is_some_and(|end| end <= len);
                prop_assert_eq!(span.read(at, &mut buffer).is_ok(), fits);
                prop_assert_eq!(span.write(at, &buffer).is_ok(), fits);
                prop_assert_eq!(span.copy_to(at, &span, 0, n as u64).is_ok(), fits);
                prop_assert_eq!(span.slice(at..b).is_ok(), at <= b && b <= len);
            }
        }
    }
}
