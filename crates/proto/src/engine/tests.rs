//! Every way between two releases, step by step.

use super::*;
use crate::plan::tests::{bind, manifest};
use crate::rollout::Facts;
use aquifer_core::Phase;
use std::collections::BTreeMap;

/// One tensor of two rows, bound whole; `content` names the chunks.
pub(super) fn target(content: [u8; 2]) -> Target {
    let (m, layout) = manifest(&[("a", &content)]);
    let plan = Plan::of(&m, &layout, &[bind("a", 2, vec![], 0)], &[], &BTreeMap::from([(0, 64)])).unwrap();
    Target { manifest: named(content), plan: Arc::new(plan), layout: Arc::new(layout) }
}

pub(super) fn named(content: [u8; 2]) -> ManifestHash {
    ManifestHash::of(&content)
}

const OLD: [u8; 2] = [1, 2];
const NEW: [u8; 2] = [1, 9];

fn drain(session: &mut EngineSession) -> Vec<EngineOutput> {
    std::iter::from_fn(|| session.poll_output())
        .filter(|o| !matches!(o, EngineOutput::WantsChanged | EngineOutput::PlacesChanged))
        .collect()
}

fn set(chunks: &[u32]) -> ChunkSet {
    ChunkSet::from_indices(2, chunks.iter().copied())
}

fn prepare(chunks: &[u32], keep: &[u32]) -> EngineOutput {
    EngineOutput::Prepare { chunks: set(chunks), keep: set(keep) }
}

fn tell(tell: Tell) -> Vec<EngineOutput> {
    vec![EngineOutput::Tell(tell)]
}

fn check(content: [u8; 2]) -> Vec<EngineOutput> {
    tell(Tell::Check { manifest: named(content) })
}

fn applied(content: [u8; 2]) -> Vec<EngineOutput> {
    tell(Tell::Applied { manifest: named(content) })
}

fn hydrated(content: [u8; 2]) -> Vec<EngineOutput> {
    tell(Tell::Hydrated { manifest: named(content) })
}

fn pause(content: [u8; 2], bytes: u64) -> Vec<EngineOutput> {
    tell(Tell::Pause { manifest: named(content), bytes })
}

fn apply(chunks: &[u32]) -> Vec<EngineOutput> {
    vec![EngineOutput::Apply { chunks: set(chunks) }]
}

/// Gives it one input, and takes what comes of it.
fn after(session: &mut EngineSession, input: EngineInput) -> Vec<EngineOutput> {
    session.handle(input);
    drain(session)
}

fn aimed(session: &mut EngineSession, content: [u8; 2]) -> Vec<EngineOutput> {
    after(session, EngineInput::Target(target(content)))
}

fn until(session: &mut EngineSession, until: Until) -> Vec<EngineOutput> {
    after(session, EngineInput::Until(until))
}

fn available(session: &mut EngineSession, chunks: &[u32]) -> Vec<EngineOutput> {
    after(session, EngineInput::Available { chunks: set(chunks) })
}

fn prepared(session: &mut EngineSession) -> Vec<EngineOutput> {
    after(session, EngineInput::Prepared { ok: true })
}

fn paused(session: &mut EngineSession, content: [u8; 2]) -> Vec<EngineOutput> {
    after(session, EngineInput::Paused { manifest: named(content) })
}

fn done(session: &mut EngineSession) -> Vec<EngineOutput> {
    after(session, EngineInput::Applied { ok: true })
}

fn checked(session: &mut EngineSession, content: [u8; 2]) -> Vec<EngineOutput> {
    after(session, EngineInput::Checked { manifest: named(content), result: Ok(()) })
}

fn check_failed(session: &mut EngineSession, content: [u8; 2]) -> Vec<EngineOutput> {
    after(session, EngineInput::Checked { manifest: named(content), result: Err("nonsense".into()) })
}

