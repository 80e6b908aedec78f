//! What can go wrong with an image.

use std::io;
use std::path::{Path, PathBuf};

/// The error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What the caller asked for makes no sense.
    #[error("{what}: {reason}")]
    Invalid {
        /// The value in question.
        what: String,
        /// What was expected.
        reason: String,
    },
    /// The image is valid as far as one can see, but uses something that is not supported.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The thing that is not supported.
        what: String,
        /// What is, or what to do.
        reason: String,
    },
    /// The bytes are not what they should be.
    #[error("corrupt {what}: {reason}")]
    Corrupt {
        /// The blob, file or entry.
        what: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// Nothing is there.
    #[error("{what} not found in {place}")]
    NotFound {
        /// The image or blob.
        what: String,
        /// Where it was looked for.
        place: String,
    },
    /// A program that is needed is missing or failed.
    #[error("{program}: {reason}")]
    Program {
        /// The program.
        program: String,
        /// What it said, or which package has it.
        reason: String,
    },
    /// The operating system refused.
    #[error("{path}: {error}")]
    Io {
        /// The file in question.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
}

impl Error {
    /// Whether the caller's input is at fault, and not this machine.
    pub fn is_bad_input(&self) -> bool {
        !matches!(self, Self::Io { .. } | Self::Program { .. })
    }

    pub(crate) fn corrupt(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into(), reason: reason.into() }
    }

    /// An error of reading `what`: bad contents become [`Error::Corrupt`], the rest stays an error of the system.
    pub(crate) fn reading(what: &str, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => {
                Self::corrupt(what, error.to_string())
            }
            _ => Self::Io { path: PathBuf::from(what), error },
        }
    }
}

/// Adds the path to an error of the system.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |error| Error::Io { path, error }
}
