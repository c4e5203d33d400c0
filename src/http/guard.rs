//! Who may ask what.

use super::routes::refusal;
use anyhow::{Context, Result, bail};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

/// Shorter ones can be guessed.
const TOKEN_BYTES_MIN: usize = 16;

#[derive(Clone, Debug)]
pub(super) struct Guard {
    /// None: nobody may write.
    pub(super) token: Option<Arc<str>>,
    /// Only this machine can connect.
    pub(super) is_local: bool,
}

pub(super) fn read_token(path: &Path) -> Result<Arc<str>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read --http-token {}", path.display()))?;
    let token = text.trim();
    if token.len() < TOKEN_BYTES_MIN || token.chars().any(|c| !c.is_ascii_graphic()) {
        bail!(
            "--http-token {}: a token is {TOKEN_BYTES_MIN} printable characters or more, without spaces; \
             make one with `head -c 24 /dev/urandom | base64`",
            path.display()
        );
    }
    Ok(token.into())
}

/// Refuses what writes without the token. On loopback a browser may be tricked into asking under a name that someone
/// else's DNS gives this machine: such names are refused there.
pub(super) async fn check(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    if guard.is_local && !is_own_name(request.headers()) {
        return refusal(
            StatusCode::MISDIRECTED_REQUEST,
            "this agent answers on loopback only, under 'localhost' or an address",
        );
    }
    let reads = [Method::GET, Method::HEAD].contains(request.method());
    if !reads {
        let bearer =
            request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()?.strip_prefix("Bearer "));
        match (&guard.token, bearer) {
            (Some(token), Some(given)) if same(token.as_bytes(), given.trim().as_bytes()) => {}
            (Some(_), _) => {
                return refusal(
                    StatusCode::UNAUTHORIZED,
                    "this call changes something: send 'Authorization: Bearer TOKEN' with the token of --http-token",
                );
            }
            (None, _) => {
                return refusal(
                    StatusCode::FORBIDDEN,
                    "this call changes something, and the agent was started without --http-token: use the Unix socket \
                     (`aquifer drain` on the node), or give it a token",
                );
            }
        }
    }
    next.run(request).await
}

/// Without telling by the time it takes how much of it is right.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differs, (x, y)| differs | (x ^ y)) == 0
}

fn is_own_name(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').unwrap_or((rest, "?")),
        None => host.find(':').map_or((host, ""), |at| host.split_at(at)),
    };
    let is_port = |text: &str| text.strip_prefix(':').is_some_and(|digits| digits.parse::<u16>().is_ok());
    let is_name = name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok();
    is_name && (port.is_empty() || is_port(port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_not_this_machines() {
        let is_own = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            is_own_name(&headers)
        };
        assert!(["localhost", "localhost:7404", "127.0.0.1:7404", "[::1]:7404", "10.0.0.1"].into_iter().all(is_own));
        assert!(
            ["evil.example", "evil.example:7404", "localhost.evil.example:1", "[::1]evil.example", "::1:x"]
                .into_iter()
                .all(|h| !is_own(h))
        );
    }

    #[test]
    fn tokens() {
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            let path = dir.path().join("token");
            std::fs::write(&path, text).unwrap();
            read_token(&path)
        };
        assert_eq!(read("0123456789abcdef\n").unwrap().as_ref(), "0123456789abcdef");
        assert!(read("short").is_err() && read("with spaces in between").is_err());
        assert!(same(b"a", b"a") && !same(b"a", b"b") && !same(b"a", b"ab"));
    }
}
