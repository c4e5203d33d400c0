//! Memory mapped into this process: anonymous, a memfd shared with engines, or a file to read.
//!
//! A mapping is only ever reached through [`Span`]s, which keep it mapped and check bounds.

use crate::error::MemoryError;
use crate::huge::Sections;
use crate::limits::{HUGE_PAGE_BYTES, PAGE_BYTES, SEALED_BYTES_MAX, WINDOW_BYTES_MAX};
use crate::seal::{Remap, Slab};
use crate::shared;
use crate::span::Span;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

/// A mapped range of addresses, unmapped on drop.
pub struct Mapping {
    /// Dangling where `len` is zero.
    address: NonNull<u8>,
    len: usize,
    backing: Backing,
    /// Of shared memory that this process may write to.
    sections: Option<Sections>,
}

// SAFETY: the address range belongs to this value alone and stays mapped until it is dropped,
// from whichever thread. No reference into it is ever made: every access in this crate is a copy
// through a raw pointer by a foreign function (see `span`).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

enum Backing {
    Anonymous,
    /// Others write to it too.
    Memfd,
    /// Nobody can write to it but through this mapping.
    Window(OwnedFd),
    /// Nobody else has it until nobody can write to it any more.
    Slab(Slab),
    /// Another process's window.
    Seen,
    /// Memory that another process sealed: nobody can write to it.
    Sealed(OwnedFd),
    File(MappedFile),
}

/// The file behind a mapping, and what it was when it was opened.
pub(crate) struct MappedFile {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    opened: Stamp,
}

/// What tells whether a file was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: (i64, u64),
}

impl Mapping {
    /// Fresh zeroed memory of this process.
    pub fn anonymous(len: u64) -> Result<Arc<Self>, MemoryError> {
        let size = size_of_map(len)?;
        let address = match size {
            0 => NonNull::dangling(),
            // SAFETY: a null hint without MAP_FIXED asks for a new range; no existing memory is touched.
            _ => non_null(unsafe {
                mmap_anonymous(
                    std::ptr::null_mut(),
                    size,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::NORESERVE,
                )
            })
            .map_err(MemoryError::os("mmap", format!("{len} bytes of memory")))?,
        };
        if size >= HUGE_PAGE_BYTES {
            // Best effort: small pages are as right.
            // SAFETY: advice on the range that was just mapped; it changes no byte.
            let _ = unsafe { madvise(address.as_ptr().cast(), size, Advice::LinuxHugepage) };
        }
        Ok(Arc::new(Mapping { address, len: size, backing: Backing::Anonymous, sections: None }))
    }

    /// Fresh zeroed memory that other processes can map too. Its size is sealed. The descriptor
    /// is for handing to them; the mapping does not need it.
    pub fn memfd(name: &str, len: u64) -> Result<(Arc<Self>, OwnedFd), MemoryError> {
        let fd = sized_memfd(name, len, SealFlags::SEAL)?;
        let what = || format!("{len} bytes of shared memory");
        let copy = fd.try_clone().map_err(|source| MemoryError::Os { call: "dup", what: what(), source })?;
        Ok((Self::from_memfd(fd, len)?, copy))
    }

