//! One node's decisions, step by step. Whole fleets are in `tests/rollout`.

use super::testing::{commit, id, release};
use super::*;
use aquifer_core::policy::{Entry, Required, Unavailable};
use aquifer_core::{OnFailure, Policy, Times, Word};

mod rules;

const ME: NodeId = NodeId([1; 32]);
const S: Duration = Duration::from_secs(1);

fn other(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn roster(nodes: u8) -> Vec<Entry> {
    (1..=nodes).map(|n| Entry { node: other(n), canary: false, group: 0 }).collect()
}

fn synchronous(nodes: u8, required: Required) -> Policy {
    let how = How::Synchronous { required, deadline_ms: 10_000, on_failure: OnFailure::RollBack };
    Policy { how, roster: roster(nodes), ..Policy::default() }
}

/// Serves release 1 with one engine, among `nodes` that have been there for long.
fn at_rest(nodes: u8) -> Rollout {
    let mut rollout = Rollout::new(ME, vec![], Override::Follow, None, Time::ZERO);
    for n in 2..=nodes {
        rollout.handle(Time::ZERO, RolloutInput::Member { node: other(n), labels: vec![], report: None });
    }
    rollout.handle(Time::ZERO, RolloutInput::Release(release(1, Policy::default())));
    engine(&mut rollout, Time::ZERO, Facts { served: Some(id(1).manifest), ..Facts::default() });
    engine(&mut rollout, Time::ZERO, Facts { served: Some(id(1).manifest), ..Facts::default() });
    assert!(rollout.report().is_some_and(|r| r.ready));
    rollout
}

fn engine(rollout: &mut Rollout, now: Time, facts: Facts) {
    rollout.handle(now, RolloutInput::Engine { engine: 7, facts });
}

fn staged(served: Option<u64>, phase: Phase) -> Facts {
    Facts { served: served.map(|seq| id(seq).manifest), target: Some(id(2).manifest), phase, failed: None }
}

fn says(rollout: &mut Rollout, now: Time, node: NodeId, step: Step, phase: Phase) {
    let report = Report {
        wanted: id(2),
        base: Some(id(1)),
        step,
        phase,
        served: None,
        settled: step == Step::Waiting,
        ready: false,
        engines: 1,
        held: false,
        reason: "the disk is full".to_string(),
        times: Times::default(),
    };
    rollout.handle(now, RolloutInput::Member { node, labels: vec![], report: Some(report) });
}

/// What the engine was told last.
fn order(rollout: &mut Rollout) -> Option<Until> {
    let order = |o| match o {
        RolloutOutput::Order { order, .. } => Some(order.until),
        RolloutOutput::Keep(_) | RolloutOutput::Report(_) => None,
    };
    std::iter::from_fn(|| rollout.poll_output()).filter_map(order).last()
}

#[test]
fn it_is_committed_when_all_have_answered_and_enough_are_prepared() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(3);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(3, Required::Count(2)))));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    says(&mut rollout, now, other(2), Step::Waiting, Phase::Staged);
    let wait = Verdict::Wait { answered: 2, prepared: 2, required: 2, roster: 3 };
    assert_eq!(rollout.verdict(now), Some(wait), "one might be cut off, and ready with the former one");
    says(&mut rollout, now, other(3), Step::Waiting, Phase::Heard);
    assert_eq!(rollout.verdict(now), Some(Verdict::Commit));
    rollout.handle(now, RolloutInput::Gone { node: other(3) });
    assert_eq!(rollout.verdict(now), Some(Verdict::Commit), "it has answered, so it knows that it may miss it");
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    assert_eq!(rollout.verdict(now), None);
}

#[test]
fn it_is_aborted_when_too_few_can_take_it_or_time_is_up() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(3);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(3, Required::All))));
    let late = rollout.verdict(now + S * 10);
    assert!(matches!(&late, Some(Verdict::Abort(why)) if why.contains("1 of 3 nodes answered")), "{late:?}");
    says(&mut rollout, now, other(2), Step::Waiting, Phase::Failed);
    let failed = rollout.verdict(now);
    assert!(matches!(&failed, Some(Verdict::Abort(why)) if why.contains("the disk is full")), "{failed:?}");
}

