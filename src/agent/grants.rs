//! What the data plane may hand out: tickets and leases, shared with the transport's threads.

use super::transports::Way;
use aquifer_core::{Access, ChannelName, NodeId};
use aquifer_memory::Span;
use aquifer_transport::{Grants, Refusal};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Leases of which it is remembered what they are for, the latest of them: bytes are counted when they are sent, and a lease may be
/// returned before that. Guess: many times those that are open at once.
const PURPOSES_MAX: usize = 4096;

/// What a lease's bytes are counted for: the channel, None if it is a manifest of none; and the outermost boundary that they cross.
/// Both are remembered with the lease, since its reader may be gone by the time its bytes are counted.
pub(crate) type Purpose = (Option<Arc<ChannelName>>, &'static str);

/// Bytes handed to a node, by the way they went and what for.
pub(crate) type Sent = BTreeMap<(NodeId, Way, Purpose), u64>;

/// The agent writes it, the transport's threads read it.
#[derive(Debug, Default)]
pub(crate) struct GrantTable(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    tickets: BTreeMap<u64, (NodeId, [u8; 32])>,
    by_node: BTreeMap<NodeId, u64>,
    leases: BTreeMap<(u64, u32), (NodeId, Span)>,
    purposes: BTreeMap<u64, Purpose>,
    /// Each name once.
    names: BTreeSet<Arc<ChannelName>>,
    /// Since it was taken last.
    sent: Sent,
    next_ticket: u64,
}

/// The table as one transport sees it: what goes by that way is counted as such.
#[derive(Debug)]
pub(crate) struct ByWay {
    pub(crate) table: Arc<GrantTable>,
    pub(crate) way: Way,
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

    /// What a lease is for. See [`Purpose`].
    pub(crate) fn count_for(&self, lease: u64, channel: Option<ChannelName>, boundary: &'static str) {
        let table = &mut *self.lock();
        let name = channel.map(|channel| table.names.get(&channel).cloned().unwrap_or_else(|| Arc::new(channel)));
        table.names.extend(name.clone());
        table.purposes.insert(lease, (name, boundary));
        while table.purposes.len() > PURPOSES_MAX {
            table.purposes.pop_first();
        }
    }

    pub(crate) fn close(&self, lease: u64, chunk: u32) {
        self.lock().leases.remove(&(lease, chunk));
    }

    /// Whether some lease is over memory that one of `regions` is made of.
    pub(crate) fn reach<'a>(&self, mut regions: impl Iterator<Item = &'a Span>) -> bool {
        let table = self.lock();
        let over = |region: &Span| table.leases.values().any(|(_, span)| same_mapping(region, span));
        regions.any(over)
    }

    /// Closes every lease over a byte of these. Whether there was one.
    pub(crate) fn close_over(&self, changed: &[Span]) -> bool {
        let shares = |span: &Span| changed.iter().any(|other| overlap(span, other));
        let leases = &mut self.lock().leases;
        let before = leases.len();
        leases.retain(|_, (_, span)| !shares(span));
        leases.len() < before
    }

    /// Bytes sent since this was asked last.
    pub(crate) fn take_sent(&self) -> Sent {
        std::mem::take(&mut self.lock().sent)
    }

    fn is_leased(&self, peer: NodeId, lease: u64, chunk: u32) -> bool {
        self.lock().leases.get(&(lease, chunk)).is_some_and(|(to, _)| *to == peer)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Every method leaves the table whole, also if a thread died while it held the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn same_mapping(a: &Span, b: &Span) -> bool {
    Arc::ptr_eq(a.mapping().0, b.mapping().0)
}

fn overlap(a: &Span, b: &Span) -> bool {
    let ((_, a_begin), (_, b_begin)) = (a.mapping(), b.mapping());
    let empty = a.is_empty() || b.is_empty();
    !empty && same_mapping(a, b) && a_begin < b_begin + b.len() && b_begin < a_begin + a.len()
}

impl Grants for ByWay {
    fn secret(&self, ticket: u64) -> Option<(NodeId, [u8; 32])> {
        self.table.lock().tickets.get(&ticket).copied()
    }

    fn open(&self, peer: NodeId, lease: u64, chunk: u32) -> Result<Span, Refusal> {
        match self.table.lock().leases.get(&(lease, chunk)) {
            Some((to, span)) if *to == peer => Ok(span.clone()),
            _ => Err(Refusal::Unknown),
        }
    }

    fn still_valid(&self, peer: NodeId, lease: u64, chunk: u32) -> bool {
        self.table.is_leased(peer, lease, chunk)
    }

    fn sent(&self, peer: NodeId, lease: u64, bytes: u64) {
        let mut table = self.table.lock();
        let purpose = table.purposes.get(&lease).cloned().unwrap_or((None, "none"));
        *table.sent.entry((peer, self.way, purpose)).or_default() += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_memory::Mapping;

    #[test]
    fn leases_over_what_changes_are_closed_and_no_others() {
        let (table, reader) = (GrantTable::default(), NodeId([1; 32]));
        let (region, other) = (Mapping::anonymous(100).unwrap().span(), Mapping::anonymous(100).unwrap().span());
        assert!(!table.reach([&region].into_iter()));
        for (chunk, from) in (0..).zip([0, 10, 20, 30]) {
            table.lease(1, chunk, reader, region.slice(from..from + 10).unwrap());
            table.lease(2, chunk, reader, other.slice(from..from + 10).unwrap());
        }
        assert!(table.reach([&region].into_iter()));
        let part = |range| region.slice(range).unwrap();
        let changed = [part(19..21), part(40..50), part(35..35)];
        assert!(table.close_over(&changed) && !table.close_over(&changed));
        let open = |lease| (0..4).filter(|chunk| table.is_leased(reader, lease, *chunk)).collect::<Vec<_>>();
        assert_eq!((open(1), open(2)), (vec![0, 3], vec![0, 1, 2, 3]));
    }

    #[test]
    fn bytes_are_counted_by_way_and_channel_once() {
        let (table, reader) = (Arc::new(GrantTable::default()), NodeId([1; 32]));
        let channel: ChannelName = "a/b".parse().unwrap();
        table.count_for(7, Some(channel.clone()), "rack");
        let by = |way| ByWay { table: table.clone(), way };
        by(Way::Tcp).sent(reader, 7, 10);
        by(Way::Tcp).sent(reader, 7, 5);
        by(Way::Shm).sent(reader, 8, 1);
        let sent = table.take_sent();
        assert_eq!(sent.get(&(reader, Way::Tcp, (Some(Arc::new(channel)), "rack"))), Some(&15));
        assert_eq!(sent.get(&(reader, Way::Shm, (None, "none"))), Some(&1));
        assert!(table.take_sent().is_empty());
    }
}
