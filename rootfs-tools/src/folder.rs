//! A folder of this machine as a tree: metadata first, data when it is asked for.
//!
//! Two walks of a folder that nobody changes give the same tree: names are sorted, and nothing of the host's own numbers
//! (inodes, devices, access times) gets into it.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom, lgetxattr, llistxattr, major, minor, seek};
use rustix::io::Errno;

use crate::Error;
use crate::build::{BuildOptions, BuildReport, Progress, Writing};
use crate::error::at;
use crate::ext4::{Ext4, is_stored_xattr};
use crate::format::DataSource;
use crate::output::Output;
use crate::tree::{
    Attributes, Content, Directory, FileData, Node, NodeId, Place, Run, Timestamp, Tree, Xattr,
};

/// The kernel's `XATTR_LIST_MAX` and `XATTR_SIZE_MAX`.
const MAX_XATTR: usize = 64 << 10;

/// Labels of the host's policy, which say nothing about the tree.
const SELINUX: &[u8] = b"security.selinux";

/// The deepest nesting of directories; the kernel takes no longer paths.
const MAX_DEPTH: usize = 2048;

/// Writes the folder `from` as an ext4 file system to `output`, which appears only when it is whole and on disk.
///
/// Owners, modes, times with nanoseconds, extended attributes, hard links, devices and holes are kept. A socket is nothing
/// without the process that made it: sockets are left out and counted. A file that changes meanwhile is an error. UUID and
/// hash seed follow from names and metadata: the same folder gives the same bytes.
pub fn build_folder(
    from: &Path,
    options: &BuildOptions,
    output: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<BuildReport, Error> {
    progress(Progress::Indexing { layer: 1, layers: 1 });
    // Before the output is there, which may be in the folder.
    let mut folder = Folder::read(from)?;
    let seed = folder.tree.fingerprint().to_string();
    let format = Ext4::new(seed.as_bytes()).size(options.size).journal(options.journal)?;
    let writing = Writing { format, file: Output::create_hashed(output)? };
    let Folder { tree, files, dropped_xattrs, dropped_sockets } = &mut folder;
    let report = writing.write(tree, files, |files| files.finish(), progress)?;
    Ok(BuildReport { dropped_xattrs: *dropped_xattrs, dropped_sockets: *dropped_sockets, ..report })
}

/// What was found in a folder.
#[derive(Debug)]
pub struct Folder {
    /// Names and metadata. Places of file data are those of [`Folder::files`].
    pub tree: Tree,
    /// The data.
    pub files: Files,
    /// Extended attributes that were left out.
    pub dropped_xattrs: u64,
    /// Sockets that were left out.
    pub dropped_sockets: u64,
}

impl Folder {
    /// Lists the folder and everything below it; other file systems that are mounted there, too.
    pub fn read(root: &Path) -> Result<Self, Error> {
        let metadata = fs::metadata(root).map_err(at(root))?;
        if !metadata.is_dir() {
            let reason = "expected a folder".to_owned();
            return Err(Error::Invalid { what: root.display().to_string(), reason });
        }
        let files = Files { root: root.to_owned(), list: Vec::new(), open: None };
        let folder = Self { tree: Tree::new(), files, dropped_xattrs: 0, dropped_sockets: 0 };
        let mut walk =
            Walk { folder, links: HashMap::new(), names: vec![0; MAX_XATTR], value: vec![0; MAX_XATTR] };
        walk.run(root, &metadata)?;
        Ok(walk.folder)
    }
}

struct Walk {
    folder: Folder,
    /// Inodes with several names, by device and number.
    links: HashMap<(u64, u64), NodeId>,
    /// Room for a list of names of attributes, and for one value.
    names: Vec<u8>,
    value: Vec<u8>,
}

impl Walk {
    fn run(&mut self, root: &Path, metadata: &Metadata) -> Result<(), Error> {
        self.folder.tree.node_mut(NodeId::ROOT).attributes = self.attributes(root, metadata)?;
        let mut stack = vec![(NodeId::ROOT, PathBuf::new(), 0)];
        while let Some((directory, relative, depth)) = stack.pop() {
            let real = root.join(&relative);
            let mut names = Vec::new();
            for entry in fs::read_dir(&real).map_err(at(&real))? {
                names.push(entry.map_err(at(&real))?.file_name());
            }
            names.sort_unstable();
            let before = stack.len();
            for name in names {
                let path = relative.join(&name);
                let Some(node) = self.entry(&root.join(&path), &path)? else { continue };
                self.folder.tree.link(directory, name.as_bytes(), node, 0);
                if self.folder.tree.is_directory(node) {
                    if depth == MAX_DEPTH {
                        let reason = format!("it is more than {MAX_DEPTH} directories deep");
                        return Err(Error::Unsupported { path: path.display().to_string(), reason });
                    }
                    stack.push((node, path, depth + 1));
                }
            }
            stack[before..].reverse();
        }
        Ok(())
    }

    /// The node of what is at `real`; `None` for what is left out.
    fn entry(&mut self, real: &Path, relative: &Path) -> Result<Option<NodeId>, Error> {
        let metadata = fs::symlink_metadata(real).map_err(at(real))?;
        let file_type = metadata.file_type();
        let inode = (metadata.dev(), metadata.ino());
        let is_shared = metadata.nlink() > 1 && !file_type.is_dir();
        if let Some(&known) = self.links.get(&inode).filter(|_| is_shared) {
            return Ok(Some(known));
        }
        let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
        let content = if file_type.is_dir() {
            Content::Directory(Directory::default())
        } else if file_type.is_symlink() {
            Content::Symlink(fs::read_link(real).map_err(at(real))?.into_os_string().into_vec().into())
        } else if file_type.is_file() {
            self.file(real, relative, &metadata)?
        } else if file_type.is_char_device() {
            Content::CharDevice { major, minor }
        } else if file_type.is_block_device() {
            Content::BlockDevice { major, minor }
        } else if file_type.is_fifo() {
            Content::Fifo
        } else {
            self.folder.dropped_sockets += 1;
            return Ok(None);
        };
        let attributes = self.attributes(real, &metadata)?;
        let node = self.folder.tree.add(Node { attributes, content });
        if is_shared {
            self.links.insert(inode, node);
        }
        Ok(Some(node))
    }

    fn file(&mut self, real: &Path, relative: &Path, metadata: &Metadata) -> Result<Content, Error> {
        let size = metadata.len();
        // The list is bounded by the number of inodes of a tree, which has 32 bits.
        let place = Place { source: self.folder.files.list.len() as u32, offset: 0 };
        let known = Known { path: relative.as_os_str().as_bytes().into(), state: State::of(metadata) };
        let mut data = FileData::Whole(place);
        // Files without holes need not be opened yet.
        if metadata.blocks().saturating_mul(512) < size {
            let file = known.open(real)?;
            data = FileData::Sparse(data_runs(&file, size, place).map_err(at(real))?);
        }
        self.folder.files.list.push(known);
        Ok(Content::File { size, data })
    }

    fn attributes(&mut self, real: &Path, metadata: &Metadata) -> Result<Attributes, Error> {
        let nanoseconds = metadata.mtime_nsec().clamp(0, 999_999_999) as u32;
        Ok(Attributes {
            mode: (metadata.mode() & 0o7777) as u16,
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: Timestamp { seconds: metadata.mtime(), nanoseconds },
            xattrs: self.xattrs(real)?,
        })
    }

    fn xattrs(&mut self, real: &Path) -> Result<Box<[Xattr]>, Error> {
        let io = |errno: Errno| at(real)(errno.into());
        let length = match llistxattr(real, &mut self.names[..]) {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(Box::default()),
            Ok(length) => length,
            Err(errno) => return Err(io(errno)),
        };
        let mut xattrs = Vec::new();
        for name in self.names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            if !is_stored_xattr(name) || name == SELINUX {
                self.folder.dropped_xattrs += 1;
                continue;
            }
            match lgetxattr(real, name, &mut self.value[..]) {
                Ok(length) => xattrs.push(Xattr { name: name.into(), value: self.value[..length].into() }),
                // Listed, but not for us to read.
                Err(Errno::NODATA | Errno::NOTSUP) => self.folder.dropped_xattrs += 1,
                Err(errno) => return Err(io(errno)),
            }
        }
        xattrs.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(xattrs.into())
    }
}

