//! Every bound and interval of this crate, with its unit and where it comes from.

use aquifer_core::limits::{MANIFEST_CHUNKS_MAX, MESSAGE_BYTES_MAX};
use std::time::Duration;

/// How often a node tells the mesh of itself when nothing changed, give or take a quarter. Guess:
/// after a few lost records, a quarter of a minute, it is gone.
pub const STATUS_INTERVAL: Duration = Duration::from_secs(3);

/// Where there are many nodes, each speaks less often: this much time for each member, so that
/// nobody has more than 250 records a second to verify when nothing happens (about 1 % of a core).
/// Where many have news at once, they spread it over as long.
pub const STATUS_TURN: Duration = Duration::from_millis(4);

/// How long after progress with a release it is told: it is for people. With many members this
/// much time for each, and no later than a node speaks anyway, so that records take no bandwidth
/// worth mentioning from a slow link: a record is about 500 bytes, and gossip brings it some six
/// times.
pub const PROGRESS_STATUS_INTERVAL: Duration = Duration::from_secs(1);
pub const PROGRESS_STATUS_TURN: Duration = Duration::from_millis(250);

/// Least time between two records of one node, whatever its news: what happens meanwhile is told in
/// one. Guess.
pub const STATUS_SPACING: Duration = Duration::from_millis(200);

/// A node not heard of for this many intervals is gone: four to six records lost in a row. The longer
/// of its own interval and ours counts.
pub const MEMBER_TIMEOUT_INTERVALS: u32 = 5;

/// How long a gone node's last record is remembered, so that an old copy of it is not news.
pub const TOMBSTONE: Duration = Duration::from_secs(600);

/// Most nodes known at once. 4,096 is the design's largest swarm, twice that for churn.
pub const MEMBERS_MAX: usize = 8192;

/// Control connections below which a node dials members at random; its swarms may want more. Guess:
/// gossip stays connected with high probability from 5 random links on.
pub const CONNECTIONS_WANTED: usize = 8;

/// How often members, links, asks and fetches are looked over, if nothing calls for it before.
/// Guess.
pub const REVIEW_INTERVAL: Duration = Duration::from_millis(500);

/// Status records in a snapshot, at most. Guess.
pub const SNAPSHOT_STATUSES_MAX: usize = 512;
/// Records for a peer that is a member already, and has heard most: what it may have missed
/// spreads all the same, and a link costs little to make where thousands are.
pub const SNAPSHOT_FAMILIAR_MAX: usize = 64;
/// Bytes of status records in a snapshot: half of a message, so that releases fit beside them.
pub const SNAPSHOT_BYTES_MAX: usize = MESSAGE_BYTES_MAX / 2;

/// How soon the swarms are looked over after news about holders, a refusal, a new asker or a read
/// that brought nothing: several of them share one review. Guess.
pub const PROMPT_REVIEW: Duration = Duration::from_millis(2);

/// Manifests that are not known yet and whose asks are kept all the same: an asker may have heard
/// of a release first. Guess.
pub const EARLY_MANIFESTS_MAX: usize = 8;
/// Bytes that their sets may take: as four times [`ASKERS_MAX`] asks for 1 TB in chunks of 4 MiB, 62 KB
/// each. One for the largest manifest there may be takes a megabyte, however short its message.
pub const EARLY_BYTES_MAX: usize = 16 << 20;
/// Who asks early is refused after this long, unless the manifest is being fetched. Guess: a release
/// is everywhere long before.
pub const EARLY_ASK_PATIENCE: Duration = Duration::from_secs(30);

/// Least time between two reminders of a release to one peer that seems to have missed it.
pub const REMIND_INTERVAL: Duration = Duration::from_secs(3);

/// Peers a puller asks at once for one manifest. Nearly twice [`SERVED_AT_ONCE`], so that a holder,
/// asked by as many, always has hungry ones to choose from: with 16, some links had too few to be busy
/// (`one-seed`: 64 nodes, 8,192 chunks end 2.4 % above the bound with 24, 3.8 % with 16). Each is told
/// the news: 32 cost more than they bring.
pub const ASKS_MAX: usize = 24;

/// Near peers among them that a node picks by itself at first; the other places are kept for those
/// who ask it, for this long after it began to look.
pub const ASKS_OWN: usize = 12;
pub const MUTUAL_GRACE: Duration = Duration::from_millis(10);

/// Places among them for peers beyond a boundary (another host, rack or zone), where there are
/// enough near ones.
pub const FAR_ASKS: usize = 4;

/// Who has less than two chunks under way for this long, and not all that it misses, gives the place
/// of whoever granted nothing for longest, and at least for as long, to another, and fetches more
/// from afar. Guess: many round trips of a data centre, and less than a heartbeat of gossip.
pub const HUNGER_PATIENCE: Duration = Duration::from_millis(20);

/// Each time that this brought nothing its patience doubles, up to this. A whole ask of a 1 TB
/// manifest is up to 62 KB: then it takes a megabit per second, and not 25. As [`REVIEW_INTERVAL`].
pub const HUNGER_PATIENCE_MAX: Duration = Duration::from_millis(500);

