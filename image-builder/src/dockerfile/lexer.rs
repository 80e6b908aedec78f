//! From text to logical lines: parser directives, comments, continuations, heredocs.

use super::words::{heredoc_markers, split_keyword};
use super::{Error, Reason};

/// The longest Dockerfile that is read. BuildKit's own context for it is of this order, and real ones have some KiB.
pub const MAX_DOCKERFILE: usize = 1 << 20;
/// The most instructions: each may become a layer.
const MAX_INSTRUCTIONS: usize = 2000;

/// An instruction whose continuation lines are joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// Where it begins, from 1.
    pub(super) number: usize,
    /// The instruction's name as written.
    pub(super) keyword: String,
    /// What follows it, trimmed.
    pub(super) rest: String,
    /// The bodies of its heredocs, in order.
    pub(super) heredocs: Vec<Body>,
    /// The character that escapes, `\` or a backtick.
    pub(super) escape: char,
}

/// The lines between a heredoc's marker and its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Body {
    pub(super) name: String,
    pub(super) expand: bool,
    pub(super) contents: String,
}

impl Line {
    /// The instruction as it is shown.
    pub(super) fn text(&self) -> String {
        if self.rest.is_empty() { self.keyword.clone() } else { format!("{} {}", self.keyword, self.rest) }
    }
}

pub(super) fn lex(file: &str, contents: &[u8]) -> Result<Vec<Line>, Error> {
    if contents.len() > MAX_DOCKERFILE {
        let reason = Reason::TooMuch { what: "the file", got: contents.len(), limit: MAX_DOCKERFILE };
        return Err(Error::new(file, 1, "", reason));
    }
    let contents = contents.strip_prefix(b"\xef\xbb\xbf").unwrap_or(contents);
    let mut texts = Vec::new();
    for (index, raw) in contents.split(|byte| *byte == b'\n').enumerate() {
        let raw = raw.strip_suffix(b"\r").unwrap_or(raw);
        let text = std::str::from_utf8(raw)
            .map_err(|_| Error::new(file, index + 1, &String::from_utf8_lossy(raw), Reason::NotUtf8))?;
        texts.push(text);
    }
    let escape = escape_directive(file, &texts)?;
    let mut lines = Vec::new();
    let mut next = 0;
    while next < texts.len() {
        let number = next + 1;
        let start = texts[next].trim_start();
        next += 1;
        if start.is_empty() || start.starts_with('#') {
            continue;
        }
        let mut joined = String::new();
        let mut piece = start;
        loop {
            match continued(piece, escape) {
                Some(part) => joined.push_str(part),
                None => {
                    joined.push_str(piece);
                    break;
                }
            }
            // Comments and blank lines inside a continuation are not part of it.
            while texts
                .get(next)
                .is_some_and(|text| text.trim().is_empty() || text.trim_start().starts_with('#'))
            {
                next += 1;
            }
            let Some(text) = texts.get(next) else { break };
            piece = text;
            next += 1;
        }
        let (keyword, rest) = split_keyword(joined.trim());
        let mut line =
            Line { number, keyword: keyword.to_owned(), rest: rest.to_owned(), heredocs: Vec::new(), escape };
        for marker in heredoc_markers(&line.keyword, &line.rest, escape) {
            let mut contents = String::new();
            loop {
                let Some(text) = texts.get(next) else {
                    return Err(Error::new(
                        file,
                        number,
                        &line.text(),
                        Reason::UnterminatedHeredoc { name: marker.name },
                    ));
                };
                next += 1;
                let text = if marker.strip_tabs { text.trim_start_matches('\t') } else { text };
                if text == marker.name {
                    break;
                }
                contents.push_str(text);
                contents.push('\n');
            }
            line.heredocs.push(Body { name: marker.name, expand: marker.expand, contents });
        }
        lines.push(line);
        if lines.len() > MAX_INSTRUCTIONS {
            let reason = Reason::TooMuch { what: "instructions", got: lines.len(), limit: MAX_INSTRUCTIONS };
            return Err(Error::new(file, number, joined.trim(), reason));
        }
    }
    Ok(lines)
}

/// The line without its continuation mark; `None` when it has none. A doubled escape stands for itself.
fn continued(text: &str, escape: char) -> Option<&str> {
    let part = text.trim_end_matches([' ', '\t']).strip_suffix(escape)?;
    (!part.ends_with(escape)).then_some(part)
}

