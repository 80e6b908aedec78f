//! Reading a snapshot folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::manifest::{FileName, Manifest};
use super::{Error, GuestMemory};

/// A snapshot on disk. Its files stay open: the paths may be unlinked or replaced while a sandbox runs from it.
#[derive(Debug)]
pub struct SnapshotFolder {
    path: PathBuf,
    manifest: Manifest,
    files: BTreeMap<FileName, File>,
}

impl SnapshotFolder {
    /// Reads the manifest, and opens every file that it names read-only; each must be a regular file of the size that
    /// is said there. Contents are not looked at.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let _ = path;
        todo!()
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What `manifest.json` says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// An open file.
    pub fn file(&self, name: FileName) -> Option<&File> {
        self.files.get(&name)
    }

    /// Whether it is a base and a delta over it.
    pub fn has_delta(&self) -> bool {
        self.files.contains_key(&FileName::RamDelta)
    }

    /// Hashes every file.
    pub fn verify(&self) -> Result<(), Error> {
        todo!()
    }

    /// Hashes what is small, and what no stamp in `cache` (a folder) says was verified before.
    pub fn verify_once(&self, cache: &Path) -> Result<(), Error> {
        let _ = cache;
        todo!()
    }

    /// Writes `ram.delta`, if there is one, into the RAM of a stopped VMM that maps `ram` privately.
    /// Returns the number of pages.
    pub fn apply_delta(&self, memory: &GuestMemory) -> Result<u64, Error> {
        let _ = memory;
        todo!()
    }

    /// Unlinks the snapshot. VMs that run from it keep its open files.
    pub fn delete(self) -> Result<(), Error> {
        todo!()
    }
}
