//! Volumes: directories of the container that sit on the scratch disk itself, not on the overlay.
//!
//! ```text
//! /run/envd-box/scratch/volumes/%2Fvar%2Flib%2Fdocker ──bind──► /var/lib/docker of the container
//! ```
//!
//! A database writes there without a copy-up, and a container engine can mount overlays there: the kernel takes no overlay
//! for the upper layer of another. At the first boot of a scratch disk each gets what the image has at that path: files,
//! modes, owners, times and extended attributes; hard links become files of their own.
//!
//! The image is hostile. No link of it is followed on the way through its tree, and the way to the tree resolves inside
//! of its root. Nothing of the tenant runs yet, so nothing changes meanwhile.

use std::ffi::{CString, OsStr};
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use envd_proto::boot::volume_name;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, XattrFlags, lgetxattr,
    llistxattr, lsetxattr, mknodat, openat, openat2, utimensat,
};

use super::mounts::{BOX_ROOT, SCRATCH};

/// The largest list of names, and the largest value, of a file's extended attributes (`XATTR_LIST_MAX`,
/// `XATTR_SIZE_MAX`).
const MAX_XATTR: usize = 64 << 10;

/// A directory of the container that is bound from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Volume {
    /// Where the container has it.
    pub(super) path: String,
    /// Where it is.
    pub(super) source: String,
}

/// Makes the directory of a volume on the scratch disk, with the image's content of its path.
pub(super) fn prepare(path: &str) -> io::Result<Volume> {
    let told = |error: io::Error| io::Error::new(error.kind(), format!("volume {path}: {error}"));
    let name = volume_name(path);
    let source = format!("{SCRATCH}/volumes/{name}");
    if !fs::exists(&source).map_err(told)? {
        // Filled under another name first: a boot that ended half-way must not leave half a volume.
        let new = format!("{SCRATCH}/volumes.new");
        match fs::remove_dir_all(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(told(error)),
            _ => {}
        }
        fs::create_dir_all(format!("{SCRATCH}/volumes")).map_err(told)?;
        fs::create_dir(&new).map_err(told)?;
        fill(path, Path::new(&new)).map_err(told)?;
        fs::rename(&new, &source).map_err(told)?;
    }
    Ok(Volume { path: path.to_owned(), source })
}

/// Copies what the image has at `path`; nothing when it has nothing there.
fn fill(path: &str, to: &Path) -> io::Result<()> {
    let root = openat(CWD, BOX_ROOT, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS) {
        Ok(found) => copy_tree(Path::new(&format!("/proc/self/fd/{}/.", found.as_raw_fd())), to),
        Err(rustix::io::Errno::NOENT) => fs::set_permissions(to, fs::Permissions::from_mode(0o755)),
        Err(rustix::io::Errno::NOTDIR) => {
            Err(io::Error::other("the image has something there that is no directory"))
        }
        Err(error) => Err(error.into()),
    }
}

/// Copies the directory `from`, which follows no link within, over the empty directory `to`.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    // Not by recursion: the image decides how deep its tree is.
    let mut left = vec![(from.to_owned(), to.to_owned())];
    let mut directories = Vec::new();
    while let Some((from, to)) = left.pop() {
        let found = fs::symlink_metadata(&from)?;
        for entry in fs::read_dir(&from).map_err(|error| named(&from, error))? {
            let entry = entry?;
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            if entry.file_type()?.is_dir() {
                fs::create_dir(&to)?;
                left.push((from, to));
            } else {
                copy_file(&from, &to).map_err(|error| named(&from, error))?;
            }
        }
        directories.push((from, to, found));
    }
    // A directory's time changes with what comes into it, so all of theirs come last.
    for (from, to, found) in directories {
        copy_attributes(&from, &to, &found).map_err(|error| named(&from, error))?;
    }
    Ok(())
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("copying {}: {error}", path.display()))
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(from)?;
    let kind = found.file_type();
    if kind.is_file() {
        fs::copy(from, to)?;
    } else if kind.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from)?, to)?;
    } else {
        let node = match () {
            () if kind.is_fifo() => FileType::Fifo,
            () if kind.is_socket() => FileType::Socket,
            () if kind.is_block_device() => FileType::BlockDevice,
            () => FileType::CharacterDevice,
        };
        mknodat(CWD, to, node, Mode::from_raw_mode(found.mode() & 0o7777), found.rdev())?;
    }
    copy_attributes(from, to, &found)
}

/// Owner, extended attributes, mode and times, in this order: a change of the owner clears setuid bits and capabilities.
pub(super) fn copy_attributes(from: &Path, to: &Path, found: &Metadata) -> io::Result<()> {
    std::os::unix::fs::lchown(to, Some(found.uid()), Some(found.gid()))?;
    copy_xattrs(from, to)?;
    if !found.is_symlink() {
        fs::set_permissions(to, found.permissions())?;
    }
    let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps {
        last_access: time(found.atime(), found.atime_nsec()),
        last_modification: time(found.mtime(), found.mtime_nsec()),
    };
    Ok(utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn copy_xattrs(from: &Path, to: &Path) -> io::Result<()> {
    let mut names = vec![0; MAX_XATTR];
    let length = match llistxattr(from, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut value = if length == 0 { Vec::new() } else { vec![0; MAX_XATTR] };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = CString::new(name)?;
        let length = lgetxattr(from, &name, &mut value)?;
        lsetxattr(to, &name, &value[..length], XattrFlags::empty()).map_err(|error| {
            let name = OsStr::from_bytes(name.as_bytes()).display().to_string();
            io::Error::new(io::Error::from(error).kind(), format!("extended attribute {name}: {error}"))
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_copied_with_all_that_its_entries_have() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("a/b/file"), "content").unwrap();
        fs::set_permissions(from.join("a/b/file"), fs::Permissions::from_mode(0o4750)).unwrap();
        fs::set_permissions(from.join("a"), fs::Permissions::from_mode(0o1777)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", from.join("link")).unwrap();
        mknodat(CWD, from.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let labelled = lsetxattr(from.join("a/b/file"), c"user.label", b"value", XattrFlags::empty()).is_ok();
        let old = Timespec { tv_sec: 1_000_000_000, tv_nsec: 7 };
        let times = Timestamps { last_access: old, last_modification: old };
        for path in ["a/b/file", "a/b", "a", ""] {
            utimensat(CWD, from.join(path), &times, AtFlags::empty()).unwrap();
        }

        copy_tree(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("a/b/file")).unwrap(), "content");
        for (path, mode) in [("a/b/file", 0o4750), ("a", 0o1777), ("fifo", 0o600)] {
            let (ours, theirs) =
                (to.join(path).symlink_metadata().unwrap(), from.join(path).symlink_metadata().unwrap());
            assert_eq!(ours.mode() & 0o7777, mode, "{path}");
            assert_eq!(
                (ours.uid(), ours.gid(), ours.mtime(), ours.mtime_nsec()),
                (theirs.uid(), theirs.gid(), theirs.mtime(), theirs.mtime_nsec()),
                "{path}"
            );
        }
        assert_eq!(to.metadata().unwrap().mtime(), 1_000_000_000);
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert!(to.join("fifo").symlink_metadata().unwrap().file_type().is_fifo());
        if labelled {
            let mut value = [0; 5];
            lgetxattr(to.join("a/b/file"), c"user.label", &mut value).unwrap();
            assert_eq!(&value, b"value");
        }
    }
}
