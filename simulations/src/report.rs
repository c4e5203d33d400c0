//! Runs as a table, as CSV and as a picture.

use crate::outcome::Outcome;
use crate::svg::{Panel, colour, picture};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

const COLUMNS: [&str; 12] = [
    "scenario", "strategy", "seed", "N", "chunks", "bound s", "last s", "ratio", "seed/F", "uplink", "events", "wall s",
];

/// Baselines up to this many times the bound are shown to their end in pictures; a guess.
const IN_VIEW_RATIO_MAX: f64 = 4.0;

/// One row per run, aligned; "-" where there is no figure.
pub fn table(runs: &[Outcome]) -> String {
    let mut rows = vec![COLUMNS.map(str::to_string)];
    rows.extend(runs.iter().map(row));
    let width = |c: usize| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS.len()).map(width).collect();
    let cell = |(c, text): (usize, &String)| {
        let w = widths[c];
        if c < 2 { format!("{text:<w$}") } else { format!("{text:>w$}") }
    };
    let lines =
        rows.iter().map(|r| r.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_string());
    lines.collect::<Vec<_>>().join("\n")
}

fn row(run: &Outcome) -> [String; 12] {
    let figure = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
    [
        run.scenario.clone(),
        run.strategy.clone(),
        run.seed.to_string(),
        run.pullers.to_string(),
        run.chunks.to_string(),
        figure(Some(run.lower_bound_s), 3),
        figure(run.last_healthy_s, 3),
        figure(run.ratio, 3),
        figure(run.last_healthy_s.map(|_| run.seed_uploads), 3),
        figure(run.uplink_ratio, 3),
        run.events.to_string(),
        format!("{:.1}", run.wall_s),
    ]
}

/// Writes runs.csv, a nodes file for each run, and a picture for each group of runs of one case.
pub fn write(dir: &Path, runs: &[Outcome]) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    save(&dir.join("runs.csv"), &runs_csv(runs))?;
    for run in runs {
        save(&dir.join(format!("{}-{}-nodes.csv", stem(run), run.strategy)), &nodes_csv(run))?;
    }
    for run in runs {
        save(&dir.join(format!("{}-{}-held.csv", stem(run), run.strategy)), &held_csv(run))?;
    }
    for group in runs.chunk_by(|a, b| stem(a) == stem(b)) {
        save(&dir.join(format!("{}.svg", stem(&group[0]))), &svg(group))?;
    }
    Ok(())
}

/// Three diagrams of runs of the same case; the first run is the one the band is drawn for.
pub fn svg(runs: &[Outcome]) -> String {
    let runs: Vec<&Outcome> = runs.iter().filter(|r| r.last_healthy_s.is_some()).collect();
    // A strategy that takes many times the bound would squeeze the others: its line leaves the picture.
    let shown = runs.iter().filter(|r| r.ratio.is_some_and(|ratio| ratio <= IN_VIEW_RATIO_MAX));
    let bound = runs.first().map_or(1e-6, |r| r.lower_bound_s.max(1e-6));
    let x_max = shown.filter_map(|r| r.last_healthy_s).fold(bound, f64::max) * 1.05;
    picture(&[held(&runs, x_max), hydrated(&runs, x_max), classes(&runs)])
}

fn held(runs: &[&Outcome], x_max: f64) -> Panel {
    let title =
        runs.first().map_or(String::new(), |r| format!("Chunks held over time: {}, N = {}", r.scenario, r.pullers));
    let most = |r: &&Outcome| r.samples.iter().map(|s| s.max).max().unwrap_or(0);
    let y_max = f64::from(runs.iter().map(most).max().unwrap_or(0).max(1));
    let mut panel = Panel::new(0, &title, "seconds since the release", "wanted chunks per node", x_max, y_max);
    panel.x_ticks();
    if let Some(run) = runs.first() {
        let band: Vec<_> = run
            .samples
            .iter()
            .filter(|s| s.at_s <= x_max)
            .map(|s| (s.at_s, f64::from(s.min), f64::from(s.max)))
            .collect();
        panel.band(&band, colour(0));
    }
    for (i, run) in runs.iter().enumerate() {
        let nodes = run.nodes.iter().filter(|n| n.healthy).count().max(1) as f64;
        let mean: Vec<_> = run.samples.iter().map(|s| (s.at_s, s.held as f64 / nodes)).collect();
        panel.line(&mean, colour(i));
        panel.legend(&format!("{}, mean", run.strategy), colour(i));
    }
    if let Some(run) = runs.first() {
        let median: Vec<_> = run.samples.iter().map(|s| (s.at_s, f64::from(s.median))).collect();
        panel.line(&median, "#003a5d");
        panel.legend("median node", "#003a5d");
        panel.legend("least to most", "#cce3f0");
        panel.vertical(run.lower_bound_s, "lower bound");
    }
    panel
}

