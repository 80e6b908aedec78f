//! Walks over a tree that somebody else may change at the same time.
//!
//! The walking thread's own working directory is the place where it stands, and each step is one name from there: a
//! directory that is swapped for a link cannot lead the walk elsewhere, and no path becomes too long. Only the
//! identities of the directories above are kept, so the depth costs neither stack nor descriptors.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, StatxAttributes, StatxFlags, fstat, open, openat, statx};
use rustix::process::{chdir, fchdir};

/// The deepest tree that is walked; each level costs some 100 bytes.
const MAX_DEPTH: usize = 100_000;

/// A place in a tree.
pub(super) struct Walk {
    above: Vec<Identity>,
}

#[derive(PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

/// A name in a directory, and whether it is known to be a directory's; `None` where the file system does not say.
pub(super) struct Name {
    pub(super) name: OsString,
    pub(super) directory: Option<bool>,
}

const STAND: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Walk {
    /// Begins in the directory at `path`.
    pub(super) fn begin(path: &Path) -> io::Result<Self> {
        Self::begin_at(open(path, STAND, Mode::empty())?)
    }

    /// Begins in an open directory.
    pub(super) fn begin_at(directory: impl std::os::fd::AsFd) -> io::Result<Self> {
        // The working directory becomes this thread's own; nothing happens where it is already.
        unshare(CloneFlags::CLONE_FS)?;
        let walk = Self { above: Vec::new() };
        fchdir(directory)?;
        Ok(walk)
    }

    /// At most `limit` names of the directory, in no order, and whether there are more.
    pub(super) fn names(&self, limit: usize) -> io::Result<(Vec<Name>, bool)> {
        self.names_where(limit, |_| true)
    }

    /// As [`Walk::names`], of those only that `wanted` takes; it is told whether a name is a directory's.
    pub(super) fn names_where(
        &self,
        limit: usize,
        wanted: impl Fn(Option<bool>) -> bool,
    ) -> io::Result<(Vec<Name>, bool)> {
        let mut names = Vec::new();
        for found in self.read()? {
            let found = found?;
            let name = found.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let kind = found.file_type();
            let directory = (kind != rustix::fs::FileType::Unknown).then(|| kind.is_dir());
            if !wanted(directory) {
                continue;
            }
            if names.len() == limit {
                return Ok((names, true));
            }
            names.push(Name { name: OsStr::from_bytes(name).to_owned(), directory });
        }
        Ok((names, false))
    }

    /// Shows every name of the directory, in no order.
    pub(super) fn each_name(&self, mut visit: impl FnMut(&OsStr)) -> io::Result<()> {
        for found in self.read()? {
            let found = found?;
            let name = found.file_name().to_bytes();
            if name != b"." && name != b".." {
                visit(OsStr::from_bytes(name));
            }
        }
        Ok(())
    }

    fn read(&self) -> io::Result<Dir> {
        Ok(Dir::new(open(".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)?)
    }

    /// Goes into a directory; not through a link.
    pub(super) fn descend(&mut self, name: &OsStr) -> io::Result<()> {
        if self.above.len() == MAX_DEPTH {
            let message = format!("more than {MAX_DEPTH} directories in each other: take an inner one first");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let here = identity(open(".", STAND, Mode::empty())?)?;
        fchdir(openat(CWD, name, STAND | OFlags::NOFOLLOW, Mode::empty())?)?;
        self.above.push(here);
        Ok(())
    }

    /// Goes back. Fails when the directory was moved away meanwhile: what is above it now is none of the walk's.
    pub(super) fn ascend(&mut self) -> io::Result<()> {
        let parent = open("..", STAND, Mode::empty())?;
        if self.above.pop() != Some(identity(&parent)?) {
            return Err(io::Error::other("a directory was moved away while it was walked: try again"));
        }
        fchdir(parent)?;
        Ok(())
    }

    /// Whether something is mounted on the directory.
    pub(super) fn at_mount_point(&self) -> io::Result<bool> {
        is_mount_point(Path::new("."))
    }
}

impl Drop for Walk {
    fn drop(&mut self) {
        // So that an idle thread keeps no mount busy. The root of the thread's own file system is always there.
        let _ = chdir("/");
    }
}

/// Whether something is mounted at `path`, not following a link at its end.
pub(super) fn is_mount_point(path: &Path) -> io::Result<bool> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let status = statx(CWD, path, flags, StatxFlags::TYPE)?;
    Ok(status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn identity(directory: impl std::os::fd::AsFd) -> io::Result<Identity> {
    let status = fstat(directory)?;
    Ok(Identity { device: status.st_dev, inode: status.st_ino })
}
