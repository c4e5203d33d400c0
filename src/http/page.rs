//! The page: one file, with everything it needs in it.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use ring::digest::{SHA256, digest};
use std::sync::OnceLock;

const PAGE: &str = include_str!("page.html");

pub(super) async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, policy()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, PAGE).into_response()
}

/// Nothing but the page's own script and style runs, whatever a node calls itself.
fn policy() -> &'static str {
    static POLICY: OnceLock<String> = OnceLock::new();
    POLICY.get_or_init(|| {
        let hash = |tag| base64(digest(&SHA256, inside(PAGE, tag).as_bytes()).as_ref());
        format!(
            "default-src 'none'; connect-src 'self'; script-src 'sha256-{}'; \
             style-src 'sha256-{}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            hash("script"),
            hash("style")
        )
    })
}

/// What stands between the page's first `<tag>` and its end.
fn inside<'a>(page: &'a str, tag: &str) -> &'a str {
    let from = page.find(&format!("<{tag}>")).map_or(0, |at| at + tag.len() + 2);
    let rest = page.get(from..).unwrap_or_default();
    rest.get(..rest.find(&format!("</{tag}>")).unwrap_or(0)).unwrap_or_default()
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_one_script_and_one_style_and_nothing_from_elsewhere() {
        for tag in ["script", "style"] {
            assert_eq!(PAGE.matches(&format!("<{tag}")).count(), 1, "{tag}");
            assert!(!inside(PAGE, tag).trim().is_empty());
        }
        let outside = ["src=\"http", "href=\"http", "@import", "url(http", " style=\"", " onclick="];
        assert!(outside.iter().all(|o| !PAGE.contains(o)));
    }
}
