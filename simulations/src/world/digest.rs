//! One number for all that a run's nodes decided, in order: two runs of one seed agree on it.

use aquifer_core::Time;
use aquifer_proto::Output;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Digest(u64);

impl Digest {
    pub(super) fn value(self) -> u64 {
        self.0
    }

    pub(super) fn add(&mut self, at: Time, node: u32, output: &Output) {
        self.word(u64::try_from(at.since(Time::ZERO).as_nanos()).unwrap_or(u64::MAX));
        self.word(node.into());
        match output {
            Output::Send { to, message } => {
                self.bytes(&to.0);
                self.bytes(&message.encode());
            }
            Output::Gossip(message) => self.bytes(&message.encode()),
            Output::Grant { to, manifest, lease, ttl, chunks } => {
                self.bytes(&to.0);
                self.bytes(&manifest.0.0);
                self.word(*lease);
                self.word(ttl.subsec_nanos().into());
                chunks.iter().for_each(|c| self.word(u64::from(*c)));
            }
            Output::Read { op, peer, lease, chunk, manifest } => {
                self.bytes(&peer.0);
                self.bytes(&manifest.0.0);
                [*op, *lease, u64::from(*chunk)].into_iter().for_each(|w| self.word(w));
            }
            Output::CancelRead { op } => self.word(*op),
            Output::LeaseClosed { lease, chunk } => {
                self.word(*lease);
                self.word(u64::from(*chunk));
            }
            // Rare, or small: the derived text will do.
            Output::Verdict { .. }
            | Output::Dial { .. }
            | Output::ReleaseAccepted { .. }
            | Output::StatementAccepted { .. }
            | Output::Stand { .. }
            | Output::Order { .. }
            | Output::ManifestFetched { .. }
            | Output::ManifestAsked { .. }
            | Output::Hydrated { .. }
            | Output::Drained
            | Output::Recheck { .. }
            | Output::Notice(_) => self.bytes(format!("{output:?}").as_bytes()),
        }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        for eight in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..eight.len()].copy_from_slice(eight);
            self.word(u64::from_le_bytes(word));
        }
    }

    /// rustc's own hash, with a stronger mix at the end of each word.
    fn word(&mut self, word: u64) {
        let mixed = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
        self.0 = mixed ^ (mixed >> 29);
    }
}