#[test]
fn nobody_answers_from_the_new_one_while_others_are_about_to_pause() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(2);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(2, Required::All))));
    assert_eq!(order(&mut rollout), Some(Until::Staged));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    says(&mut rollout, now, other(2), Step::Waiting, Phase::Staged);
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    assert_eq!(order(&mut rollout), None, "the other has not heard of it, for all that is known");
    assert!(rollout.report().is_some_and(|r| !r.ready), "and yet it may be open to the other any moment");
    says(&mut rollout, now, other(2), Step::Going, Phase::Staged);
    assert_eq!(order(&mut rollout), Some(Until::Checked));
    engine(&mut rollout, now, staged(None, Phase::Paused));
    assert_eq!(order(&mut rollout), None);
    says(&mut rollout, now, other(2), Step::Going, Phase::Paused);
    assert_eq!(order(&mut rollout), Some(Until::Serving));
    engine(&mut rollout, now, Facts { served: Some(id(2).manifest), ..Facts::default() });
    assert!(rollout.report().is_some_and(|r| r.ready && r.phase == Phase::Ready));
}

#[test]
fn one_that_does_not_pause_is_not_waited_for_without_end() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(2);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(2, Required::All))));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    says(&mut rollout, now, other(2), Step::Going, Phase::Staged);
    engine(&mut rollout, now, staged(None, Phase::Paused));
    assert_eq!(order(&mut rollout), Some(Until::Checked));
    let (at, _) = rollout.poll_timeout().unwrap();
    assert!(at <= now + ROLLOUT_HOLD);
    rollout.handle_timeout(now + ROLLOUT_HOLD);
    assert_eq!(order(&mut rollout), Some(Until::Serving));
}

#[test]
fn in_doubt_and_out_of_touch_it_is_not_ready() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(3);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(3, Required::All))));
    assert!(rollout.report().is_some_and(|r| r.ready));
    for n in [2, 3] {
        rollout.handle(now, RolloutInput::Gone { node: other(n) });
    }
    let report = rollout.report().unwrap();
    assert!(!report.ready && report.settled && report.reason.contains("committed"), "{report:?}");
    says(&mut rollout, now, other(2), Step::Waiting, Phase::Staged);
    assert!(rollout.report().unwrap().ready);
    says(&mut rollout, now, other(2), Step::Going, Phase::Staged);
    assert!(!rollout.report().unwrap().ready);
}

/// Node 3 hears a majority, as it believes, until it misses node 2, which has just left it for this side.
#[test]
fn one_that_is_silent_may_still_hear_who_has_just_come_from_it() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(3);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(3, Required::Count(2)))));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    for n in [2, 3] {
        rollout.handle(now, RolloutInput::Gone { node: other(n) });
    }
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    let back = now + ROLLOUT_SILENCE;
    says(&mut rollout, back, other(2), Step::Going, Phase::Staged);
    assert_eq!(order(&mut rollout), Some(Until::Staged));
    assert!(rollout.report().unwrap().reason.contains(&other(3).short()));
    rollout.handle_timeout(back + ROLLOUT_SILENCE);
    assert_eq!(order(&mut rollout), Some(Until::Checked));
}

/// It may have died long ago, and each later release would leave everybody not ready for as long.
#[test]
fn who_was_missed_before_it_heard_of_a_release_holds_up_nobody() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(2);
    let report = Some(rollout.report().unwrap().clone());
    rollout.handle(now, RolloutInput::Member { node: other(3), labels: vec![], report });
    rollout.handle(now, RolloutInput::Gone { node: other(3) });
    let now = now + ROLLOUT_SILENCE;
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(2, Required::All))));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    says(&mut rollout, now, other(2), Step::Going, Phase::Staged);
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    assert_eq!(order(&mut rollout), Some(Until::Checked));
}