    /// Fresh zeroed memory that other processes can read and only this mapping can write to. Where the
    /// kernel cannot promise that (before Linux 5.1), they cannot read it either.
    pub fn window(name: &str, len: u64) -> Result<Arc<Self>, MemoryError> {
        let fd = sized_memfd(name, len, SealFlags::empty())?;
        let address = map_fd(fd.as_fd(), len, ProtFlags::READ | ProtFlags::WRITE, "shared memory")?;
        // Spares the mapping that is there.
        let backing = match fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE) {
            Ok(()) => Backing::Window(fd),
            Err(_) => Backing::Memfd,
        };
        Self::made_in_sections(address, len, backing)
    }

    /// Fresh zeroed memory of a store.
    pub(crate) fn slab(name: &str, len: u64) -> Result<Arc<Self>, MemoryError> {
        let fd = sized_memfd(name, len, SealFlags::empty())?;
        let address = map_fd(fd.as_fd(), len, ProtFlags::READ | ProtFlags::WRITE, "a chunk store")?;
        Self::made_in_sections(address, len, Backing::Slab(Slab::new(fd)))
    }

    fn made_in_sections(address: NonNull<u8>, len: u64, backing: Backing) -> Result<Arc<Self>, MemoryError> {
        let len = size_of_map(len)?;
        let sections = (len >= HUGE_PAGE_BYTES).then(|| Sections::new(len));
        Ok(Arc::new(Mapping { address, len, backing, sections }))
    }

    /// The first `len` bytes of a memfd that another process made. It must be sealed against
    /// shrinking: if it were cut short, touching it would kill this process with SIGBUS.
    pub fn from_memfd(fd: OwnedFd, len: u64) -> Result<Arc<Self>, MemoryError> {
        let seals = fcntl_get_seals(&fd).map_err(|errno| MemoryError::NotMemfd { source: errno.into() })?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(MemoryError::NotSealed);
        }
        let found =
            stamp(fd.as_fd()).map_err(|source| MemoryError::Os { call: "fstat", what: "a region".into(), source })?;
        if found.len < len {
            return Err(MemoryError::TooSmall { claimed: len, found: found.len });
        }
        let address = map_fd(fd.as_fd(), len, ProtFlags::READ | ProtFlags::WRITE, "a region")?;
        Self::made_in_sections(address, len, Backing::Memfd)
    }

    /// All of a memfd that another process made, to read. `None` where it might be cut short, or is long.
    pub(crate) fn seen(fd: BorrowedFd<'_>) -> Result<Option<Arc<Self>>, MemoryError> {
        // Only memory has seals.
        let seals = fcntl_get_seals(fd).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK) {
            return Ok(None);
        }
        let what = || "another process's memory".to_string();
        let len = stamp(fd).map_err(|source| MemoryError::Os { call: "fstat", what: what(), source })?.len;
        let is_sealed = seals.contains(SealFlags::WRITE);
        if len > if is_sealed { SEALED_BYTES_MAX } else { WINDOW_BYTES_MAX } {
            return Ok(None);
        }
        let address = map_fd(fd, len, ProtFlags::READ, &what())?;
        let backing = match is_sealed {
            true => {
                let fd = fd.try_clone_to_owned();
                Backing::Sealed(fd.map_err(|source| MemoryError::Os { call: "dup", what: what(), source })?)
            }
            false => Backing::Seen,
        };
        Ok(Some(Arc::new(Mapping { address, len: size_of_map(len)?, backing, sections: None })))
    }

    /// A file, to read. See [`Mapping::from_file`].
    pub fn file(path: &Path) -> Result<Arc<Self>, MemoryError> {
        let open = |source| MemoryError::Os { call: "open", what: path.display().to_string(), source };
        Self::from_file(File::open(path).map_err(open)?, path)
    }

    /// An open file, to read; `path` is for messages. Its length is what it has now.
    ///
    /// This crate reads such spans with pread(2) and never touches the mapped pages, since a file
    /// can be truncated at any time and a touched page beyond its end is a SIGBUS. The addresses
    /// are for system calls, which answer EFAULT instead.
    pub fn from_file(file: File, path: &Path) -> Result<Arc<Self>, MemoryError> {
        let what = path.display().to_string();
        let opened =
            stamp(file.as_fd()).map_err(|source| MemoryError::Os { call: "fstat", what: what.clone(), source })?;
        let address = map_fd(file.as_fd(), opened.len, ProtFlags::READ, &what)?;
        let backing = Backing::File(MappedFile { file, path: path.to_path_buf(), opened });
        Ok(Arc::new(Mapping { address, len: size_of_map(opened.len)?, backing, sections: None }))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn span(self: &Arc<Self>) -> Span {
        Span::whole(self.clone())
    }

    /// Whether the file behind it was written to since it was opened: what changed, in words.
    /// A file replaced by another of its name is not changed: the old one is still open here.
    /// Memory never is.
    pub fn changed(&self) -> io::Result<Option<String>> {
        let Backing::File(mapped) = &self.backing else { return Ok(None) };
        let now = stamp(mapped.file.as_fd())?;
        Ok(if now.len != mapped.opened.len {
            Some(format!("it had {} bytes when it was opened and has {} now", mapped.opened.len, now.len))
        } else if now.modified != mapped.opened.modified {
            Some("it was written to after it was opened".into())
        } else {
            None
        })
    }

    /// The file's path, where it is a file.
    pub fn path(&self) -> Option<&Path> {
        self.mapped_file().map(|f| f.path.as_path())
    }

    /// A new descriptor of it that can only be read, to give to another process of this user, with the
    /// same offsets. `None` where it is not for others as a whole: private memory; a store that may still
    /// be written to, or whose pages are small, which would cost a reader more than a copy; an engine's
    /// region, which a descriptor would show for longer than a lease lasts and let any process of this
    /// user open to write; a file that may keep its reader waiting.
    pub fn share(&self) -> io::Result<Option<OwnedFd>> {
        let fd = match &self.backing {
            Backing::Anonymous | Backing::Memfd | Backing::Seen => return Ok(None),
            Backing::Slab(slab) => match slab.is_sealed() || self.is_large() && slab.seal(self.len(), self) {
                true => slab.fd(),
                false => return Ok(None),
            },
            Backing::Window(fd) | Backing::Sealed(fd) => fd.as_fd(),
            Backing::File(mapped) => mapped.file.as_fd(),
        };
        shared::reopen(fd)
    }

    pub fn is_writable(&self) -> bool {
        match &self.backing {
            Backing::Anonymous | Backing::Memfd | Backing::Window(_) => true,
            Backing::Slab(slab) => slab.is_writable(),
            Backing::Seen | Backing::Sealed(_) | Backing::File(_) => false,
        }
    }

    /// Whether nobody, in any process, can ever change a byte of it.
    pub fn is_immutable(&self) -> bool {
        match &self.backing {
            Backing::Slab(slab) => slab.is_sealed(),
            Backing::Sealed(_) => true,
            Backing::Anonymous | Backing::Memfd | Backing::Window(_) | Backing::Seen | Backing::File(_) => false,
        }
    }

    pub(crate) fn as_slab(&self) -> Option<&Slab> {
        match &self.backing {
            Backing::Slab(slab) => Some(slab),
            Backing::Anonymous
            | Backing::Memfd
            | Backing::Window(_)
            | Backing::Seen
            | Backing::Sealed(_)
            | Backing::File(_) => None,
        }
    }

    /// Makes the pages that a write to `range` needs, large if possible.
    pub(crate) fn make(&self, range: Range<usize>) {
        if let Some(sections) = &self.sections {
            // SAFETY: `sections` are there for mappings that were made to be written to, of `len` bytes at an
            // address that `map_fd` aligned. A slab that was sealed since is not written to: whoever
            // calls this holds a slot of it that is not written yet.
            unsafe { sections.make(self.address(), self.len, range) };
        }
    }

    fn is_large(&self) -> bool {
        self.sections.as_ref().is_some_and(|sections| sections.are_large(self.len))
    }

    pub(crate) fn mapped_file(&self) -> Option<&MappedFile> {
        match &self.backing {
            Backing::File(file) => Some(file),
            Backing::Anonymous
            | Backing::Memfd
            | Backing::Window(_)
            | Backing::Slab(_)
            | Backing::Seen
            | Backing::Sealed(_) => None,
        }
    }

    pub(crate) fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }
}

