//! A bench's processes, seen from inside. Each is this program again, with the name of a [`Part`].
//!
//! It reads JSON lines: what to set up, and then one task after the other; it answers each line
//! with one. It ends when its input does: whoever started it is gone then.

use super::machine::{cpu_seconds, status_bytes};
use super::{cores, disk, files, gossip, gpu, publish, transfer, wire};
use crate::errors::reasons;
use crate::output::print_json;
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, sync_channel};

/// Lines of tasks that wait. Whoever asks waits for the answer, so there are few.
const TASKS_MAX: usize = 16;

/// What a process of a bench does.
pub(super) trait Part: Sized {
    const NAME: &'static str;
    type Setup: Serialize + DeserializeOwned;
    type Ready: Serialize + DeserializeOwned;
    type Task: Serialize + DeserializeOwned;
    type Reply: Serialize + DeserializeOwned;

    /// Everything that is not to be timed.
    fn set_up(setup: Self::Setup) -> Result<(Self, Self::Ready)>;

    fn work(&mut self, task: Self::Task) -> Result<Self::Reply>;
}

/// The answer to a line, on its way to whoever started this process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer<T> {
    Done {
        reply: T,
        /// CPU seconds of the process, when the task began and when it ended.
        cpu_before: f64,
        cpu_after: f64,
        /// The most memory it ever had resident.
        peak_bytes: u64,
    },
    Failed {
        reason: String,
    },
}

/// Is the part called `name` until the input ends.
pub(super) fn run(name: &str) -> Result<ExitCode> {
    match name {
        cores::Cores::NAME => serve::<cores::Cores>(),
        disk::Disk::NAME => serve::<disk::Disk>(),
        files::Maker::NAME => serve::<files::Maker>(),
        files::Files::NAME => serve::<files::Files>(),
        wire::Sender::NAME => serve::<wire::Sender>(),
        wire::Receiver::NAME => serve::<wire::Receiver>(),
        transfer::Holder::NAME => serve::<transfer::Holder>(),
        transfer::Puller::NAME => serve::<transfer::Puller>(),
        publish::Hasher::NAME => serve::<publish::Hasher>(),
        gossip::Answerer::NAME => serve::<gossip::Answerer>(),
        gossip::Asker::NAME => serve::<gossip::Asker>(),
        gpu::Chunks::NAME => serve::<gpu::Chunks>(),
        gpu::Copies::NAME => serve::<gpu::Copies>(),
        gpu::Registrar::NAME => serve::<gpu::Registrar>(),
        other => bail!("a bench has no part called '{other}'"),
    }
}

fn serve<P: Part>() -> Result<ExitCode> {
    let lines = input()?;
    let mut part = None;
    for line in lines {
        let cpu_before = cpu_seconds();
        let answered = match &mut part {
            None => set_up::<P>(&line).map(|(set_up, ready)| {
                part = Some(set_up);
                ready
            }),
            Some(part) => work(part, &line),
        };
        let (cpu_after, peak_bytes) = (cpu_seconds(), status_bytes(None, "VmHWM"));
        let answer = match answered {
            Ok(reply) => Answer::Done { reply, cpu_before, cpu_after, peak_bytes },
            Err(error) => Answer::Failed { reason: reasons(&error) },
        };
        print_json(&serde_json::to_value(answer)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn set_up<P: Part>(line: &str) -> Result<(P, serde_json::Value)> {
    let (part, ready) = P::set_up(serde_json::from_str(line).context("what to set up is not understood")?)?;
    Ok((part, serde_json::to_value(ready)?))
}

fn work<P: Part>(part: &mut P, line: &str) -> Result<serde_json::Value> {
    let task = serde_json::from_str(line).context("a task is not understood")?;
    Ok(json!(part.work(task)?))
}

/// The lines of the input. With it ends the process, also in the middle of a task.
fn input() -> Result<Receiver<String>> {
    let (sender, lines) = sync_channel(TASKS_MAX);
    let read = move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
        std::process::exit(0);
    };
    std::thread::Builder::new().name("bench-input".into()).spawn(read).context("cannot start a thread")?;
    Ok(lines)
}
