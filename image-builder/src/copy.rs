//! `COPY`: which files, their digest, and writing them into the tree.

mod archive;
mod layer;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::sync::{Arc, OnceLock};

use dockerfile::Ignore;
use oci::layer::{Kind, LayerPath, LayerWriter, Metadata, Timestamp};
use oci::{Digest, Hasher};

use crate::error::Error;
use crate::fetch::{Fetcher, Remote};
use crate::plan::{CopyAction, CopySource, Unpack};
use crate::sources::{self, Named};
use crate::tree::{self, EntryKind, Escape, Last, Tree, resolve};

pub(crate) use layer::{Contents, Inode, NewLayer, make_workdir};

/// The most files of one COPY; a context with more is most likely the wrong folder.
const MAX_FILES: usize = 1_000_000;

/// A tree that files are copied from.
pub(crate) struct SourceTree<'a> {
    pub(crate) root: &'a dyn Tree,
    /// What is left out; only a context has that.
    pub(crate) ignore: Option<&'a Ignore>,
    /// A context ends at its folder, and its owners mean nothing in the image.
    pub(crate) is_context: bool,
    /// How errors call it.
    pub(crate) shown: String,
}

/// What a COPY will write.
#[derive(Debug)]
pub(crate) struct Selection {
    entries: Vec<Entry>,
    /// Whether the destination must be a directory: several files were found by a pattern.
    several: bool,
    /// `--exclude`.
    exclude: Ignore,
    /// `ADD`, for which archives are more than files.
    unpack: Unpack,
    /// Gets what is not in the tree, and has a place for what is unpacked.
    fetcher: Arc<Fetcher>,
    /// What is worth a word, though nothing is wrong.
    pub(crate) warnings: Vec<String>,
}

#[derive(Debug)]
struct Entry {
    data: Data,
    target: Target,
    metadata: Metadata,
    /// Where it is a directory.
    role: Role,
    /// What files with several names in the tree have in common.
    identity: Option<Identity>,
}

/// What a directory brings, as BuildKit has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Its contents alone: the source itself, whose place is made like the folders on the way to it.
    Source,
    /// Its attributes, where nothing is there yet: folders that `--parents` keeps.
    Parent,
    /// Its attributes, also for what is there.
    Nested,
}

/// The number of a source, and the device and number of an inode.
type Identity = (usize, u64, u64);

#[derive(Debug)]
pub(crate) enum Data {
    Directory,
    File {
        path: LayerPath,
        size: u64,
        /// Once it was computed, which is before the contents are read again.
        digest: OnceLock<Digest>,
    },
    /// A file whose contents are unpacked into the destination.
    Archive(Packed),
    Remote(Arc<Remote>),
    Inline(String),
    Symlink(Vec<u8>),
    Special(Kind),
}

/// Where an archive is.
#[derive(Debug)]
pub(crate) enum Packed {
    Local(LayerPath, u64),
    Remote(Arc<Remote>),
}

/// Where an entry goes, seen from the destination.
#[derive(Debug)]
enum Target {
    /// To this path in the destination directory. Empty for the directory itself.
    Under(LayerPath),
    /// A file of this name, in the destination if that is a directory, else as the destination itself.
    FileNamed(Vec<u8>),
}

