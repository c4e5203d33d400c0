//! A recorded life, lived again.

use super::frame::Reader;
use super::{Decided, Digest, Head, RecordError, Step};
use crate::io::Output;
use crate::limits::RECORD_FRAME_BYTES_MAX;
use crate::node::Node;
use aquifer_core::codec::{self, Kind};
use aquifer_core::{NodeId, Time};
use bincode::Decode;
use std::fmt::{self, Debug, Write};

/// Longest description of one event or decision in a [`Difference`], in bytes, and most of them.
const TOLD_BYTES_MAX: usize = 240;
const TOLD_MAX: usize = 16;

/// Bytes of a recording taken up at once.
const PIECE_BYTES: usize = 1 << 20;

/// What came of a replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub node: NodeId,
    pub name: String,
    /// The program that was recorded.
    pub version: String,
    /// Inputs and time-outs in the recording.
    pub events: u64,
    /// Outputs of the node's beginning and of all events up to the first difference.
    pub decisions: u64,
    /// The node's beginning, and its last event.
    pub begin: Time,
    pub end: Time,
    /// Where the replayed node first decided otherwise. From there on nothing is compared: the two
    /// have parted.
    pub difference: Option<Difference>,
    /// Bytes of an event that was cut off in the middle, which is how a kill leaves a recording.
    pub torn_bytes: usize,
}

/// An event that led to other decisions than the recorded ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Counts from one; zero is the node's beginning.
    pub event: u64,
    pub at: Time,
    pub told: String,
    /// How many outputs it led to then.
    pub recorded: u32,
    /// What it led to now: the count, and the first few.
    pub replayed: u32,
    pub outputs: Vec<String>,
    /// When the node wants to be woken now, and why.
    pub timeout: Option<(Time, &'static str)>,
}

/// Replays a whole recording.
pub fn replay(recording: &[u8]) -> Result<Report, RecordError> {
    let mut replay = Replay::default();
    for piece in recording.chunks(PIECE_BYTES) {
        replay.feed(piece, &mut |_, _| {})?;
    }
    replay.finish()
}

/// The first word of a value's `Debug`: for an enum, the name of its variant.
pub fn variant(value: &impl Debug) -> String {
    let told = brief(value, 64);
    told.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_string()
}

/// Replays a recording as it is read.
#[derive(Debug, Default)]
pub struct Replay {
    reader: Reader,
    life: Option<Life>,
}

#[derive(Debug)]
struct Life {
    node: Node,
    digest: Digest,
    report: Report,
}

impl Replay {
    /// Takes the next bytes of the recording. Each thing that the node decides again is shown to
    /// `decided`, with its time.
    pub fn feed(&mut self, bytes: &[u8], decided: &mut dyn FnMut(Time, &Output)) -> Result<(), RecordError> {
        self.reader.push(bytes);
        while let Some((offset, body)) = self.reader.next()? {
            match &mut self.life {
                None => {
                    let (head, then) = read::<(Head, Decided)>(offset, body)?;
                    self.life = Some(Life::begin(head, then, decided));
                }
                Some(life) => life.step(offset, read::<Step>(offset, body)?, decided)?,
            }
        }
        Ok(())
    }

    /// To be called when all bytes have been fed.
    pub fn finish(self) -> Result<Report, RecordError> {
        let report = self.life.ok_or(RecordError::Empty)?.report;
        Ok(Report { torn_bytes: self.reader.torn_bytes(), ..report })
    }
}

impl Life {
    fn begin(head: Head, then: Decided, decided: &mut dyn FnMut(Time, &Output)) -> Self {
        let at = head.at;
        let report = Report {
            node: head.me,
            name: head.name.clone(),
            version: head.version.clone(),
            events: 0,
            decisions: 0,
            begin: at,
            end: at,
            difference: None,
            torn_bytes: 0,
        };
        let mut life = Life { node: head.node(), digest: Digest::default(), report };
        life.compare(at, "its beginning", then, decided);
        life
    }

    fn step(&mut self, offset: u64, step: Step, decided: &mut dyn FnMut(Time, &Output)) -> Result<(), RecordError> {
        let Step { at, event, decided: then } = step;
        if at < self.report.end {
            return Err(RecordError::Malformed { offset, reason: "its time lies before the last one's".into() });
        }
        self.report.events += 1;
        self.report.end = at;
        if self.report.difference.is_none() {
            let told = brief(&event, TOLD_BYTES_MAX);
            event.happens_to(&mut self.node, at);
            self.compare(at, &told, then, decided);
        }
        Ok(())
    }

    fn compare(&mut self, at: Time, told: &str, then: Decided, decided: &mut dyn FnMut(Time, &Output)) {
        let mut outputs = Vec::new();
        let now = self.digest.drain(&mut self.node, |output| {
            decided(at, &output);
            if outputs.len() < TOLD_MAX {
                outputs.push(output);
            }
        });
        self.report.decisions += u64::from(now.outputs);
        if now != then {
            self.report.difference = Some(Difference {
                event: self.report.events,
                at,
                told: told.to_string(),
                recorded: then.outputs,
                replayed: now.outputs,
                outputs: outputs.iter().map(|o| brief(o, TOLD_BYTES_MAX)).collect(),
                timeout: self.node.poll_timeout(),
            });
        }
    }
}

fn read<T: Decode<()>>(offset: u64, body: &[u8]) -> Result<T, RecordError> {
    let malformed = |e: codec::CodecError| RecordError::Malformed { offset, reason: e.to_string() };
    codec::decode::<_, RECORD_FRAME_BYTES_MAX>(Kind::RecordingFrame, body).map_err(malformed)
}

/// The beginning of a value's `Debug`, which may be as long as a manifest.
fn brief(value: &impl Debug, bytes_max: usize) -> String {
    struct Short(String, usize);
    impl Write for Short {
        fn write_str(&mut self, s: &str) -> fmt::Result {
            let room = self.1.saturating_sub(self.0.len());
            let fits = s.len() <= room;
            self.0.extend(s.chars().take(room));
            if fits { Ok(()) } else { Err(fmt::Error) }
        }
    }
    let mut short = Short(String::new(), bytes_max);
    if write!(short, "{value:?}").is_err() {
        short.0.push('…');
    }
    short.0
}
