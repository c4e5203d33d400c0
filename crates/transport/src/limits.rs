//! Every bound of this crate, with its unit in its name and where it comes from.

use std::time::Duration;

/// Bytes received, or copied from a shared memory or file, at a time, then hashed, then put in place past the caches:
/// they are in a core's L2 cache all the while. Measured with one connection, in GB/s: 4.7 with pieces of 128 or
/// 256 KiB, 3.6 with 64. Receiving in place and hashing that gives 5.0 where it may be hashed as if nobody else could
/// write to it, and 4.1 by way of a copy in the L1 cache, as memory that is shared must be.
pub const RECEIVE_PIECE_BYTES: usize = 256 << 10;

/// Bytes handed to one send(2). Guess: long enough that the system call is nothing, short enough
/// that the count of bytes sent moves while a chunk does.
pub const SEND_PIECE_BYTES: u64 = 1 << 20;

/// Bytes encrypted or decrypted at a time, in cache: 16 records of 16 KiB, and one system call.
pub const TLS_PIECE_BYTES: usize = 256 << 10;

/// Requests sent ahead on one connection, so that the holder always has the next one. At 4 MiB
/// and 100 Gbit/s, four cover a round trip of 1.3 ms.
pub const PIPELINE_DEPTH: usize = 4;

/// Connections to one peer. Each has a thread, which receives and hashes 5 GB/s at most: four are enough for
/// 100 Gbit/s and more cores than transfers should have.
pub const CONNECTIONS_PER_PEER_MAX: usize = 4;

/// Bytes that a connection receives before its thread is looked at, whether it is what is slow: four chunks of 4 MiB.
pub const BUSY_AFTER_BYTES: u64 = 16 << 20;

/// The share of the time from which a connection's thread is what is slow. One that waits for the network waits for
/// most of the time; one that receives and hashes as fast as it can was seen at 0.9 and more where it had a core.
pub const BUSY_SHARE: f64 = 0.75;

/// Requests sent ahead on a connection whose thread is what is slow: it has the next one, and leaves the others to
/// another thread.
pub const BUSY_DEPTH: usize = 2;

/// Connections accepted from one peer: what one asks for at most, twice, for those of a restart
/// that are not yet known to be dead.
pub const ACCEPTED_PER_PEER_MAX: usize = 2 * CONNECTIONS_PER_PEER_MAX;

/// Connections accepted in all. Each costs a thread with a small stack. Guess.
pub const ACCEPTED_MAX: usize = 1024;

/// Connections that have not yet shown a ticket. Guess: a mesh of hundreds may arrive at once.
pub const UNAUTHENTICATED_MAX: usize = 128;

/// From connecting to the end of the handshake, for either side.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// For each endpoint. A SYN is repeated after one second and after three.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A reader closes a connection it has not used for so long.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A holder waits longer than any reader, so that a request never meets a closing connection.
pub const ACCEPTED_IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A holder gives up on a reader that takes no byte for so long.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Stack of each connection's thread: hashing takes 16 KiB of it; the rest is for the agent's callbacks.
pub const THREAD_STACK_BYTES: usize = 512 << 10;

/// How often a read that had not begun is moved from a lost connection to a new one.
pub const RETRIES_MAX: u8 = 1;

/// Addresses whose misbehaviour was logged: later ones are not logged again. Guess.
pub const SCOLDED_MAX: usize = 4096;

/// Pause after accept(2) failed for want of descriptors or memory.
pub const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Bytes hashed at a time where they lie and stay: a read that is cancelled ends within a millisecond.
pub const SHM_SEALED_PIECE_BYTES: usize = 4 << 20;

/// Connections, each with a thread, over shared memory to one peer: as many chunks are copied and
/// hashed at once. Measured: one moves 4.7 GB/s, two on two cores 9.4; the rest is a guess.
pub const SHM_CONNECTIONS_PER_PEER_MAX: usize = 4;

/// Connections to all peers of this machine together. Guess: 64 agents on one.
pub const SHM_CONNECTIONS_MAX: usize = 256;

/// Connections accepted from one peer: four times what one opens. Those that it cut are ended as soon
/// as their thread notices.
pub const SHM_ACCEPTED_PER_PEER_MAX: usize = 4 * SHM_CONNECTIONS_PER_PEER_MAX;

/// Descriptors that a reader keeps for each connection: of its window, and of files. To pass one anew
/// costs some 10 µs, and a file of a checkpoint has hundreds of chunks. Guess.
pub const SHM_SLOTS: usize = 8;

/// Bytes of all windows that a holder keeps, each as long as the longest chunk its reader asked for.
/// Chunks of memory for which there is no room go through the socket. Guess: 64 readers of 4 MiB chunks.
pub const SHM_WINDOWS_BYTES_MAX: u64 = 256 << 20;

/// Windows are not shorter than this, so that they are seldom made anew.
pub const SHM_WINDOW_BYTES_MIN: u64 = 256 << 10;

/// Bytes of the socket's queue when chunks go through it. Linux grants twice `net.core.wmem_max`
/// (208 KiB by default) at most.
pub const SHM_SOCKET_QUEUE_BYTES: usize = 1 << 20;

/// Sockets of the dead that are looked for in the directory at the start. Guess.
pub const SHM_SWEPT_MAX: usize = 4096;