/// `# escape=` among the directives at the top; the first line that is none ends them.
fn escape_directive(file: &str, texts: &[&str]) -> Result<char, Error> {
    for (index, text) in texts.iter().enumerate() {
        let Some(comment) = text.trim_start().strip_prefix('#') else { break };
        let Some((name, value)) = comment.split_once('=') else { break };
        match name.trim().to_ascii_lowercase().as_str() {
            "escape" => {
                return match value.trim() {
                    "\\" => Ok('\\'),
                    "`" => Ok('`'),
                    other => Err(Error::new(
                        file,
                        index + 1,
                        text,
                        Reason::Arguments {
                            keyword: "# escape",
                            problem: format!("{other:?} is no escape character"),
                            expected: "\\ or `",
                        },
                    )),
                };
            }
            "syntax" | "check" => {}
            _ => break,
        }
    }
    Ok('\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<(usize, String, String)> {
        let lines = lex("Dockerfile", text.as_bytes()).unwrap();
        lines.into_iter().map(|line| (line.number, line.keyword, line.rest)).collect()
    }

    fn one(text: &str) -> String {
        let lines = lines(text);
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines[0].2.clone()
    }

    #[test]
    fn continuations_are_joined() {
        for (text, rest) in [
            ("RUN a \\\n  b", "a   b"),
            ("RUN a \\  \n  b", "a   b"),
            ("RUN a \\\r\n  b\r\n", "a   b"),
            ("RUN a \\\n# comment\n\n   # another\n  && b", "a   && b"),
            ("RUN a\\\nb", "ab"),
            ("RUN a \\\\\n", "a \\\\"),
            ("RUN a \\", "a"),
            ("\u{feff}RUN a", "a"),
            ("# escape=`\nRUN a `\n  b\\", "a   b\\"),
            ("# syntax=docker/dockerfile:1\n#escape = `\nRUN a `\nb", "a b"),
            ("# a comment\n# escape=`\nRUN a \\\nb", "a b"),
            ("RUN a # not a comment", "a # not a comment"),
        ] {
            assert_eq!(one(text), rest, "{text:?}");
        }
    }

    #[test]
    fn lines_keep_their_numbers() {
        let text = "# top\n\nFROM a\nRUN b \\\n  c\n\n  # x\nrun d\n";
        let expected = [(3, "FROM", "a"), (4, "RUN", "b   c"), (8, "run", "d")];
        let expected: Vec<_> = expected.map(|(n, k, r)| (n, k.to_owned(), r.to_owned())).into();
        assert_eq!(lines(text), expected);
    }

    #[test]
    fn heredocs_take_the_lines_that_follow() {
        let text = "RUN <<EOF cat <<-'X' >f\na\n# no comment\nEOF\n\tb $c\n\tX\nCMD d\n";
        let lines = lex("Dockerfile", text.as_bytes()).unwrap();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            lines[0].heredocs,
            [
                Body { name: "EOF".into(), expand: true, contents: "a\n# no comment\n".into() },
                Body { name: "X".into(), expand: false, contents: "b $c\n".into() },
            ]
        );
        assert_eq!(lines[1].number, 7);
        let error = lex("Dockerfile", b"FROM a\nRUN <<END\nx\n").unwrap_err().to_string();
        assert!(error.starts_with("Dockerfile:2: heredoc <<END has no line"), "{error}");
        assert_eq!(one("ENV a=1<<EOF"), "a=1<<EOF");
        assert_eq!(one("RUN echo $((1<<2))"), "echo $((1<<2))");
    }

    #[test]
    fn bad_text_is_named() {
        let error = lex("D", b"FROM a\nRUN \xff\n").unwrap_err().to_string();
        assert!(error.starts_with("D:2: the line is not valid UTF-8"), "{error}");
        let error = lex("D", b"# escape=x\nFROM a\n").unwrap_err().to_string();
        assert!(error.contains("\"x\" is no escape character"), "{error}");
        assert!(lex("D", &vec![b'\n'; MAX_DOCKERFILE + 1]).is_err());
        assert!(lex("D", "RUN a\n".repeat(MAX_INSTRUCTIONS + 1).as_bytes()).is_err());
    }
}
