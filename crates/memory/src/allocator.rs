//! How the C library's allocator goes about its business.

/// Pools of memory that threads share. An agent has a hundred threads at times, most of which live for seconds and allocate
/// little; by default they get eight pools for each core, and each pool keeps what it ever needed: an agent's memory grew for as
/// long as threads came and went, while what was in use did not.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENAS_MAX: i32 = 4;

/// Has threads share few pools of memory. To be called before there are threads; elsewhere than with glibc it does nothing.
pub fn share_arenas() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes two numbers and sets one; a bad one is refused, and nothing depends on it.
    let _refused = unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX) } == 0;
}

/// Gives the system back what the allocator has and nobody uses, as far as that is whole pages: what lives on lies between
/// what was freed, and would keep it for ever. Takes milliseconds, in which others may wait to allocate.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes a number, and touches nothing that is in use.
    let _given = unsafe { libc::malloc_trim(0) } != 0;
}
