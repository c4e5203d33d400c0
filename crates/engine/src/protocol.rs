//! The messages, as JSON. docs/engine-protocol.md tells the same with examples.
//!
//! A frame is a length (u32, little endian) and one JSON object of that many bytes. JSON, where
//! agents among themselves speak bincode, because engines are written in any language. An engine
//! sends requests, `{"id": N, "op": "...", ...}`, and each is answered exactly once, by
//! `{"re": N, "ok": {...}}` or `{"re": N, "error": {"code", "message"}}`. The agent also sends
//! events, `{"event": "...", ...}`, at any time. A file descriptor travels by `SCM_RIGHTS` with
//! the first byte of the frame that needs it. Fields and events that a reader does not know are
//! skipped; nothing that is sent is ever executed.

use crate::frame::{self, FrameError};
use crate::operator;
use aquifer_core::{Binding, ChannelName, Dtype, ManifestHash, NodeId, PublisherKey, Release};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt::Display;
use std::str::FromStr;

/// Said in `hello`; an agent refuses any other.
pub const PROTOCOL_VERSION: u32 = 1;

/// What an engine asks or tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// First on every connection. Answered by [`Welcome`].
    Hello(Hello),
    /// Says anew what `hello` said of it.
    Conduct(Conduct),
    /// Waits until the channel has an accepted release whose manifest is loaded. Answered by a
    /// [`ManifestPage`](crate::table::ManifestPage) with tensors from that number on, and without one by
    /// [`ManifestReply`], which not every release fits.
    Manifest {
        #[serde(skip_serializing_if = "Option::is_none")]
        from: Option<u32>,
    },
    /// Memory: of the host, as the descriptor of a memfd sealed with `F_SEAL_SHRINK` and `F_SEAL_GROW`; of a
    /// GPU, as a [`GpuMemory`] and no descriptor.
    Region(RegionSpec),
    Bind {
        bindings: Vec<BindingSpec>,
    },
    /// What very many bindings would say.
    BindRow(RowSpec),
    /// Registration is complete: land the weights.
    Hydrate,
    /// Answers [`Event::Pause`]: nothing reads the weights until `applied` or `aborted`.
    Paused {
        #[serde(with = "text")]
        manifest: ManifestHash,
    },
    /// Answers [`Event::Check`]: it passed.
    Checked {
        #[serde(with = "text")]
        manifest: ManifestHash,
    },
    /// Answers [`Event::Applied`]: the engine serves this manifest.
    Resumed {
        #[serde(with = "text")]
        manifest: ManifestHash,
    },
    /// Answers [`Event::Pause`], [`Event::Check`] or [`Event::Applied`] when the engine's own code failed.
    Refused(Refusal),
    /// The node's state, as any JSON. Needs no `hello`.
    Status,
    /// Hand off and leave. Needs no `hello`. Answered by [`operator::Drained`], when it is over.
    Drain(operator::Drain),
    Releases(operator::Releases),
    Draft(operator::Draft),
    Announce(operator::Announce),
    Word(operator::Word),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u32,
    /// The client library and its version, for people.
    pub client: String,
    pub pid: u32,
    /// What to call this engine in status and logs.
    pub name: String,
    #[serde(with = "text")]
    pub channel: ChannelName,
    /// The release the engine serves from its memory at this moment. None if it serves nothing,
    /// or does not know what its memory holds.
    #[serde(with = "text_or_null", default)]
    pub serving: Option<ManifestHash>,
    #[serde(flatten)]
    pub conduct: Conduct,
}

/// How an engine behaves when it is given another release. Engines from before there were checks say nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conduct {
    /// Whether it is to be sent [`Event::Check`]. One that is not counts as having passed.
    #[serde(default)]
    pub checks: bool,
    /// How long it may take to answer `pause` and `check`, in milliseconds, if it knows. An answer that comes
    /// much later counts for nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_timeout_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check_timeout_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub during_pause: Option<DuringPause>,
}

