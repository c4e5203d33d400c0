//! Running commands and counting what their tests say.

use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Tests counted so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, other: Totals) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// Where builds go.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The program, where a release build puts it.
pub(crate) fn program() -> PathBuf {
    target().join("release/aquifer")
}

/// The cargo that runs this.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Runs a command, showing its output as it comes. Returns whether it succeeded, and its output
/// (both streams).
pub(crate) fn show(what: &str, command: &mut Command) -> Result<(bool, String)> {
    println!("\n== {what}");
    let started = Instant::now();
    // One pipe for both streams, in the order they were written.
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    command.stdout(writer.try_clone()?).stderr(writer).stdin(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
    // The command holds the pipe's other end, and would keep it open.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut text = String::new();
    for line in BufReader::new(reader).lines() {
        let line = line.unwrap_or_default();
        println!("{line}");
        text.push_str(&line);
        text.push('\n');
    }
    std::io::stdout().flush()?;
    let ok = child.wait()?.success();
    println!("== {what}: {} ({:.0} s)", if ok { "ok" } else { "FAILED" }, started.elapsed().as_secs_f64());
    Ok((ok, text))
}

/// Counts `test result:` lines of cargo test.
pub(crate) fn count_cargo(output: &str) -> Totals {
    let mut totals = Totals::default();
    for line in output.lines().filter_map(|l| l.trim().strip_prefix("test result:")) {
        let count = |what: &str| number_before(line, what);
        totals.add(Totals { passed: count("passed"), failed: count("failed"), skipped: count("ignored") });
    }
    totals
}

/// Counts the closing lines of Python's unittest.
pub(crate) fn count_unittest(output: &str) -> Totals {
    let ran =
        output.lines().filter_map(|l| l.strip_prefix("Ran ")).filter_map(|l| l.split(' ').next()?.parse::<u64>().ok());
    let ran = ran.sum::<u64>();
    let closing = output.lines().rev().find(|l| l.starts_with("OK") || l.starts_with("FAILED")).unwrap_or("");
    let count = |what: &str| {
        let (_, rest) = closing.split_once(&format!("{what}=")).unwrap_or(("", ""));
        rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u64>().unwrap_or(0)
    };
    let failed = count("failures") + count("errors");
    let skipped = count("skipped");
    Totals { passed: ran.saturating_sub(failed + skipped), failed, skipped }
}

fn number_before(line: &str, what: &str) -> u64 {
    let words: Vec<&str> = line.split([' ', ';', '.']).filter(|w| !w.is_empty()).collect();
    let at = words.iter().position(|w| *w == what);
    at.and_then(|i| words.get(i.checked_sub(1)?)?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_lines_are_added_up() {
        let text = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured\n\
                    test result: FAILED. 2 passed; 4 failed; 0 ignored; 0 measured\n";
        let totals = count_cargo(text);
        assert_eq!((totals.passed, totals.failed, totals.skipped), (5, 4, 1));
    }

    #[test]
    fn unittest_lines_are_read() {
        let counted = |text: &str| {
            let t = count_unittest(text);
            (t.passed, t.failed, t.skipped)
        };
        assert_eq!(counted("Ran 7 tests in 1s\n\nOK\n"), (7, 0, 0));
        assert_eq!(counted("Ran 7 tests in 1s\n\nFAILED (failures=1, errors=2, skipped=1)\n"), (3, 3, 1));
        assert_eq!(counted("Ran 7 tests in 1s\n\nOK (skipped=2)\n"), (5, 0, 2));
    }
}
