//! Where a node stands in a channel: the part that survives its restarts.

use aquifer_core::codec::{self, CodecError, Kind};
use aquifer_core::limits::STATEMENT_BYTES_MAX;
use aquifer_core::{ReleaseId, Step};
use bincode::{Decode, Encode};

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Stand {
    /// The release to get to, or arrived at.
    pub wanted: ReleaseId,
    pub step: Step,
    /// What to serve until then, and to go back to.
    pub base: Option<ReleaseId>,
    /// Whether one may be ready with the base: if it is synchronous, it has to be open.
    pub is_base_open: bool,
    /// How many engines it had. After a restart nothing is said of them before all are back.
    pub engines: u32,
    /// Why the wanted release is not to be had: it failed here, or elsewhere.
    pub failed: Option<String>,
}

impl Stand {
    /// The release that is to be served now.
    pub fn due(&self) -> Option<ReleaseId> {
        self.step.due(self.wanted, self.base)
    }

    /// Releases that are not to be forgotten.
    pub fn used(&self) -> Vec<ReleaseId> {
        self.base.into_iter().chain([self.wanted]).collect()
    }

    pub fn encode(&self) -> Vec<u8> {
        codec::encode(Kind::Stand, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        codec::decode::<_, STATEMENT_BYTES_MAX>(Kind::Stand, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::testing::id;

    #[test]
    fn it_survives() {
        let failed = Some("the check took too long".to_string());
        let (wanted, base) = (id(2), Some(id(1)));
        let stand = Stand { wanted, step: Step::GoingBack, base, is_base_open: true, engines: 8, failed };
        assert_eq!(Stand::decode(&stand.encode()), Ok(stand.clone()));
        let bytes = stand.encode();
        (0..bytes.len()).for_each(|end| assert!(Stand::decode(&bytes[..end]).is_err(), "cut at {end}"));
    }
}
