//! Sizes, rates and times for people.

use anyhow::{Context, Result, bail};
use std::time::Duration;

/// Parses `512MiB`, `4GB`, `100k` or plain bytes.
pub(crate) fn parse(text: &str) -> Result<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().with_context(|| format!("'{text}' is not a size: try 512MiB or 4GB"))?;
    let unit: u64 = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "ki" | "kib" => 1 << 10,
        "mi" | "mib" => 1 << 20,
        "gi" | "gib" => 1 << 30,
        "ti" | "tib" => 1 << 40,
        other => bail!("'{text}' is not a size: '{other}' is no unit; try 512MiB or 4GB"),
    };
    number.checked_mul(unit).with_context(|| format!("'{text}' does not fit 64 bits"))
}

/// Parses `25s`, `500ms`, `2min`, `1h` or plain seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let wrong = || format!("'{text}' is not a duration: try 25s or 2min");
    let number: f64 = text[..digits].parse().with_context(wrong)?;
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => bail!(wrong()),
    };
    Duration::try_from_secs_f64(number * unit).with_context(wrong)
}

/// `12.3 MiB`.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 || unit == "TiB" {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{n} B")
}

/// `12 s`, `34 min`, `5 h` or `6 d`: two digits say enough.
pub(crate) fn seconds(seconds: f64) -> String {
    const UNITS: [(&str, f64); 4] = [("s", 1.0), ("min", 60.0), ("h", 3600.0), ("d", 86400.0)];
    let (unit, length) = UNITS.into_iter().rfind(|(_, length)| seconds >= 2.0 * length).unwrap_or(UNITS[0]);
    format!("{:.0} {unit}", (seconds / length).floor())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (given, expected) in [(0.4, "0 s"), (119.9, "119 s"), (120.0, "2 min"), (7200.0, "2 h"), (1e6, "11 d")] {
            assert_eq!(seconds(given), expected);
        }
    }

    #[test]
    fn durations() {
        for (given, ms) in
            [("25s", 25_000), ("25", 25_000), ("500 ms", 500), ("0.5", 500), ("2min", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(parse_duration(given).unwrap(), Duration::from_millis(ms), "{given}");
        }
        assert!(["", "s", "1 parsec", "-1", "1.2.3", "1e999h"].iter().all(|text| parse_duration(text).is_err()));
    }

    #[test]
    fn sizes() {
        assert_eq!(parse("512MiB").unwrap(), 512 << 20);
        assert_eq!(parse("4 GB").unwrap(), 4_000_000_000);
        assert_eq!(parse("7").unwrap(), 7);
        for bad in ["", "MiB", "4 parsecs", "-1", "99999999999TiB"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!((bytes(12), bytes(12 << 20), bytes(1536)), ("12 B".into(), "12.0 MiB".into(), "1.5 KiB".into()));
    }
}
