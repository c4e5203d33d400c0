//! What is to happen, in order of time; equal times in the order they were planned.

use super::faults::Fault;
use crate::wheel::{Timed, Wheel};
use aquifer_core::{GossipMessage, Time};
use aquifer_proto::Input;
use std::rc::Rc;
use std::time::Duration;

#[derive(Debug)]
pub(super) enum Event {
    /// A newcomer starts, and joins the mesh.
    Start {
        node: u32,
    },
    /// A node that is in the mesh already begins to act.
    Begin {
        node: u32,
    },
    Deliver {
        to: u32,
        life: u32,
        /// The connection it comes over, by its other end and number: gone, and it does not come.
        link: Option<(u32, u64)>,
        input: Input,
    },
    Gossip {
        to: u32,
        from: u32,
        message: Rc<GossipMessage>,
    },
    /// The holder has heard that `tag` is to be read.
    Transfer {
        tag: u64,
    },
    /// A read from a holder that gives nothing has waited long enough.
    Stalled {
        tag: u64,
    },
    Wake {
        node: u32,
        life: u32,
    },
    Crash {
        node: u32,
    },
    Fault(Fault),
    Sample,
}

#[derive(Debug, Default)]
pub(super) struct Events {
    order: Wheel<Entry>,
    /// A slot is used again by a later event.
    slots: Vec<Option<Event>>,
    free: Vec<u32>,
    next: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    at_ns: u64,
    /// Counts what was planned.
    turn: u64,
    slot: u32,
}

impl Timed for Entry {
    fn at_ns(&self) -> u64 {
        self.at_ns
    }
}

impl Events {
    pub(super) fn plan(&mut self, at: Time, event: Event) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("events that wait are numbered in u32")
        });
        self.slots[slot as usize] = Some(event);
        // Runs are far shorter than the 584 years that fit.
        let at_ns = u64::try_from(at.since(Time::ZERO).as_nanos()).unwrap_or(u64::MAX);
        self.order.push(Entry { at_ns, turn: self.next, slot });
        self.next += 1;
    }

    pub(super) fn next_at(&mut self) -> Option<Time> {
        self.order.peek().map(|entry| Time::from_origin(Duration::from_nanos(entry.at_ns)))
    }

    pub(super) fn pop(&mut self) -> Option<Event> {
        let entry = self.order.pop()?;
        self.free.push(entry.slot);
        self.slots[entry.slot as usize].take()
    }
}
