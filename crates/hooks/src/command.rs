//! One attempt with a command: a process group of its own, watched until it ends or its time is up.

use crate::desk::Outcome;
use crate::event::Event;
use crate::limits::{COMMAND_LOOK, ERROR_CHARS_MAX, STDERR_BYTES_MAX, STDERR_LEFT_BYTES_MAX};
use crate::text::last_line;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct CommandRunner {
    pub(crate) line: String,
    pub(crate) limit: Duration,
    /// Its other end is closed when all ends.
    pub(crate) stop: PipeReader,
}

impl CommandRunner {
    pub(crate) fn attempt(&self, event: &Event) -> Outcome {
        let failed = |why: String| Outcome::Failed { why, after: None };
        let mut running = match Running::start(&self.line, event) {
            Ok(running) => running,
            Err(error) => return failed(format!("cannot run /bin/sh: {error}")),
        };
        match running.watch(self.limit, &self.stop) {
            Ok(End::Exit(status)) if status.success() => Outcome::Delivered,
            Ok(End::Exit(status)) => failed(running.told(&ended(status))),
            Ok(End::Late) => failed(running.told(&format!("did not end within {:?} and was killed", self.limit))),
            Ok(End::Stopped) => Outcome::Stopped,
            Err(error) => failed(format!("cannot wait for the command, which was killed: {error}")),
        }
    }
}

enum End {
    Exit(ExitStatus),
    Late,
    Stopped,
}

struct Running {
    child: Child,
    /// Readable when it ended; none where the kernel has no such thing.
    pidfd: Option<OwnedFd>,
    stdin: Option<ChildStdin>,
    /// What it has not read yet is `input[given..]`.
    input: Vec<u8>,
    given: usize,
    stderr: Option<ChildStderr>,
    /// The last it wrote to standard error.
    tail: Vec<u8>,
}

impl Running {
    fn start(line: &str, event: &Event) -> io::Result<Running> {
        let mut child = Command::new("/bin/sh")
            .arg("-c")
            .arg(line)
            .env("AQUIFER_EVENT", event.sent_kind())
            .env("AQUIFER_EVENT_ID", event.sent_id())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
        let pidfd = pid(&child).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let input = format!("{}\n", event.body).into_bytes();
        Ok(Running { child, pidfd, stdin, input, given: 0, stderr, tail: Vec::new() })
    }

    /// Until it ended. What it leaves running when it ends by itself may go on.
    fn watch(&mut self, limit: Duration, stop: &PipeReader) -> io::Result<End> {
        let watched = self.watch_within(limit, stop);
        if !matches!(watched, Ok(End::Exit(_))) {
            self.kill();
        }
        watched
    }

    fn watch_within(&mut self, limit: Duration, stop: &PipeReader) -> io::Result<End> {
        if let Some(stdin) = &self.stdin {
            ioctl_fionbio(stdin, true)?;
        }
        if let Some(stderr) = &self.stderr {
            ioctl_fionbio(stderr, true)?;
        }
        let start = Instant::now();
        loop {
            self.give()?;
            self.listen(STDERR_BYTES_MAX)?;
            if let Some(status) = self.child.try_wait()? {
                self.listen(STDERR_LEFT_BYTES_MAX)?;
                return Ok(End::Exit(status));
            }
            let Some(left) = limit.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) else {
                return Ok(End::Late);
            };
            if self.wait(left, stop)? {
                return Ok(End::Stopped);
            }
        }
    }

    /// Until there is something to do; true if all ends.
    fn wait(&self, left: Duration, stop: &PipeReader) -> io::Result<bool> {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        fds.extend(self.stdin.as_ref().map(|stdin| PollFd::new(stdin, PollFlags::OUT)));
        fds.extend(self.stderr.as_ref().map(|stderr| PollFd::new(stderr, PollFlags::IN)));
        fds.extend(self.pidfd.as_ref().map(|pidfd| PollFd::new(pidfd, PollFlags::IN)));
        let left = if self.pidfd.is_none() { left.min(COMMAND_LOOK) } else { left };
        match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(!fds[0].revents().is_empty()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// As much of its input as it takes now. It may close it unread.
    fn give(&mut self) -> io::Result<()> {
        while let Some(stdin) = &mut self.stdin {
            match stdin.write(&self.input[self.given..]) {
                Ok(bytes) => self.given += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.given = self.input.len(),
                Err(error) => return Err(error),
            }
            if self.given == self.input.len() {
                self.stdin = None;
            }
        }
        Ok(())
    }

    /// What it wrote to standard error by now, up to about `bytes_max`.
    fn listen(&mut self, bytes_max: usize) -> io::Result<()> {
        let (mut heard, mut buffer) = (0, [0; STDERR_BYTES_MAX]);
        while let Some(stderr) = &mut self.stderr
            && heard < bytes_max
        {
            match stderr.read(&mut buffer) {
                Ok(0) => self.stderr = None,
                Ok(bytes) => {
                    heard += bytes;
                    self.tail.extend_from_slice(&buffer[..bytes]);
                    self.tail.drain(..self.tail.len().saturating_sub(STDERR_BYTES_MAX));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// With all that it started, unless that made a group of its own.
    fn kill(&mut self) {
        // It is not reaped yet, so that its number is still its own.
        if let Some(pid) = pid(&self.child) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = self.child.wait();
        let _ = self.listen(STDERR_LEFT_BYTES_MAX);
    }

    fn told(&self, how: &str) -> String {
        match last_line(&String::from_utf8_lossy(&self.tail), ERROR_CHARS_MAX) {
            said if said.is_empty() => how.to_string(),
            said => format!("{how}: {said}"),
        }
    }
}

fn pid(child: &Child) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child.id()).ok()?)
}

fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => format!("ended strangely ({status})"),
    }
}
