//! When a node reached each phase of a release, by its own clock: for people, who look for what takes long.

use crate::report::Phase;
use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode, impl_borrow_decode};

/// Milliseconds from when a node heard of a release until it first was in each of its phases. Of one node:
/// those of two are never compared. A phase that it did not reach, or passed unseen, has none, and a node that
/// was started anew meanwhile has none at all, because it does not know when it heard.
///
/// Encoded as a mask of phases (16 bits) and 32 bits for each of these: at most 42 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times([Option<u32>; PHASES.len()]);

/// In the order of their numbers on the wire.
const PHASES: [Phase; 10] = [
    Phase::Heard,
    Phase::Planned,
    Phase::Fetched,
    Phase::Verified,
    Phase::Staged,
    Phase::Paused,
    Phase::Checked,
    Phase::Ready,
    Phase::Failed,
    Phase::RolledBack,
];

impl Times {
    /// Notes that it is in `phase`. What is known already stays; and a phase that comes after a later one, because
    /// an engine began anew, is no news: the times of the way forward only grow.
    pub fn reach(&mut self, phase: Phase, after_ms: u32) {
        let at = index(phase);
        let is_forward = phase <= Phase::Ready;
        let later = PHASES[at..].iter().zip(&self.0[at..]).any(|(p, ms)| *p <= Phase::Ready && ms.is_some());
        if self.0[at].is_none() && !(is_forward && later) {
            self.0[at] = Some(after_ms);
        }
    }

    pub fn at(&self, phase: Phase) -> Option<u32> {
        self.0[index(phase)]
    }

    pub fn is_empty(&self) -> bool {
        *self == Times::default()
    }

    /// The phases that it reached, in their order, with the milliseconds until then.
    pub fn iter(&self) -> impl Iterator<Item = (Phase, u32)> + '_ {
        PHASES.into_iter().zip(self.0).filter_map(|(phase, ms)| Some((phase, ms?)))
    }

    /// What is known here or there. Of two accounts of one phase the former stays.
    pub fn merge(&mut self, other: &Times) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, theirs)| *mine = mine.or(theirs));
    }
}

fn index(phase: Phase) -> usize {
    match phase {
        Phase::Heard => 0,
        Phase::Planned => 1,
        Phase::Fetched => 2,
        Phase::Verified => 3,
        Phase::Staged => 4,
        Phase::Paused => 5,
        Phase::Checked => 6,
        Phase::Ready => 7,
        Phase::Failed => 8,
        Phase::RolledBack => 9,
    }
}

impl Encode for Times {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        let mask = self.0.iter().rev().fold(0u16, |mask, ms| mask << 1 | u16::from(ms.is_some()));
        mask.encode(encoder)?;
        self.0.iter().flatten().try_for_each(|ms| ms.encode(encoder))
    }
}

impl<C> Decode<C> for Times {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let mask = u16::decode(decoder)?;
        if mask >> PHASES.len() != 0 {
            return Err(DecodeError::Other("the time of a phase that is not known"));
        }
        let mut times = Times::default();
        for (i, ms) in times.0.iter_mut().enumerate() {
            if mask >> i & 1 == 1 {
                *ms = Some(u32::decode(decoder)?);
            }
        }
        Ok(times)
    }
}

impl_borrow_decode!(Times);

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::codec::{self, Kind};
    use proptest::prelude::*;

    /// As long as they get.
    pub(crate) fn full() -> Times {
        Times([Some(u32::MAX); PHASES.len()])
    }

    const BYTES_MAX: usize = 6 + 42;

    #[test]
    fn phases_have_the_numbers_of_the_wire() {
        PHASES.iter().enumerate().for_each(|(i, phase)| assert_eq!(index(*phase), i));
    }

    #[test]
    fn it_keeps_when_each_was_first_reached() {
        let mut times = Times::default();
        for (phase, ms) in [(Phase::Heard, 0), (Phase::Staged, 70), (Phase::Staged, 90), (Phase::Fetched, 95)] {
            times.reach(phase, ms);
        }
        assert_eq!(times.iter().collect::<Vec<_>>(), [(Phase::Heard, 0), (Phase::Staged, 70)]);
        // Given up, and then committed after all.
        times.reach(Phase::RolledBack, 100);
        times.reach(Phase::Ready, 200);
        assert_eq!((times.at(Phase::RolledBack), times.at(Phase::Ready)), (Some(100), Some(200)));
        assert_eq!(times.at(Phase::Paused), None);
    }

    #[test]
    fn the_longest_is_short_and_none_is_shorter() {
        let mut all = Times::default();
        PHASES.into_iter().for_each(|phase| all.reach(phase, u32::MAX));
        assert_eq!(codec::encode(Kind::Status, &all).len(), BYTES_MAX);
        assert_eq!(codec::encode(Kind::Status, &Times::default()).len(), 8);
    }

    proptest! {
        #[test]
        fn they_arrive_as_they_were_sent(all: [Option<u32>; PHASES.len()]) {
            let bytes = codec::encode(Kind::Status, &Times(all));
            prop_assert_eq!(codec::decode::<_, BYTES_MAX>(Kind::Status, &bytes), Ok(Times(all)));
        }

        /// What is not times is refused; what is, has one encoding.
        #[test]
        fn any_bytes_are_times_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..44)) {
            let bytes = [codec::encode(Kind::Status, &()), bytes].concat();
            if let Ok(times) = codec::decode::<Times, 100>(Kind::Status, &bytes) {
                prop_assert_eq!(codec::encode(Kind::Status, &times), bytes);
            }
        }

        #[test]
        fn the_way_forward_takes_longer_and_longer(steps in prop::collection::vec(0..8usize, 0..40)) {
            let mut times = Times::default();
            steps.into_iter().zip(0..).for_each(|(phase, ms)| times.reach(PHASES[phase], ms));
            let reached: Vec<u32> = times.iter().map(|(_, ms)| ms).collect();
            prop_assert!(reached.is_sorted());
        }
    }
}
