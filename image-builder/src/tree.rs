//! A tree of files that is only looked at: a folder, a mounted stack of layers, a file system in a file.
//!
//! What `COPY`, `WORKDIR` and `USER` need of an image is asked here, so that no step but `RUN` needs a mount, and a build
//! that may not mount at all copies with the same code. Paths are resolved in two steps: [`resolve`] follows symbolic links
//! by hand, with the tree's root as `/`, and gives a path that has none; every question is then asked of such a path.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;

use oci::layer::{LayerPath, Metadata};
use oci::{Digest, Hasher};

use crate::error::{Error, at};

/// The most symbolic links on the way to a file, as the kernel's `MAXSYMLINKS`.
const MAX_LINKS: usize = 40;

/// What a link that points above the root means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Escape {
    /// The root itself, as in a container.
    Clamp,
    /// An error: the context ends there.
    Refuse,
}

/// Whether the last name of a path is followed when it is a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Last {
    Follow,
    Keep,
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: EntryKind,
    /// Without extended attributes, which [`Tree::xattrs`] gives.
    pub(crate) metadata: Metadata,
}

/// The type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File { size: u64 },
    Directory,
    Symlink,
    Fifo,
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Socket,
}

impl Entry {
    pub(crate) fn is_directory(&self) -> bool {
        self.kind == EntryKind::Directory
    }

    pub(crate) fn is_file(&self) -> bool {
        matches!(self.kind, EntryKind::File { .. })
    }
}

/// A tree of files. All paths are resolved: no part of them is a symbolic link, but perhaps the last.
pub(crate) trait Tree: Send + Sync {
    /// What is at the path; a link is not followed. `None` when nothing is, or when the way leads through a file.
    fn entry(&self, path: &LayerPath) -> Result<Option<Entry>, Error>;

    /// The target of a link.
    fn read_link(&self, path: &LayerPath) -> Result<Vec<u8>, Error>;

    /// The names in a directory, sorted.
    fn names(&self, path: &LayerPath) -> Result<Vec<Vec<u8>>, Error>;

    /// The contents of a regular file.
    fn open(&self, path: &LayerPath) -> Result<Box<dyn Read + '_>, Error>;

    /// The extended attributes of a regular file or directory.
    fn xattrs(&self, path: &LayerPath) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error>;

    /// What two names of one regular file have in common, and no other file of the tree; `None` where there is no such or the file has one name.
    fn identity(&self, path: &LayerPath) -> Result<Option<(u64, u64)>, Error>;

    /// How errors call the path.
    fn shown(&self, path: &LayerPath) -> PathBuf;

    /// The digest of a regular file's contents.
    fn content_digest(&self, path: &LayerPath) -> Result<Digest, Error> {
        let mut hasher = Hasher::new();
        // A file that grows faster than it is read would never end; one byte more than it had is enough to tell.
        let size = match self.entry(path)? {
            Some(Entry { kind: EntryKind::File { size }, .. }) => size,
            _ => 0,
        };
        let mut file = self.open(path)?.take(size.saturating_add(1));
        io::copy(&mut file, &mut hasher).map_err(at(&self.shown(path)))?;
        Ok(hasher.finish().0)
    }
}

/// The path without symbolic links. What does not exist is taken as it stands.
pub(crate) fn resolve(tree: &dyn Tree, path: &[u8], last: Last, escape: Escape) -> Result<LayerPath, Error> {
    let refuse = |reason: &str| Error::Source {
        what: String::from_utf8_lossy(path).into_owned(),
        reason: reason.to_owned(),
    };
    let mut pending: Vec<Vec<u8>> = path.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect();
    let mut resolved = LayerPath::default();
    let mut links = 0;
    while let Some(name) = pending.pop() {
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                match resolved.split() {
                    Some((parent, _)) => resolved = parent,
                    None if escape == Escape::Refuse => {
                        return Err(refuse("it leads outside of the folder"));
                    }
                    None => {}
                }
                continue;
            }
            _ => {}
        }
        let next = resolved.join(&name)?;
        let is_last = pending.iter().all(|name| name.is_empty() || name == b".");
        let keep = is_last && last == Last::Keep;
        if keep || !tree.entry(&next)?.is_some_and(|entry| entry.kind == EntryKind::Symlink) {
            resolved = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(refuse("too many symbolic links"));
        }
        let target = tree.read_link(&next)?;
        if target.starts_with(b"/") {
            if escape == Escape::Refuse {
                return Err(refuse("a symbolic link on the way leads outside of the folder"));
            }
            resolved = LayerPath::default();
        }
        pending.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
    }
    Ok(resolved)
}
