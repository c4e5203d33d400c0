//! What the threads of one hook share: its outbox, and how it fares. Nobody waits for IO while
//! holding its lock, so that [`Desk::send`] never does.

use crate::event::Event;
use crate::hook::Hook;
use crate::limits::{Limits, WARN_EVERY};
use crate::outbox::{Entry, Outbox};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) name: String,
    pub(crate) hook: Hook,
    state: Mutex<State>,
    /// Rung at every change that one of the threads may wait for.
    bell: Condvar,
}

#[derive(Debug)]
struct State {
    outbox: Outbox,
    /// Attempts that failed since the last success, and when the next is due.
    failures: u32,
    retry_at: Option<Instant>,
    delivered: u64,
    failed: u64,
    dropped: u64,
    /// Of the last attempt, if it failed.
    last_error: Option<String>,
    warned_dropped: Option<Instant>,
    warned_failed: Option<Instant>,
    /// Since it last took an event there was a warning.
    troubled: bool,
    /// The receiver wants no more.
    gone: bool,
    stopping: bool,
    /// An attempt is under way.
    carrying: bool,
    paper: Paper,
}

/// What the scribe has been given to write.
#[derive(Debug)]
struct Paper {
    /// There is a scribe, and it has not ended.
    open: bool,
    /// All events up to this number.
    written: u64,
    /// The highest number delivered, and the highest that is written down as such.
    done: u64,
    done_written: u64,
    /// Lines are in the file.
    used: bool,
}

/// How an attempt ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Delivered,
    /// `after`: how long the receiver asked to be left alone.
    Failed {
        why: String,
        after: Option<Duration>,
    },
    /// The receiver wants no more of any.
    Gone,
    /// Given up since all ends: it says nothing about the receiver.
    Stopped,
}

/// What there is to write, and whether it is the last.
#[derive(Debug)]
pub(crate) struct Writing {
    pub(crate) what: What,
    pub(crate) last: bool,
}

#[derive(Debug)]
pub(crate) enum What {
    Nothing,
    Clear,
    Append { done: Option<u64>, entries: Vec<(u64, Entry)> },
    Rewrite { entries: Vec<(u64, Entry)> },
}

/// How one hook fares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookStats {
    /// [`Hook::name`]
    pub name: String,
    /// Events that are still to be delivered.
    pub pending: usize,
    /// How long the oldest of them waits.
    pub oldest: Option<Duration>,
    /// Events delivered since the start.
    pub delivered: u64,
    /// Attempts that failed since the start.
    pub failed: u64,
    /// Events given up since the start: for being too many, or because the receiver wants none.
    pub dropped: u64,
    /// Why the last attempt failed, if it did.
    pub last_error: Option<String>,
}

