//! Layers onto a tree, by the rules of the OCI image-spec 1.1, layer.md.

use std::io::Read;

use oci::layer::{Change, DataRun, Kind, LayerPath, LayerReader, Metadata, Node as Entry};

use crate::Error;
use crate::ext4::is_stored_xattr;
use crate::tree::{
    Attributes, Content, Directory, FileData, Name, Node, NodeId, Place, ResolveError, Run, Tree, Xattr,
};

/// Applies layers, the lowest first.
pub(crate) struct Applier {
    tree: Tree,
    layers: u32,
    dropped_xattrs: u64,
}

impl Applier {
    /// An empty root.
    pub(crate) fn new() -> Self {
        Self { tree: Tree::new(), layers: 0, dropped_xattrs: 0 }
    }

    /// Applies the next layer; `name` is what it is called in errors.
    pub(crate) fn apply<R: Read>(&mut self, name: &str, reader: &mut LayerReader<R>) -> Result<(), Error> {
        let layer = self.layers;
        self.layers += 1;
        while let Some(change) = reader.next_change()? {
            self.change(layer, change).map_err(|refused| match refused {
                Refused::Corrupt(path, reason) => Error::Corrupt {
                    layer: name.to_owned(),
                    path: path.to_string(),
                    reason: reason.to_owned(),
                },
                Refused::Unsupported(path, reason) => {
                    Error::Unsupported { path: path.to_string(), reason: reason.to_owned() }
                }
            })?;
        }
        Ok(())
    }

    /// The tree, and how many extended attributes were left out.
    pub(crate) fn finish(self) -> (Tree, u64) {
        (self.tree, self.dropped_xattrs)
    }

    fn change(&mut self, layer: u32, change: Change) -> Result<(), Refused> {
        match change {
            Change::Whiteout(path) => self.whiteout(layer, &path),
            Change::Opaque(path) => match self.resolve(&path, &path, None)? {
                Some(directory) => {
                    self.tree.prune(directory, layer);
                    Ok(())
                }
                // There is nothing below to hide; the entry still says that the directory is there.
                None => self.resolve(&path, &path, Some(layer)).map(|_| ()),
            },
            Change::Node(entry) => self.entry(layer, entry),
        }
    }

    fn whiteout(&mut self, layer: u32, path: &LayerPath) -> Result<(), Refused> {
        let (Some(found), Some((_, name))) = (self.find(path, path)?, path.split()) else { return Ok(()) };
        self.tree.prune(found.entry.node, layer);
        let empty = self.tree.children(found.entry.node).is_none_or(Directory::is_empty);
        if found.entry.layer != layer && empty {
            self.tree.unlink(found.directory, name);
        }
        Ok(())
    }

    fn entry(&mut self, layer: u32, entry: Entry) -> Result<(), Refused> {
        let Entry { path, metadata, kind } = entry;
        let Some((parent, name)) = path.split() else {
            self.tree.node_mut(NodeId::ROOT).attributes = self.attributes(metadata);
            return Ok(());
        };
        let corrupt = |reason| Refused::Corrupt(path.clone(), reason);
        // Before the parent is made: a link's target must be there without it.
        let linked = match &kind {
            Kind::HardLink(target) => match self.find(target, &path)? {
                Some(found) if self.tree.is_directory(found.entry.node) => {
                    return Err(corrupt("it is a hard link to a directory"));
                }
                Some(found) => Some(found.entry.node),
                None => return Err(corrupt("it is a hard link to a path that no entry before it has")),
            },
            _ => None,
        };
        let Some(directory) = self.resolve(&parent, &path, Some(layer))? else {
            return Err(corrupt("its directory is missing"));
        };
        let existing = self.tree.child(directory, name);
        let content = match kind {
            Kind::Directory => match existing {
                Some(existing) if self.tree.is_directory(existing.node) => {
                    self.tree.node_mut(existing.node).attributes = self.attributes(metadata);
                    self.tree.link(directory, name, existing.node, layer);
                    return Ok(());
                }
                _ => Content::Directory(Directory::default()),
            },
            Kind::File { size, offset } => {
                Content::File { size, data: FileData::Whole(Place { source: layer, offset }) }
            }
            Kind::Sparse { size, runs } => {
                let run = |run: &DataRun| Run {
                    start: run.start,
                    length: run.length,
                    place: Place { source: layer, offset: run.offset },
                };
                Content::File { size, data: FileData::Sparse(runs.iter().map(run).collect()) }
            }
            Kind::Symlink(target) => Content::Symlink(target.into()),
            Kind::CharDevice { major, minor } => Content::CharDevice { major, minor },
            Kind::BlockDevice { major, minor } => Content::BlockDevice { major, minor },
            Kind::Fifo => Content::Fifo,
            Kind::HardLink(_) => {
                if let Some(node) = linked {
                    self.tree.link(directory, name, node, layer);
                }
                return Ok(());
            }
        };
        let attributes = self.attributes(metadata);
        let node = self.tree.add(Node { attributes, content });
        self.tree.link(directory, name, node, layer);
        Ok(())
    }

    /// The entry at `path`; the last name is not followed.
    fn find(&mut self, path: &LayerPath, blamed: &LayerPath) -> Result<Option<Found>, Refused> {
        let Some((parent, name)) = path.split() else { return Ok(None) };
        let directory = match self.tree.resolve(parent.as_bytes(), None) {
            Ok(directory) => directory,
            // What is under a file is not there; that is no reason to refuse a whiteout of it.
            Err(ResolveError::NotADirectory) => None,
            Err(error) => return Err(refuse(error, blamed)),
        };
        Ok(directory
            .and_then(|directory| Some(Found { directory, entry: self.tree.child(directory, name)? })))
    }

    fn resolve(
        &mut self,
        path: &LayerPath,
        blamed: &LayerPath,
        create: Option<u32>,
    ) -> Result<Option<NodeId>, Refused> {
        self.tree.resolve(path.as_bytes(), create).map_err(|error| refuse(error, blamed))
    }

    fn attributes(&mut self, metadata: Metadata) -> Attributes {
        let (kept, dropped): (Vec<_>, Vec<_>) =
            metadata.xattrs.into_iter().partition(|(name, _)| is_stored_xattr(name));
        self.dropped_xattrs += dropped.len() as u64;
        Attributes {
            mode: (metadata.mode & 0o7777) as u16,
            uid: metadata.uid,
            gid: metadata.gid,
            mtime: metadata.mtime,
            xattrs: kept
                .into_iter()
                .map(|(name, value)| Xattr { name: name.into(), value: value.into() })
                .collect(),
        }
    }
}

/// An entry of the tree and the directory that it is in.
struct Found {
    directory: NodeId,
    entry: Name,
}

enum Refused {
    Corrupt(LayerPath, &'static str),
    Unsupported(LayerPath, &'static str),
}

fn refuse(error: ResolveError, path: &LayerPath) -> Refused {
    match error {
        ResolveError::NotADirectory => Refused::Corrupt(path.clone(), "a parent of it is not a directory"),
        ResolveError::TooManyLinks => Refused::Corrupt(
            path.clone(),
            "its parents are a loop of symbolic links, or more than 40 of them",
        ),
        ResolveError::TooDeep => Refused::Unsupported(path.clone(), "it is more than 2048 directories deep"),
    }
}
