//! Every bound of this crate, with its unit in its name and where it comes from.

use std::time::Duration;

pub use aquifer_core::limits::MESSAGE_BYTES_MAX;
use aquifer_core::limits::RECORD_BYTES_MAX;

/// Longest gossip message: a signed record and what is wrapped around it.
pub const GOSSIP_BYTES_MAX: usize = RECORD_BYTES_MAX * 2;

/// Bytes waiting for one peer, each message counted with [`MESSAGE_OVERHEAD_BYTES`]. A peer that
/// lets more pile up is disconnected. Guess: a 9 MB manifest in pieces, three times over.
pub const PEER_QUEUE_BYTES_MAX: usize = 32 << 20;

/// What a queued message costs besides its bytes; bounds the number of empty ones. Guess.
pub const MESSAGE_OVERHEAD_BYTES: usize = 128;

/// Bytes handed to the mesh that it has not looked at yet, over all peers. It looks at once unless
/// the machine is starved, so this only stops a runaway caller. Guess.
pub const HANDOFF_BYTES_MAX: usize = 256 << 20;

/// Events waiting for the agent. While it is full, nothing more is taken from the network. Guess:
/// with the longest messages, 128 MiB.
pub const EVENTS_MAX: usize = 64;

/// Events of one connection waiting for the mesh. Guess; libp2p's default is 7.
pub const CONNECTION_EVENTS_MAX: usize = 4;

/// Small frames are put together up to this many bytes before they are written. Guess: one
/// noise packet.
pub const WRITE_BATCH_BYTES: usize = 64 << 10;

/// One read from a control stream: what yamux puts in one frame.
pub const READ_BYTES: usize = 16 << 10;

/// Buffers that grew beyond this for a long message are given back when it is through. Guess:
/// there are two for each connection.
pub const BUFFER_BYTES_KEPT: usize = 16 << 10;

/// A peer that has not taken a byte of a waiting message for this long is disconnected. Guess:
/// longer than a garbage collector or a page-in pauses anybody.
pub const WRITE_STALL: Duration = Duration::from_secs(30);

/// How long a control stream may take to open.
pub const STREAM_OPEN: Duration = Duration::from_secs(10);

/// Connections to one node: one each way when both dial at once, and as many again from before a
/// restart that has not been noticed.
pub const CONNECTIONS_PER_NODE_MAX: u32 = 4;

/// Established connections. Guess: a quarter of the largest mesh, 2 MB of buffers each at most.
pub const CONNECTIONS_MAX: u32 = 1024;

/// Connections that are being secured. Guess: a whole rack starting at once, several times.
pub const CONNECTIONS_PENDING_MAX: u32 = 256;

/// Streams of one connection. Control, gossip and ping need two each.
pub const STREAMS_PER_CONNECTION_MAX: usize = 32;

/// Inbound streams of one connection that have not said yet what they are.
pub const STREAMS_NEGOTIATING_MAX: usize = 8;

/// How long TCP may take to connect: two lost SYNs (1 s and 3 s, RFC 6298) and a little.
pub const CONNECT: Duration = Duration::from_secs(5);

/// How long the other side may take over its greeting. Guess: one round trip and a loaded machine.
pub const GREET: Duration = Duration::from_secs(5);

/// How long the handshake may take after the greeting; libp2p's default for a whole upgrade.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a connection may take to say goodbye before its socket is dropped. Guess.
pub const CLOSE: Duration = Duration::from_secs(5);

/// Pings and their patience. libp2p forgives one failure, so a peer that vanished is noticed
/// after `PING_INTERVAL + PING_TIMEOUT`, and that again: 40 s at most.
pub const PING_INTERVAL: Duration = Duration::from_secs(10);
pub const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Waits between attempts to reach one target: doubled from the first to the last, each shortened
/// by up to a half at random.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(200);
pub const BACKOFF_LAST: Duration = Duration::from_secs(10);

/// Below this many connections every bootstrap target is tried again and again. Guess: enough
/// that losing one peer does not cut a node off.
pub const CONNECTIONS_WANTED: usize = 3;

