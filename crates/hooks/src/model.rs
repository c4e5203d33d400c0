//! Whatever comes between, sent, delivered, failed, written or killed: what a receiver gets is in order,
//! nothing that was written down is lost, and only what was not written down as delivered comes twice.
//! Without threads, so that each step is one.

use crate::desk::{Desk, Outcome};
use crate::event::Event;
use crate::hook::Hook;
use crate::limits::Limits;
use crate::outbox::Outbox;
use crate::spool::Spool;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Debug)]
enum Step {
    Send,
    /// Of one of three things, the newest counts.
    Progress(u8),
    Deliver,
    Fail,
    Write,
    Compact,
    /// And the last of the file's bytes that were not there at the last whole write are cut off.
    Kill {
        torn: u16,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Send),
        2 => (0..3u8).prop_map(Step::Progress),
        4 => Just(Step::Deliver),
        2 => Just(Step::Fail),
        4 => Just(Step::Write),
        1 => Just(Step::Compact),
        2 => any::<u16>().prop_map(|torn| Step::Kill { torn }),
    ]
}

struct World {
    limits: Limits,
    path: PathBuf,
    desk: Arc<Desk>,
    spool: Spool,
    sent: u64,
    /// Each counts: what was sent and is not lost with a killed process.
    owed: BTreeSet<u64>,
    /// Sent since the last write.
    unwritten: BTreeSet<u64>,
    got: BTreeSet<u64>,
    /// Of this life, the last delivered.
    last: u64,
    /// The last delivered, as far as it is surely written down.
    done: u64,
    before_write: u64,
}

impl World {
    fn new(dir: &std::path::Path) -> World {
        let pause = Duration::ZERO;
        let limits = Limits { retry_first: pause, retry_last: pause, ..Limits::default() };
        let path = dir.join("events");
        let (desk, spool) = open(&path, &limits);
        let (owed, unwritten, got) = Default::default();
        World { limits, path, desk, spool, sent: 0, owed, unwritten, got, last: 0, done: 0, before_write: 0 }
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Send => self.send(None),
            Step::Progress(about) => self.send(Some(about.to_string())),
            Step::Deliver => self.attempt(true),
            Step::Fail => self.attempt(false),
            Step::Write => self.write(false),
            Step::Compact => self.write(true),
            Step::Kill { torn } => self.kill(*torn),
        }
    }

    fn send(&mut self, replaceable: Option<String>) {
        self.sent += 1;
        if replaceable.is_none() {
            self.owed.insert(self.sent);
            self.unwritten.insert(self.sent);
        }
        let kind = "k".to_string();
        self.desk.send(&Arc::new(Event { id: self.sent.to_string(), kind, body: "{}".to_string(), replaceable }));
    }

    fn attempt(&mut self, success: bool) {
        if self.desk.stats().pending == 0 {
            return;
        }
        let event = self.desk.next().unwrap();
        if success {
            let id: u64 = event.id.parse().unwrap();
            assert!(id > self.last, "{id} after {} in one life", self.last);
            assert!(id > self.done, "{id} again, though it was written down that {} is delivered", self.done);
            let missed: Vec<_> = self.owed.range(..id).filter(|owed| !self.got.contains(owed)).collect();
            assert!(missed.is_empty(), "{id} before {missed:?}");
            self.last = id;
            self.got.insert(id);
        }
        let why = "refused".to_string();
        let outcome = if success { Outcome::Delivered } else { Outcome::Failed { why, after: None } };
        self.desk.settle(&event, outcome, &self.limits, 0.0);
    }

    fn write(&mut self, all: bool) {
        self.before_write = self.spool.bytes();
        self.spool.put(&self.desk.take_writing(all)).unwrap();
        if all || self.spool.bytes() < self.before_write {
            // Put in its place at once, or emptied: no part of it is ever seen.
            self.before_write = self.spool.bytes();
        }
        self.unwritten.clear();
        self.done = self.done.max(self.last);
    }

    /// While it writes the rest, or some bytes of it.
    fn kill(&mut self, torn: u16) {
        let (unwritten, done) = (self.unwritten.clone(), self.done);
        self.write(false);
        let new = self.spool.bytes() - self.before_write;
        let cut = new.min(u64::from(torn) % (new + 1));
        if let Ok(file) = OpenOptions::new().write(true).open(&self.path) {
            file.set_len(self.spool.bytes() - cut).unwrap();
        }
        if cut > 0 {
            self.done = done;
            let kept = fs::read_to_string(&self.path).unwrap_or_default();
            let kept = |id: &u64| {
                kept.split_inclusive('\n')
                    .any(|line| line.ends_with('\n') && line.contains(&format!("\"id\":\"{id}\",")))
            };
            self.owed.retain(|id| !unwritten.contains(id) || self.got.contains(id) || kept(id));
        }
        self.restart();
    }

    fn restart(&mut self) {
        (self.desk, self.spool) = open(&self.path, &self.limits);
        self.unwritten.clear();
        self.last = 0;
        self.before_write = self.spool.bytes();
    }

    fn finish(&mut self) {
        while self.desk.stats().pending > 0 {
            self.attempt(true);
        }
        assert_eq!(self.owed.difference(&self.got).collect::<Vec<_>>(), Vec::<&u64>::new());
        self.write(false);
        assert_eq!(self.spool.bytes(), 0);
        assert_eq!(self.desk.stats().dropped, 0);
    }
}

