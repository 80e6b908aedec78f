//! What can go wrong with a network.

use std::io;

use crate::Missing;

/// The error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host cannot do what was asked for.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A step of making or changing the network failed; what the program or the kernel said.
    #[error("network: {0}")]
    Step(String),
    /// The helper ended, and the network with it.
    #[error("network: the process that holds it is gone")]
    Ended,
    /// The operating system refused.
    #[error("network: cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { action, source: source.into() }
    }
}