/// What becomes of requests that come to a paused engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DuringPause {
    /// They wait until it resumes.
    Held,
    /// They are turned away at once.
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionSpec {
    /// A number the engine gives it, for `bind`.
    pub region: u32,
    pub bytes: u64,
    /// True if nothing was ever written to it, so that hashing what is there is a waste.
    #[serde(default)]
    pub fresh: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuMemory>,
}

/// Where a region lies in a GPU's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuMemory {
    /// The GPU's UUID, `GPU-` and 32 hexadecimal digits: an index means different devices to processes that
    /// see different ones.
    pub device: String,
    /// `cudaIpcMemHandle_t`, 64 bytes, or PyTorch's form of it, in hexadecimal.
    pub handle: String,
    /// In bytes from the beginning of the allocation that the handle names.
    pub offset: u64,
}

/// [`Binding`] as it is written. `index` and `strides` may be left out; see there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindingSpec {
    pub tensor: String,
    pub dtype: String,
    /// Of the whole tensor, not of the slice.
    pub shape: Vec<u64>,
    /// `[start, end]` for each dimension.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub index: Vec<(u64, u64)>,
    pub region: u32,
    /// In bytes from the region's beginning.
    pub offset: u64,
    /// In bytes, for each dimension.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub strides: Vec<u64>,
}

/// Tensors of a release, whole and packed, in the order of their names: each at the next multiple of `align`
/// bytes of the region behind the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowSpec {
    #[serde(with = "text")]
    pub manifest: ManifestHash,
    /// `[first, behind the last]` for each range of their numbers, ascending. Left out, it is all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensors: Option<Vec<(u32, u32)>>,
    pub region: u32,
    /// Where the first may begin, in bytes from the region's beginning.
    #[serde(default)]
    pub offset: u64,
    pub align: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    #[serde(with = "text")]
    pub manifest: ManifestHash,
    pub stage: Stage,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The engine would not stop; it goes on with the old release.
    Pause,
    /// The engine found that what was applied is no good; it stays paused. The agent puts back the release before.
    Check,
    /// The engine would not serve what was applied; it stays paused. The agent puts back the release before, or
    /// applies another.
    Resume,
}

/// Answers `hello`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    #[serde(with = "text")]
    pub node: NodeId,
    pub agent_name: String,
    /// The agent's version.
    pub version: String,
}

/// Answers `manifest`. Tensors are sorted by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestReply {
    pub release: ReleaseInfo,
    pub tensors: Vec<TensorInfo>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorInfo {
    pub name: String,
    /// As in safetensors: `F32`, `BF16`, `F8_E4M3`, …
    pub dtype: String,
    pub shape: Vec<u64>,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseInfo {
    #[serde(with = "text")]
    pub channel: ChannelName,
    pub seq: u64,
    #[serde(with = "text")]
    pub manifest: ManifestHash,
    pub rollback: bool,
    pub note: String,
    pub created_unix_ms: u64,
    #[serde(with = "text")]
    pub publisher: PublisherKey,
}

/// What the agent tells unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A new release was heard and accepted. It is not there yet.
    Release {
        release: ReleaseInfo,
    },
    Progress(Progress),
    /// All that is bound holds this release, verified in place. The engine may serve it.
    Hydrated {
        release: ReleaseInfo,
    },
    /// The release is ready to be applied: please quiesce, and answer `paused` or `refused`.
    Pause {
        release: ReleaseInfo,
        /// How much of the engine's memory will change.
        bytes: u64,
    },
    /// Its bytes are in place: see whether the release is any good, without serving it yet, and answer `checked`
    /// or `refused`. Only to engines that have checks.
    Check {
        release: ReleaseInfo,
    },
    /// Its bytes are in place: go on, and answer `resumed` or `refused`. It may be the release before, which was
    /// put back, or never overwritten.
    Applied {
        release: ReleaseInfo,
    },
    /// A release cannot be served by this engine. It goes on with what it has.
    Failed(Failure),
    /// Where the node stands with the channel: told when that changes, and after `hello`.
    Standing(Standing),
    /// After `pause`, instead of `applied`: no byte was changed, go on with the old release.
    Aborted {
        release: ReleaseInfo,
    },
    /// Something a newer agent says.
    #[serde(other)]
    Unknown,
}

