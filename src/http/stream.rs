//! `/v1/events`: what happens, as it happens, as server-sent events.

use super::routes::{Asked, Refusal};
use crate::agent::Handle;
use crate::agent::lifecycle::Happening;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use utoipa::IntoParams;

/// Proxies close what is silent for a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Begin with the last so many events; not used with `Last-Event-ID`.
    last: Option<usize>,
}

/// Every event of this node from now on, one JSON object each; with `Last-Event-ID` also what came after that one, of
/// the last 1,024, and with `last` so many of those that were. A listener that is too slow for what happens misses events, and sees it by `seq`.
#[utoipa::path(get, path = "/v1/events", params(EventsQuery),
    responses((status = 200, content_type = "text/event-stream", body = Happening), (status = 400, body = Refusal)))]
pub(super) async fn events(
    State(agent): State<Handle>,
    Asked(query): Asked<EventsQuery>,
    headers: HeaderMap,
) -> Response {
    let after = headers.get("last-event-id").and_then(|id| id.to_str().ok());
    let (missed, next) = agent.events.listen(after, query.last.unwrap_or(0));
    let stream = Listening::new(missed.into(), next);
    Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

type Next = Pin<Box<dyn Future<Output = (Option<Arc<Happening>>, Receiver<Arc<Happening>>)> + Send>>;

struct Listening {
    missed: VecDeque<Arc<Happening>>,
    next: Next,
}

impl Listening {
    fn new(missed: VecDeque<Arc<Happening>>, receiver: Receiver<Arc<Happening>>) -> Self {
        Listening { missed, next: Box::pin(receive(receiver)) }
    }
}

async fn receive(mut from: Receiver<Arc<Happening>>) -> (Option<Arc<Happening>>, Receiver<Arc<Happening>>) {
    loop {
        match from.recv().await {
            Ok(event) => return (Some(event), from),
            // The oldest of what waited is gone: it goes on with what is there.
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return (None, from),
        }
    }
}

impl futures_core::Stream for Listening {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(event) = self.missed.pop_front() {
            return Poll::Ready(Some(Ok(as_sent(&event))));
        }
        match self.next.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready((None, _)) => Poll::Ready(None),
            Poll::Ready((Some(event), from)) => {
                self.next = Box::pin(receive(from));
                Poll::Ready(Some(Ok(as_sent(&event))))
            }
        }
    }
}

fn as_sent(event: &Happening) -> Event {
    // It is plain data: it can be written.
    let data = serde_json::to_string(event).unwrap_or_default();
    Event::default().event(event.event.name()).id(&event.id).data(data)
}
