//! What can go wrong with a verb, in the words that docker has for it.

use std::io;
use std::path::{Path, PathBuf};

use sandbox_folder::api::ApiError;
use sandbox_folder::client::ClientError;

/// The exit code of a verb that failed.
pub(crate) const FAILED: u8 = 1;

/// The exit code where host-shim or the sandbox failed, and not the command in it.
pub(crate) const OURS: u8 = 125;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("No such sandbox: {name}{}", there(known))]
    NoSuchSandbox { name: String, known: Vec<String> },
    #[error("{name:?} can be each of {}: give more of the id", known.join(", "))]
    Ambiguous { name: String, known: Vec<String> },
    #[error("Sandbox {id} is {phase}{remedy}")]
    WrongPhase { id: String, phase: String, remedy: &'static str },
    #[error("the sandbox ended: {how}")]
    Ended { how: String },
    /// The words of a shim that failed.
    #[error("{0}")]
    Start(String),
    #[error("invalid {what}: {reason}")]
    Invalid { what: &'static str, reason: String },
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path}: {source}")]
    File { path: String, source: ClientError },
    #[error("interrupted")]
    Interrupted,
    #[error(transparent)]
    Shim(#[from] host_shim::Error),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Api(#[from] ApiError),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn invalid(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { what, reason: reason.into() }
    }

    /// Whether nobody reads our output any more (`| head`).
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// At most this many candidates are told.
const MAX_TOLD: usize = 10;

fn there(known: &[String]) -> String {
    match known {
        [] => " (there are none; `host-shim start TEMPLATE` makes one)".to_owned(),
        known => {
            let more = if known.len() > MAX_TOLD { ", …" } else { "" };
            format!(" (there are: {}{more})", known[..known.len().min(MAX_TOLD)].join(", "))
        }
    }
}