/// What `status` says of the channel, true of all the node's engines together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The release to get to, or arrived at.
    #[serde(with = "text")]
    pub wanted: ManifestHash,
    /// What the engines are to serve now. None: nothing yet.
    #[serde(with = "text_or_null", default)]
    pub due: Option<ManifestHash>,
    /// `heard`, `planned`, `fetched`, `verified`, `staged`, `paused`, `checked`, `ready`, `failed` or `rolled back`.
    pub phase: String,
    /// All of them serve `due`, and nobody can be ready with another release that must not be.
    pub ready: bool,
    /// What it waits for, or what went wrong; for people.
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    #[serde(with = "text")]
    pub manifest: ManifestHash,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub chunks_done: u64,
    pub chunks_total: u64,
    /// How many peers bytes came from.
    pub peers: u64,
    pub bytes_per_s: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    #[serde(with = "text")]
    pub manifest: ManifestHash,
    pub code: String,
    pub message: String,
}

/// Why a request was not done: what happened, to what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    /// For programs: lower case, words joined by `-`. This crate's own are in [`code`].
    pub code: Cow<'static, str>,
    /// For people.
    pub message: String,
}

/// Codes of the errors that the server half answers by itself.
pub mod code {
    /// Not a frame, or a frame that is not a request. The connection is closed after it.
    pub const BAD_FRAME: &str = "bad-frame";
    /// A request of a known kind with a field missing or wrong.
    pub const BAD_REQUEST: &str = "bad-request";
    pub const UNKNOWN_OP: &str = "unknown-op";
    /// `hello` has not been said, or twice.
    pub const HELLO: &str = "hello";
    /// Engine and agent are too far apart in age.
    pub const PROTOCOL_VERSION: &str = "protocol-version";
    /// The descriptor is missing, not a memfd, not sealed, or too short.
    pub const BAD_REGION: &str = "bad-region";
    /// The caller is another user. The connection is closed after it.
    pub const NOT_PERMITTED: &str = "not-permitted";
    /// The agent serves as many connections as it will.
    pub const BUSY: &str = "busy";
    /// The agent has no such manifest, or not any more.
    pub const UNKNOWN_MANIFEST: &str = "unknown-manifest";
    /// The answer does not fit a frame.
    pub const TOO_LARGE: &str = "too-large";
}

/// What an agent sends, taken apart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum FromAgent {
    /// An answer is JSON not yet read: the list of a large release's tensors would be a tree of millions of
    /// allocations.
    Reply {
        re: u64,
        result: Result<Box<str>, ErrorReply>,
    },
    Event(Event),
}

impl ErrorReply {
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        ErrorReply { code: Cow::Borrowed(code), message: message.into() }
    }
}

impl Display for ErrorReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

impl ReleaseInfo {
    pub fn new(release: &Release, publisher: PublisherKey) -> Self {
        ReleaseInfo {
            channel: release.channel.clone(),
            seq: release.seq,
            manifest: release.manifest,
            rollback: release.rolls_back_to.is_some(),
            note: release.note.clone(),
            created_unix_ms: release.created_unix_ms,
            publisher,
        }
    }
}

impl From<BindingSpec> for Binding {
    fn from(spec: BindingSpec) -> Self {
        Binding {
            tensor: spec.tensor,
            dtype: Dtype::new(spec.dtype),
            shape: spec.shape,
            index: spec.index,
            region: spec.region,
            offset: spec.offset,
            strides: spec.strides,
        }
    }
}

impl From<&Binding> for BindingSpec {
    fn from(binding: &Binding) -> Self {
        BindingSpec {
            tensor: binding.tensor.clone(),
            dtype: binding.dtype.name().to_string(),
            shape: binding.shape.clone(),
            index: binding.index.clone(),
            region: binding.region,
            offset: binding.offset,
            strides: binding.strides.clone(),
        }
    }
}