fn resumed(session: &mut EngineSession, content: [u8; 2]) -> Vec<EngineOutput> {
    after(session, EngineInput::Resumed { manifest: named(content) })
}

fn refused(session: &mut EngineSession, asked: Asked, content: [u8; 2]) -> Vec<EngineOutput> {
    after(session, EngineInput::Refused { asked, manifest: named(content), reason: "busy".into() })
}

fn overdue(session: &mut EngineSession) -> Vec<EngineOutput> {
    after(session, EngineInput::Overdue { reason: "no answer".into() })
}

/// Served, and what is made ready, and how far that is.
fn facts(session: &EngineSession) -> (Option<ManifestHash>, Option<ManifestHash>, Phase) {
    let Facts { served, target, phase, failed: _ } = session.facts();
    (served, target, phase)
}

fn failure(session: &EngineSession) -> Option<(ManifestHash, String)> {
    session.facts().failed
}

fn registered(serving: Option<[u8; 2]>, fresh: bool) -> EngineSession {
    let mut session = EngineSession::default();
    session.handle(EngineInput::Hydrate { serving: serving.map(named), fresh });
    session
}

fn land(session: &mut EngineSession, content: [u8; 2], chunks: &[u32]) {
    for chunk in chunks.iter().copied() {
        assert!(session.landing_place(&named(content), chunk).is_some());
        session.handle(EngineInput::Landing { chunk });
        session.handle(EngineInput::Landed { chunk, verified: true });
    }
}

/// Everything is in its memory, for the first time.
fn filled(content: [u8; 2]) -> EngineSession {
    let mut session = registered(None, true);
    session.handle(EngineInput::Target(target(content)));
    land(&mut session, content, &[0, 1]);
    session
}

fn serving(content: [u8; 2]) -> EngineSession {
    let mut session = filled(content);
    assert_eq!(drain(&mut session), check(content));
    assert_eq!(checked(&mut session, content), hydrated(content));
    assert_eq!(session.serving(), Some(named(content)));
    session
}

/// [`OLD`] is served, and it is asked to pause for [`NEW`].
fn pausing() -> EngineSession {
    let mut session = serving(OLD);
    assert_eq!(aimed(&mut session, NEW), []);
    assert_eq!(available(&mut session, &[1]), [prepare(&[1], &[1])]);
    assert_eq!(prepared(&mut session), pause(NEW, 8));
    session
}

fn checking() -> EngineSession {
    let mut session = pausing();
    assert_eq!(paused(&mut session, NEW), apply(&[1]));
    assert_eq!(done(&mut session), check(NEW));
    session
}

fn resuming() -> EngineSession {
    let mut session = checking();
    assert_eq!(checked(&mut session, NEW), applied(NEW));
    session
}

/// It goes back to [`OLD`], and serves it.
fn goes_back(session: &mut EngineSession) {
    assert_eq!(facts(session), (None, Some(named(OLD)), Phase::Paused));
    assert_eq!(done(session), applied(OLD), "without a check");
    assert_eq!(session.serving(), None);
    assert_eq!(resumed(session, OLD), []);
    assert_eq!(facts(session), (Some(named(OLD)), None, Phase::Heard));
}

#[test]
fn an_update_moves_what_changed_between_pause_and_resume() {
    let mut session = serving(OLD);
    let (old, new) = (named(OLD), named(NEW));
    aimed(&mut session, NEW);
    assert_eq!(facts(&session), (Some(old), Some(new), Phase::Planned));
    assert!(session.place(&new, 0).is_some() && session.place(&new, 1).is_none());
    assert_eq!(session.landing_place(&new, 1), None, "never into the memory of a serving engine");
    assert_eq!(available(&mut session, &[1]), [prepare(&[1], &[1])]);
    assert_eq!(facts(&session), (Some(old), Some(new), Phase::Verified));
    assert_eq!(prepared(&mut session), pause(NEW, 8));
    assert_eq!(facts(&session), (Some(old), Some(new), Phase::Staged));
    assert_eq!(paused(&mut session, NEW), apply(&[1]));
    assert_eq!(facts(&session), (None, Some(new), Phase::Paused));
    assert_eq!(done(&mut session), check(NEW));
    assert_eq!(facts(&session), (None, Some(new), Phase::Paused));
    assert_eq!(checked(&mut session, NEW), applied(NEW));
    assert_eq!(facts(&session), (None, Some(new), Phase::Checked));
    assert_eq!(resumed(&mut session, NEW), []);
    assert_eq!(facts(&session), (Some(new), None, Phase::Heard));
}