/// A peer that refused, or was too slow, is not asked again for this long; one that merely gave
/// nothing to a hungry node, for that. Guesses.
pub const ASK_RETRY: Duration = Duration::from_secs(1);
pub const SILENT_PAUSE: Duration = Duration::from_millis(100);

/// A peer that a link was wanted to is not counted on again for this long, unless it comes up.
/// Guess: a TCP connection over a lossy path takes a second or three.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(5);

/// A standing ask is repeated whole this often, in case the two ends understood each other wrong.
/// Guess.
pub const ASK_REFRESH: Duration = Duration::from_secs(10);

/// Chunk data a puller lets be under way for one manifest: it bounds landing memory, and 128 MiB
/// covers 400 Gbit/s for 2.7 ms.
pub const FLIGHT_BYTES_MAX: u64 = 128 << 20;

/// How often flights are looked over, and how old one is at least before it counts as overdue.
/// Guess: as [`HUNGER_PATIENCE`].
pub const FLIGHT_WATCH: Duration = Duration::from_millis(20);

/// A flight that takes this many times as long as its bytes usually do is overdue: another holder
/// may bring the chunk, and this one is asked no more for [`ASK_RETRY`]. A node at a tenth of the
/// others' speed is just slow enough.
pub const OVERDUE_FACTOR: u32 = 8;

/// Flights that the usual time of a byte is averaged over, and the least length one counts as having
/// in the average: the time of a short one is all latency. Guesses.
pub const PACE_SAMPLES: f64 = 32.0;
pub const PACE_BYTES_MIN: u64 = 64 << 10;

/// A holder may be idle for this part of a chunk's time between two chunks. Settled by simulation:
/// at 4 % (`one-seed`) a second chunk under way costs more than it gains, at 25 % (`links`) it
/// gains 5 %.
pub const IDLE_TOLERATED: f64 = 0.1;

/// Least bytes one holder is given credit for: tiny chunks travel many at a time, and two of
/// `aquifer_core::limits::CHUNK_BYTES_TARGET_MIN`, the least target, so that one is passed on while
/// the next arrives.
pub const CREDIT_BYTES_MIN: u64 = 128 << 10;

/// Askers whose credit a holder lets be under lease at once, of the average credit. Fewer leave links
/// idle when askers happen to crowd elsewhere; more make each chunk, and so the first copies, slower.
/// Settled by simulation (`one-seed`, 64 nodes): 8 end 9 %, 10 end 3.1 % and 13 end 1.8 % above the
/// bound with 8,192 chunks; with 512 the last chunk's way through the swarm weighs more, and 10 are
/// 1 % better.
pub const SERVED_AT_ONCE: u64 = 13;

/// As long as first copies wait, nothing else is granted if so many askers' credit is under lease: a
/// lone seed's link is busy with them, and second copies would only slow the first.
pub const FIRST_AT_ONCE: u64 = 4;

/// How many longest chunks' bytes may be under lease to askers beyond a boundary before a holder's
/// own rack has precedence.
pub const FAR_SERVE_UNITS: u64 = 3;

/// Under an upload cap, what may be granted at once after a pause: what it allows in this time, and
/// the one grant that overdraws.
pub const UPLOAD_BURST: Duration = Duration::from_millis(1);

/// Bytes that a grant of small chunks goes up to, or the manifest's longest chunk if that is more.
/// As [`CREDIT_BYTES_MIN`]: one grant may use up the least credit.
pub const GRANT_BYTES_MIN: u64 = 128 << 10;

/// Chunks in one grant, at most: bounds a message about tiny chunks.
pub const GRANT_CHUNKS_MAX: usize = 256;

/// News of chunks is told to holders that have not heard it with something else within the time in
/// which so many chunks arrive, between the bounds. Six is what 2 ms are at 100 Gbit/s, where half
/// or a quarter of it made no difference in simulation.
pub const NEWS_CHUNKS: u32 = 6;
pub const PROGRESS_INTERVAL_MIN: Duration = Duration::from_millis(1);
pub const PROGRESS_INTERVAL_MAX: Duration = Duration::from_millis(300);

/// News kept for holders that have not heard it; who is further behind is told everything anew.
pub const NEWS_MAX: usize = 4096;

/// A read that brings no byte for this long is given up by the transport. Guess.
pub const READ_STALL: Duration = Duration::from_secs(5);

/// How long a granted chunk stays where it is, and how long a read may take: a reader that gets
/// nothing gives up before, after [`READ_STALL`], one that is trickled at after this. Guess.
pub const LEASE_TTL: Duration = Duration::from_secs(30);

/// A chunk that an asker could not read, or postponed, is not granted to it again for this long.
/// Guess.
pub const DECLINE_HOLD: Duration = Duration::from_secs(1);

/// How long nobody must have wanted anything of a node that drains, and read nothing, before it may leave. Who was
/// refused, and then finds a chunk nowhere else, asks again after [`ASK_RETRY`]; it looks every
/// [`HUNGER_PATIENCE_MAX`] at least, and the rest is for the way here.
pub const DRAIN_SETTLE: Duration = Duration::from_secs(2);

