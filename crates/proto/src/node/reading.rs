//! Reading: what was granted becomes reads, and each read's end becomes a word to its holder.

use super::{Counters, Node, Op};
use crate::io::{Notice, OpId, Output, ReadOutcome};
use crate::limits::GRANT_CHUNKS_MAX;
use crate::swarm::{self, Landed};
use aquifer_core::message::{Outcome, Returned};
use aquifer_core::{ChunkSet, ManifestHash, NodeId, Time};
use std::collections::{BTreeMap, BTreeSet};

impl Node {
    pub(super) fn on_grant(
        &mut self,
        now: Time,
        from: NodeId,
        manifest: ManifestHash,
        lease: u64,
        mut chunks: Vec<u32>,
    ) {
        // Who grants more at once counts on nothing that is returned, and an answer has its bounds.
        chunks.truncate(GRANT_CHUNKS_MAX);
        let Some(swarm) = self.swarms.get_mut(&manifest) else {
            let outcome = Outcome::Declined;
            let returned = chunks.into_iter().map(|chunk| Returned { lease, chunk, outcome }).collect();
            return self.send_returned(from, manifest, returned);
        };
        let welcome = !self.trust.is_avoided(&from, now);
        let mut reads = Reads::of(&mut self.ops, &mut self.next_op, (&mut self.spoiled, &mut self.counters));
        let take_op = |chunk, holder, lease| reads.take_op(Op { manifest, chunk, holder, lease });
        let offer = swarm::Offer { from, lease, chunks, welcome };
        swarm.pulling.on_grant(manifest, &swarm.stock, now, offer, take_op, &mut self.out);
    }

    pub(super) fn on_read_done(&mut self, now: Time, op: OpId, outcome: ReadOutcome) {
        let Some(read) = self.ops.remove(&op) else { return };
        let Op { manifest, chunk, holder, lease } = read;
        if cfg!(feature = "planted-bug") && outcome == ReadOutcome::Failed && !self.members.is_connected(&holder) {
            return; // "Nobody is left to be told."
        }
        let Some(swarm) = self.swarms.get_mut(&manifest) else {
            // Forgotten meanwhile; the holder wants its lease back all the same.
            let returned = vec![Returned { lease, chunk, outcome: Outcome::Declined }];
            return self.send_returned(holder, manifest, returned);
        };
        let Some(landed) = swarm.pulling.land(&swarm.stock, now, op, chunk) else {
            return self.on_unexpected_read_done(now, read, outcome);
        };
        let gave_up = landed.late && outcome == ReadOutcome::Declined;
        let outcome = if gave_up { ReadOutcome::Failed } else { outcome };
        match outcome {
            ReadOutcome::Corrupt | ReadOutcome::Revoked | ReadOutcome::Failed => {
                self.spoiled.insert((manifest, chunk));
            }
            ReadOutcome::Verified | ReadOutcome::Declined => {}
        }
        let told = self.judge(now, read, outcome, &landed);
        self.hand_over(now, manifest, chunk, &landed);
        self.give_back(now, read, told);
        if told == Outcome::Verified {
            return self.status_in(now, self.members.progress_interval());
        }
        if self.trust.is_avoided(&holder, now)
            && let Some(swarm) = self.swarms.get_mut(&manifest)
        {
            swarm.pulling.withdraw(manifest, &swarm.stock, holder, &mut self.out);
        }
        self.review_swarms_soon(now);
    }

    /// A read whose swarm was forgotten, and is of interest again: what came counts all the same.
    fn on_unexpected_read_done(&mut self, now: Time, read: Op, outcome: ReadOutcome) {
        let Some(swarm) = self.swarms.get(&read.manifest) else { return };
        let mut told = Outcome::Declined;
        if outcome == ReadOutcome::Verified {
            told = Outcome::Verified;
            let landed = ChunkSet::from_indices(swarm.stock.len(), [read.chunk]);
            self.on_held(now, read.manifest, &landed);
        }
        self.give_back(now, read, told);
    }

