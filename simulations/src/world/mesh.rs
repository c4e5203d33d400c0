//! The mesh as it is when a run begins: formed long ago, links made, records exchanged.
//!
//! Each node has links to a few random others and has heard of its rack and [`KNOWN_MAX`] more. In a real
//! mesh everybody hears of everybody; to know fewer is against us, and a thousand nodes that verify
//! a thousand records each would take longer than what they are here to show.

use super::links::Links;
use super::peer::Peer;
use aquifer_core::{GossipMessage, NodeId, PeerMessage, SignedStatus, Time};
use aquifer_proto::limits::CONNECTIONS_WANTED;
use aquifer_proto::{Input, LocalStatus, Output};
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::index;
use std::collections::BTreeSet;

const KNOWN_MAX: usize = 128;

pub(super) fn form(peers: &mut [Peer], there: &[u32], links: &mut Links, rng: &mut SmallRng) {
    let records: Vec<SignedStatus> = there.iter().map(|i| wake_up(&mut peers[*i as usize], *i)).collect();
    for (at, &i) in there.iter().enumerate() {
        for _ in 0..CONNECTIONS_WANTED.min(at) {
            let other = there[rng.random_range(0..at)];
            if links.open(i, other, Time::ZERO, Time::ZERO).is_some() {
                link(peers, i, other);
            }
        }
    }
    for (at, &i) in there.iter().enumerate() {
        let known = index::sample(rng, there.len(), KNOWN_MAX.min(there.len()));
        let mut known: BTreeSet<usize> = known.into_iter().collect();
        known.extend(there.iter().enumerate().filter(|(_, o)| links.find(i, **o).is_some()).map(|(k, _)| k));
        let rack = |k: usize| peers[there[k] as usize].plan.nic.rack;
        known.extend((0..there.len()).filter(|k| rack(*k).is_some() && rack(*k) == rack(at)));
        known.remove(&at);
        let statuses = known.iter().map(|k| (records[*k].clone(), 0)).collect();
        let Some(&from) = known.first() else { continue };
        let from = peers[there[from] as usize].node.id();
        tell(
            &mut peers[i as usize],
            Input::Message { from, message: PeerMessage::Snapshot { statuses, releases: vec![], statements: vec![] } },
        );
    }
}

/// Starts the node and takes the first record it would gossip.
fn wake_up(peer: &mut Peer, i: u32) -> SignedStatus {
    let addresses = vec![format!("{i}")];
    peer.node.handle(peer.clock.local(Time::ZERO), Input::Local(LocalStatus { addresses, ..LocalStatus::default() }));
    peer.node.handle_timeout(peer.clock.local(Time::ZERO));
    let mut record = None;
    while let Some(output) = peer.node.poll_output() {
        if let Output::Gossip(GossipMessage::Status(status)) = output {
            record = Some(status);
        }
    }
    record.expect("a node's first time-out is for its first status record")
}

fn link(peers: &mut [Peer], a: u32, b: u32) {
    for (to, other) in [(a, b), (b, a)] {
        let node: NodeId = peers[other as usize].node.id();
        tell(&mut peers[to as usize], Input::Connected { node });
    }
}

/// What it would say to that was said long ago.
fn tell(peer: &mut Peer, input: Input) {
    peer.node.handle(peer.clock.local(Time::ZERO), input);
    while peer.node.poll_output().is_some() {}
}