/// Bootstrap targets are looked up again this often even when all is well, so that a healed
/// partition or a changed name is found. Guess.
pub const BOOTSTRAP_REVISIT: Duration = Duration::from_secs(30);

/// Addresses of one bootstrap target dialled in one round. Guess: a headless service has
/// thousands, and any one will do.
pub const BOOTSTRAP_DIALS_MAX: usize = 8;

/// Addresses remembered for one bootstrap target. Guess: the largest mesh.
pub const BOOTSTRAP_ADDRESSES_MAX: usize = 4096;

/// A connection that ended sooner than this counts as a failed attempt. Guess.
pub const CONNECTION_SHORT: Duration = Duration::from_secs(5);

/// Nodes with a dial under way or backing off. Guess: twice the largest mesh.
pub const DIALS_MAX: usize = 8192;

/// Addresses of one node that are tried; `aquifer_core`'s bound on what a status may list.
pub const DIAL_ADDRESSES_MAX: usize = aquifer_core::limits::STATUS_ADDRESSES_MAX;

/// Nodes heard of over mDNS, and how many connections we want before they stop being dialled
/// just for having been heard. Guesses: gossip does the rest.
pub const MDNS_NODES_MAX: usize = 256;
pub const MDNS_CONNECTIONS_WANTED: usize = 16;

/// Targets whose last complaint is remembered, and remote addresses that were warned about. Guess.
pub const COMPLAINTS_MAX: usize = 1024;

/// First heartbeat of gossip. The default of 5 s would delay the first release by that much.
pub const GOSSIP_HEARTBEAT_FIRST: Duration = Duration::from_millis(100);

/// Peers a node passes whole gossip messages to: it wants so many, looks for more below the lowest
/// and keeps as many as the highest. Gossipsub's own are 6, 5 and 12 (Vyzovitis et al., 2020), and
/// with them two thirds of 32 nodes around one bootstrap node heard a message within 3 s: the node
/// in the middle served 12 and left the others to chance. So the highest is far away; the fewer are
/// wanted, the fewer copies of a record travel: 8 for 4 are a fifth more control bytes with 17 nodes.
pub const GOSSIP_PEERS: usize = 4;
pub const GOSSIP_PEERS_LOW: usize = 3;
pub const GOSSIP_PEERS_HIGH: usize = 64;

/// Of its other peers a node tells this part, with each heartbeat, what it has heard in so many
/// past heartbeats, so that none is missed by chance. Guesses; gossipsub's own are 0.25 and 3.
pub const GOSSIP_HINT_PART: f64 = 0.5;
pub const GOSSIP_HINT_HEARTBEATS: usize = 6;

/// Gossip messages kept until there is anybody to tell. Guess: a status and a release for each of
/// a few channels.
pub const GOSSIP_UNHEARD_MAX: usize = 16;

/// Heartbeats a gossip message stays known for; a verdict that comes later is lost. Guess: twice
/// the default of gossipsub, for agents that are busy hashing.
pub const GOSSIP_HISTORY_HEARTBEATS: usize = 10;

/// Gossip messages waiting for one peer. Guess; the default of 5000 may be 300 MB.
pub const GOSSIP_QUEUE_MAX: usize = 512;

/// How long a gossip message is recognised when it comes again; the default of gossipsub.
pub const GOSSIP_REMEMBERED: Duration = Duration::from_secs(60);

/// On shutdown: how long last words may take to leave, at least when there is anybody to hear
/// them (gossip does not say when it is done) and at most; then how long closing may take. Guesses.
pub const FAREWELL_MIN: Duration = Duration::from_millis(200);
pub const FAREWELL_MAX: Duration = Duration::from_secs(2);
pub const CLOSING_MAX: Duration = Duration::from_secs(1);

/// Nodes dialled at a time, not counting bootstrap. Guess: a quarter of the pending connections.
pub const DIALS_RUNNING_MAX: usize = 64;

/// How long the system's resolver may take. Its own default is 5 s for each of two attempts.
pub const LOOKUP: Duration = Duration::from_secs(10);
