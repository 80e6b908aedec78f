//! From an overlay's upper directory to a layer (kernel `Documentation/filesystems/overlayfs.rst`).

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{lgetxattr, llistxattr, major, minor};
use rustix::io::Errno;

use super::pax::MAX_XATTR_VALUE;
use super::{Kind, LayerPath, LayerWriter, Metadata, Node, Timestamp};
use crate::Error;
use crate::error::at;

/// The attribute of a file whose owner does not exist in the user namespace that it was unpacked in: `UID:GID`.
pub const OWNER_ATTRIBUTE: &str = "user.tiffin.owner";
/// Labels of the host's policy, which say nothing about the image.
const SELINUX: &[u8] = b"security.selinux";
/// The kernel's `XATTR_LIST_MAX`.
const MAX_XATTR_LIST: usize = 64 << 10;

/// Whether the layer holds an entry for the root directory itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpperRoot {
    /// It does: a base layer, or a step that changed the root's owner or mode.
    Include,
    /// It does not: its only change is the time of the last entry in it.
    Omit,
}

/// Where overlayfs kept its notes, which depends on who mounted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpperAttributes {
    /// Root of the machine: `trusted.overlay.*`.
    Trusted,
    /// Root of a user namespace, with the mount option `userxattr`: `user.overlay.*`. A file's owner may be in
    /// [`OWNER_ATTRIBUTE`].
    User,
}

impl UpperAttributes {
    fn prefix(self) -> &'static [u8] {
        match self {
            Self::Trusted => b"trusted.overlay.",
            Self::User => b"user.overlay.",
        }
    }

    fn value<'a>(self, xattrs: &'a BTreeMap<Vec<u8>, Vec<u8>>, name: &[u8]) -> Option<&'a [u8]> {
        xattrs.get(&[self.prefix(), name].concat()).map(Vec::as_slice)
    }
}

/// Appends everything in the upper directory, sorted by name: files, whiteouts (character devices 0:0), opaque
/// directories, hard links, extended attributes without overlayfs' own. Nothing may change the directory meanwhile.
pub fn write_upper(
    upper: &Path,
    root: UpperRoot,
    attributes: UpperAttributes,
    writer: &mut LayerWriter,
) -> Result<(), Error> {
    let mut walk = Walk { writer, attributes, links: HashMap::new() };
    walk.directory(upper, &LayerPath::default(), root)
}

struct Walk<'a> {
    writer: &'a mut LayerWriter,
    attributes: UpperAttributes,
    links: HashMap<(u64, u64), LayerPath>,
}

impl Walk<'_> {
    fn directory(&mut self, real: &Path, path: &LayerPath, root: UpperRoot) -> Result<(), Error> {
        let xattrs = read_xattrs(real)?;
        if self.attributes.value(&xattrs, b"redirect").is_some() {
            return Err(Error::Unsupported {
                what: format!("renamed directory {path}"),
                reason: "the overlay must be mounted with redirect_dir=off".to_owned(),
            });
        }
        if !path.is_root() || root == UpperRoot::Include {
            let attributes = fs::symlink_metadata(real).map_err(at(real))?;
            let node = Node {
                path: path.clone(),
                metadata: self.metadata(&attributes, xattrs.clone()),
                kind: Kind::Directory,
            };
            self.writer.append(&node, io::empty())?;
        }
        if self.attributes.value(&xattrs, b"opaque") == Some(b"y") {
            self.writer.append_opaque(path)?;
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(real).map_err(at(real))? {
            names.push(entry.map_err(at(real))?.file_name());
        }
        names.sort();
        for name in names {
            self.entry(&real.join(&name), &path.join(name.as_bytes())?)?;
        }
        Ok(())
    }

    fn entry(&mut self, real: &Path, path: &LayerPath) -> Result<(), Error> {
        let attributes = fs::symlink_metadata(real).map_err(at(real))?;
        let file_type = attributes.file_type();
        if file_type.is_dir() {
            return self.directory(real, path, UpperRoot::Include);
        }
        if file_type.is_char_device() && attributes.rdev() == 0 {
            return self.writer.append_whiteout(path);
        }
        let device = || (major(attributes.rdev()), minor(attributes.rdev()));
        let mut data = None;
        let mut kind = if file_type.is_file() {
            data = Some(File::open(real).map_err(at(real))?);
            Kind::File { size: attributes.len(), offset: 0 }
        } else if file_type.is_symlink() {
            Kind::Symlink(fs::read_link(real).map_err(at(real))?.into_os_string().as_bytes().to_vec())
        } else if file_type.is_char_device() {
            let (major, minor) = device();
            Kind::CharDevice { major, minor }
        } else if file_type.is_block_device() {
            let (major, minor) = device();
            Kind::BlockDevice { major, minor }
        } else if file_type.is_fifo() {
            Kind::Fifo
        } else {
            // A socket is nothing without the process that made it, and tar has no type for it.
            return Ok(());
        };
        if attributes.nlink() > 1 {
            let inode = (attributes.dev(), attributes.ino());
            if let Some(first) = self.links.get(&inode) {
                kind = Kind::HardLink(first.clone());
            } else {
                self.links.insert(inode, path.clone());
            }
        }
        let node =
            Node { path: path.clone(), metadata: self.metadata(&attributes, read_xattrs(real)?), kind };
        match data {
            Some(data) => self.writer.append(&node, data),
            None => self.writer.append(&node, io::empty()),
        }
    }

    /// Without overlayfs' own attributes, and with the owner that the image means.
    fn metadata(&self, attributes: &fs::Metadata, mut xattrs: BTreeMap<Vec<u8>, Vec<u8>>) -> Metadata {
        let prefix = self.attributes.prefix();
        let mut owner = (attributes.uid(), attributes.gid());
        if self.attributes == UpperAttributes::User
            && let Some(value) = xattrs.remove(OWNER_ATTRIBUTE.as_bytes())
        {
            owner = parse_owner(&value).unwrap_or(owner);
        }
        xattrs.retain(|name, _| !name.starts_with(prefix) && name.as_slice() != SELINUX);
        Metadata {
            mode: attributes.mode() & 0o7777,
            uid: owner.0,
            gid: owner.1,
            mtime: Timestamp { seconds: attributes.mtime(), nanoseconds: attributes.mtime_nsec() as u32 },
            xattrs,
        }
    }
}

