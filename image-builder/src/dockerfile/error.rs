//! Errors that point into a Dockerfile.

/// The instructions that a Dockerfile may hold.
pub(super) const KNOWN: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];
/// The text of an instruction is shown up to here.
const MAX_SHOWN: usize = 200;

/// What is wrong, and on which line of which file.
#[derive(Debug, thiserror::Error)]
#[error("{file}:{line}: {reason}{}{text}", if text.is_empty() { "" } else { "\n    " })]
pub struct Error {
    /// The file's name.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The text of the instruction, cut when it is long.
    pub text: String,
    /// What is wrong with it.
    #[source]
    pub reason: Box<Reason>,
}

impl Error {
    pub(crate) fn new(file: &str, line: usize, text: &str, reason: Reason) -> Self {
        let mut shown: String = text.chars().take(MAX_SHOWN).collect();
        if shown.len() < text.len() {
            shown.push_str("...");
        }
        Self { file: file.to_owned(), line, text: shown, reason: Box::new(reason) }
    }
}

/// What can be wrong with an instruction.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// No such instruction.
    #[error("unknown instruction {keyword:?}; the known ones are {}", KNOWN.join(", "))]
    UnknownInstruction {
        /// What stands in its place.
        keyword: String,
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
    #[error("{keyword} has no flag {flag}; it has {known}")]
    UnknownFlag {
        /// The instruction.
        keyword: &'static str,
        /// The flag as written.
        flag: String,
        /// The flags that it has.
        known: &'static str,
    },
    /// A variable or quote that cannot be expanded.
    #[error("{0}")]
    Expansion(#[from] super::expand::ExpandError),
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
    #[error("stage name {name:?}: {problem}")]
    StageName {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An image's name that cannot be used.
    #[error(transparent)]
    Reference(#[from] oci::InvalidReference),
}
