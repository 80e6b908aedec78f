//! What can be wrong with chunks and manifests.

use std::path::PathBuf;

use super::ContentDigest;

/// Something about a manifest, a chunk or a store is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The manifest cannot be read as one.
    #[error("manifest {manifest}: {reason}")]
    Manifest {
        /// The file, or what else the manifest is called.
        manifest: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// The manifest is of a version that this program does not know.
    #[error(
        "manifest {manifest}: its schema version is {got}, only {expected} is known: use a program of its time"
    )]
    Version {
        /// The file, or what else the manifest is called.
        manifest: String,
        /// The version that is known.
        expected: u64,
        /// The version that it says.
        got: u64,
    },
    /// The chunks are whole, but make another file than the manifest says.
    #[error(
        "the manifest lies: it promises a file {expected}, its chunks make {got}: get the manifest again"
    )]
    Lie {
        /// The digest of the file that the manifest promises.
        expected: ContentDigest,
        /// The digest of what its chunks make.
        got: String,
    },
    /// The file cannot be held as chunks of that size.
    #[error("{file}: {reason}")]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// What it has, and the limit.
        reason: String,
    },
    /// The file changed while it was read.
    #[error("{file}: it changed while it was read: expected {expected} bytes, byte {at} is gone")]
    Changed {
        /// The file.
        file: PathBuf,
        /// Its length at the beginning.
        expected: u64,
        /// Where there was nothing.
        at: u64,
    },
    /// A chunk is not in the store.
    #[error("chunk {digest} is missing: there is no {}", path.display())]
    Missing {
        /// The chunk.
        digest: ContentDigest,
        /// Where it should be.
        path: PathBuf,
    },
    /// A chunk in the store is not what its name says.
    #[error("chunk {digest} is damaged: expected {expected}, got {got}: remove {} and fetch or chunk the image again", path.display())]
    Damaged {
        /// The chunk.
        digest: ContentDigest,
        /// What was expected.
        expected: String,
        /// What was found.
        got: String,
        /// The file that holds it.
        path: PathBuf,
    },
    /// The folder is no chunk store, or one of another version.
    #[error("{}: {reason}", path.display())]
    Store {
        /// The folder.
        path: PathBuf,
        /// What was expected.
        reason: String,
    },
}
