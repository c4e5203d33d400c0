//! Texts of others, made fit for one line of a log.

/// The first `chars_max` characters of the first line that has any, without control characters.
pub(crate) fn first_line(text: &str, chars_max: usize) -> String {
    line(text.lines().find(|l| !l.trim().is_empty()).unwrap_or(""), chars_max)
}

/// The same of the last line.
pub(crate) fn last_line(text: &str, chars_max: usize) -> String {
    line(text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or(""), chars_max)
}

fn line(line: &str, chars_max: usize) -> String {
    let mut chars = line.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut cut: String = chars.by_ref().take(chars_max).collect();
    if chars.next().is_some() {
        cut.push('…');
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_tells_something() {
        assert_eq!(first_line("\n  no such host\nmore", 200), "no such host");
        assert_eq!(last_line("trace\nKeyError: 'x'\n\n", 200), "KeyError: 'x'");
        assert_eq!(last_line("a\u{1b}[31mred", 200), "a [31mred");
        assert_eq!(first_line("äöüß", 3), "äöü…");
        assert_eq!(first_line(" \n", 9), "");
    }
}
