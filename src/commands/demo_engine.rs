//! The demo's engine: a process of its own that registers memory with an agent, as an inference
//! engine would, and can be asked what that memory holds.
//!
//! It answers JSON lines on its output: `hydrated` and `switched` events as they come, and, for
//! every line on its input, `memory`: the BLAKE3 hash of each tensor's bytes as they lie there.

use crate::cli::DemoEngine;
use crate::errors::reasons;
use crate::output;
use anyhow::{Context, Result};
use aquifer_core::ChannelName;
use aquifer_engine::{ClientError, EngineClient, Failure, Kind, ReleaseInfo, Switch, TensorTable};
use aquifer_memory::{Mapping, Span};
use serde_json::{Map, Value, json};
use std::io::BufRead;
use std::process::ExitCode;
use std::sync::Arc;

pub(crate) fn run(args: DemoEngine) -> Result<ExitCode> {
    let channel: ChannelName = args.channel.parse()?;
    let mut client = EngineClient::connect(&args.socket, &args.name, &channel)?;
    let tensors = Arc::new(client.tensors()?);
    let bytes = tensors.region_bytes().context("the tensors do not fit 64 bits")?;
    let (mapping, fd) = Mapping::memfd("aquifer-demo-engine", bytes)?;
    client.register(0, fd, bytes, true)?;
    client.bind_row(tensors.clone(), 0)?;
    client.hydrate()?;
    let memory = mapping.span();
    std::thread::spawn(move || answer(&memory, &tensors));
    client.run(&mut Reporter)?;
    Ok(ExitCode::SUCCESS)
}

/// Whoever started this engine and does not listen any more is about to end it.
fn say(value: &Value) {
    let _ = output::print_json(value);
}

/// Answers each line of input until the input ends, and then ends the process: whoever started
/// this engine is gone.
fn answer(memory: &Span, tensors: &TensorTable) {
    for _ in std::io::stdin().lock().lines().map_while(Result::ok) {
        match hashes(memory, tensors) {
            Ok(tensors) => say(&json!({"event": "memory", "tensors": tensors})),
            Err(error) => say(&json!({"event": "error", "message": reasons(&error)})),
        }
    }
    std::process::exit(0);
}

fn hashes(memory: &Span, tensors: &TensorTable) -> Result<Map<String, Value>> {
    let hash = |(name, kind, offset): (&str, &Kind, u64)| {
        let bytes = memory.slice(offset..offset + kind.bytes)?;
        Ok((name.to_string(), Value::from(bytes.hash().context("cannot read memory")?.to_string())))
    };
    tensors.places().flatten().map(hash).collect()
}

struct Reporter;

impl Reporter {
    fn tell(event: &str, release: &ReleaseInfo) {
        say(&json!({"event": event, "manifest": release.manifest.to_string(), "seq": release.seq}));
    }
}

impl Switch for Reporter {
    fn hydrated(&mut self, release: &ReleaseInfo) {
        Self::tell("hydrated", release);
    }

    fn pause(&mut self, release: &ReleaseInfo) -> Result<(), String> {
        Self::tell("paused", release);
        Ok(())
    }

    fn resume(&mut self, release: &ReleaseInfo) -> Result<(), String> {
        Self::tell("switched", release);
        Ok(())
    }

    fn failed(&mut self, failure: &Failure) {
        say(&json!({"event": "failed", "code": failure.code, "message": failure.message}));
    }

    fn lost(&mut self, error: &ClientError) {
        tracing::debug!("the agent is gone ({error}); waiting for it to come back");
    }
}
