//! Writing a snapshot folder: whole or absent.
//!
//! ```text
//! begin ──► TARGET.new-RANDOM (flock) ──add..──publish──► manifest, fsync ──rename──► TARGET
//!                 │ dropped: removed                                  └─exchange─► TARGET, the older one unlinked
//!                 └ killed: its lock is free, and `sweep` removes it
//! ```

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags, RenameFlags};
use rustix::io::Errno;

use super::delta::DeltaSaved;
use super::disk::Placed;
use super::manifest::{Description, FileEntry, FileName, MANIFEST_FILE, Manifest, SCHEMA_VERSION};
use super::ram::RamSaved;
use super::verified::{self, Writer};
use super::{Digest, Error, GuestMemory, SnapshotFolder, delta, disk, hash, ram};

/// What the name of an unfinished folder has behind its target's, before its random digits.
const NEW: &str = ".new-";

/// Hexadecimal digits behind [`NEW`].
const RANDOM_DIGITS: usize = 16;

/// Whether a published snapshot has to survive a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// On disk when [`NewSnapshot::publish`] returns.
    Synced,
    /// Neither waited for nor hashed: for a fork's snapshot, which is restored at once by this host and never again.
    Volatile,
}

/// A snapshot that is being written, in `TARGET.new-RANDOM` beside its target; dropped without
/// [`NewSnapshot::publish`] it leaves nothing.
///
/// Everything that must be copied while the vCPUs stand still is in the `add` methods; hashing, and waiting for the disk,
/// is left to `publish`, when the VM may be running again.
#[derive(Debug)]
pub struct NewSnapshot {
    target: PathBuf,
    made_parent: bool,
    folder: Unfinished,
    files: BTreeMap<FileName, Added>,
}

/// A file of the new snapshot.
#[derive(Debug)]
struct Added {
    file: File,
    /// Of a file that somebody has verified.
    known: Option<Digest>,
    /// Another snapshot's too: its mode is not ours to change.
    linked: bool,
}

