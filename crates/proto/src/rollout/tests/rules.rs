//! One rule each, which fleets in `tests/rollout` seldom or never need.

use super::*;

fn by_twos() -> Policy {
    let how = How::Rolling { canary: None, max_unavailable: Unavailable::Count(2), by: None };
    Policy { how, roster: roster(2), ..Policy::default() }
}

/// Its engines would be out for as long as fetching takes.
#[test]
fn nobody_goes_unprepared() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(2);
    rollout.handle(now, RolloutInput::Release(release(2, by_twos())));
    engine(&mut rollout, now, staged(Some(1), Phase::Verified));
    assert_eq!(rollout.report().unwrap().step, Step::Waiting);
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    assert_eq!(rollout.report().unwrap().step, Step::Going);
}

/// Others that go back count on it that nothing of it is out.
#[test]
fn who_is_out_for_an_earlier_release_is_not_halted() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(2);
    let how = How::Rolling { canary: None, max_unavailable: Unavailable::Count(1), by: None };
    let one_by_one = Policy { how, ..by_twos() };
    rollout.handle(now, RolloutInput::Release(release(2, by_twos())));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    engine(&mut rollout, now, staged(None, Phase::Paused));
    rollout.handle(now, RolloutInput::Release(release(3, one_by_one)));
    let failed = Report { wanted: id(3), phase: Phase::Failed, ..rollout.report().unwrap().clone() };
    rollout.handle(now, RolloutInput::Member { node: other(2), labels: vec![], report: Some(failed) });
    let report = rollout.report().unwrap();
    assert!(report.step == Step::Waiting && report.phase == Phase::Failed && !report.settled, "{report:?}");
    engine(&mut rollout, now, Facts { served: Some(id(1).manifest), ..Facts::default() });
    let report = rollout.report().unwrap();
    assert!(report.step == Step::Halted && report.ready, "{report:?}");
}

/// Who has nothing to go back to stays with it, and says that it failed.
#[test]
fn a_first_release_that_fails_is_not_left_for_nothing() {
    let now = Time::ZERO;
    let mut rollout = Rollout::new(ME, vec![], Override::Follow, None, now);
    rollout.handle(now, RolloutInput::Release(release(2, by_twos())));
    engine(&mut rollout, now, Facts { served: Some(id(2).manifest), ..Facts::default() });
    assert_eq!(rollout.report().unwrap().step, Step::Done);
    let failed = Some((id(2).manifest, "the answers are wrong".to_string()));
    rollout.handle(now, RolloutInput::Engine { engine: 8, facts: Facts { failed, ..Facts::default() } });
    let report = rollout.report().unwrap();
    assert!(report.step == Step::Done && report.phase == Phase::Failed && !report.ready, "{report:?}");
}

/// It would wait for a majority of nobody.
#[test]
fn of_a_release_that_names_nobody_nobody_is_in_doubt() {
    let now = Time::ZERO;
    let mut rollout = at_rest(1);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(0, Required::All))));
    assert!(rollout.report().unwrap().ready);
}

/// Whether it is heard or not: an operator has taken it out.
#[test]
fn who_is_held_is_not_waited_for() {
    for (gone, named) in [(false, 3), (false, 2), (true, 2)] {
        let now = Time::ZERO + S * 60;
        let mut rollout = at_rest(2);
        let held = Report { held: true, ..rollout.report().unwrap().clone() };
        rollout.handle(now, RolloutInput::Member { node: other(3), labels: vec![], report: Some(held) });
        if gone {
            rollout.handle(now, RolloutInput::Gone { node: other(3) });
        }
        rollout.handle(now, RolloutInput::Release(release(2, synchronous(named, Required::Count(2)))));
        engine(&mut rollout, now, staged(Some(1), Phase::Staged));
        says(&mut rollout, now, other(2), Step::Going, Phase::Staged);
        rollout.handle(now, RolloutInput::Statement(commit(2)));
        assert_eq!(order(&mut rollout), Some(Until::Checked), "gone: {gone}, named: {named}");
    }
}

