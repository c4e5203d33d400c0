//! What is delivered.

use crate::limits::EVENT_COST_BYTES;
use serde::{Deserialize, Serialize};

/// One event, as every hook gets it. Whatever is in the texts can be sent: see each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Tells this event from all others, so that a receiver knows a repetition. What is no visible ASCII in
    /// it is sent as `?`.
    pub id: String,
    /// What hooks choose by. Sent like `id`.
    pub kind: String,
    /// One JSON object, sent as it is.
    pub body: String,
    /// What the event is about, if only the newest undelivered one of its kind about that is worth keeping,
    /// as with progress; none if each counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaceable: Option<String>,
}

impl Event {
    /// What it is taken to need in memory, in bytes.
    pub(crate) fn cost_bytes(&self) -> usize {
        let texts = self.id.len() + self.kind.len() + self.body.len();
        texts + self.replaceable.as_ref().map_or(0, String::len) + EVENT_COST_BYTES
    }

    pub(crate) fn sent_id(&self) -> String {
        visible(&self.id)
    }

    pub(crate) fn sent_kind(&self) -> String {
        visible(&self.kind)
    }
}

/// Fit for a header of HTTP and for an environment variable: an event that fits neither could never be
/// delivered, and would keep back all behind it.
fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect()
}
