//! Every bound of this crate, with its unit in its name and where it comes from.

/// Target length of a chunk of a large checkpoint. 4 MiB keeps a 1 TB manifest near 250,000 entries
/// and amortizes a round trip at 400 Gbit/s (84 µs of wire time per chunk).
pub const CHUNK_BYTES_TARGET: u32 = 4 << 20;

/// Target length of a chunk of the smallest checkpoints. A request's 20 bytes and an answer's 16 are
/// nothing beside it, and it takes 10 ms at 50 Mbit/s. Half the time of 128 KiB per hop, with two under
/// way from each holder, brings 16 nodes at 25 Mbit/s from 1.12 to 1.08 times the bound.
pub const CHUNK_BYTES_TARGET_MIN: u32 = 64 << 10;

/// Longest pack of short tensors, where the target is not less. Long enough that what a chunk costs
/// beside its bytes hardly tells (800 MB of scales are pulled with 1.45 times the processor time of
/// long tensors, see `docs/measured/packs.md`), and short for two reasons. Who wants some of a pack's
/// tensors fetches them all: with files sorted by name, the experts of one rank of sixteen stand among
/// those of others, and the scales of an INT4 expert are 3 % of its bytes, so that packs of 4 MiB would
/// cost the rank half as much again as it needs, these a tenth (reckoned, not measured). And one changed
/// scale sends its pack again.
pub const PACK_BYTES_TARGET: u32 = 256 << 10;

/// A tensor is short if so many of its length do not fill a pack. A chunk of its own then costs at most
/// four times as much for each byte; and what is longer lands in an engine's memory in one piece, is
/// checked there by itself and is fetched without its neighbours. So packs are full but for a quarter.
pub const PACK_TENSORS_MIN: u32 = 4;

/// Chunks that a checkpoint is cut into, about, where the two targets allow it. The last node of a
/// swarm of N ends some log2 N chunks' time after the first could: 1 % for a thousand nodes and 1,024
/// chunks, with several times as much for what a node has under way from a dozen holders. Guess.
pub const CHUNKS_WANTED: u64 = 1024;

/// Longest chunk a manifest may name: four targets, so that a sharded trainer may cut at its own
/// edges. Guess.
pub const CHUNK_BYTES_MAX: u32 = 16 << 20;

/// Longest encoded manifest. 1 TB in 4 MiB chunks is 9 MB; 256 MiB leaves room for a million
/// small tensors with long names.
pub const MANIFEST_BYTES_MAX: usize = 256 << 20;

/// Most chunks one manifest may hold: four 1 TB checkpoints in 1 MiB chunks.
pub const MANIFEST_CHUNKS_MAX: usize = 4 << 20;

/// Longest tensor name or file path, in bytes. Linux's PATH_MAX.
pub const NAME_BYTES_MAX: usize = 4096;

/// Most dimensions of a tensor. PyTorch's own limit is 64.
pub const TENSOR_DIMS_MAX: usize = 64;

/// Longest safetensors header, as in the reference implementation (100 MB).
pub const SAFETENSORS_HEADER_BYTES_MAX: u64 = 100_000_000;

/// Longest channel name, in bytes. Guess: it appears in every status record.
pub const CHANNEL_BYTES_MAX: usize = 128;

/// Longest encoded status record. One with 16 channels is under 6 KiB.
pub const RECORD_BYTES_MAX: usize = 56 << 10;

/// Longest encoded release: [`ROSTER_MAX`] entries of 37 bytes, the longest note and selectors.
pub const RELEASE_BYTES_MAX: usize = 48 << 10;

/// Longest encoded statement about a release: a reason, a channel's name and some numbers.
pub const STATEMENT_BYTES_MAX: usize = 4 << 10;

/// Nodes that a release may name as those it is rolled out to. Guess: a signed release with so many
/// is 38 KB, and it is told once to each node.
pub const ROSTER_MAX: usize = 1024;

/// Longest reason in a report, in bytes: one for each channel is in every status record.
pub const REPORT_REASON_BYTES_MAX: usize = 96;

/// Labels that a selector may ask for. Guess: zone, rack, model, role and as many again.
pub const SELECTOR_LABELS_MAX: usize = 8;

/// Longest control message between two agents: a full chunk set of the largest manifest
/// (512 KiB), twice, and room for a snapshot of a few hundred status records.
pub const MESSAGE_BYTES_MAX: usize = 2 << 20;

/// A manifest travels over the control connection in pieces of this size. Guess: well under
/// [`MESSAGE_BYTES_MAX`], large enough that a 9 MB manifest takes nine round trips.
pub const MANIFEST_PIECE_BYTES: usize = 1 << 20;

/// Labels of a node, channels it follows, addresses it lists. Guesses: each appears in every
/// status record.
pub const STATUS_LABELS_MAX: usize = 32;
pub const STATUS_CHANNELS_MAX: usize = 64;
pub const STATUS_ADDRESSES_MAX: usize = 32;

/// Manifests of a channel that a status record names, besides the one it is at. Guess: one to go back to, and
/// the sides of a comparison.
pub const STATUS_ALSO_MAX: usize = 4;

/// Longest name of a node, and longest `key=value` of a label, in bytes. With as many labels,
/// channels and addresses as there may be, a record stays below [`RECORD_BYTES_MAX`].
pub const STATUS_NAME_BYTES_MAX: usize = 256;
pub const STATUS_LABEL_BYTES_MAX: usize = 256;

/// Longest note a publisher may attach to a release, in bytes. Guess.
pub const RELEASE_NOTE_BYTES_MAX: usize = 1024;