/// Somebody that came later may be cut off, and be ready with the former release until it notices.
#[test]
fn who_has_just_started_waits_for_whom_it_may_not_know() {
    let now = Time::ZERO + S * 60;
    let (wanted, base) = (id(2), Some(id(1)));
    let stand = Stand { wanted, step: Step::Going, base, is_base_open: true, engines: 1, failed: None };
    let mut rollout = Rollout::new(ME, vec![], Override::Follow, Some(stand), now);
    rollout.handle(now, RolloutInput::Release(release(1, Policy::default())));
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(2, Required::All))));
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    says(&mut rollout, now, other(2), Step::Going, Phase::Staged);
    assert_eq!(order(&mut rollout), Some(Until::Staged));
    assert!(rollout.report().unwrap().reason.contains("just started"));
    rollout.handle_timeout(now + ROLLOUT_SILENCE);
    assert_eq!(order(&mut rollout), Some(Until::Checked));
}

/// What a newcomer serves until it may have release 3, of which nothing is decided: release 2, which rolls, if it is no
/// longer on its way and most have it, and not only a canary; otherwise the one before.
#[test]
fn a_newcomer_serves_what_is_in_use() {
    // Of the others: what they want, what they serve, and whether they are done with it.
    let (beyond, failed) = ((4, 3, false), (2, 0, true));
    let (has, lacks, ahead, on_its_way) = ((2, 2, true), (2, 1, false), (3, 2, false), (2, 2, false));
    for (canaries, others, expected) in [
        (0, vec![has, has, has], 2),
        (0, vec![has, ahead], 2),
        (0, vec![has, has, beyond], 2),
        (0, vec![has, has, failed], 1),
        (0, vec![has, has, lacks], 1),
        (0, vec![has, has, on_its_way], 1),
        (0, vec![has], 1),
        (2, vec![has, has], 1),
        (3, vec![has, has], 2),
        (0, vec![], 1),
    ] {
        let mut rollout = Rollout::new(NodeId([9; 32]), vec![], Override::Follow, None, Time::ZERO);
        for (n, (wanted, serves, done)) in (1..).zip(&others) {
            let step = if *done { Step::Done } else { Step::Waiting };
            let (served, base) = (Some(id(*serves).manifest), Some(id(if *done { 1 } else { *serves })));
            let of = at_rest(1).report().unwrap().clone();
            let report = Some(Report { wanted: id(*wanted), base, step, served, settled: true, ..of });
            rollout.handle(Time::ZERO, RolloutInput::Member { node: other(n), labels: vec![], report });
        }
        let named = (1..=3).map(|n| Entry { canary: n <= canaries, ..roster(n)[usize::from(n) - 1] });
        let two = release(2, Policy { roster: named.collect(), ..by_twos() });
        let three = release(3, Policy { how: How::Manual, ..Policy::default() });
        engine(&mut rollout, Time::ZERO, Facts::default());
        rollout.handle(Time::ZERO, RolloutInput::Releases(vec![release(1, Policy::default()), two, three]));
        let base = rollout.report().unwrap().base.map(|base| base.seq);
        assert_eq!(base, Some(expected), "{canaries} canaries, {others:?}");
    }
}

#[test]
fn a_newcomer_takes_nothing_that_nobody_committed() {
    for (is_committed, expected) in [(false, 1), (true, 2)] {
        let mut rollout = Rollout::new(ME, vec![], Override::Follow, None, Time::ZERO);
        let by_hand = || Policy { how: How::Manual, ..Policy::default() };
        if is_committed {
            rollout.handle(Time::ZERO, RolloutInput::Statement(commit(2)));
        }
        engine(&mut rollout, Time::ZERO, Facts::default());
        let releases = vec![release(1, Policy::default()), release(2, by_hand()), release(3, by_hand())];
        rollout.handle(Time::ZERO, RolloutInput::Releases(releases));
        assert_eq!(rollout.report().unwrap().base, Some(id(expected)));
    }
}

/// Its disk was lost, and its engines went on: it knows that they serve release 2, and not to whom that is open.
#[test]
fn who_lost_what_it_knew_looks_whether_what_it_serves_is_open() {
    let now = Time::ZERO;
    let mut rollout = Rollout::new(ME, vec![], Override::Follow, None, now);
    says(&mut rollout, now, other(2), Step::Waiting, Phase::Staged);
    engine(&mut rollout, now, Facts { served: Some(id(2).manifest), ..Facts::default() });
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    let by_hand = Policy { how: How::Manual, ..Policy::default() };
    let two = release(2, synchronous(2, Required::All));
    rollout.handle(now, RolloutInput::Releases(vec![release(1, Policy::default()), two, release(3, by_hand)]));
    let report = rollout.report().unwrap();
    assert!(report.base == Some(id(2)) && report.settled && !report.ready, "{report:?}");
    says(&mut rollout, now, other(2), Step::Going, Phase::Staged);
    assert!(rollout.report().unwrap().ready);
}