#[test]
fn it_goes_no_further_than_it_may() {
    let mut session = serving(OLD);
    until(&mut session, Until::Staged);
    aimed(&mut session, NEW);
    available(&mut session, &[1]);
    assert_eq!(prepared(&mut session), []);
    assert_eq!(facts(&session), (Some(named(OLD)), Some(named(NEW)), Phase::Staged));
    assert_eq!(until(&mut session, Until::Checked), pause(NEW, 8));
    paused(&mut session, NEW);
    assert_eq!(done(&mut session), check(NEW));
    assert_eq!(checked(&mut session, NEW), []);
    assert_eq!(facts(&session), (None, Some(named(NEW)), Phase::Checked));
    assert_eq!(until(&mut session, Until::Serving), applied(NEW));
    resumed(&mut session, NEW);
    assert_eq!(session.verified(), Some(named(NEW)));
}

#[test]
fn one_that_serves_nothing_goes_no_further_either() {
    let mut session = registered(None, true);
    until(&mut session, Until::Staged);
    aimed(&mut session, NEW);
    assert_eq!(facts(&session), (None, Some(named(NEW)), Phase::Planned));
    land(&mut session, NEW, &[0, 1]);
    assert_eq!(drain(&mut session), []);
    assert_eq!(facts(&session), (None, Some(named(NEW)), Phase::Staged));
    assert_eq!(until(&mut session, Until::Checked), check(NEW));
    assert_eq!(facts(&session), (None, Some(named(NEW)), Phase::Paused));
    assert_eq!(checked(&mut session, NEW), []);
    assert_eq!(facts(&session), (None, Some(named(NEW)), Phase::Checked));
    assert_eq!(until(&mut session, Until::Serving), hydrated(NEW));
    assert_eq!(facts(&session), (Some(named(NEW)), None, Phase::Heard));
}

#[test]
fn leave_for_one_release_is_none_for_the_next() {
    let mut session = checking();
    until(&mut session, Until::Checked);
    checked(&mut session, NEW);
    let order = EngineInput::Order { target: target([7, 7]), until: Until::Serving };
    assert_eq!(after(&mut session, order), apply(&[1]), "what was only to be checked is not served");
    assert_eq!(done(&mut session), applied(OLD));
    resumed(&mut session, OLD);
    assert_eq!(facts(&session), (Some(named(OLD)), Some(named([7, 7])), Phase::Planned));
}

#[test]
fn less_leave_while_it_pauses_calls_it_off() {
    let mut session = pausing();
    assert_eq!(until(&mut session, Until::Staged), []);
    assert_eq!(paused(&mut session, NEW), applied(OLD));
    resumed(&mut session, OLD);
    assert_eq!(facts(&session), (Some(named(OLD)), Some(named(NEW)), Phase::Planned));
    available(&mut session, &[1]);
    assert_eq!(prepared(&mut session), []);
    assert_eq!(until(&mut session, Until::Serving), pause(NEW, 8));
}

