//! What an operator's program asks of the agent over the same socket. None of it needs a `hello`.
//!
//! Keys stay with the operator: the agent drafts what is to be signed, because it knows the numbers and the
//! nodes, and passes on what was signed.

use crate::protocol::text;
use aquifer_core::ChannelName;
use serde::{Deserialize, Serialize};

/// Take on nothing new, hand over what nobody else has, say goodbye.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Leave after so many milliseconds, done or not. None: as the agent was told when it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
}

/// Told once a drain is over, just before the agent ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// Nothing was left to be handed over.
    pub whole: bool,
    /// Chunks that others want and of which no other copy is known.
    pub sole_chunks: u64,
}

/// Answered by what the agent knows of the channel's releases, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Releases {
    #[serde(with = "text")]
    pub channel: ChannelName,
}

/// A release of a manifest that an earlier one had. Answered by [`Drafted`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draft {
    #[serde(with = "text")]
    pub channel: ChannelName,
    /// The number of the release to go back to. None: what there was before the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u64>,
    /// An encoded `Policy` without its nodes, in hexadecimal. None: that of the newest release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    #[serde(default)]
    pub note: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drafted {
    /// An encoded `Release`, to be signed, in hexadecimal.
    pub release: String,
}

/// Passes on what was signed, and believes it, if its key is trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announce {
    /// An encoded `SignedRelease`, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// An encoded `SignedStatement`, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statement: Option<String>,
}

/// What a publisher is to say of the channel's release. Answered by [`WordAnswer`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    #[serde(with = "text")]
    pub channel: ChannelName,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "word", rename_all = "snake_case")]
pub enum WordAnswer {
    Commit,
    Abort {
        reason: String,
    },
    /// Not yet: how many nodes have answered and are prepared, how many have to be, and how many there are.
    Wait {
        answered: u64,
        prepared: u64,
        required: u64,
        nodes: u64,
    },
    /// Nothing waits for a word.
    None,
}
