//! The policy of a rollout: which nodes take a release, and in which order they switch. It is part
//! of the signed release, so that all nodes decide by the same words.

use crate::codec::{self, CodecError, Kind};
use crate::id::NodeId;
use crate::limits::{RELEASE_BYTES_MAX, ROSTER_MAX, SELECTOR_LABELS_MAX, STATUS_LABEL_BYTES_MAX};
use bincode::{Decode, Encode};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// Labels that a node must have, all of them. Empty: every node matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub struct Selector(Vec<(String, String)>);

/// What a release says of its own rollout.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Policy {
    /// The nodes that take the release; the others stay with what they have.
    pub subset: Selector,
    /// True: these nodes stay with the release, whatever comes later for a wider or another
    /// selector, until a release comes for exactly this one.
    pub pinned: bool,
    pub how: How,
    /// The nodes with engines that the publisher knew to match, sorted by their ids. Majorities,
    /// counts and turns are of these; who comes later goes by them.
    pub roster: Vec<Entry>,
}

/// A node of the roster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Entry {
    pub node: NodeId,
    /// It goes first.
    pub canary: bool,
    /// Nodes of one number are one group: of these no more than [`Unavailable`] are out at a time.
    pub group: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum How {
    /// Each node by itself, as soon as it can.
    #[default]
    AtOnce,
    /// All at one time, when the publisher says so.
    Synchronous {
        required: Required,
        /// From the release on, by the publisher's clock: with too few prepared by then, it aborts.
        deadline_ms: u64,
        on_failure: OnFailure,
    },
    /// Canaries, then a bounded number at a time.
    Rolling {
        /// Who is a canary among nodes that are not in the roster; for people otherwise.
        canary: Option<Selector>,
        max_unavailable: Unavailable,
        /// The label whose values make the groups. None: all are one group.
        by: Option<String>,
    },
    /// Each node by itself, once somebody with the publisher's key says so.
    Manual,
}

/// How many of the roster have to be prepared before a synchronous release is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Required {
    All,
    Count(u32),
    /// Of a thousand.
    PerMille(u16),
}

/// What a publisher's agent does once a synchronous release has been committed, and then fails at so many of
/// its roster that it would not have been, had they failed before: at one, where all are required.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum OnFailure {
    /// Nothing: those where it failed are not ready, the others serve it.
    Stay,
    /// It releases what was served before, for all.
    #[default]
    RollBack,
}

/// How many of a group may be out at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Unavailable {
    Count(u32),
    /// Of the group, rounded down, and at least one node.
    Percent(u8),
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum PolicyError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("policy: {count} {what}, allowed are {limit}")]
    TooMany { what: &'static str, count: usize, limit: usize },
    #[error("policy: the roster is not sorted by node, or names one twice")]
    Unsorted,
    #[error("policy: {what} is {value}; {allowed}")]
    Range { what: &'static str, value: u64, allowed: &'static str },
    #[error("'{0}' is no selector: expected KEY=VALUE, several with commas between them")]
    Selector(String),
}

impl Selector {
    /// Sorted and without repetitions, whatever the order it is given in.
    pub fn new(mut labels: Vec<(String, String)>) -> Result<Self, PolicyError> {
        labels.sort();
        labels.dedup();
        let selector = Selector(labels);
        selector.check()?;
        Ok(selector)
    }

    pub fn matches(&self, labels: &[(String, String)]) -> bool {
        self.0.iter().all(|wanted| labels.contains(wanted))
    }

    /// The least that a node must have.
    pub fn labels(&self) -> &[(String, String)] {
        &self.0
    }

    pub fn is_everybody(&self) -> bool {
        self.0.is_empty()
    }

    fn check(&self) -> Result<(), PolicyError> {
        at_most("labels of a selector", self.0.len(), SELECTOR_LABELS_MAX)?;
        let longest = self.0.iter().map(|(key, value)| key.len() + value.len()).max();
        at_most("bytes of a label", longest.unwrap_or(0), STATUS_LABEL_BYTES_MAX)
    }
}