#[test]
fn a_check_that_fails_puts_the_old_release_back() {
    let mut session = checking();
    assert!(session.keeps(&named(OLD), 1) && !session.keeps(&named(OLD), 0));
    assert_eq!(check_failed(&mut session, NEW), apply(&[1]));
    goes_back(&mut session);
    assert_eq!(failure(&session), Some((named(NEW), "nonsense".into())));
    assert!(!session.keeps(&named(OLD), 1), "it lies in its memory");
    assert_eq!(session.aim().map(|t| t.manifest), Some(named(NEW)), "that is what it was pointed at");
    assert_eq!(aimed(&mut session, NEW), [], "said again, it is no other");
    assert_eq!(facts(&session), (Some(named(OLD)), None, Phase::Heard));

    aimed(&mut session, OLD);
    assert!(failure(&session).is_some(), "an order to go back is no new release");
    aimed(&mut session, NEW);
    assert_eq!((failure(&session), facts(&session).1), (None, Some(named(NEW))), "but this is to try it again");
    available(&mut session, &[1]);
    prepared(&mut session);
    paused(&mut session, NEW);
    assert_eq!(done(&mut session), check(NEW));
}

#[test]
fn a_check_that_hangs_has_failed() {
    let mut session = checking();
    assert_eq!(session.asked(), Some(Asked::Check));
    assert_eq!(overdue(&mut session), apply(&[1]));
    assert_eq!(checked(&mut session, NEW), [], "too late");
    goes_back(&mut session);
    assert_eq!(failure(&session), Some((named(NEW), "no answer".into())));
}

#[test]
fn without_anything_to_go_back_to_it_waits_for_another_release() {
    let mut session = filled(OLD);
    drain(&mut session);
    assert_eq!(check_failed(&mut session, OLD), []);
    assert_eq!(facts(&session), (None, None, Phase::Heard));
    assert_eq!(failure(&session), Some((named(OLD), "nonsense".into())));
    aimed(&mut session, OLD);
    assert_eq!(session.phase(), "failed");
    aimed(&mut session, NEW);
    assert_eq!(failure(&session), None);
    land(&mut session, NEW, &[1]);
    assert_eq!(drain(&mut session), check(NEW));
}

#[test]
fn what_passed_is_not_checked_again() {
    let mut session = resuming();
    resumed(&mut session, NEW);
    assert!(session.keeps(&named(OLD), 1), "so that an operator can go back");
    aimed(&mut session, OLD);
    assert_eq!(available(&mut session, &[1]), [prepare(&[1], &[1])]);
    assert!(session.keeps(&named(NEW), 1));
    prepared(&mut session);
    paused(&mut session, OLD);
    assert_eq!(done(&mut session), applied(OLD));
    resumed(&mut session, OLD);
    assert_eq!(session.verified(), Some(named(OLD)));
}

#[test]
fn the_order_to_go_back_while_it_is_paused() {
    // While the check runs: it is waited for.
    let mut session = checking();
    assert_eq!(aimed(&mut session, OLD), []);
    assert_eq!(checked(&mut session, NEW), apply(&[1]));
    goes_back(&mut session);
    assert_eq!(failure(&session), None);

    // When it has passed.
    let mut session = checking();
    until(&mut session, Until::Checked);
    assert_eq!(checked(&mut session, NEW), []);
    let order = EngineInput::Order { target: target(OLD), until: Until::Serving };
    assert_eq!(after(&mut session, order), apply(&[1]));
    goes_back(&mut session);

    // While bytes are being copied.
    let mut session = pausing();
    paused(&mut session, NEW);
    assert_eq!(aimed(&mut session, OLD), []);
    assert_eq!(done(&mut session), apply(&[1]));
    goes_back(&mut session);

    // While it is asked to pause: nothing has changed.
    let mut session = pausing();
    assert_eq!(aimed(&mut session, OLD), []);
    assert_eq!(facts(&session).0, None, "it may stop answering at any moment");
    assert_eq!(paused(&mut session, NEW), applied(OLD));
    resumed(&mut session, OLD);
    assert_eq!(facts(&session), (Some(named(OLD)), None, Phase::Heard));

    // While it resumes: it has to come there first.
    let mut session = resuming();
    assert_eq!(aimed(&mut session, OLD), []);
    assert_eq!(resumed(&mut session, NEW), []);
    assert_eq!(facts(&session), (Some(named(NEW)), Some(named(OLD)), Phase::Planned));
}

