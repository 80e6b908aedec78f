//! Files below a folder, as a process sees them whose root is that folder.
//!
//! Paths are resolved by [`tree::resolve`], which gives a path without links. Every operation then opens the parent of
//! that path with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`, so that even a tree that changes meanwhile cannot lead
//! out.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use oci::layer::{Kind, LayerPath, Metadata, OWNER_ATTRIBUTE, Timestamp, parse_owner};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use crate::error::{Error, at};
use crate::ids;
use crate::tree::{self, Entry, EntryKind, Escape, Last, Tree};

/// A folder that is a root.
#[derive(Debug)]
pub(crate) struct Rooted {
    folder: OwnedFd,
    shown: PathBuf,
}

impl Rooted {
    /// Opens the folder.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty()).map_err(at(path))?;
        Ok(Self { folder, shown: path.to_owned() })
    }

    /// The path on the host, for errors.
    pub(crate) fn shown(&self, path: &LayerPath) -> PathBuf {
        self.shown.join(path.as_path())
    }

    /// The path without symbolic links. What does not exist is taken as it stands.
    pub(crate) fn resolve(&self, path: &[u8], last: Last, escape: Escape) -> Result<LayerPath, Error> {
        tree::resolve(self, path, last, escape)
    }

    /// The attributes of what is at the resolved path; a link is not followed.
    pub(crate) fn stat(&self, path: &LayerPath) -> Result<Option<Stat>, Error> {
        let result = match path.split() {
            None => rustix::fs::fstat(&self.folder),
            Some((parent, name)) => match self.directory_or_errno(&parent) {
                Ok(parent) => rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW),
                Err(errno) => Err(errno),
            },
        };
        match result {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(at(&self.shown(path))(errno)),
        }
    }

    /// The target of a link.
    pub(crate) fn read_link(&self, path: &LayerPath) -> Result<Vec<u8>, Error> {
        let (parent, name) = self.parent(path)?;
        let target = rustix::fs::readlinkat(parent, name, Vec::new()).map_err(at(&self.shown(path)))?;
        Ok(target.into_bytes())
    }

    /// Opens a directory at a resolved path.
    pub(crate) fn directory(&self, path: &LayerPath) -> Result<OwnedFd, Error> {
        self.directory_or_errno(path).map_err(at(&self.shown(path)))
    }

    /// Opens a regular file at a resolved path for reading.
    pub(crate) fn file(&self, path: &LayerPath) -> Result<File, Error> {
        // NONBLOCK: a FIFO must not stop the build; it has no effect on files.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = self.open_beneath(path, flags).map(File::from).map_err(at(&self.shown(path)))?;
        // What was a file a moment ago may be a device by now, which never ends.
        let stat = rustix::fs::fstat(&file).map_err(at(&self.shown(path)))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile | FileType::Directory => Ok(file),
            _ => Err(Error::Source {
                what: self.shown(path).display().to_string(),
                reason: "it is no regular file: it changed during the build".to_owned(),
            }),
        }
    }

    /// The names in a directory, sorted.
    pub(crate) fn names(&self, path: &LayerPath) -> Result<Vec<Vec<u8>>, Error> {
        let io = |errno| at(&self.shown(path))(errno);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::new(self.directory(path)?).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Makes the directory and those above it where they are missing, and gives the ones it made, outermost first.
    pub(crate) fn make_directories(&self, path: &LayerPath) -> Result<Vec<LayerPath>, Error> {
        let mut made = Vec::new();
        let mut current = LayerPath::default();
        for name in path.components() {
            let parent = self.directory(&current)?;
            current = current.join(name)?;
            match rustix::fs::mkdirat(&parent, OsStr::from_bytes(name), Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    // The umask is the user's; an image is not.
                    let mode = Mode::from_raw_mode(0o755);
                    rustix::fs::chmodat(&parent, name, mode, AtFlags::empty())
                        .map_err(at(&self.shown(&current)))?;
                    made.push(current.clone());
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(at(&self.shown(&current))(errno)),
            }
        }
        // What was there may be no directory.
        self.directory(path)?;
        Ok(made)
    }

    /// Removes whatever is at the resolved path, with everything in it.
    pub(crate) fn remove(&self, path: &LayerPath) -> Result<(), Error> {
        let (parent, name) = match self.parent(path) {
            Ok(found) => found,
            Err(Error::Io { error, .. }) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(errno) => return Err(at(&self.shown(path))(errno)),
        }
        for child in self.names(path)? {
            self.remove(&path.join(&child)?)?;
        }
        rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR).map_err(at(&self.shown(path)))
    }

    /// Makes a new file for writing; nothing may be at the path.
    pub(crate) fn create(&self, path: &LayerPath) -> Result<File, Error> {
        let (parent, name) = self.parent(path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))
            .map(File::from)
            .map_err(at(&self.shown(path)))
    }

    /// Makes a node of any kind but a regular file; nothing may be at the path, except a directory for a directory.
    pub(crate) fn make(&self, path: &LayerPath, kind: &Kind) -> Result<(), Error> {
        let (parent, name) = self.parent(path)?;
        let mode = Mode::from_raw_mode(0o600);
        let device = |file_type, major: u32, minor: u32| {
            rustix::fs::mknodat(&parent, name, file_type, mode, rustix::fs::makedev(major, minor))
        };
        let result = match kind {
            Kind::Directory => match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                Err(Errno::EXIST) => Ok(()),
                other => other,
            },
            Kind::File { .. } | Kind::Sparse { .. } => return self.create(path).map(drop),
            Kind::Symlink(target) => rustix::fs::symlinkat(OsStr::from_bytes(target), &parent, name),
            Kind::HardLink(target) => {
                let (from, from_name) = self.parent(target)?;
                rustix::fs::linkat(from, from_name, &parent, name, AtFlags::empty())
            }
            Kind::CharDevice { major, minor } => device(FileType::CharacterDevice, *major, *minor),
            Kind::BlockDevice { major, minor } => device(FileType::BlockDevice, *major, *minor),
            Kind::Fifo => rustix::fs::mknodat(&parent, name, FileType::Fifo, mode, 0),
        };
        result.map_err(at(&self.shown(path)))
    }

    /// Sets owner, mode, extended attributes and time; a link itself is changed, not its target.
    pub(crate) fn set_metadata(
        &self,
        path: &LayerPath,
        metadata: &Metadata,
        is_link: bool,
    ) -> Result<(), Error> {
        let io = |errno| at(&self.shown(path))(errno);
        let owner = (Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)));
        let (parent, name) = match path.split() {
            Some(_) => self.parent(path)?,
            None => (self.directory(path)?, &b"."[..]),
        };
        let changed = rustix::fs::chownat(&parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW);
        let kept_owner = kept_owner(metadata, changed).map_err(io)?;
        if !is_link {
            // After the owner: a change of owner clears setuid. The last name is no link, nothing else runs here.
            let mode = Mode::from_raw_mode(metadata.mode & 0o7777);
            rustix::fs::chmodat(&parent, name, mode, AtFlags::empty()).map_err(io)?;
        }
        if !metadata.xattrs.is_empty() || kept_owner.is_some() || ids::are_limited() {
            // There is no setxattrat before Linux 6.13; the descriptor's own link leads to the parent, never further.
            let link = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&parent)));
            let target = link.join(OsStr::from_bytes(name));
            if kept_owner.is_none() && ids::are_limited() && !is_link {
                // A directory of a lower layer, which may have had another owner.
                let _ = rustix::fs::lremovexattr(&target, OWNER_ATTRIBUTE);
            }
            let flags = rustix::fs::XattrFlags::empty();
            set_xattrs(metadata, kept_owner.as_deref(), |name, value| {
                rustix::fs::lsetxattr(&target, name, value, flags)
            })
            .map_err(io)?;
        }
        let times = times(metadata.mtime);
        rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(io)
    }

    /// The same for a new regular file that is open.
    pub(crate) fn set_file_metadata(
        &self,
        path: &LayerPath,
        file: &File,
        metadata: &Metadata,
    ) -> Result<(), Error> {
        let io = |errno| at(&self.shown(path))(errno);
        let owner = (Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)));
        let kept_owner = kept_owner(metadata, rustix::fs::fchown(file, owner.0, owner.1)).map_err(io)?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(metadata.mode & 0o7777)).map_err(io)?;
        let flags = rustix::fs::XattrFlags::empty();
        set_xattrs(metadata, kept_owner.as_deref(), |name, value| {
            rustix::fs::fsetxattr(file, name, value, flags)
        })
        .map_err(io)?;
        rustix::fs::futimens(file, &times(metadata.mtime)).map_err(io)
    }

    /// Sets the time of the last change; a link itself is changed, not its target.
    pub(crate) fn set_time(&self, path: &LayerPath, time: Timestamp) -> Result<(), Error> {
        let (parent, name) = match path.split() {
            Some(_) => self.parent(path)?,
            None => (self.directory(path)?, &b"."[..]),
        };
        let times = times(time);
        rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(at(&self.shown(path)))
    }

    /// The directory that holds the path, and the name in it.
    fn parent<'a>(&self, path: &'a LayerPath) -> Result<(OwnedFd, &'a [u8]), Error> {
        let Some((parent, name)) = path.split() else {
            return Err(Error::Source {
                what: "/".to_owned(),
                reason: "the root cannot be replaced".to_owned(),
            });
        };
        Ok((self.directory(&parent)?, name))
    }

    fn directory_or_errno(&self, path: &LayerPath) -> Result<OwnedFd, Errno> {
        self.open_beneath(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC)
    }

    fn open_beneath(&self, path: &LayerPath, flags: OFlags) -> Result<OwnedFd, Errno> {
        let name = if path.is_root() { OsStr::new(".") } else { path.as_path().as_os_str() };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(self.folder.as_fd(), name, flags, Mode::empty(), resolve)
    }
}