fn open(path: &std::path::Path, limits: &Limits) -> (Arc<Desk>, Spool) {
    let mut outbox = Outbox::new(limits.pending_events_max, limits.pending_bytes_max);
    let (spool, dropped) = Spool::open(path.to_path_buf(), &mut outbox).unwrap();
    (Arc::new(Desk::new(Hook::command("x").unwrap(), outbox, true, dropped)), spool)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn in_order_and_none_lost(steps in prop::collection::vec(step(), 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::new(dir.path());
        steps.iter().for_each(|step| world.apply(step));
        world.finish();
    }
}

/// Wherever the file ends: what is before that is delivered, and new events after it.
#[test]
fn a_file_cut_anywhere_is_read_as_far_as_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path());
    for step in [Step::Send, Step::Send, Step::Progress(0), Step::Write, Step::Deliver, Step::Send, Step::Write] {
        world.apply(&step);
    }
    let whole = fs::read(&world.path).unwrap();
    assert_eq!(whole.iter().filter(|b| **b == b'\n').count(), 5);
    for len in 0..=whole.len() {
        fs::write(&world.path, &whole[..len]).unwrap();
        let (desk, mut spool) = open(&world.path, &world.limits);
        desk.send(&Arc::new(Event { id: "new".into(), kind: "k".into(), body: "{}".into(), replaceable: None }));
        spool.put(&desk.take_writing(false)).unwrap();
        let (desk, _) = open(&world.path, &world.limits);
        let got = ids(&desk, &world.limits);
        let lines = whole[..len].iter().filter(|b| **b == b'\n').count();
        let expected: &[&[&str]] = &[&[], &["1"], &["1", "2"], &["1", "2", "3"], &["2", "3"], &["2", "3", "4"]];
        assert_eq!(got, [expected[lines], &["new"]].concat(), "{len} bytes, {lines} lines");
    }
}

#[test]
fn a_line_that_is_no_line_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path());
    [Step::Send, Step::Write, Step::Send, Step::Write].iter().for_each(|step| world.apply(step));
    let text = fs::read_to_string(&world.path).unwrap().replacen("\"number\":1", "\"number\":\u{0}", 1);
    fs::write(&world.path, [text.as_bytes(), b"\xff\xfe\n{\"unknown\":{}}\n"].concat()).unwrap();
    let (desk, _) = open(&world.path, &world.limits);
    assert_eq!(ids(&desk, &world.limits), ["2"]);
}

fn ids(desk: &Desk, limits: &Limits) -> Vec<String> {
    let mut ids = Vec::new();
    while desk.stats().pending > 0 {
        let event = desk.next().unwrap();
        ids.push(event.id.clone());
        desk.settle(&event, Outcome::Delivered, limits, 0.0);
    }
    ids
}
