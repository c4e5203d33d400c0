//! Every bound of this crate, with its unit in its name and where it comes from.

use std::time::Duration;

/// Bytes of one READ at most; a chunk is read in pieces of it. At 100 Gbit/s one takes 84 µs, so the
/// cost of posting and completing it is nothing, and a piece that comes says that the holder lives.
pub const PIECE_BYTES: u32 = 1 << 20;

/// READs posted at once on one queue pair, where the devices allow as many: 16 MiB under way, which is
/// more than 400 Gbit/s times 300 µs. Devices name 16 as their own limit commonly.
pub const DEPTH: u32 = 16;

/// Chunks asked for ahead on one connection, and so leases a holder keeps windows open for: at 4 MiB
/// each four times what is under way at once, so that the asking is hidden behind the reading.
pub const ASKED_AHEAD_MAX: usize = 16;

/// Connections accepted from one peer: one for each of its ports (eight in the largest machines),
/// twice, for those of a restart that are not yet known to be dead.
pub const ACCEPTED_PER_PEER_MAX: usize = 16;

/// Connections accepted in all. Each costs a thread with a small stack, and a queue pair. Guess.
pub const ACCEPTED_MAX: usize = 1024;

/// Connections that have not yet shown a ticket. Guess: a mesh of hundreds may arrive at once.
pub const UNAUTHENTICATED_MAX: usize = 128;

/// How long connecting to one endpoint may take. A SYN is repeated after one second and after three.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// From the connection to the end of the handshake, or to a queue pair at either side.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A reader closes a connection it has not used for so long.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A holder waits longer than any reader, so that a request never meets a closing connection.
pub const ACCEPTED_IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A holder gives up on a reader that takes no answer for so long.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a holder looks whether the leases still hold that windows are open for: how much longer
/// than its lease a key may work.
pub const LEASE_REVIEW: Duration = Duration::from_millis(250);

/// `timeout` of a queue pair: 4.096 µs × 2^14 = 67 ms until a request is sent again (InfiniBand
/// specification, 9.7.6.1.3; devices wait up to four times as long).
pub const ACK_TIMEOUT_EXPONENT: u8 = 14;

/// Times a request is sent again. Seven would mean for ever on some devices. Measured on rxe: with
/// six, a dead peer is known within 0.5 s.
pub const RETRY_COUNT_MAX: u8 = 6;

/// `min_rnr_timer`: nothing is ever sent that would need a receiver, so any value does.
pub const RNR_TIMER: u8 = 12;

/// Hops a RoCE packet may take between networks: the usual default.
pub const HOP_LIMIT: u8 = 64;

/// How long the completions of a queue pair that was stopped are waited for. They are there at once;
/// where they do not come, destroying the queue pair ends its requests as surely.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// How long an answer nobody waits for any more is given before the connection is renewed, since what
/// waits behind it would be stuck. Guess: many times what a holder takes to answer.
pub const STALE_ANSWER_TIMEOUT: Duration = Duration::from_millis(200);

/// How often time is looked at while reads are under way.
pub const TICK: Duration = Duration::from_millis(20);

/// How often registrations are looked through for memory that nobody else keeps any more.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(2);

/// The same, where no read is under way and nothing was registered when it was looked last: serving registers
/// memory, too. Guess.
pub const IDLE_SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// How often a read is moved from a lost connection to another: nothing of the first writes any more then.
pub const RETRIES_MAX: u8 = 1;

/// A port whose queue pair failed is not used for so long, if there is another. Guess: about what a
/// link takes to come back.
pub const PORT_PAUSE: Duration = Duration::from_secs(5);

/// Registered memory that chunks are copied to which cannot be shown where they lie, for each transport: as
/// much as a node lets others read at once by default, so that it suffices.
pub const STAGING_BYTES: u64 = 256 << 20;

/// How long a request waits for staging memory, or for its memory to be registered, before it is turned
/// away: less than the five seconds after which agents give a silent holder up.
pub const SHOW_PATIENCE: Duration = Duration::from_secs(3);

/// How often that is looked for meanwhile, besides when the reader says something.
pub const SHOW_RETRY: Duration = Duration::from_millis(20);

/// Memory is registered in pieces of this length, and the longest chunk. Registering makes absent pages
/// present, at 16 GiB in 11.6 s (measured, fresh memfd): 0.2 s for a piece, so that no holder seems silent
/// meanwhile. 100 GB are 400 regions, where devices allow a million and more.
pub const REGION_BYTES: u64 = 256 << 20;

/// Where too little memory may be locked, a region unused for so long makes room for another. Guess: one in
/// use would have to be registered again at once.
pub const REGION_IDLE: Duration = Duration::from_secs(10);

/// Ports of this machine used at once. The largest machines have one for each of eight GPUs, and some
/// for storage.
pub const PORTS_MAX: usize = 16;

/// Threads that hash what was read. One hashes 4 GB/s. Guess: as few as keep up.
pub const HASHING_THREADS_MAX: usize = 8;

/// Threads that register memory, for reading and serving together: one for every four cores. Fresh memory is
/// registered at 1.4 GB/s by one (measured: its pages are made), what is present at many times that. Guess.
pub const REGISTERING_THREADS_MIN: usize = 2;
pub const REGISTERING_THREADS_MAX: usize = 16;

/// Completions taken from a queue at once.
pub const POLL_BATCH: usize = 64;

/// Entries of the reading side's completion queue for each port. Guess: 1,024 connections' worth at
/// `DEPTH`, and within what devices allow (rxe: 32,767).
pub const COMPLETIONS_MAX: u32 = 16 << 10;

/// Stack of each thread: hashing takes 16 KiB of it; the rest is for the agent's callbacks.
pub const THREAD_STACK_BYTES: usize = 512 << 10;