#[test]
fn an_abort_gives_way_to_a_commit() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(1);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(1, Required::All))));
    rollout.handle(now, RolloutInput::Statement(Statement { word: Word::Abort, ..commit(2) }));
    assert_eq!(rollout.report().unwrap().phase, Phase::RolledBack);
    assert_eq!(order(&mut rollout), Some(Until::Serving), "with the one before");
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    rollout.handle(now, RolloutInput::Statement(Statement { word: Word::Abort, ..commit(2) }));
    assert_eq!(rollout.report().unwrap().step, Step::Going);
}

#[test]
fn a_pinned_node_takes_no_part() {
    let pinned = Override::Pinned(id(1).manifest);
    let mut rollout = Rollout::new(ME, vec![], pinned, None, Time::ZERO);
    engine(&mut rollout, Time::ZERO, Facts::default());
    rollout.handle(Time::ZERO, RolloutInput::Release(release(1, Policy::default())));
    rollout.handle(Time::ZERO, RolloutInput::Release(release(2, Policy::default())));
    engine(&mut rollout, Time::ZERO, Facts { served: Some(id(1).manifest), ..Facts::default() });
    let report = rollout.report().unwrap();
    assert!(report.ready && report.held && report.wanted == id(1));
    assert_eq!(rollout.with_roster(Policy::default()).unwrap().roster, []);
}

#[test]
fn a_roster_names_canaries_and_groups() {
    let mut rollout = at_rest(1);
    let labels = |rack: &str, canary: &str| {
        vec![("rack".to_string(), rack.to_string()), ("canary".to_string(), canary.to_string())]
    };
    for (n, rack, canary) in [(2, "b", "yes"), (3, "a", "no"), (4, "b", "no")] {
        let report = rollout.report().cloned();
        let labels = labels(rack, canary);
        rollout.handle(Time::ZERO, RolloutInput::Member { node: other(n), labels, report });
    }
    rollout.handle(Time::ZERO, RolloutInput::Member { node: other(5), labels: labels("a", "no"), report: None });
    let (canary, by) = (Some("canary=yes".parse().unwrap()), Some("rack".to_string()));
    let how = How::Rolling { canary, max_unavailable: Unavailable::Count(1), by };
    let subset = "rack=b".parse().unwrap();
    let all = rollout.with_roster(Policy { how: how.clone(), ..Policy::default() }).unwrap().roster;
    let told: Vec<_> = all.iter().map(|e| (e.node.0[0], e.canary, e.group)).collect();
    assert_eq!(told, [(1, false, 0), (2, true, 2), (3, false, 1), (4, false, 2)], "without a label: a group too");
    let some = rollout.with_roster(Policy { how, subset, ..Policy::default() }).unwrap().roster;
    assert_eq!(some.iter().map(|e| e.node.0[0]).collect::<Vec<_>>(), [2, 4]);
}

#[test]
fn a_long_reason_is_cut_between_characters() {
    let mut reason = "é".repeat(40);
    aquifer_core::text::shorten(&mut reason, 5);
    assert_eq!(reason, "éé");
}

#[test]
fn a_report_says_when_each_phase_was_reached() {
    let start = Time::ZERO + S * 60;
    let mut rollout = at_rest(1);
    rollout.handle(start, RolloutInput::Release(release(2, Policy::default())));
    engine(&mut rollout, start + S, staged(Some(1), Phase::Planned));
    while rollout.poll_output().is_some() {}
    for seconds in 2..5 {
        rollout.handle_timeout(start + S * seconds);
    }
    assert_eq!(rollout.poll_output(), None, "time alone is no news");
    engine(&mut rollout, start + S * 5, staged(Some(1), Phase::Staged));
    engine(&mut rollout, start + S * 6, staged(None, Phase::Paused));
    engine(&mut rollout, start + S * 7, Facts { served: Some(id(2).manifest), ..Facts::default() });
    let times: Vec<_> = rollout.report().unwrap().times.iter().collect();
    let expected =
        [(Phase::Heard, 0), (Phase::Planned, 1000), (Phase::Staged, 5000), (Phase::Paused, 6000), (Phase::Ready, 7000)];
    assert_eq!(times, expected);
}

