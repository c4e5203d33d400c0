//! Hooks with real receivers: sockets on this machine, commands in processes of their own.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests")]

mod commands;
mod https;
mod receiver;
mod spool;
mod webhooks;

use aquifer_hooks::{Event, Hooks, Limits};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(60);

/// Times a hundredth as long as they are meant to be.
fn quick() -> Limits {
    Limits {
        webhook_attempt: Duration::from_secs(20),
        command_attempt: Duration::from_secs(20),
        retry_first: Duration::from_millis(5),
        retry_last: Duration::from_millis(40),
        retry_after_max: Duration::from_secs(5),
        ..Limits::default()
    }
}

fn event(number: u32) -> Event {
    Event {
        id: format!("n-1-{number}"),
        kind: "joined".to_string(),
        body: format!(r#"{{"id":"n-1-{number}"}}"#),
        replaceable: None,
    }
}

fn ids(numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    numbers.into_iter().map(|number| format!("n-1-{number}")).collect()
}

/// Waits for what nobody tells.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Ends hooks of which everything is delivered.
fn finish(hooks: Hooks) {
    assert_eq!(hooks.flush(Instant::now() + PATIENCE), 0);
}
