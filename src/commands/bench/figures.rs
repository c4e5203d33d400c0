//! Figures: what one run took, what several runs say together, and how two things compare.

use serde::Serialize;
use serde_json::{Value, json};

/// What one run of one thing took.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Run {
    pub(super) bytes: u64,
    pub(super) seconds: f64,
    pub(super) processes: Vec<Usage>,
}

/// What one process took for a run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Usage {
    pub(super) process: String,
    pub(super) cpu_seconds: f64,
    /// The most memory it ever had resident (VmHWM), shared memory and mapped files included.
    pub(super) peak_bytes: u64,
}

impl Run {
    pub(super) fn gb_per_s(&self) -> f64 {
        gigabytes(self.bytes) / self.seconds
    }

    /// Of all processes together.
    pub(super) fn cpu_s_per_gb(&self) -> f64 {
        self.processes.iter().map(|p| p.cpu_seconds).sum::<f64>() / gigabytes(self.bytes)
    }

    pub(super) fn s_per_gb(&self) -> f64 {
        self.seconds / gigabytes(self.bytes)
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(super) fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// Median, least and most of some figures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// All zero if there are none.
    pub(super) fn of(figures: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = figures.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else {
            return Spread { median: 0.0, min: 0.0, max: 0.0 };
        };
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Spread { median: f64::midpoint(low, high), min: *min, max: *max }
    }
}

/// The figure that `share` (0 to 1) of a sorted list do not exceed; zero if there are none.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

/// All runs of one thing.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) name: &'static str,
    pub(super) what: String,
    pub(super) runs: Vec<Run>,
}

impl Series {
    pub(super) fn gb_per_s(&self) -> Spread {
        Spread::of(self.runs.iter().map(Run::gb_per_s))
    }

    pub(super) fn cpu_s_per_gb(&self) -> Spread {
        Spread::of(self.runs.iter().map(Run::cpu_s_per_gb))
    }

    pub(super) fn seconds(&self) -> Spread {
        Spread::of(self.runs.iter().map(|r| r.seconds))
    }

    /// Each process by itself; all runs have the same.
    pub(super) fn processes(&self) -> Vec<Process> {
        let of = |(at, usage): (usize, &Usage)| {
            let all = || self.runs.iter().filter_map(move |r| Some((r.processes.get(at)?, gigabytes(r.bytes))));
            Process {
                name: usage.process.clone(),
                cpu_s_per_gb: Spread::of(all().map(|(p, gb)| p.cpu_seconds / gb)),
                peak_bytes: all().map(|(p, _)| p.peak_bytes).max().unwrap_or(0),
            }
        };
        self.runs.first().map(|run| run.processes.iter().enumerate().map(of).collect()).unwrap_or_default()
    }

    /// Of two, the one with the higher rate.
    pub(super) fn faster<'a>(&'a self, other: &'a Series) -> &'a Series {
        if self.gb_per_s().median >= other.gb_per_s().median { self } else { other }
    }

    /// Of two, the one with the lower rate.
    pub(super) fn slower<'a>(&'a self, other: &'a Series) -> &'a Series {
        if self.gb_per_s().median >= other.gb_per_s().median { other } else { self }
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "what": self.what,
            "bytes": self.runs.first().map_or(0, |r| r.bytes),
            "runs": self.runs.len(),
            "gb_per_s": self.gb_per_s(),
            "seconds": self.seconds(),
            "cpu_s_per_gb": self.cpu_s_per_gb(),
            "processes": self.processes(),
        })
    }
}

/// One process over all runs of a thing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Process {
    pub(super) name: String,
    pub(super) cpu_s_per_gb: Spread,
    pub(super) peak_bytes: u64,
}

/// What is asked of a ratio.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Asked {
    AtMost(f64),
    AtLeast(f64),
    /// Only told.
    Nothing,
}

/// How what Aquifer did compares with a limit. Each run is compared with the runs of the same turn,
/// so that what else the machine did meanwhile weighs on both.
#[derive(Clone, Debug)]
pub(super) struct Ratio {
    pub(super) name: &'static str,
    pub(super) what: String,
    pub(super) unit: &'static str,
    pub(super) asked: Asked,
    pub(super) value: Spread,
}

