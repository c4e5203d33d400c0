//! All hooks of a process: their threads, from start to end.

use crate::carrier::{Way, carry};
use crate::command::CommandRunner;
use crate::desk::Desk;
use crate::error::StartError;
use crate::event::Event;
use crate::hook::{Hook, Target};
use crate::limits::{CLOSE, LOCK_LOOK, Limits};
use crate::outbox::Outbox;
use crate::scribe::Scribe;
use crate::spool::{self, Spool};
use crate::webhook::{Roots, WebhookPoster};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

pub use crate::desk::HookStats;

/// Running hooks. They end when this is dropped: what is pending then stays in the spool, if there is one.
#[derive(Debug)]
pub struct Hooks {
    desks: Vec<Arc<Desk>>,
    /// Closed to end commands that run.
    stop: Option<PipeWriter>,
}

impl Hooks {
    /// Starts a thread for each hook, two if there is a `spool`: a directory, made if it is not there, in which
    /// is kept what is pending. What an earlier process left there for these hooks is delivered first; what it
    /// left for others is removed.
    ///
    /// Refuses hooks that are given twice, https without root certificates, and a spool that cannot be made,
    /// read, or locked.
    pub fn start(hooks: Vec<Hook>, spool: Option<PathBuf>) -> Result<Hooks, StartError> {
        Hooks::start_with(hooks, spool, &Limits::default())
    }

    /// The same with bounds and times of one's own.
    pub fn start_with(hooks: Vec<Hook>, spool: Option<PathBuf>, limits: &Limits) -> Result<Hooks, StartError> {
        check_different(&hooks)?;
        let roots = roots_for(&hooks)?;
        let room = spool.map(|dir| Room::open(dir, &hooks)).transpose()?;
        let (stopped, stop) = io::pipe().map_err(|source| StartError::Pipe { source })?;
        // A hook that cannot be started ends those before it.
        let mut started = Hooks { desks: Vec::new(), stop: Some(stop) };
        for hook in hooks {
            started.add(hook, &roots, room.as_ref(), &stopped, limits)?;
        }
        Ok(started)
    }

    fn add(
        &mut self,
        hook: Hook,
        roots: &Roots,
        room: Option<&Room>,
        stopped: &PipeReader,
        limits: &Limits,
    ) -> Result<(), StartError> {
        let way = match hook.target.clone() {
            Target::Command(line) => {
                let stop = stopped.try_clone().map_err(|source| StartError::Pipe { source })?;
                Way::Command(CommandRunner { line, limit: limits.command_attempt, stop })
            }
            Target::Webhook { url, secret } => Way::Webhook(Box::new(WebhookPoster::new(url, secret, roots, limits))),
        };
        let mut outbox = Outbox::new(limits.pending_events_max, limits.pending_bytes_max);
        let (file, dropped) = match room {
            Some(room) => {
                let (spool, dropped) = room.file(&hook, &mut outbox)?;
                (Some((spool, room.lock.clone())), dropped)
            }
            None => (None, 0),
        };
        let desk = Arc::new(Desk::new(hook, outbox, file.is_some(), dropped));
        self.desks.push(desk.clone());
        if let Some((spool, lock)) = file {
            let scribe = Scribe { desk: desk.clone(), spool, limits: limits.clone(), lock };
            spawn("hook-spool", &desk, move || scribe.write()).inspect_err(|_| desk.close_paper())?;
        }
        let (carried, limits) = (desk.clone(), limits.clone());
        spawn("hook", &desk, move || carry(&carried, &way, &limits))
    }

    /// Hands an event to each hook that wants its kind. Waits for no receiver and no disk, only for other
    /// threads that look into an outbox: a fraction of a millisecond at most.
    pub fn send(&self, event: Event) {
        let event = Arc::new(event);
        for desk in self.desks.iter().filter(|desk| desk.hook.wants(&event.kind)) {
            desk.send(&event);
        }
    }

    /// How each hook fares, in the order they were given.
    pub fn stats(&self) -> Vec<HookStats> {
        self.desks.iter().map(|desk| desk.stats()).collect()
    }