#[test]
fn who_was_started_anew_meanwhile_says_no_times() {
    let mut rollout = at_rest(1);
    rollout.handle(Time::ZERO, RolloutInput::Release(release(2, Policy::default())));
    let stand = std::iter::from_fn(|| rollout.poll_output()).filter_map(|o| match o {
        RolloutOutput::Keep(stand) => Some(stand),
        RolloutOutput::Order { .. } | RolloutOutput::Report(_) => None,
    });
    let mut rollout = Rollout::new(ME, vec![], Override::Follow, stand.last(), Time::ZERO);
    rollout.handle(Time::ZERO, RolloutInput::Release(release(2, Policy::default())));
    engine(&mut rollout, Time::ZERO + S, Facts { served: Some(id(2).manifest), ..Facts::default() });
    let report = rollout.report().unwrap();
    assert!(report.ready && report.times.is_empty(), "{report:?}");
    rollout.handle(Time::ZERO + S, RolloutInput::Release(release(3, Policy::default())));
    assert_eq!(rollout.report().unwrap().times.at(Phase::Heard), Some(0));
}

/// It is past a release of which it gave its word, and would count for ever among those that have to be prepared.
#[test]
fn who_only_publishes_names_nobody_without_engines() {
    let mut rollout = Rollout::new(ME, vec![], Override::Follow, None, Time::ZERO);
    for seq in 2..4 {
        rollout.handle(Time::ZERO, RolloutInput::Release(release(seq, synchronous(0, Required::All))));
        rollout.handle(Time::ZERO, RolloutInput::Statement(commit(seq)));
        assert_eq!(rollout.report(), None);
    }
    says(&mut rollout, Time::ZERO, other(2), Step::Done, Phase::Ready);
    let idle = Report { engines: 0, ..rollout.view.report(&other(2)).unwrap().clone() };
    rollout.handle(Time::ZERO, RolloutInput::Member { node: other(3), labels: vec![], report: Some(idle) });
    let named = rollout.with_roster(Policy::default()).unwrap().roster;
    assert_eq!(named.iter().map(|e| e.node).collect::<Vec<_>>(), [other(2)]);
}

/// Or no later release that all have to be prepared for would ever be committed.
#[test]
fn who_could_not_take_the_last_one_prepares_for_the_next() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(1);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(1, Required::All))));
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    let failed = Some((id(2).manifest, "the answers are wrong".to_string()));
    engine(&mut rollout, now, Facts { failed: failed.clone(), ..staged(Some(1), Phase::Heard) });
    let report = rollout.report().unwrap();
    assert!(!report.ready && report.phase == Phase::Failed, "{report:?}");
    rollout.handle(now, RolloutInput::Release(release(3, synchronous(1, Required::All))));
    assert_eq!(order(&mut rollout), Some(Until::Staged));
    let served = Some(id(1).manifest);
    engine(&mut rollout, now, Facts { served, target: Some(id(3).manifest), phase: Phase::Staged, failed });
    assert_eq!(rollout.verdict(now), Some(Verdict::Commit));
}

/// A second engine that comes later fails, and those that went after it are to go back first.
#[test]
fn a_failure_of_one_that_is_done_is_heard() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(2);
    let how = How::Rolling { canary: None, max_unavailable: Unavailable::Count(2), by: None };
    rollout.handle(now, RolloutInput::Release(release(2, Policy { how, roster: roster(2), ..Policy::default() })));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    engine(&mut rollout, now, Facts { served: Some(id(2).manifest), ..Facts::default() });
    assert_eq!(rollout.report().unwrap().step, Step::Done);
    says(&mut rollout, now, other(2), Step::Done, Phase::Failed);
    let report = rollout.report().unwrap();
    assert!(report.step == Step::GoingBack && report.reason.contains("the disk is full"), "{report:?}");
}

