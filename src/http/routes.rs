//! The calls.

use super::guard::{self, Guard};
use super::{Autoscale, SwarmView, metrics, openapi, page, stream};
use crate::agent::history::ReleasesView;
use crate::agent::readiness::Readiness;
use crate::agent::view::{ChannelView, PeerView, View};
use crate::agent::{Ask, Handle};
use axum::extract::{FromRequestParts, Query, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::sync::oneshot;
use utoipa::{IntoParams, ToSchema};

/// An agent whose task has not come round for so long is not alive. Its view is renewed five times a second.
const STALE: Duration = Duration::from_secs(10);
/// It answers within milliseconds, or it hangs.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// Guess: what an autoscaler may ask about, and a bound for what is computed.
const NODES_MAX: u32 = 100_000;

pub(super) fn router(agent: Handle, guard: Guard) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics::metrics))
        .route("/v1/status", get(status))
        .route("/v1/peers", get(peers))
        .route("/v1/channels", get(channels))
        .route("/v1/releases", get(releases))
        .route("/v1/swarm", get(swarm))
        .route("/v1/autoscale", get(autoscale))
        .route("/v1/events", get(stream::events))
        .route("/v1/drain", post(drain))
        .route("/v1/openapi.json", get(openapi::document))
        .fallback(|| async { refusal(StatusCode::NOT_FOUND, "there is no such call; /v1/openapi.json lists them") })
        .method_not_allowed_fallback(|| async {
            refusal(StatusCode::METHOD_NOT_ALLOWED, "not by this method; /v1/openapi.json says how")
        })
        .layer(middleware::from_fn_with_state(guard, guard::check))
        .with_state(agent)
}

/// Why a call was not answered.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct Refusal {
    pub(super) error: String,
}

pub(super) fn refusal(status: StatusCode, error: impl Into<String>) -> Response {
    (status, Json(Refusal { error: error.into() })).into_response()
}

/// What follows the `?`; where that cannot be read, the caller is told so as of all other mistakes.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let read = Query::from_request_parts(parts, state).await;
        read.map(|Query(query)| Asked(query)).map_err(|error| refusal(error.status(), error.body_text()))
    }
}

/// What changes from one moment to the next.
pub(super) fn fresh(body: impl Serialize) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(body)).into_response()
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct Health {
    /// `ok`, or what is wrong.
    pub(super) status: String,
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ReadyQuery {
    /// Only this channel.
    channel: Option<String>,
    /// Only the engine of this name.
    engine: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ChannelQuery {
    /// The channel; may be left out where the agent follows one.
    channel: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct AutoscaleQuery {
    /// The channel; may be left out where the agent follows one.
    channel: Option<String>,
    /// Predict for so many nodes more.
    nodes: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct Peers {
    pub(super) peers: Vec<PeerView>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct Channels {
    pub(super) channels: Vec<ChannelView>,
}

#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub(super) struct DrainBody {
    /// Leave after so many seconds, done or not. Left out: as the agent was told when it started.
    grace_seconds: Option<f64>,
}

/// Whether the agent's own task comes round. Says nothing of engines: see `/readyz`.
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = Health), (status = 503, body = Health)))]
pub(super) async fn healthz(State(agent): State<Handle>) -> Response {
    let age = agent.age();
    let (status, text) = match age < STALE {
        true => (StatusCode::OK, "ok".to_string()),
        false => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("the agent's task has not come round for {} s", age.as_secs()))
        }
    };
    (status, [(header::CACHE_CONTROL, "no-store")], Json(Health { status: text })).into_response()
}

/// 200 only while every registered engine serves exactly the release it should.
#[utoipa::path(get, path = "/readyz", params(ReadyQuery),
    responses((status = 200, body = Readiness), (status = 400, body = Refusal), (status = 503, body = Readiness)))]
pub(super) async fn readyz(State(agent): State<Handle>, Asked(query): Asked<ReadyQuery>) -> Response {
    let readiness = agent.readiness.borrow().clone().of(query.channel.as_deref(), query.engine.as_deref());
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, [(header::CACHE_CONTROL, "no-store")], Json(readiness)).into_response()
}

/// This node as it sees itself and the mesh; `aquifer status --json` prints the same.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = View)))]
pub(super) async fn status(State(agent): State<Handle>) -> Response {
    let mut view = agent.view.borrow().clone();
    // The view is a moment old; a probe that was answered just now is to be agreed with.
    view.readiness = agent.readiness.borrow().clone();
    fresh(view)
}

/// The other nodes that this one knows.
#[utoipa::path(get, path = "/v1/peers", responses((status = 200, body = Peers)))]
pub(super) async fn peers(State(agent): State<Handle>) -> Response {
    let peers = agent.view.borrow().peers.clone();
    fresh(Peers { peers })
}

/// The channels that this node follows.
#[utoipa::path(get, path = "/v1/channels", responses((status = 200, body = Channels)))]
pub(super) async fn channels(State(agent): State<Handle>) -> Response {
    let channels = agent.view.borrow().channels.clone();
    fresh(Channels { channels })
}

