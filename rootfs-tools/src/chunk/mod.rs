//! Files as content-addressed chunks: what images that share contents travel and are kept as.
//!
//! ```text
//!            ┌─ zero ─────────────────────────────► {"zeros": n}            ┐
//! FILE ──► chunks of one size                                               ├──► Manifest (the same file gives
//!            └─ SHA-256 ─► ChunkStore: new? ─yes─► sha256/ab/cdef.. (zstd)  ┘    the same bytes)
//!                            │                     {"digest", "length"}
//!                            └─ no: shared with every file that has it
//!
//! Manifest ──► ChunkStore: each chunk checked ──► FILE, sparse, checked as a whole, in its place only then
//! ```
//!
//! [`split()`] and [`join()`] are the two ways. Chunks have one size, because file systems put files at block boundaries:
//! what content-defined cuts would find behind an insertion is there at a multiple of a block anyway, and fixed cuts cost
//! nothing to find. Manifests name chunks by the digest of their contents, not of what a store makes of them, so how a
//! store compresses is its own affair.

mod digest;
mod error;
mod join;
mod manifest;
mod packed;
mod split;
mod store;

pub use digest::ContentDigest;
pub use error::ChunkError;
pub use join::{JoinReport, join};
pub use manifest::{ChunkSize, Entry, MAX_SIZE, MAX_STORED_CHUNKS, Manifest, SCHEMA_VERSION};
pub use packed::packed_limit;
pub use split::{SplitReport, split};
pub use store::{ChunkStore, ChunkWriter, PruneReport};

use std::num::NonZero;

/// Threads that read, hash and pack beside the one that keeps the order.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Chunks that a worker may be ahead of the thread that keeps the order.
const AHEAD: usize = 4;