impl Desk {
    /// With what an earlier process left in `outbox`, all of which is in the hook's file if there is a spool.
    pub(crate) fn new(hook: Hook, outbox: Outbox, spooled: bool, dropped: u64) -> Desk {
        let last = outbox.last();
        let paper = Paper { open: spooled, written: last, done: 0, done_written: 0, used: last > 0 };
        let state = State {
            outbox,
            failures: 0,
            retry_at: None,
            delivered: 0,
            failed: 0,
            dropped,
            last_error: None,
            warned_dropped: None,
            warned_failed: None,
            troubled: false,
            gone: false,
            stopping: false,
            carrying: false,
            paper,
        };
        Desk { name: hook.name(), hook, state: Mutex::new(state), bell: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whatever is done under the lock leaves a state that holds.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, until: Option<Instant>) -> MutexGuard<'a, State> {
        let Some(until) = until else { return self.bell.wait(state).unwrap_or_else(PoisonError::into_inner) };
        let left = until.saturating_duration_since(Instant::now());
        self.bell.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn send(&self, event: &Arc<Event>) {
        let entry = Entry { event: event.clone(), sent_unix_ms: unix_ms() };
        let mut state = self.lock();
        let dropped = if state.gone { 1 } else { state.outbox.push(entry) };
        state.dropped += dropped;
        let total = state.dropped;
        let warn = dropped > 0 && !state.gone && due(&mut state.warned_dropped);
        drop(state);
        self.bell.notify_all();
        if warn {
            tracing::warn!(
                "hook {}: too many events are pending; the oldest are dropped, {total} so far: see that it takes them",
                self.name
            );
        }
    }

    /// For the carrier: waits for an event and for its time. None when all ends.
    pub(crate) fn next(&self) -> Option<Arc<Event>> {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return None;
            }
            let due = state.retry_at.is_none_or(|at| at <= Instant::now());
            if due && let Some(event) = state.outbox.hold() {
                state.carrying = true;
                return Some(event);
            }
            let until = if due { None } else { state.retry_at };
            state = self.wait(state, until);
        }
    }

    /// For the carrier: how the attempt for `event` ended.
    pub(crate) fn settle(&self, event: &Event, outcome: Outcome, limits: &Limits, random: f64) {
        let mut state = self.lock();
        state.carrying = false;
        let number = state.outbox.settle(outcome == Outcome::Delivered);
        let note = match outcome {
            Outcome::Delivered => {
                state.paper.done = number.unwrap_or(state.paper.done);
                state.on_delivered()
            }
            Outcome::Failed { why, after } => {
                let pause = pause(state.failures, after, limits, random);
                state.on_failed(event, why, pause)
            }
            Outcome::Gone => Some(state.on_gone()),
            Outcome::Stopped => None,
        };
        drop(state);
        self.bell.notify_all();
        // Not under the lock: whoever reads the log may be slow.
        match note {
            Some(Note::Trouble(text)) => tracing::warn!("hook {}: {text}", self.name),
            Some(Note::Recovery(text)) => tracing::info!("hook {}: {text}", self.name),
            None => (),
        }
    }

    /// For the scribe: waits until there is something to write, or all ends. Where writing failed, until
    /// `ill_until`, and then for all that is pending.
    pub(crate) fn writing(&self, ill_until: Option<Instant>) -> Writing {
        let mut state = self.lock();
        loop {
            let last = state.stopping;
            if ill_until.is_none_or(|until| last || until <= Instant::now()) {
                let what = state.take_writing(ill_until.is_some());
                if last || !matches!(what, What::Nothing) {
                    return Writing { what, last };
                }
            }
            state = self.wait(state, ill_until);
        }
    }

    /// For the scribe: what there is to write now; all that is pending if the file is to be made anew.
    pub(crate) fn take_writing(&self, all: bool) -> What {
        self.lock().take_writing(all)
    }

    pub(crate) fn pending_bytes(&self) -> usize {
        self.lock().outbox.cost_bytes()
    }

    /// For the scribe: it writes no more.
    pub(crate) fn close_paper(&self) {
        self.lock().paper.open = false;
        self.bell.notify_all();
    }

    /// The next attempt is made at once, and pauses begin with the shortest again.
    pub(crate) fn hurry(&self) {
        let mut state = self.lock();
        state.retry_at = None;
        state.failures = 0;
        drop(state);
        self.bell.notify_all();
    }

    /// Waits until nothing is pending, or `deadline`.
    pub(crate) fn wait_empty(&self, deadline: Instant) {
        let mut state = self.lock();
        while !state.outbox.is_empty() && Instant::now() < deadline {
            state = self.wait(state, Some(deadline));
        }
    }

    /// Ends the threads of this hook, soon.
    pub(crate) fn stop(&self) {
        self.lock().stopping = true;
        self.bell.notify_all();
    }

    /// Waits until what is pending is written down and no command runs, or `deadline`.
    pub(crate) fn wait_stopped(&self, command: bool, deadline: Instant) {
        let mut state = self.lock();
        while (state.paper.open || command && state.carrying) && Instant::now() < deadline {
            state = self.wait(state, Some(deadline));
        }
    }

    pub(crate) fn stats(&self) -> HookStats {
        let state = self.lock();
        let age_ms = state.outbox.oldest_unix_ms().map(|sent| unix_ms().saturating_sub(sent));
        HookStats {
            name: self.name.clone(),
            pending: state.outbox.len(),
            oldest: age_ms.map(Duration::from_millis),
            delivered: state.delivered,
            failed: state.failed,
            dropped: state.dropped,
            last_error: state.last_error.clone(),
        }
    }
}

