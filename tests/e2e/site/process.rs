//! A process that does not outlive its handle.

use super::{PATIENCE, POLL, Site, program};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

pub(crate) struct Process {
    pub(crate) name: String,
    child: RefCell<Child>,
    input: Option<ChildStdin>,
    lines: Receiver<Value>,
    log: PathBuf,
    /// Where in the log this process began: an earlier one of its name may have written there.
    log_begin: u64,
}

impl Process {
    /// Starts the program. Its error stream is appended to `NAME.log`.
    pub(crate) fn start(site: &Site, name: &str, arguments: &[OsString]) -> Self {
        Self::start_inside(site, name, &[], arguments)
    }

    /// The same, started by another command that becomes the program.
    pub(crate) fn start_inside(site: &Site, name: &str, wrapper: &[OsString], arguments: &[OsString]) -> Self {
        let log = site.path(&format!("{name}.log"));
        let mut errors = OpenOptions::new().create(true).append(true).open(&log).expect("a log file");
        let words: Vec<_> = arguments.iter().map(|a| a.to_string_lossy()).collect();
        writeln!(errors, "$ aquifer {}", words.join(" ")).expect("a first line");
        let log_begin = errors.metadata().expect("its length").len();
        let mut command = program(wrapper);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().expect("the program starts");
        let (input, output) = (child.stdin.take(), child.stdout.take().expect("a pipe"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                // What is not JSON is for people; what nobody reads any more is dropped.
                if let Ok(value) = serde_json::from_str(&line)
                    && sender.send(value).is_err()
                {
                    return;
                }
            }
        });
        Process { name: name.to_string(), child: RefCell::new(child), input, lines, log, log_begin }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.borrow().id()
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        let bytes = fs::read(&self.log).expect("its log");
        let begin = usize::try_from(self.log_begin).expect("a short log");
        String::from_utf8_lossy(&bytes[begin..]).into_owned()
    }

    pub(crate) fn log_lines_with(&self, text: &str) -> Vec<String> {
        self.log().lines().filter(|line| line.contains(text)).map(str::to_string).collect()
    }

    pub(crate) fn until_logged(&self, text: &str) {
        super::until(&format!("{} logs '{text}'", self.name), || self.log().contains(text).then_some(()));
    }

    /// The next line of JSON whose `event` is one of `events`; others are passed over.
    pub(crate) fn next_event(&self, events: &[&str]) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if events.iter().any(|e| line["event"] == *e) => return line,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("{}: none of {events:?} within {PATIENCE:?}", self.name),
                Err(RecvTimeoutError::Disconnected) => panic!("{} ended, without any of {events:?}", self.name),
            }
        }
    }

    /// All lines of JSON since the last look.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.lines.try_iter().collect()
    }

    pub(crate) fn write_line(&mut self, line: &str) {
        let input = self.input.as_mut().expect("a pipe to its input");
        writeln!(input, "{line}").expect("it reads its input");
    }

    pub(crate) fn exit_status(&self) -> Option<ExitStatus> {
        self.child.borrow_mut().try_wait().expect("its status")
    }

    pub(crate) fn assert_alive(&self) {
        let status = self.exit_status();
        assert!(status.is_none(), "{} ended early: {status:?}", self.name);
    }

    /// Waits for its end.
    pub(crate) fn ended(&self) -> ExitStatus {
        super::until(&format!("{} ends", self.name), || self.exit_status())
    }

    /// As if the machine had lost power.
    pub(crate) fn kill(self) {
        drop(self);
    }

    /// Asks it to leave, and waits until it has.
    pub(crate) fn terminate(&self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended()
    }

    /// Stops it where it is, until [`Process::go_on`].
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", self.pid());
        super::until(&format!("{} stands still", self.name), || {
            let text = fs::read_to_string(&stat).ok()?;
            text.rsplit_once(')')?.1.trim_start().starts_with('T').then_some(())
        });
    }

    pub(crate) fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    /// Memory it keeps resident, files it mapped aside, in bytes.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("its status in /proc");
        let field = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).expect("a field of status");
            let kib = line.split_whitespace().nth(1).expect("a number of kB");
            kib.parse::<u64>().expect("a number") << 10
        };
        field("RssAnon:") + field("RssShmem:")
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("it can be signalled");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let child = self.child.get_mut();
        // Either call fails only if the process has ended and been waited for.
        let _ = child.kill();
        let _ = child.wait();
        // Its output is read to the end, so that whoever counts lines counts them all.
        while self.lines.recv_timeout(POLL).is_ok() {}
    }
}
