//! Folders that `RUN --mount=type=cache` keeps between builds.
//!
//! ```text
//! cache/mounts/                    cache/mounts-<map of ids>/ in a user namespace
//!   <digest of the id>/
//!     id                           the id as written
//!     0/{data,lock}                for sharing=shared and locked
//!     1/{data,lock}, 2/ ...        for sharing=private: as many as steps used at the same time
//! ```
//!
//! A folder appears by a rename, with its first contents in it. Steps of all builds lock `lock`: shared, or alone. Nothing
//! of these folders is in a cache key or a layer.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use dockerfile::{Owner, Sharing};
use oci::Hasher;
use oci::layer::{Kind, LayerPath, Metadata};

use crate::clock;
use crate::container::Lock;
use crate::error::{Error, at};
use crate::ids;
use crate::rooted::Rooted;
use crate::tree::{EntryKind, Tree};

/// 128 bits of the id's digest.
const NAME_LENGTH: usize = 32;
/// More steps than anybody runs at once.
const MAX_PRIVATE: usize = 1024;
const DEFAULT_MODE: u32 = 0o755;

/// Where the folders are.
#[derive(Clone, Debug)]
pub(crate) struct CacheMounts {
    root: PathBuf,
}

/// A folder in use.
#[derive(Debug)]
pub(crate) struct CacheMount {
    pub(crate) folder: PathBuf,
    /// What is to be locked before the step starts.
    pub(crate) lock: Option<Lock>,
    /// A lock that is held already.
    pub(crate) held: Option<File>,
}

/// What a new folder begins with: a directory of a tree.
pub(crate) type Begin<'a> = Option<(&'a dyn Tree, LayerPath)>;

impl CacheMounts {
    /// In that cache folder.
    pub(crate) fn new(cache: &Path) -> Self {
        Self { root: cache.join(ids::folder("mounts")) }
    }

    /// The folder with that id, made where it is missing.
    pub(crate) fn open(
        &self,
        id: &str,
        sharing: Sharing,
        owner: Owner,
        begin: &Begin<'_>,
    ) -> Result<CacheMount, Error> {
        let name = Hasher::digest_of(id.as_bytes());
        let home = self.root.join(&name.digest()[..NAME_LENGTH]);
        if !home.join("id").exists() {
            fs::create_dir_all(&home).map_err(at(&home))?;
            fs::write(home.join("id"), id).map_err(at(&home))?;
        }
        if sharing == Sharing::Private {
            for number in 1..MAX_PRIVATE {
                let folder = make(&home, number, owner, begin)?;
                let path = folder.join("lock");
                let lock = File::open(&path).map_err(at(&path))?;
                match lock.try_lock() {
                    Ok(()) => {
                        return Ok(CacheMount { folder: folder.join("data"), lock: None, held: Some(lock) });
                    }
                    Err(fs::TryLockError::WouldBlock) => {}
                    Err(fs::TryLockError::Error(error)) => return Err(at(&path)(error)),
                }
            }
            return Err(Error::Invalid {
                what: format!("--mount=type=cache,id={id}"),
                reason: format!("{MAX_PRIVATE} steps use it at the same time"),
            });
        }
        let folder = make(&home, 0, owner, begin)?;
        let lock = Lock {
            file: folder.join("lock"),
            exclusive: sharing == Sharing::Locked,
            what: format!("the cache mount {id}"),
        };
        Ok(CacheMount { folder: folder.join("data"), lock: Some(lock), held: None })
    }
}

