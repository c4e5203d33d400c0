//! A node's state as a person reads it.

use crate::agent::view::{ChannelView, EngineView, PeerView, View};
use crate::output::plain;
use crate::units;
use std::collections::BTreeMap;

/// As wide as a terminal is that nobody made wider.
const COLUMNS: usize = 80;

pub(super) fn of(view: &View) -> String {
    let mut picture = Picture::default();
    let ready = match (view.draining, view.is_ready()) {
        (true, _) => "draining",
        (false, true) => "ready",
        (false, false) => "not ready",
    };
    picture.row(
        0,
        [
            format!("{} ({})", plain(&view.name), short(&view.node)),
            format!("aquifer {}", plain(&view.version)),
            format!("up {}", units::seconds(view.uptime_seconds)),
            ready.into(),
        ],
    );
    if !view.is_ready() && !view.readiness.reason.is_empty() {
        let left = view.readiness.eta_seconds.map(|seconds| format!("about {} left", units::seconds(seconds)));
        picture.row(2, [plain(&view.readiness.reason)].into_iter().chain(left));
    }
    if let Some(address) = &view.http {
        picture.row(2, [format!("http://{}", plain(address))]);
    }
    for channel in &view.channels {
        picture.gap();
        picture.channel(channel);
        view.engines.iter().filter(|e| e.channel == channel.channel).for_each(|e| picture.engine(e));
        picture.rollout(view, channel);
    }
    let followed = |engine: &&EngineView| view.channel(&engine.channel).is_some();
    view.engines.iter().filter(|e| !followed(e)).for_each(|e| picture.engine(e));
    picture.gap();
    picture.peers(&view.peers);
    picture.gap();
    picture.traffic(view);
    picture.lines.join("\n")
}

/// `text` as it replaces what a terminal of `(columns, rows)` shows. The cursor comes to rest
/// below it, with the end of the line that is still to be written.
pub(super) fn frame(text: &str, (columns, rows): (usize, usize)) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let most = rows.saturating_sub(1).max(1);
    let mut shown: Vec<String> = lines.iter().take(most).map(|line| line.chars().take(columns).collect()).collect();
    if lines.len() > most {
        let more = format!("... and {} lines more", lines.len() - most + 1);
        shown.truncate(most - 1);
        shown.push(more.chars().take(columns).collect());
    }
    // Home; each line, and clear what is right of it; clear what is below.
    format!("\x1b[H{}\x1b[K\x1b[J", shown.join("\x1b[K\n"))
}

#[derive(Debug, Default)]
pub(super) struct Picture {
    lines: Vec<String>,
}

impl Picture {
    #[cfg(test)]
    pub(super) fn text(&self) -> String {
        self.lines.join("\n")
    }

    fn gap(&mut self) {
        self.lines.push(String::new());
    }

    /// Fields side by side. Those that find no room go on in another line, farther in.
    pub(super) fn row(&mut self, indent: usize, fields: impl IntoIterator<Item = String>) {
        let mut line = " ".repeat(indent);
        let mut is_empty = true;
        for field in fields.into_iter().filter(|field| !field.is_empty()) {
            if !is_empty && line.chars().count() + 2 + field.chars().count() > COLUMNS {
                self.lines.push(std::mem::replace(&mut line, " ".repeat(indent + 4)));
                is_empty = true;
            }
            if !is_empty {
                line.push_str("  ");
            }
            line.push_str(&field);
            is_empty = false;
        }
        self.lines.push(line.trim_end().to_string());
    }

