//! One attempt at a webhook: a POST as Standard Webhooks has it.

use crate::desk::Outcome;
use crate::event::Event;
use crate::limits::{ANSWER_BYTES_MAX, ANSWER_HEAD_BYTES_MAX, ERROR_CHARS_MAX, Limits};
use crate::secret::Secret;
use crate::text::first_line;
use std::io::{self, Read};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use ureq::http::header::{CONTENT_TYPE, RETRY_AFTER};
use ureq::http::{HeaderMap, Response, StatusCode, Uri};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body, Proxy};

#[derive(Debug)]
pub(crate) struct WebhookPoster {
    agent: Agent,
    url: Uri,
    secret: Option<Secret>,
    limit: Duration,
}

/// The certificates that this system trusts, and why there are none if so.
#[derive(Clone, Debug)]
pub(crate) struct Roots {
    certificates: Arc<Vec<Certificate<'static>>>,
    pub(crate) trouble: String,
}

impl Roots {
    /// As OpenSSL finds them: `SSL_CERT_FILE` and `SSL_CERT_DIR`, else where systems keep them.
    pub(crate) fn of_system() -> Roots {
        let found = rustls_native_certs::load_native_certs();
        let certificates = found.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        let trouble = found.errors.iter().map(|error| format!(" ({error})")).collect();
        Roots { certificates: Arc::new(certificates), trouble }
    }

    pub(crate) fn none() -> Roots {
        Roots { certificates: Arc::default(), trouble: String::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }
}

impl WebhookPoster {
    pub(crate) fn new(url: Uri, secret: Option<Secret>, roots: &Roots, limits: &Limits) -> WebhookPoster {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::Specific(roots.certificates.clone()))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let proxy = if is_local(&url) { None } else { Proxy::try_from_env() };
        let agent = Agent::config_builder()
            .tls_config(tls)
            .proxy(proxy)
            .timeout_global(Some(limits.webhook_attempt))
            // A receiver that moved is told to whoever set it up: events do not follow where anybody points.
            .max_redirects(0)
            .http_status_as_error(false)
            .max_idle_connections(1)
            .max_response_header_size(ANSWER_HEAD_BYTES_MAX)
            .user_agent(concat!("aquifer/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        WebhookPoster { agent, url, secret, limit: limits.webhook_attempt }
    }

    pub(crate) fn attempt(&self, event: &Event) -> Outcome {
        match self.post(event) {
            Ok(answer) => outcome(answer),
            Err(error) => Outcome::Failed { why: self.told(&error), after: None },
        }
    }

    fn post(&self, event: &Event) -> Result<Response<Body>, ureq::Error> {
        let id = event.sent_id();
        let unix_seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut request = self
            .agent
            .post(&self.url)
            .header(CONTENT_TYPE, "application/json")
            .header("webhook-timestamp", unix_seconds.to_string());
        if let Some(secret) = &self.secret {
            request = request.header("webhook-signature", secret.sign(&id, unix_seconds, &event.body));
        }
        request.header("webhook-id", id).send(&event.body)
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "it has more variants than are of interest, and may get more")]
    fn told(&self, error: &ureq::Error) -> String {
        let text = match error {
            ureq::Error::Timeout(_) => format!("no answer within {:?}", self.limit),
            ureq::Error::HostNotFound => "its host's name is not known; see the address, and the DNS".to_string(),
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                "it closed the connection without an answer".to_string()
            }
            ureq::Error::Io(error) => format!("{error}"),
            other => format!("{other}"),
        };
        first_line(&text, ERROR_CHARS_MAX)
    }
}

/// Whether a proxy would look for it on the wrong machine.
fn is_local(url: &Uri) -> bool {
    let host = url.host().unwrap_or_default().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// The head decides. The body is read for what it tells, and so that the connection can be used again; if
/// it breaks off, that changes nothing.
fn outcome(mut answer: Response<Body>) -> Outcome {
    let (status, after) = (answer.status(), retry_after(answer.headers()));
    let mut body = Vec::new();
    let _ = answer.body_mut().as_reader().take(ANSWER_BYTES_MAX).read_to_end(&mut body);
    if status.is_success() {
        return Outcome::Delivered;
    }
    if status == StatusCode::GONE {
        return Outcome::Gone;
    }
    let told = first_line(&String::from_utf8_lossy(&body), ERROR_CHARS_MAX);
    let mut why = format!("answered {status}");
    if status.is_redirection() {
        why.push_str("; redirects are not followed: give the address that it redirects to");
    } else if !told.is_empty() {
        why.push_str(": ");
        why.push_str(&told);
    }
    Outcome::Failed { why, after }
}

/// Seconds, or a date (RFC 9110, 10.2.3). What is neither counts as not there.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = httpdate::parse_http_date(value).ok()?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(value: &str) -> Option<Duration> {
        retry_after(&[(RETRY_AFTER, value.parse().unwrap())].into_iter().collect())
    }

    #[test]
    fn no_proxy_is_asked_for_this_machine() {
        let local = |url: &str| is_local(&url.parse().unwrap());
        assert!(
            ["http://127.0.0.1:80/", "http://[::1]/", "https://LocalHost/x", "http://127.8.9.1/"]
                .into_iter()
                .all(local)
        );
        assert!(!["http://10.0.0.1/", "http://localhost.example/", "http://[::2]:1/"].into_iter().any(local));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(parsed("120"), Some(Duration::from_secs(120)));
        assert_eq!(parsed("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(3600));
        assert!(parsed(&later).is_some_and(|after| after > Duration::from_secs(3500)));
        for neither in ["", "-1", "soon", "99999999999999999999999"] {
            assert_eq!(parsed(neither), None, "{neither}");
        }
    }
}
