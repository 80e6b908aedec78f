//! What can go wrong with a sandbox, told apart by who has to act.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller's input is wrong: another input is needed.
    #[error("invalid {what}: {reason}")]
    Invalid {
        /// Which input.
        what: String,
        /// What was expected and what was got.
        reason: String,
    },
    /// What the caller wrote makes no sense.
    #[error(transparent)]
    Spec(#[from] sandbox_folder::spec::InvalidSpec),
    /// The host misses something: something has to be installed or made.
    #[error("{what} is missing: {remedy}")]
    Missing {
        /// What is not there.
        what: String,
        /// Where it was looked for, and how to get it.
        remedy: String,
    },
    /// The template cannot be used.
    #[error(transparent)]
    Template(#[from] template::Error),
    /// The scratch disk could not be made.
    #[error("cannot make the scratch disk: {0}")]
    Scratch(#[from] rootfs_tools::Error),
    /// The files of a snapshot.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::Error),
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
    /// The VMM could not be started.
    #[error("cannot start {program}: {source}")]
    Spawn {
        /// The program.
        program: String,
        /// The system's error.
        source: io::Error,
    },
    /// The VM ended before its agent was ready.
    #[error("the sandbox did not start: {reason}{}", tail(console))]
    Boot {
        /// What ended it.
        reason: String,
        /// The end of what the guest and the VMM printed.
        console: String,
    },
    /// The agent was not ready in time.
    #[error(
        "the sandbox was not ready within {} s: {waiting_for} did not happen (--boot-timeout allows more time){}",
        deadline.as_secs(),
        tail(console)
    )]
    BootTimeout {
        /// The time that it had.
        deadline: Duration,
        /// What was waited for.
        waiting_for: &'static str,
        /// The end of what the guest and the VMM printed.
        console: String,
    },
    /// The template's own commands did not make the sandbox ready.
    #[error(transparent)]
    Startup(#[from] crate::startup::StartupError),
    /// The sandbox is not in a state for that.
    #[error("{0}")]
    Conflict(String),
    /// The VMM did not do what it was told.
    #[error(transparent)]
    Vmm(#[from] crate::vmm::QmpError),
    /// Firecracker did not do what it was told.
    #[error(transparent)]
    Firecracker(#[from] crate::vmm::ApiError),
    /// The control connection failed.
    #[error(transparent)]
    Agent(#[from] crate::agent::AgentError),
    /// A call to the sandbox failed.
    #[error(transparent)]
    Client(#[from] sandbox_folder::client::ClientError),
    /// The sandbox's network.
    #[error(transparent)]
    Network(sandbox_network::Error),
    /// The sandbox ended under its command.
    #[error("{reason}")]
    Ended {
        /// How.
        reason: String,
    },
    /// A signal ended the work before the sandbox was ready.
    #[error("interrupted before the sandbox was ready")]
    Interrupted,
}

impl Error {
    /// An error of the system, with what was tried.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Bad input of the caller.
    pub(crate) fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), reason: reason.into() }
    }

    /// Whether a file system was full.
    pub fn is_full(&self) -> bool {
        let full = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        };
        match self {
            Self::Snapshot(crate::snapshot::Error::NoSpace { .. }) => true,
            Self::Snapshot(crate::snapshot::Error::Io { source, .. })
            | Self::Io { source, .. }
            | Self::Template(template::Error::Io { error: source, .. }) => full(source),
            _ => false,
        }
    }

    /// Whether other input, and not another host, would help.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Snapshot(error) => error.is_bad_input(),
            _ => matches!(self, Self::Invalid { .. } | Self::Spec(_) | Self::Template(_)),
        }
    }
}

impl From<sandbox_network::Error> for Error {
    fn from(error: sandbox_network::Error) -> Self {
        match error {
            sandbox_network::Error::Missing(missing) => missing.into(),
            error => Self::Network(error),
        }
    }
}

impl From<sandbox_network::Missing> for Error {
    fn from(sandbox_network::Missing { what, remedy }: sandbox_network::Missing) -> Self {
        Self::Missing { what, remedy }
    }
}

impl From<sandbox_network::InvalidRules> for Error {
    fn from(sandbox_network::InvalidRules { what, reason }: sandbox_network::InvalidRules) -> Self {
        Self::Invalid { what, reason }
    }
}

fn tail(console: &str) -> String {
    if console.is_empty() {
        String::new()
    } else {
        format!("\n--- end of the console ---\n{}", console.trim_end())
    }
}