impl Policy {
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(Kind::Policy, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, PolicyError> {
        let policy: Policy = codec::decode::<_, RELEASE_BYTES_MAX>(Kind::Policy, bytes)?;
        policy.check()?;
        Ok(policy)
    }

    /// What cannot be meant: numbers of none, a roster out of order, more than there may be.
    pub fn check(&self) -> Result<(), PolicyError> {
        self.subset.check()?;
        self.how.check()?;
        at_most("nodes of the roster", self.roster.len(), ROSTER_MAX)?;
        match self.roster.is_sorted_by(|a, b| a.node < b.node) {
            true => Ok(()),
            false => Err(PolicyError::Unsorted),
        }
    }

    pub fn entry(&self, node: &NodeId) -> Option<&Entry> {
        let at = self.roster.binary_search_by(|e| e.node.cmp(node)).ok()?;
        self.roster.get(at)
    }

    pub fn is_synchronous(&self) -> bool {
        matches!(self.how, How::Synchronous { .. })
    }
}

impl How {
    fn check(&self) -> Result<(), PolicyError> {
        let range = |what, value: u64, fits: bool, allowed| match fits {
            true => Ok(()),
            false => Err(PolicyError::Range { what, value, allowed }),
        };
        match self {
            How::AtOnce | How::Manual => Ok(()),
            How::Synchronous { required, deadline_ms, on_failure: _ } => {
                range("deadline_ms", *deadline_ms, *deadline_ms > 0, "it must not be zero")?;
                match required {
                    Required::All => Ok(()),
                    Required::Count(n) => range("required", (*n).into(), *n > 0, "it must not be zero"),
                    Required::PerMille(n) => {
                        range("required", (*n).into(), (1..=1000).contains(n), "it must be 1 to 1000")
                    }
                }
            }
            How::Rolling { canary, max_unavailable, by } => {
                canary.iter().try_for_each(Selector::check)?;
                at_most("bytes of a label", by.as_ref().map_or(0, String::len), STATUS_LABEL_BYTES_MAX)?;
                match max_unavailable {
                    Unavailable::Count(n) => {
                        range("max_unavailable", (*n).into(), *n > 0, "with zero nobody could switch")
                    }
                    Unavailable::Percent(n) => {
                        range("max_unavailable", (*n).into(), (1..=100).contains(n), "it must be 1 to 100 percent")
                    }
                }
            }
        }
    }
}

impl Required {
    /// How many of `roster` nodes. Never less than a majority: with fewer, nobody could know that the
    /// rest does not serve the former release. See `proto::rollout`.
    pub fn of(self, roster: usize) -> usize {
        let majority = if roster == 0 { 0 } else { roster / 2 + 1 };
        let asked = match self {
            Required::All => roster,
            Required::Count(n) => usize::try_from(n).unwrap_or(usize::MAX).min(roster),
            Required::PerMille(n) => (roster * usize::from(n)).div_ceil(1000),
        };
        asked.max(majority)
    }
}

impl Unavailable {
    /// How many of a group of `nodes`; at least one.
    pub fn of(self, nodes: usize) -> usize {
        match self {
            Unavailable::Count(n) => usize::try_from(n).unwrap_or(usize::MAX),
            Unavailable::Percent(n) => nodes * usize::from(n) / 100,
        }
        .max(1)
    }
}

impl FromStr for Selector {
    type Err = PolicyError;
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let label = |part: &str| {
            let (key, value) = part.split_once('=').filter(|(key, _)| !key.trim().is_empty())?;
            Some((key.trim().to_string(), value.trim().to_string()))
        };
        let labels: Option<Vec<_>> = text.split(',').map(label).collect();
        Selector::new(labels.ok_or_else(|| PolicyError::Selector(text.chars().take(64).collect()))?)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels: Vec<String> = self.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
        f.write_str(&labels.join(","))
    }
}