impl NewSnapshot {
    /// Makes the temporary folder, and the folder that it is in if that is missing. An existing `target` must be a snapshot or empty: `publish` replaces it.
    pub fn begin(target: &Path) -> Result<Self, Error> {
        let target = std::path::absolute(target).map_err(Error::io("resolve", target))?;
        let Some(parent) = target.parent().filter(|_| target.file_name().is_some()) else {
            return Err(Error::invalid("snapshot folder", format!("{} has no name", target.display())));
        };
        check_replaceable(&target)?;
        let made_parent = match fs::create_dir(parent) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(Error::write(parent, None)(error)),
        };
        Ok(Self { folder: Unfinished::make(&target)?, target, made_parent, files: BTreeMap::new() })
    }

    /// The temporary folder.
    pub fn path(&self) -> &Path {
        &self.folder.path
    }

    /// An empty file for somebody else to write, such as a VMM that is handed the descriptor; done when
    /// [`NewSnapshot::publish`] is called.
    pub fn create(&mut self, name: FileName) -> Result<File, Error> {
        let path = self.unused(name)?;
        let file = disk::create(&path).map_err(Error::write(&path, None))?;
        let other = file.try_clone().map_err(Error::io("open", &path))?;
        self.files.insert(name, Added { file, known: None, linked: false });
        Ok(other)
    }

    /// A small file.
    pub fn add_bytes(&mut self, name: FileName, contents: &[u8]) -> Result<(), Error> {
        let needed = Some(contents.len() as u64);
        let path = self.path().join(name.as_str());
        self.create(name)?.write_all(contents).map_err(Error::write(path, needed))
    }

    /// `ram`: the RAM of a VM that maps all of `ram` shared.
    pub fn add_ram(&mut self, ram: &File) -> Result<RamSaved, Error> {
        let path = self.path().join(FileName::Ram.as_str());
        let out = self.create(FileName::Ram)?;
        ram::save_shared(ram, &out, &path)
    }

    /// Makes holes of the zero pages of a `ram` that a VMM has written by itself. Returns the bytes that are left.
    pub fn thin_ram(&mut self) -> Result<u64, Error> {
        let path = self.path().join(FileName::Ram.as_str());
        let Some(added) = self.files.get(&FileName::Ram) else {
            return Err(Error::invalid("snapshot", "it has no RAM".to_owned()));
        };
        // Not by the descriptor of before: a copy's is for reading.
        let file = File::options().read(true).write(true).open(&path).map_err(Error::io("open", &path))?;
        debug_assert!(!added.linked, "another snapshot's RAM is not ours to write");
        ram::thin(&file, &path)
    }

    /// `ram.delta`: the RAM of a VM that maps its base privately.
    pub fn add_ram_delta(&mut self, memory: &GuestMemory) -> Result<DeltaSaved, Error> {
        let path = self.path().join(FileName::RamDelta.as_str());
        let out = self.create(FileName::RamDelta)?;
        delta::save_delta(memory, &out, &path)
    }

    /// A copy of a disk that goes on being written after this: a reflink, else its data.
    pub fn add_copy(&mut self, name: FileName, from: &File) -> Result<Placed, Error> {
        let path = self.unused(name)?;
        let placed = disk::copy_sparse(from, &path)?;
        self.placed(name, &path, placed, None)
    }

    /// A file that nobody writes any more: a hard link, else a copy. `known` is its digest if somebody verified it.
    pub fn add_link(&mut self, name: FileName, from: &File, known: Option<&Digest>) -> Result<Placed, Error> {
        let path = self.unused(name)?;
        let placed = disk::link_or_copy(from, &path)?;
        self.placed(name, &path, placed, known.cloned())
    }

    /// `ram` and `scratch.ext4` of the snapshot that a VM was restored from; its `rootfs.ext4` too if it has one.
    /// Tells the dearest way that one of them took.
    pub fn add_base(&mut self, of: &SnapshotFolder) -> Result<Placed, Error> {
        let mut dearest = Placed::Linked;
        for name in [FileName::Ram, FileName::Scratch, FileName::Rootfs] {
            if let Some(file) = of.file(name) {
                let known = of.manifest().files.get(&name).and_then(|entry| entry.digest.as_ref());
                dearest = dearest.max(self.add_link(name, file, known)?);
            }
        }
        Ok(dearest)
    }

    /// Writes the manifest, syncs, and puts the folder in its place, where it replaces an older snapshot. With a
    /// `cache`, the files are stamped as verified (see [`SnapshotFolder::verify_once`]).
    pub fn publish(
        mut self,
        description: Description,
        durability: Durability,
        cache: Option<&Path>,
    ) -> Result<SnapshotFolder, Error> {
        for (name, added) in &self.files {
            let path = self.path().join(name.as_str());
            if !added.linked {
                added
                    .file
                    .set_permissions(Permissions::from_mode(name.mode()))
                    .map_err(Error::io("set the mode of", path))?;
            }
        }
        // The disk works while the CPU hashes.
        let (files, synced) = std::thread::scope(|scope| {
            let sync = (durability == Durability::Synced).then(|| scope.spawn(|| self.sync_files()));
            let files = self.entries(durability, cache);
            let synced = sync.map_or(Ok(()), |sync| match sync.join() {
                Ok(synced) => synced,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            (files, synced)
        });
        let manifest = Manifest { schema_version: SCHEMA_VERSION, description, files: files? };
        synced?;
        manifest.check().map_err(|reason| Error::invalid("snapshot", reason))?;
        self.write_manifest(&manifest, durability)?;
        self.put_in_place(durability)?;
        SnapshotFolder::open(&self.target)
    }

    fn unused(&self, name: FileName) -> Result<PathBuf, Error> {
        if self.files.contains_key(&name) {
            return Err(Error::invalid("snapshot", format!("{name} is added twice")));
        }
        Ok(self.path().join(name.as_str()))
    }

    fn placed(
        &mut self,
        name: FileName,
        path: &Path,
        placed: Placed,
        known: Option<Digest>,
    ) -> Result<Placed, Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        self.files.insert(name, Added { file, known, linked: placed == Placed::Linked });
        Ok(placed)
    }

    fn sync_files(&self) -> Result<(), Error> {
        for (name, added) in &self.files {
            let path = self.path().join(name.as_str());
            // Space that was promised to a write may be missing now.
            added.file.sync_all().map_err(Error::write(path, None))?;
        }
        Ok(())
    }

    /// The entries of all files. What means nothing after the host's next boot is not hashed: a fork would take half
    /// as long again.
    fn entries(
        &self,
        durability: Durability,
        cache: Option<&Path>,
    ) -> Result<BTreeMap<FileName, FileEntry>, Error> {
        let mut entries = BTreeMap::new();
        for (&name, added) in &self.files {
            let path = self.path().join(name.as_str());
            let metadata = added.file.metadata().map_err(Error::io("read", &path))?;
            let digest = match (&added.known, durability) {
                (Some(known), _) => Some(known.clone()),
                (None, Durability::Volatile) => None,
                (None, Durability::Synced) => {
                    let digest =
                        hash::digest(&added.file, name.scheme()).map_err(Error::io("read", &path))?;
                    if let Some(cache) = cache {
                        verified::remember(cache, &added.file, &metadata, &digest, Writer::Us);
                    }
                    Some(digest)
                }
            };
            entries.insert(name, FileEntry { size: metadata.len(), digest });
        }
        Ok(entries)
    }

    fn write_manifest(&self, manifest: &Manifest, durability: Durability) -> Result<(), Error> {
        let path = self.path().join(MANIFEST_FILE);
        let text = manifest.text().map_err(|error| Error::io("write", &path)(error.into()))?;
        let write = || {
            let mut file = File::options().write(true).create_new(true).mode(0o400).open(&path)?;
            file.write_all(&text)?;
            if durability == Durability::Synced { file.sync_all() } else { Ok(()) }
        };
        write().map_err(Error::write(&path, Some(text.len() as u64)))?;
        self.sync_folder(self.path(), durability)
    }

    /// Renames the folder, and removes what it replaces.
    fn put_in_place(&mut self, durability: Durability) -> Result<(), Error> {
        let (from, to) = (self.folder.path.clone(), self.target.clone());
        let rename = |flags| rustix::fs::renameat_with(CWD, &from, CWD, &to, flags);
        let replaced = loop {
            match rename(RenameFlags::NOREPLACE) {
                Ok(()) => break false,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(Error::io("put the snapshot in place as", &to)(error.into())),
            }
            check_replaceable(&to)?;
            match rename(RenameFlags::EXCHANGE) {
                Ok(()) => break true,
                // It went away between the two.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(Error::io("replace the snapshot", &to)(error.into())),
            }
        };
        // From here on the folder's old name, if there is something, is of the replaced snapshot.
        self.folder.kept = !replaced;
        for folder in to.ancestors().skip(1).take(if self.made_parent { 2 } else { 1 }) {
            self.sync_folder(folder, durability)?;
        }
        self.folder.remove()
    }

    fn sync_folder(&self, path: &Path, durability: Durability) -> Result<(), Error> {
        match durability {
            Durability::Synced => {
                File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::write(path, None))
            }
            Durability::Volatile => Ok(()),
        }
    }
}

