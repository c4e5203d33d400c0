//! What the data plane may hand out: tickets and leases, shared with the transport's threads.

use aquifer_core::{Access, NodeId};
use aquifer_memory::Span;
use aquifer_transport::{Grants, Refusal};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The agent writes it, the transport's threads read it.
#[derive(Debug, Default)]
pub(crate) struct GrantTable(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    tickets: BTreeMap<u64, (NodeId, [u8; 32])>,
    by_node: BTreeMap<NodeId, u64>,
    leases: BTreeMap<(u64, u32), (NodeId, Span)>,
    sent: BTreeMap<NodeId, u64>,
    next_ticket: u64,
}

impl GrantTable {
    /// The ticket of `node`, made now if it has none, with `secret`.
    pub(crate) fn access(&self, node: NodeId, secret: [u8; 32]) -> Access {
        let mut table = self.lock();
        if let Some(&ticket) = table.by_node.get(&node)
            && let Some((_, secret)) = table.tickets.get(&ticket)
        {
            return Access { ticket, secret: *secret };
        }
        table.next_ticket += 1;
        let ticket = table.next_ticket;
        table.tickets.insert(ticket, (node, secret));
        table.by_node.insert(node, ticket);
        Access { ticket, secret }
    }

    /// The node's control connection is gone: so is its ticket.
    pub(crate) fn forget(&self, node: &NodeId) {
        let mut table = self.lock();
        if let Some(ticket) = table.by_node.remove(node) {
            table.tickets.remove(&ticket);
        }
    }

    pub(crate) fn lease(&self, lease: u64, chunk: u32, to: NodeId, span: Span) {
        self.lock().leases.insert((lease, chunk), (to, span));
    }

    pub(crate) fn close(&self, lease: u64, chunk: u32) {
        self.lock().leases.remove(&(lease, chunk));
    }

    /// Bytes sent to each node so far.
    pub(crate) fn sent_bytes(&self) -> BTreeMap<NodeId, u64> {
        self.lock().sent.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Every method leaves the table whole, also if a thread died while it held the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Grants for GrantTable {
    fn secret(&self, ticket: u64) -> Option<(NodeId, [u8; 32])> {
        self.lock().tickets.get(&ticket).copied()
    }

    fn open(&self, peer: NodeId, lease: u64, chunk: u32) -> Result<Span, Refusal> {
        match self.lock().leases.get(&(lease, chunk)) {
            Some((to, span)) if *to == peer => Ok(span.clone()),
            _ => Err(Refusal::Unknown),
        }
    }

    fn still_valid(&self, peer: NodeId, lease: u64, chunk: u32) -> bool {
        self.lock().leases.get(&(lease, chunk)).is_some_and(|(to, _)| *to == peer)
    }

    fn sent(&self, peer: NodeId, bytes: u64) {
        *self.lock().sent.entry(peer).or_default() += bytes;
    }
}
