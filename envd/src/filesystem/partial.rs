//! A file that is being written: it appears whole or not at all.
//!
//! ```text
//! .envd-upload-<16 hex digits>   written, synced
//!        │ rename
//!        ▼
//!     target                     and its directory synced
//! ```
//!
//! All of it goes through the open directory, so nothing that happens to the path meanwhile separates the two. An agent
//! that is killed leaves the temporary file, which its name tells apart; watchers do not report it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, open, openat, renameat, unlinkat};

use super::metadata::Metadata;
use super::operations::{self, Owner};

/// What a temporary file's name begins with when its target does not exist yet.
pub(super) const CREATING: &str = ".envd-upload-c";

/// What a temporary file's name begins with when it will replace its target.
pub(super) const REPLACING: &str = ".envd-upload-r";

/// Links that are followed to find the target of an upload (the kernel's own bound).
const MAX_LINKS: usize = 40;

/// The permissions of a written file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Modes {
    /// Those of the file that it replaces, but never setuid or setgid; of a new one 0644.
    Keep,
    /// These.
    Exactly(u32),
}

/// A file being written beside its target; dropped without [`Partial::publish`] it leaves nothing.
#[derive(Debug)]
pub(super) struct Partial {
    file: File,
    directory: OwnedFd,
    temporary: String,
    target: PathBuf,
    published: bool,
}

impl Partial {
    /// Begins an upload; a link at the end of the path means what it leads to, as for a program that writes to it.
    /// With a kind that was asked for, it means itself.
    pub(super) fn upload(target: &Path, itself: bool, owner: Owner, metadata: &Metadata) -> io::Result<Self> {
        let target = if itself { target.to_owned() } else { resolve(target)? };
        let parent = target.parent().ok_or(io::ErrorKind::IsADirectory)?;
        operations::make_directories(parent, owner)?;
        let partial = Self::replacing(target, Modes::Keep)?;
        if let Some((uid, gid)) = owner {
            fchown(&partial.file, Some(uid), Some(gid))?;
        }
        metadata.write(&partial.file)?;
        Ok(partial)
    }

    /// Begins a file that will stand at `target` itself.
    pub(super) fn replacing(target: PathBuf, modes: Modes) -> io::Result<Self> {
        let existing = match fs::symlink_metadata(&target) {
            Ok(metadata) if metadata.is_dir() => return Err(io::Error::from(io::ErrorKind::IsADirectory)),
            // A rename would replace a device or a FIFO, which is never what a client means.
            Ok(metadata) if !metadata.is_file() && !metadata.is_symlink() => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
            }
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let parent = target.parent().ok_or(io::ErrorKind::IsADirectory)?;
        let directory = open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let prefix = if existing.is_some() { REPLACING } else { CREATING };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let (file, temporary) = loop {
            let temporary = format!("{prefix}{:016x}", random()?);
            match openat(&directory, &temporary, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => break (File::from(file), temporary),
                Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let partial = Self { file, directory, temporary, target, published: false };
        let mode = match (modes, existing) {
            (Modes::Exactly(mode), _) => mode,
            (Modes::Keep, Some(existing)) if existing.is_file() => existing.mode() & 0o777,
            (Modes::Keep, _) => 0o644,
        };
        // What open made was cut by the umask.
        partial.file.set_permissions(fs::Permissions::from_mode(mode))?;
        Ok(partial)
    }

    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Makes it appear.
    pub(super) fn publish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        let name = self.target.file_name().ok_or(io::ErrorKind::IsADirectory)?;
        renameat(&self.directory, &self.temporary, &self.directory, name.as_bytes())?;
        self.published = true;
        // A file system that cannot sync a directory (EINVAL) has nothing to sync.
        match rustix::fs::fsync(&self.directory) {
            Err(rustix::io::Errno::INVAL) => Ok(()),
            synced => Ok(synced?),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            // Nothing more can be done about a temporary file that does not go.
            let _ = unlinkat(self.directory.as_fd(), &self.temporary, AtFlags::empty());
        }
    }
}

/// Where a program that opens `path` for writing would make the file, links at its end followed.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match rustix::fs::readlinkat(CWD, &path, Vec::new()) {
            Ok(target) => {
                let target = PathBuf::from(std::ffi::OsStr::from_bytes(target.as_bytes()));
                path = path.parent().unwrap_or(Path::new("/")).join(target);
            }
            // No link, or nothing there yet.
            Err(_) => return Ok(path),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
}

pub(super) fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}