impl Request {
    /// The frame of this request.
    pub fn encode(&self, id: u64) -> Result<Vec<u8>, FrameError> {
        #[derive(Serialize)]
        struct Call<'a> {
            id: u64,
            #[serde(flatten)]
            request: &'a Request,
        }
        frame::encode(&Call { id, request: self })
    }

    /// Takes a frame's content apart. `Err` if it is no request at all; the inner `Err` if it is
    /// one that can be answered but not understood.
    pub fn decode(content: &[u8]) -> Result<(u64, Result<Request, ErrorReply>), ErrorReply> {
        #[derive(Deserialize)]
        struct Envelope<'a> {
            id: u64,
            #[serde(borrow)]
            op: Cow<'a, str>,
        }
        let envelope: Envelope<'_> = serde_json::from_slice(content)
            .map_err(|e| ErrorReply::new(code::BAD_FRAME, format!("this is not a request: {e}")))?;
        Ok((envelope.id, Request::of_op(&envelope.op, content)))
    }

    fn of_op(op: &str, content: &[u8]) -> Result<Request, ErrorReply> {
        #[derive(Deserialize)]
        struct Page {
            from: Option<u32>,
        }
        #[derive(Deserialize)]
        struct Bind {
            bindings: Vec<BindingSpec>,
        }
        #[derive(Deserialize)]
        struct About {
            #[serde(with = "text")]
            manifest: ManifestHash,
        }
        Ok(match op {
            "hello" => Request::Hello(fields(op, content)?),
            "conduct" => Request::Conduct(fields(op, content)?),
            "manifest" => Request::Manifest { from: fields::<Page>(op, content)?.from },
            "region" => Request::Region(fields(op, content)?),
            "bind" => Request::Bind { bindings: fields::<Bind>(op, content)?.bindings },
            "bind_row" => Request::BindRow(fields(op, content)?),
            "hydrate" => Request::Hydrate,
            "paused" => Request::Paused { manifest: fields::<About>(op, content)?.manifest },
            "checked" => Request::Checked { manifest: fields::<About>(op, content)?.manifest },
            "resumed" => Request::Resumed { manifest: fields::<About>(op, content)?.manifest },
            "refused" => Request::Refused(fields(op, content)?),
            "status" => Request::Status,
            "drain" => Request::Drain(fields(op, content)?),
            "releases" => Request::Releases(fields(op, content)?),
            "draft" => Request::Draft(fields(op, content)?),
            "announce" => Request::Announce(fields(op, content)?),
            "word" => Request::Word(fields(op, content)?),
            _ => {
                let op: String = op.chars().take(64).collect();
                let message = format!("'{op}' is not a request this agent knows; is the engine's library newer?");
                return Err(ErrorReply::new(code::UNKNOWN_OP, message));
            }
        })
    }
}

fn fields<T: DeserializeOwned>(op: &str, content: &[u8]) -> Result<T, ErrorReply> {
    serde_json::from_slice(content).map_err(|e| ErrorReply::new(code::BAD_REQUEST, format!("request '{op}': {e}")))
}

/// The frame of a reply. One that does not fit becomes the error that says so.
pub(crate) fn encode_reply(re: u64, result: &Result<Value, ErrorReply>) -> Vec<u8> {
    encode_answer(re, result.as_ref())
}

/// The same, of an answer that is no [`Value`] yet: the list of a large release's tensors would be a
/// tree of millions of allocations.
pub(crate) fn encode_answer<T: Serialize>(re: u64, result: Result<&T, &ErrorReply>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Reply<'a, T> {
        re: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        ok: Option<&'a T>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a ErrorReply>,
    }
    let frame = |result: Result<&T, &ErrorReply>| frame::encode(&Reply { re, ok: result.ok(), error: result.err() });
    frame(result).unwrap_or_else(|e| {
        let error = ErrorReply::new(code::TOO_LARGE, format!("the answer cannot be sent: {e}"));
        frame(Err(&error)).expect("an error of one sentence fits a frame")
    })
}

