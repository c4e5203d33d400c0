//! Every bound of this crate, with its unit in its name and where it comes from.

/// Bytes one memfd slab of the memory store holds. Guess: large enough that a 1 TB store is
/// 16,000 mappings (Linux allows 65,530, `vm.max_map_count`), small enough to give back.
pub const SLAB_BYTES: u64 = 64 << 20;

/// A page as every processor here has it. A system's larger ones only make less to look at.
pub const PAGE_BYTES: usize = 4 << 10;

/// A large page of shared memory: on x86-64 and, with pages of 4 KiB, on 64-bit Arm.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Shared memory is made in large pages so much at a time, just before it is first written to. Measured, a GiB of
/// it: 0.07 CPU s in sections of 2 to 64 MiB, 0.62 in small pages; whoever writes to the same section meanwhile waits,
/// and what is made beyond a chunk is memory in use for nothing until the next arrives. So as long as most chunks.
pub const SECTION_BYTES: usize = 4 << 20;

/// How much of a slab must be in use, as a fraction, before it is sealed to be shared: what is free in it
/// then stays so until all of it is.
pub const SEALED_SHARE: (u64, u64) = (7, 8);

/// What slots of the memory store are rounded up to: a page, so that no two chunks share one.
pub const SLOT_BYTES: u64 = 4 << 10;

/// Files are hashed and copied through buffers of this size. 256 KiB stays in a core's L2 cache
/// and costs one system call per 60 µs of hashing.
pub const PIECE_BYTES: usize = 256 << 10;

/// Shared memory is hashed through a private buffer of this size. Measured with AVX-512, CPU seconds a
/// GB: 0.165 with 16 KiB, 0.150 with 32, 0.143 with 64, 0.139 with 128; 0.140 without a buffer.
pub const HASH_COPY_BYTES: usize = 64 << 10;

/// Windows of other processes that are mapped: the longest chunk. Reading a longer one maps nothing, since
/// a page that was never written would be made, and counted, by whoever looks at it.
pub const WINDOW_BYTES_MAX: u64 = 16 << 20;

/// The same of memory that nobody can write to any more: a slab of a store. Its missing pages, too, would be
/// made by who looks.
pub const SEALED_BYTES_MAX: u64 = SLAB_BYTES;

/// Spans longer than this are touched by several threads. Measured: one thread needs 11.6 s for
/// 16 GiB of fresh memfd.
pub const PREFAULT_PARALLEL_BYTES: u64 = 64 << 20;

/// Buffer sizes of the staging pool. A chunk takes the smallest that holds it: one below the target
/// lengths chunks are cut to, each of those, and the longest chunk a manifest may name.
pub const STAGING_CLASSES_BYTES: [u64; 8] =
    [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 16 << 20];

/// Staging memory of a disk store or file tree that was not handed a pool. Guess: 32 chunks of
/// 4 MiB keep a 100 Gbit/s link busy for 10 ms of disk hiccup.
pub const STAGING_DEFAULT_BYTES: u64 = 128 << 20;

/// Files a file tree keeps open at once. A quarter of the usual soft limit of 1024.
pub const TREE_OPEN_FILES_MAX: usize = 256;

/// Files one checkpoint directory may hold, and how deep they may lie. Guesses; they end a walk
/// that was started on `/` by mistake.
pub const CHECKPOINT_FILES_MAX: usize = 100_000;
pub const CHECKPOINT_DEPTH_MAX: usize = 32;

/// Longest `*.safetensors.index.json`. Kimi K2's, with 1.5 million tensor names, is 0.2 GB.
pub const INDEX_BYTES_MAX: u64 = 512 << 20;

/// A publisher's threads hash through buffers of this size, one each. One system call per 0.25 ms
/// of hashing, and still inside a shared cache.
pub const PUBLISH_PIECE_BYTES: usize = 1 << 20;

/// Random weights are made and written in pieces of this size.
pub const GENERATE_PIECE_BYTES: usize = 1 << 20;