/// The longest list of attribute names, the kernel's `XATTR_LIST_MAX`; a value has the same bound.
const MAX_XATTRS: usize = 64 << 10;
/// A list of a few names.
const SHORT_LIST: usize = 512;
/// Two numbers of 32 bits in decimal, with a colon.
const MAX_OWNER: usize = 21;

impl Tree for Rooted {
    fn entry(&self, path: &LayerPath) -> Result<Option<Entry>, Error> {
        let Some(stat) = self.stat(path)? else { return Ok(None) };
        let mut entry = Entry { kind: kind_of(&stat), metadata: metadata_of(&stat) };
        if ids::are_limited() && (entry.is_file() || entry.is_directory()) {
            // An owner that does not exist here. What cannot be opened has none that we noted.
            let mut value = [0u8; MAX_OWNER];
            if let Ok(file) = self.file(path)
                && let Ok(length) = rustix::fs::fgetxattr(&file, OWNER_ATTRIBUTE, &mut value[..])
                && let Some((uid, gid)) = parse_owner(&value[..length])
            {
                (entry.metadata.uid, entry.metadata.gid) = (uid, gid);
            }
        }
        Ok(Some(entry))
    }

    fn read_link(&self, path: &LayerPath) -> Result<Vec<u8>, Error> {
        Rooted::read_link(self, path)
    }

