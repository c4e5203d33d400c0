//! Every bound of this crate, with its unit in its name and where it comes from.

use std::time::Duration;

/// Events one hook may have pending. Guess: a node that comes and goes all day sends some hundreds;
/// 10,000 last for days of a receiver that is away.
pub const PENDING_EVENTS_MAX: usize = 10_000;

/// Bytes one hook may have pending, with [`EVENT_COST_BYTES`] for each event. Guess: an event is some
/// 500 bytes of JSON, so that the number of events is the bound that counts, and odd ones cost no more.
pub const PENDING_BYTES_MAX: usize = 16 << 20;

/// What an event is taken to need in memory beside its texts: an entry of a tree, and an allocation for
/// each text.
pub const EVENT_COST_BYTES: usize = 160;

/// A webhook must be connected to and have answered within this time. Standard Webhooks recommends 15 to
/// 30 s; shorter here, since all that is behind it waits: a receiver can take the event and work later.
pub const WEBHOOK_ATTEMPT: Duration = Duration::from_secs(10);

/// A command must end within this time. Guess: longer than a call to another service with retries of its own.
pub const COMMAND_ATTEMPT: Duration = Duration::from_secs(60);

/// The first pause after an attempt that failed; each further one is twice as long. Guess: a receiver
/// that restarts is hardly noticed.
pub const RETRY_FIRST: Duration = Duration::from_millis(500);

/// The longest pause. Guess: a receiver that is back hears of it within a minute, and one that is down
/// has two attempts a minute of each node at most, since half of a pause is random.
pub const RETRY_LAST: Duration = Duration::from_secs(60);

/// The longest `Retry-After` that is honoured. Guess: a quarter of an hour is what services ask for that
/// count calls; whoever asks for a day would have the outbox run over.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(15 * 60);

/// How often a lasting trouble is warned of.
pub const WARN_EVERY: Duration = Duration::from_secs(60);

/// How long after the spool could not be written it is tried again. Guess.
pub const SPOOL_RETRY: Duration = Duration::from_secs(60);

/// The spool's file is written anew when it is longer than twice what is pending and this, in bytes: so
/// that each byte is written three times at most.
pub const SPOOL_SLACK_BYTES: u64 = 1 << 20;

/// How long the end of [`crate::Hooks`] waits for the spool to be written and commands to be killed, beyond
/// any deadline. Guess: both are a matter of milliseconds unless the disk hangs.
pub const CLOSE: Duration = Duration::from_secs(1);

/// How often the spool's lock is tried for, up to [`CLOSE`], before another process is said to have it.
pub(crate) const LOCK_LOOK: Duration = Duration::from_millis(10);

/// Bytes of an answer's body that are read: enough for its first line, which tells what is wrong.
pub(crate) const ANSWER_BYTES_MAX: u64 = 16 << 10;

/// Bytes of an answer's head that are read.
pub(crate) const ANSWER_HEAD_BYTES_MAX: usize = 32 << 10;

/// Bytes of a command's standard error that are kept, the last ones: its last line is told.
pub(crate) const STDERR_BYTES_MAX: usize = 4 << 10;

/// Bytes of standard error read after a command ended: what it left running may write for ever.
pub(crate) const STDERR_LEFT_BYTES_MAX: usize = 1 << 20;

/// How often a command is looked at where the kernel has no `pidfd_open` (Linux before 5.3).
pub(crate) const COMMAND_LOOK: Duration = Duration::from_millis(20);

/// Characters of an error that are kept.
pub(crate) const ERROR_CHARS_MAX: usize = 200;

/// Characters of a command that its hook is named by.
pub(crate) const NAME_CHARS_MAX: usize = 60;

/// The bounds and times that [`crate::Hooks`] keeps; those of this module unless a test has others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// [`WEBHOOK_ATTEMPT`]
    pub webhook_attempt: Duration,
    /// [`COMMAND_ATTEMPT`]
    pub command_attempt: Duration,
    /// [`RETRY_FIRST`]
    pub retry_first: Duration,
    /// [`RETRY_LAST`]
    pub retry_last: Duration,
    /// [`RETRY_AFTER_MAX`]
    pub retry_after_max: Duration,
    /// [`PENDING_EVENTS_MAX`]
    pub pending_events_max: usize,
    /// [`PENDING_BYTES_MAX`]
    pub pending_bytes_max: usize,
    /// [`SPOOL_RETRY`]
    pub spool_retry: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            webhook_attempt: WEBHOOK_ATTEMPT,
            command_attempt: COMMAND_ATTEMPT,
            retry_first: RETRY_FIRST,
            retry_last: RETRY_LAST,
            retry_after_max: RETRY_AFTER_MAX,
            pending_events_max: PENDING_EVENTS_MAX,
            pending_bytes_max: PENDING_BYTES_MAX,
            spool_retry: SPOOL_RETRY,
        }
    }
}
