//! The agent's own decisions on the modelled network: one `aquifer_proto::Node` per node.
//!
//! What is modelled besides the network of [`crate::network`]: every control message takes the
//! network's latency and then its turn at the receiver, which spends `message_us` on each; gossip
//! reaches every node once, after a few hops; a link between two nodes takes three latencies to
//! make, and a crash is seen by its neighbours one latency later, as a reset connection is. A
//! message that is lost resets its connection, because those between agents are reliable: a loss
//! is the end of one. What goes wrong besides, see `faults`; what is checked always, `checks`.
//!
//! What is left out: control messages use no bandwidth and are never held up by bulk data; the
//! mesh is formed before the run begins, each node knowing up to 128 others (see `mesh`); signatures cost nothing in
//! virtual time; a manifest is one message.

mod checks;
mod clock;
mod digest;
mod events;
mod faults;
mod links;
mod mesh;
mod peer;
mod reads;
mod run;

pub use run::{RunOptions, run};