fn make(home: &Path, number: usize, owner: Owner, begin: &Begin<'_>) -> Result<PathBuf, Error> {
    let folder = home.join(number.to_string());
    if folder.is_dir() {
        return Ok(folder);
    }
    let new = tempfile::Builder::new().prefix(".new-").tempdir_in(home).map_err(at(home))?;
    let data = new.path().join("data");
    fs::create_dir(&data).map_err(at(&data))?;
    File::create(new.path().join("lock")).map_err(at(new.path()))?;
    let root = Rooted::open(&data)?;
    let mut metadata = Metadata { mode: DEFAULT_MODE, mtime: clock::now()?, ..Metadata::default() };
    if let Some((tree, path)) = begin {
        copy_children(*tree, path, &root, &LayerPath::default())?;
        if let Some(entry) = tree.entry(path)? {
            metadata = Metadata { xattrs: tree.xattrs(path)?, ..entry.metadata };
        }
    }
    metadata.mode = owner.mode.unwrap_or(metadata.mode);
    metadata.uid = owner.uid.unwrap_or(metadata.uid);
    metadata.gid = owner.gid.unwrap_or(metadata.gid);
    root.set_metadata(&LayerPath::default(), &metadata, false)?;
    match fs::rename(new.path(), &folder) {
        // Another step was faster.
        Err(_) if folder.is_dir() => Ok(folder),
        other => other.map(|()| folder.clone()).map_err(at(&folder)),
    }
}

/// As deep as a path may be.
fn copy_children(from: &dyn Tree, path: &LayerPath, to: &Rooted, target: &LayerPath) -> Result<(), Error> {
    for name in from.names(path)? {
        let (path, target) = (path.join(&name)?, target.join(&name)?);
        let Some(entry) = from.entry(&path)? else { continue };
        let mut metadata = entry.metadata.clone();
        match entry.kind {
            EntryKind::Directory => {
                to.make(&target, &Kind::Directory)?;
                copy_children(from, &path, to, &target)?;
                metadata.xattrs = from.xattrs(&path)?;
            }
            EntryKind::File { .. } => {
                let mut file = to.create(&target)?;
                io::copy(&mut from.open(&path)?, &mut file).map_err(at(&to.shown(&target)))?;
                metadata.xattrs = from.xattrs(&path)?;
            }
            EntryKind::Symlink => to.make(&target, &Kind::Symlink(from.read_link(&path)?))?,
            EntryKind::Fifo => to.make(&target, &Kind::Fifo)?,
            // Devices and sockets are no contents of a cache.
            EntryKind::CharDevice { .. } | EntryKind::BlockDevice { .. } | EntryKind::Socket => continue,
        }
        to.set_metadata(&target, &metadata, entry.kind == EntryKind::Symlink)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn folders_begin_once_and_are_shared_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir_all(source.join("d/e")).unwrap();
        fs::write(source.join("d/e/f"), "text").unwrap();
        symlink("f", source.join("d/e/l")).unwrap();
        let tree = Rooted::open(&source).unwrap();
        let me = Owner {
            mode: Some(0o1777),
            uid: Some(rustix::process::getuid().as_raw()),
            gid: Some(rustix::process::getgid().as_raw()),
        };
        let caches = CacheMounts::new(dir.path());
        let open = |sharing| {
            let begin = LayerPath::parse(b"d").unwrap();
            caches.open("id", sharing, me, &Some((&tree, begin))).unwrap()
        };
        let first = open(Sharing::Shared);
        assert_eq!(fs::read_to_string(first.folder.join("e/l")).unwrap(), "text");
        assert_eq!(fs::metadata(&first.folder).unwrap().permissions().mode() & 0o7777, 0o1777);
        fs::remove_file(first.folder.join("e/f")).unwrap();
        let second = open(Sharing::Locked);
        assert_eq!(first.folder, second.folder);
        assert!(!second.folder.join("e/f").exists(), "it does not begin anew");
        assert!(!first.lock.unwrap().exclusive && second.lock.unwrap().exclusive);
        let (one, two) = (open(Sharing::Private), open(Sharing::Private));
        assert!(one.folder != two.folder && one.folder != first.folder);
        drop(one.held);
        assert_eq!(open(Sharing::Private).folder, one.folder);
    }
}