/// Or those that come before it would wait for it, and it for them. What it serves is wrong: it is not ready.
#[test]
fn one_whose_base_failed_is_not_out() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(2);
    let how = How::Rolling { canary: None, max_unavailable: Unavailable::Count(2), by: None };
    let rolling = Policy { how, roster: roster(2), ..Policy::default() };
    rollout.handle(now, RolloutInput::Release(release(2, rolling.clone())));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    engine(&mut rollout, now, Facts { served: Some(id(2).manifest), ..Facts::default() });
    let second = |rollout: &mut Rollout, target: u64, phase, failed: Option<u64>| {
        let failed = failed.map(|seq| (id(seq).manifest, "the answers are wrong".to_string()));
        let facts = Facts { served: None, target: Some(id(target).manifest), phase, failed };
        rollout.handle(now, RolloutInput::Engine { engine: 8, facts });
        let report = rollout.report().unwrap().clone();
        assert!(!report.ready, "{report:?}");
        (report.step, report.settled)
    };
    assert_eq!(second(&mut rollout, 2, Phase::Heard, None), (Step::Done, false));
    rollout.handle(now, RolloutInput::Release(release(3, rolling)));
    assert_eq!(second(&mut rollout, 2, Phase::Paused, None), (Step::Waiting, false));
    assert_eq!(second(&mut rollout, 3, Phase::Heard, Some(2)), (Step::Waiting, true));
    let (served, target) = (Some(id(2).manifest), Some(id(3).manifest));
    engine(&mut rollout, now, Facts { served, target, phase: Phase::Staged, failed: None });
    assert_eq!(second(&mut rollout, 3, Phase::Staged, Some(2)), (Step::Going, false));
    assert_eq!(second(&mut rollout, 3, Phase::Heard, Some(3)), (Step::GoingBack, false));
    assert_eq!(second(&mut rollout, 2, Phase::Heard, Some(2)), (Step::Halted, true));
}

/// Its node is none of those that the release is for.
#[test]
fn a_publisher_looks_on() {
    let (now, subset) = (Time::ZERO, "zone=b".parse().unwrap());
    let mut desk = Rollout::onlooker(&subset, now);
    let labels = vec![("zone".to_string(), "b".to_string())];
    let says = |desk: &mut Rollout, node, wanted, phase| {
        let report = Report { wanted, phase, step: Step::Waiting, ..at_rest(1).report().unwrap().clone() };
        desk.handle(now, RolloutInput::Member { node, labels: labels.clone(), report: Some(report) });
    };
    for node in [ME, other(2)] {
        says(&mut desk, node, id(1), Phase::Ready);
    }
    let named = desk.with_roster(Policy { subset, ..synchronous(0, Required::All) }).unwrap();
    assert_eq!(named.roster.iter().map(|e| e.node).collect::<Vec<_>>(), [ME, other(2)]);
    desk.handle(now, RolloutInput::Release(release(2, named)));
    says(&mut desk, ME, id(2), Phase::Staged);
    assert!(matches!(desk.verdict(now), Some(Verdict::Wait { answered: 1, .. })));
    says(&mut desk, other(2), id(2), Phase::Staged);
    assert_eq!(desk.verdict(now), Some(Verdict::Commit));
    assert_eq!(desk.report(), None);
}

