//! Where the driver waits, and what it does as time passes.

use super::super::LinkId;
use super::super::link::{Link, Loss};
use super::Driver;
use crate::limits::{IDLE_SWEEP_INTERVAL, SWEEP_INTERVAL, TICK};
use crate::regions::sweep;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::time::{Duration, Instant};

/// What a wait ended with.
#[derive(Default)]
pub(super) struct Ready {
    pub(super) rails: Vec<usize>,
    pub(super) links: Vec<LinkId>,
}

impl Driver {
    /// Hands words to the sockets.
    pub(super) fn speak(&mut self) {
        let speaking = self.links.iter_mut().filter(|(_, l)| l.has_words());
        let failed: Vec<(LinkId, String)> =
            speaking.filter_map(|(id, l)| Some((*id, l.flush().err()?.to_string()))).collect();
        for (link, reason) in failed {
            self.end_link(link, Loss::Broken(reason), Instant::now());
        }
    }

    /// Waits for anything to happen, or for time to be looked at.
    pub(super) fn wait(&self) -> Ready {
        let links: Vec<(LinkId, &Link)> =
            self.links.iter().filter(|(_, l)| !l.is_deaf()).map(|(id, l)| (*id, l)).collect();
        let mut fds = vec![PollFd::new(&self.inbox.wake, PollFlags::IN)];
        fds.extend(self.world.queues.iter().map(|queue| PollFd::new(&**queue, PollFlags::IN)));
        fds.extend(links.iter().map(|(_, l)| {
            let writing = if l.has_words() { PollFlags::OUT } else { PollFlags::empty() };
            PollFd::new(&l.stream, PollFlags::IN | writing)
        }));
        let timeout = Timespec::try_from(self.until_tick()).ok();
        if let Err(errno) = poll(&mut fds, timeout.as_ref())
            && errno != rustix::io::Errno::INTR
        {
            tracing::error!("poll: {errno}");
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        if fds.first().is_some_and(is_ready) {
            let mut count = [0; 8];
            // Nothing to read means that somebody else's wake was taken with an earlier one.
            let _ = rustix::io::read(&self.inbox.wake, &mut count);
        }
        let (rails, sockets) = fds[1..].split_at(self.world.queues.len());
        Ready {
            rails: (0..).zip(rails).filter(|(_, fd)| is_ready(fd)).map(|(rail, _)| rail).collect(),
            links: links.iter().zip(sockets).filter(|(_, fd)| is_ready(fd)).map(|((id, _), _)| *id).collect(),
        }
    }

    /// How long nothing has to be looked at.
    pub(super) fn until_tick(&self) -> Duration {
        let busy = self.links.values().any(|l| l.ending.is_some() || !l.flights.is_empty());
        if busy {
            return TICK.saturating_sub(self.ticked.elapsed());
        }
        let resting = !self.links.is_empty() || self.world.rails.iter().any(|rail| rail.regions.totals().0 > 0);
        if resting { SWEEP_INTERVAL } else { IDLE_SWEEP_INTERVAL }
    }

    pub(super) fn tick(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.ticked) < TICK {
            return;
        }
        self.ticked = now;
        let ids: Vec<LinkId> = self.links.keys().copied().collect();
        for id in ids {
            let Some(link) = self.links.get(&id) else { continue };
            let idle = link.flights.is_empty() && now.duration_since(link.progress) >= self.world.config.idle_timeout;
            if link.ending.is_some() {
                self.end_if_over(id, now);
            } else if let Some(number) = link.stalled(now) {
                self.end_link(id, Loss::Stalled(number), now);
            } else if link.is_stuck(now) {
                self.end_link(id, Loss::Renewed, now);
            } else if idle {
                self.end_link(id, Loss::Unneeded, now);
            }
        }
        if now.duration_since(self.swept) >= SWEEP_INTERVAL {
            self.swept = now;
            let rails = self.world.rails.clone();
            self.world.registering.give(move || sweep(rails.iter().map(|rail| &rail.regions)));
        }
    }
}