fn hydrated(runs: &[&Outcome], x_max: f64) -> Panel {
    let mut panel = Panel::new(1, "Time to hydrate", "seconds since the release", "share of nodes, %", x_max, 100.0);
    panel.x_ticks();
    for (i, run) in runs.iter().enumerate() {
        let mut times: Vec<f64> = run.nodes.iter().filter(|n| n.healthy).filter_map(|n| n.finished_s).collect();
        times.sort_by(f64::total_cmp);
        let share = 100.0 / times.len().max(1) as f64;
        let steps = times.iter().enumerate();
        let steps = steps.flat_map(|(k, &t)| [(t, share * k as f64), (t, share * (k + 1) as f64)]);
        let line: Vec<_> = std::iter::once((0.0, 0.0)).chain(steps).collect();
        panel.line(&line, colour(i));
        panel.legend(&run.strategy, colour(i));
    }
    if let Some(run) = runs.first() {
        panel.vertical(run.lower_bound_s, "lower bound");
    }
    panel
}

fn classes(runs: &[&Outcome]) -> Panel {
    let racked = runs.iter().any(|r| r.uplink_ratio.is_some());
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    // What a seed sends may cross a rack's uplink too, so the two views stand side by side.
    let bars = |r: &Outcome| {
        let all = r.same_rack_bytes + r.across_bytes;
        [gib(r.from_seed_bytes), gib(all), gib(r.across_bytes)]
    };
    let y_max = runs.iter().map(|r| bars(r)[1]).fold(1e-6, f64::max) * 1.05;
    let mut panel = Panel::new(2, "Bytes by link class", "", "GiB", 1.0, y_max);
    let views = if racked { 2 } else { 1 };
    let of = runs.len() * views;
    for (i, run) in runs.iter().enumerate() {
        let [seed, all, across] = bars(run);
        panel.bar(i * views, of, 0.0, seed, colour(0));
        panel.bar(i * views, of, seed, all.max(seed), colour(5));
        if racked {
            panel.bar(i * views + 1, of, 0.0, across, colour(1));
            panel.bar(i * views + 1, of, across, all, colour(4));
        }
        panel.bar_label(i, runs.len(), &run.strategy);
    }
    panel.legend("from seeds, holders", colour(0));
    panel.legend("from peers", colour(5));
    if racked {
        panel.legend("across uplinks", colour(1));
        panel.legend("within a rack", colour(4));
    }
    panel
}

fn runs_csv(runs: &[Outcome]) -> String {
    let mut csv = String::from(
        "scenario,strategy,seed,pullers,chunks,checkpoint_bytes,lower_bound_s,last_healthy_s,ratio,seed_uploads,\
         duplicate_bytes,from_seed_bytes,same_rack_bytes,across_bytes,uplink_ratio,bytes_ratio,cap_excess,violations,\
         events,wall_s\n",
    );
    let figure = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
    for r in runs {
        let line = [
            r.scenario.clone(),
            r.strategy.clone(),
            r.seed.to_string(),
            r.pullers.to_string(),
            r.chunks.to_string(),
            r.checkpoint_bytes.to_string(),
            r.lower_bound_s.to_string(),
            figure(r.last_healthy_s),
            figure(r.ratio),
            r.seed_uploads.to_string(),
            r.duplicate_bytes.to_string(),
            r.from_seed_bytes.to_string(),
            r.same_rack_bytes.to_string(),
            r.across_bytes.to_string(),
            figure(r.uplink_ratio),
            r.bytes_ratio().to_string(),
            r.cap_excess.to_string(),
            r.violations.len().to_string(),
            r.events.to_string(),
            format!("{:.3}", r.wall_s),
        ];
        csv.push_str(&line.join(","));
        csv.push('\n');
    }
    csv
}

fn nodes_csv(run: &Outcome) -> String {
    let line = |(i, n): (usize, &crate::outcome::NodeOutcome)| {
        let finished = n.finished_s.map_or(String::new(), |f| f.to_string());
        format!("{i},{finished},{},{},{},{}\n", n.healthy, n.bytes_down, n.bytes_up, n.wanted_bytes)
    };
    let head = "node,finished_s,healthy,bytes_down,bytes_up,wanted_bytes\n";
    head.to_string() + &run.nodes.iter().enumerate().map(line).collect::<String>()
}

/// Wanted chunks held over time: by all measured nodes together, and by the least, the median and
/// the most of them.
fn held_csv(run: &Outcome) -> String {
    let line = |s: &crate::outcome::Sample| format!("{},{},{},{},{}\n", s.at_s, s.held, s.min, s.median, s.max);
    "at_s,held,least,median,most\n".to_string() + &run.samples.iter().map(line).collect::<String>()
}

fn stem(run: &Outcome) -> String {
    format!("{}-n{}-c{}-s{}", run.scenario, run.pullers, run.chunks, run.seed)
}

fn save(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