/// A channel's releases, newest first, and how each node fared; `aquifer releases --json` prints the same.
#[utoipa::path(get, path = "/v1/releases", params(ChannelQuery),
    responses((status = 200, body = ReleasesView), (status = 400, body = Refusal), (status = 404, body = Refusal)))]
pub(super) async fn releases(State(agent): State<Handle>, Asked(query): Asked<ChannelQuery>) -> Response {
    match channel_of(&agent, query.channel) {
        Ok(channel) => answer(&agent, |reply| Ask::Releases { channel, reply }).await,
        Err(problem) => refusal(StatusCode::NOT_FOUND, problem),
    }
}

/// Which chunks of a channel's release this node has, wants, and knows copies of, in the order of its manifest.
#[utoipa::path(get, path = "/v1/swarm", params(ChannelQuery),
    responses((status = 200, body = SwarmView), (status = 400, body = Refusal), (status = 404, body = Refusal)))]
pub(super) async fn swarm(State(agent): State<Handle>, Asked(query): Asked<ChannelQuery>) -> Response {
    match channel_of(&agent, query.channel) {
        Ok(channel) => answer(&agent, |reply| Ask::Swarm { channel, reply }).await,
        Err(problem) => refusal(StatusCode::NOT_FOUND, problem),
    }
}

/// Numbers to scale by, as this node knows them from the others.
#[utoipa::path(get, path = "/v1/autoscale", params(AutoscaleQuery),
    responses((status = 200, body = Autoscale), (status = 400, body = Refusal), (status = 404, body = Refusal)))]
pub(super) async fn autoscale(State(agent): State<Handle>, Asked(query): Asked<AutoscaleQuery>) -> Response {
    let nodes = query.nodes.unwrap_or(1).min(NODES_MAX);
    match channel_of(&agent, query.channel) {
        Ok(channel) => answer(&agent, |reply| Ask::Autoscale { channel, nodes, reply }).await,
        Err(problem) => refusal(StatusCode::NOT_FOUND, problem),
    }
}

/// Begins to drain: nothing new is taken on, what nobody else has is handed over, then the agent ends. Needs the token.
#[utoipa::path(post, path = "/v1/drain", request_body = Option<DrainBody>,
    responses((status = 202, body = Readiness), (status = 401, body = Refusal), (status = 403, body = Refusal)),
    security(("token" = [])))]
pub(super) async fn drain(State(agent): State<Handle>, body: axum::body::Bytes) -> Response {
    let asked = match body.is_empty() {
        true => Ok(DrainBody::default()),
        false => serde_json::from_slice(&body),
    };
    let grace = match asked.map(|asked| asked.grace_seconds.map(Duration::try_from_secs_f64).transpose()) {
        Ok(Ok(grace)) => grace,
        Ok(Err(error)) => return refusal(StatusCode::BAD_REQUEST, format!("grace_seconds: {error}")),
        Err(error) => return refusal(StatusCode::BAD_REQUEST, format!("this is not a body for /v1/drain: {error}")),
    };
    match reply_of(&agent, |reply| Ask::Drain { grace, reply }).await {
        Ok(()) => (StatusCode::ACCEPTED, Json(agent.readiness.borrow().clone())).into_response(),
        Err(refusal) => *refusal,
    }
}

/// The channel that is asked about: the one named, or the only one.
fn channel_of(agent: &Handle, asked: Option<String>) -> Result<aquifer_core::ChannelName, String> {
    let view = agent.view.borrow();
    let known: Vec<&str> = view.channels.iter().map(|c| c.channel.as_str()).collect();
    let named = match (asked.as_deref(), known.as_slice()) {
        (Some(name), _) => known.iter().find(|k| **k == name).copied(),
        (None, [only]) => Some(*only),
        (None, _) => None,
    };
    named.and_then(|name| name.parse().ok()).ok_or_else(|| {
        let asked =
            asked.as_deref().map_or("name one with ?channel=".to_string(), |a| format!("'{a}' is not followed"));
        format!("{asked}; this agent follows: {}", known.join(", "))
    })
}

async fn answer<T: Serialize>(agent: &Handle, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Response {
    match reply_of(agent, ask).await {
        Ok(body) => fresh(body),
        Err(refusal) => *refusal,
    }
}

async fn reply_of<T>(agent: &Handle, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, Box<Response>> {
    let (reply, answer) = oneshot::channel();
    let asked = async {
        agent.ask(ask(reply)).await?;
        answer.await.map_err(drop)
    };
    match tokio::time::timeout(ANSWER_WAIT, asked).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(())) => Err(Box::new(gone())),
        Err(_) => {
            let hangs = "the agent's task does not come round; see /healthz";
            Err(Box::new(refusal(StatusCode::GATEWAY_TIMEOUT, hangs)))
        }
    }
}

fn gone() -> Response {
    refusal(StatusCode::SERVICE_UNAVAILABLE, "the agent is about to end")
}
