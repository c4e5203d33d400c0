//! Leaving well: nothing new is taken on, what nobody else has is handed over, then goodbye.

use super::lifecycle::{Happening, Kind};
use super::{Agent, Ended};
use aquifer_engine::ConnId;
use aquifer_engine::operator::Drained;
use aquifer_proto::Input;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Nobody waits for longer.
pub(crate) const GRACE_MAX: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug)]
pub(super) struct Draining {
    /// It leaves then, done or not.
    deadline: Instant,
    /// Requests that are answered when it is over.
    waiting: Vec<(ConnId, u64)>,
}

impl Agent {
    /// Begins to leave, within `grace`; None: as long as the agent was told. Asked again, the nearer end counts.
    pub(super) fn drain_within(&mut self, grace: Option<Duration>) {
        let grace = grace.unwrap_or(self.drain_grace).min(GRACE_MAX);
        let deadline = Instant::now() + grace;
        if let Some(draining) = &mut self.draining {
            draining.deadline = draining.deadline.min(deadline);
            return;
        }
        tracing::info!("draining: hands over what nobody else has, for {} s at most", grace.as_secs());
        self.draining = Some(Draining { deadline, waiting: Vec::new() });
        self.tell(Happening { event: Kind::Draining, ..Happening::default() });
        self.input(Input::Drain);
        self.renew_readiness(false);
    }

    pub(super) fn answer_when_drained(&mut self, conn: ConnId, request: u64) {
        if let Some(draining) = &mut self.draining {
            draining.waiting.push((conn, request));
        }
    }

    pub(super) fn on_drained(&mut self) {
        tracing::info!("drained: nothing is left that only this node has and others want");
        self.tell(Happening { event: Kind::Drained, ..Happening::default() });
        self.end_draining(Drained { whole: true, sole_chunks: 0 });
    }

    pub(super) fn look_on_draining(&mut self) {
        let Some(draining) = &self.draining else { return };
        if self.ended.is_some() || Instant::now() < draining.deadline {
            return;
        }
        let left = self.node.drain_progress().unwrap_or_default();
        if left.sole_chunks == 0 && left.leased_bytes == 0 {
            return self.on_drained();
        }
        let reason = format!(
            "the time to drain is over: {} chunks that others want have no other copy that is known, {} are being read",
            left.sole_chunks,
            crate::units::bytes(left.leased_bytes)
        );
        tracing::warn!("{reason}");
        self.tell(Happening { event: Kind::Drained, reason, ..Happening::default() });
        self.end_draining(Drained { whole: false, sole_chunks: left.sole_chunks });
    }

    fn end_draining(&mut self, drained: Drained) {
        let waiting = self.draining.as_mut().map(|d| std::mem::take(&mut d.waiting)).unwrap_or_default();
        if let Some(engines) = &self.engines {
            let answer: Value = serde_json::to_value(&drained).unwrap_or_else(|_| json!({}));
            waiting.into_iter().for_each(|(conn, request)| engines.reply(conn, request, Ok(answer.clone())));
        }
        self.ended = Some(Ended::Stopped);
    }
}
