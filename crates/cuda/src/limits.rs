//! Every bound of this crate, with its unit in its name and where it comes from.

/// The driver that has `cuMemcpyBatchAsync`: CUDA 12.8.
pub const DRIVER_VERSION_BATCHES: i32 = 12_080;

/// The longest copy that the kernel for many copies is told of; longer ones are split. With 16 blocks each, a
/// copy of some of them keeps all multiprocessors of a large GPU busy.
pub const COPY_BYTES: u64 = 4 << 20;

/// Arguments up to this length go to the GPU with launches, 3,840 bytes each; longer ones are copied. A batch of
/// chunks of 4 MiB needs 2.4 KB.
pub const PUT_BYTES_MAX: usize = 16 << 10;

/// The oldest driver: CUDA 12.0, which is what the committed PTX needs (ISA 8.0, `cargo xtask ptx`).
pub const DRIVER_VERSION_MIN: i32 = 12_000;

/// Bytes hashed by one launch while landing: at 55 GB/s 1.2 ms of copying, beside which a launch and its wait (tens
/// of microseconds) are nothing; what is hashed after the last copy is one batch.
pub const BATCH_BYTES: u64 = 64 << 20;

/// Batches under way per worker before the oldest is waited for. The copy engine must always have the next copy
/// queued: two would do, four ride out a thread that is not scheduled for some milliseconds.
pub const BATCHES_AHEAD: usize = 4;

/// Threads that land registered memory, each with its own stream. One keeps the copy engine full, with
/// [`BATCHES_AHEAD`]; with two, the engine changes between streams, and a load took 0.6 % longer (docs/measured/gpu.md).
pub const WORKERS: usize = 1;

/// Threads that copy what is not registered into staging memory: one core copies 5 to 10 GB/s, a PCIe 5 link
/// takes 55. Guess.
pub const STAGING_WORKERS: usize = 8;

/// Bytes of one staging buffer. A chunk that is longer goes through in pieces.
pub const STAGING_BUFFER_BYTES: u64 = 4 << 20;

/// Staging buffers per worker: one is filled while the others are copied from.
pub const STAGING_BUFFERS: usize = 4;

/// Host memory shorter than this is copied by way of staging memory: longer than any chunk, so that a store's slabs
/// are registered, once, and a single chunk's memory, which is soon given back, is not.
pub const REGISTERED_BYTES_MIN: u64 = 32 << 20;

/// One call that registers memory: 16 of them for 16 GiB, so that all cores can take part.
pub const REGISTER_PIECE_BYTES: u64 = 1 << 30;

/// Leaves of a chunk: the kernel counts them in 32 bits.
pub const CHUNK_BYTES_MAX: u64 = (u32::MAX as u64) << 10;

/// Tiles of one launch: the x dimension of a grid.
pub const TILES_MAX: u64 = i32::MAX as u64;

/// Scratch memory that a stream keeps for its next hashes. More than are ever under way at once.
pub const SCRATCH_KEPT_MAX: usize = 8;

/// Chunks that are staged on a device begin at multiples of this: what the copy and hashing kernels read at once.
pub const STAGED_ALIGN_BYTES: u64 = 256;