fn at_most(what: &'static str, count: usize, limit: usize) -> Result<(), PolicyError> {
    match count <= limit {
        true => Ok(()),
        false => Err(PolicyError::TooMany { what, count, limit }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn label() -> impl Strategy<Value = (String, String)> {
        ("[a-z]{1,8}", "[a-z0-9]{0,8}")
    }

    fn selector() -> impl Strategy<Value = Selector> {
        prop::collection::vec(label(), 0..4).prop_map(|labels| Selector::new(labels).unwrap())
    }

    fn how() -> impl Strategy<Value = How> {
        let required = prop_oneof![
            Just(Required::All),
            (1..=u32::MAX).prop_map(Required::Count),
            (1..=1000u16).prop_map(Required::PerMille),
        ];
        let unavailable =
            prop_oneof![(1..=u32::MAX).prop_map(Unavailable::Count), (1..=100u8).prop_map(Unavailable::Percent),];
        let by = prop::option::of("[a-z]{1,8}");
        let on_failure = prop_oneof![Just(OnFailure::Stay), Just(OnFailure::RollBack)];
        let synchronous = |(required, deadline_ms, on_failure)| How::Synchronous { required, deadline_ms, on_failure };
        let rolling = |(canary, max_unavailable, by)| How::Rolling { canary, max_unavailable, by };
        prop_oneof![
            Just(How::AtOnce),
            Just(How::Manual),
            (required, 1..=u64::MAX, on_failure).prop_map(synchronous),
            (prop::option::of(selector()), unavailable, by).prop_map(rolling),
        ]
    }

    pub(crate) fn policy() -> impl Strategy<Value = Policy> {
        let entry = (any::<bool>(), 0..4u32);
        let roster = prop::collection::btree_map(any::<[u8; 32]>(), entry, 0..20).prop_map(|nodes| {
            let entry = |(id, (canary, group))| Entry { node: NodeId(id), canary, group };
            nodes.into_iter().map(entry).collect()
        });
        let whole = |(subset, pinned, how, roster)| Policy { subset, pinned, how, roster };
        (selector(), any::<bool>(), how(), roster).prop_map(whole)
    }

    proptest! {
        #[test]
        fn a_selector_survives_being_written_down(selector in selector()) {
            prop_assume!(!selector.is_everybody());
            prop_assert_eq!(selector.to_string().parse(), Ok(selector));
        }

        #[test]
        fn a_quorum_is_a_majority_and_no_more_than_all(how in how(), roster in 0usize..2000) {
            if let How::Synchronous { required, .. } = how {
                let needed = required.of(roster);
                prop_assert!(needed <= roster && (needed * 2 > roster || roster == 0));
            }
        }
    }

    #[test]
    fn a_selector_wants_all_its_labels() {
        let labels = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
        };
        let selector: Selector = "zone=a, ab=x".parse().unwrap();
        assert!(selector.matches(&labels(&[("ab", "x"), ("rack", "1"), ("zone", "a")])));
        assert!(!selector.matches(&labels(&[("ab", "x"), ("zone", "b")])));
        assert!(!selector.matches(&[]));
        assert!(Selector::default().matches(&[]));
        assert!("zone".parse::<Selector>().is_err() && "=a".parse::<Selector>().is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let sound = Policy::default();
        assert_eq!(sound.check(), Ok(()));
        let rolling = |max_unavailable| How::Rolling { canary: None, max_unavailable, by: None };
        let on_failure = OnFailure::default();
        let synchronous = |required, deadline_ms| How::Synchronous { required, deadline_ms, on_failure };
        for how in [
            rolling(Unavailable::Count(0)),
            rolling(Unavailable::Percent(0)),
            rolling(Unavailable::Percent(101)),
            synchronous(Required::Count(0), 1),
            synchronous(Required::PerMille(0), 1),
            synchronous(Required::PerMille(1001), 1),
            synchronous(Required::All, 0),
        ] {
            let refused = Policy { how: how.clone(), ..sound.clone() }.check();
            assert!(matches!(refused, Err(PolicyError::Range { .. })), "{how:?}");
        }
        let entry = |n| Entry { node: NodeId([n; 32]), canary: false, group: 0 };
        for roster in [vec![entry(2), entry(1)], vec![entry(1), entry(1)]] {
            assert_eq!(Policy { roster, ..sound.clone() }.check(), Err(PolicyError::Unsorted));
        }
        let roster = vec![entry(1); ROSTER_MAX + 1];
        assert!(matches!(Policy { roster, ..sound }.check(), Err(PolicyError::TooMany { .. })));
    }

    #[test]
    fn of_a_group_at_least_one_may_be_out() {
        assert_eq!([1, 3, 8, 100].map(|n| Unavailable::Percent(25).of(n)), [1, 1, 2, 25]);
        assert_eq!(Unavailable::Count(2).of(1), 2);
    }
}
