//! Status records: what a node says of itself, signed with its identity.

use crate::codec::{self, CodecError, Kind};
use crate::hash::ManifestHash;
use crate::id::{ChannelName, IdError, NodeId, NodeSecret, SIGNATURE_BYTES};
use crate::limits::{RECORD_BYTES_MAX, STATUS_ADDRESSES_MAX, STATUS_ALSO_MAX, STATUS_CHANNELS_MAX, STATUS_LABELS_MAX};
use crate::report::Report;
use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};
use std::sync::{Arc, OnceLock};
use thiserror::Error;

const CONTEXT: &str = "aquifer status v1";

/// A node's own account. `(incarnation, seq)` orders the records of one node; clocks of two nodes
/// are never compared.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Status {
    pub node: NodeId,
    /// Grows with each start of the node.
    pub incarnation: u64,
    /// Grows with each record of one incarnation.
    pub seq: u64,
    /// For people; not unique.
    pub name: String,
    /// Where the mesh reaches it, as multiaddresses.
    pub addresses: Vec<String>,
    /// Where its data plane listens, as `host:port`, best first; an empty host means "the host
    /// you reach me at".
    pub data_endpoints: Vec<String>,
    /// For example `zone=a`, `rack=12`. Sorted by key.
    pub labels: Vec<(String, String)>,
    pub channels: Vec<ChannelStatus>,
    /// Chunk leases it has given out now, and the most it would give: how busy it is.
    pub leases: u32,
    pub leases_max: u32,
    /// Engines registered with it, and how many of them serve what they should.
    pub engines: u32,
    pub engines_ready: u32,
    /// How often it speaks when nothing changed, in milliseconds. It depends on how many members it
    /// knows: others may know fewer, and must not miss it too soon.
    pub interval_ms: u32,
    /// True in a node's last words.
    pub leaving: bool,
    /// It is about to leave, and gives only what nobody else is known to have.
    pub draining: bool,
    /// Chunk bytes it can upload in a second: its limit, or the most that it has been seen to send. Zero: not
    /// known.
    pub upload_bytes_per_s: u64,
    /// What it sends in a second now.
    pub uploading_bytes_per_s: u64,
    /// The most that it has been seen to get in a second. Zero: not known.
    pub download_bytes_per_s: u64,
    /// Version of the program.
    pub version: String,
}

/// How far a node is with a channel it follows.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ChannelStatus {
    pub channel: ChannelName,
    /// The newest release it has heard of; zero: none.
    pub seq: u64,
    /// Of the release that is for it: the newest, unless that is for others.
    pub manifest: ManifestHash,
    /// Distinct chunks it wants of the manifest, and how many of those it has verified. Zero
    /// wanted means that it has not read the manifest yet.
    pub chunks_wanted: u32,
    pub chunks_have: u32,
    /// Other manifests of the channel whose chunks it has or gets: of a release it goes back to, or of one for
    /// others.
    pub also: Vec<ManifestHash>,
    /// How far its engines are with the rollout; None if it has none.
    pub report: Option<Report>,
}

impl ChannelStatus {
    /// Whether it says to have chunks of the manifest, or to be getting them.
    pub fn has(&self, manifest: &ManifestHash) -> bool {
        self.manifest == *manifest || self.also.contains(manifest)
    }

    pub fn is_hydrated(&self) -> bool {
        self.chunks_wanted > 0 && self.chunks_have >= self.chunks_wanted
    }
}

/// A record as it travels. It passes through many hands of a process (a snapshot, gossip, a
/// simulation's thousand nodes), so copies share its bytes, and what was found right once: nothing
/// can change it.
#[derive(Clone, Debug)]
pub struct SignedStatus(Arc<Sealed>);

