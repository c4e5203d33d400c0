//! Memory and files that one process lets another read, by descriptor.
//!
//! What is sealed against shrinking is mapped. All else is read with pread(2): whoever gave the
//! descriptor may cut short what is behind it, and the call then says so where a mapped page would be a
//! SIGBUS.

use crate::error::MemoryError;
use crate::mapping::Mapping;
use crate::span::Span;
use rustix::fs::{FileType, Mode, OFlags, fstat, fstatfs, open};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// File systems (`statfs.f_type`, see statfs(2)) that never wait for another machine or process. A
/// read from any other may hang, and its thread with it.
const LOCAL: [u64; 11] = [
    0x0102_1994, // tmpfs, and every memfd
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683e, // btrfs
    0x794c_7630, // overlayfs
    0xf2f5_2010, // f2fs
    0x2fc1_2fc1, // zfs
    0xca45_1a4e, // bcachefs
    0x8584_58f6, // ramfs
    0x7371_7368, // squashfs
    0xe0f5_e1e2, // erofs
];

/// What another process lets this one read.
#[derive(Debug)]
pub struct Shared(Form);

/// Sealed memory that is mapped here: what is received again, by another connection say, is mapped once,
/// and found again by its number as long as anybody here keeps it.
#[derive(Debug, Default)]
pub struct Known(Mutex<BTreeMap<(u64, u64), Weak<Mapping>>>);

#[derive(Debug)]
enum Form {
    Window(Span),
    File(File),
}

impl Shared {
    /// Takes a descriptor from a process that is not trusted: it must be a plain file or a memfd, on a
    /// local file system.
    pub fn receive(fd: OwnedFd) -> Result<Self, MemoryError> {
        match objection(fd.as_fd()) {
            Ok(None) => {}
            Ok(Some(reason)) => return Err(MemoryError::NotShared { reason }),
            Err(errno) => return Err(MemoryError::os("fstat", "a shared descriptor")(errno)),
        }
        Ok(Shared(match Mapping::seen(fd.as_fd())? {
            Some(window) => Form::Window(window.span()),
            None => Form::File(fd.into()),
        }))
    }

    /// The same, with an eye to what is there already.
    pub fn receive_known(fd: OwnedFd, known: &Known) -> Result<Self, MemoryError> {
        let stat = fstat(&fd).map_err(MemoryError::os("fstat", "a shared descriptor"))?;
        let name = (stat.st_dev, stat.st_ino);
        let mut mapped = known.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mapping) = mapped.get(&name).and_then(Weak::upgrade) {
            return Ok(Shared(Form::Window(mapping.span())));
        }
        let shared = Shared::receive(fd)?;
        if let Form::Window(span) = &shared.0
            && span.as_immutable().is_some()
        {
            mapped.retain(|_, mapping| mapping.strong_count() > 0);
            mapped.insert(name, Arc::downgrade(span.mapping().0));
        }
        Ok(shared)
    }

    /// `len` bytes from byte `offset` on, where they are memory that nobody can ever change.
    pub fn sealed(&self, offset: u64, len: u64) -> Option<Span> {
        let Form::Window(span) = &self.0 else { return None };
        let part = span.slice(offset..offset.checked_add(len)?).ok()?;
        part.as_immutable().is_some().then_some(part)
    }

    /// Copies bytes out, from byte `offset` on. An error if there are not so many.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.0 {
            Form::Window(span) => span.read(offset, into),
            Form::File(file) => file.read_exact_at(into, offset),
        }
    }
}

/// A descriptor of the same file that can only be read; `None` if it is not one to share.
pub(crate) fn reopen(fd: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    if objection(fd)?.is_some() {
        return Ok(None);
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(Some(open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())?))
}

fn objection(fd: BorrowedFd<'_>) -> Result<Option<String>, Errno> {
    if FileType::from_raw_mode(fstat(fd)?.st_mode) != FileType::RegularFile {
        return Ok(Some("it is not a plain file".into()));
    }
    // The low 32 bits are what the kernel has; the type's width and sign differ between machines.
    let kind = u64::try_from(fstatfs(fd)?.f_type & 0xffff_ffff).unwrap_or(0);
    Ok((!LOCAL.contains(&kind)).then(|| format!("file system {kind:#x} may keep its readers waiting")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    use std::io::Write;

    #[test]
    fn a_window_is_read_and_never_written_by_others() {
        let window = Mapping::window("t", 8192).unwrap();
        let fd = window.share().unwrap().expect("this kernel has F_SEAL_FUTURE_WRITE");
        window.span().write(4096, b"later").unwrap();
        // Whoever has it may open it anew, also to write: the owner is the same.
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let mut again = File::options().read(true).write(true).open(path).unwrap();
        assert_eq!(again.write(b"x").unwrap_err().raw_os_error(), Some(libc::EPERM));
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint without MAP_FIXED asks for a new range; no existing memory is touched.
        let mapped = unsafe { mmap(std::ptr::null_mut(), 4096, prot, MapFlags::SHARED, &again, 0) };
        assert_eq!(mapped.unwrap_err(), Errno::PERM);
        assert!(again.set_len(0).is_err());

        let mut into = [0; 5];
        let shared = Shared::receive(fd).unwrap();
        let Shared(Form::Window(seen)) = &shared else { panic!("it is sealed") };
        assert!(seen.write(0, b"x").is_err() && seen.as_mut_ptr().is_none());
        seen.prefault();
        assert!(shared.read(8190, &mut into).is_err() && shared.read(u64::MAX, &mut into).is_err());
        shared.read(4096, &mut into).unwrap();
        assert_eq!(&into, b"later");
    }

    #[test]
    fn what_is_not_for_others_is_not_shared() {
        assert!(Mapping::anonymous(4096).unwrap().share().unwrap().is_none());
        let (region, _fd) = Mapping::memfd("t", 4096).unwrap();
        assert!(region.share().unwrap().is_none());
    }

    #[test]
    fn a_file_is_shared_to_be_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"hello").unwrap();
        let fd = Mapping::file(file.path()).unwrap().share().unwrap().expect("a local file");
        assert!(File::from(fd.try_clone().unwrap()).write(b"x").is_err());
        let mut into = [0; 4];
        let shared = Shared::receive(fd).unwrap();
        shared.read(1, &mut into).unwrap();
        assert_eq!(&into, b"ello");
        file.as_file().set_len(2).unwrap();
        assert_eq!(shared.read(1, &mut into).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn other_descriptors_are_refused() {
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(matches!(Shared::receive(reader.into()), Err(MemoryError::NotShared { .. })));
        let directory = File::open("/proc/self").unwrap();
        assert!(matches!(Shared::receive(directory.into()), Err(MemoryError::NotShared { .. })));
        // Of the kernel's own, and neither memory nor a disk.
        let proc = File::open("/proc/self/status").unwrap();
        assert!(matches!(Shared::receive(proc.into()), Err(MemoryError::NotShared { .. })));
    }

    #[test]
    fn memory_that_is_cut_short_is_an_error_and_not_a_crash() {
        let fd = memfd_create("t", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 8192).unwrap();
        let shared = Shared::receive(fd.try_clone().unwrap()).unwrap();
        let mut into = [0; 8192];
        shared.read(0, &mut into).unwrap();
        ftruncate(&fd, 4096).unwrap();
        assert!(shared.read(0, &mut into).is_err());
        assert!(shared.read(u64::MAX - 1, &mut into).is_err());
    }
}
