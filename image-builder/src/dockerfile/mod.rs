//! The Dockerfile language (Docker's Dockerfile reference), from text to typed instructions.
//!
//! ```text
//! text --lexer--> logical lines (line number, keyword, rest, heredocs) --parse--> Statement { line, text, Instruction }
//! ```
//!
//! Variables stay in the instructions: what they stand for depends on the base image and the build's arguments, so
//! [`expand`] is called by the plan.

mod error;
pub mod expand;
mod instruction;
mod lexer;
mod parse;
mod words;

pub use error::{Error, Reason};
pub use instruction::{CommandForm, Copy, Heredoc, Instruction, Pair, Run, Source};
pub use lexer::MAX_DOCKERFILE;

/// A parsed Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dockerfile {
    /// The file's name as errors show it.
    pub file: String,
    /// The character that escapes, `\` or a backtick.
    pub escape: char,
    /// `ARG`s before the first `FROM`, which only `FROM` lines see.
    pub global_args: Vec<Statement>,
    /// The stages in order; never empty.
    pub stages: Vec<Stage>,
}

/// A `FROM` line and what follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// The `FROM` line.
    pub from: Statement,
    /// The image or earlier stage that it names, variables not expanded.
    pub image: String,
    /// `--platform`, variables not expanded.
    pub platform: Option<String>,
    /// The name after `AS`, in lowercase: names of stages do not depend on case.
    pub name: Option<String>,
    /// The instructions after `FROM`.
    pub statements: Vec<Statement>,
}

/// An instruction and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// The line on which it begins, from 1.
    pub line: usize,
    /// The instruction as written, continuations joined.
    pub text: String,
    /// What it means.
    pub instruction: Instruction,
}

impl Dockerfile {
    /// Parses the contents of a Dockerfile; `file` is its name in errors.
    pub fn parse(file: &str, contents: &[u8]) -> Result<Self, Error> {
        let lines = lexer::lex(file, contents)?;
        parse::parse(file, lines)
    }

    /// An error at that statement.
    pub fn error(&self, statement: &Statement, reason: Reason) -> Error {
        Error::new(&self.file, statement.line, &statement.text, reason)
    }
}
