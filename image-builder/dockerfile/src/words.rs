//! Words of an instruction, its flags and its heredocs' markers.

use crate::position::{Part, Position, Word};

/// A heredoc's marker, `<<NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marker {
    pub(crate) name: String,
    pub(crate) expand: bool,
    pub(crate) strip_tabs: bool,
}

/// Splits at blanks outside quotes; quotes and escapes stay in the words. The second result says whether each quote was
/// closed: one that is not takes the rest of the line.
pub(crate) fn quoted_words(part: Part<'_>, escape: char) -> (Vec<Word>, bool) {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut start = None;
    let mut quote = None;
    let text = part.text();
    let mut characters = text.char_indices();
    while let Some((offset, character)) = characters.next() {
        if quote.is_none() && character.is_whitespace() {
            if let Some(start) = start.take()
                && !word.is_empty()
            {
                words.push(Word { text: std::mem::take(&mut word), at: part.at_offset(start) });
            }
            continue;
        }
        start = start.or(Some(offset));
        match (quote, character) {
            (None, '"' | '\'') => quote = Some(character),
            (Some(open), close) if open == close => quote = None,
            // Inside single quotes nothing is escaped. At the end of the line there is nothing to escape.
            (None | Some('"'), mark) if mark == escape => {
                if let Some((_, next)) = characters.next() {
                    word.extend([character, next]);
                }
                continue;
            }
            _ => {}
        }
        word.push(character);
    }
    if let Some(start) = start
        && !word.is_empty()
    {
        words.push(Word { text: word, at: part.at_offset(start) });
    }
    (words, quote.is_none())
}

/// The `--name=value` words at the front, without their quotes, and the rest. What follows `--` is no flag.
pub(crate) fn split_flags(part: Part<'_>) -> (Vec<Word>, Part<'_>) {
    let mut flags = Vec::new();
    let mut rest = part.trim_start();
    while rest.text().starts_with("--") {
        let mut word = String::new();
        let mut quote = None;
        let mut characters = rest.text().char_indices();
        let mut end = rest.text().len();
        while let Some((offset, character)) = characters.next() {
            match (quote, character) {
                (None, blank) if blank.is_whitespace() => {
                    end = offset;
                    break;
                }
                (None, '"' | '\'') => quote = Some(character),
                (Some(open), close) if open == close => quote = None,
                (_, '\\') => word.extend(characters.next().map(|(_, next)| next)),
                _ => word.push(character),
            }
        }
        let after = rest.from(end).trim_start();
        if word == "--" {
            return (flags, after);
        }
        flags.push(Word { text: word, at: rest.at() });
        rest = after;
    }
    (flags, rest)
}

/// The heredocs that an instruction opens, in order, and where. Only RUN, COPY and ADD have them, also after ONBUILD, and
/// not in their JSON form.
pub(crate) fn heredoc_markers(line: Part<'_>) -> Vec<(Marker, Position)> {
    let (mut keyword, mut rest) = line.split_first();
    if keyword.text().eq_ignore_ascii_case("ONBUILD") {
        (keyword, rest) = rest.split_first();
    }
    if !["RUN", "COPY", "ADD"].iter().any(|known| keyword.text().eq_ignore_ascii_case(known))
        || !rest.text().contains("<<")
    {
        return Vec::new();
    }
    let (_, arguments) = split_flags(rest);
    if json_list(arguments.text()).is_some() {
        return Vec::new();
    }
    // The backslash escapes here whatever the directive says, and an open quote means that there are none: as BuildKit.
    let (words, closed) = quoted_words(rest, '\\');
    if !closed {
        return Vec::new();
    }
    words.into_iter().filter_map(|word| Some((heredoc_marker(&word.text)?, word.at))).collect()
}

/// `[DIGITS]<<[-]NAME`; any quote or escape in the name turns expansion off.
pub(crate) fn heredoc_marker(word: &str) -> Option<Marker> {
    let rest = word.trim_start_matches(|digit: char| digit.is_ascii_digit()).strip_prefix("<<")?;
    let (strip_tabs, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    if rest.contains('<') {
        return None;
    }
    let name = unquote(rest);
    let expand = name == rest;
    (!name.is_empty()).then_some(Marker { name, expand, strip_tabs })
}

fn unquote(text: &str) -> String {
    let mut out = String::new();
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (None, '"' | '\'') => quote = Some(character),
            (Some(open), close) if open == close => quote = None,
            (None, '\\') => out.extend(characters.next()),
            _ => out.push(character),
        }
    }
    out
}

/// A JSON list. `Some(Err(()))` is a list that holds something else than strings; `None` is no JSON, so text.
pub(crate) fn json_list(text: &str) -> Option<Result<Vec<String>, ()>> {
    if !text.trim_start().starts_with('[') {
        return None;
    }
    let serde_json::Value::Array(items) = serde_json::from_str(text).ok()? else { return None };
    let string = |item: serde_json::Value| match item {
        serde_json::Value::String(text) => Ok(text),
        _ => Err(()),
    };
    Some(items.into_iter().map(string).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Joined;

    fn joined(text: &str) -> Joined {
        let mut joined = Joined::default();
        joined.push(text, Position { line: 1, column: 1 });
        joined
    }

    #[test]
    fn words_keep_their_quotes() {
        for (text, words) in [
            ("a  b\tc", vec!["a", "b", "c"]),
            (r#"a="b c" d"#, vec![r#"a="b c""#, "d"]),
            (r"a='b\' c", vec![r"a='b\'", "c"]),
            (r"a\ b c", vec![r"a\ b", "c"]),
            (r#""a\" b" c"#, vec![r#""a\" b""#, "c"]),
            (r#"a "b c"#, vec!["a", r#""b c"#]),
            ("a '' b", vec!["a", "''", "b"]),
            ("a\\", vec!["a"]),
            ("", vec![]),
        ] {
            let joined = joined(text);
            let (found, _) = quoted_words(joined.whole(), '\\');
            assert_eq!(found.iter().map(|word| word.text.as_str()).collect::<Vec<_>>(), words, "{text:?}");
        }
    }

    #[test]
    fn flags_end_at_the_first_other_word() {
        for (text, flags, rest) in [
            ("--a=b --c d --e", vec!["--a=b", "--c"], "d --e"),
            ("--a=\"b c\" d", vec!["--a=b c"], "d"),
            (r"--a=b\ c d", vec!["--a=b c"], "d"),
            ("-- --a b", vec![], "--a b"),
            ("-a b", vec![], "-a b"),
            ("--a", vec!["--a"], ""),
        ] {
            let joined = joined(text);
            let (found, after) = split_flags(joined.whole());
            assert_eq!(found.iter().map(|word| word.text.as_str()).collect::<Vec<_>>(), flags, "{text:?}");
            assert_eq!(after.text(), rest);
        }
    }

    #[test]
    fn markers_are_the_shells() {
        for (word, expected) in [
            ("<<EOF", Some(("EOF", true, false))),
            ("3<<-EOF", Some(("EOF", true, true))),
            ("<<'E F'", Some(("E F", false, false))),
            ("<<\"EOF\"", Some(("EOF", false, false))),
            ("<<E\\OF", Some(("EOF", false, false))),
            ("<<run.sh", Some(("run.sh", true, false))),
            ("<<<x", None),
            ("<<", None),
            ("a<<EOF", None),
        ] {
            let marker = heredoc_marker(word);
            let shown = marker.as_ref().map(|m| (m.name.as_str(), m.expand, m.strip_tabs));
            assert_eq!(shown, expected, "{word}");
        }
    }
}
