//! What can go wrong with a snapshot's files.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

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
    #[error("cannot use {}: {reason}", path.display())]
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
    #[error("no space for {}{}: free some and try again", path.display(), Space { needed, available })]
    NoSpace {
        /// The file that was being written.
        path: PathBuf,
        /// Bytes that were to be written, where that is known.
        needed: Option<u64>,
        /// Bytes that the file system has left, where that is known.
        available: Option<u64>,
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
    /// Whether other input, and not another host, would help.
    pub fn is_bad_input(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Invalid { .. })
    }

    /// An error of the system, with what was tried.
    pub(super) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// An error of the system while `path` was written, which takes `needed` bytes on disk.
    pub(super) fn write(path: impl AsRef<Path>, needed: Option<u64>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| match Errno::from_io_error(&source) {
            Some(Errno::NOSPC | Errno::DQUOT) => {
                let available = path.parent().and_then(|parent| rustix::fs::statvfs(parent).ok());
                // The blocks that an ordinary user gets, in units of f_frsize.
                let available = available.map(|space| space.f_bavail.saturating_mul(space.f_frsize));
                Self::NoSpace { path, needed, available }
            }
            _ => Self::Io { action: "write", path, source },
        }
    }

    pub(super) fn corrupt(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Corrupt { path: path.as_ref().to_owned(), reason: reason.into() }
    }

    pub(super) fn unsupported(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Unsupported { path: path.as_ref().to_owned(), reason: reason.into() }
    }

    pub(super) fn invalid(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { what, reason: reason.into() }
    }
}

struct Space<'a> {
    needed: &'a Option<u64>,
    available: &'a Option<u64>,
}

impl fmt::Display for Space<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.needed, self.available) {
            (Some(needed), Some(available)) => {
                write!(f, " ({needed} bytes needed, {available} available)")
            }
            (Some(needed), None) => write!(f, " ({needed} bytes needed)"),
            (None, Some(available)) => write!(f, " ({available} bytes available)"),
            (None, None) => Ok(()),
        }
    }
}
