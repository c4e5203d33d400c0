//! To whom events go, and which.

use crate::error::HookError;
use crate::limits::NAME_CHARS_MAX;
use crate::secret::Secret;
use crate::text::first_line;
use std::collections::BTreeSet;
use std::fmt;
use ureq::http::Uri;

/// A command or a webhook, and the kinds of events it gets.
#[derive(Clone, Debug)]
pub struct Hook {
    pub(crate) target: Target,
    kinds: Kinds,
}

#[derive(Clone)]
pub(crate) enum Target {
    Command(String),
    Webhook { url: Uri, secret: Option<Secret> },
}

/// Which kinds of events a hook gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kinds {
    AllBut(BTreeSet<String>),
    Only(BTreeSet<String>),
}

impl Hook {
    /// A line for `/bin/sh -c`, of all kinds. It gets each event's body and a newline on its standard input,
    /// and `AQUIFER_EVENT` (the kind) and `AQUIFER_EVENT_ID` in its environment.
    pub fn command(line: &str) -> Result<Hook, HookError> {
        if line.trim().is_empty() {
            return Err(HookError::NoCommand);
        }
        if line.contains('\0') {
            return Err(HookError::NulInCommand);
        }
        Ok(Hook::new(Target::Command(line.to_string())))
    }

    /// An address of http or https, of all kinds. It gets each event's body by POST, signed with `secret`
    /// if there is one, with the headers of Standard Webhooks. A name and password in the address are sent
    /// as basic authentication. It goes by a proxy if `HTTPS_PROXY`, `HTTP_PROXY` or `ALL_PROXY` says so, and
    /// `NO_PROXY` does not, but never to this machine itself.
    pub fn webhook(url: &str, secret: Option<Secret>) -> Result<Hook, HookError> {
        let refuse = |reason: String| HookError::Url { shown: shown(url), reason };
        match url.trim().split_once("://") {
            Some((scheme, _)) if ["http", "https"].iter().any(|s| scheme.eq_ignore_ascii_case(s)) => (),
            Some((other, _)) => return Err(refuse(format!("{other} is neither http nor https"))),
            None => return Err(refuse("it does not begin with http:// or https://".to_string())),
        }
        let uri: Uri = url.trim().parse().map_err(|e| refuse(format!("{e}")))?;
        let authority = uri.authority().map(|a| a.as_str().rsplit('@').next().unwrap_or_default());
        let host = uri.host().unwrap_or_default();
        if host.is_empty() {
            return Err(refuse("it names no host".to_string()));
        }
        if authority.is_some_and(|a| a.len() > host.len()) && uri.port_u16().is_none_or(|p| p == 0) {
            return Err(refuse("its port is not a number from 1 to 65535".to_string()));
        }
        Ok(Hook::new(Target::Webhook { url: uri, secret }))
    }

    fn new(target: Target) -> Hook {
        Hook { target, kinds: Kinds::AllBut(BTreeSet::new()) }
    }

    /// The same hook, of these kinds.
    pub fn of(self, kinds: Kinds) -> Hook {
        Hook { kinds, ..self }
    }

    pub(crate) fn wants(&self, kind: &str) -> bool {
        match &self.kinds {
            Kinds::AllBut(kinds) => !kinds.contains(kind),
            Kinds::Only(kinds) => kinds.contains(kind),
        }
    }

    /// What a person and a metric know it by, the same after a restart and different from any other hook's.
    /// Neither a command's arguments nor an address's path are in it: they are often as good as a password.
    pub fn name(&self) -> String {
        let digest = &self.digest()[..8];
        match &self.target {
            Target::Command(line) => format!("{}#{digest}", program(line)),
            Target::Webhook { url, .. } => {
                let port = url.port_u16().map(|p| format!(":{p}")).unwrap_or_default();
                let (scheme, host) = (url.scheme_str().unwrap_or_default(), url.host().unwrap_or_default());
                format!("{scheme}://{host}{port}/#{digest}")
            }
        }
    }