impl Selection {
    /// Finds the sources. Nothing outside of the tree is ever looked at.
    pub(crate) fn find(
        action: &CopyAction,
        tree: Option<&SourceTree<'_>>,
        fetcher: &Arc<Fetcher>,
    ) -> Result<Self, Error> {
        // The plan has read the patterns before.
        let exclude = Ignore::of_patterns(action.exclude.iter().map(String::as_str))
            .map_err(|reason| Error::Source { what: "--exclude".to_owned(), reason })?;
        let mut selection = Self {
            entries: Vec::new(),
            several: false,
            exclude,
            unpack: action.unpack,
            fetcher: Arc::clone(fetcher),
            warnings: Vec::new(),
        };
        let mut sources = 0;
        for source in &action.sources {
            match (source, tree) {
                (CopySource::Inline { name, contents }, _) => {
                    sources += 1;
                    selection.add(Entry {
                        data: Data::Inline(contents.clone()),
                        target: Target::FileNamed(name.clone().into_bytes()),
                        metadata: Metadata { mode: 0o644, ..Metadata::default() },
                        role: Role::Source,
                        identity: None,
                    })?;
                }
                (CopySource::Path(path), Some(tree)) => {
                    let found = sources::find(tree, path, action.parents)?;
                    if found.is_empty() {
                        let shown = &tree.shown;
                        selection.warnings.push(format!("the pattern {path} fits no file in {shown}"));
                    }
                    for found in found {
                        sources += 1;
                        selection.source(tree, path, &found, sources)?;
                    }
                }
                (CopySource::Url { url, checksum }, _) => {
                    sources += 1;
                    selection.remote(url, checksum.as_ref())?;
                }
                (CopySource::Path(_), None) => {}
            }
        }
        selection.several = sources > 1;
        Ok(selection)
    }

    /// The digest of everything that ends in the image: names, modes, owners, contents. Times do not count, as with
    /// Docker: a fresh checkout of the same files is the same.
    pub(crate) fn digest(&self, tree: Option<&SourceTree<'_>>) -> Result<Digest, Error> {
        Ok(self.digest_of_each(tree)?.0)
    }

    /// The regular files whose contents are read.
    pub(crate) fn files(&self) -> Vec<&LayerPath> {
        let data = self.entries.iter().map(|entry| &entry.data);
        data.filter_map(|data| if let Data::File { path, .. } = data { Some(path) } else { None }).collect()
    }

    /// The digest, and for each entry what there was: to tell later what changed.
    pub(crate) fn digest_of_each(
        &self,
        tree: Option<&SourceTree<'_>>,
    ) -> Result<(Digest, BTreeMap<String, String>), Error> {
        let mut each = BTreeMap::new();
        let mut hasher = Hasher::new();
        let mut numbers: BTreeMap<Identity, usize> = BTreeMap::new();
        let mut field = |tag: &str, bytes: &[u8]| {
            hasher.update(format!("{tag} {}\n", bytes.len()).as_bytes());
            hasher.update(bytes);
        };
        for entry in &self.entries {
            let name = match &entry.target {
                Target::Under(path) => {
                    field("under", path.as_bytes());
                    path.as_bytes()
                }
                Target::FileNamed(name) => {
                    field("named", name);
                    name
                }
            };
            let metadata = &entry.metadata;
            let mode = format!("{:o} {} {}", metadata.mode, metadata.uid, metadata.gid);
            field("meta", mode.as_bytes());
            for (name, value) in &metadata.xattrs {
                field("xattr", name);
                field("value", value);
            }
            if let Some(identity) = entry.identity {
                // Which of them are one file counts, not its number.
                let next = numbers.len();
                match numbers.entry(identity) {
                    Slot::Occupied(first) => field("same", first.get().to_string().as_bytes()),
                    Slot::Vacant(slot) => drop(slot.insert(next)),
                }
            }
            let state = match &entry.data {
                Data::Directory => {
                    field("directory", b"");
                    "directory".to_owned()
                }
                Data::Inline(contents) => {
                    field("inline", contents.as_bytes());
                    Hasher::digest_of(contents.as_bytes()).to_string()
                }
                Data::Symlink(target) => {
                    field("link", target);
                    format!("link to {}", String::from_utf8_lossy(target))
                }
                Data::Special(kind) => {
                    let kind = format!("{kind:?}");
                    field("special", kind.as_bytes());
                    kind
                }
                Data::File { path, digest, .. } => {
                    let Some(tree) = tree else { continue };
                    let contents = tree.root.content_digest(path)?;
                    field("file", contents.as_ref().as_bytes());
                    let _ = digest.set(contents.clone());
                    contents.to_string()
                }
                Data::Remote(remote) => {
                    field("remote", remote.identity().as_bytes());
                    remote.identity().to_owned()
                }
                Data::Archive(Packed::Remote(remote)) => {
                    field("remote archive", remote.identity().as_bytes());
                    format!("archive {}", remote.identity())
                }
                Data::Archive(Packed::Local(path, _)) => {
                    let Some(tree) = tree else { continue };
                    let contents = tree.root.content_digest(path)?.to_string();
                    field("archive", contents.as_bytes());
                    format!("archive {contents}")
                }
            };
            each.insert(String::from_utf8_lossy(name).into_owned(), format!("{mode} {state}"));
        }
        Ok((hasher.finish().0, each))
    }