#[test]
fn going_back_before_it_paused_changes_nothing() {
    for until in [Until::Staged, Until::Serving] {
        let mut session = serving(OLD);
        aimed(&mut session, NEW);
        session.handle(EngineInput::Until(until));
        available(&mut session, &[1]);
        assert_eq!(aimed(&mut session, OLD), []);
        assert_eq!(prepared(&mut session), []);
        assert_eq!(facts(&session), (Some(named(OLD)), None, Phase::Heard));
    }
}

#[test]
fn what_it_goes_back_to_may_be_gone() {
    let mut session = checking();
    assert_eq!(check_failed(&mut session, NEW), apply(&[1]));
    assert_eq!(after(&mut session, EngineInput::Applied { ok: false }), []);
    assert_eq!(facts(&session), (None, Some(named(OLD)), Phase::Planned));
    land(&mut session, OLD, &[1]);
    assert_eq!(drain(&mut session), hydrated(OLD), "fetched again");
    assert_eq!(failure(&session), Some((named(NEW), "nonsense".into())));
}

#[test]
fn a_superseded_release_is_never_applied() {
    let mut session = serving(OLD);
    aimed(&mut session, NEW);
    aimed(&mut session, [7, 9]);
    assert_eq!(available(&mut session, &[1]), []);
    assert_eq!(available(&mut session, &[0]), [prepare(&[0, 1], &[0, 1])]);
    // Nor one that it was asked to pause for.
    let mut session = pausing();
    aimed(&mut session, [7, 9]);
    assert_eq!(paused(&mut session, NEW), applied(OLD));
    resumed(&mut session, OLD);
    assert_eq!(facts(&session), (Some(named(OLD)), Some(named([7, 9])), Phase::Planned));
    // What is in its memory already is served: to put the old one back would take as long.
    let mut session = pausing();
    paused(&mut session, NEW);
    aimed(&mut session, [7, 9]);
    assert_eq!(done(&mut session), check(NEW));
    assert_eq!(checked(&mut session, NEW), applied(NEW));
    resumed(&mut session, NEW);
    assert_eq!(facts(&session), (Some(named(NEW)), Some(named([7, 9])), Phase::Planned));
}

#[test]
fn chunks_that_are_gone_are_waited_for_again() {
    let mut session = serving(OLD);
    aimed(&mut session, NEW);
    available(&mut session, &[1]);
    assert_eq!(after(&mut session, EngineInput::Prepared { ok: false }), []);
    assert_eq!(facts(&session).2, Phase::Planned);
    assert_eq!(available(&mut session, &[1]), [prepare(&[1], &[1])]);
}

#[test]
fn an_update_that_fails_halfway_is_filled_like_new() {
    let mut session = pausing();
    paused(&mut session, NEW);
    assert_eq!(after(&mut session, EngineInput::Applied { ok: false }), []);
    assert_eq!(facts(&session), (None, Some(named(NEW)), Phase::Planned));
    land(&mut session, NEW, &[1]);
    assert_eq!(drain(&mut session), check(NEW));
    assert_eq!(check_failed(&mut session, NEW), apply(&[1]), "it can still go back");
    goes_back(&mut session);
}

#[test]
fn nothing_is_planned_anew_while_bytes_are_in_flight() {
    let mut session = registered(None, true);
    aimed(&mut session, OLD);
    session.handle(EngineInput::Landing { chunk: 0 });
    aimed(&mut session, [8, 2]);
    let (old, new) = (named(OLD), named([8, 2]));
    assert_eq!(session.landing_place(&new, 1), None);
    assert_eq!(session.landing_place(&old, 1), None);
    session.handle(EngineInput::Landed { chunk: 0, verified: true });
    assert!(session.landing_place(&new, 1).is_some());
    assert!(session.landing_place(&new, 0).is_some(), "what landed was of the old release");
}

