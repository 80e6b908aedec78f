//! The scratch disk of a cold boot: an empty ext4 in a sparse file.

use std::path::Path;

use sandbox_folder::SandboxId;

use crate::Error;

/// The file system's label, for whoever looks into one.
const LABEL: &str = "scratch";

/// Makes `path` an empty ext4 of `mib` MiB; its UUID follows from the sandbox's id.
pub fn make(path: &Path, mib: u64, id: &SandboxId) -> Result<(), Error> {
    Ok(rootfs_tools::empty(path, mib << 20, Some(LABEL), id.as_str().as_bytes())?)
}
