//! Whether a node keeps its bounds and agrees with itself: for simulations and tests.

use super::Node;
use crate::limits::{ASKERS_MAX, EARLY_BYTES_MAX, EARLY_MANIFESTS_MAX, MEMBERS_MAX, TRUST_MAX};
use aquifer_core::Time;

impl Node {
    /// Says what is wrong with this node, if anything is. Costs time in proportion to all it knows.
    pub fn audit(&self, now: Time) -> Result<(), String> {
        let (members, gone) = self.members.sizes();
        within("members", members, MEMBERS_MAX)?;
        within("members gone", gone, MEMBERS_MAX)?;
        within("peers judged", self.trust.len(), TRUST_MAX)?;
        within("peers reminded", self.reminded.len(), MEMBERS_MAX)?;
        within("early asks", self.early_asks.most(), ASKERS_MAX)?;
        within("manifests asked about early", self.early_asks.len(), EARLY_MANIFESTS_MAX)?;
        within("bytes of early asks", self.early_asks.bytes(), EARLY_BYTES_MAX)?;
        self.audit_links()?;
        self.audit_reads(now)?;
        self.audit_leases()
    }

    /// What a peer asked for, or is asked for, ends with the connection to it.
    fn audit_links(&self) -> Result<(), String> {
        let early = self.early_asks.asking().copied();
        let asks = self.swarms.values().flat_map(|s| s.pulling.asked().into_iter().chain(s.serving.asking().copied()));
        let stranger = early.chain(asks).find(|n| !self.members.is_connected(n));
        ensure(stranger.is_none(), || format!("keeps an ask of {stranger:?} without a connection"))
    }

    /// Each read that was started belongs to one flight, unless its manifest was forgotten.
    fn audit_reads(&self, now: Time) -> Result<(), String> {
        for (manifest, swarm) in &self.swarms {
            swarm.pulling.audit(&swarm.stock, now)?;
            for (chunk, op) in swarm.pulling.flights() {
                let known = self.ops.get(&op).is_some_and(|o| o.manifest == *manifest && o.chunk == chunk);
                ensure(known, || format!("waits for chunk {chunk}, which nobody reads"))?;
            }
        }
        Ok(())
    }

    fn audit_leases(&self) -> Result<(), String> {
        let (mut leased, mut costly) = (0, 0);
        for swarm in self.swarms.values() {
            leased += swarm.serving.audit(&swarm.stock)?;
            costly += swarm.serving.costly_leased_bytes(&swarm.stock);
        }
        let counted = self.budget.costly_leased_bytes();
        ensure(costly == counted, || format!("{costly} costly bytes are under lease, and {counted} are counted"))?;
        let counted = self.budget.leased_bytes;
        ensure(leased == counted, || format!("{leased} bytes are under lease, and {counted} are counted"))
    }
}

fn within(what: &str, count: usize, most: usize) -> Result<(), String> {
    ensure(count <= most, || format!("{what}: {count}, more than {most}"))
}

pub(crate) fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}
