//! What one reader can see of this node's memory at the moment, by one queue pair.

use crate::error::RdmaError;
use crate::limits::{ASKED_AHEAD_MAX, LEASE_REVIEW, WRITE_TIMEOUT};
use crate::rail::Rail;
use crate::verbs::{Address, Completion, CompletionQueue, QueuePair, Region, RemoteRegion, Window};
use aquifer_memory::Span;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bindings and closings under way: one, since each is waited for.
const REQUESTS_MAX: u32 = 4;

/// The serving end of a connection. Dropping it ends what the reader can see.
#[derive(Debug)]
pub(crate) struct Serving {
    // Windows go before the queue pair they are bound to: rxe waits for them when that is destroyed.
    open: BTreeMap<u32, Open>,
    idle: Vec<Window>,
    queue_pair: QueuePair,
    completions: Arc<CompletionQueue>,
    /// Numbers whose lease ended while their reader had not said that it is done.
    withdrawn: BTreeSet<u32>,
    rail: Arc<Rail>,
    next_id: u64,
    reviewed: Instant,
    broken: bool,
}

/// What a reader was shown a chunk as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) lease: u64,
    pub(crate) chunk: u32,
    pub(crate) len: u32,
}

#[derive(Debug)]
struct Open {
    shown: Shown,
    window: Option<Window>,
    /// The chunk's bytes stay where they are until it is hidden.
    _source: Span,
    _region: Arc<Region>,
}

impl Serving {
    /// Connects with the reader's queue pair; what is returned is for the reader to connect with.
    pub(crate) fn connect(rail: &Arc<Rail>, remote: &Address) -> Result<(Self, Address), RdmaError> {
        let completions = Arc::new(CompletionQueue::new(rail.device(), REQUESTS_MAX)?);
        let made = rail.queue_pair(&completions, REQUESTS_MAX)?;
        let address = made.address;
        let queue_pair = rail.connect(made, remote)?;
        let serving = Serving {
            open: BTreeMap::new(),
            idle: Vec::new(),
            queue_pair,
            completions,
            withdrawn: BTreeSet::new(),
            rail: rail.clone(),
            next_id: 0,
            reviewed: Instant::now(),
            broken: false,
        };
        Ok((serving, address))
    }

    /// Whether the reader may ask for one more, by that number, besides what waits for an answer.
    pub(crate) fn has_room_for(&self, number: u32, waiting: usize) -> bool {
        let (known, withdrawn) = (self.open.contains_key(&number), self.withdrawn.contains(&number));
        self.open.len() + self.withdrawn.len() + waiting < ASKED_AHEAD_MAX && !known && !withdrawn
    }

    /// Whether a part of other memory can be shown without the rest of it: else only what may be seen
    /// by every reader is to be shown.
    pub(crate) fn shows_parts(&self) -> bool {
        self.rail.has_windows()
    }

    /// The port that the reader reads by.
    pub(crate) fn rail(&self) -> &Arc<Rail> {
        &self.rail
    }

    /// Lets the reader read `source`, a part of `region`; where parts cannot be shown, all of that.
    pub(crate) fn show(
        &mut self,
        number: u32,
        shown: Shown,
        source: Span,
        region: Arc<Region>,
    ) -> Result<RemoteRegion, RdmaError> {
        let (remote, window) = match self.rail.has_windows() {
            true => {
                let (remote, window) = self.open_window(&region, &source)?;
                (remote, Some(window))
            }
            false => {
                let whole = region.remote(&source);
                let reason = || "the region is not one to be read".to_string();
                let device = self.rail.device().name().to_string();
                (whole.ok_or_else(|| RdmaError::Work { device, reason: reason() })?, None)
            }
        };
        if self.open.is_empty() {
            self.reviewed = Instant::now();
        }
        self.open.insert(number, Open { shown, window, _source: source, _region: region });
        Ok(remote)
    }

