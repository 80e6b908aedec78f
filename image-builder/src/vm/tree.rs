//! The tree of a stack of layers: names and metadata in memory, contents in the layers' spools.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci::Layer;
use oci::layer::{LayerPath, Metadata};
use rootfs_tools::{Content, DataSource, Node, NodeId, Place, Run, Tree as Nodes, tree_of_layers};

use super::spool::{Spool, Spools};
use crate::error::{Error, at};
use crate::tree::{Entry, EntryKind, Tree};

/// Bytes of a layer that are read at once.
const BUFFER: usize = 64 << 10;

/// A stack of layers. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct LayerTree(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    nodes: Nodes,
    spools: Vec<Arc<Spool>>,
    shown: String,
}

impl LayerTree {
    /// Reads the layers, lowest first.
    pub(super) fn read(layers: &[Layer], chain: &str, spools: &Spools) -> Result<Self, Error> {
        let spools = layers.iter().map(|layer| spools.of(layer)).collect::<Result<Vec<_>, _>>()?;
        let nodes =
            tree_of_layers(spools.iter().map(|spool| BufReader::with_capacity(BUFFER, spool.reader())))?;
        Ok(Self(Arc::new(Inner { nodes, spools, shown: chain.to_owned() })))
    }

    pub(super) fn nodes(&self) -> &Nodes {
        &self.0.nodes
    }

    /// The data behind the places in the nodes.
    pub(super) fn data(&self) -> LayerData<'_> {
        LayerData(self)
    }

    fn find(&self, path: &LayerPath) -> Option<&Node> {
        Some(self.nodes().node(self.find_id(path)?))
    }

    fn find_id(&self, path: &LayerPath) -> Option<NodeId> {
        let mut here = NodeId::ROOT;
        for name in path.components() {
            here = self.nodes().child(here, name)?.node;
        }
        Some(here)
    }

    /// The node at the path, or an error of the system's that says that it is no such.
    fn expect<'a, T>(
        &'a self,
        path: &LayerPath,
        as_it: impl FnOnce(&'a Node) -> Option<T>,
        kind: io::ErrorKind,
    ) -> Result<T, Error> {
        let found = self.find(path).ok_or(io::ErrorKind::NotFound);
        found.and_then(|node| as_it(node).ok_or(kind)).map_err(|kind| at(&self.shown(path))(kind))
    }
}

impl Tree for LayerTree {
    fn entry(&self, path: &LayerPath) -> Result<Option<Entry>, Error> {
        Ok(self.find(path).map(|node| {
            let kind = match &node.content {
                Content::Directory(_) => EntryKind::Directory,
                Content::File { size, .. } => EntryKind::File { size: *size },
                Content::Symlink(_) => EntryKind::Symlink,
                Content::CharDevice { major, minor } => {
                    EntryKind::CharDevice { major: *major, minor: *minor }
                }
                Content::BlockDevice { major, minor } => {
                    EntryKind::BlockDevice { major: *major, minor: *minor }
                }
                Content::Fifo => EntryKind::Fifo,
            };
            let attributes = &node.attributes;
            let metadata = Metadata {
                mode: attributes.mode.into(),
                uid: attributes.uid,
                gid: attributes.gid,
                mtime: attributes.mtime,
                xattrs: BTreeMap::new(),
            };
            Entry { kind, metadata }
        }))
    }

    fn read_link(&self, path: &LayerPath) -> Result<Vec<u8>, Error> {
        let target = |node: &Node| match &node.content {
            Content::Symlink(target) => Some(target.to_vec()),
            _ => None,
        };
        self.expect(path, target, io::ErrorKind::InvalidInput)
    }

    fn names(&self, path: &LayerPath) -> Result<Vec<Vec<u8>>, Error> {
        let names = |node: &Node| match &node.content {
            Content::Directory(names) => Some(names.iter().map(|(name, _)| name.to_vec()).collect()),
            _ => None,
        };
        self.expect(path, names, io::ErrorKind::NotADirectory)
    }

    fn open(&self, path: &LayerPath) -> Result<Box<dyn Read + '_>, Error> {
        let file = |node: &Node| match &node.content {
            Content::File { size, data } => Some((*size, data.runs(*size).collect::<Vec<_>>())),
            _ => None,
        };
        let (size, runs) = self.expect(path, file, io::ErrorKind::InvalidInput)?;
        Ok(Box::new(FileReader { tree: self, runs, size, position: 0, next: 0 }))
    }

    fn xattrs(&self, path: &LayerPath) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
        let xattrs = |node: &Node| {
            let xattrs = node.attributes.xattrs.iter();
            Some(xattrs.map(|xattr| (xattr.name.to_vec(), xattr.value.to_vec())).collect())
        };
        self.expect(path, xattrs, io::ErrorKind::InvalidInput)
    }

    fn identity(&self, path: &LayerPath) -> Result<Option<(u64, u64)>, Error> {
        let file =
            self.find_id(path).filter(|id| matches!(self.nodes().node(*id).content, Content::File { .. }));
        Ok(file.map(|id| (0, id.index() as u64)))
    }

    fn shown(&self, path: &LayerPath) -> PathBuf {
        Path::new(&format!("image {}", self.0.shown)).join(path.as_path())
    }
}

/// The bytes of a file, holes as zeros.
struct FileReader<'a> {
    tree: &'a LayerTree,
    runs: Vec<Run>,
    size: u64,
    position: u64,
    /// The run that the position is in or before.
    next: usize,
}

impl Read for FileReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.runs.get(self.next).is_some_and(|run| run.start + run.length <= self.position) {
            self.next += 1;
        }
        let run = self.runs.get(self.next).copied();
        let (end, place) = match run {
            Some(run) if run.start <= self.position => {
                let skip = self.position - run.start;
                (run.start + run.length, Some(Place { offset: run.place.offset + skip, ..run.place }))
            }
            Some(run) => (run.start, None),
            None => (self.size, None),
        };
        let count = (buffer.len() as u64).min(end.saturating_sub(self.position)) as usize;
        let buffer = &mut buffer[..count];
        match place {
            Some(place) => self.tree.read_at(place, buffer)?,
            None => buffer.fill(0),
        }
        self.position += count as u64;
        Ok(count)
    }
}

impl LayerTree {
    fn read_at(&self, place: Place, buffer: &mut [u8]) -> io::Result<()> {
        let spool = self.0.spools.get(place.source as usize).ok_or(io::ErrorKind::NotFound)?;
        spool.read_at(place.offset, buffer)
    }
}

/// The data of a [`LayerTree`]'s files.
pub(super) struct LayerData<'a>(&'a LayerTree);

impl DataSource for LayerData<'_> {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), rootfs_tools::Error> {
        let path = PathBuf::from(format!("layer {} of {}", place.source, self.0.0.shown));
        self.0.read_at(place, buffer).map_err(|error| rootfs_tools::Error::Io { path, error })
    }
}
