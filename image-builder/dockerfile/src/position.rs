//! Where things stand in the file, also after continuation lines were joined.

use std::fmt;

/// A place in a Dockerfile.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The line, from 1.
    pub line: usize,
    /// The character in the line, from 1.
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.line, self.column)
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// A piece of text as written, and where it begins. Variables in it are not expanded.
#[derive(Clone, PartialEq, Eq)]
pub struct Word {
    /// The text.
    pub text: String,
    /// Where it begins.
    pub at: Position,
}

impl fmt::Debug for Word {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}@{}", self.text, self.at)
    }
}

/// An instruction whose continuation lines are joined, and where its pieces came from.
#[derive(Debug, Default)]
pub(crate) struct Joined {
    text: String,
    /// From this byte on the text stands at that place.
    marks: Vec<(usize, Position)>,
}

impl Joined {
    pub(crate) fn push(&mut self, text: &str, at: Position) {
        self.marks.push((self.text.len(), at));
        self.text.push_str(text);
    }

    pub(crate) fn whole(&self) -> Part<'_> {
        Part { joined: self, start: 0, end: self.text.len() }
    }
}

/// A part of an instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part<'a> {
    joined: &'a Joined,
    start: usize,
    end: usize,
}

impl<'a> Part<'a> {
    pub(crate) fn text(self) -> &'a str {
        &self.joined.text[self.start..self.end]
    }

    pub(crate) fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Where the byte `offset` of this part stands.
    pub(crate) fn at_offset(self, offset: usize) -> Position {
        let offset = self.start + offset;
        let index = self.joined.marks.partition_point(|(from, _)| *from <= offset);
        match index.checked_sub(1).map(|index| self.joined.marks[index]) {
            Some((from, at)) => {
                let characters = self.joined.text[from..offset].chars().count();
                Position { line: at.line, column: at.column + characters }
            }
            None => Position { line: 1, column: 1 },
        }
    }

    pub(crate) fn at(self) -> Position {
        self.at_offset(0)
    }

    pub(crate) fn word(self) -> Word {
        Word { text: self.text().to_owned(), at: self.at() }
    }

    /// The bytes from `from` to `to` of this part.
    pub(crate) fn slice(self, from: usize, to: usize) -> Self {
        Self { joined: self.joined, start: self.start + from, end: self.start + to }
    }

    pub(crate) fn from(self, from: usize) -> Self {
        self.slice(from, self.end - self.start)
    }

    pub(crate) fn trim_start(self) -> Self {
        self.from(self.text().len() - self.text().trim_start().len())
    }

    pub(crate) fn trim(self) -> Self {
        let trimmed = self.trim_start();
        trimmed.slice(0, trimmed.text().trim_end().len())
    }

    /// The first word and the rest, without the blanks between them.
    pub(crate) fn split_first(self) -> (Self, Self) {
        let part = self.trim_start();
        match part.text().find(is_blank) {
            Some(end) => (part.slice(0, end), part.from(end).trim()),
            None => (part, part.from(part.text().len())),
        }
    }

    /// The words between blanks; quotes mean nothing here.
    pub(crate) fn blank_words(self) -> Vec<Word> {
        let mut words = Vec::new();
        let mut rest = self.trim();
        while !rest.is_empty() {
            let (word, after) = rest.split_first();
            words.push(word.word());
            rest = after;
        }
        words
    }
}

/// What separates words of an instruction.
pub(crate) fn is_blank(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\x0b' | '\x0c' | '\r')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_survive_joining() {
        let mut joined = Joined::default();
        joined.push("RUN ä ", Position { line: 3, column: 3 });
        joined.push("  b c", Position { line: 5, column: 1 });
        let words = joined.whole().blank_words();
        let shown: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
        assert_eq!(shown, ["\"RUN\"@3:3", "\"ä\"@3:7", "\"b\"@5:3", "\"c\"@5:5"]);
    }
}
