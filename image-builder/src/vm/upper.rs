//! From the disk that a step wrote to, to its layer, without a mount: the disk is read as what it is, a stranger's.
//!
//! The layer is the one that `oci::layer::write_upper` makes of the same overlay's upper directory.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::Path;

use envd_proto::build::{MAX_OUTCOME, OUTCOME, Outcome, UPPER};
use oci::layer::{DataRun, Kind, LayerPath, LayerWriter, Metadata, Node};
use rootfs_tools::{Attributes, Content, FileSystem, ImageData, NodeId, Place, Run, Tree, Xattr};

use crate::error::{Error, at};

const OVERLAY: &[u8] = b"trusted.overlay.";
const OPAQUE: &[u8] = b"trusted.overlay.opaque";
const REDIRECT: &[u8] = b"trusted.overlay.redirect";
/// Labels of the machine's policy, which say nothing about the image.
const SELINUX: &[u8] = b"security.selinux";

/// The most bytes of files that become a layer, holes counted: a sparse file of a few blocks can say that it is as large as
/// the largest disk, and is written out with all its zeros.
const MAX_LAYER: u64 = 256 << 30;

/// The disk of a step that has ended.
pub(super) struct UpperDisk {
    fs: FileSystem,
    tree: Tree,
    upper: NodeId,
}

impl UpperDisk {
    /// Reads the disk in the file.
    pub(super) fn open(file: &Path) -> Result<Self, Error> {
        let fs = FileSystem::open(file)?;
        let tree = fs.tree()?.tree;
        let upper = tree.child(NodeId::ROOT, UPPER.as_bytes()).map(|name| name.node);
        let upper = upper.filter(|upper| tree.is_directory(*upper));
        let upper = upper.ok_or_else(|| strange(file, format!("it has no directory {UPPER}")))?;
        Ok(Self { fs, tree, upper })
    }

    /// How the step ended.
    pub(super) fn outcome(&self) -> Result<Outcome, Error> {
        let path = self.fs.path();
        let node = self.tree.child(NodeId::ROOT, OUTCOME.as_bytes());
        let Some(Content::File { size, data }) = node.map(|name| &self.tree.node(name.node).content) else {
            return Err(strange(path, format!("it has no file {OUTCOME}")));
        };
        let mut text = Vec::new();
        let runs = data.runs(*size).collect();
        DataReader::new(self.fs.data(), runs).take(MAX_OUTCOME).read_to_end(&mut text).map_err(at(path))?;
        serde_json::from_slice(&text).map_err(|error| strange(path, format!("{OUTCOME}: {error}")))
    }

    /// Whether the step changed nothing below its root.
    pub(super) fn is_empty(&self) -> bool {
        self.tree.children(self.upper).is_none_or(|names| names.is_empty())
    }

    /// The attributes of its root directory.
    pub(super) fn root(&self) -> &Attributes {
        &self.tree.node(self.upper).attributes
    }

    /// Appends everything, sorted by name; with `root`, the root directory itself too.
    pub(super) fn write(&self, root: bool, writer: &mut LayerWriter) -> Result<(), Error> {
        let mut walk = Walk { disk: self, writer, links: HashMap::new(), total: 0 };
        // The last one is the next: what is in a directory comes before its siblings.
        let mut left = vec![(LayerPath::default(), self.upper)];
        while let Some((path, id)) = left.pop() {
            let Some(names) = walk.entry(&path, id, root)? else { continue };
            let mut inner = Vec::new();
            for (name, child) in names {
                inner.push((path.join(name)?, child));
            }
            left.extend(inner.into_iter().rev());
        }
        Ok(())
    }
}

fn strange(disk: &Path, reason: String) -> Error {
    Error::Program {
        program: "the machine of the step".to_owned(),
        reason: format!("the disk {} is not what it should be: {reason}", disk.display()),
    }
}

struct Walk<'a> {
    disk: &'a UpperDisk,
    writer: &'a mut LayerWriter,
    links: HashMap<usize, LayerPath>,
    total: u64,
}

/// What is in a directory.
type Names<'a> = Vec<(&'a [u8], NodeId)>;