/// Something to log.
#[derive(Debug)]
enum Note {
    Trouble(String),
    Recovery(String),
}

impl State {
    fn on_delivered(&mut self) -> Option<Note> {
        self.delivered += 1;
        self.retry_at = None;
        self.last_error = None;
        let failures = std::mem::take(&mut self.failures);
        let pending = self.outbox.len();
        std::mem::take(&mut self.troubled).then(|| {
            Note::Recovery(format!("works again after {failures} attempts that failed; {pending} events wait"))
        })
    }

    fn on_failed(&mut self, event: &Event, why: String, pause: Duration) -> Option<Note> {
        self.failed += 1;
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Instant::now().checked_add(pause);
        let note = due(&mut self.warned_failed).then(|| {
            let (pending, seconds) = (self.outbox.len(), pause.as_secs_f64());
            let Event { id, kind, .. } = event;
            let text = format!("event {id} ({kind}) is not delivered: {why}; tried again in {seconds:.1} s");
            Note::Trouble(format!("{text}; {pending} events wait"))
        });
        self.troubled |= note.is_some();
        self.last_error = Some(why);
        note
    }

    fn on_gone(&mut self) -> Note {
        self.gone = true;
        self.failed += 1;
        let dropped = self.outbox.clear();
        self.dropped += dropped;
        self.last_error = Some("answered 410 Gone: it gets no more events".to_string());
        Note::Trouble(format!(
            "answered 410 Gone, which means that it wants no more events: {dropped} are dropped, and all that follow \
             until the agent starts again; take the hook out, or give its new address"
        ))
    }

    fn take_writing(&mut self, all: bool) -> What {
        let paper = &mut self.paper;
        let entries = self.outbox.after(if all { 0 } else { paper.written });
        let done = (paper.done > paper.done_written).then_some(paper.done);
        (paper.written, paper.done_written) = (self.outbox.last(), paper.done);
        if self.outbox.is_empty() {
            let used = std::mem::take(&mut paper.used);
            return if used || all { What::Clear } else { What::Nothing };
        }
        if all {
            paper.used = true;
            return What::Rewrite { entries };
        }
        if entries.is_empty() && (done.is_none() || !paper.used) {
            return What::Nothing;
        }
        let done = done.filter(|_| paper.used);
        paper.used = true;
        What::Append { done, entries }
    }
}

/// How long to leave a receiver alone: what it asked for and up to a quarter more, or twice as long with
/// each failure, half of it random: so that many nodes do not come at once.
fn pause(failures: u32, after: Option<Duration>, limits: &Limits, random: f64) -> Duration {
    if let Some(after) = after {
        let asked = after.clamp(limits.retry_first, limits.retry_after_max.max(limits.retry_first));
        return asked.mul_f64(1.0 + random.clamp(0.0, 1.0) / 4.0);
    }
    let doubled = limits.retry_first.saturating_mul(1u32.checked_shl(failures).unwrap_or(u32::MAX));
    doubled.min(limits.retry_last).mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
}

/// Whether to warn again, and if so notes that.
fn due(warned: &mut Option<Instant>) -> bool {
    let due = warned.is_none_or(|at| at.elapsed() >= WARN_EVERY);
    if due {
        *warned = Some(Instant::now());
    }
    due
}

/// Milliseconds since 1970; 0 for a clock before that.
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let limits = Limits::default();
        let longest: Vec<_> = (0..9).map(|f| pause(f, None, &limits, 1.0).as_secs_f64()).collect();
        assert_eq!(longest, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]);
        assert_eq!(pause(2, None, &limits, 0.0), Duration::from_secs(1));
        assert_eq!(pause(u32::MAX, None, &limits, 1.0), limits.retry_last);
    }

    #[test]
    fn what_the_receiver_asks_for_is_bounded() {
        let limits = Limits::default();
        let asked = |seconds| pause(9, Some(Duration::from_secs(seconds)), &limits, 0.0);
        assert_eq!(asked(0), limits.retry_first);
        assert_eq!(asked(120), Duration::from_secs(120));
        assert_eq!(asked(u64::MAX), limits.retry_after_max);
        assert_eq!(pause(0, Some(Duration::from_secs(4)), &limits, 1.0), Duration::from_secs(5));
    }
}