    fn channel(&mut self, c: &ChannelView) {
        let name = format!("channel {}", c.channel);
        match c.manifest.as_str() {
            "" => self.row(0, [name, "no release heard of yet".into()]),
            hash => {
                self.row(0, [name, format!("release {}", c.seq), format!("manifest {}", short(hash)), c.state.clone()]);
            }
        }
        if let Some(share) = (c.chunks_have * 100).checked_div(c.chunks_wanted) {
            let (have, wanted) = (units::bytes(c.bytes_have), units::bytes(c.bytes_wanted));
            let sources = if c.sources > 0 { format!("from {}", count(c.sources, "node")) } else { String::new() };
            self.row(2, [bar(share), format!("{have} of {wanted}"), sources]);
        }
        if !c.note.is_empty() {
            self.row(2, [format!("note: {}", plain(&c.note))]);
        }
        if let Some(problem) = &c.problem {
            self.row(2, [format!("problem: {}", plain(problem))]);
        }
    }

    fn engine(&mut self, e: &EngineView) {
        let serves = match (e.phase.as_str(), e.serving.as_str()) {
            (phase, "") => vec![phase.to_string(), "serves nothing yet".into()],
            ("serving", serving) => vec![format!("serving {}", short(serving))],
            (phase, serving) => vec![phase.to_string(), format!("serves {}", short(serving))],
        };
        let done = (e.chunks_done * 100).checked_div(e.chunks_total).filter(|share| *share < 100).map(bar);
        let who = format!("engine {} (pid {})", plain(&e.name), e.pid);
        self.row(2, [who].into_iter().chain(serves).chain(done));
        if let Some(reason) = &e.reason {
            self.row(4, [plain(reason)]);
        }
    }

    /// Those connected first, then by name.
    fn peers(&mut self, peers: &[PeerView]) {
        let mut peers: Vec<&PeerView> = peers.iter().collect();
        peers.sort_by_key(|p| (!p.connected, &p.name, &p.node));
        self.row(0, [count(peers.len() as u64, "peer")]);
        for p in peers {
            let link = if p.connected { "connected" } else { "known" };
            let head = [
                format!("{:<16}", plain(&p.name)),
                short(&p.node),
                format!("{link:<9}"),
                format!("in {}{}", units::bytes(p.bytes_from), ways(&p.bytes_by)),
                format!("out {}", units::bytes(p.bytes_to)),
            ];
            let avoided = p.avoided.then(|| "avoided".to_string());
            let wrong = (p.corrupt_chunks > 0).then(|| count(p.corrupt_chunks.into(), "wrong chunk"));
            let channels = p.channels.iter().map(|(c, seq, have, wanted)| format!("{c}@{seq} {have}/{wanted}"));
            self.row(2, head.into_iter().chain(avoided).chain(wrong).chain(channels));
        }
    }

    fn traffic(&mut self, view: &View) {
        let t = view.traffic;
        self.row(
            0,
            [
                format!("read {}", units::bytes(t.bytes_in)),
                format!("{} verified", count(t.chunks_verified, "chunk")),
                format!("{} wrong", t.chunks_corrupt),
                format!("{} failed", count(t.reads_failed, "read")),
            ],
        );
        self.row(
            0,
            [
                format!("sent {}", units::bytes(t.bytes_out)),
                format!("{} found in place", count(t.chunks_found, "chunk")),
                format!("data encryption {}", plain(&view.data_encryption)),
            ],
        );
        for port in &view.rdma_ports {
            self.row(0, [format!("RDMA over {}", plain(port))]);
        }
        let r = view.rejected_releases;
        if r.forged + r.untrusted + r.older > 0 {
            self.row(0, [format!("releases refused: {} forged, {} untrusted, {} old", r.forged, r.untrusted, r.older)]);
        }
    }
}

/// ` (shm)`, or how much by each where it was more than one.
fn ways(bytes_by: &BTreeMap<String, u64>) -> String {
    let each = |(way, n): (&String, &u64)| match bytes_by.len() {
        1 => plain(way),
        _ => format!("{} {}", plain(way), units::bytes(*n)),
    };
    match bytes_by.is_empty() {
        true => String::new(),
        false => format!(" ({})", bytes_by.iter().map(each).collect::<Vec<_>>().join(", ")),
    }
}

fn short(hash: &str) -> String {
    plain(hash).chars().take(12).collect()
}

