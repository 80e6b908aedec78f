//! Writing a snapshot folder: whole or absent.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::delta::DeltaSaved;
use super::disk::Placed;
use super::manifest::{Description, FileEntry, FileName};
use super::ram::RamSaved;
use super::{Error, GuestMemory, SnapshotFolder};

/// Whether a published snapshot has to survive a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// On disk when [`NewSnapshot::publish`] returns.
    Synced,
    /// Not waited for: for a fork's snapshot, which means nothing after the host's next boot.
    Volatile,
}

/// A snapshot that is being written, in `TARGET.new-RANDOM` beside its target; dropped without
/// [`NewSnapshot::publish`] it leaves nothing.
///
/// Everything that must be copied while the vCPUs stand still is in the `add` methods; hashing what they did not hash on
/// the way, and waiting for the disk, is left to `publish`, after which the VM may have been running for long.
#[derive(Debug)]
pub struct NewSnapshot {
    folder: PathBuf,
}

impl NewSnapshot {
    /// Makes the temporary folder. An existing `target` must be a snapshot or empty: `publish` replaces it.
    pub fn begin(target: &Path) -> Result<Self, Error> {
        let _ = target;
        todo!()
    }

    /// The temporary folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// An empty file for somebody else to write, such as a VMM that is handed the descriptor; done when
    /// [`NewSnapshot::publish`] is called.
    pub fn create(&mut self, name: FileName) -> Result<File, Error> {
        let _ = name;
        todo!()
    }

    /// A small file.
    pub fn add_bytes(&mut self, name: FileName, contents: &[u8]) -> Result<(), Error> {
        let _ = (name, contents);
        todo!()
    }

    /// `ram`: the RAM of a VM that maps all of `ram` shared.
    pub fn add_ram(&mut self, ram: &File) -> Result<RamSaved, Error> {
        let _ = ram;
        todo!()
    }

    /// `ram.delta`: the RAM of a VM that maps its base privately.
    pub fn add_ram_delta(&mut self, memory: &GuestMemory) -> Result<DeltaSaved, Error> {
        let _ = memory;
        todo!()
    }

    /// A copy of a disk that goes on being written after this: a reflink, else its data.
    pub fn add_copy(&mut self, name: FileName, from: &File) -> Result<Placed, Error> {
        let _ = (name, from);
        todo!()
    }

    /// A file that nobody writes any more: a hard link, else a copy. `known` is its size and digest if somebody
    /// verified them.
    pub fn add_link(
        &mut self,
        name: FileName,
        from: &File,
        known: Option<&FileEntry>,
    ) -> Result<Placed, Error> {
        let _ = (name, from, known);
        todo!()
    }

    /// `ram` and `scratch.ext4` of the snapshot that a VM was restored from; its `rootfs.ext4` too if it has one.
    pub fn add_base(&mut self, of: &SnapshotFolder) -> Result<Placed, Error> {
        let _ = of;
        todo!()
    }

    /// Writes the manifest, syncs, and puts the folder in its place, where it replaces an older snapshot. With a
    /// `cache`, the files are stamped as verified (see [`SnapshotFolder::verify_once`]).
    pub fn publish(
        self,
        description: Description,
        durability: Durability,
        cache: Option<&Path>,
    ) -> Result<SnapshotFolder, Error> {
        let _ = (description, durability, cache);
        todo!()
    }
}

/// Removes what killed writers left in `parent`. Folders of living ones are not touched.
pub fn sweep(parent: &Path) -> Result<Vec<PathBuf>, Error> {
    let _ = parent;
    todo!()
}
