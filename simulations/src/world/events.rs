//! What is to happen, in order of time; equal times in the order they were planned.

use aquifer_core::{GossipMessage, Time};
use aquifer_proto::Input;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;

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
        input: Box<Input>,
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
    Sample,
}

#[derive(Debug, Default)]
pub(super) struct Events {
    order: BinaryHeap<Reverse<(Time, u64)>>,
    events: BTreeMap<u64, Event>,
    next: u64,
}

impl Events {
    pub(super) fn plan(&mut self, at: Time, event: Event) {
        self.order.push(Reverse((at, self.next)));
        self.events.insert(self.next, event);
        self.next += 1;
    }

    pub(super) fn next_at(&self) -> Option<Time> {
        self.order.peek().map(|Reverse((at, _))| *at)
    }

    pub(super) fn pop(&mut self) -> Option<(Time, Event)> {
        let Reverse((at, id)) = self.order.pop()?;
        self.events.remove(&id).map(|event| (at, event))
    }
}
