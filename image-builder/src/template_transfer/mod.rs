//! Templates between machines: `template push`, `pull`, `export` and `import`.
//!
//! ```text
//! templates/NAME                                     OCI artifact (image-spec 1.1, manifest.md, "artifactType")
//!   template.json ──────────────────────────────────► config
//!   rootfs.ext4 ──chunk::split──► Manifest ─────────► layers[0]   which chunks make the file
//!                        │
//!                        └──► cache/template-chunks ─► layers[1..] each chunk once, packed, in the order in which
//!   snapshots/  stay here                                         the file first has it
//! ```
//!
//! The artifact lies in a registry, or in an archive of an image layout; both hold the same blobs. What the other side has is
//! not sent, what is in the cache is not fetched. A snapshot is of one machine's processor and VMM, so a host makes its own.

mod artifact;
mod cache;
mod export;
mod import;
mod remote;

use std::path::PathBuf;

use oci::Digest;
use serde::Serialize;
use template::TemplateName;

pub use export::export;
pub use import::import;
pub use remote::{pull, push};

/// What was sent or fetched.
#[derive(Clone, Debug, Serialize)]
pub struct TransferReport {
    /// The template's name here.
    pub name: TemplateName,
    /// Its folder.
    pub path: PathBuf,
    /// The other side: a name in a registry, or a file.
    pub place: String,
    /// Digest of the artifact's manifest.
    pub digest: Digest,
    /// Digest of the root file system.
    pub rootfs: Digest,
    /// Different chunks of the root file system.
    pub chunks: usize,
    /// Those that had to be sent or fetched.
    pub moved: usize,
    /// Bytes of those, packed.
    pub bytes: u64,
}
