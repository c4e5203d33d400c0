//! Options for whoever operates a node: where it answers, whom it tells, and how it leaves.

use super::duration;
use super::file::{lines, list};
use crate::agent::AgentConfig;
use crate::agent::lifecycle::Kind;
use crate::http::{Bound, Where};
use anyhow::{Context, Result, bail};
use aquifer_hooks::{Hook, Kinds, Secret};
use clap::Args;
use serde::Deserialize;
use std::path::PathBuf;

#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct OperationOptions {
    /// Answer HTTP here: readiness, metrics, state, events, and a page for people; or `off`. Whoever can connect can
    /// read [default: 127.0.0.1:7404 for an agent, or any free port of 127.0.0.1 if another has it; else off]
    #[arg(long, env = "AQUIFER_HTTP", value_name = "ADDRESS", help_heading = "Operation")]
    pub(crate) http: Option<String>,
    /// File with the token that calls over HTTP need which change something; without it there are none
    #[arg(long, env = "AQUIFER_HTTP_TOKEN", value_name = "FILE", help_heading = "Operation")]
    pub(crate) http_token: Option<PathBuf>,
    /// Run this command (by /bin/sh) at each event, which comes as JSON on its standard input. May be repeated
    #[arg(long, env = "AQUIFER_HOOK", value_name = "COMMAND", help_heading = "Operation")]
    pub(crate) hook: Vec<String>,
    /// Post each event to this address. May be repeated
    #[arg(long, env = "AQUIFER_WEBHOOK", value_name = "URL", help_heading = "Operation")]
    pub(crate) webhook: Vec<String>,
    /// File with the secret that webhooks are signed with, as standardwebhooks.com has it
    #[arg(long, env = "AQUIFER_WEBHOOK_SECRET", value_name = "FILE", help_heading = "Operation")]
    pub(crate) webhook_secret: Option<PathBuf>,
    /// Tell hooks and webhooks of these events, such as activated. May be repeated [default: all but hydrating,
    /// peer-joined and peer-left]
    #[arg(long, env = "AQUIFER_HOOK_EVENT", value_name = "KIND", value_delimiter = ',', help_heading = "Operation")]
    pub(crate) hook_event: Vec<String>,
    /// When asked to leave, hand over what nobody else has for so long at most [default: 25s]
    #[arg(long, env = "AQUIFER_DRAIN_GRACE", value_name = "DURATION", help_heading = "Operation")]
    pub(crate) drain_grace: Option<String>,
}

impl OperationOptions {
    pub(super) fn or(self, file: Self) -> Self {
        OperationOptions {
            http: self.http.or(file.http),
            http_token: self.http_token.or(file.http_token),
            hook: lines(self.hook, file.hook),
            webhook: lines(self.webhook, file.webhook),
            webhook_secret: self.webhook_secret.or(file.webhook_secret),
            hook_event: list(self.hook_event, file.hook_event),
            drain_grace: self.drain_grace.or(file.drain_grace),
        }
    }

    /// Adds these options to a node's configuration.
    pub(crate) fn configure(&self, config: &mut AgentConfig) -> Result<()> {
        if let Some(text) = &self.drain_grace {
            config.drain_grace = duration("--drain-grace", text)?;
        }
        config.hooks = self.hooks()?;
        Ok(())
    }

    /// Takes the port where the node is to answer HTTP, if it is to; `default` where that is not said. Whoever connects
    /// waits until it is served.
    pub(crate) fn bind(&self, config: &mut AgentConfig, default: Option<Where>) -> Result<Option<Bound>> {
        let bound = self.at(default)?.map(|at| Bound::new(at, self.http_token.as_deref())).transpose()?;
        config.http = bound.as_ref().map(|bound| bound.address.to_string());
        Ok(bound)
    }

    /// Where to answer HTTP, if anywhere.
    pub(crate) fn at(&self, default: Option<Where>) -> Result<Option<Where>> {
        match self.http.as_deref() {
            None => Ok(default),
            Some("off") => Ok(None),
            Some(text) => {
                let address = text.parse().with_context(|| format!("--http '{text}' is not ip:port, or 'off'"))?;
                Ok(Some(Where::At(address)))
            }
        }
    }

    fn hooks(&self) -> Result<Vec<Hook>> {
        let known = Kind::ALL.map(Kind::name);
        if let Some(kind) = self.hook_event.iter().find(|kind| !known.contains(&kind.as_str())) {
            bail!("--hook-event '{kind}': events are {}", known.join(", "));
        }
        let kinds = || match self.hook_event.as_slice() {
            // Of every node that comes, all others tell.
            [] => {
                Kinds::AllBut([Kind::Hydrating, Kind::PeerJoined, Kind::PeerLeft].map(|k| k.name().to_string()).into())
            }
            kinds => Kinds::Only(kinds.iter().cloned().collect()),
        };
        let secret = match &self.webhook_secret {
            None => None,
            Some(path) => {
                let told = || format!("--webhook-secret {}", path.display());
                Some(Secret::parse(&std::fs::read(path).with_context(told)?).with_context(told)?)
            }
        };
        let commands = self.hook.iter().map(|line| Ok(Hook::command(line).context("--hook")?.of(kinds())));
        let webhooks =
            self.webhook.iter().map(|url| Ok(Hook::webhook(url, secret.clone()).context("--webhook")?.of(kinds())));
        commands.chain(webhooks).collect()
    }
}