/// One that was there before may not have heard the commit, and serve the former release.
#[test]
fn a_newcomer_looks_whether_what_it_finds_committed_is_open() {
    let now = Time::ZERO;
    let mut rollout = Rollout::new(ME, vec![], Override::Follow, None, now);
    says(&mut rollout, now, other(2), Step::Waiting, Phase::Staged);
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    for seq in 1..=3 {
        let by_hand = Policy { how: How::Manual, ..Policy::default() };
        let policy = if seq == 2 { synchronous(2, Required::All) } else { by_hand };
        rollout.handle(now, RolloutInput::Release(release(seq, policy)));
    }
    engine(&mut rollout, now, Facts::default());
    engine(&mut rollout, now, Facts { served: Some(id(2).manifest), ..Facts::default() });
    let report = rollout.report().unwrap();
    assert!(report.base == Some(id(2)) && report.settled && !report.ready, "{report:?}");
    assert!(report.reason.contains(&other(2).short()), "{report:?}");
}

/// To what most served; and not before it is known who is there.
#[test]
fn what_failed_after_the_commit_is_undone() {
    let now = Time::ZERO;
    let mut desk = Rollout::onlooker(&Selector::default(), now);
    for seq in 0..=1 {
        desk.handle(now, RolloutInput::Release(release(seq, Policy::default())));
    }
    desk.handle(now, RolloutInput::Release(release(2, synchronous(4, Required::All))));
    let report = |base: u64, step: Step, phase: Phase| Report {
        base: Some(id(base)),
        step,
        phase,
        wanted: id(2),
        reason: "the answers are wrong".to_string(),
        ..at_rest(1).report().unwrap().clone()
    };
    let hear = |desk: &mut Rollout, now, n, report| {
        desk.handle(now, RolloutInput::Member { node: other(n), labels: vec![], report: Some(report) });
    };
    for (n, base) in [(1, 1), (2, 1), (3, 0)] {
        hear(&mut desk, now, n, report(base, Step::Done, Phase::Ready));
    }
    hear(&mut desk, now, 3, report(0, Step::Going, Phase::Failed));
    assert_eq!(desk.remedy(now), None, "it is not committed");
    let later = now + S;
    desk.handle(later, RolloutInput::Statement(commit(2)));
    assert_eq!(desk.remedy(later), None, "one of its nodes may be there yet");
    let silent = now + ROLLOUT_SILENCE;
    let remedy = desk.remedy(silent).unwrap();
    assert_eq!((remedy.failed, remedy.to.id(), remedy.since), (id(2), id(1), later));
    assert_eq!(remedy.policy.roster.iter().map(|e| e.node).collect::<Vec<_>>(), [other(1), other(2), other(3)]);
    assert!(remedy.reason.contains("1 of 4 nodes; one: the answers are wrong"), "{remedy:?}");
    let How::Synchronous { required, on_failure, .. } = remedy.policy.how else { panic!("{remedy:?}") };
    assert_eq!((required.of(3), on_failure), (2, OnFailure::Stay), "who fails cannot hold up the way back");
    hear(&mut desk, silent, 3, report(0, Step::Done, Phase::Ready));
    assert_eq!(desk.remedy(silent), None, "it came to serve it after all");
}

/// It came after the roster was made, and may be ready with the former release until it notices that it is cut off.
#[test]
fn a_newcomer_that_is_missed_is_waited_for() {
    let now = Time::ZERO + S * 60;
    let mut rollout = at_rest(2);
    rollout.handle(now, RolloutInput::Release(release(2, synchronous(2, Required::All))));
    engine(&mut rollout, now, staged(Some(1), Phase::Staged));
    says(&mut rollout, now, other(3), Step::Waiting, Phase::Staged);
    rollout.handle(now, RolloutInput::Gone { node: other(3) });
    rollout.handle(now, RolloutInput::Statement(commit(2)));
    says(&mut rollout, now, other(2), Step::Going, Phase::Staged);
    assert_eq!(order(&mut rollout), Some(Until::Staged), "all of the roster are past it, and a third may not be");
    assert!(rollout.report().unwrap().reason.contains(&other(3).short()));
    rollout.handle_timeout(now + ROLLOUT_SILENCE);
    assert_eq!(order(&mut rollout), Some(Until::Checked));
}
