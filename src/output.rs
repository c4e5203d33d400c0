//! What the program says: results on the output, everything else on the error stream. A reader
//! that goes away, as `head` does, is no failure.

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressDrawTarget};
use serde_json::Value;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::LazyLock;

/// Whether somebody still reads the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    There,
    Gone,
}

/// One line of JSON on the output.
pub(crate) fn print_json(value: &Value) -> Result<Reader> {
    print_line(&value.to_string())
}

/// Text on the output. Fails if it is lost for another reason than that nobody wants it.
pub(crate) fn print_line(text: &str) -> Result<Reader> {
    write_line(&mut io::stdout().lock(), text).context("cannot write the output")
}

/// Text on the error stream. If that fails there is nobody left to be told.
pub(crate) fn tell(text: &str) {
    let _ = writeln!(ErrorStream, "{text}");
}

/// The progress bars on the terminal: one place, so that other text can make them step aside.
pub(crate) static BARS: LazyLock<MultiProgress> =
    LazyLock::new(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8)));

/// The error stream above the progress bars.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ErrorStream;

impl Write for ErrorStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write(bytes))
    }

    fn write_fmt(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        BARS.suspend(|| io::stderr().write_fmt(text))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Text from elsewhere, such as a name in a checkpoint or another node's, as it may be shown: a
/// terminal would obey control characters, and believe marks that turn the writing's direction.
pub(crate) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() || is_invisible(c) {
            true => plain.extend(c.escape_default()),
            false => plain.push(c),
        }
    }
    plain
}

/// The marks of Unicode's "Trojan Source" (CVE-2021-42574), separators of lines, and characters
/// without width.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

fn write_line(to: &mut impl Write, text: &str) -> io::Result<Reader> {
    match writeln!(to, "{text}").and_then(|()| to.flush()) {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_elsewhere_is_obeyed() {
        assert_eq!(plain("a\x1b[2J\r\nb\u{9b}c\u{202e}d\x7f"), r"a\u{1b}[2J\r\nb\u{9b}c\u{202e}d\u{7f}");
        assert_eq!(plain("Gewicht 'ä' \\ 重み"), "Gewicht 'ä' \\ 重み");
    }

    #[test]
    fn a_reader_may_go() {
        let (reader, mut writer) = io::pipe().unwrap();
        assert_eq!(write_line(&mut writer, "a").unwrap(), Reader::There);
        drop(reader);
        assert_eq!(write_line(&mut writer, "b").unwrap(), Reader::Gone);
    }
}
