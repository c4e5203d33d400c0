//! Progress for people: a bar on a terminal, a line now and then elsewhere.

use crate::output::{BARS, tell};
use crate::units;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Where there is no terminal, a line this often.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// Progress over a known number of bytes. May be advanced by several threads.
#[derive(Debug)]
pub(crate) struct Progress {
    what: String,
    bar: ProgressBar,
    plain: Option<Mutex<Plain>>,
}

#[derive(Debug)]
struct Plain {
    total: u64,
    done: u64,
    started: Instant,
    told: Instant,
}

impl Progress {
    /// Shows nothing if `quiet`.
    pub(crate) fn new(what: &str, total: u64, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = match terminal && !quiet {
            true => BARS.add(ProgressBar::no_length()),
            false => ProgressBar::hidden(),
        };
        let style = ProgressStyle::with_template(
            "{prefix:>10} {bar:16} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left {msg}",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_prefix(what.to_string());
        set_length(&bar, total);
        let now = Instant::now();
        let plain = (!terminal && !quiet).then(|| Mutex::new(Plain { total, done: 0, started: now, told: now }));
        Progress { what: what.to_string(), bar, plain }
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
        self.tell(|plain| plain.done += bytes);
    }

    pub(crate) fn set(&self, done: u64, total: u64, message: &str) {
        self.bar.set_message(message.to_string());
        set_length(&self.bar, total);
        self.bar.set_position(done);
        self.tell(|plain| (plain.done, plain.total) = (done, total));
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
        BARS.remove(&self.bar);
    }

    fn tell(&self, change: impl FnOnce(&mut Plain)) {
        let Some(plain) = &self.plain else { return };
        let mut plain = plain.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        change(&mut plain);
        if plain.told.elapsed() < LINE_INTERVAL || plain.total == 0 {
            return;
        }
        plain.told = Instant::now();
        let seconds = plain.started.elapsed().as_secs().max(1);
        let rate = plain.done / seconds;
        let left = plain.total.saturating_sub(plain.done).checked_div(rate);
        let left = left.map_or(String::new(), |s| format!(", {s} s left"));
        let (done, total) = (units::bytes(plain.done), units::bytes(plain.total));
        tell(&format!("{}: {done} of {total}, {}/s{left}", self.what, units::bytes(rate)));
    }
}

/// A bar of length zero would be full.
fn set_length(bar: &ProgressBar, total: u64) {
    if total > 0 {
        bar.set_length(total);
    }
}