#[test]
fn the_same_target_said_again_while_the_last_bytes_land_ends_well() {
    let mut session = registered(None, true);
    aimed(&mut session, OLD);
    land(&mut session, OLD, &[0]);
    session.handle(EngineInput::Landing { chunk: 1 });
    aimed(&mut session, NEW);
    aimed(&mut session, OLD);
    session.handle(EngineInput::Landed { chunk: 1, verified: true });
    assert_eq!(drain(&mut session), check(OLD));
}

#[test]
fn a_returning_engine_is_hashed_not_believed() {
    let mut session = registered(Some(OLD), false);
    assert_eq!(aimed(&mut session, OLD), [EngineOutput::Scan]);
    assert_eq!(session.verified(), None, "its word is not proof");
    session.handle(EngineInput::Scanned { in_place: set(&[0]) });
    assert_eq!(session.serving(), None);
    land(&mut session, OLD, &[1]);
    assert_eq!(drain(&mut session), check(OLD), "what was repaired may have been wrong in other ways");

    let mut session = registered(Some(OLD), false);
    session.handle(EngineInput::Until(Until::Staged));
    aimed(&mut session, OLD);
    let scanned = after(&mut session, EngineInput::Scanned { in_place: set(&[0, 1]) });
    assert_eq!(scanned, hydrated(OLD), "it serves that already");
    assert_eq!(facts(&session), (Some(named(OLD)), None, Phase::Heard));
}

#[test]
fn an_engine_serving_something_else_is_not_disturbed() {
    let mut session = registered(Some(OLD), false);
    let (old, new) = (named(OLD), named(NEW));
    aimed(&mut session, NEW);
    session.handle(EngineInput::Scanned { in_place: set(&[0]) });
    assert_eq!((session.serving(), session.landing_place(&new, 1)), (Some(old), None));
    assert_eq!(facts(&session), (None, Some(new), Phase::Planned), "which cannot be vouched for");
    let nothing = ChunkSet::empty(0);
    assert_eq!(available(&mut session, &[1]), [EngineOutput::Prepare { chunks: set(&[1]), keep: nothing }]);
    assert_eq!(prepared(&mut session), pause(NEW, 8));
    // Nor when it is called off.
    session.handle(EngineInput::Until(Until::Staged));
    assert_eq!(paused(&mut session, NEW), tell(Tell::Aborted { manifest: new }));
    assert_eq!(session.serving(), Some(old));
}

#[test]
fn an_engine_that_will_not_pause_keeps_what_it_has() {
    for late in [false, true] {
        let mut session = pausing();
        let answer = if late { overdue(&mut session) } else { refused(&mut session, Asked::Pause, NEW) };
        assert_eq!(answer, tell(Tell::Aborted { manifest: named(NEW) }));
        assert_eq!(session.serving(), Some(named(OLD)));
        assert_eq!(failure(&session).map(|f| f.0), Some(named(NEW)));
        // Of one that does not answer it is not known whether it answers others.
        assert_eq!(facts(&session).0.is_some(), !late);
    }
}

#[test]
fn a_pause_that_comes_late_counts_for_nothing() {
    let mut session = pausing();
    overdue(&mut session);
    // The same release is tried again, and now comes the answer to the first question: the engine then
    // hears that it was called off, and answers from its memory.
    aimed(&mut session, OLD);
    aimed(&mut session, NEW);
    available(&mut session, &[1]);
    assert_eq!(prepared(&mut session), pause(NEW, 8));
    assert_eq!(paused(&mut session, NEW), []);
    assert_eq!(facts(&session).0, Some(named(OLD)));
    assert_eq!(paused(&mut session, NEW), apply(&[1]));
}

