//! Reading a snapshot folder.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use super::manifest::{FileName, MANIFEST_FILE, MAX_MANIFEST, Manifest};
use super::verified::{self, Writer};
use super::{Digest, Error, GuestMemory, delta, hash};

/// Files up to this size are hashed at every restore. A state has some 10 to 100 KiB; SHA-256 was measured at 1.6 GiB/s
/// with the CPU's instructions for it, so this costs 0.6 ms at most there.
const ALWAYS_VERIFIED: u64 = 1 << 20;

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
        loop {
            let here = inode(path);
            match Self::open_once(path) {
                // It was replaced by another one on the way.
                Err(Error::Missing { .. } | Error::Corrupt { .. }) if here != inode(path) => {}
                done => return done,
            }
        }
    }

    fn open_once(path: &Path) -> Result<Self, Error> {
        let missing = || Error::Missing { path: path.to_owned() };
        // All files are opened in this folder, not at this path, which another snapshot may take meanwhile.
        let folder = rustix::fs::openat(
            CWD,
            path,
            OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let folder = match folder {
            Ok(folder) => folder,
            Err(Errno::NOENT) => return Err(missing()),
            Err(error) => return Err(Error::io("open", path)(error.into())),
        };
        let manifest_path = path.join(MANIFEST_FILE);
        let file = match open_regular(&folder, MANIFEST_FILE) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
            Err(error) => return Err(Error::io("open", &manifest_path)(error)),
        };
        let mut text = Vec::new();
        file.take(MAX_MANIFEST + 1).read_to_end(&mut text).map_err(Error::io("read", &manifest_path))?;
        let manifest = Manifest::parse(&text, &manifest_path)?;
        let mut files = BTreeMap::new();
        for (&name, entry) in &manifest.files {
            let file_path = path.join(name.as_str());
            let file = open_regular(&folder, name.as_str()).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Error::corrupt(&file_path, "it is missing"),
                _ => Error::io("open", &file_path)(error),
            })?;
            let size = file.metadata().map_err(Error::io("read", &file_path))?.len();
            if size != entry.size {
                let reason =
                    format!("it has {size} bytes, expected {}: it was truncated or replaced", entry.size);
                return Err(Error::corrupt(&file_path, reason));
            }
            files.insert(name, file);
        }
        Ok(Self { path: path.to_owned(), manifest, files })
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

    /// Hashes every file. A snapshot that was written for a moment only ([`super::Durability::Volatile`]) has digests of no
    /// file but its base's, and cannot be verified.
    pub fn verify(&self) -> Result<(), Error> {
        for (&name, entry) in &self.manifest.files {
            let Some(digest) = &entry.digest else {
                let reason = "its writer did not hash it: it is part of a fork, and of use only to that";
                return Err(Error::unsupported(self.path.join(name.as_str()), reason));
            };
            self.verify_file(name, digest)?;
        }
        Ok(())
    }

    /// Before a restore: hashes what is small, and what no stamp in `cache` (a folder, made if need be) says was
    /// verified before. What has no digest was written by this host a moment ago, and is taken as it is.
    pub fn verify_once(&self, cache: &Path) -> Result<(), Error> {
        for (&name, entry) in &self.manifest.files {
            let Some(digest) = &entry.digest else { continue };
            let file = &self.files[&name];
            if entry.size <= ALWAYS_VERIFIED {
                self.verify_file(name, digest)?;
            } else if !verified::is_stamped(cache, file, digest) {
                let before = file.metadata().map_err(Error::io("read", self.path.join(name.as_str())))?;
                self.verify_file(name, digest)?;
                verified::remember(cache, file, &before, digest, Writer::Anyone);
            }
        }
        Ok(())
    }

    /// Writes `ram.delta`, if there is one, into the RAM of a stopped VMM that maps `ram` privately.
    /// Returns the number of pages.
    pub fn apply_delta(&self, memory: &GuestMemory) -> Result<u64, Error> {
        match self.file(FileName::RamDelta) {
            Some(file) => delta::apply_delta(file, &self.path.join(FileName::RamDelta.as_str()), memory),
            None => Ok(0),
        }
    }

    /// Unlinks the snapshot. VMs that run from it keep its open files.
    pub fn delete(self) -> Result<(), Error> {
        // Without a manifest a half-deleted folder is no snapshot.
        let manifest = self.path.join(MANIFEST_FILE);
        fs::remove_file(&manifest).map_err(Error::io("remove", &manifest))?;
        fs::remove_dir_all(&self.path).map_err(Error::io("remove", &self.path))
    }

    fn verify_file(&self, name: FileName, expected: &Digest) -> Result<(), Error> {
        let path = self.path.join(name.as_str());
        let got = hash::digest(&self.files[&name], name.scheme()).map_err(Error::io("read", &path))?;
        if got != *expected {
            return Err(Error::corrupt(
                &path,
                format!("expected {expected}, got {got}: make the snapshot again"),
            ));
        }
        Ok(())
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Opens a file of the folder; what is no regular file is refused, and never waited for (a FIFO).
fn open_regular(folder: &OwnedFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(folder, name, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "expected a regular file"));
    }
    Ok(file)
}