impl<'a> Walk<'a> {
    /// Appends one entry; gives what is in it where it is a directory.
    fn entry(&mut self, path: &LayerPath, id: NodeId, root: bool) -> Result<Option<Names<'a>>, Error> {
        let disk = self.disk;
        let found = disk.tree.node(id);
        let metadata = metadata(&found.attributes);
        let (kind, runs) = match &found.content {
            Content::Directory(names) => {
                if has(&found.attributes, REDIRECT).is_some() {
                    let reason =
                        format!("the directory {path} was renamed, which its overlay does not allow");
                    return Err(strange(disk.fs.path(), reason));
                }
                if !path.is_root() || root {
                    let node = Node { path: path.clone(), metadata, kind: Kind::Directory };
                    self.writer.append(&node, io::empty())?;
                }
                if has(&found.attributes, OPAQUE) == Some(b"y") {
                    self.writer.append_opaque(path)?;
                }
                return Ok(Some(names.iter().map(|(name, child)| (name, child.node)).collect()));
            }
            Content::CharDevice { major: 0, minor: 0 } => {
                self.writer.append_whiteout(path)?;
                return Ok(None);
            }
            Content::File { size, data } => {
                let runs: Vec<Run> = data.runs(*size).collect();
                let known = |run: &Run| DataRun { start: run.start, length: run.length, offset: 0 };
                (Kind::Sparse { size: *size, runs: runs.iter().map(known).collect() }, runs)
            }
            Content::Symlink(target) => (Kind::Symlink(target.to_vec()), Vec::new()),
            Content::CharDevice { major, minor } => {
                (Kind::CharDevice { major: *major, minor: *minor }, Vec::new())
            }
            Content::BlockDevice { major, minor } => {
                (Kind::BlockDevice { major: *major, minor: *minor }, Vec::new())
            }
            Content::Fifo => (Kind::Fifo, Vec::new()),
        };
        if let Some(first) = self.links.get(&id.index()) {
            let node = Node { path: path.clone(), metadata, kind: Kind::HardLink(first.clone()) };
            self.writer.append(&node, io::empty())?;
            return Ok(None);
        }
        self.links.insert(id.index(), path.clone());
        if let Kind::Sparse { size, .. } = &kind {
            self.total = self.total.saturating_add(*size);
            if self.total > MAX_LAYER {
                return Err(Error::Command {
                    outcome: format!("left files of more than {MAX_LAYER} bytes, holes counted ({path})"),
                });
            }
        }
        let node = Node { path: path.clone(), metadata, kind };
        self.writer.append(&node, DataReader::new(disk.fs.data(), runs))?;
        Ok(None)
    }
}

fn has<'a>(attributes: &'a Attributes, name: &[u8]) -> Option<&'a [u8]> {
    attributes.xattrs.iter().find(|xattr| &*xattr.name == name).map(|xattr| &*xattr.value)
}

fn metadata(attributes: &Attributes) -> Metadata {
    let ours = |xattr: &&Xattr| !xattr.name.starts_with(OVERLAY) && &*xattr.name != SELINUX;
    let xattrs = attributes.xattrs.iter().filter(ours);
    Metadata {
        mode: attributes.mode.into(),
        uid: attributes.uid,
        gid: attributes.gid,
        mtime: attributes.mtime,
        xattrs: xattrs.map(|xattr| (xattr.name.to_vec(), xattr.value.to_vec())).collect(),
    }
}

/// The bytes of a file's runs, one behind the other.
struct DataReader<'a> {
    data: ImageData<'a>,
    runs: std::vec::IntoIter<Run>,
    current: Option<(Place, u64)>,
}

impl<'a> DataReader<'a> {
    fn new(data: ImageData<'a>, runs: Vec<Run>) -> Self {
        Self { data, runs: runs.into_iter(), current: None }
    }
}