#[test]
fn an_engine_that_will_not_resume_goes_back() {
    let mut session = resuming();
    assert_eq!(refused(&mut session, Asked::Resume, NEW), apply(&[1]));
    goes_back(&mut session);
    assert_eq!(failure(&session), Some((named(NEW), "busy".into())));
    // And is checked if it is tried again, though its check passed.
    aimed(&mut session, OLD);
    aimed(&mut session, NEW);
    available(&mut session, &[1]);
    prepared(&mut session);
    paused(&mut session, NEW);
    assert_eq!(done(&mut session), check(NEW));
}

#[test]
fn an_engine_that_will_not_go_back_either_takes_the_next_release() {
    let mut session = resuming();
    refused(&mut session, Asked::Resume, NEW);
    assert_eq!(done(&mut session), applied(OLD));
    assert_eq!(refused(&mut session, Asked::Resume, OLD), []);
    assert_eq!(facts(&session), (None, None, Phase::Heard));
    assert_eq!(failure(&session), Some((named(NEW), "busy".into())), "what it began with");
    aimed(&mut session, [3, 2]);
    land(&mut session, [3, 2], &[0]);
    assert_eq!(drain(&mut session), check([3, 2]));
    assert_eq!(checked(&mut session, [3, 2]), hydrated([3, 2]));
    // Hydrated, and refused all the same; what it would not go back to before is no way back.
    assert_eq!(refused(&mut session, Asked::Resume, [3, 2]), []);
    assert_eq!((session.phase(), session.serving()), ("failed", None));
}

#[test]
fn one_that_does_not_say_that_it_resumed_is_not_touched_before_it_pauses() {
    let mut session = resuming();
    assert_eq!(overdue(&mut session), []);
    assert_eq!(facts(&session), (None, Some(named(OLD)), Phase::Planned));
    assert_eq!(available(&mut session, &[1]), [prepare(&[1], &[])]);
    assert!(session.keeps(&named(OLD), 1));
    assert_eq!(prepared(&mut session), pause(OLD, 8));
    assert_eq!(resumed(&mut session, NEW), [], "too late");
    assert_eq!(facts(&session).0, None);
    assert_eq!(paused(&mut session, OLD), apply(&[1]));
    goes_back(&mut session);

    // If it does not pause either, that is how it is.
    let mut session = resuming();
    overdue(&mut session);
    available(&mut session, &[1]);
    prepared(&mut session);
    assert_eq!(overdue(&mut session), tell(Tell::Aborted { manifest: named(OLD) }));
    assert_eq!((facts(&session), session.phase()), ((None, None, Phase::Heard), "failed"));
    assert_eq!(failure(&session).map(|f| f.0), Some(named(NEW)));
    aimed(&mut session, [1, 8]);
    assert_eq!(session.landing_place(&named([1, 8]), 1), None);
}

#[test]
fn a_rollback_overtakes_a_release_that_waits() {
    let mut session = pausing();
    aimed(&mut session, [7, 7]);
    assert_eq!(session.aim().map(|t| t.manifest), Some(named([7, 7])));
    aimed(&mut session, NEW);
    assert_eq!(paused(&mut session, NEW), apply(&[1]));
    done(&mut session);
    checked(&mut session, NEW);
    resumed(&mut session, NEW);
    assert_eq!((session.serving(), session.phase()), (Some(named(NEW)), "serving"));
}

#[test]
fn a_release_that_does_not_fit_changes_nothing() {
    let mut session = serving(OLD);
    let manifest = ManifestHash::of(b"other");
    let told = after(&mut session, EngineInput::Unfit { manifest, reason: "shape".into() });
    assert!(matches!(&told[..], [EngineOutput::Tell(Tell::Failed { .. })]));
    assert_eq!(session.phase(), "serving");
    assert_eq!(failure(&session), Some((manifest, "shape".into())));
}
