//! What is kept over the end of a process, however it comes.

use super::receiver::{Answer, Place, Receiver};
use super::{PATIENCE, event, finish, ids, quick, until};
use aquifer_hooks::{Event, Hook, Hooks, Limits, StartError};
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn hooks(url: &str, dir: &Path) -> Hooks {
    Hooks::start_with(vec![Hook::webhook(url, None).unwrap()], Some(dir.to_path_buf()), &quick()).unwrap()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.extension().is_some_and(|e| e == "jsonl")).collect()
}

fn lines(dir: &Path) -> usize {
    files(dir).iter().map(|path| fs::read_to_string(path).unwrap().matches('\n').count()).sum()
}

#[test]
fn what_was_not_delivered_comes_first_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new();
    let url = place.url();
    let first = hooks(&url, dir.path());
    (1..=5).for_each(|n| first.send(event(n)));
    drop(first);
    let second = hooks(&url, dir.path());
    assert_eq!(second.stats()[0].pending, 5);
    second.send(event(6));
    drop(second);

    let receiver = Receiver::at(place, &[]);
    let third = hooks(&url, dir.path());
    third.send(event(7));
    let mut got = receiver.ids(7);
    finish(third);
    // The attempt of an earlier one may have been under way.
    if got[0] == got[1] {
        got.remove(0);
        got.push(receiver.next().id());
    }
    assert_eq!(got, ids(1..=7));
    receiver.assert_no_more();
    assert_eq!(lines(dir.path()), 0);
    assert_eq!(hooks(&url, dir.path()).stats()[0].pending, 0);
}

#[test]
fn at_most_the_last_comes_twice() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(&[Answer::Status("200 OK"), Answer::Status("200 OK"), Answer::Hang]);
    let first = hooks(&receiver.url(), dir.path());
    (1..=5).for_each(|n| first.send(event(n)));
    assert_eq!(receiver.ids(3), ids(1..=3));
    // The third may have arrived, or not: who knows.
    assert_eq!(first.flush(std::time::Instant::now()), 3);
    let second = hooks(&receiver.url(), dir.path());
    assert_eq!(receiver.ids(3), ids(3..=5));
    finish(second);
}

#[test]
fn what_is_written_down_outlives_a_process_that_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new();
    let url = place.url();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "spool::sends_until_it_is_killed", "--nocapture"])
        .env("HOOKS_URL", &url)
        .env("HOOKS_DIR", dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until("some events are written down", || lines(dir.path()) > 300);
    child.kill().unwrap();
    child.wait().unwrap();
    let written = u32::try_from(lines(dir.path())).unwrap();

    let after = hooks(&url, dir.path());
    assert_eq!(u32::try_from(after.stats()[0].pending).unwrap(), written);
    let receiver = Receiver::at(place, &[]);
    assert_eq!(receiver.ids(usize::try_from(written).unwrap()), ids(1..=written));
    finish(after);
}

/// Not a test of its own: the process that the test above kills.
#[test]
fn sends_until_it_is_killed() {
    let (Ok(url), Ok(dir)) = (std::env::var("HOOKS_URL"), std::env::var("HOOKS_DIR")) else { return };
    let hooks = hooks(&url, Path::new(&dir));
    for number in 1..=9_000 {
        hooks.send(event(number));
        std::thread::yield_now();
    }
    std::thread::sleep(PATIENCE);
}

#[test]
fn a_torn_last_line_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new();
    let url = place.url();
    let first = hooks(&url, dir.path());
    (1..=3).for_each(|n| first.send(event(n)));
    drop(first);
    let file = files(dir.path()).remove(0);
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 20]).unwrap();
    let second = hooks(&url, dir.path());
    assert_eq!(second.stats()[0].pending, 2);
    second.send(event(4));
    drop(second);
    assert_eq!(hooks(&url, dir.path()).stats()[0].pending, 3);
}

#[test]
fn of_progress_the_newest_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new();
    let url = place.url();
    let first = hooks(&url, dir.path());
    for number in 1..=100 {
        first.send(Event { kind: "hydrating".into(), replaceable: Some("demo/x".into()), ..event(number) });
    }
    drop(first);
    // One, and the one that was being tried just then.
    assert!(hooks(&url, dir.path()).stats()[0].pending <= 2);
}

