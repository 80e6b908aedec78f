//! Errors that point into a Dockerfile.

use std::fmt;

use crate::position::Position;

/// A line of the file is shown with at most so many characters around the place in question.
const MAX_SHOWN: usize = 160;

/// What is wrong, and where in which file.
#[derive(Debug, thiserror::Error)]
#[error("{file}:{at}: {reason}{}", Shown { text, at: *at })]
pub struct Error {
    /// The file's name.
    pub file: String,
    /// Where.
    pub at: Position,
    /// The line as it stands in the file.
    pub text: String,
    /// What is wrong with it.
    #[source]
    pub reason: Box<Reason>,
}

/// The line with a mark under the place, cut when it is long.
struct Shown<'a> {
    text: &'a str,
    at: Position,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.text.trim_end();
        if text.trim().is_empty() {
            return Ok(());
        }
        let column = self.at.column - 1;
        let start = if column < MAX_SHOWN { 0 } else { column - MAX_SHOWN / 2 };
        let shown: String = text.chars().skip(start).take(MAX_SHOWN).collect();
        let before: String = if start > 0 { "...".to_owned() } else { String::new() };
        let after = if start + MAX_SHOWN < text.chars().count() { "..." } else { "" };
        // Tabs stay tabs, so that the mark stands under its character in every terminal.
        let under: String = before
            .chars()
            .map(|_| ' ')
            .chain(shown.chars().take(column - start).map(|c| if c == '\t' { '\t' } else { ' ' }))
            .collect();
        // Control characters of the file must not drive somebody's terminal.
        let safe = |text: &str| -> String {
            text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
        };
        write!(formatter, "\n    {before}{}{after}\n    {under}^", safe(&shown))
    }
}

/// What is wrong, before the file's name is known.
#[derive(Debug)]
pub struct Fault {
    /// Where.
    pub at: Position,
    /// What.
    pub reason: Reason,
}

impl Fault {
    /// Something that is wrong at that place.
    pub fn new(at: Position, reason: impl Into<Reason>) -> Self {
        Self { at, reason: reason.into() }
    }

    /// The error of that file; `text` is the line in it.
    pub fn in_file(self, file: &str, text: String) -> Error {
        Error { file: file.to_owned(), at: self.at, text, reason: Box::new(self.reason) }
    }
}

/// What can be wrong with an instruction.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// No such instruction.
    #[error("unknown instruction {keyword:?}{advice}")]
    UnknownInstruction {
        /// What stands in its place.
        keyword: String,
        /// What was most likely meant, else what is known.
        advice: String,
    },
    /// Part of the language, but not built here.
    #[error("{what} is not supported yet: {advice}")]
    NotSupported {
        /// The instruction, flag or form.
        what: String,
        /// What to write instead.
        advice: String,
    },
    /// The instruction's arguments are wrong.
    #[error("{keyword}: {problem}; expected {expected}")]
    Arguments {
        /// The instruction.
        keyword: &'static str,
        /// What was found.
        problem: String,
        /// How it is written.
        expected: &'static str,
    },
    /// A flag that the instruction does not have.
    #[error("{keyword} has no flag {flag}{advice}")]
    UnknownFlag {
        /// The instruction.
        keyword: &'static str,
        /// The flag as written.
        flag: String,
        /// What was most likely meant, else what is known.
        advice: String,
    },
    /// A flag's value is wrong.
    #[error("{keyword} --{flag}: {problem}; expected {expected}")]
    Flag {
        /// The instruction.
        keyword: &'static str,
        /// The flag's name.
        flag: &'static str,
        /// What was found.
        problem: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A parser directive that cannot be used.
    #[error("# {name}: {problem}; expected {expected}")]
    Directive {
        /// Its name.
        name: &'static str,
        /// What was found.
        problem: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A variable or quote that cannot be expanded.
    #[error("{0}")]
    Expansion(#[from] crate::expand::ExpandError),
    /// A heredoc that does not end.
    #[error("heredoc <<{name} has no line {name:?} that ends it")]
    UnterminatedHeredoc {
        /// The word after `<<`.
        name: String,
    },
    /// The file is no text.
    #[error("the line is not valid UTF-8")]
    NotUtf8,
    /// A bound of the language was exceeded.
    #[error("{what} has {got}, at most {limit} are read")]
    TooMuch {
        /// What is too large.
        what: &'static str,
        /// Its size.
        got: usize,
        /// The bound.
        limit: usize,
    },
    /// Nothing to build.
    #[error("no FROM instruction: a Dockerfile names a base image first, as in FROM debian:bookworm")]
    NoFrom,
    /// An instruction that only a stage can hold stands before the first `FROM`.
    #[error("{keyword} stands before the first FROM; only ARG may")]
    BeforeFrom {
        /// The instruction.
        keyword: &'static str,
    },
    /// A stage's name that cannot be used.
    #[error("stage name {name:?}: {problem}{advice}")]
    StageName {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
        /// What was most likely meant, or nothing.
        advice: String,
    },
    /// An image's name that cannot be used.
    #[error("{problem}{advice}")]
    Image {
        /// What the reader of image names says.
        problem: String,
        /// What was most likely meant, or nothing.
        advice: String,
    },
}
