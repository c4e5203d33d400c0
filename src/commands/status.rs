//! `aquifer status`: this machine's agent, for people and programs.

mod picture;
mod rollout;

use super::StopSignal;
use crate::agent::view::View;
use crate::output::{Reader, plain, print_json, print_line, tell};
use anyhow::{Context, Result};
use aquifer_engine::ClientError;
use serde_json::Value;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const WATCH_INTERVAL: Duration = Duration::from_millis(500);

pub(crate) async fn run(config: Option<&Path>, socket: Option<PathBuf>, watch: bool, json: bool) -> Result<ExitCode> {
    let socket = super::release::socket(config, socket)?;
    if watch {
        let (mut stop, mut watch) = (StopSignal::new()?, Watch::new(json));
        tokio::select! {
            () = stop.wait() => {}
            ended = watch.run(&socket) => ended?,
        }
    } else {
        let state = ask(&socket).await??;
        match json {
            true => print_json(&state)?,
            false => print_line(&picture::of(&view(state)?))?,
        };
    }
    Ok(ExitCode::SUCCESS)
}

async fn ask(socket: &Path) -> Result<Result<Value, ClientError>> {
    let socket = socket.to_path_buf();
    Ok(tokio::task::spawn_blocking(move || aquifer_engine::request_status(&socket)).await?)
}

fn view(state: Value) -> Result<View> {
    serde_json::from_value(state).context("the agent is of another version")
}

/// Looks again and again.
#[derive(Debug)]
struct Watch {
    json: bool,
    terminal: bool,
    /// The last picture, and since when it has been the last because the agent is away.
    last: Option<String>,
    away_since: Option<Instant>,
}

impl Watch {
    fn new(json: bool) -> Self {
        Watch { json, terminal: !json && std::io::stdout().is_terminal(), last: None, away_since: None }
    }

    /// Returns when nobody reads any more. That there is no agent is an error only at first: one
    /// that was there may be restarted.
    async fn run(&mut self, socket: &Path) -> Result<()> {
        loop {
            let reader = match ask(socket).await? {
                Ok(state) => self.on_state(state)?,
                Err(error) if self.last.is_none() => return Err(error.into()),
                Err(error) => self.on_absence(&error)?,
            };
            if reader == Reader::Gone {
                return Ok(());
            }
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    }

    fn on_state(&mut self, state: Value) -> Result<Reader> {
        let text = if self.json { state.to_string() } else { picture::of(&view(state)?) };
        self.away_since = None;
        let reader = match self.terminal {
            true => print_line(&on_screen(&text)),
            false => print_line(&text),
        };
        self.last = Some(text);
        reader
    }

    fn on_absence(&mut self, error: &ClientError) -> Result<Reader> {
        let first = self.away_since.is_none();
        let seconds = self.away_since.get_or_insert_with(Instant::now).elapsed().as_secs();
        let reason = plain(&error.to_string());
        if self.terminal {
            let last = self.last.as_deref().unwrap_or_default();
            return print_line(&on_screen(&format!(
                "The agent is away; looking for it. What it was {seconds} s ago follows.\n{reason}\n\n{last}"
            )));
        }
        if first {
            tell(&format!("aquifer: the agent is away ({reason}); looking for it"));
        }
        Ok(Reader::There)
    }
}

/// `text` in place of what the terminal shows.
fn on_screen(text: &str) -> String {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok();
    // Terminals that do not know their size say zero.
    let size = size.map(|s| (usize::from(s.ws_col), usize::from(s.ws_row))).filter(|(c, r)| *c > 0 && *r > 0);
    picture::frame(text, size.unwrap_or((usize::MAX, usize::MAX)))
}