#[test]
fn the_file_does_not_grow_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(&[Answer::Hang]);
    let limits = Limits { pending_events_max: 2, ..quick() };
    let hook = Hook::webhook(&receiver.url(), None).unwrap();
    let hooks = Hooks::start_with(vec![hook], Some(dir.path().into()), &limits).unwrap();
    let body = format!("{{\"long\":\"{}\"}}", "x".repeat(100_000));
    let (mut longest, mut written) = (0, 0);
    for number in 1..=100 {
        hooks.send(Event { body: body.clone(), ..event(number) });
        until("it is written down", || {
            let file = files(dir.path()).pop();
            let text = file.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
            longest = longest.max(text.len());
            text.contains(&format!("n-1-{number}\""))
        });
        written += body.len();
    }
    assert!(written > 9_000_000 && longest < 2_000_000, "{longest}");
}

#[test]
fn events_of_hooks_that_are_not_given_any_more_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let first = hooks(&Place::new().url(), dir.path());
    first.send(event(1));
    drop(first);
    assert_eq!(files(dir.path()).len(), 1);
    fs::write(dir.path().join("0123456789abcdef.tmp"), "half").unwrap();
    fs::write(dir.path().join("notes.jsonl"), "mine").unwrap();
    drop(Hooks::start(Vec::new(), Some(dir.path().into())).unwrap());
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["lock", "notes.jsonl"]);
}

#[test]
fn two_processes_do_not_share_a_spool() {
    let dir = tempfile::tempdir().unwrap();
    let _first = hooks(&Place::new().url(), dir.path());
    let second = Hooks::start(vec![Hook::webhook(&Place::new().url(), None).unwrap()], Some(dir.path().into()));
    assert!(matches!(second, Err(StartError::Locked { .. })), "{second:?}");
}

#[test]
fn a_spool_that_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = Hooks::start(Vec::new(), Some(file.join("spool"))).unwrap_err().to_string();
    assert!(error.contains("cannot make") && error.contains("choose another directory"), "{error}");
}

#[test]
fn a_full_disk_holds_nothing_up_and_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new();
    let first = hooks(&place.url(), dir.path());
    first.send(event(0));
    drop(first);
    let file = files(dir.path()).remove(0);
    fs::remove_file(&file).unwrap();

    let limits = Limits { spool_retry: std::time::Duration::from_millis(300), ..quick() };
    let hook = Hook::webhook(&place.url(), None).unwrap();
    let second = Hooks::start_with(vec![hook], Some(dir.path().into()), &limits).unwrap();
    // Whoever writes there is told that no space is left.
    std::os::unix::fs::symlink("/dev/full", &file).unwrap();
    (1..=5).for_each(|n| second.send(event(n)));
    let receiver = Receiver::at(place, &[]);
    until("all counted", || second.stats()[0].delivered == 5);

    let got = receiver.rest();
    assert_eq!(got[got.len() - 5..], ids(1..=5)[..]);

    drop(receiver);
    second.send(event(6));
    until("it is written down, in a file of its own", || {
        fs::symlink_metadata(&file).is_ok_and(|meta| meta.is_file()) && lines(dir.path()) == 1
    });
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        3 => Just(Answer::Status("204 No Content")),
        1 => Just(Answer::Status("500 Internal Server Error")),
        1 => Just(Answer::With("429 Too Many Requests", "retry-after: 0".to_string())),
        1 => Just(Answer::Cut("")),
        1 => Just(Answer::Cut("HTTP/1.1 200 OK\r\ncontent-le")),
        1 => Just(Answer::Cut("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    /// Runs of some events each, over a receiver with whims.
    #[test]
    fn whatever_the_receiver_does_and_however_often_the_process_ends(
        answers in prop::collection::vec(answer(), 0..60),
        runs in prop::collection::vec(0..12u32, 1..6),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let receiver = Receiver::start(&answers);
        let mut sent = 0;
        for events in runs {
            let run = hooks(&receiver.url(), dir.path());
            (0..events).for_each(|n| run.send(event(sent + n + 1)));
            sent += events;
            drop(run);
        }
        finish(hooks(&receiver.url(), dir.path()));
        let mut got = Vec::new();
        for id in receiver.rest() {
            if !got.contains(&id) {
                got.push(id);
            }
        }
        prop_assert_eq!(got, ids(1..=sent));
    }
}