    /// Writes the files as a layer on top of `lower`, and says whether there is anything in it. `owner` replaces what the
    /// entries have; directories that had to be made get `now` as their time, those that are there stay as they are.
    pub(crate) fn write(
        &self,
        action: &CopyAction,
        tree: Option<&SourceTree<'_>>,
        lower: &dyn Tree,
        owner: Option<(u32, u32)>,
        now: Timestamp,
        writer: &mut LayerWriter,
    ) -> Result<bool, Error> {
        let destination = resolve(lower, action.destination.as_bytes(), Last::Follow, Escape::Clamp)?;
        let exists_as_directory = lower.entry(&destination)?.is_some_and(|entry| entry.is_directory());
        let into_directory = exists_as_directory || action.destination.ends_with('/');
        if self.several && !into_directory {
            return Err(Error::Source {
                what: action.destination.clone(),
                reason: "several files are copied, so the destination must end with a slash".to_owned(),
            });
        }
        let mut new = NewLayer::new(lower, now);
        (new.owner, new.mode) = (owner, action.chmod.as_ref());
        let mut names = BTreeMap::new();
        for entry in &self.entries {
            let path = match &entry.target {
                _ if let Data::Archive(packed) = &entry.data => {
                    self.unpack(&mut new, packed, tree, &destination)?;
                    continue;
                }
                Target::Under(relative) => {
                    let mut raw = destination.as_bytes().to_vec();
                    raw.push(b'/');
                    raw.extend_from_slice(relative.as_bytes());
                    LayerPath::parse(&raw)?
                }
                Target::FileNamed(name) if into_directory => destination.join(name)?,
                Target::FileNamed(_) => destination.clone(),
            };
            new.entry(entry, path, &mut names)?;
        }
        new.write(tree, writer)?;
        Ok(!new.is_empty())
    }

    fn unpack(
        &self,
        new: &mut NewLayer<'_>,
        packed: &Packed,
        tree: Option<&SourceTree<'_>>,
        destination: &LayerPath,
    ) -> Result<(), Error> {
        let scratch = self.fetcher.scratch();
        match (packed, tree) {
            (Packed::Local(path, size), Some(tree)) => {
                let shown = tree.root.shown(path);
                let opened = archive::open(|| tree.root.open(path), *size, &shown)?;
                archive::unpack(opened, &shown, scratch, new, destination)
            }
            (Packed::Local(..), None) => Ok(()),
            (Packed::Remote(remote), _) => {
                let url = remote.url();
                let shown = std::path::Path::new(&url);
                let body = remote.body()?;
                let opened = archive::open(
                    || Ok(Box::new(body.reader()) as Box<dyn std::io::Read>),
                    body.size,
                    shown,
                )?;
                match opened {
                    Some(_) => archive::unpack(opened, shown, scratch, new, destination),
                    None => Err(Error::Source {
                        what: url.clone(),
                        reason: "--unpack is given, but it is no archive".to_owned(),
                    }),
                }
            }
        }
    }

