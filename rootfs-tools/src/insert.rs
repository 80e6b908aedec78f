//! Into a file system, without a mount: its tree with something on top, written again beside it and put in its place.
//!
//! Until the rename the old file is untouched, and after it the new one is whole: there is no state between.

use std::fs;
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci::Digest;
use serde::Serialize;

use crate::Error;
use crate::error::at;
use crate::ext4::{Ext4, FileSystem, ImageData, Size};
use crate::folder::{Files, Folder};
use crate::format::{DataSource, write_tree};
use crate::list::Names;
use crate::tree::{Attributes, Content, Directory, FileData, Node, NodeId, Place, Timestamp, Tree};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

/// Who owns what is put in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What is put in.
pub enum NewContent<'a> {
    /// A file, link or folder of this machine, with everything below it.
    Path(&'a Path),
    /// One file from a stream.
    Stream(&'a mut dyn Read),
}

/// What [`insert()`] did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InsertReport {
    /// Digest of the new file system.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// The size that was too small, if it had to grow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grown_from: Option<u64>,
    /// Features that the old file system had and the new one has not.
    pub lost_features: Vec<&'static str>,
    /// Sockets that were left out.
    pub dropped_sockets: u64,
}

/// Puts `what` at `path` of the file system in the file `image`: into the directory that is there, or as a new entry, or
/// in the place of a file. A folder goes onto a directory of its name. UUID, hash seed, label and size stay; where the size
/// is too small, the file system grows.
pub fn insert(image: &Path, what: NewContent<'_>, path: &[u8], owner: Owner) -> Result<InsertReport, Error> {
    // The rename must replace the file and not a link to it.
    let image = fs::canonicalize(image).map_err(at(image))?;
    let metadata = fs::metadata(&image).map_err(at(&image))?;
    if metadata.file_type().is_block_device() {
        let reason = "it is a device: only a file can be replaced".to_owned();
        return Err(Error::Invalid { what: image.display().to_string(), reason });
    }
    let fs = FileSystem::open(&image)?;
    let contents = fs.tree()?;
    let mut tree = contents.tree;
    let (added, extra, name) = read_new(&image, what)?;
    graft(&mut tree, path, &added, name.as_deref(), owner)?;

    let superblock = fs.superblock();
    let size = superblock.size().next_multiple_of(BLOCK);
    let format = Ext4::new(b"").identity_of(superblock).label(&superblock.label)?;
    let mut source = Combined { image: fs.data(), extra };
    let mut write =
        |size| write_tree(&mut tree, &format.clone().size(Size::Exact(size)), &mut source, &image);
    let (report, grown_from) = match write(size) {
        Err(Error::TooLarge { needed, .. }) => (write(needed.next_multiple_of(MIB))?, Some(size)),
        written => (written?, None),
    };
    fs::set_permissions(&image, metadata.permissions()).map_err(at(&image))?;
    let new = FileSystem::open(&image)?;
    let kept = &new.superblock().features;
    Ok(InsertReport {
        digest: report.digest,
        size: report.size,
        grown_from,
        lost_features: superblock.features.iter().copied().filter(|name| !kept.contains(name)).collect(),
        dropped_sockets: contents.dropped_sockets,
    })
}

/// A tree whose root is what is put in.
struct Added {
    tree: Tree,
    root: NodeId,
}

/// Data that is not in the image.
enum Extra {
    Files(Box<Files>),
    File { file: fs::File, path: PathBuf },
}

