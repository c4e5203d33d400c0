//! Since when a puller could have more under way, and when it looks further for it.
//!
//! Where nobody has what it misses, as after a publisher's death, each look costs somebody a whole
//! ask and brings nothing. So it looks less and less often, until something comes.

use crate::limits::{HUNGER_PATIENCE, HUNGER_PATIENCE_MAX};
use aquifer_core::Time;
use std::time::Duration;

#[derive(Debug, Default)]
pub(super) struct Hunger {
    since: Option<Time>,
    /// Looks in a row that brought nothing.
    vain: u32,
}

impl Hunger {
    /// There could be more under way.
    pub(super) fn begin(&mut self, now: Time) {
        self.since.get_or_insert(now);
    }

    /// There could not be more.
    pub(super) fn end(&mut self) {
        *self = Hunger::default();
    }

    /// Something came, or others may have something: looking is worth while again.
    pub(super) fn hope(&mut self) {
        self.vain = 0;
    }

    /// Looks further now, or for the same once more.
    pub(super) fn look(&mut self, now: Time, further: bool) {
        self.since = Some(now);
        self.vain = if further { 0 } else { self.vain.saturating_add(1) };
    }

    /// When it is time to look further.
    pub(super) fn due(&self) -> Option<Time> {
        let doubled = HUNGER_PATIENCE.saturating_mul(1u32.checked_shl(self.vain).unwrap_or(u32::MAX));
        let patience: Duration = doubled.min(HUNGER_PATIENCE_MAX);
        self.since.map(|since| since + patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When it looks, for so many times.
    fn looks(hunger: &mut Hunger, count: usize) -> Vec<u128> {
        let look = |_| {
            let due = hunger.due().expect("it is hungry");
            hunger.look(due, false);
            due.since(Time::ZERO).as_millis()
        };
        (0..count).map(look).collect()
    }

    #[test]
    fn who_looks_in_vain_looks_less_and_less_often_until_there_is_hope() {
        let mut hunger = Hunger::default();
        assert_eq!(hunger.due(), None);
        hunger.begin(Time::ZERO);
        hunger.begin(Time::ZERO + Duration::from_secs(1));
        assert_eq!(looks(&mut hunger, 7), [20, 60, 140, 300, 620, 1120, 1620]);
        hunger.hope();
        assert_eq!(looks(&mut hunger, 2), [1640, 1680]);
        let now = Time::ZERO + Duration::from_millis(1680);
        hunger.look(now, true);
        assert_eq!(hunger.due(), Some(now + HUNGER_PATIENCE), "what is new is no repetition");
        hunger.end();
        assert_eq!(hunger.due(), None);
    }
}