    /// A file that is fetched: for root alone, and not from the context.
    fn remote(&mut self, url: &str, checksum: Option<&Digest>) -> Result<(), Error> {
        let remote = Arc::new(self.fetcher.remote(url, checksum)?);
        let name = remote.name().as_bytes().to_vec();
        let data = match self.unpack {
            Unpack::Always => Data::Archive(Packed::Remote(remote)),
            Unpack::Local | Unpack::Never => Data::Remote(remote),
        };
        let metadata = Metadata { mode: 0o600, ..Metadata::default() };
        self.add(Entry {
            data,
            target: Target::FileNamed(name),
            metadata,
            role: Role::Source,
            identity: None,
        })
    }

    fn add(&mut self, entry: Entry) -> Result<(), Error> {
        if self.entries.len() >= MAX_FILES {
            return Err(too_many());
        }
        self.entries.push(entry);
        Ok(())
    }

    /// `number` tells the sources apart.
    fn source(
        &mut self,
        tree: &SourceTree<'_>,
        written: &str,
        named: &Named,
        number: usize,
    ) -> Result<(), Error> {
        let path = &named.path;
        let real = tree.resolve(path.as_bytes(), Last::Follow)?;
        let missing =
            || Error::Source { what: written.to_owned(), reason: format!("no such file in {}", tree.shown) };
        let found = tree.root.entry(&real)?.ok_or_else(missing)?;
        if found.is_directory() {
            self.parents(tree, named)?;
            let below = named.kept.clone().unwrap_or_default();
            return self.walk(tree, number, &real, &below, &LayerPath::default(), &found);
        }
        if tree.excludes(&real) || tree.excludes(path) {
            return Err(Error::Source {
                what: written.to_owned(),
                reason: format!("it is left out of {} by .dockerignore", tree.shown),
            });
        }
        let name = path.split().map(|(_, name)| name.to_vec()).unwrap_or_default();
        if self.exclude.excludes(&name)
            || named.kept.as_ref().is_some_and(|kept| self.exclude.excludes(kept.as_bytes()))
        {
            return Ok(());
        }
        let Some(data) = tree.data(&real, &found)? else { return Err(missing()) };
        if let Data::File { path, size, .. } = &data
            && self.unpack != Unpack::Never
            && archive::open(|| tree.root.open(path), *size, &tree.root.shown(path))?.is_some()
        {
            let (data, target) = (Data::Archive(Packed::Local(path.clone(), *size)), Target::FileNamed(name));
            let metadata = Metadata::default();
            return self.add(Entry { data, target, metadata, role: Role::Source, identity: None });
        }
        self.parents(tree, named)?;
        let target = match &named.kept {
            Some(kept) => Target::Under(kept.clone()),
            None => Target::FileNamed(name),
        };
        let (metadata, identity) = (tree.metadata(&real, &found)?, tree.identity(number, &real, &found)?);
        self.add(Entry { data, target, metadata, role: Role::Source, identity })
    }

    /// With `--parents`, the folders on the way to what is copied.
    fn parents(&mut self, tree: &SourceTree<'_>, named: &Named) -> Result<(), Error> {
        for (path, kept) in named.folders() {
            let real = tree.resolve(path.as_bytes(), Last::Follow)?;
            let Some(found) = tree.root.entry(&real)? else { continue };
            let metadata = tree.metadata(&real, &found)?;
            let (data, target) = (Data::Directory, Target::Under(kept));
            self.add(Entry { data, target, metadata, role: Role::Parent, identity: None })?;
        }
        Ok(())
    }

