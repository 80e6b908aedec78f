//! What a copy adds to the tree below it, as a layer.
//!
//! Entries are put one after the other, as if they were written into the tree: a later one may replace an earlier one, and
//! what an archive brings may be links that its own later entries go through. Nothing is written before the end, so a copy
//! that fails leaves nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use dockerfile::Chmod;
use oci::Hasher;
use oci::layer::{DataRun, Kind, LayerPath, LayerWriter, Metadata, Node, Timestamp};

use super::{Data, Entry, MAX_FILES, Role, SourceTree};
use crate::error::{Error, at};
use crate::tree::{Escape, Last, Tree, resolve};

/// What a copy adds to the tree below it.
pub(crate) struct NewLayer<'a> {
    pub(crate) lower: &'a dyn Tree,
    pub(crate) owner: Option<(u32, u32)>,
    pub(crate) mode: Option<&'a Chmod>,
    pub(crate) now: Timestamp,
    /// Sorted by path, so that folders come before what is in them; of several entries for one path the last counts.
    nodes: BTreeMap<LayerPath, usize>,
    inodes: Vec<Inode<'a>>,
    /// What of the lower tree something else was put in place of, and whether it was a directory.
    replaced: BTreeMap<LayerPath, bool>,
}

pub(crate) struct Inode<'a> {
    pub(crate) metadata: Metadata,
    pub(crate) contents: Contents<'a>,
}

/// What a new node holds.
pub(crate) enum Contents<'a> {
    Directory,
    /// What the selection found.
    Copied(&'a Data),
    /// A file in an unpacked archive.
    Part(Arc<File>, Kind),
    Symlink(Vec<u8>),
    /// A file with this text.
    Bytes(Vec<u8>),
    /// The file that the lower tree has there: it got another name, which needs both in one layer.
    Lower(LayerPath, u64),
}

/// What the tree has at a path, with what was put there so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Directory,
    Symlink(Vec<u8>),
    Other,
}