impl Remap for Mapping {
    fn remap(&self, fd: BorrowedFd<'_>, writable: bool) -> rustix::io::Result<()> {
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: the range is this mapping's own and holds the same memory before and after; the kernel
        // changes from one to the other at once. Nobody writes meanwhile, as `Slab` sees to.
        let mapped = unsafe { mmap(self.address().cast(), self.len, prot, MapFlags::SHARED | MapFlags::FIXED, fd, 0) };
        mapped.map(drop)
    }
}

impl MappedFile {
    pub(crate) fn len_now(&self) -> io::Result<u64> {
        Ok(stamp(self.file.as_fd())?.len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        // SAFETY: the range was mapped by one of the constructors with this length, is unmapped
        // nowhere else, and no span of it is left: each holds an Arc of this value.
        if let Err(errno) = unsafe { munmap(self.address.as_ptr().cast(), self.len) } {
            tracing::error!("munmap of {} bytes: {errno}", self.len);
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = match &self.backing {
            Backing::Anonymous => "private memory",
            Backing::Memfd => "shared memory",
            Backing::Window(_) => "a window",
            Backing::Slab(_) => "a chunk store",
            Backing::Seen | Backing::Sealed(_) => "another process's memory",
            Backing::File(file) => return write!(f, "Mapping({} bytes of {})", self.len, file.path.display()),
        };
        write!(f, "Mapping({} bytes of {of})", self.len)
    }
}

/// Fresh memory whose size is sealed, and whatever else `seals` say.
fn sized_memfd(name: &str, len: u64, seals: SealFlags) -> Result<OwnedFd, MemoryError> {
    let what = || format!("{len} bytes of shared memory");
    let fd = memfd_create(name, MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)
        .map_err(MemoryError::os("memfd_create", what()))?;
    ftruncate(&fd, len).map_err(MemoryError::os("ftruncate", what()))?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | seals)
        .map_err(MemoryError::os("fcntl F_ADD_SEALS", what()))?;
    Ok(fd)
}

/// Maps all of it; where that is as long as a large page, from a multiple of one on.
fn map_fd(fd: BorrowedFd<'_>, len: u64, prot: ProtFlags, what: &str) -> Result<NonNull<u8>, MemoryError> {
    let size = size_of_map(len)?;
    let failed = || MemoryError::os("mmap", format!("{len} bytes of {what}"));
    if size < HUGE_PAGE_BYTES {
        return match size {
            0 => Ok(NonNull::dangling()),
            // SAFETY: a null hint without MAP_FIXED asks for a new range; no existing memory is touched.
            _ => non_null(unsafe { mmap(std::ptr::null_mut(), size, prot, MapFlags::SHARED, fd, 0) }).map_err(failed()),
        };
    }
    let room = size.checked_add(HUGE_PAGE_BYTES).ok_or(rustix::io::Errno::NOMEM).map_err(failed())?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: as above.
    let reserved = non_null(unsafe { mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), flags) });
    let reserved = reserved.map_err(failed())?.as_ptr();
    let before = reserved.align_offset(HUGE_PAGE_BYTES);
    let aligned = reserved.wrapping_add(before);
    // SAFETY: the range lies in the one that was just reserved, and nobody else knows of it.
    let mapped = unsafe { mmap(aligned.cast(), size, prot, MapFlags::SHARED | MapFlags::FIXED, fd, 0) };
    // What was reserved beyond it on either side, or all of it. It holds nothing, and stays so at worst.
    let end = reserved.wrapping_add(room);
    let after = size.next_multiple_of(PAGE_BYTES);
    let rests = match mapped {
        Ok(_) => [(reserved, before), (aligned.wrapping_add(after), HUGE_PAGE_BYTES + size - before - after)],
        Err(_) => [(reserved, room), (end, 0)],
    };
    for (begin, bytes) in rests.into_iter().filter(|(_, bytes)| *bytes >= PAGE_BYTES) {
        // SAFETY: as above, and not part of what is returned.
        let _ = unsafe { munmap(begin.cast(), bytes) };
    }
    non_null(mapped).map_err(failed())
}

