//! Receivers that are down, slow, erring, overrun or gone.

use super::receiver::{Answer, Place, Receiver};
use super::{PATIENCE, event, finish, ids, quick, until};
use aquifer_hooks::{Event, Hook, HookStats, Hooks, Kinds, Limits, Secret};
use base64::prelude::{BASE64_STANDARD, Engine};
use ring::hmac;
use std::net::TcpListener;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

fn hooks(url: &str, limits: &Limits) -> Hooks {
    Hooks::start_with(vec![Hook::webhook(url, None).unwrap()], None, limits).unwrap()
}

fn stats(hooks: &Hooks) -> HookStats {
    hooks.stats().remove(0)
}

#[test]
fn events_arrive_in_order_signed_as_standard_webhooks_are() {
    let receiver = Receiver::start(&[]);
    let secret = Secret::parse(b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    let hook = Hook::webhook(&receiver.url(), Some(secret)).unwrap();
    let hooks = Hooks::start_with(vec![hook], None, &quick()).unwrap();
    (1..=50).for_each(|n| hooks.send(event(n)));

    let request = receiver.next();
    assert_eq!((request.line.as_str(), &request.body), ("POST /hook HTTP/1.1", &event(1).body));
    let header = |name: &str| request.headers[name].as_str();
    assert_eq!((header("content-type"), header("webhook-id")), ("application/json", "n-1-1"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!(now - header("webhook-timestamp").parse::<u64>().unwrap() < PATIENCE.as_secs());
    let signed = format!("{}.{}.{}", header("webhook-id"), header("webhook-timestamp"), request.body);
    let signature = BASE64_STANDARD.decode(header("webhook-signature").strip_prefix("v1,").unwrap()).unwrap();
    let key = BASE64_STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &key), signed.as_bytes(), &signature).unwrap();

    assert_eq!(receiver.ids(49), ids(2..=50));
    until("all counted", || stats(&hooks).delivered == 50);
    let stats = stats(&hooks);
    assert_eq!((stats.pending, stats.oldest, stats.failed, stats.dropped, stats.last_error), (0, None, 0, 0, None));
    finish(hooks);
}

#[test]
fn one_connection_serves_for_all() {
    let receiver = Receiver::start(&[]);
    let hooks = hooks(&receiver.url(), &quick());
    (1..=20).for_each(|n| hooks.send(event(n)));
    let last = (0..20).map(|_| receiver.next().connection).max();
    assert_eq!(last, Some(0));
    finish(hooks);
}

#[test]
fn a_receiver_that_was_down_gets_what_it_missed() {
    let place = Place::new();
    let hooks = hooks(&place.url(), &quick());
    (1..=5).for_each(|n| hooks.send(event(n)));
    until("some attempts", || stats(&hooks).failed >= 3);
    let down = stats(&hooks);
    assert_eq!((down.pending, down.delivered), (5, 0));
    assert!(down.oldest.is_some() && down.last_error.as_ref().unwrap().contains("refused"), "{down:?}");

    let receiver = Receiver::at(place, &[]);
    assert_eq!(receiver.ids(5), ids(1..=5));
    finish(hooks);
    receiver.assert_no_more();
}

#[test]
fn an_attempt_ends_by_its_time_limit() {
    let receiver = Receiver::start(&[Answer::Hang]);
    let limits = Limits { webhook_attempt: Duration::from_millis(200), ..quick() };
    let hooks = hooks(&receiver.url(), &limits);
    (1..=2).for_each(|n| hooks.send(event(n)));
    until("it failed", || stats(&hooks).failed >= 1);
    until("both are delivered", || stats(&hooks).delivered == 2);
    finish(hooks);
    let mut got = receiver.rest();
    got.dedup();
    assert_eq!(got, ids(1..=2));
}

#[test]
fn an_answer_that_trickles_ends_by_the_limit_too() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let limits = Limits { webhook_attempt: Duration::from_millis(200), retry_first: PATIENCE, ..quick() };
    let hooks = hooks(&format!("http://{}/", listener.local_addr().unwrap()), &limits);
    hooks.send(event(1));
    let (mut stream, _) = listener.accept().unwrap();
    std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\n").unwrap();
    // One byte of the head at a time, until the other end has had enough.
    until("it gave up", || {
        let _ = std::io::Write::write_all(&mut stream, b"x");
        stats(&hooks).failed == 1
    });
    assert!(stats(&hooks).last_error.unwrap().contains("no answer within 200ms"));
}