    /// For the end of a process: tries once more at once what failed, waits until all is delivered, at
    /// most until `deadline`, and ends all hooks. Returns how many events were not delivered; they stay in
    /// the spool, if there is one. Blocks; [`CLOSE`] longer than the deadline at most.
    pub fn flush(self, deadline: Instant) -> usize {
        for desk in &self.desks {
            desk.hurry();
        }
        for desk in &self.desks {
            desk.wait_empty(deadline);
        }
        self.desks.iter().map(|desk| desk.stats().pending).sum()
    }
}

impl Drop for Hooks {
    fn drop(&mut self) {
        for desk in &self.desks {
            desk.stop();
        }
        drop(self.stop.take());
        let deadline = Instant::now() + CLOSE;
        for desk in &self.desks {
            desk.wait_stopped(matches!(desk.hook.target, Target::Command(_)), deadline);
        }
    }
}

/// The spool's directory.
struct Room {
    dir: PathBuf,
    lock: Arc<File>,
}

impl Room {
    fn open(dir: PathBuf, hooks: &[Hook]) -> Result<Room, StartError> {
        fs::create_dir_all(&dir).map_err(trouble("make", &dir))?;
        let path = dir.join("lock");
        let lock = File::create(&path).map_err(trouble("make", &path))?;
        match lock_patiently(&lock) {
            Ok(()) => (),
            Err(Errno::WOULDBLOCK) => return Err(StartError::Locked { path: dir }),
            Err(errno) => return Err(trouble("lock", &path)(errno.into())),
        }
        let digests: Vec<_> = hooks.iter().map(Hook::digest).collect();
        let removed = spool::sweep(&dir, &digests).map_err(trouble("clear", &dir))?;
        if removed > 0 {
            tracing::info!("{}: removed the events of {removed} hooks that are not given any more", dir.display());
        }
        Ok(Room { dir, lock: Arc::new(lock) })
    }

    /// The file of a hook, and how many events of it were too many for `outbox`.
    fn file(&self, hook: &Hook, outbox: &mut Outbox) -> Result<(Spool, u64), StartError> {
        let path = spool::path(&self.dir, &hook.digest());
        let opened = Spool::open(path.clone(), outbox).map_err(trouble("read", &path))?;
        if !outbox.is_empty() {
            tracing::info!("hook {}: {} events of an earlier run are delivered first", hook.name(), outbox.len());
        }
        Ok(opened)
    }
}

/// Whoever has it may be about to end; and a process that is being started has it until it runs its program.
fn lock_patiently(file: &File) -> Result<(), Errno> {
    let deadline = Instant::now() + CLOSE;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(LOCK_LOOK),
            other => return other,
        }
    }
}

fn trouble(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StartError {
    let path = path.to_path_buf();
    move |source| StartError::Spool { action, path, source }
}

fn check_different(hooks: &[Hook]) -> Result<(), StartError> {
    let mut digests = BTreeSet::new();
    match hooks.iter().find(|hook| !digests.insert(hook.digest())) {
        Some(hook) => Err(StartError::Twice { name: hook.name() }),
        None => Ok(()),
    }
}

/// Read only if there is a webhook: it is a file of some 200 KiB.
fn roots_for(hooks: &[Hook]) -> Result<Roots, StartError> {
    if hooks.iter().all(|hook| matches!(hook.target, Target::Command(_))) {
        return Ok(Roots::none());
    }
    let roots = Roots::of_system();
    let https = |hook: &&Hook| match &hook.target {
        Target::Command(_) => false,
        Target::Webhook { url, .. } => url.scheme_str() == Some("https"),
    };
    match hooks.iter().find(https).filter(|_| roots.is_empty()) {
        Some(hook) => Err(StartError::NoRoots { name: hook.name(), detail: roots.trouble }),
        None => Ok(roots),
    }
}

fn spawn(what: &str, desk: &Desk, run: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
    let spawned = thread::Builder::new().name(what.to_string()).spawn(run);
    spawned.map(drop).map_err(|source| StartError::Thread { name: desk.name.clone(), source })
}
