//! `/metrics`, for Prometheus: what there is ([`METRICS`], from which `docs/metrics.md` is made), and its values.

use crate::agent::Handle;
use crate::agent::numbers::Numbers;
use crate::agent::tally::Lane;
use crate::agent::view::View;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus::core::Collector;
use prometheus::{Encoder, GaugeVec, IntCounterVec, Opts, Registry, TextEncoder};
use std::collections::BTreeMap;
use std::time::Duration;

/// A metric as it is documented.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metric {
    name: &'static str,
    kind: Kind,
    labels: &'static [&'static str],
    help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    /// Kept by [`crate::agent::numbers::Meters`], as counters with [`Kind::Counter`] and no row here are not.
    Histogram,
    /// Also kept there.
    Counted,
}

const fn metric(kind: Kind, name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind, labels, help }
}

const LANE: &[&str] = &["transport", "boundary", "channel"];
const CHANNEL: &[&str] = &["channel"];

/// All there is, in the order it is documented. Names are by Prometheus' conventions.
const METRICS: &[Metric] = &[
    metric(Kind::Gauge, "aquifer_build_info", &["version"], "Always 1: the program's version is in the label."),
    metric(Kind::Gauge, "aquifer_uptime_seconds", &[], "Since this process began."),
    metric(
        Kind::Gauge,
        "aquifer_ready",
        &[],
        "1 while every registered engine serves exactly the release it should, as /readyz says.",
    ),
    metric(Kind::Gauge, "aquifer_draining", &[], "1 from when the node was asked to leave."),
    metric(
        Kind::Gauge,
        "aquifer_engines",
        &["channel", "state"],
        "Engines that are registered, and of those the ones that are ready (state: registered, ready).",
    ),
    metric(
        Kind::Counter,
        "aquifer_received_bytes_total",
        LANE,
        "Verified chunk bytes that came from other nodes. transport: tcp, shm, rdma; boundary: the outermost that they crossed by the nodes' labels: none, host, rack, zone.",
    ),
    metric(
        Kind::Counter,
        "aquifer_sent_bytes_total",
        LANE,
        "Chunk bytes that went to other nodes, with the same labels; chunks that were cut off count as far as they came.",
    ),
    metric(Kind::Counter, "aquifer_chunks_verified_total", &[], "Chunks that were fetched and hash to their name."),
    metric(
        Kind::Counter,
        "aquifer_chunks_refused_total",
        &[],
        "Chunks that were fetched and do not hash to their name.",
    ),
    metric(
        Kind::Counter,
        "aquifer_chunks_refetched_total",
        &[],
        "Reads of a chunk of which an earlier read had failed, was revoked, or brought wrong bytes.",
    ),
    metric(
        Kind::Counter,
        "aquifer_chunks_found_total",
        &[],
        "Chunks that were in place after a start, and were not fetched.",
    ),
    metric(Kind::Counter, "aquifer_reads_failed_total", &[], "Reads of which nothing came."),
    metric(
        Kind::Histogram,
        "aquifer_phase_seconds",
        &["channel", "phase"],
        "From when a release was heard of until its node was in each phase (planned, fetched, verified, staged, paused, checked, ready, failed, rolled_back).",
    ),
    metric(
        Kind::Histogram,
        "aquifer_engine_pause_seconds",
        &["channel", "engine"],
        "From when an engine said that it has paused until it said that it serves again. Gone when the engine is.",
    ),
    metric(Kind::Counter, "aquifer_grants_total", &[], "Grants given to readers; each is of one chunk or more."),
    metric(Kind::Counter, "aquifer_leases_granted_total", &[], "Chunks lent to readers."),
    metric(Kind::Counter, "aquifer_leases_revoked_total", &[], "Of those, taken back because the bytes had to move."),
    metric(Kind::Counter, "aquifer_leases_expired_total", &[], "Of those, not returned in time."),
    metric(Kind::Gauge, "aquifer_leased_bytes", &[], "Bytes lent to readers now."),
    metric(Kind::Gauge, "aquifer_leased_bytes_limit", &[], "Most bytes lent at once (--upload-window)."),
    metric(
        Kind::Gauge,
        "aquifer_peers",
        &["state"],
        "Other nodes: known, connected, avoided (for wrong or failed reads), draining. One may be several of these.",
    ),
    metric(
        Kind::Counted,
        "aquifer_members_left_total",
        &["how"],
        "Nodes that left the mesh: with a goodbye, or in silence (they died, or the network parted).",
    ),
    metric(Kind::Gauge, "aquifer_release_sequence", CHANNEL, "Number of the release that is for this node; 0: none."),
    metric(
        Kind::Gauge,
        "aquifer_served_release_sequence",
        CHANNEL,
        "Number of the last release that was served here, or held whole on a node without engines.",
    ),
    metric(
        Kind::Gauge,
        "aquifer_release_lag_seconds",
        CHANNEL,
        "Since when there is a release that is not served here, or held whole; 0: there is none, or nothing here is to have it.",
    ),
    metric(Kind::Gauge, "aquifer_wanted_bytes", CHANNEL, "What this node needs of the release; 0: not known yet."),
    metric(Kind::Gauge, "aquifer_held_bytes", CHANNEL, "Of that, what is here and verified."),
    metric(
        Kind::Gauge,
        "aquifer_hydration_eta_seconds",
        CHANNEL,
        "Until the rest is here, as it goes now. Absent while nothing is fetched, or nothing moves.",
    ),
    metric(
        Kind::Counter,
        "aquifer_releases_rejected_total",
        &["reason"],
        "Releases that were refused: forged, by an untrusted key, or older than what was accepted.",
    ),
    metric(
        Kind::Counted,
        "aquifer_check_failures_total",
        CHANNEL,
        "Releases that an engine here could not take, or that its own check refused.",
    ),
    metric(
        Kind::Counted,
        "aquifer_rollbacks_total",
        CHANNEL,
        "Releases after which the engines here went back to what they had served.",
    ),
    metric(
        Kind::Gauge,
        "aquifer_channel_problem",
        CHANNEL,
        "1 while something that a person must mend keeps a release from completing; /v1/channels says what.",
    ),
    metric(
        Kind::Gauge,
        "aquifer_store_bytes",
        &["store"],
        "Chunk bytes kept, in memory beside engines' own and on disk.",
    ),
    metric(Kind::Gauge, "aquifer_store_limit_bytes", &["store"], "Most of those; absent: the disk is the limit."),
    metric(
        Kind::Gauge,
        "aquifer_queue_depth",
        &["queue"],
        "What waits: jobs on the thread pool (hashing, copying, disks), events for the agent's task, events for hooks.",
    ),
    metric(Kind::Gauge, "aquifer_queue_limit", &["queue"], "How many of those are worked on at once, or may wait."),
    metric(
        Kind::Counter,
        "aquifer_hook_deliveries_total",
        &["hook", "result"],
        "Attempts to deliver an event to a hook or webhook (result: ok, failed).",
    ),
    metric(Kind::Gauge, "aquifer_hook_pending", &["hook"], "Events that are yet to be delivered."),
    metric(Kind::Gauge, "aquifer_hook_oldest_seconds", &["hook"], "How long the oldest of those has waited."),
    metric(
        Kind::Counter,
        "aquifer_hook_dropped_total",
        &["hook"],
        "Events given up because too many waited, or the receiver said that it is gone.",
    ),
    metric(
        Kind::Gauge,
        "aquifer_channel_replicas",
        &["channel", "state"],
        "Nodes of the mesh as this one knows them: hydrated, hydrating, ready. All nodes tell about the same: take the max or the average, not the sum.",
    ),
    metric(
        Kind::Gauge,
        "aquifer_mesh_spare_upload_bytes_per_second",
        &[],
        "What nodes that hold releases could send more, as this node knows it.",
    ),
];