    fn names(&self, path: &LayerPath) -> Result<Vec<Vec<u8>>, Error> {
        Rooted::names(self, path)
    }

    fn open(&self, path: &LayerPath) -> Result<Box<dyn Read + '_>, Error> {
        Ok(Box::new(self.file(path)?))
    }

    fn xattrs(&self, path: &LayerPath) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
        let file = self.file(path)?;
        let io = |errno| at(&self.shown(path))(errno);
        // Most files have none, or few: the largest list is for those with more.
        let mut list = vec![0u8; SHORT_LIST];
        let length = loop {
            match rustix::fs::flistxattr(&file, &mut list[..]) {
                Ok(length) => break length,
                Err(Errno::NOTSUP) => break 0,
                Err(Errno::RANGE) if list.len() < MAX_XATTRS => list.resize(MAX_XATTRS, 0),
                Err(errno) => return Err(io(errno)),
            }
        };
        let mut xattrs = BTreeMap::new();
        let ours = |name: &[u8]| ids::are_limited() && name == OWNER_ATTRIBUTE.as_bytes();
        for name in list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty() && !ours(name)) {
            let mut value = vec![0u8; MAX_XATTRS];
            match rustix::fs::fgetxattr(&file, name, &mut value[..]) {
                Ok(length) => {
                    value.truncate(length);
                    xattrs.insert(name.to_vec(), value);
                }
                // Gone meanwhile, or not for us.
                Err(Errno::NODATA | Errno::PERM | Errno::ACCESS) => {}
                Err(errno) => return Err(io(errno)),
            }
        }
        Ok(xattrs)
    }

    fn identity(&self, path: &LayerPath) -> Result<Option<(u64, u64)>, Error> {
        let stat = self.stat(path)?.filter(|stat| stat.st_nlink > 1);
        Ok(stat.map(|stat| (stat.st_dev, stat.st_ino)))
    }

    fn shown(&self, path: &LayerPath) -> PathBuf {
        Rooted::shown(self, path)
    }
}

