//! The document that says what the calls are: served, and committed as `docs/openapi.json`.

use super::{autoscale, metrics, routes, stream, swarm};
use crate::agent::{history, lifecycle, readiness, view};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use std::sync::OnceLock;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Aquifer agent",
        description = "What an agent says over HTTP. Calls that read are open to who can connect; those that write need the token of --http-token. Errors are {\"error\": TEXT}."
    ),
    paths(
        routes::healthz,
        routes::readyz,
        routes::status,
        routes::peers,
        routes::channels,
        routes::releases,
        routes::swarm,
        routes::autoscale,
        routes::drain,
        metrics::metrics,
        stream::events,
        document
    ),
    components(schemas(
        autoscale::Autoscale,
        history::ReleasesView,
        lifecycle::Happening,
        readiness::Readiness,
        swarm::SwarmView,
        view::View,
    )),
    modifiers(&Token)
)]
struct Document;

struct Token;

impl Modify for Token {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = document.components.get_or_insert_with(Default::default);
        components.add_security_scheme("token", SecurityScheme::Http(bearer));
    }
}

fn text() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    // It is made of constants: it can be written.
    TEXT.get_or_init(|| Document::openapi().to_pretty_json().unwrap_or_default() + "\n")
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200, content_type = "application/json")))]
pub(super) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_are_documented_as_they_are() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
        if std::env::var_os("AQUIFER_BLESS").is_some() {
            std::fs::write(path, text()).unwrap();
        }
        let known = std::fs::read_to_string(path).unwrap_or_default();
        assert!(known == text(), "docs/openapi.json is old: AQUIFER_BLESS=1 cargo test --bin aquifer documented");
    }
}