    /// Hides what was shown as `number` and says what it was; `None` if nothing is.
    pub(crate) fn hide(&mut self, number: u32) -> Result<Option<Shown>, RdmaError> {
        let Some(mut open) = self.open.remove(&number) else { return Ok(None) };
        if let Some(window) = open.window.take() {
            self.close_window(window)?;
        }
        Ok(Some(open.shown))
    }

    /// Hides it, and remembers that it was not the reader's wish.
    pub(crate) fn withdraw(&mut self, number: u32) -> Result<(), RdmaError> {
        if self.hide(number)?.is_some() {
            self.withdrawn.insert(number);
        }
        Ok(())
    }

    /// Whether `number` was withdrawn; it is forgotten then.
    pub(crate) fn was_withdrawn(&mut self, number: u32) -> bool {
        self.withdrawn.remove(&number)
    }

    /// The numbers of what is shown and `which` says; the time of this review is kept.
    pub(crate) fn numbers(&mut self, which: impl Fn(&Shown) -> bool) -> Vec<u32> {
        self.reviewed = Instant::now();
        self.open.iter().filter(|(_, open)| which(&open.shown)).map(|(number, _)| *number).collect()
    }

    /// How long until the leases of what is shown must be looked at; `None` while nothing is shown.
    pub(crate) fn until_review(&self) -> Option<Duration> {
        (!self.open.is_empty()).then(|| LEASE_REVIEW.saturating_sub(self.reviewed.elapsed()))
    }

    pub(crate) fn is_review_due(&self) -> bool {
        self.until_review().is_some_and(|left| left.is_zero())
    }

    /// Whether the queue pair is of no more use.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    fn open_window(&mut self, region: &Arc<Region>, source: &Span) -> Result<(RemoteRegion, Window), RdmaError> {
        let mut window = match self.idle.pop() {
            Some(window) => window,
            None => Window::new(&self.rail.domain)?,
        };
        self.next_id += 1;
        let bound = self.queue_pair.bind(self.next_id, &mut window, region, source);
        let remote = bound.and_then(|remote| self.wait().map(|()| remote)).inspect_err(|_| self.broken = true)?;
        self.queue_pair.bound(&mut window);
        Ok((remote, window))
    }

    fn close_window(&mut self, mut window: Window) -> Result<(), RdmaError> {
        self.next_id += 1;
        let posted = self.queue_pair.close(self.next_id, &window);
        posted.and_then(|()| self.wait()).inspect_err(|_| self.broken = true)?;
        self.queue_pair.closed(&mut window);
        self.idle.push(window);
        Ok(())
    }

    /// Waits for the one request that was posted. The device answers it by itself, so this takes
    /// microseconds.
    fn wait(&mut self) -> Result<(), RdmaError> {
        let deadline = Instant::now() + WRITE_TIMEOUT;
        let mut done: Vec<Completion> = Vec::new();
        loop {
            if self.completions.poll(&mut done)? {
                break;
            }
            self.await_event(deadline)?;
            self.completions.rearm()?;
        }
        let device = self.rail.device().name();
        let ours = done.into_iter().find(|completion| completion.id == self.next_id);
        let result = ours.map_or(Ok(()), |completion| completion.result);
        result.map_err(|error| RdmaError::Work { device: device.into(), reason: format!("a memory window: {error}") })
    }

    fn await_event(&self, deadline: Instant) -> Result<(), RdmaError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let device = self.rail.device().name().into();
            return Err(RdmaError::Work { device, reason: "a memory window was not bound in time".into() });
        }
        let timeout = Timespec::try_from(left).map_err(|e| RdmaError::system("poll")(std::io::Error::other(e)))?;
        match poll(&mut [PollFd::new(&*self.completions, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(RdmaError::system("poll")(errno.into())),
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // The sources are given up first, and must not be read any more then.
        if let Err(error) = self.queue_pair.stop() {
            tracing::debug!("{error}");
        }
    }
}
