//! What one engine has not read yet, bounded.

use crate::limits::{OUTBOX_BYTES_MAX, OUTBOX_FRAMES_MAX};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};

/// Only the newest progress report is kept. Anything else is owed: an engine that lets so much
/// of it lie that a bound is reached is cut off, for it would never be in a known state again.
#[derive(Debug)]
pub(crate) struct Outbox {
    queue: Mutex<Queue>,
    filled: Notify,
    state: watch::Sender<State>,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<(Kind, Vec<u8>)>,
    bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Replaces the one before it.
    Progress,
    Owed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Open,
    /// Nothing more will be added; what is there will be sent.
    Finishing,
    /// A bound was reached.
    Overflowed,
}

impl Outbox {
    pub(crate) fn new() -> Self {
        Outbox { queue: Mutex::default(), filled: Notify::new(), state: watch::Sender::new(State::Open) }
    }

    pub(crate) fn push(&self, kind: Kind, frame: Vec<u8>) {
        if *self.state.borrow() != State::Open {
            return;
        }
        let fits = self.lock().push(kind, frame);
        if !fits {
            self.state.send_replace(State::Overflowed);
        }
        self.filled.notify_one();
    }

    pub(crate) fn finish(&self) {
        self.state.send_if_modified(|state| {
            let open = *state == State::Open;
            if open {
                *state = State::Finishing;
            }
            open
        });
        self.filled.notify_one();
    }

    /// The next frame to send; `None` once there will be no more. For one reader.
    pub(crate) async fn next(&self) -> Option<Vec<u8>> {
        loop {
            if let Some(frame) = self.lock().pop() {
                return Some(frame);
            }
            if *self.state.borrow() != State::Open {
                return None;
            }
            self.filled.notified().await;
        }
    }

    /// Waits until it is no longer open.
    pub(crate) async fn ended(&self) -> State {
        let mut state = self.state.subscribe();
        let ended = state.wait_for(|s| *s != State::Open).await;
        *ended.expect("the sender is in self")
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// False if it did not fit, which progress always does.
    fn push(&mut self, kind: Kind, frame: Vec<u8>) -> bool {
        if kind == Kind::Progress
            && let Some(at) = self.frames.iter().position(|(k, _)| *k == Kind::Progress)
            && let Some((_, old)) = self.frames.remove(at)
        {
            self.bytes -= old.len();
        }
        let room = self.frames.len() < OUTBOX_FRAMES_MAX && self.bytes + frame.len() <= OUTBOX_BYTES_MAX;
        if room {
            self.bytes += frame.len();
            self.frames.push_back((kind, frame));
        }
        room || kind == Kind::Progress
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        let (_, frame) = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_progress_replaces_the_older() {
        let outbox = Outbox::new();
        outbox.push(Kind::Progress, vec![1]);
        outbox.push(Kind::Owed, vec![2]);
        outbox.push(Kind::Progress, vec![3]);
        outbox.finish();
        assert_eq!(outbox.next().await, Some(vec![2]));
        assert_eq!(outbox.next().await, Some(vec![3]));
        assert_eq!(outbox.next().await, None);
    }

    #[tokio::test]
    async fn progress_is_dropped_where_anything_else_overflows() {
        let outbox = Outbox::new();
        for _ in 0..OUTBOX_FRAMES_MAX {
            outbox.push(Kind::Owed, vec![0]);
        }
        outbox.push(Kind::Progress, vec![1]);
        assert_eq!(*outbox.state.borrow(), State::Open);
        outbox.push(Kind::Owed, vec![2]);
        assert_eq!(outbox.ended().await, State::Overflowed);
    }
}