/// The parts of a file that the file system has data for.
fn data_runs(file: &File, size: u64, place: Place) -> io::Result<Box<[Run]>> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < size => start,
            // Nothing but a hole up to the end.
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(size);
        if end <= start {
            break;
        }
        let place = Place { offset: start, ..place };
        runs.push(Run { start, length: end - start, place });
        at = end;
    }
    Ok(runs.into())
}

/// The data of a folder's files. [`Place::source`] counts the files in the order in which they were found.
#[derive(Debug)]
pub struct Files {
    root: PathBuf,
    list: Vec<Known>,
    /// The file that is being read.
    open: Option<(u32, File)>,
}

/// A file as it was found.
#[derive(Debug)]
struct Known {
    /// Below the folder.
    path: Box<[u8]>,
    state: State,
}

/// What changes when somebody writes to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    inode: u64,
    size: u64,
    mtime: (i64, i64),
}

impl State {
    fn of(metadata: &Metadata) -> Self {
        Self { inode: metadata.ino(), size: metadata.len(), mtime: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

impl Known {
    fn open(&self, real: &Path) -> Result<File, Error> {
        // Not waiting, should it be a pipe by now.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
        let file = File::options().read(true).custom_flags(flags).open(real).map_err(at(real))?;
        self.check(&file, real)?;
        Ok(file)
    }

    /// Nobody may have written to it since it was found.
    fn check(&self, file: &File, real: &Path) -> Result<(), Error> {
        let now = State::of(&file.metadata().map_err(at(real))?);
        if now == self.state {
            return Ok(());
        }
        let Self { state, .. } = self;
        Err(Error::Invalid {
            what: real.display().to_string(),
            reason: if now.size != state.size {
                format!("it changed while it was read: it had {} bytes, now {}", state.size, now.size)
            } else {
                "it changed while it was read: it is another file, or its time is another".to_owned()
            },
        })
    }
}

impl Files {
    fn real(&self, source: u32) -> PathBuf {
        use std::ffi::OsStr;
        let path = self.list.get(source as usize).map_or(&b""[..], |known| &known.path);
        self.root.join(OsStr::from_bytes(path))
    }

    /// Checks the last file, too, for changes while it was read. Only then is the data what was found.
    pub fn finish(&mut self) -> Result<(), Error> {
        match self.open.take() {
            Some((source, file)) => self.list[source as usize].check(&file, &self.real(source)),
            None => Ok(()),
        }
    }
}

impl DataSource for Files {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        if self.open.as_ref().is_none_or(|(source, _)| *source != place.source) {
            self.finish()?;
            let real = self.real(place.source);
            let Some(known) = self.list.get(place.source as usize) else {
                let reason = format!("the folder has {} files", self.list.len());
                return Err(Error::Invalid { what: format!("file {}", place.source), reason });
            };
            self.open = Some((place.source, known.open(&real)?));
        }
        let Some((source, file)) = &self.open else { return Ok(()) };
        file.read_exact_at(buffer, place.offset).map_err(|error| match error.kind() {
            // It has become shorter; the check says so.
            io::ErrorKind::UnexpectedEof => {
                let real = self.real(*source);
                self.list[*source as usize].check(file, &real).err().unwrap_or_else(|| at(&real)(error))
            }
            _ => at(&self.real(*source))(error),
        })
    }
}

impl DataSource for &mut Files {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        Files::read(self, place, buffer)
    }
}
