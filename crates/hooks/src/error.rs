//! What can be wrong with a hook and with where its events are kept, and what the user can do about it.

use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// A hook that cannot be one.
#[derive(Debug, Error)]
pub enum HookError {
    #[error("{shown} is no address for a webhook: {reason}; give one like https://host/path")]
    Url { shown: String, reason: String },
    #[error("the hook's command is empty; give a line for /bin/sh")]
    NoCommand,
    #[error("the hook's command has a NUL byte in it; give a line for /bin/sh")]
    NulInCommand,
    #[error("the webhook's secret is empty; write whsec_ and some base64 into its file, or any bytes")]
    NoSecret,
    #[error(
        "the webhook's secret begins with whsec_, but what follows is not base64 ({reason}); take it again from the receiver"
    )]
    Secret { reason: String },
    #[error(
        "the webhook's secret begins with whsk_, which is a key pair's; only shared secrets (whsec_) are known: ask the receiver for one"
    )]
    AsymmetricSecret,
}

/// Why no hooks could be started.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("the hook {name} is given twice; leave one out")]
    Twice { name: String },
    #[error(
        "the webhook {name} needs root certificates, and this system has none{detail}; install ca-certificates, or name a file of them in SSL_CERT_FILE"
    )]
    NoRoots { name: String, detail: String },
    #[error(
        "cannot {action} {path}: {source}; the events of hooks are kept there: see to it, or choose another directory"
    )]
    Spool { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is in use by another aquifer process; stop that one, or choose another directory")]
    Locked { path: PathBuf },
    #[error("cannot start a thread for the hook {name}: {source}")]
    Thread { name: String, source: io::Error },
    #[error("cannot make a pipe: {source}")]
    Pipe { source: io::Error },
}
