//! What a bench found, as tables for people and as one JSON document.

use super::figures::{Process, Ratio, Series, Spread};
use super::machine::Machine;
use crate::units;
use serde_json::{Value, json};

#[derive(Debug)]
pub(super) struct Report {
    pub(super) bench: &'static str,
    /// What was measured with, by option.
    pub(super) settings: Value,
    pub(super) series: Vec<Series>,
    pub(super) ratios: Vec<Ratio>,
    pub(super) tables: Vec<Table>,
    pub(super) notes: Vec<String>,
}

/// Figures that are no rates.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) name: &'static str,
    pub(super) columns: Vec<&'static str>,
    /// As long as there are columns, each.
    pub(super) rows: Vec<Vec<Value>>,
}

impl Report {
    pub(super) fn new(bench: &'static str, settings: Value) -> Self {
        Report { bench, settings, series: vec![], ratios: vec![], tables: vec![], notes: vec![] }
    }

    pub(super) fn to_json(&self) -> Value {
        let tables: serde_json::Map<String, Value> =
            self.tables.iter().map(|t| (t.name.replace(' ', "_"), t.to_json())).collect();
        json!({
            "bench": self.bench,
            "settings": self.settings,
            "series": self.series.iter().map(Series::to_json).collect::<Vec<_>>(),
            "ratios": self.ratios.iter().map(Ratio::to_json).collect::<Vec<_>>(),
            "tables": tables,
            "notes": self.notes,
        })
    }

    pub(super) fn text(&self) -> String {
        let mut parts = vec![format!("{}  {}", self.bench, settings(&self.settings))];
        if !self.series.is_empty() {
            parts.push(table(&["", "GB/s", "least..most", "seconds", "CPU s/GB"], self.series.iter().map(row)));
            let processes = self.series.iter().flat_map(process_rows);
            parts.push(table(&["process", "CPU s/GB", "least..most", "peak memory"], processes));
        }
        parts.extend(self.tables.iter().map(Table::text));
        if !self.ratios.is_empty() {
            parts.push(table(&["ratio", "", "least..most", "asked", ""], self.ratios.iter().map(ratio_row)));
        }
        let series = self.series.iter().map(|s| format!("{}: {}", s.name, s.what));
        let ratios = self.ratios.iter().map(|r| format!("{}: {}", r.name, r.what));
        parts.push(
            series
                .chain(ratios)
                .chain(self.notes.iter().cloned())
                .map(|n| format!("  {n}"))
                .collect::<Vec<_>>()
                .join("\n"),
        );
        parts.join("\n\n")
    }
}

impl Table {
    fn to_json(&self) -> Value {
        let object = |row: &Vec<Value>| -> Value {
            self.columns.iter().zip(row).map(|(column, value)| (column.replace(' ', "_"), value.clone())).collect()
        };
        self.rows.iter().map(object).collect()
    }

    fn text(&self) -> String {
        let cell = |value: &Value| match value.as_f64().filter(|_| value.is_f64()) {
            Some(value) => figure(value),
            None => word(value),
        };
        table(&self.columns, self.rows.iter().map(|row| row.iter().map(cell).collect()))
    }
}

/// Everything about several benches.
pub(super) fn document(machine: &Machine, reports: &[Report], failures: &[String]) -> Value {
    json!({
        "machine": machine,
        "benches": reports.iter().map(Report::to_json).collect::<Vec<_>>(),
        "failures": failures,
    })
}

fn settings(settings: &Value) -> String {
    let Value::Object(settings) = settings else { return String::new() };
    let one = |(key, value): (&String, &Value)| match (key.strip_suffix("_bytes"), value.as_u64()) {
        (Some(key), Some(bytes)) => format!("{key} {}", units::bytes(bytes)),
        _ => format!("{key} {}", word(value)),
    };
    settings.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// A value as it is read, without quotes.
fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

fn row(series: &Series) -> Vec<String> {
    let (rate, cpu) = (series.gb_per_s(), series.cpu_s_per_gb());
    let seconds = figure(series.seconds().median);
    vec![series.name.to_string(), figure(rate.median), range(rate), seconds, figure(cpu.median)]
}

fn process_rows(series: &Series) -> Vec<Vec<String>> {
    let row = |process: Process| {
        let cpu = process.cpu_s_per_gb;
        let name = format!("{}: {}", series.name, process.name);
        vec![name, figure(cpu.median), range(cpu), units::bytes(process.peak_bytes)]
    };
    series.processes().into_iter().map(row).collect()
}

fn ratio_row(ratio: &Ratio) -> Vec<String> {
    let met = match ratio.is_met() {
        Some(true) => "met",
        Some(false) => "NOT met",
        None => "",
    };
    let value = format!("{}{}", figure(ratio.value.median), ratio.unit);
    vec![ratio.name.to_string(), value, range(ratio.value), ratio.asked_words(), met.to_string()]
}

fn range(spread: Spread) -> String {
    format!("{}..{}", figure(spread.min), figure(spread.max))
}

/// Three digits say enough.
fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        v if v >= 0.0995 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Columns as wide as their longest cell: the first to the left, the others to the right.
fn table(columns: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head = columns.iter().map(ToString::to_string).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |at: usize| rows.iter().filter_map(|r| r.get(at)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(at, (cell, width))| match at {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        format!("  {}", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::figures::{Asked, Run, Usage};

    fn report() -> Report {
        let usage = Usage { process: "p".into(), cpu_seconds: 0.5, peak_bytes: 3 << 20 };
        let run = Run { bytes: 1_000_000_000, seconds: 0.25, processes: vec![usage] };
        Report {
            series: vec![Series { name: "a thing", what: "what it does".into(), runs: vec![run] }],
            ratios: vec![Ratio::new("a ratio", "of things", Asked::AtMost(1.1), [1.5])],
            tables: vec![Table {
                name: "a table",
                columns: vec!["node", "a b"],
                rows: vec![vec!["x".into(), 1.5.into()]],
            }],
            notes: vec!["a note".into()],
            ..Report::new("sample", json!({"size_bytes": 4096, "transport": "tcp"}))
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_longest_cell() {
        let rows = [vec!["long name".to_string(), "1".to_string()], vec!["b".to_string(), "22".to_string()]];
        assert_eq!(table(&["x", "y"], rows.into_iter()), "  x           y\n  long name   1\n  b          22");
    }

    #[test]
    fn three_digits() {
        let shown: Vec<String> = [123.4, 12.34, 1.234, 0.1234, 0.01234, 0.0].into_iter().map(figure).collect();
        assert_eq!(shown, ["123", "12.3", "1.23", "0.12", "0.012", "0.00"]);
    }

    #[test]
    fn people_are_told_what_and_how_it_compares() {
        let text = report().text();
        for part in ["sample  size 4.0 KiB, transport tcp", "a thing  4.00", "1.50", "NOT met", "a note", "3.0 MiB"] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn programs_are_told_the_same() {
        let told = report().to_json();
        assert_eq!(told["series"][0]["gb_per_s"]["median"], 4.0);
        assert_eq!((&told["ratios"][0]["met"], &told["ratios"][0]["asked"]["at_most"]), (&json!(false), &json!(1.1)));
        assert_eq!(told["tables"]["a_table"][0]["a_b"], 1.5);
    }
}
