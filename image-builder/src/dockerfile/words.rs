//! Words of an instruction: separated by blanks, except inside quotes. Quotes and escapes stay in the words.

/// A heredoc's marker, `<<NAME`.
pub(super) struct Marker {
    pub(super) name: String,
    pub(super) expand: bool,
    pub(super) strip_tabs: bool,
}

/// The first word and the rest, both trimmed.
pub(super) fn split_keyword(line: &str) -> (&str, &str) {
    match line.find(char::is_whitespace) {
        Some(end) => (&line[..end], line[end..].trim()),
        None => (line, ""),
    }
}

/// Splits at blanks outside quotes. A quote that does not end takes the rest of the line.
pub(super) fn split_words(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (None, blank) if blank.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            (None, '"' | '\'') => quote = Some(character),
            (Some(open), close) if open == close => quote = None,
            // Inside single quotes nothing is escaped.
            (None | Some('"'), mark) if mark == escape => {
                word.push(character);
                word.extend(characters.next());
                continue;
            }
            _ => {}
        }
        word.push(character);
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// The heredocs that an instruction opens, in order. Only RUN, COPY and ADD have them.
pub(super) fn heredoc_markers(keyword: &str, rest: &str, escape: char) -> Vec<Marker> {
    if !["RUN", "COPY", "ADD"].iter().any(|known| keyword.eq_ignore_ascii_case(known)) {
        return Vec::new();
    }
    split_words(rest, escape).iter().filter_map(|word| heredoc_marker(word)).collect()
}

/// `[DIGITS]<<[-]NAME`, the name perhaps in quotes, which turn expansion off.
pub(super) fn heredoc_marker(word: &str) -> Option<Marker> {
    let rest = word.trim_start_matches(|digit: char| digit.is_ascii_digit()).strip_prefix("<<")?;
    let (strip_tabs, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let quoted = ['"', '\''].into_iter().find_map(|quote| rest.strip_prefix(quote)?.strip_suffix(quote));
    let name = quoted.unwrap_or(rest);
    let plain = |character: char| character.is_alphanumeric() || "_-.".contains(character);
    (!name.is_empty() && name.chars().all(plain)).then(|| Marker {
        name: name.to_owned(),
        expand: quoted.is_none(),
        strip_tabs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_their_quotes() {
        for (text, words) in [
            ("a  b\tc", vec!["a", "b", "c"]),
            (r#"a="b c" d"#, vec![r#"a="b c""#, "d"]),
            (r"a='b\' c", vec![r"a='b\'", "c"]),
            (r"a\ b c", vec![r"a\ b", "c"]),
            (r#""a\" b" c"#, vec![r#""a\" b""#, "c"]),
            (r#"a "b c"#, vec!["a", r#""b c"#]),
            ("", vec![]),
        ] {
            assert_eq!(split_words(text, '\\'), words, "{text:?}");
        }
    }
}