#[test]
fn an_event_is_tried_until_it_is_taken() {
    let receiver = Receiver::start(&[
        Answer::Status("500 Internal Server Error"),
        Answer::Status("404 Not Found"),
        Answer::Cut("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 21\r\n\r\n\nno database \u{7} today\n"),
        Answer::Cut(""),
        Answer::Cut("HTTP/1.1 20"),
        Answer::Cut("SSH-2.0-OpenSSH_9.6\r\n"),
    ]);
    let hooks = hooks(&receiver.url(), &quick());
    (1..=2).for_each(|n| hooks.send(event(n)));
    assert_eq!(receiver.ids(8), ids([1, 1, 1, 1, 1, 1, 1, 2]));
    until("all counted", || stats(&hooks).delivered == 2);
    assert_eq!((stats(&hooks).failed, stats(&hooks).last_error), (6, None));
    finish(hooks);
}

#[test]
fn what_an_answer_says_is_told() {
    let cases = [
        (
            "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 13\r\n\r\n\nno database\n",
            "answered 503 Service Unavailable: no database",
        ),
        ("HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", "answered 401 Unauthorized"),
        ("", "closed the connection without an answer"),
    ];
    for (answer, told) in cases {
        let receiver = Receiver::start(&[Answer::Cut(answer)]);
        let limits = Limits { retry_first: PATIENCE, retry_last: PATIENCE, ..quick() };
        let hooks = hooks(&receiver.url(), &limits);
        hooks.send(event(1));
        until("it failed", || stats(&hooks).failed == 1);
        let error = stats(&hooks).last_error.unwrap();
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn the_head_of_an_answer_decides() {
    let receiver = Receiver::start(&[Answer::Cut("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf of")]);
    let hooks = hooks(&receiver.url(), &quick());
    (1..=2).for_each(|n| hooks.send(event(n)));
    assert_eq!(receiver.ids(2), ids(1..=2));
    until("all counted", || stats(&hooks).delivered == 2);
    assert_eq!(stats(&hooks).failed, 0);
    finish(hooks);
}

#[test]
fn a_receiver_is_left_alone_as_long_as_it_asks() {
    let receiver = Receiver::start(&[Answer::With("429 Too Many Requests", "retry-after: 1".to_string())]);
    let hooks = hooks(&receiver.url(), &quick());
    hooks.send(event(1));
    let (first, second) = (receiver.next(), receiver.next());
    assert!(second.at - first.at >= Duration::from_millis(990), "{:?}", second.at - first.at);
    finish(hooks);
}

#[test]
fn but_not_for_a_day() {
    let receiver = Receiver::start(&[Answer::With("503 Service Unavailable", "retry-after: 86400".to_string())]);
    let limits = Limits { retry_after_max: Duration::from_millis(50), ..quick() };
    let hooks = hooks(&receiver.url(), &limits);
    hooks.send(event(1));
    assert_eq!(receiver.ids(2), ids([1, 1]));
    finish(hooks);
}

#[test]
fn who_is_gone_gets_no_more() {
    let receiver = Receiver::start(&[Answer::Status("503 Service Unavailable"), Answer::Status("410 Gone")]);
    let hooks = hooks(&receiver.url(), &quick());
    (1..=5).for_each(|n| hooks.send(event(n)));
    until("all dropped", || stats(&hooks).dropped == 5);
    hooks.send(event(6));
    let gone = stats(&hooks);
    assert_eq!((gone.pending, gone.delivered, gone.dropped), (0, 0, 6));
    assert!(gone.last_error.unwrap().contains("410"));
    finish(hooks);
    assert_eq!(receiver.ids(2), ids([1, 1]));
    receiver.assert_no_more();
}

#[test]
fn redirects_are_not_followed() {
    let elsewhere = Receiver::start(&[]);
    for status in
        ["301 Moved Permanently", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"]
    {
        let receiver = Receiver::start(&[Answer::With(status, format!("location: {}", elsewhere.url()))]);
        let hooks = hooks(&receiver.url(), &Limits { retry_first: PATIENCE, retry_last: PATIENCE, ..quick() });
        hooks.send(event(1));
        until("it failed", || stats(&hooks).failed == 1);
        assert!(stats(&hooks).last_error.unwrap().contains("redirects are not followed"));
        finish(hooks);
        assert_eq!(receiver.ids(2), ids([1, 1]));
    }
    elsewhere.assert_no_more();
}

#[test]
fn what_is_too_much_is_dropped_and_counted() {
    let receiver = Receiver::start(&[Answer::Hang]);
    let limits = Limits {
        pending_events_max: 10,
        webhook_attempt: Duration::from_millis(500),
        retry_last: PATIENCE,
        retry_first: PATIENCE,
        ..quick()
    };
    let hooks = hooks(&receiver.url(), &limits);
    hooks.send(event(1));
    assert_eq!(receiver.next().id(), "n-1-1");
    let progress =
        |number: u32| Event { kind: "hydrating".into(), replaceable: Some(number.to_string()), ..event(number) };
    (2..=4).for_each(|n| hooks.send(progress(n)));
    (5..=20).for_each(|n| hooks.send(event(n)));
    let full = stats(&hooks);
    assert_eq!((full.pending, full.dropped), (10, 10));
    until("it failed", || stats(&hooks).failed == 1);
    finish(hooks);
    let first_may_be_dropped = receiver.ids(10);
    assert_eq!(first_may_be_dropped[1..], ids(12..=20)[..]);
}

#[test]
fn sending_waits_for_nobody() {
    let receiver = Receiver::start(&[Answer::Hang]);
    let dir = tempfile::tempdir().unwrap();
    let hook = Hook::webhook(&receiver.url(), None).unwrap();
    let hooks = Hooks::start_with(vec![hook], Some(dir.path().into()), &quick()).unwrap();
    hooks.send(event(0));
    assert_eq!(receiver.next().id(), "n-1-0");
    let start = Instant::now();
    (1..10_000).for_each(|n| hooks.send(event(n)));
    let took = start.elapsed();
    assert_eq!(stats(&hooks).pending, 10_000);
    assert!(took < Duration::from_secs(1), "{took:?}");
    eprintln!("10,000 events sent in {took:?} while the receiver hangs");
}

#[test]
fn hooks_get_the_kinds_they_want_and_do_not_wait_for_each_other() {
    let (stuck, receiver) = (Receiver::start(&[Answer::Hang]), Receiver::start(&[]));
    let only = Kinds::Only(["left".to_string()].into());
    let list = vec![Hook::webhook(&stuck.url(), None).unwrap(), Hook::webhook(&receiver.url(), None).unwrap().of(only)];
    let hooks = Hooks::start_with(list, None, &quick()).unwrap();
    hooks.send(event(1));
    hooks.send(Event { kind: "left".into(), ..event(2) });
    assert_eq!(receiver.ids(1), ids([2]));
    assert_eq!(stuck.ids(1), ids([1]));
    until("counted", || hooks.stats()[1].delivered == 1);
    assert_eq!(hooks.stats().iter().map(|s| s.pending).collect::<Vec<_>>(), [2, 0]);
    // The one that is stuck has until the deadline, and no longer.
    assert_eq!(hooks.flush(Instant::now()), 2);
}

#[test]
fn the_end_waits_for_what_is_under_way_and_hurries_what_is_not() {
    let receiver = Receiver::start(&[Answer::Status("503 Service Unavailable")]);
    let hooks = hooks(&receiver.url(), &Limits { retry_first: PATIENCE * 10, retry_last: PATIENCE * 10, ..quick() });
    hooks.send(event(1));
    until("it failed", || stats(&hooks).failed == 1);
    hooks.send(event(2));
    finish(hooks);
    assert_eq!(receiver.ids(3), ids([1, 1, 2]));
}

#[test]
fn odd_texts_are_sent_all_the_same() {
    let receiver = Receiver::start(&[]);
    let hooks = hooks(&receiver.url(), &quick());
    hooks.send(Event { id: "a\r\nb: c\0ü".to_string(), body: "{\"name\":\"ü\\n\"}".to_string(), ..event(1) });
    let request = receiver.next();
    assert_eq!((request.id().as_str(), request.body.as_str()), ("a??b:?c??", "{\"name\":\"ü\\n\"}"));
    finish(hooks);
}

#[test]
fn the_same_hook_twice_is_refused() {
    let hook = || Hook::webhook("http://127.0.0.1:1/", None).unwrap();
    let error = Hooks::start(vec![hook(), hook()], None).unwrap_err().to_string();
    assert!(error.contains("is given twice"), "{error}");
}