    fn walk(
        &mut self,
        tree: &SourceTree<'_>,
        number: usize,
        real: &LayerPath,
        target: &LayerPath,
        relative: &LayerPath,
        found: &tree::Entry,
    ) -> Result<(), Error> {
        let ignored = !real.is_root() && tree.excludes(real);
        let left_out = !relative.is_root() && self.exclude.excludes(relative.as_bytes());
        let excluded = ignored || left_out;
        if ignored && !tree.ignore.is_some_and(Ignore::has_exceptions)
            || left_out && !self.exclude.has_exceptions()
        {
            return Ok(());
        }
        if !excluded {
            let metadata = tree.metadata(real, found)?;
            let role = match (relative.is_root(), target.is_root()) {
                (true, true) => Role::Source,
                // The source, but with its parents.
                (true, false) => Role::Parent,
                _ => Role::Nested,
            };
            let (data, target) = (Data::Directory, Target::Under(target.clone()));
            self.add(Entry { data, target, metadata, role, identity: None })?;
        }
        for name in tree.root.names(real)? {
            let (child, target, relative) = (real.join(&name)?, target.join(&name)?, relative.join(&name)?);
            let Some(found) = tree.root.entry(&child)? else { continue };
            if found.is_directory() {
                self.walk(tree, number, &child, &target, &relative, &found)?;
            } else if !tree.excludes(&child)
                && !self.exclude.excludes(relative.as_bytes())
                && let Some(data) = tree.data(&child, &found)?
            {
                let (metadata, identity) =
                    (tree.metadata(&child, &found)?, tree.identity(number, &child, &found)?);
                self.add(Entry {
                    data,
                    target: Target::Under(target),
                    metadata,
                    role: Role::Nested,
                    identity,
                })?;
            }
        }
        Ok(())
    }
}

impl SourceTree<'_> {
    pub(crate) fn escape(&self) -> Escape {
        if self.is_context { Escape::Refuse } else { Escape::Clamp }
    }

    pub(crate) fn excludes(&self, path: &LayerPath) -> bool {
        self.ignore.is_some_and(|ignore| ignore.excludes(path.as_bytes()))
    }

    /// The path without links, in the tree.
    pub(crate) fn resolve(&self, path: &[u8], last: Last) -> Result<LayerPath, Error> {
        resolve(self.root, path, last, self.escape())
    }

    fn metadata(&self, path: &LayerPath, found: &tree::Entry) -> Result<Metadata, Error> {
        let mut metadata = found.metadata.clone();
        if self.is_context {
            (metadata.uid, metadata.gid) = (0, 0);
        }
        if found.is_file() || found.is_directory() {
            metadata.xattrs = self.root.xattrs(path)?;
            metadata.xattrs.retain(|name, _| keeps_xattr(name));
        }
        Ok(metadata)
    }

    fn identity(
        &self,
        number: usize,
        path: &LayerPath,
        found: &tree::Entry,
    ) -> Result<Option<Identity>, Error> {
        let identity = if found.is_file() { self.root.identity(path)? } else { None };
        Ok(identity.map(|(device, inode)| (number, device, inode)))
    }

    /// `None` for sockets, which no image can hold.
    fn data(&self, path: &LayerPath, found: &tree::Entry) -> Result<Option<Data>, Error> {
        Ok(Some(match found.kind {
            EntryKind::File { size } => Data::File { path: path.clone(), size, digest: OnceLock::new() },
            EntryKind::Directory => Data::Directory,
            EntryKind::Symlink => Data::Symlink(self.root.read_link(path)?),
            EntryKind::Fifo => Data::Special(Kind::Fifo),
            EntryKind::CharDevice { major, minor } => Data::Special(Kind::CharDevice { major, minor }),
            EntryKind::BlockDevice { major, minor } => Data::Special(Kind::BlockDevice { major, minor }),
            EntryKind::Socket => return Ok(None),
        }))
    }
}

/// The attributes that mean something in an image: capabilities, what users put there, and access lists. The others
/// belong to the machine that a file was on (labels, digests), or steer an overlay.
fn keeps_xattr(name: &[u8]) -> bool {
    name == b"security.capability"
        || name.starts_with(b"system.posix_acl_")
        || name.starts_with(b"user.") && !name.starts_with(b"user.overlay.")
}

fn too_many() -> Error {
    Error::Source {
        what: "COPY".to_owned(),
        reason: format!("more than {MAX_FILES} files; name a smaller folder, or use .dockerignore"),
    }
}

#[cfg(test)]
mod tests;
