//! Figures, as a table for people and as JSON.

use serde_json::{Map, Value, json};

#[derive(Default)]
pub(crate) struct Table {
    figures: Map<String, Value>,
}

impl Table {
    /// Prints and keeps the median of `rounds` (in seconds), and the rate where `bytes` are what took so long.
    pub(crate) fn add(&mut self, what: &str, mut rounds: Vec<f64>, bytes: Option<u64>) {
        rounds.sort_by(f64::total_cmp);
        let median = rounds[rounds.len() / 2];
        let rate = bytes.map(|bytes| gigabytes(bytes) / median);
        let shown = rate.map(|rate| format!("{rate:10.1} GB/s")).unwrap_or_default();
        let (low, high) = (rounds[0] * 1e3, rounds[rounds.len() - 1] * 1e3);
        println!("{what:<68} {:10.2} ms ({low:.2} to {high:.2}) {shown}", median * 1e3);
        self.figures.insert(what.into(), json!({ "seconds": rounds, "median": median, "gb_per_s": rate }));
    }

    pub(crate) fn note(&mut self, what: &str, value: impl Into<Value>) {
        let value = value.into();
        println!("{what:<68} {value}");
        self.figures.insert(what.into(), value);
    }

    pub(crate) fn json(self) -> String {
        format!("{:#}", Value::Object(self.figures))
    }
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}
