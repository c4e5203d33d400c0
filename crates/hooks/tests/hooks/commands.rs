//! Commands that work, fail, hang, and do not listen.

use super::{PATIENCE, event, finish, quick, until};
use aquifer_hooks::{Event, Hook, HookStats, Hooks, Limits};
use std::fs;
use std::path::Path;
use std::time::Duration;

fn hooks(line: &str, limits: &Limits) -> Hooks {
    Hooks::start_with(vec![Hook::command(line).unwrap()], None, limits).unwrap()
}

fn stats(hooks: &Hooks) -> HookStats {
    hooks.stats().remove(0)
}

/// The number that a command wrote into a file, once it has.
fn pid(path: &Path) -> u32 {
    let read = || fs::read_to_string(path).ok().filter(|text| text.ends_with('\n'))?.trim().parse().ok();
    until("its number is written", || read().is_some());
    read().unwrap()
}

/// It is no more, or dead and not yet buried.
fn has_ended(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    stat.rsplit(')').next().is_some_and(|rest| rest.trim().starts_with(['Z', 'X']))
}

#[test]
fn a_command_gets_the_event_on_stdin_and_in_its_environment() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let line = format!(r#"cat >> {0}; echo "$AQUIFER_EVENT $AQUIFER_EVENT_ID" >> {0}; echo ignored"#, out.display());
    let hooks = hooks(&line, &quick());
    (1..=2).for_each(|n| hooks.send(event(n)));
    finish(hooks);
    let expected = "{\"id\":\"n-1-1\"}\njoined n-1-1\n{\"id\":\"n-1-2\"}\njoined n-1-2\n";
    assert_eq!(fs::read_to_string(out).unwrap(), expected);
}

#[test]
fn a_command_that_fails_is_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let line = format!(r#"echo $AQUIFER_EVENT_ID >> {at}/tries; test $(wc -l < {at}/tries) -ge 3 || exit 7"#);
    let hooks = hooks(&line, &quick());
    (1..=2).for_each(|n| hooks.send(event(n)));
    until("both delivered", || stats(&hooks).delivered == 2);
    assert_eq!((stats(&hooks).failed, stats(&hooks).last_error), (2, None));
    finish(hooks);
    assert_eq!(fs::read_to_string(dir.path().join("tries")).unwrap(), "n-1-1\nn-1-1\nn-1-1\nn-1-2\n");
}

#[test]
fn why_it_failed_is_told() {
    let cases = [
        ("echo first >&2; echo 'no such host' >&2; echo >&2; exit 3", "exited with 3: no such host"),
        ("kill -9 $$", "was killed by signal 9"),
        ("head -c 200000 /dev/zero | tr '\\0' x >&2; echo >&2; echo last >&2; exit 1", "exited with 1: last"),
        ("/no/such/program", "exited with 127"),
    ];
    for (line, told) in cases {
        let hooks = hooks(line, &Limits { retry_first: PATIENCE, retry_last: PATIENCE, ..quick() });
        hooks.send(event(1));
        until("it failed", || stats(&hooks).failed == 1);
        let error = stats(&hooks).last_error.unwrap();
        assert!(error.starts_with(told), "{error}");
    }
}

#[test]
fn a_command_that_hangs_is_killed_with_what_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let line = format!(
        "test -e {at}/child && exit 0; trap '' TERM; sleep 1000 & echo $! > {at}/child; echo waiting >&2; wait"
    );
    let limits = Limits { command_attempt: Duration::from_secs(1), ..quick() };
    let hooks = hooks(&line, &limits);
    hooks.send(event(1));
    let child = pid(&dir.path().join("child"));
    until("it was killed", || stats(&hooks).failed == 1);
    until("what it started was killed", || has_ended(child));
    until("it was run again", || stats(&hooks).delivered == 1);
    finish(hooks);
}

#[test]
fn a_late_command_is_told_as_such() {
    let limits = Limits { command_attempt: Duration::from_millis(300), ..quick() };
    let hooks = hooks("echo waiting >&2; sleep 1000", &limits);
    hooks.send(event(1));
    let told = "did not end within 300ms and was killed: waiting";
    until("it was killed, and what it said is told", || stats(&hooks).last_error.as_deref() == Some(told));
}

#[test]
fn a_command_need_not_read_its_input() {
    let body = format!("{{\"long\":\"{}\"}}", "x".repeat(1 << 20));
    for line in ["exit 0", "exec 0<&-; sleep 0.1", "head -c 10"] {
        let hooks = hooks(line, &quick());
        hooks.send(Event { body: body.clone(), ..event(1) });
        until("delivered", || stats(&hooks).delivered == 1);
        assert_eq!(stats(&hooks).failed, 0, "{line}: {:?}", stats(&hooks));
        finish(hooks);
    }
}

#[test]
fn a_long_event_arrives_whole() {
    let dir = tempfile::tempdir().unwrap();
    let body = format!("{{\"long\":\"{}\"}}", "x".repeat(1 << 20));
    let hooks = hooks(&format!("sleep 0.1; cat > {}/out", dir.path().display()), &quick());
    hooks.send(Event { body: body.clone(), ..event(1) });
    finish(hooks);
    assert!(fs::read_to_string(dir.path().join("out")).unwrap() == body + "\n");
}

#[test]
fn what_a_command_leaves_running_holds_nothing_up() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let hooks = hooks(&format!("sleep 1000 & echo $! > {at}/left"), &quick());
    hooks.send(event(1));
    until("delivered", || stats(&hooks).delivered == 1);
    let left = pid(&dir.path().join("left"));
    assert!(!has_ended(left));
    finish(hooks);
    assert!(!has_ended(left));
    assert!(std::process::Command::new("kill").arg(left.to_string()).status().unwrap().success());
}

#[test]
fn the_end_kills_a_command_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    let hooks = hooks(&format!("echo $$ > {}/pid; sleep 1000", dir.path().display()), &quick());
    hooks.send(event(1));
    let pid = pid(&dir.path().join("pid"));
    drop(hooks);
    assert!(has_ended(pid));
}
