//! Errors as people read them: each reason once, and nothing that a terminal would obey.

use crate::output::plain;
use anyhow::Error;

/// The error and its causes, outermost first. Many errors name their cause in their own text, as a
/// library's callers want them to; here such a cause is not said again.
pub(crate) fn reasons(error: &Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        let cause = cause.trim_end();
        match said.is_empty() {
            true => said.push_str(cause),
            false if said == cause || said.contains(&format!(": {cause}")) => {}
            false => said = format!("{said}: {cause}"),
        }
    }
    // Names of files and the like may hold anything; lines are our own, as in what a log ends with.
    said.lines().map(plain).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};
    use aquifer_memory::Source;
    use std::path::Path;

    #[test]
    fn a_cause_that_was_named_is_not_named_again() {
        let error = Source::open(Path::new("/nowhere/at/all"), &[]).expect_err("there is nothing");
        let text = reasons(&Error::new(error).context("cannot publish"));
        assert_eq!(text.matches("No such file").count(), 1, "{text}");
        assert!(text.starts_with("cannot publish: cannot read /nowhere/at/all: No such file"), "{text}");
    }

    #[test]
    fn a_cause_that_was_not_named_is_added() {
        let error = Err::<(), _>(anyhow!("b")).context("not done").context("not begun").expect_err("it is one");
        assert_eq!(reasons(&error), "not begun: not done: b");
        assert_eq!(reasons(&anyhow!("alone\n")), "alone");
        assert_eq!(reasons(&anyhow!("cannot read \x1b[2J")), "cannot read \\u{1b}[2J");
    }
}
