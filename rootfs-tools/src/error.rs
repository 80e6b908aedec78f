//! What can go wrong.

use std::io;
use std::path::{Path, PathBuf};

use crate::ext4::Finding;

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
    /// The contents need more room than the disk that was asked for.
    #[error(
        "the contents need a disk of {} MiB ({needed} bytes), the size asked for is {} MiB ({asked} bytes): ask for more or leave the size out",
        needed.div_ceil(1 << 20),
        asked / (1 << 20)
    )]
    TooLarge {
        /// Bytes of the smallest file system that holds the contents.
        needed: u64,
        /// Bytes that were asked for.
        asked: u64,
    },
    /// The image uses something that an ext4 of ours cannot hold.
    #[error("{path}: not supported: {reason}")]
    Unsupported {
        /// The path in the image.
        path: String,
        /// What was found, and the limit.
        reason: String,
    },
    /// An entry of a layer contradicts the layers so far.
    #[error("layer {layer}: corrupt entry {path}: {reason}")]
    Corrupt {
        /// The layer's digest.
        layer: String,
        /// The entry's path.
        path: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// A file system contradicts itself.
    #[error("{path}: damaged file system: {finding}")]
    Damaged {
        /// The file with the file system.
        path: PathBuf,
        /// The first thing that is wrong.
        finding: Box<Finding>,
    },
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] oci::Error),
    /// Chunks, or a manifest of chunks.
    #[error(transparent)]
    Chunk(#[from] crate::chunk::ChunkError),
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
        match self {
            Self::Io { .. } => false,
            Self::Image(error) => error.is_bad_input(),
            _ => true,
        }
    }
}

/// Adds the path to an error of the system.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |error| Error::Io { path, error }
}