/// What is put in, its data, and its name.
fn read_new(image: &Path, what: NewContent<'_>) -> Result<(Added, Extra, Option<Vec<u8>>), Error> {
    let one = |attributes, content| {
        let mut tree = Tree::new();
        let root = tree.add(Node { attributes, content });
        Added { tree, root }
    };
    let file_of = |size| Content::File { size, data: FileData::Whole(Place { source: 0, offset: 0 }) };
    match what {
        NewContent::Stream(stream) => {
            // Its length must be known before anything is written.
            let folder = image.parent().unwrap_or(Path::new("/"));
            let mut file = tempfile::tempfile_in(folder).map_err(at(folder))?;
            let size = io::copy(stream, &mut file).map_err(at(Path::new("standard input")))?;
            file.flush().and_then(|()| file.rewind()).map_err(at(folder))?;
            let since =
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            let mtime = Timestamp { seconds: since.as_secs() as i64, nanoseconds: since.subsec_nanos() };
            let attributes = Attributes { mode: 0o644, mtime, ..Attributes::default() };
            let path = PathBuf::from("standard input");
            Ok((one(attributes, file_of(size)), Extra::File { file, path }, None))
        }
        NewContent::Path(path) => {
            let metadata = fs::symlink_metadata(path).map_err(at(path))?;
            let name = path.file_name().map(|name| name.as_bytes().to_vec());
            if metadata.is_dir() {
                let Folder { tree, files, .. } = Folder::read(path)?;
                return Ok((Added { tree, root: NodeId::ROOT }, Extra::Files(Box::new(files)), name));
            }
            let attributes = Attributes {
                mode: (metadata.mode() & 0o7777) as u16,
                mtime: Timestamp {
                    seconds: metadata.mtime(),
                    nanoseconds: metadata.mtime_nsec().clamp(0, 999_999_999) as u32,
                },
                ..Attributes::default()
            };
            let file_type = metadata.file_type();
            if file_type.is_symlink() {
                let target = fs::read_link(path).map_err(at(path))?.into_os_string().into_vec();
                let empty = tempfile::tempfile().map_err(at(path))?;
                let extra = Extra::File { file: empty, path: path.to_owned() };
                return Ok((one(attributes, Content::Symlink(target.into())), extra, name));
            }
            if !file_type.is_file() {
                let reason = "expected a file, a link or a folder".to_owned();
                return Err(Error::Invalid { what: path.display().to_string(), reason });
            }
            let file = fs::File::open(path).map_err(at(path))?;
            let size = file.metadata().map_err(at(path))?.len();
            Ok((one(attributes, file_of(size)), Extra::File { file, path: path.to_owned() }, name))
        }
    }
}

/// Puts `added` at `path` of `tree`.
fn graft(
    tree: &mut Tree,
    path: &[u8],
    added: &Added,
    name: Option<&[u8]>,
    owner: Owner,
) -> Result<(), Error> {
    let refuse = |reason: &str| Error::Invalid { what: Names::shown(path), reason: reason.to_owned() };
    let directory = tree.resolve(path, None).unwrap_or(None);
    let (directory, name) = match directory {
        Some(directory) => (directory, name.ok_or_else(|| refuse("it is a directory: say the file's name"))?),
        None => {
            let slash = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
            let name = path.get(slash + 1..).unwrap_or_default();
            if matches!(name, b"" | b"." | b"..") {
                return Err(refuse("there is no such directory in the file system"));
            }
            let parent = tree.resolve(&path[..slash], None).unwrap_or(None);
            (parent.ok_or_else(|| refuse("the directory that it goes to is not there"))?, name)
        }
    };
    // Nodes of one inode stay one.
    let mut known = vec![None; added.tree.len()];
    let mut stack = vec![(directory, name.to_vec(), added.root)];
    while let Some((directory, name, node)) = stack.pop() {
        let below: Vec<(Vec<u8>, NodeId)> = added
            .tree
            .children(node)
            .into_iter()
            .flat_map(|names| names.iter())
            .map(|(name, child)| (name.to_vec(), child.node))
            .collect();
        let is_directory = added.tree.is_directory(node);
        let existing = tree.child(directory, &name).map(|existing| existing.node);
        match existing.map(|existing| tree.is_directory(existing)) {
            Some(true) if !is_directory => {
                return Err(refuse(&format!(
                    "{} is a directory, a file cannot replace it",
                    Names::shown(&name)
                )));
            }
            Some(false) if is_directory => {
                return Err(refuse(&format!(
                    "{} is no directory, a folder cannot replace it",
                    Names::shown(&name)
                )));
            }
            _ => {}
        }
        let new = match (known[node.index()], existing.filter(|_| is_directory)) {
            (Some(new), _) => new,
            (None, Some(existing)) => existing,
            (None, None) => {
                let mut copy = added.tree.node(node).clone();
                if let Content::Directory(names) = &mut copy.content {
                    *names = Directory::default();
                }
                copy.attributes.uid = owner.uid;
                copy.attributes.gid = owner.gid;
                if let Content::File { data, .. } = &mut copy.content {
                    shift(data);
                }
                tree.add(copy)
            }
        };
        known[node.index()] = Some(new);
        tree.link(directory, &name, new, 0);
        stack.extend(below.into_iter().map(|(name, child)| (new, name, child)));
    }
    Ok(())
}

/// Source 0 is the image.
fn shift(data: &mut FileData) {
    match data {
        FileData::Whole(place) => place.source += 1,
        FileData::Sparse(runs) => runs.iter_mut().for_each(|run| run.place.source += 1),
    }
}

/// The image's data and the new data.
struct Combined<'a> {
    image: ImageData<'a>,
    extra: Extra,
}

impl DataSource for Combined<'_> {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        let Some(source) = place.source.checked_sub(1) else { return self.image.read(place, buffer) };
        match &mut self.extra {
            Extra::Files(files) => files.read(Place { source, ..place }, buffer),
            Extra::File { file, path } => file.read_exact_at(buffer, place.offset).map_err(at(path)),
        }
    }
}