fn non_null(address: rustix::io::Result<*mut std::ffi::c_void>) -> rustix::io::Result<NonNull<u8>> {
    NonNull::new(address?.cast()).ok_or(rustix::io::Errno::NOMEM)
}

/// A length the address space can hold. Offsets inside stay below `isize::MAX`, as pointer
/// arithmetic demands.
fn size_of_map(len: u64) -> Result<usize, MemoryError> {
    let size = isize::try_from(len).ok().and_then(|n| usize::try_from(n).ok());
    size.ok_or(MemoryError::Bounds { begin: 0, end: len, len: isize::MAX as u64 })
}

fn stamp(fd: BorrowedFd<'_>) -> io::Result<Stamp> {
    let stat = fstat(fd)?;
    let len = u64::try_from(stat.st_size).map_err(|_| io::Error::other("negative file size"))?;
    Ok(Stamp { len, modified: (stat.st_mtime, stat.st_mtime_nsec) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_unsealed_or_short_region_is_refused() {
        let fd = memfd_create("t", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 4096).unwrap();
        assert!(matches!(Mapping::from_memfd(fd.try_clone().unwrap(), 4096), Err(MemoryError::NotSealed)));
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        let error = Mapping::from_memfd(fd.try_clone().unwrap(), 4097).unwrap_err();
        assert!(matches!(error, MemoryError::TooSmall { claimed: 4097, found: 4096 }));
        assert_eq!(Mapping::from_memfd(fd, 4096).unwrap().len(), 4096);
    }

    #[test]
    fn what_is_not_a_memfd_is_refused() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.set_len(4096).unwrap();
        assert!(Mapping::from_memfd(file.into(), 4096).is_err());
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(matches!(Mapping::from_memfd(reader.into(), 0), Err(MemoryError::NotMemfd { .. })));
    }

    #[test]
    fn a_memfd_is_shared_and_cannot_shrink() {
        let (ours, fd) = Mapping::memfd("t", 10_000).unwrap();
        assert!(ftruncate(&fd, 0).is_err());
        let theirs = Mapping::from_memfd(fd, 10_000).unwrap();
        ours.span().write(9_990, b"0123456789").unwrap();
        let mut seen = [0; 10];
        theirs.span().read(9_990, &mut seen).unwrap();
        assert_eq!(&seen, b"0123456789");
    }

    #[test]
    fn a_changed_file_is_noticed() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"hello").unwrap();
        let mapping = Mapping::file(file.path()).unwrap();
        assert_eq!(mapping.changed().unwrap(), None);
        file.as_file().set_len(3).unwrap();
        assert!(mapping.changed().unwrap().unwrap().contains("had 5 bytes"));
        assert!(mapping.span().hash().is_err());
    }

    #[test]
    fn empty_files_map_to_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(Mapping::file(file.path()).unwrap().is_empty());
    }
}