/// The value of [`OWNER_ATTRIBUTE`].
pub fn parse_owner(value: &[u8]) -> Option<(u32, u32)> {
    let (uid, gid) = std::str::from_utf8(value).ok()?.split_once(':')?;
    Some((uid.parse().ok()?, gid.parse().ok()?))
}

fn read_xattrs(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
    let io = |errno: Errno| at(path)(errno.into());
    let mut names = vec![0u8; MAX_XATTR_LIST];
    let length = match llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => 0,
        Err(errno) => return Err(io(errno)),
    };
    let mut xattrs = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0u8; MAX_XATTR_VALUE];
        match lgetxattr(path, name, &mut value[..]) {
            Ok(length) => value.truncate(length),
            // Listed, but not for us to read.
            Err(Errno::NODATA | Errno::NOTSUP) => continue,
            Err(errno) => return Err(io(errno)),
        }
        xattrs.insert(name.to_vec(), value);
    }
    Ok(xattrs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;
    use crate::layer::{Change, Compression, LayerReader};
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn an_upper_directory_becomes_a_sorted_layer() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("images")).unwrap();
        let upper = dir.path().join("upper");
        fs::create_dir_all(upper.join("d")).unwrap();
        fs::write(upper.join("d/z"), b"data").unwrap();
        fs::hard_link(upper.join("d/z"), upper.join("d/a")).unwrap();
        fs::set_permissions(upper.join("d/z"), fs::Permissions::from_mode(0o4711)).unwrap();
        symlink("/etc/passwd", upper.join("l")).unwrap();
        std::os::unix::net::UnixListener::bind(upper.join("socket")).unwrap();
        let mut writer = LayerWriter::new(&store, Compression::None).unwrap();
        write_upper(&upper, UpperRoot::Omit, UpperAttributes::Trusted, &mut writer).unwrap();
        let layer = writer.finish().unwrap();

        let mut reader = LayerReader::new(store.open_blob(&layer.descriptor).unwrap());
        let mut seen = Vec::new();
        while let Some(change) = reader.next_change().unwrap() {
            let Change::Node(node) = change else { panic!("{change:?}") };
            seen.push((node.path.to_string(), node.kind, node.metadata.mode));
        }
        let path = |text: &str| LayerPath::parse(text.as_bytes()).unwrap();
        assert_eq!(seen.len(), 4, "{seen:?}");
        assert_eq!(seen[0].0, "/d");
        assert!(matches!(&seen[1], (name, Kind::File { size: 4, .. }, 0o4711) if name == "/d/a"), "{seen:?}");
        assert_eq!(seen[2].1, Kind::HardLink(path("d/a")));
        assert_eq!(seen[3].1, Kind::Symlink(b"/etc/passwd".to_vec()));
    }

    #[test]
    fn notes_in_user_attributes_are_read_and_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("images")).unwrap();
        let upper = dir.path().join("upper");
        fs::create_dir_all(upper.join("d")).unwrap();
        fs::write(upper.join("f"), b"data").unwrap();
        let set = |name: &str, attribute: &str, value: &str| {
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::lsetxattr(upper.join(name), attribute, value.as_bytes(), flags)
        };
        if set("d", "user.overlay.opaque", "y") == Err(Errno::NOTSUP) {
            eprintln!("SKIPPED: no user attributes on this file system");
            return;
        }
        set("f", "user.overlay.origin", "x").unwrap();
        set("f", OWNER_ATTRIBUTE, "7:8").unwrap();
        set("f", "user.kept", "v").unwrap();
        let read = |attributes: UpperAttributes| {
            let mut writer = LayerWriter::new(&store, Compression::None).unwrap();
            write_upper(&upper, UpperRoot::Omit, attributes, &mut writer).unwrap();
            let layer = writer.finish().unwrap();
            let mut reader = LayerReader::new(store.open_blob(&layer.descriptor).unwrap());
            let mut changes = Vec::new();
            while let Some(change) = reader.next_change().unwrap() {
                changes.push(change);
            }
            changes
        };
        let changes = read(UpperAttributes::User);
        assert!(changes.iter().any(|change| matches!(change, Change::Opaque(_))), "{changes:?}");
        let Some(Change::Node(file)) = changes.last() else { panic!("{changes:?}") };
        assert_eq!((file.metadata.uid, file.metadata.gid), (7, 8));
        assert_eq!(file.metadata.xattrs.keys().collect::<Vec<_>>(), [b"user.kept"]);
        // For root they are attributes as all others.
        let changes = read(UpperAttributes::Trusted);
        assert!(!changes.iter().any(|change| matches!(change, Change::Opaque(_))), "{changes:?}");
        let Some(Change::Node(file)) = changes.last() else { panic!("{changes:?}") };
        assert_eq!(file.metadata.xattrs.len(), 3);
    }
}