#[derive(Debug)]
struct Sealed {
    body: Vec<u8>,
    signature: [u8; SIGNATURE_BYTES],
    /// What it says, once its signature was checked.
    opened: OnceLock<Arc<Status>>,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum StatusError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("status: {0}")]
    Signature(#[from] IdError),
    #[error("status: {count} {what}, allowed are {limit}")]
    TooMany { what: &'static str, count: usize, limit: usize },
}

impl SignedStatus {
    pub fn sign(status: &Status, secret: &NodeSecret) -> Self {
        let body = codec::encode(Kind::Status, status);
        let signature = secret.sign(CONTEXT, &body);
        Self::unopened(body, signature)
    }

    /// What is signed.
    pub fn body(&self) -> &[u8] {
        &self.0.body
    }

    /// Bytes it takes in a message, about.
    pub fn len(&self) -> usize {
        self.0.body.len() + SIGNATURE_BYTES + size_of::<u64>()
    }

    pub fn is_empty(&self) -> bool {
        self.0.body.is_empty()
    }

    /// Whose record it claims to be, unverified: to look up whether it is known already.
    pub fn claimed_node(&self) -> Option<NodeId> {
        match self.0.opened.get() {
            Some(status) => Some(status.node),
            None => self.unverified().ok().map(|s| s.node),
        }
    }

    /// The record, if the node it speaks of signed it.
    pub fn open(&self) -> Result<Arc<Status>, StatusError> {
        if let Some(status) = self.0.opened.get() {
            return Ok(Arc::clone(status));
        }
        let status = self.unverified()?;
        status.node.verify(CONTEXT, &self.0.body, &self.0.signature)?;
        status.check_bounds()?;
        Ok(Arc::clone(self.0.opened.get_or_init(|| Arc::new(status))))
    }

    fn unopened(body: Vec<u8>, signature: [u8; SIGNATURE_BYTES]) -> Self {
        SignedStatus(Arc::new(Sealed { body, signature, opened: OnceLock::new() }))
    }

    fn unverified(&self) -> Result<Status, CodecError> {
        codec::decode::<_, RECORD_BYTES_MAX>(Kind::Status, &self.0.body)
    }
}

impl Status {
    fn check_bounds(&self) -> Result<(), StatusError> {
        let also = self.channels.iter().map(|c| c.also.len()).max();
        let bounds = [
            ("addresses", self.addresses.len(), STATUS_ADDRESSES_MAX),
            ("data endpoints", self.data_endpoints.len(), STATUS_ADDRESSES_MAX),
            ("labels", self.labels.len(), STATUS_LABELS_MAX),
            ("channels", self.channels.len(), STATUS_CHANNELS_MAX),
            ("manifests of a channel", also.unwrap_or(0), STATUS_ALSO_MAX),
        ];
        match bounds.into_iter().find(|(_, count, limit)| count > limit) {
            Some((what, count, limit)) => Err(StatusError::TooMany { what, count, limit }),
            None => Ok(()),
        }
    }
}

impl PartialEq for SignedStatus {
    fn eq(&self, other: &Self) -> bool {
        let same = Arc::ptr_eq(&self.0, &other.0);
        same || (self.0.body == other.0.body && self.0.signature == other.0.signature)
    }
}

impl Eq for SignedStatus {}

impl Encode for SignedStatus {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.0.body.encode(encoder)?;
        self.0.signature.encode(encoder)
    }
}

impl<C> Decode<C> for SignedStatus {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Ok(Self::unopened(Decode::decode(decoder)?, Decode::decode(decoder)?))
    }
}

impl<'de, C> BorrowDecode<'de, C> for SignedStatus {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Decode::decode(decoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{CHANNEL_BYTES_MAX, REPORT_REASON_BYTES_MAX, STATUS_LABEL_BYTES_MAX, STATUS_NAME_BYTES_MAX};
    use crate::release::ReleaseId;
    use crate::report::{Phase, Step};

    fn status(node: NodeId) -> Status {
        Status {
            node,
            incarnation: 1,
            seq: 2,
            name: "n".into(),
            addresses: vec![],
            data_endpoints: vec![],
            labels: vec![],
            channels: vec![],
            leases: 0,
            leases_max: 0,
            engines: 0,
            engines_ready: 0,
            interval_ms: 3000,
            leaving: false,
            draining: false,
            upload_bytes_per_s: 0,
            uploading_bytes_per_s: 0,
            download_bytes_per_s: 0,
            version: String::new(),
        }
    }

    #[test]
    fn only_the_node_itself_can_speak_for_it() {
        let (me, other) = (NodeSecret::from_seed([1; 32]), NodeSecret::from_seed([2; 32]));
        assert_eq!(SignedStatus::sign(&status(me.public()), &me).open(), Ok(status(me.public()).into()));
        let forged = SignedStatus::sign(&status(other.public()), &me);
        assert!(matches!(forged.open(), Err(StatusError::Signature(_))));
    }

    #[test]
    fn the_longest_record_that_options_allow_can_be_read() {
        let me = NodeSecret::from_seed([1; 32]);
        let id = ReleaseId { seq: u64::MAX, manifest: ManifestHash::of(b"") };
        let report = Report {
            wanted: id,
            base: Some(id),
            step: Step::Halted,
            phase: Phase::RolledBack,
            served: Some(id.manifest),
            settled: true,
            ready: true,
            held: true,
            engines: u32::MAX,
            reason: "r".repeat(REPORT_REASON_BYTES_MAX),
            times: crate::times::tests::full(),
        };
        let channel = |i: usize| ChannelStatus {
            channel: format!("{i:0>CHANNEL_BYTES_MAX$}").parse().unwrap(),
            seq: u64::MAX,
            manifest: ManifestHash::of(b""),
            chunks_wanted: u32::MAX,
            chunks_have: u32::MAX,
            also: vec![ManifestHash::of(b""); STATUS_ALSO_MAX],
            report: Some(report.clone()),
        };
        let label = ("k".repeat(STATUS_LABEL_BYTES_MAX / 2), "v".repeat(STATUS_LABEL_BYTES_MAX / 2));
        let longest = Status {
            name: "n".repeat(STATUS_NAME_BYTES_MAX),
            addresses: vec!["a".repeat(100); STATUS_ADDRESSES_MAX],
            labels: vec![label; STATUS_LABELS_MAX],
            channels: (0..STATUS_CHANNELS_MAX).map(channel).collect(),
            draining: true,
            upload_bytes_per_s: u64::MAX,
            ..status(me.public())
        };
        let opened = SignedStatus::sign(&longest, &me).open();
        assert!(opened.as_ref().is_ok_and(|opened| **opened == longest), "{:?}", opened.err());
    }

    #[test]
    fn crowds_are_refused() {
        let me = NodeSecret::from_seed([1; 32]);
        let crowded = Status { addresses: vec!["x".into(); 33], ..status(me.public()) };
        assert!(matches!(SignedStatus::sign(&crowded, &me).open(), Err(StatusError::TooMany { .. })));
    }
}
