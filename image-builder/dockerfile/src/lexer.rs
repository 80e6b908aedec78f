//! From text to logical lines: comments, continuations, heredocs.

use crate::directive::{self, Directives};
use crate::error::{Fault, Reason};
use crate::position::{Joined, Part, Position};
use crate::words::{self, Marker};

/// The longest Dockerfile that is read; real ones have some KiB.
pub const MAX_DOCKERFILE: usize = 1 << 20;
/// The most instructions: each may become a layer.
const MAX_INSTRUCTIONS: usize = 2000;
/// The most heredocs of one instruction.
const MAX_HEREDOCS: usize = 100;

/// An instruction whose continuation lines are joined.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) joined: Joined,
    /// The bodies of its heredocs, in order.
    pub(crate) heredocs: Vec<Body>,
    /// An empty line between its continuation lines.
    pub(crate) blank: Option<Position>,
}

/// The lines between a heredoc's marker and its end, as they stand in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Body {
    pub(crate) marker: Marker,
    pub(crate) contents: String,
}

/// The whole file.
#[derive(Debug)]
pub(crate) struct Lexed {
    pub(crate) directives: Directives,
    pub(crate) lines: Vec<Line>,
}

impl Line {
    /// The keyword and what follows it.
    pub(crate) fn split(&self) -> (Part<'_>, Part<'_>) {
        self.joined.whole().trim().split_first()
    }
}

impl Body {
    /// The contents as the instruction means them: without the tabs that `<<-` takes away.
    pub(crate) fn text(&self) -> String {
        match self.marker.strip_tabs {
            false => self.contents.clone(),
            true => self.contents.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect(),
        }
    }
}

/// The lines of the file without their ends; a carriage return stays.
pub(crate) fn raw_lines(contents: &[u8]) -> impl Iterator<Item = &[u8]> {
    contents.strip_prefix(b"\xef\xbb\xbf").unwrap_or(contents).split(|byte| *byte == b'\n')
}

pub(crate) fn lex(contents: &[u8]) -> Result<Lexed, Fault> {
    let start = Position { line: 1, column: 1 };
    if contents.len() > MAX_DOCKERFILE {
        let reason = Reason::TooMuch { what: "the file", got: contents.len(), limit: MAX_DOCKERFILE };
        return Err(Fault::new(start, reason));
    }
    let texts: Vec<&[u8]> = raw_lines(contents).collect();
    let directives = directive::parse(&texts)?;
    let mut lexer = Lexer { texts: &texts, next: 0, escape: directives.escape };
    let mut lines = Vec::new();
    while let Some(line) = lexer.line()? {
        if lines.len() == MAX_INSTRUCTIONS {
            let (got, limit) = (MAX_INSTRUCTIONS + 1, MAX_INSTRUCTIONS);
            let reason = Reason::TooMuch { what: "the file's instructions", got, limit };
            return Err(Fault::new(line.split().0.at(), reason));
        }
        lines.push(line);
    }
    Ok(Lexed { directives, lines })
}

struct Lexer<'a> {
    texts: &'a [&'a [u8]],
    /// The next line, from 0.
    next: usize,
    escape: char,
}

impl<'a> Lexer<'a> {
    /// The next line and its number. Comments may be in any encoding, so they are looked at as bytes.
    fn peek(&self) -> Option<&'a [u8]> {
        let text = self.texts.get(self.next)?;
        let ends = text.iter().rev().take_while(|byte| **byte == b'\r').count();
        Some(&text[..text.len() - ends])
    }

    fn take(&mut self) -> Result<Option<(&'a str, usize)>, Fault> {
        let Some(text) = self.peek() else { return Ok(None) };
        self.next += 1;
        Ok(Some((utf8(text, self.next)?, self.next)))
    }

    fn line(&mut self) -> Result<Option<Line>, Fault> {
        while self.peek().is_some_and(|text| is_blank_line(text) || is_comment(text)) {
            self.next += 1;
        }
        let Some((mut text, mut number)) = self.take()? else { return Ok(None) };
        let mut joined = Joined::default();
        let mut blank = None;
        let indent = text.len() - text.trim_start().len();
        let mut column = text[..indent].chars().count() + 1;
        text = &text[indent..];
        loop {
            let at = Position { line: number, column };
            let Some(part) = continued(text, self.escape) else {
                joined.push(text, at);
                break;
            };
            joined.push(part, at);
            let mut skipped = None;
            while let Some(text) = self.peek()
                && (is_blank_line(text) || is_comment(text))
            {
                self.next += 1;
                if is_blank_line(text) {
                    skipped = skipped.or(Some(Position { line: self.next, column: 1 }));
                }
            }
            match self.take()? {
                Some(next) => {
                    (text, number) = next;
                    blank = blank.or(skipped);
                }
                None => break,
            }
            column = 1;
        }
        let mut line = Line { joined, heredocs: Vec::new(), blank };
        if line.joined.whole().trim().is_empty() {
            // A lone continuation mark at the end of the file.
            return self.line();
        }
        let markers = words::heredoc_markers(line.joined.whole().trim());
        if markers.len() > MAX_HEREDOCS {
            let (got, limit) = (markers.len(), MAX_HEREDOCS);
            let reason = Reason::TooMuch { what: "the instruction's heredocs", got, limit };
            return Err(Fault::new(line.split().0.at(), reason));
        }
        for (marker, at) in markers {
            line.heredocs.push(self.body(marker, at)?);
        }
        Ok(Some(line))
    }

    fn body(&mut self, marker: Marker, at: Position) -> Result<Body, Fault> {
        let mut contents = String::new();
        loop {
            let Some(text) = self.peek() else {
                return Err(Fault::new(at, Reason::UnterminatedHeredoc { name: marker.name }));
            };
            let raw = self.texts[self.next];
            self.next += 1;
            let tabs = text.iter().take_while(|byte| **byte == b'\t').count();
            let end = if marker.strip_tabs { &text[tabs..] } else { text };
            if end == marker.name.as_bytes() {
                return Ok(Body { marker, contents });
            }
            contents.push_str(utf8(raw, self.next)?);
            contents.push('\n');
        }
    }
}

