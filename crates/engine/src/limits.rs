//! Every bound of this crate, with its unit in its name and where it comes from.

use std::time::Duration;

/// Longest frame, in bytes. The reply to `manifest` is the longest message where it is not asked for in
/// pages: 100 bytes of JSON for each tensor makes 64 MiB enough for 600,000 tensors.
pub const FRAME_BYTES_MAX: usize = 64 << 20;

/// About how much a page of a manifest tells, in bytes. A character of a name can become six in JSON, so
/// that an eighth of [`FRAME_BYTES_MAX`] fits a frame in any case.
pub(crate) const PAGE_BYTES: usize = FRAME_BYTES_MAX / 8;

/// A frame's buffer grows by at most this much before the bytes are there, so that a length alone
/// reserves nothing. Linux's default socket buffer is 208 KiB.
pub(crate) const READ_STEP_BYTES: usize = 256 << 10;

/// Room for descriptors in one `recvmsg`. A frame carries one; room for more lets the excess be
/// counted and refused instead of being cut off by the kernel.
pub(crate) const FRAME_FDS_ROOM: usize = 4;

/// A frame whose first byte has come must be whole within this time. Guess: a local writer that
/// takes longer is stuck.
pub(crate) const FRAME_STALL: Duration = Duration::from_secs(60);

/// Engines connected at once. Guess: eight GPUs, a few processes each, and people who watch.
pub const CONNECTIONS_MAX: usize = 256;

/// Requests of all engines that the agent has not looked at yet. Behind it, the engines' own
/// sockets fill and they wait.
pub const EVENTS_QUEUED_MAX: usize = 1024;

/// Messages to one engine that it has not read. Guess: an engine that reads at all is never more
/// than a few behind, as progress reports replace one another.
pub const OUTBOX_FRAMES_MAX: usize = 256;

/// The same in bytes: room for two of the longest frames.
pub const OUTBOX_BYTES_MAX: usize = 2 * FRAME_BYTES_MAX;

/// How long a connection that is being closed may take to read what it is owed. Guess.
pub(crate) const CLOSE_GRACE: Duration = Duration::from_secs(5);

/// Wait after the kernel refused to accept a connection, which is mostly for want of descriptors.
/// Guess.
pub(crate) const ACCEPT_WAIT: Duration = Duration::from_millis(100);

/// Wait between two attempts to reach an agent that is gone: from the first, doubling, to the
/// second. Guesses: an agent restarts in well under a second, and a node without one for minutes
/// should not notice the attempts.
pub(crate) const RECONNECT_WAIT_MIN: Duration = Duration::from_millis(50);
pub(crate) const RECONNECT_WAIT_MAX: Duration = Duration::from_secs(5);

/// Bindings in one `bind` request of the client. A binding is some 200 bytes of JSON.
pub(crate) const BINDINGS_PER_REQUEST: usize = 4096;

/// How long the command line waits for an agent's status. Guess: it answers from memory.
pub(crate) const STATUS_WAIT: Duration = Duration::from_secs(10);

/// Tensors that the client lays out begin at multiples of this many bytes, as in CUDA's
/// allocator, so that any kernel may read them.
pub const TENSOR_ALIGN_BYTES: u64 = 256;

/// `sun_path` holds 108 bytes, the last of them NUL (unix(7)).
pub(crate) const SOCKET_PATH_BYTES_MAX: usize = 107;