fn bar(percent: u64) -> String {
    let filled = usize::try_from(percent.min(100) / 5).unwrap_or(20);
    format!("[{}{}] {percent:>3} %", "#".repeat(filled), "-".repeat(20 - filled))
}

/// `1 node`, `2 nodes`.
pub(super) fn count(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy() -> View {
        let peer = |name: &str, connected| PeerView {
            node: "5f3a9c21d07e00".into(),
            name: name.into(),
            connected,
            channels: vec![("prod/kimi-k2-instruct".into(), 12, 240_000, 250_000), ("prod/draft".into(), 3, 7, 7)],
            bytes_from: 123 << 30,
            bytes_by: BTreeMap::from([("shm".to_string(), 100 << 30), ("tcp".to_string(), 23 << 30)]),
            bytes_to: 1 << 40,
            avoided: true,
            corrupt_chunks: 1,
            ..PeerView::default()
        };
        let engine = |phase: &str, serving: &str, done| EngineView {
            name: "vllm-0.rank-7".into(),
            pid: 1_234_567,
            channel: "prod/kimi-k2-instruct".into(),
            phase: phase.into(),
            serving: serving.into(),
            chunks_done: done,
            chunks_total: 100,
            ..EngineView::default()
        };
        let channel = ChannelView {
            channel: "prod/kimi-k2-instruct".into(),
            seq: 12,
            manifest: "0d4f1b2a3c4d5e6f".into(),
            note: "evil\x1b[2J".into(),
            state: "fetching".into(),
            chunks_wanted: 200,
            chunks_have: 90,
            bytes_wanted: 1 << 40,
            bytes_have: 450 << 30,
            sources: 17,
            ..ChannelView::default()
        };
        View {
            node: "aa11bb22cc33dd44".into(),
            name: "a-node-with-a-long-name.rack-7.example.net".into(),
            version: "0.1.0".into(),
            uptime_seconds: 200_000.0,
            channels: vec![channel, ChannelView { channel: "prod/draft".into(), ..ChannelView::default() }],
            engines: vec![engine("serving", "0d4f1b2a3c4d5e6f", 100), engine("hydrating", "", 20)],
            peers: vec![peer("b", false), peer("a\nb", true)],
            ..View::default()
        }
    }

    #[test]
    fn eighty_columns_are_enough() {
        let text = of(&busy());
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
        assert!(text.contains("evil\\u{1b}[2J") && text.contains("a\\nb") && !text.contains('\x1b'), "{text}");
        let place = |of: &str| text.find(of).expect(of);
        // An engine is shown with its channel; who is connected comes first.
        assert!(place("engine vllm-0.rank-7") < place("channel prod/draft") && place("a\\nb") < place("known"));
    }

    #[test]
    fn a_word_too_long_for_a_line_has_one_of_its_own() {
        let mut picture = Picture::default();
        picture.row(2, ["a".into(), String::new(), "b".repeat(90), "c".into()]);
        assert_eq!(picture.lines, ["  a".to_string(), format!("      {}", "b".repeat(90)), "      c".to_string()]);
    }

    #[test]
    fn a_frame_fits_its_terminal() {
        let lines = |text: &str, size| {
            let frame = frame(text, size);
            let inner = frame.strip_prefix("\x1b[H").and_then(|f| f.strip_suffix("\x1b[K\x1b[J")).expect("a frame");
            inner.split("\x1b[K\n").map(str::to_string).collect::<Vec<_>>()
        };
        assert_eq!(lines("abc\nd", (2, 3)), ["ab", "d"]);
        assert_eq!(lines("a\nb\nc\nd", (80, 4)), ["a", "b", "... and 2 lines more"]);
        assert_eq!(lines("a\nb", (usize::MAX, usize::MAX)), ["a", "b"]);
        assert_eq!(lines("a\nb", (80, 1)), ["... and 2 lines more"]);
    }
}