fn utf8(text: &[u8], number: usize) -> Result<&str, Fault> {
    std::str::from_utf8(text).map_err(|error| {
        let valid = String::from_utf8_lossy(&text[..error.valid_up_to()]);
        Fault::new(Position { line: number, column: valid.chars().count() + 1 }, Reason::NotUtf8)
    })
}

fn is_comment(text: &[u8]) -> bool {
    text.trim_ascii_start().starts_with(b"#")
}

fn is_blank_line(text: &[u8]) -> bool {
    std::str::from_utf8(text).is_ok_and(|text| text.trim().is_empty())
}

/// The line without its continuation mark; `None` when it has none. A doubled escape stands for itself.
fn continued(text: &str, escape: char) -> Option<&str> {
    let part = text.trim_end_matches([' ', '\t']).strip_suffix(escape)?;
    (!part.ends_with(escape)).then_some(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<(String, String, String)> {
        let lines = lex(text.as_bytes()).unwrap().lines;
        let parts = |line: &Line| {
            let (keyword, rest) = line.split();
            (keyword.at().to_string(), keyword.text().to_owned(), rest.text().to_owned())
        };
        lines.iter().map(parts).collect()
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
            ("\\\nRUN a", "a"),
            ("\u{feff}RUN a", "a"),
            ("# escape=`\nRUN a `\n  b\\", "a   b\\"),
            ("# syntax=docker/dockerfile:1\n#escape = `\nRUN a `\nb", "a b"),
            ("# a comment\n# escape=`\nRUN a \\\nb", "a b"),
            ("RUN a # not a comment", "a # not a comment"),
        ] {
            assert_eq!(one(text), rest, "{text:?}");
        }
        assert_eq!(lines("\\\n"), []);
        assert_eq!(lex(b"# caf\xe9\nRUN a \\\n# caf\xe9\nb").unwrap().lines.len(), 1, "Latin-1 comments");
    }

    #[test]
    fn lines_keep_their_places() {
        let text = "# top\n\nFROM a\n  RUN b \\\n  c\n\n  # x\nrun d\n";
        let expected = [("3:1", "FROM", "a"), ("4:3", "RUN", "b   c"), ("8:1", "run", "d")];
        assert_eq!(lines(text), expected.map(|(n, k, r)| (n.to_owned(), k.to_owned(), r.to_owned())));
    }

    #[test]
    fn heredocs_take_the_lines_that_follow() {
        let text = "RUN <<EOF cat <<-'X' >f\na\n# no comment\nEOF\n\tb $c\n\tX\nCMD d\n";
        let lines = lex(text.as_bytes()).unwrap().lines;
        assert_eq!(lines.len(), 2);
        let bodies: Vec<_> = lines[0].heredocs.iter().map(|body| (&body.marker, body.text())).collect();
        let marker = |name: &str, expand, strip_tabs| Marker { name: name.into(), expand, strip_tabs };
        assert_eq!(
            bodies,
            [
                (&marker("EOF", true, false), "a\n# no comment\n".to_owned()),
                (&marker("X", false, true), "b $c\n".to_owned())
            ]
        );
        assert_eq!(lines[1].split().0.at().line, 7);
        let fault = lex(b"FROM a\nRUN <<END\nx\n").unwrap_err();
        assert_eq!(fault.at.to_string(), "2:5");
        assert_eq!(one("ENV a=1<<EOF"), "a=1<<EOF");
        assert_eq!(one("RUN echo $((1<<2))"), "echo $((1<<2))");
        assert_eq!(one("RUN [\"cat\", \"<<EOF\"]"), "[\"cat\", \"<<EOF\"]");
    }

    #[test]
    fn bounds_hold() {
        assert_eq!(lex(b"FROM a\nRUN \xff\n").unwrap_err().at.to_string(), "2:5");
        assert!(lex(&vec![b'\n'; MAX_DOCKERFILE + 1]).is_err());
        assert!(lex("RUN a\n".repeat(MAX_INSTRUCTIONS + 1).as_bytes()).is_err());
        assert!(lex("RUN a\n".repeat(MAX_INSTRUCTIONS).as_bytes()).is_ok());
        assert!(lex(("RUN".to_owned() + &" <<a".repeat(MAX_HEREDOCS + 1)).as_bytes()).is_err());
        // Many lone marks must not become deep recursion.
        assert!(lex("\\\n \\\n\n".repeat(100_000).as_bytes()).unwrap().lines.is_empty());
    }
}