impl Ratio {
    /// One figure a turn.
    pub(super) fn new(
        name: &'static str,
        what: impl Into<String>,
        asked: Asked,
        turns: impl IntoIterator<Item = f64>,
    ) -> Self {
        Ratio { name, what: what.into(), unit: "", asked, value: Spread::of(turns) }
    }

    /// `None` where nothing is asked.
    pub(super) fn is_met(&self) -> Option<bool> {
        match self.asked {
            Asked::AtMost(bound) => Some(self.value.median <= bound),
            Asked::AtLeast(bound) => Some(self.value.median >= bound),
            Asked::Nothing => None,
        }
    }

    pub(super) fn asked_words(&self) -> String {
        match self.asked {
            Asked::AtMost(bound) => format!("<= {bound:.2}{}", self.unit),
            Asked::AtLeast(bound) => format!(">= {bound:.2}{}", self.unit),
            Asked::Nothing => String::new(),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let asked = match self.asked {
            Asked::AtMost(bound) => json!({"at_most": bound}),
            Asked::AtLeast(bound) => json!({"at_least": bound}),
            Asked::Nothing => Value::Null,
        };
        json!({
            "name": self.name, "what": self.what, "unit": self.unit.trim(), "value": self.value, "asked": asked,
            "met": self.is_met(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(bytes: u64, seconds: f64, cpu: &[f64]) -> Run {
        let usage = |cpu_seconds: &f64| Usage { process: "p".into(), cpu_seconds: *cpu_seconds, peak_bytes: 7 };
        Run { bytes, seconds, processes: cpu.iter().map(usage).collect() }
    }

    #[test]
    fn a_median_and_its_spread() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(Spread::of([5.0]), Spread { median: 5.0, min: 5.0, max: 5.0 });
        assert_eq!(Spread::of([]).median, 0.0);
    }

    #[test]
    fn quantiles() {
        let figures: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((quantile(&figures, 0.5), quantile(&figures, 0.99), quantile(&figures, 1.0)), (50.0, 99.0, 100.0));
        assert_eq!((quantile(&[7.0], 0.5), quantile(&[7.0], 0.99), quantile(&[], 0.5)), (7.0, 7.0, 0.0));
    }

    #[test]
    fn rates_are_of_decimal_gigabytes_and_all_processes() {
        let run = run(2_000_000_000, 4.0, &[1.0, 3.0]);
        assert_eq!((run.gb_per_s(), run.cpu_s_per_gb(), run.s_per_gb()), (0.5, 2.0, 2.0));
    }

    #[test]
    fn what_is_asked_is_compared_with_the_median() {
        let ratio = |asked| Ratio::new("r", "", asked, [1.0, 1.2, 9.0]).is_met();
        assert_eq!((ratio(Asked::AtMost(1.2)), ratio(Asked::AtMost(1.1))), (Some(true), Some(false)));
        assert_eq!((ratio(Asked::AtLeast(1.2)), ratio(Asked::AtLeast(1.3))), (Some(true), Some(false)));
        assert_eq!(ratio(Asked::Nothing), None);
    }

    #[test]
    fn faster_and_slower_go_by_the_median() {
        let series = |name, seconds: &[f64]| {
            let runs = seconds.iter().map(|s| run(1_000_000_000, *s, &[1.0])).collect();
            Series { name, what: String::new(), runs }
        };
        let (a, b) = (series("a", &[1.0, 5.0, 5.0]), series("b", &[2.0, 2.0, 9.0]));
        assert_eq!((a.faster(&b).name, b.faster(&a).name), ("b", "b"));
        assert_eq!((a.slower(&b).name, b.slower(&a).name), ("a", "a"));
    }

    #[test]
    fn json_tells_each_process_apart() {
        let runs = vec![run(1_000_000_000, 1.0, &[1.0, 3.0]), run(1_000_000_000, 1.0, &[2.0, 3.0])];
        let told = Series { name: "s", what: String::new(), runs }.to_json();
        assert_eq!(told["processes"][0]["cpu_s_per_gb"]["median"], 1.5);
        assert_eq!(told["processes"][1]["cpu_s_per_gb"]["median"], 3.0);
        assert_eq!(told["cpu_s_per_gb"]["max"], 5.0);
    }
}