    /// 16 hex digits that tell it from others; neither its kinds nor its secret change them.
    pub(crate) fn digest(&self) -> String {
        let text = match &self.target {
            Target::Command(line) => format!("command {line}"),
            Target::Webhook { url, .. } => format!("webhook {url}"),
        };
        blake3::hash(text.as_bytes()).to_hex()[..16].to_string()
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Command(line) => f.debug_tuple("Command").field(line).finish(),
            Target::Webhook { url, secret } => {
                f.debug_struct("Webhook").field("url", &shown(&url.to_string())).field("secret", secret).finish()
            }
        }
    }
}

/// The name of the program that a line of a shell begins with, if that is plain to see.
fn program(line: &str) -> String {
    let word = line.split_whitespace().next().unwrap_or_default();
    let name = word.rsplit('/').next().unwrap_or_default();
    let is_plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._+-".contains(c));
    if is_plain { first_line(name, NAME_CHARS_MAX) } else { "command".to_string() }
}

/// An address without name, password and query, for messages.
fn shown(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = url.split_once("://") else { return first_line(url, NAME_CHARS_MAX) };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or_default();
    first_line(&format!("{scheme}://{host}{path}"), NAME_CHARS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(url: &str) -> String {
        Hook::webhook(url, None).unwrap_err().to_string()
    }

    #[test]
    fn refuses_addresses_that_are_none() {
        assert!(
            refusal("example.com/x").contains("does not begin with http:// or https://"),
            "{}",
            refusal("example.com/x")
        );
        assert!(refusal("ftp://example.com/").contains("ftp is neither http nor https"));
        assert!(refusal("http://example.com:99999/").contains("port"), "{}", refusal("http://example.com:99999/"));
        assert!(refusal("http://example.com:/").contains("port"));
        for url in ["", "http://", "https:///x", "http://a b/", "/x", "http://[::1/"] {
            assert!(refusal(url).contains("is no address for a webhook"), "{url}");
        }
    }

    #[test]
    fn takes_addresses_that_are_some() {
        for url in
            ["http://127.0.0.1:8080/x?y", "https://[::1]/", "https://[::1]:9/", "http://a:b@host/", "HTTPS://Host"]
        {
            assert!(Hook::webhook(url, None).is_ok(), "{url}");
        }
    }

    #[test]
    fn nothing_secret_is_shown() {
        let hook = Hook::webhook("https://bob:pw@example.com:8443/T0K3N?key=k3y", None).unwrap();
        assert!(hook.name().starts_with("https://example.com:8443/#"), "{}", hook.name());
        assert!(!format!("{hook:?}").contains("pw@") && !format!("{hook:?}").contains("k3y"), "{hook:?}");
        assert!(!refusal("ftp://bob:pw@example.com/?k3y").contains("pw"));
    }

    #[test]
    fn names_are_short_and_different() {
        let long = ["x".repeat(200), format!("{}y", "x".repeat(199))].map(|line| Hook::command(&line).unwrap().name());
        assert_ne!(long[0], long[1]);
        assert!(long[0].chars().count() < 80);
        let name = |line: &str| Hook::command(line).unwrap().name();
        assert!(name("/usr/bin/notify --token s3cr3t").starts_with("notify#"));
        assert!(name("TOKEN=s3cr3t notify").starts_with("command#") && name("'a b' c").starts_with("command#"));
        let paths = ["/a", "/b"].map(|p| Hook::webhook(&format!("http://h{p}"), None).unwrap().name());
        assert_ne!(paths[0], paths[1]);
    }

    #[test]
    fn refuses_commands_that_are_none() {
        assert!(matches!(Hook::command(" "), Err(HookError::NoCommand)));
        assert!(matches!(Hook::command("a\0b"), Err(HookError::NulInCommand)));
    }

    #[test]
    fn kinds_choose() {
        let some = || ["left".to_string()].into();
        let hook = Hook::command("x").unwrap();
        assert!(hook.wants("left"));
        assert!(!hook.clone().of(Kinds::AllBut(some())).wants("left"));
        assert!(hook.clone().of(Kinds::Only(some())).wants("left") && !hook.of(Kinds::Only(some())).wants("joined"));
    }
}
