use super::*;

const UNIT: u64 = 1 << 20;

#[test]
fn so_many_askers_worth_are_read_at_once_and_a_large_chunk_alone() {
    let mut budget = Budget::new(64 * UNIT, None, Time::ZERO);
    assert!(budget.fits(Time::ZERO, 100 * UNIT, UNIT), "whatever its length, alone it may go");
    (0..SERVED_AT_ONCE).for_each(|_| budget.take(UNIT));
    assert!(!budget.fits(Time::ZERO, UNIT, UNIT));
    assert!(budget.fits(Time::ZERO, UNIT, 2 * UNIT), "askers take more at a time");
    assert!(!budget.fits(Time::ZERO, 60 * UNIT, u64::MAX), "the node's own bound holds all the same");
    budget.put_back(UNIT);
    assert!(budget.fits(Time::ZERO, UNIT, UNIT));
    assert_eq!(budget.next_timeout(), None, "no cap holds anything back");
}

#[test]
fn a_cap_says_when_it_allows_more_and_saves_up_no_more_than_its_burst() {
    let rate = 100 * UNIT;
    let mut budget = Budget::new(u64::MAX, Some(rate), Time::ZERO);
    budget.take(3 * UNIT);
    let at = budget.next_timeout().expect("it gave more than it had saved up");
    let debt = at.since(Time::ZERO);
    let due = Duration::from_millis(30) - UPLOAD_BURST;
    assert!(debt >= due && debt < due + Duration::from_millis(1), "{debt:?}");
    assert!(!budget.fits(Time::ZERO + debt / 2, UNIT, UNIT));
    assert!(budget.on_timeout(at) && budget.fits(at, UNIT, UNIT));
    assert!(!budget.on_timeout(at), "it is due once");
    let long_after = at + Duration::from_secs(9);
    let mut granted = 0;
    while budget.fits(long_after, UNIT, UNIT) {
        budget.take(UNIT);
        budget.put_back(UNIT);
        granted += UNIT;
    }
    let burst = UPLOAD_BURST.as_secs_f64() * rate as f64;
    assert!(granted as f64 <= burst + UNIT as f64, "{granted}");
}