    /// What a read's end means here and for the trust in its holder, and what the holder is told.
    fn judge(&mut self, now: Time, read: Op, outcome: ReadOutcome, landed: &Landed) -> Outcome {
        let Op { manifest, chunk, holder, .. } = read;
        let Some(swarm) = self.swarms.get_mut(&manifest) else { return Outcome::Declined };
        match outcome {
            ReadOutcome::Verified => {
                swarm.stock.have.insert(chunk);
                swarm.serving.on_held(chunk);
                self.grants_due = true;
                self.trust.on_good_read(&holder);
                Outcome::Verified
            }
            ReadOutcome::Corrupt => {
                let blame = match landed.revoked {
                    true => self.trust.on_excused_read(holder, now),
                    false => Some(self.trust.on_corrupt_read(holder, now)),
                };
                let notice = |avoid| Output::Notice(Notice::PeerBlamed { node: holder, manifest, chunk, avoid });
                self.out.extend(blame.map(notice));
                blame.map_or(Outcome::Postponed, |_| Outcome::Corrupt)
            }
            ReadOutcome::Revoked => Outcome::Postponed,
            ReadOutcome::Declined if swarm.stock.is_missing(chunk) && landed.successor.is_none() => Outcome::Postponed,
            ReadOutcome::Declined => Outcome::Declined,
            ReadOutcome::Failed => {
                if let Some(avoid) = self.trust.on_failed_read(holder, now) {
                    self.out.push_back(Output::Notice(Notice::PeerFailing { node: holder, avoid }));
                }
                Outcome::Failed
            }
        }
    }

    /// To the holder that waited for the end of this read, if the chunk is still missing.
    fn hand_over(&mut self, now: Time, manifest: ManifestHash, chunk: u32, landed: &Landed) {
        let Some((holder, lease)) = landed.successor else { return };
        let Some(swarm) = self.swarms.get_mut(&manifest) else { return };
        let next = Op { manifest, chunk, holder, lease };
        if swarm.stock.is_missing(chunk) {
            let mut reads = Reads::of(&mut self.ops, &mut self.next_op, (&mut self.spoiled, &mut self.counters));
            let op = reads.take_op(next);
            swarm.pulling.begin(manifest, &swarm.stock, now, (op, chunk), (holder, lease), &mut self.out);
        } else {
            self.give_back(now, next, Outcome::Declined);
        }
    }

    fn give_back(&mut self, now: Time, read: Op, outcome: Outcome) {
        let Op { manifest, chunk, holder, lease } = read;
        let Some(swarm) = self.swarms.get_mut(&manifest) else { return };
        let returned = Returned { lease, chunk, outcome };
        swarm.pulling.give_back(manifest, &swarm.stock, now, holder, returned, &mut self.out);
    }

    fn send_returned(&mut self, to: NodeId, manifest: ManifestHash, returned: Vec<Returned>) {
        self.out.push_back(swarm::only_returned(to, manifest, returned));
    }
}

/// What starting a read changes, beside the swarm.
struct Reads<'a> {
    ops: &'a mut BTreeMap<OpId, Op>,
    next: &'a mut OpId,
    spoiled: &'a mut BTreeSet<(ManifestHash, u32)>,
    counters: &'a mut Counters,
}

impl<'a> Reads<'a> {
    fn of(
        ops: &'a mut BTreeMap<OpId, Op>,
        next: &'a mut OpId,
        (spoiled, counters): (&'a mut BTreeSet<(ManifestHash, u32)>, &'a mut Counters),
    ) -> Self {
        Reads { ops, next, spoiled, counters }
    }

    fn take_op(&mut self, op: Op) -> OpId {
        self.counters.chunks_refetched += u64::from(self.spoiled.remove(&(op.manifest, op.chunk)));
        let id = *self.next;
        *self.next += 1;
        self.ops.insert(id, op);
        id
    }
}