/// The text of a metric; empty if there is none of that name.
pub(crate) fn help(name: &str) -> &'static str {
    METRICS.iter().find(|metric| metric.name == name).map_or("", |metric| metric.help)
}

/// All metrics, in Prometheus' text format. docs/metrics.md describes them.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(State(agent): State<Handle>) -> Response {
    match scrape(&agent) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => super::routes::refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn scrape(agent: &Handle) -> Result<Vec<u8>, prometheus::Error> {
    let registry = Registry::new();
    for kept in agent.meters.collectors() {
        registry.register(kept)?;
    }
    let mut values = Values::default();
    values.of_view(&agent.view.borrow());
    // As a probe is answered at this moment.
    values.count("aquifer_ready", &[], agent.readiness.borrow().ready.into());
    values.of_numbers(&agent.numbers.borrow());
    values.of_hooks(agent);
    values.register(&registry)?;
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(text)
}

/// Values by metric and labels.
#[derive(Debug, Default)]
struct Values(BTreeMap<&'static str, Vec<(Vec<String>, f64)>>);

impl Values {
    fn put(&mut self, name: &'static str, labels: &[&str], value: f64) {
        self.0.entry(name).or_default().push((labels.iter().map(|l| l.to_string()).collect(), value));
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus has floats")]
    fn count(&mut self, name: &'static str, labels: &[&str], value: u64) {
        self.put(name, labels, value as f64);
    }

    fn of_view(&mut self, view: &View) {
        self.put("aquifer_build_info", &[&view.version], 1.0);
        self.put("aquifer_uptime_seconds", &[], view.uptime_seconds);
        self.count("aquifer_draining", &[], view.draining.into());
        for channel in &view.channels {
            let engines = || view.engines.iter().filter(|e| e.channel == channel.channel);
            let name = channel.channel.as_str();
            self.count("aquifer_engines", &[name, "registered"], engines().count() as u64);
            self.count("aquifer_engines", &[name, "ready"], engines().filter(|e| e.ready).count() as u64);
            self.count("aquifer_channel_problem", &[name], channel.problem.is_some().into());
        }
        let traffic = &view.traffic;
        self.count("aquifer_chunks_verified_total", &[], traffic.chunks_verified);
        self.count("aquifer_chunks_refused_total", &[], traffic.chunks_corrupt);
        self.count("aquifer_chunks_found_total", &[], traffic.chunks_found);
        self.count("aquifer_reads_failed_total", &[], traffic.reads_failed);
        self.count("aquifer_leased_bytes", &[], view.leased_bytes);
        let peers = &view.peers;
        self.count("aquifer_peers", &["known"], peers.len() as u64);
        self.count("aquifer_peers", &["connected"], peers.iter().filter(|p| p.connected).count() as u64);
        self.count("aquifer_peers", &["avoided"], peers.iter().filter(|p| p.avoided).count() as u64);
        let rejected = &view.rejected_releases;
        for (reason, count) in
            [("forged", rejected.forged), ("untrusted", rejected.untrusted), ("older", rejected.older)]
        {
            self.count("aquifer_releases_rejected_total", &[reason], count);
        }
        self.count("aquifer_store_bytes", &["memory"], view.memory_store_bytes);
        self.count("aquifer_store_bytes", &["disk"], view.disk_store_bytes);
    }

    fn of_numbers(&mut self, numbers: &Numbers) {
        let counters = &numbers.counters;
        self.count("aquifer_chunks_refetched_total", &[], counters.chunks_refetched);
        self.count("aquifer_grants_total", &[], counters.grants);
        self.count("aquifer_leases_granted_total", &[], counters.leases_granted);
        self.count("aquifer_leases_revoked_total", &[], counters.leases_revoked);
        self.count("aquifer_leases_expired_total", &[], counters.leases_expired);
        self.lanes("aquifer_received_bytes_total", &numbers.received);
        self.lanes("aquifer_sent_bytes_total", &numbers.sent);
        self.count("aquifer_leased_bytes_limit", &[], numbers.leased_bytes_limit);
        self.count("aquifer_store_limit_bytes", &["memory"], numbers.memory_limit_bytes);
        if let Some(limit) = numbers.disk_limit_bytes {
            self.count("aquifer_store_limit_bytes", &["disk"], limit);
        }
        for (queue, (depth, limit)) in &numbers.queues {
            self.count("aquifer_queue_depth", &[queue], *depth);
            self.count("aquifer_queue_limit", &[queue], *limit);
        }
        for (name, channel) in &numbers.channels {
            self.count("aquifer_release_sequence", &[name], channel.seq);
            self.count("aquifer_served_release_sequence", &[name], channel.served_seq);
            self.put("aquifer_release_lag_seconds", &[name], channel.lag.as_secs_f64());
            self.count("aquifer_wanted_bytes", &[name], channel.wanted_bytes);
            self.count("aquifer_held_bytes", &[name], channel.held_bytes);
            if let Some(eta) = channel.eta_seconds {
                self.put("aquifer_hydration_eta_seconds", &[name], eta);
            }
            self.count("aquifer_channel_replicas", &[name, "hydrated"], channel.replicas_hydrated);
            self.count("aquifer_channel_replicas", &[name, "hydrating"], channel.replicas_hydrating);
            self.count("aquifer_channel_replicas", &[name, "ready"], channel.replicas_ready);
        }
        self.count("aquifer_peers", &["draining"], numbers.peers_draining);
        self.count("aquifer_mesh_spare_upload_bytes_per_second", &[], numbers.spare_upload_bytes_per_s);
    }

    fn lanes(&mut self, name: &'static str, lanes: &BTreeMap<Lane, u64>) {
        for (lane, bytes) in lanes {
            let channel = lane.channel.as_ref().map(aquifer_core::ChannelName::as_str).unwrap_or_default();
            self.count(name, &[lane.way.name(), lane.boundary, channel], *bytes);
        }
    }

    fn of_hooks(&mut self, agent: &Handle) {
        let stats = agent.hooks.stats();
        self.count("aquifer_queue_depth", &["hooks"], stats.iter().map(|s| s.pending as u64).sum());
        self.count("aquifer_queue_limit", &["hooks"], aquifer_hooks::limits::PENDING_EVENTS_MAX as u64);
        for hook in stats {
            let name = hook.name.as_str();
            self.count("aquifer_hook_deliveries_total", &[name, "ok"], hook.delivered);
            self.count("aquifer_hook_deliveries_total", &[name, "failed"], hook.failed);
            self.count("aquifer_hook_pending", &[name], hook.pending as u64);
            self.put("aquifer_hook_oldest_seconds", &[name], hook.oldest.unwrap_or(Duration::ZERO).as_secs_f64());
            self.count("aquifer_hook_dropped_total", &[name], hook.dropped);
        }
    }

    fn register(self, registry: &Registry) -> Result<(), prometheus::Error> {
        for metric in METRICS {
            let Some(values) = self.0.get(metric.name) else { continue };
            let opts = Opts::new(metric.name, metric.help);
            let collector: Box<dyn Collector> = match metric.kind {
                Kind::Counter => {
                    let counters = IntCounterVec::new(opts, metric.labels)?;
                    for (labels, value) in values {
                        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it was a u64")]
                        counters.get_metric_with_label_values(labels)?.inc_by(*value as u64);
                    }
                    Box::new(counters)
                }
                Kind::Gauge | Kind::Histogram | Kind::Counted => {
                    let gauges = GaugeVec::new(opts, metric.labels)?;
                    for (labels, value) in values {
                        gauges.get_metric_with_label_values(labels)?.set(*value);
                    }
                    Box::new(gauges)
                }
            };
            registry.register(collector)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    fn documentation() -> String {
        let mut text = String::from(
            "# Metrics\n\n<!-- made from src/http/metrics.rs by `AQUIFER_BLESS=1 cargo test --bin aquifer documented`; CI compares -->\n\n\
             An agent answers `GET /metrics` in Prometheus' text format. Durations are seconds, sizes bytes; counters \
             begin at zero with each process. `docs/operate.md` says which alerts are made of them.\n\n\
             | metric | type | labels | what it tells |\n|---|---|---|---|\n",
        );
        for metric in METRICS {
            let kind = match metric.kind {
                Kind::Counter | Kind::Counted => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            let labels: Vec<String> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
            let _ = writeln!(text, "| `{}` | {kind} | {} | {} |", metric.name, labels.join(", "), metric.help);
        }
        text
    }

    #[test]
    fn metrics_are_documented_as_they_are() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        if std::env::var_os("AQUIFER_BLESS").is_some() {
            std::fs::write(path, documentation()).unwrap();
        }
        let known = std::fs::read_to_string(path).unwrap_or_default();
        assert!(known == documentation(), "docs/metrics.md is not what METRICS says: it tells how to make it anew");
    }

    #[test]
    fn names_follow_the_conventions() {
        for metric in METRICS {
            assert!(metric.name.starts_with("aquifer_") && !metric.help.is_empty(), "{}", metric.name);
            let counts = matches!(metric.kind, Kind::Counter | Kind::Counted);
            assert_eq!(counts, metric.name.ends_with("_total"), "{}", metric.name);
        }
    }

    #[test]
    fn what_has_a_value_is_in_the_table() {
        let mut values = Values::default();
        values.of_view(&View { channels: vec![Default::default()], ..View::default() });
        let mut numbers = Numbers { disk_limit_bytes: Some(1), ..Numbers::default() };
        let channel = crate::agent::numbers::ChannelNumbers { eta_seconds: Some(1.0), ..Default::default() };
        numbers.channels.insert("a/b".into(), channel);
        numbers.queues.insert("jobs", (1, 2));
        values.of_numbers(&numbers);
        for (name, of) in &values.0 {
            let metric = METRICS.iter().find(|m| m.name == *name).unwrap_or_else(|| panic!("{name} is not in METRICS"));
            assert!(of.iter().all(|(labels, _)| labels.len() == metric.labels.len()), "{name}");
        }
        let registry = Registry::new();
        values.register(&registry).unwrap();
    }
}
