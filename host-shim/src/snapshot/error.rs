//! What can go wrong with a snapshot's files.

use std::io;
use std::path::{Path, PathBuf};

/// The error of this module.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no snapshot.
    #[error("no snapshot at {}: {} is missing", path.display(), super::MANIFEST_FILE)]
    Missing {
        /// The folder that was looked at.
        path: PathBuf,
    },
    /// What the caller asks makes no sense.
    #[error("invalid {what}: {reason}")]
    Invalid {
        /// Which input.
        what: &'static str,
        /// What was expected and what was got.
        reason: String,
    },
    /// It may be sound, but this program or this host cannot use it.
    #[error("{}: {reason}", path.display())]
    Unsupported {
        /// The file or folder.
        path: PathBuf,
        /// What is not supported, and what to do.
        reason: String,
    },
    /// A file is not what its writer made.
    #[error("corrupt snapshot file {}: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// The file system is full.
    #[error("no space for {}: {needed}{available}; free some space and try again", path.display())]
    NoSpace {
        /// The file that was being written.
        path: PathBuf,
        /// How much was to be written, as a sentence's part.
        needed: String,
        /// How much the file system has left, as a sentence's part.
        available: String,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file in question.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl Error {
    /// An error of the system, with what was tried.
    pub(super) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(super) fn corrupt(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Corrupt { path: path.as_ref().to_owned(), reason: reason.into() }
    }

    pub(super) fn unsupported(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Unsupported { path: path.as_ref().to_owned(), reason: reason.into() }
    }

    /// Whether other input, and not another host, would help.
    pub fn is_bad_input(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Invalid { .. })
    }
}