/// The owner that could not be given, where that is because it does not exist in this user namespace.
fn kept_owner(metadata: &Metadata, changed: Result<(), Errno>) -> Result<Option<String>, Errno> {
    match changed {
        Err(Errno::INVAL) if ids::are_limited() => Ok(Some(format!("{}:{}", metadata.uid, metadata.gid))),
        other => other.map(|()| None),
    }
}

fn set_xattrs(
    metadata: &Metadata,
    kept_owner: Option<&str>,
    set: impl Fn(&[u8], &[u8]) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let owner = kept_owner.map(|owner| (OWNER_ATTRIBUTE.as_bytes(), owner.as_bytes()));
    let given = metadata.xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice()));
    for (name, value) in given.chain(owner) {
        match set(name, value) {
            // A file system or node type without such attributes: as with Docker, the file counts.
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(Errno::PERM) if name.starts_with(b"user.") || ids::are_limited() => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn times(time: Timestamp) -> Timestamps {
    let time = Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn kind_of(stat: &Stat) -> EntryKind {
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => EntryKind::File { size: stat.st_size as u64 },
        FileType::Directory => EntryKind::Directory,
        FileType::Symlink => EntryKind::Symlink,
        FileType::Fifo => EntryKind::Fifo,
        FileType::CharacterDevice => EntryKind::CharDevice { major, minor },
        FileType::BlockDevice => EntryKind::BlockDevice { major, minor },
        _ => EntryKind::Socket,
    }
}

/// Owner, mode and time of a file; its extended attributes are not in a [`Stat`].
pub(crate) fn metadata_of(stat: &Stat) -> Metadata {
    Metadata {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: time_of(stat),
        xattrs: Default::default(),
    }
}

/// The time of the last change.
pub(crate) fn time_of(stat: &Stat) -> Timestamp {
    Timestamp { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn tree() -> (tempfile::TempDir, Rooted) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        symlink("usr/bin", root.join("bin")).unwrap();
        symlink("/usr/bin", root.join("abs")).unwrap();
        symlink("../../..", root.join("usr/up")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        symlink("missing/file", root.join("dangling")).unwrap();
        fs::write(dir.path().join("canary"), "alive").unwrap();
        let rooted = Rooted::open(&root).unwrap();
        (dir, rooted)
    }

    #[test]
    fn links_end_inside_the_root() {
        let (_dir, rooted) = tree();
        let resolve = |path: &str| {
            rooted.resolve(path.as_bytes(), Last::Follow, Escape::Clamp).map(|path| path.to_string())
        };
        for (path, real) in [
            ("bin/sh", "/usr/bin/sh"),
            ("abs/sh", "/usr/bin/sh"),
            ("usr/up/bin", "/usr/bin"),
            ("../../etc/passwd", "/etc/passwd"),
            ("dangling", "/missing/file"),
            ("no/such/../file", "/no/file"),
            ("/", "/"),
        ] {
            assert_eq!(resolve(path).unwrap(), real, "{path}");
        }
        assert!(resolve("loop/x").is_err());
        let kept = rooted.resolve(b"usr/../bin", Last::Keep, Escape::Clamp).unwrap();
        assert_eq!(kept.to_string(), "/bin");
    }

    #[test]
    fn a_context_has_no_way_out() {
        let (_dir, rooted) = tree();
        for path in ["..", "a/../../b", "abs", "usr/up/canary", "abs/sh"] {
            let result = rooted.resolve(path.as_bytes(), Last::Follow, Escape::Refuse);
            assert!(matches!(result, Err(Error::Source { .. })), "{path}: {result:?}");
        }
        assert_eq!(
            rooted.resolve(b"bin/sh", Last::Follow, Escape::Refuse).unwrap().to_string(),
            "/usr/bin/sh"
        );
    }

    #[test]
    fn operations_do_not_follow_links() {
        let (dir, rooted) = tree();
        let path = |text: &str| LayerPath::parse(text.as_bytes()).unwrap();
        assert!(rooted.create(&path("usr/up/canary")).is_err());
        assert!(rooted.make_directories(&path("bin/x")).is_err());
        assert!(rooted.directory(&path("usr/up")).is_err());
        rooted.remove(&path("usr")).unwrap();
        rooted.remove(&path("loop")).unwrap();
        rooted.remove(&path("not/there")).unwrap();
        assert_eq!(fs::read(dir.path().join("canary")).unwrap(), b"alive");
        assert!(!dir.path().join("root/usr").exists());
        let made = rooted.make_directories(&path("a/b")).unwrap();
        assert_eq!(made, [path("a"), path("a/b")]);
        assert!(rooted.make_directories(&path("a/b")).unwrap().is_empty());
    }
}
