//! `ram.delta`: the pages of a VM's RAM that differ from its base.

use std::fs::File;
use std::path::Path;

use super::{Digest, Error, GuestMemory};

/// What [`save_delta`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaSaved {
    /// Pages that the VMM had of its own.
    pub private_pages: u64,
    /// Pages of which the file has the contents.
    pub data_pages: u64,
    /// Length of the file.
    pub size: u64,
    /// Digest of the file.
    pub digest: Digest,
}

/// Writes the private pages of `memory` to the empty file `out`; `path` names it in errors.
pub fn save_delta(memory: &GuestMemory, out: &File, path: &Path) -> Result<DeltaSaved, Error> {
    let _ = (memory, out, path);
    todo!()
}

/// Writes the pages of `delta` into the private mapping of a stopped VMM; a file that is not sound is refused before the
/// first write. Returns the number of pages.
pub fn apply_delta(delta: &File, path: &Path, memory: &GuestMemory) -> Result<u64, Error> {
    let _ = (delta, path, memory);
    todo!()
}
