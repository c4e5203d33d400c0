//! `aquifer release commit|abort` and `aquifer rollback`: an operator's words, signed here, passed on by the agent.

use super::EXIT_GIVEN_UP;
use super::StopSignal;
use crate::agent::history::{ReleaseView, ReleasesView};
use crate::agent::releasing::statement;
use crate::cli::{Operator, ReleaseCommand, Rollback};
use crate::keys;
use crate::options::{self, AgentOptions, NodeOptions, OperationOptions};
use crate::output::{print_json, print_line};
use anyhow::{Context, Result, bail};
use aquifer_core::{ChannelName, PublisherSecret, Release, ReleaseId, SignedRelease, SignedStatement, Word};
use aquifer_engine::operator::{self, Announce, Draft, Drafted, WordAnswer};
use aquifer_engine::protocol::Request;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// How often it is looked whether enough nodes are prepared.
const LOOK: Duration = Duration::from_millis(20);

pub(crate) async fn run(config: Option<&Path>, command: ReleaseCommand) -> Result<ExitCode> {
    let (word, target) = match command {
        ReleaseCommand::Commit(target) => (Word::Commit, target),
        ReleaseCommand::Abort(target) => (Word::Abort, target),
    };
    let agent = AtAgent::of(config, &target.operator)?;
    let id = agent.waiting(target.seq).await?;
    agent.say(id, word, target.reason.clone()).await?;
    let told = match word {
        Word::Commit => "committed",
        Word::Abort => "given up",
    };
    match target.json {
        true => print_json(&json!({"event": told, "seq": id.seq, "manifest": id.manifest.to_string()}))?,
        false => print_line(&format!("release {} of {} is {told}", id.seq, agent.channel))?,
    };
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn roll_back(config: Option<&Path>, args: Rollback) -> Result<ExitCode> {
    let agent = AtAgent::of(config, &args.operator)?;
    let policy = match args.rollout.is_given() {
        true => Some(hex::encode(args.rollout.policy()?.encode())),
        false => None,
    };
    let draft = Draft { channel: agent.channel.clone(), to: args.to, policy, note: args.note.clone() };
    let drafted: Drafted = agent.ask(Request::Draft(draft)).await?;
    let release = Release::decode(&hex::decode(&drafted.release).context("the agent's draft cannot be read")?)?;
    let signed = SignedRelease::sign(&release, &agent.secret);
    agent.announce(Announce { release: Some(hex::encode(signed.encode())), statement: None }).await?;
    let (seq, to) = (release.seq, release.rolls_back_to.unwrap_or_default());
    let event = json!({"event": "released", "seq": seq, "manifest": release.manifest.to_string(), "rolls_back_to": to});
    match args.json {
        true => print_json(&event)?,
        false => print_line(&format!(
            "{} goes back to release {to} (manifest {}), as release {seq}",
            agent.channel,
            release.manifest.short()
        ))?,
    };
    if !release.policy.is_synchronous() {
        return Ok(ExitCode::SUCCESS);
    }
    let mut stop = StopSignal::new()?;
    tokio::select! {
        () = stop.wait() => bail!("stopped before release {seq} was committed: `aquifer release commit {}` does it", agent.channel),
        done = agent.see_through(release.id(), args.json) => done,
    }
}

/// One agent, asked about one channel, and the key to sign with.
struct AtAgent {
    socket: PathBuf,
    channel: ChannelName,
    secret: PublisherSecret,
}

impl AtAgent {
    fn of(config: Option<&Path>, given: &Operator) -> Result<Self> {
        Ok(AtAgent {
            socket: socket(config, given.socket.clone())?,
            channel: given.channel.parse()?,
            secret: keys::read_publisher_secret(&given.publisher_key)?,
        })
    }

    async fn ask<T: DeserializeOwned + Send + 'static>(&self, request: Request) -> Result<T> {
        ask(&self.socket, request).await
    }

    async fn announce(&self, announce: Announce) -> Result<()> {
        let _done: Value = self.ask(Request::Announce(announce)).await?;
        Ok(())
    }

    async fn say(&self, release: ReleaseId, word: Word, reason: String) -> Result<()> {
        let said = SignedStatement::sign(&statement(self.channel.clone(), release, word, reason), &self.secret);
        self.announce(Announce { release: None, statement: Some(hex::encode(said.encode())) }).await
    }

    /// The release that a word is to be said of: the one of that number, or the newest that waits for one.
    async fn waiting(&self, seq: Option<u64>) -> Result<ReleaseId> {
        let asked = operator::Releases { channel: self.channel.clone() };
        let known: ReleasesView = self.ask(Request::Releases(asked)).await?;
        let fits = |r: &&ReleaseView| match seq {
            Some(seq) => r.seq == seq,
            None => r.waits_for_word(),
        };
        let Some(release) = known.releases.iter().find(fits) else {
            match seq {
                Some(seq) => bail!("release {seq} of {} is not known to this agent", self.channel),
                None => {
                    bail!("no release of {} waits for a word: see `aquifer releases {}`", self.channel, self.channel)
                }
            }
        };
        Ok(ReleaseId { seq: release.seq, manifest: release.manifest.parse()? })
    }

    /// Commits once enough are prepared.
    async fn see_through(&self, id: ReleaseId, json: bool) -> Result<ExitCode> {
        loop {
            let asked = operator::Word { channel: self.channel.clone() };
            match self.ask(Request::Word(asked)).await? {
                WordAnswer::Commit => {
                    self.say(id, Word::Commit, String::new()).await?;
                    match json {
                        true => print_json(&json!({"event": "committed", "seq": id.seq}))?,
                        false => print_line(&format!("release {} is committed", id.seq))?,
                    };
                    return Ok(ExitCode::SUCCESS);
                }
                WordAnswer::Abort { reason } => {
                    self.say(id, Word::Abort, reason.clone()).await?;
                    match json {
                        true => print_json(&json!({"event": "aborted", "seq": id.seq, "reason": reason}))?,
                        false => print_line(&format!("release {} is given up: {reason}", id.seq))?,
                    };
                    return Ok(ExitCode::from(EXIT_GIVEN_UP));
                }
                WordAnswer::None => return Ok(ExitCode::SUCCESS),
                WordAnswer::Wait { .. } => tokio::time::sleep(LOOK).await,
            }
        }
    }
}

pub(super) fn socket(config: Option<&Path>, socket: Option<PathBuf>) -> Result<PathBuf> {
    let given = AgentOptions { socket, ..AgentOptions::default() };
    let (_, options, _) = options::of_agent(config, NodeOptions::default(), given, OperationOptions::default())?;
    Ok(options.socket.unwrap_or_else(options::default_socket))
}

/// Asks an agent without keeping others waiting.
pub(super) async fn ask<T: DeserializeOwned + Send + 'static>(socket: &Path, request: Request) -> Result<T> {
    let socket = socket.to_path_buf();
    Ok(tokio::task::spawn_blocking(move || aquifer_engine::request(&socket, &request)).await??)
}
