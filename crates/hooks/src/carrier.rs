//! The thread that carries one hook's events away, one by one.

use crate::command::CommandRunner;
use crate::desk::{Desk, Outcome};
use crate::event::Event;
use crate::limits::Limits;
use crate::webhook::WebhookPoster;
use std::sync::Arc;

#[derive(Debug)]
pub(crate) enum Way {
    Command(CommandRunner),
    Webhook(Box<WebhookPoster>),
}

impl Way {
    fn attempt(&self, event: &Event) -> Outcome {
        match self {
            Way::Command(runner) => runner.attempt(event),
            Way::Webhook(poster) => poster.attempt(event),
        }
    }
}

/// Until all ends. An attempt under way then is not waited for: a webhook's ends by its time limit.
pub(crate) fn carry(desk: &Arc<Desk>, way: &Way, limits: &Limits) {
    while let Some(event) = desk.next() {
        let outcome = way.attempt(&event);
        desk.settle(&event, outcome, limits, rand::random());
    }
}