impl Read for DataReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (place, length) = match self.current.take().filter(|(_, length)| *length > 0) {
            Some(current) => current,
            None => match self.runs.next() {
                Some(run) => (run.place, run.length),
                None => return Ok(0),
            },
        };
        let count = (buffer.len() as u64).min(length) as usize;
        self.data.read_at(place, &mut buffer[..count]).map_err(io::Error::other)?;
        let next = Place { offset: place.offset + count as u64, ..place };
        self.current = Some((next, length - count as u64));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci::Store;
    use oci::layer::{Change, Compression, LayerReader};
    use rootfs_tools::{Ext4, FileData, NoData, Node as TreeNode, Size, write_tree};

    fn directory() -> Content {
        Content::Directory(Default::default())
    }

    fn xattr(name: &str, value: &str) -> Xattr {
        Xattr { name: name.as_bytes().into(), value: value.as_bytes().into() }
    }

    /// A disk as a step leaves it, with what `fill` puts into its upper directory.
    fn disk(folder: &Path, data: &[&[u8]], fill: impl FnOnce(&mut Tree, NodeId)) -> std::path::PathBuf {
        let mut tree = Tree::new();
        let upper = tree.add(TreeNode { attributes: Attributes::default(), content: directory() });
        tree.link(NodeId::ROOT, UPPER.as_bytes(), upper, 0);
        fill(&mut tree, upper);
        let file = folder.join("upper.ext4");
        let mut source = data;
        write_tree(&mut tree, &Ext4::new(b"seed").size(Size::Exact(16 << 20)), &mut source, &file).unwrap();
        file
    }

    fn add(tree: &mut Tree, at: NodeId, name: &str, content: Content, xattrs: Vec<Xattr>) -> NodeId {
        let attributes =
            Attributes { mode: 0o4711, uid: 70_000, xattrs: xattrs.into(), ..Attributes::default() };
        let node = tree.add(TreeNode { attributes, content });
        tree.link(at, name.as_bytes(), node, 0);
        node
    }

    fn file(size: u64) -> Content {
        Content::File { size, data: FileData::Whole(Place { source: 0, offset: 0 }) }
    }

    #[test]
    fn a_disk_becomes_a_layer() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("images")).unwrap();
        let path = disk(dir.path(), &[b"data"], |tree, upper| {
            let opaque = vec![xattr("trusted.overlay.opaque", "y"), xattr("user.kept", "v")];
            let d = add(tree, upper, "d", directory(), opaque);
            let z = add(tree, d, "z", file(4), vec![xattr("security.selinux", "label")]);
            tree.link(d, b"a", z, 0);
            add(tree, upper, "gone", Content::CharDevice { major: 0, minor: 0 }, Vec::new());
            add(tree, upper, "null", Content::CharDevice { major: 1, minor: 3 }, Vec::new());
            add(tree, upper, "link", Content::Symlink(b"/etc/passwd"[..].into()), Vec::new());
        });
        let upper = UpperDisk::open(&path).unwrap();
        assert!(!upper.is_empty());
        let mut writer = LayerWriter::new(&store, Compression::None).unwrap();
        upper.write(false, &mut writer).unwrap();
        let layer = writer.finish().unwrap();
        let mut reader = LayerReader::new(store.open_blob(&layer.descriptor).unwrap());
        let mut seen = Vec::new();
        while let Some(change) = reader.next_change().unwrap() {
            seen.push(match change {
                Change::Opaque(path) => format!("{path} opaque"),
                Change::Whiteout(path) => format!("{path} gone"),
                Change::Node(Node { path, kind, metadata }) => {
                    let kind = match kind {
                        Kind::Directory => "directory".to_owned(),
                        Kind::File { size, .. } => format!("file {size}"),
                        Kind::HardLink(target) => format!("same as {target}"),
                        Kind::Symlink(_) => "link".to_owned(),
                        other => format!("{other:?}"),
                    };
                    let names = metadata.xattrs.keys().map(|name| String::from_utf8_lossy(name).into_owned());
                    format!(
                        "{path} {kind} {:o} {} {}",
                        metadata.mode,
                        metadata.uid,
                        names.collect::<String>()
                    )
                }
            });
        }
        let expected = [
            "/d directory 4711 70000 user.kept",
            "/d opaque",
            "/d/a file 4 4711 70000 ",
            "/d/z same as /d/a 4711 70000 ",
            "/gone gone",
            "/link link 4711 70000 ",
            "/null CharDevice { major: 1, minor: 3 } 4711 70000 ",
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_hostile_disk_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("images")).unwrap();
        let read = |path: &Path| {
            let upper = UpperDisk::open(path)?;
            let outcome = upper.outcome().map(drop);
            let mut writer = LayerWriter::new(&store, Compression::None)?;
            upper.write(true, &mut writer).and(outcome)
        };
        let strange = |error: Error| error.to_string();
        let whole = disk(dir.path(), &[], |_, _| ());
        assert!(strange(read(&whole).unwrap_err()).contains("it has no file outcome.json"));
        let renamed = disk(dir.path(), &[], |tree, upper| {
            add(tree, upper, "d", directory(), vec![xattr("trusted.overlay.redirect", "/etc")]);
        });
        assert!(strange(read(&renamed).unwrap_err()).contains("/d was renamed"));
        // A file that says it is as large as nothing that a step could write.
        let mut tree = Tree::new();
        let upper = add(&mut tree, NodeId::ROOT, UPPER, directory(), Vec::new());
        let sparse = |size| Content::File { size, data: FileData::Sparse(Box::default()) };
        for name in ["a", "b", "c"] {
            add(&mut tree, upper, name, sparse(100 << 30), Vec::new());
        }
        let huge = dir.path().join("huge.ext4");
        write_tree(&mut tree, &Ext4::new(b"seed"), &mut NoData, &huge).unwrap();
        let mut writer = LayerWriter::new(&store, Compression::None).unwrap();
        let few = UpperDisk::open(&huge).unwrap();
        let mut walk = Walk { disk: &few, writer: &mut writer, links: HashMap::new(), total: MAX_LAYER - 1 };
        let first = few.tree.child(few.upper, b"a").unwrap().node;
        let error = walk.entry(&LayerPath::parse(b"a").unwrap(), first, false).unwrap_err();
        assert!(error.to_string().contains("holes counted"), "{error}");
        // No file system, and less and less of one.
        let garbage = dir.path().join("garbage");
        for length in [0, 1, 4096, 1 << 20] {
            std::fs::write(&garbage, vec![0xa5; length]).unwrap();
            assert!(read(&garbage).is_err(), "{length}");
        }
        // Damage anywhere in the metadata ends in an error or in nothing, never in a panic or without an end.
        let bytes = std::fs::read(&whole).unwrap();
        for position in (1024..64 << 10).step_by(37) {
            let mut damaged = bytes.clone();
            damaged[position] ^= 0xff;
            std::fs::write(&garbage, &damaged).unwrap();
            let _ = read(&garbage);
        }
    }
}