impl<'a> NewLayer<'a> {
    pub(crate) fn new(lower: &'a dyn Tree, now: Timestamp) -> Self {
        Self {
            lower,
            owner: None,
            mode: None,
            now,
            nodes: BTreeMap::new(),
            inodes: Vec::new(),
            replaced: BTreeMap::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The text of a file that was put there.
    pub(crate) fn bytes(&self, path: &LayerPath) -> Option<&[u8]> {
        match &self.inodes[*self.nodes.get(path)?].contents {
            Contents::Bytes(text) => Some(text),
            _ => None,
        }
    }

    /// Adds an entry of a selection. `names` knows the files that have several names.
    pub(super) fn entry(
        &mut self,
        entry: &'a Entry,
        path: LayerPath,
        names: &mut BTreeMap<super::Identity, usize>,
    ) -> Result<(), Error> {
        let is_directory = matches!(entry.data, Data::Directory);
        if is_directory && entry.role == Role::Source {
            return self.directories(&path, self.owner.unwrap_or_default());
        }
        let mut metadata = entry.metadata.clone();
        if let Some((uid, gid)) = self.owner {
            (metadata.uid, metadata.gid) = (uid, gid);
        }
        if let Some(mode) = self.mode.filter(|_| !matches!(entry.data, Data::Symlink(_))) {
            metadata.mode = mode.apply(metadata.mode, is_directory);
        }
        if let Data::Inline(_) = entry.data {
            metadata.mtime = self.now;
        }
        if let Some((parent, _)) = path.split() {
            self.directories(&parent, self.owner.unwrap_or_default())?;
        }
        match self.found(&path)?.map(|found| found == Found::Directory) {
            Some(true) if is_directory && entry.role == Role::Parent => return Ok(()),
            Some(there) if there != is_directory => return Err(in_the_way(&path, there)),
            _ => {}
        }
        if let Some(inode) = entry.identity.and_then(|identity| names.get(&identity)) {
            self.nodes.insert(path, *inode);
            return Ok(());
        }
        if let Some(identity) = entry.identity {
            names.insert(identity, self.inodes.len());
        }
        let contents = if is_directory { Contents::Directory } else { Contents::Copied(&entry.data) };
        self.put(path, Inode { metadata, contents })
    }

    /// Puts a node at the path, whatever is there.
    pub(crate) fn put(&mut self, path: LayerPath, inode: Inode<'a>) -> Result<(), Error> {
        if self.inodes.len() > 2 * MAX_FILES {
            return Err(super::too_many());
        }
        self.nodes.insert(path, self.inodes.len());
        self.inodes.push(inode);
        Ok(())
    }

    /// Gives the file at `target` another name. A file of the lower tree gets a new copy for that. What it has at the end
    /// is the metadata of the last of its names.
    pub(crate) fn link(
        &mut self,
        target: &LayerPath,
        path: LayerPath,
        metadata: Metadata,
    ) -> Result<(), Error> {
        let missing = |reason: &str| Error::Source { what: path.to_string(), reason: reason.to_owned() };
        let inode = match self.nodes.get(target) {
            Some(inode) => *inode,
            None if self.hides(target) => return Err(missing("it is a hard link to what is not there")),
            None => {
                let found = self.lower.entry(target)?;
                let found = found.ok_or_else(|| missing("it is a hard link to what is not there"))?;
                let contents = match found.kind {
                    crate::tree::EntryKind::File { size } => Contents::Lower(target.clone(), size),
                    crate::tree::EntryKind::Symlink => Contents::Symlink(self.lower.read_link(target)?),
                    _ => return Err(missing("it is a hard link to what is no file")),
                };
                self.put(target.clone(), Inode { metadata: found.metadata, contents })?;
                self.inodes.len() - 1
            }
        };
        match &mut self.inodes[inode] {
            Inode { contents: Contents::Directory, .. } => {
                return Err(missing("it is a hard link to a directory"));
            }
            inode => inode.metadata = metadata,
        }
        self.nodes.insert(path, inode);
        Ok(())
    }

    /// Makes the directories on the way where they are missing.
    pub(crate) fn directories(&mut self, path: &LayerPath, owner: (u32, u32)) -> Result<(), Error> {
        let mut missing = Vec::new();
        let mut next = Some(path.clone());
        while let Some(path) = next {
            match self.found(&path)? {
                Some(Found::Directory) => break,
                Some(_) => return Err(in_the_way(&path, false)),
                None => {}
            }
            next = path.split().map(|(parent, _)| parent);
            missing.push(path);
        }
        let (uid, gid) = owner;
        for path in missing {
            let metadata = Metadata { mode: 0o755, uid, gid, mtime: self.now, ..Metadata::default() };
            self.put(path, Inode { metadata, contents: Contents::Directory })?;
        }
        Ok(())
    }

    /// What is at the path; `None` when nothing is.
    pub(crate) fn found(&self, path: &LayerPath) -> Result<Option<Found>, Error> {
        if path.is_root() {
            return Ok(Some(Found::Directory));
        }
        if let Some(inode) = self.nodes.get(path) {
            return Ok(Some(match &self.inodes[*inode].contents {
                Contents::Directory => Found::Directory,
                Contents::Symlink(target) | Contents::Copied(Data::Symlink(target)) => {
                    Found::Symlink(target.clone())
                }
                _ => Found::Other,
            }));
        }
        if self.hides(path) {
            return Ok(None);
        }
        let Some(entry) = self.lower.entry(path)? else { return Ok(None) };
        Ok(Some(match entry.kind {
            crate::tree::EntryKind::Directory => Found::Directory,
            crate::tree::EntryKind::Symlink => Found::Symlink(self.lower.read_link(path)?),
            _ => Found::Other,
        }))
    }

    /// Whether the lower tree's entry cannot be seen any more.
    fn hides(&self, path: &LayerPath) -> bool {
        let mut next = Some(path.clone()).filter(|_| !self.replaced.is_empty());
        while let Some(path) = next {
            if self.replaced.contains_key(&path) {
                return true;
            }
            next = path.split().map(|(parent, _)| parent);
        }
        false
    }

    /// Takes away whatever is at the path, with everything in it.
    pub(crate) fn remove(&mut self, path: &LayerPath) -> Result<(), Error> {
        if path.is_root() {
            return Err(in_the_way(path, true));
        }
        if !self.hides(path)
            && let Some(entry) = self.lower.entry(path)?
        {
            self.replaced.insert(path.clone(), entry.is_directory());
        }
        let below = [path.as_bytes(), b"/"].concat();
        // No name sorts before this one: none is empty, and none holds a NUL.
        if let Ok(first) = path.join(&[1]) {
            let inside = self.nodes.range(first..).map(|(other, _)| other);
            let inside: Vec<_> =
                inside.take_while(|other| other.as_bytes().starts_with(&below)).cloned().collect();
            inside.iter().for_each(|other| {
                self.nodes.remove(other);
            });
        }
        self.nodes.remove(path);
        Ok(())
    }

    /// Writes the nodes. Of a file with several names the first holds the data.
    pub(crate) fn write(&self, tree: Option<&SourceTree<'_>>, writer: &mut LayerWriter) -> Result<(), Error> {
        let mut written: BTreeMap<usize, &LayerPath> = BTreeMap::new();
        let mut names: BTreeMap<usize, usize> = BTreeMap::new();
        self.nodes.values().for_each(|inode| *names.entry(*inode).or_default() += 1);
        for (path, inode) in &self.nodes {
            let Inode { metadata, contents } = &self.inodes[*inode];
            if let Some(first) = written.get(inode) {
                let kind = Kind::HardLink((*first).clone());
                let node = Node { path: path.clone(), metadata: metadata.clone(), kind };
                writer.append(&node, io::empty())?;
                continue;
            }
            if names.get(inode).is_some_and(|count| *count > 1) && !matches!(contents, Contents::Directory) {
                written.insert(*inode, path);
            }
            let node = |kind| Node { path: path.clone(), metadata: metadata.clone(), kind };
            match contents {
                Contents::Directory => {
                    writer.append(&node(Kind::Directory), io::empty())?;
                    if self.replaced.get(path) == Some(&true) {
                        writer.append_opaque(path)?;
                    }
                }
                Contents::Copied(data) => append(writer, node(Kind::Directory), data, tree)?,
                Contents::Part(file, kind) => writer.append(&node(kind.clone()), parts(file, kind))?,
                Contents::Symlink(target) => {
                    writer.append(&node(Kind::Symlink(target.clone())), io::empty())?
                }
                Contents::Bytes(text) => {
                    let kind = Kind::File { size: text.len() as u64, offset: 0 };
                    writer.append(&node(kind), &text[..])?;
                }
                Contents::Lower(lower, size) => {
                    let mut node = node(Kind::File { size: *size, offset: 0 });
                    node.metadata.xattrs.extend(self.lower.xattrs(lower)?);
                    writer.append(&node, self.lower.open(lower)?)?;
                }
            }
        }
        Ok(())
    }
}

/// As BuildKit has it, neither replaces the other.
fn in_the_way(path: &LayerPath, is_directory: bool) -> Error {
    let reason = match is_directory {
        true => "a directory is there, and a file is to be copied to it; remove it in a RUN step before",
        false => {
            "a file or link is there, and a directory is to be copied to it; copy to the link's target, or remove it in a \
             RUN step before"
        }
    };
    Error::Source { what: path.to_string(), reason: reason.to_owned() }
}

/// The data of a file in an unpacked archive.
fn parts<'f>(file: &'f Arc<File>, kind: &Kind) -> impl Read + 'f {
    let runs: Vec<DataRun> = match kind {
        Kind::File { size, offset } => vec![DataRun { start: 0, length: *size, offset: *offset }],
        Kind::Sparse { runs, .. } => runs.to_vec(),
        _ => Vec::new(),
    };
    Parts { file, runs: runs.into_iter(), offset: 0, left: 0 }
}

