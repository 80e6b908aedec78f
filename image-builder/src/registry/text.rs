//! What a registry says, fit for a terminal.

/// How much of a stranger's text an error repeats.
const MAX_TEXT: usize = 500;

/// The text on one line, without what a terminal would take for a command, and not too long.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::new();
    for character in text.chars() {
        if out.len() >= MAX_TEXT {
            out.push_str("..");
            break;
        }
        match character.is_control() {
            true if out.ends_with(' ') => {}
            true => out.push(' '),
            false => out.push(character),
        }
    }
    out.trim().to_owned()
}

/// The error with its causes: reqwest's own text says only that a request failed.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    printable(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_told_nothing() {
        assert_eq!(printable("a\x1b[2Jb\r\n\n  c\u{9b}d"), "a [2Jb   c d");
        assert!(printable(&"\u{1f600}".repeat(10_000)).len() < MAX_TEXT + 8);
    }
}