/// Most standing asks a holder keeps per manifest. Guess: two or three times [`ASKS_MAX`],
/// what a balanced swarm gives.
pub const ASKERS_MAX: usize = 64;

/// Pieces of a manifest under way from its holder: while one is encrypted and sent, the one before is
/// received. Guess: two would do, but for the time a word takes.
pub const MANIFEST_PIECES_AHEAD: u64 = 4;

/// A manifest piece not answered for this long is asked of another peer, from the beginning; who
/// sent something else is passed over for as long. Guess.
pub const MANIFEST_TIMEOUT: Duration = Duration::from_secs(3);
/// A peer that had not the manifest, or did not answer, is asked again after this long: right after
/// a release everybody is about to have it. With each so many that had it not the time grows by as
/// much, up to the longest. Guesses.
pub const MANIFEST_RETRY: Duration = Duration::from_millis(5);
pub const MANIFEST_MISSES: u32 = 16;
pub const MANIFEST_RETRY_MAX: Duration = Duration::from_millis(300);

/// How long a peer is avoided after a failed read, or pieces that are not the manifest; doubles each
/// time, a good read forgives. Guesses.
pub const AVOID_FAILED: Duration = Duration::from_millis(500);
pub const AVOID_FAILED_MAX: Duration = Duration::from_secs(30);
/// How long a peer is avoided after bytes that do not hash to their name; doubles each time.
/// Guesses.
pub const AVOID_CORRUPT: Duration = Duration::from_secs(30);
pub const AVOID_CORRUPT_MAX: Duration = Duration::from_secs(3600);
/// How often a peer's bytes may be wrong under a lease that it took back, before it is avoided as for
/// others that are wrong, and how far apart those are at least: as what is read then is not granted
/// again before [`DECLINE_HOLD`]. Guesses: memory is written over between two releases.
pub const EXCUSES_MAX: u32 = 2;
pub const EXCUSE_SPACING: Duration = Duration::from_millis(500);
/// Peers whose behaviour is remembered. As many as members.
pub const TRUST_MAX: usize = MEMBERS_MAX;

/// Refusals of releases that are told, each once for a peer and a reason; the rest are only counted.
/// Guess.
pub const REJECTION_PEERS_MAX: usize = 1024;

/// Longest event in a recording: a manifest's chunk lengths are four bytes each, and everything
/// else that a node is told fits into a message.
pub const RECORD_FRAME_BYTES_MAX: usize = 4 * MANIFEST_CHUNKS_MAX + MESSAGE_BYTES_MAX;

/// Releases of a channel that its rollouts remember, besides those in use. Guess: an engine is rarely
/// two behind, and a comparison has a few sides.
pub const RELEASES_KEPT: usize = 8;

/// A member that has been silent for this long, after it was missed, has noticed by itself that it is
/// cut off, and is not ready with what a synchronous release replaces. Twice a member's time-out where
/// nodes speak every [`STATUS_INTERVAL`], so that its clock may run at half the speed.
pub const ROLLOUT_SILENCE: Duration = STATUS_INTERVAL.saturating_mul(2 * MEMBER_TIMEOUT_INTERVALS);

/// How long an engine that holds its requests, and could answer from a synchronous release, waits for
/// others that are about to pause. Guess: far more than pausing takes, less than who asks waits.
pub const ROLLOUT_HOLD: Duration = Duration::from_secs(2);

/// Reports that others decide by are told at once: one node's at this interval at least, and many nodes' spread
/// over this for each member. Guess: gossip takes some milliseconds, and a synchronous switch waits for three of them.
pub const REPORT_SPACING: Duration = Duration::from_millis(5);
pub const REPORT_TURN: Duration = Duration::from_micros(500);

/// Releases that an engine's session remembers to have passed their check, so that going back and forth between
/// some does not check them again. Guess.
pub const ENGINE_RELEASES_PASSED_MAX: usize = 16;

/// Answers of an engine that are known to be late. Guess: one that owes so many has missed minutes for each.
pub const ENGINE_ANSWERS_OWED_MAX: usize = 16;

/// How long an engine may take to answer, where it does not say itself how long that can be. Guesses: the longest
/// request that it ends before it pauses, some inferences of a large model, and whatever it does before it
/// serves again.
pub const ENGINE_PAUSE_MAX: Duration = Duration::from_secs(600);
pub const ENGINE_CHECK_MAX: Duration = Duration::from_secs(600);
pub const ENGINE_RESUME_MAX: Duration = Duration::from_secs(600);

/// Added to what it says: it has to notice, and its word to come here. Guess.
pub const ENGINE_ANSWER_GRACE: Duration = Duration::from_secs(5);

/// The longest that it may ask for. Guess: who waits for longer waits for ever.
pub const ENGINE_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// A hydration's speed is that of the last so many seconds, of samples so far apart. Guesses: short enough that a new
/// holder shows, and long enough that a slow link's chunks do not jump.
pub const ETA_WINDOW: Duration = Duration::from_secs(5);
pub const ETA_SPACING: Duration = Duration::from_millis(100);

/// Selectors that a node looks on for. Guess: an operator rolls back a few sides of a comparison.
pub const ONLOOKERS_MAX: usize = 16;
