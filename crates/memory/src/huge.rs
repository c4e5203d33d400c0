//! Pages of 2 MiB for memory that processes share.
//!
//! Shared memory comes in pages of 4 KiB, each made when it is first touched and found anew by each
//! process that maps it: most of what bytes cost that arrive once (docs/measured/shm.md). The kernel gives
//! it larger pages unasked only where the system was told so (`shmem_enabled`). It does when asked
//! for each range (`MADV_COLLAPSE`, Linux 6.1), and then nothing need be copied if the range was
//! empty but for a page. So memory is made in sections, just before the first byte arrives in one.
//! Where the kernel does not, memory is as it was.

use crate::limits::{HUGE_PAGE_BYTES, PAGE_BYTES, SECTION_BYTES};
use std::ops::Range;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

/// This kernel refused: it is not asked again.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// As Linux 6.1 has it (include/uapi/asm-generic/mman-common.h); not every C library does.
const MADV_COLLAPSE: libc::c_int = 25;

/// Which parts of one mapping have been made.
#[derive(Debug)]
pub(crate) struct Sections {
    made: Box<[Once]>,
    /// Bytes of sections that came in large pages throughout.
    large: AtomicUsize,
}

impl Sections {
    /// Of a mapping of `len` bytes at an address that is a multiple of a large page.
    pub(crate) fn new(len: usize) -> Self {
        let count = len.div_ceil(SECTION_BYTES);
        Sections { made: (0..count).map(|_| Once::new()).collect(), large: AtomicUsize::new(0) }
    }

    /// Makes the pages of every section that `range` touches, once. Best effort.
    ///
    /// # Safety
    /// `len` bytes of shared memory are mapped at `address`, which is a multiple of
    /// [`HUGE_PAGE_BYTES`]; they may be written, and stay mapped meanwhile.
    pub(crate) unsafe fn make(&self, address: *mut u8, len: usize, range: Range<usize>) {
        let sections = range.start / SECTION_BYTES..range.end.div_ceil(SECTION_BYTES);
        for section in sections {
            let Some(once) = self.made.get(section) else { return };
            once.call_once(|| {
                let begin = section * SECTION_BYTES;
                let bytes = SECTION_BYTES.min(len - begin);
                // SAFETY: the section lies in the mapping, as the caller vouches for.
                let is_large = unsafe { make_large(address.wrapping_add(begin), bytes) };
                self.large.fetch_add(if is_large { bytes } else { 0 }, Ordering::Relaxed);
            });
        }
    }

    /// Whether at least nine tenths of `len` bytes came in large pages.
    pub(crate) fn are_large(&self, len: usize) -> bool {
        self.large.load(Ordering::Relaxed) >= len / 10 * 9
    }
}

/// Makes a section that is empty in large pages; true if it is wholly in such now.
///
/// # Safety
/// As for [`Sections::make`]: `len` bytes at `address`, a multiple of [`HUGE_PAGE_BYTES`].
unsafe fn make_large(address: *mut u8, len: usize) -> bool {
    let whole = len / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if whole == 0 || REFUSED.load(Ordering::Relaxed) {
        return false;
    }
    // What is there already would be copied, page by page: slower than to leave it.
    let mut present = vec![0_u8; whole / PAGE_BYTES];
    // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
    if unsafe { libc::mincore(address.cast(), whole, present.as_mut_ptr()) } != 0 || present.iter().any(|p| p & 1 != 0)
    {
        return false;
    }
    // SAFETY: advice on a range that is mapped; it changes no byte. Where the system allows large pages, the
    // first touch makes one.
    unsafe { libc::madvise(address.cast(), whole, libc::MADV_HUGEPAGE) };
    for at in (0..whole).step_by(HUGE_PAGE_BYTES) {
        // SAFETY: the byte lies in the range, which may be written; an atomic operation may race with any
        // other access to it.
        let byte = unsafe { AtomicU8::from_ptr(address.wrapping_add(at)) };
        // Collapsing wants a page to begin with. Of a zero that it could see the compiler would make nothing.
        byte.fetch_or(std::hint::black_box(0), Ordering::Relaxed);
    }
    // SAFETY: the same range; the kernel moves what lies in it to other pages without changing it.
    match unsafe { libc::madvise(address.cast(), whole, MADV_COLLAPSE) } {
        0 => whole == len,
        _ => {
            // For want of memory in one piece it may be otherwise next time; else it knows no such thing.
            if std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
                REFUSED.store(true, Ordering::Relaxed);
            }
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::limits::{HUGE_PAGE_BYTES, SECTION_BYTES};
    use crate::mapping::Mapping;

    const SECTION: u64 = SECTION_BYTES as u64;

    #[test]
    fn what_was_there_stays_and_the_rest_is_zero() {
        let len = 2 * SECTION + HUGE_PAGE_BYTES as u64 + 5000;
        let (ours, fd) = Mapping::memfd("t", len).unwrap();
        let theirs = Mapping::from_memfd(fd, len).unwrap();
        // By another process, as it were, before this one looks.
        theirs.span().write(SECTION + 4097, b"before").unwrap();
        ours.span().write(len - 3, b"end").unwrap();
        ours.span().prefault();
        ours.span().write_past_caches(SECTION - 2, &[7; 4]).unwrap();
        let mut all = vec![1; usize::try_from(len).unwrap()];
        theirs.span().read(0, &mut all).unwrap();
        let mut expected = vec![0; all.len()];
        expected[SECTION_BYTES - 2..SECTION_BYTES + 2].fill(7);
        expected[SECTION_BYTES + 4097..][..6].copy_from_slice(b"before");
        let tail = expected.len() - 3;
        expected[tail..].copy_from_slice(b"end");
        assert!(all == expected);
    }
}
