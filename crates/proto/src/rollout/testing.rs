//! What tests of several parts begin with.

use aquifer_core::{ManifestHash, Policy, Release, ReleaseId, Statement, Word};

pub(super) fn id(seq: u64) -> ReleaseId {
    ReleaseId { seq, manifest: ManifestHash::of(&seq.to_le_bytes()) }
}

pub(super) fn release(seq: u64, policy: Policy) -> Release {
    Release {
        channel: "c".parse().unwrap(),
        seq,
        manifest: id(seq).manifest,
        manifest_bytes: 1,
        rolls_back_to: None,
        policy,
        created_unix_ms: 0,
        note: String::new(),
    }
}

pub(super) fn commit(seq: u64) -> Statement {
    let (channel, release) = ("c".parse().unwrap(), id(seq));
    Statement { channel, release, word: Word::Commit, reason: String::new(), created_unix_ms: 0 }
}