/// A folder under its temporary name. Dropped, it is removed.
#[derive(Debug)]
struct Unfinished {
    path: PathBuf,
    /// Nothing is at `path` that is to be removed.
    kept: bool,
    // Taken for as long as the writer lives; released by the kernel, however it ends.
    _lock: File,
}

impl Unfinished {
    fn make(target: &Path) -> Result<Self, Error> {
        loop {
            let path = temporary_name(target).map_err(Error::io("read random bytes for", target))?;
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(Error::write(&path, None)(error)),
            }
            // A sweeper can come between the folder and its lock: then another folder is made.
            match locked(&path) {
                Ok(Some(lock)) => return Ok(Self { path, kept: false, _lock: lock }),
                Ok(None) => {}
                Err(error) => {
                    let _ = fs::remove_dir(&path);
                    return Err(Error::io("lock", &path)(error));
                }
            }
        }
    }

    fn remove(&mut self) -> Result<(), Error> {
        if !self.kept {
            remove(&self.path).map_err(Error::io("remove", &self.path))?;
            self.kept = true;
        }
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(%error, "an unfinished snapshot stays until the next sweep");
        }
    }
}

/// Removes what killed writers left in `parent`. Folders of living ones are not touched.
pub fn sweep(parent: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut swept = Vec::new();
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(swept),
        Err(error) => return Err(Error::io("list", parent)(error)),
    };
    for entry in entries {
        let path = entry.map_err(Error::io("list", parent))?.path();
        if !is_temporary(&path) {
            continue;
        }
        if let Some(_lock) = locked(&path).map_err(Error::io("lock", &path))? {
            remove(&path).map_err(Error::io("remove", &path))?;
            swept.push(path);
        }
    }
    Ok(swept)
}

fn temporary_name(target: &Path) -> io::Result<PathBuf> {
    let mut random = [0; RANDOM_DIGITS / 2];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let mut name = OsString::from(target);
    name.push(format!("{NEW}{:016x}", u64::from_ne_bytes(random)));
    Ok(name.into())
}

/// Whether `path` has a name that [`temporary_name`] makes.
fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_bytes();
    name.len().checked_sub(NEW.len() + RANDOM_DIGITS).is_some_and(|at| {
        let hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        name[at..].starts_with(NEW.as_bytes()) && name[at + NEW.len()..].iter().all(hex)
    })
}

/// The lock of a folder; nothing if somebody has it, or if the folder is gone.
fn locked(path: &Path) -> io::Result<Option<File>> {
    let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits() as i32;
    let folder = match File::options().read(true).custom_flags(flags).open(path) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // A file, or a link, is nobody's unfinished folder.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOTDIR | Errno::LOOP)) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    match folder.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // Removed while it was waited for, or the name is another folder's by now.
    let here = match fs::symlink_metadata(path) {
        Ok(here) => here,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let ours = folder.metadata()?;
    Ok(((here.dev(), here.ino()) == (ours.dev(), ours.ino())).then_some(folder))
}

/// Removes a folder; whoever removes it at the same time is welcome.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// A snapshot takes the place of nothing but a snapshot, or of what is left of one.
fn check_replaceable(target: &Path) -> Result<(), Error> {
    let refused = |what: &str| {
        let reason = format!("{} {what}: name another folder", target.display());
        Err(Error::invalid("snapshot folder", reason))
    };
    let metadata = match fs::symlink_metadata(target) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", target)(error)),
    };
    if !metadata.is_dir() {
        return refused("is there, and is no folder");
    }
    for entry in fs::read_dir(target).map_err(Error::io("list", target))? {
        let name = entry.map_err(Error::io("list", target))?.file_name();
        if name != MANIFEST_FILE && !FileName::ALL.iter().any(|ours| name == ours.as_str()) {
            return refused(&format!("has {name:?}, which no snapshot has"));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "folder_tests.rs"]
mod tests;