struct Parts<'f> {
    file: &'f File,
    runs: std::vec::IntoIter<DataRun>,
    offset: u64,
    left: u64,
}

impl Read for Parts<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            let Some(run) = self.runs.next() else { return Ok(0) };
            (self.offset, self.left) = (run.offset, run.length);
        }
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        // With its place, so that nobody else's reading moves it.
        let count = std::os::unix::fs::FileExt::read_at(self.file, &mut buffer[..wanted], self.offset)?;
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

fn append(
    writer: &mut LayerWriter,
    mut node: Node,
    data: &Data,
    tree: Option<&SourceTree<'_>>,
) -> Result<(), Error> {
    node.kind = match data {
        Data::Directory | Data::Archive(_) => Kind::Directory,
        Data::Inline(contents) => Kind::File { size: contents.len() as u64, offset: 0 },
        Data::File { size, .. } => Kind::File { size: *size, offset: 0 },
        Data::Remote(remote) => {
            let body = remote.body()?;
            node.metadata.mtime = body.mtime;
            let kind = Kind::File { size: body.size, offset: 0 };
            node.kind = kind.clone();
            return Ok(writer.append(&node, parts(&body.file, &kind))?);
        }
        Data::Symlink(target) => Kind::Symlink(target.clone()),
        Data::Special(kind) => kind.clone(),
    };
    match (data, tree) {
        (Data::Inline(contents), _) => writer.append(&node, contents.as_bytes())?,
        (Data::File { path: source, size, digest }, Some(tree)) => {
            let mut file = tree.root.open(source)?;
            let changed = |got: &str| Error::Source {
                what: tree.root.shown(source).display().to_string(),
                reason: format!("it had {size} bytes and now has {got}: it changed during the build"),
            };
            let mut hashed = Hashed { inner: file.by_ref().take(*size), hasher: Hasher::new() };
            writer.append(&node, &mut hashed).map_err(|error| match &error {
                // The writer's word for a file that ends too early.
                oci::Error::Corrupt { .. } => changed("less"),
                _ => error.into(),
            })?;
            let got = hashed.hasher.finish().0;
            if file.read(&mut [0]).map_err(at(&tree.root.shown(source)))? != 0 {
                return Err(changed("more"));
            }
            // What is remembered under a digest must be what has it.
            if digest.get().is_some_and(|expected| *expected != got) {
                return Err(changed("other ones"));
            }
        }
        (Data::File { .. }, None) => {}
        _ => writer.append(&node, io::empty())?,
    }
    Ok(())
}

struct Hashed<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

/// `WORKDIR`: makes the directory where it is missing, and says whether it did.
pub(crate) fn make_workdir(
    lower: &dyn Tree,
    path: &str,
    owner: (u32, u32),
    now: Timestamp,
    writer: &mut LayerWriter,
) -> Result<bool, Error> {
    let real = resolve(lower, path.as_bytes(), Last::Follow, Escape::Clamp)?;
    if lower.entry(&real)?.is_some_and(|entry| !entry.is_directory()) {
        return Err(Error::Source {
            what: path.to_owned(),
            reason: "it is there, but no directory".to_owned(),
        });
    }
    let mut new = NewLayer::new(lower, now);
    new.directories(&real, owner)?;
    new.write(None, writer)?;
    Ok(!new.is_empty())
}