pub(crate) fn encode_event(event: &Event) -> Vec<u8> {
    frame::encode(event).expect("an event is a record of a few kilobytes at most")
}

impl FromAgent {
    pub(crate) fn decode(content: &[u8]) -> Result<FromAgent, serde_json::Error> {
        #[derive(Deserialize)]
        struct Message {
            re: Option<u64>,
            ok: Option<Box<RawValue>>,
            error: Option<ErrorReply>,
        }
        let message: Message = serde_json::from_slice(content)?;
        let Some(re) = message.re else {
            return Ok(FromAgent::Event(serde_json::from_slice(content)?));
        };
        let result = match (message.ok, message.error) {
            (_, Some(error)) => Err(error),
            (ok, None) => Ok(ok.map_or_else(|| "null".into(), Into::into)),
        };
        Ok(FromAgent::Reply { re, result })
    }
}

/// Hashes, keys and names as the text they print as.
pub(crate) mod text {
    use super::*;

    pub(crate) fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(crate) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(d: D) -> Result<T, D::Error> {
        Cow::<'de, str>::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

mod text_or_null {
    use super::*;

    pub(crate) fn serialize<T: Display, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<T>, D::Error> {
        let text = Option::<Cow<'de, str>>::deserialize(d)?;
        text.map(|t| t.parse()).transpose().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn manifest() -> ManifestHash {
        ManifestHash::of(b"m")
    }

    fn release() -> ReleaseInfo {
        ReleaseInfo {
            channel: "a/b".parse().unwrap(),
            seq: 1,
            manifest: manifest(),
            rollback: false,
            note: String::new(),
            created_unix_ms: 2,
            publisher: PublisherKey([3; 32]),
        }
    }

    fn requests() -> Vec<Request> {
        let binding = BindingSpec {
            tensor: "t".into(),
            dtype: "F32".into(),
            shape: vec![4, 2],
            index: vec![(0, 2), (0, 2)],
            region: 1,
            offset: 8,
            strides: vec![16, 4],
        };
        let row = RowSpec { manifest: manifest(), tensors: None, region: 1, offset: 0, align: 256 };
        vec![
            Request::Hello(Hello {
                protocol: PROTOCOL_VERSION,
                client: "test".into(),
                pid: 7,
                name: "e".into(),
                channel: "a/b".parse().unwrap(),
                serving: Some(manifest()),
                conduct: Conduct {
                    checks: true,
                    pause_timeout_ms: Some(3),
                    check_timeout_ms: Some(4),
                    during_pause: Some(DuringPause::Refused),
                },
            }),
            Request::Conduct(Conduct { check_timeout_ms: Some(4), ..Conduct::default() }),
            Request::Manifest { from: None },
            Request::Region(RegionSpec { region: 1, bytes: 64, fresh: true, gpu: None }),
            Request::Region(RegionSpec {
                region: 2,
                bytes: 64,
                fresh: false,
                gpu: Some(GpuMemory { device: "GPU-00".into(), handle: "0a".into(), offset: 512 }),
            }),
            Request::Bind { bindings: vec![binding] },
            Request::Manifest { from: Some(0) },
            Request::BindRow(row.clone()),
            Request::BindRow(RowSpec { tensors: Some(vec![(0, 2), (4, 5)]), ..row }),
            Request::Hydrate,
            Request::Paused { manifest: manifest() },
            Request::Checked { manifest: manifest() },
            Request::Resumed { manifest: manifest() },
            Request::Refused(Refusal { manifest: manifest(), stage: Stage::Resume, message: "no".into() }),
            Request::Refused(Refusal { manifest: manifest(), stage: Stage::Check, message: "no".into() }),
            Request::Status,
            Request::Drain(operator::Drain { grace_ms: None }),
            Request::Drain(operator::Drain { grace_ms: Some(5) }),
        ]
    }

    #[test]
    fn every_request_survives_its_frame() {
        for (id, request) in (1u64..).zip(requests()) {
            let frame = request.encode(id).unwrap();
            assert_eq!(Request::decode(&frame[4..]), Ok((id, Ok(request))));
        }
    }

    #[test]
    fn every_event_survives_its_json() {
        let events = [
            Event::Release { release: release() },
            Event::Progress(Progress {
                manifest: manifest(),
                bytes_done: 1,
                bytes_total: 2,
                chunks_done: 3,
                chunks_total: 4,
                peers: 5,
                bytes_per_s: 6,
            }),
            Event::Hydrated { release: release() },
            Event::Pause { release: release(), bytes: 9 },
            Event::Check { release: release() },
            Event::Applied { release: release() },
            Event::Failed(Failure { manifest: manifest(), code: "x".into(), message: "y".into() }),
            Event::Standing(Standing {
                wanted: manifest(),
                due: None,
                phase: "staged".into(),
                ready: false,
                reason: "waits for n".into(),
            }),
            Event::Aborted { release: release() },
        ];
        for event in events {
            let json = serde_json::to_vec(&event).unwrap();
            assert_eq!(FromAgent::decode(&json).unwrap(), FromAgent::Event(event));
        }
    }

    #[test]
    fn what_a_newer_peer_adds_is_skipped() {
        let event = json!({"event": "weather", "sky": "grey"}).to_string();
        assert_eq!(FromAgent::decode(event.as_bytes()).unwrap(), FromAgent::Event(Event::Unknown));
        let request = json!({"id": 3, "op": "region", "region": 0, "bytes": 1, "colour": "blue"}).to_string();
        let expected = Request::Region(RegionSpec { region: 0, bytes: 1, fresh: false, gpu: None });
        assert_eq!(Request::decode(request.as_bytes()), Ok((3, Ok(expected))));
    }

    #[test]
    fn an_engine_from_before_there_were_checks_has_none() {
        let hello = json!({"id": 1, "op": "hello", "protocol": 1, "client": "old", "pid": 7, "name": "e",
            "channel": "a/b", "serving": null});
        let (_, request) = Request::decode(hello.to_string().as_bytes()).unwrap();
        let Ok(Request::Hello(hello)) = request else { panic!("{request:?}") };
        assert_eq!(hello.conduct, Conduct::default());
        assert!(!hello.conduct.checks);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let answer = |json: Value| Request::decode(json.to_string().as_bytes()).unwrap().1.unwrap_err();
        assert_eq!(answer(json!({"id": 1, "op": "dance"})).code, code::UNKNOWN_OP);
        let error = answer(json!({"id": 1, "op": "paused", "manifest": "12"}));
        assert_eq!(error.code, code::BAD_REQUEST);
        assert!(error.message.contains("'12' is not a hash"), "{error}");
        let error = answer(json!({"id": 1, "op": "region", "bytes": -1}));
        assert!(error.message.contains("-1"), "{error}");
        for none in ["", "[]", "{}", "{\"id\":-1,\"op\":\"status\"}", "{\"op\":\"status\"}", "\u{0}"] {
            assert_eq!(Request::decode(none.as_bytes()).unwrap_err().code, code::BAD_FRAME, "{none}");
        }
    }

    #[test]
    fn replies_are_one_or_the_other() {
        let ok = encode_reply(4, &Ok(json!({"a": 1})));
        let reply = FromAgent::decode(&ok[4..]).unwrap();
        assert_eq!(reply, FromAgent::Reply { re: 4, result: Ok(r#"{"a":1}"#.into()) });
        let error = ErrorReply::new(code::BUSY, "later");
        let sent = encode_reply(5, &Err(error.clone()));
        assert_eq!(FromAgent::decode(&sent[4..]).unwrap(), FromAgent::Reply { re: 5, result: Err(error) });
    }

    #[test]
    fn a_binding_is_the_same_on_both_sides() {
        let all = requests().into_iter();
        let bindings = all.filter_map(|r| if let Request::Bind { bindings } = r { Some(bindings) } else { None });
        let bindings: Vec<BindingSpec> = bindings.flatten().collect();
        let binding = Binding::from(bindings[0].clone());
        assert_eq!(BindingSpec::from(&binding), bindings[0]);
    }
}
