//! What the program says: results on the output, everything else on the error stream. A reader
//! that goes away, as `head` does, is no failure.

use anyhow::{Context, Result};
use serde_json::Value;
use std::io::{self, ErrorKind, Write};

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
    let _ = writeln!(io::stderr(), "{text}");
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
    fn a_reader_may_go() {
        let (reader, mut writer) = io::pipe().unwrap();
        assert_eq!(write_line(&mut writer, "a").unwrap(), Reader::There);
        drop(reader);
        assert_eq!(write_line(&mut writer, "b").unwrap(), Reader::Gone);
    }
}
