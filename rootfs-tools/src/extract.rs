//! Out of a file system, without a mount: one file as a stream, or a file or folder onto the host.
//!
//! The image is hostile: its links are copied and never followed. On the host every step is relative to a folder that is
//! open (`openat` with `O_NOFOLLOW`), so that no link that is there, or put there meanwhile, leads a write elsewhere.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod,
    fchown, fsetxattr, futimens, linkat, makedev, mkdirat, mknodat, openat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;
use serde::Serialize;

use crate::Error;
use crate::error::at;
use crate::ext4::{FileSystem, ImageData};
use crate::list::Names;
use crate::tree::{Attributes, Content, FileData, NodeId, Place, Tree};

const BUFFER: usize = 256 << 10;

/// What [`extract()`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Extracted {
    /// Entries that were written.
    pub entries: u64,
    /// Bytes of files, holes left out.
    pub data: u64,
    /// Devices that only root may make.
    pub skipped_devices: u64,
    /// Extended attributes that the host refused.
    pub skipped_xattrs: u64,
}

/// Writes the file at `path` of the file system to `output`.
pub fn read_file(fs: &FileSystem, path: &[u8], output: &mut dyn Write) -> Result<u64, Error> {
    let mut tree = fs.tree()?.tree;
    let node = Names::find(&mut tree, path)?;
    let Content::File { size, data } = &tree.node(node).content else {
        let reason = "it is no file: only files go to the standard output".to_owned();
        return Err(Error::Invalid { what: Names::shown(path), reason });
    };
    let zeros = vec![0; BUFFER];
    let mut position = 0;
    let mut emit = |until: u64, bytes: &[u8]| -> Result<(), Error> {
        let failed = at(Path::new("standard output"));
        let mut write = || {
            while position < until {
                let now = (until - position).min(BUFFER as u64);
                output.write_all(&zeros[..now as usize])?;
                position += now;
            }
            position += bytes.len() as u64;
            output.write_all(bytes)
        };
        write().map_err(failed)
    };
    copy(data, *size, &fs.data(), &mut emit)?;
    emit(*size, &[])?;
    output.flush().map_err(at(Path::new("standard output")))?;
    Ok(*size)
}

/// Takes bytes and where they belong.
type WriteAt<'a> = dyn FnMut(u64, &[u8]) -> Result<(), Error> + 'a;

/// Hands the data of a file to `write`, with where it belongs; holes are left out.
fn copy(data: &FileData, size: u64, source: &ImageData<'_>, write: &mut WriteAt<'_>) -> Result<u64, Error> {
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    for run in data.runs(size) {
        let mut done = 0;
        while done < run.length {
            let now = (run.length - done).min(BUFFER as u64) as usize;
            source.read_at(Place { offset: run.place.offset + done, ..run.place }, &mut buffer[..now])?;
            write(run.start + done, &buffer[..now])?;
            done += now as u64;
        }
        total += run.length;
    }
    Ok(total)
}

/// Copies what is at `path` of the file system to the host: into the folder `target`, or as `target` where that is no
/// folder. A folder goes with everything below it, onto a folder of that name that may be there.
///
/// Links, modes, times, extended attributes, hard links among what is copied and holes are kept, owners when this is root.
/// Nothing is written through a symbolic link, and no file is replaced.
pub fn extract(fs: &FileSystem, path: &[u8], target: &Path) -> Result<Extracted, Error> {
    let mut tree = fs.tree()?.tree;
    let node = Names::find(&mut tree, path)?;
    let (folder, name) = if target.is_dir() {
        let name = path.split(|&byte| byte == b'/').rfind(|name| !matches!(*name, b"" | b"." | b".."));
        (target.to_owned(), name.map(|name| OsStr::from_bytes(name).to_owned()))
    } else {
        let folder = target.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        let name = target.file_name().map(ToOwned::to_owned).ok_or_else(|| Error::Invalid {
            what: target.display().to_string(),
            reason: "expected a name for the copy".to_owned(),
        })?;
        (folder.to_owned(), Some(name))
    };
    let open = openat(CWD, &folder, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| at(&folder)(errno.into()))?;
    let mut writer = Writer {
        tree: &tree,
        data: fs.data(),
        root: open,
        shown: folder,
        is_root: rustix::process::geteuid().is_root(),
        names: Names::counts(&tree),
        linked: HashMap::new(),
        report: Extracted::default(),
    };
    writer.run(node, name.as_deref().map(OsStr::as_bytes))?;
    Ok(writer.report)
}

/// A folder that is to be filled, and then given its attributes.
enum Step {
    Fill(NodeId, Vec<Box<[u8]>>),
    Seal(NodeId, Vec<Box<[u8]>>),
}

struct Writer<'a> {
    tree: &'a Tree,
    data: ImageData<'a>,
    root: OwnedFd,
    shown: PathBuf,
    is_root: bool,
    names: HashMap<usize, u32>,
    /// Where the first name of a node with several was written.
    linked: HashMap<usize, Vec<Box<[u8]>>>,
    report: Extracted,
}

impl Writer<'_> {
    fn run(&mut self, node: NodeId, name: Option<&[u8]>) -> Result<(), Error> {
        let path: Vec<Box<[u8]>> = name.into_iter().map(Box::from).collect();
        let mut stack = Vec::new();
        // Without a name, the root's entries go into the folder itself.
        match name {
            Some(_) => self.entry(node, path, &mut stack)?,
            None => stack.push(Step::Fill(node, path)),
        }
        while let Some(step) = stack.pop() {
            match step {
                Step::Fill(node, path) => {
                    for (name, child) in self.tree.children(node).into_iter().flat_map(|names| names.iter()) {
                        let path = path.iter().cloned().chain([name.into()]).collect();
                        self.entry(child.node, path, &mut stack)?;
                    }
                }
                Step::Seal(node, path) => {
                    let folder = self.open(&path)?;
                    self.seal(folder, &self.tree.node(node).attributes, &path)?;
                }
            }
        }
        Ok(())
    }

    /// The folder below the one that everything goes to, no link followed on the way.
    fn open(&self, path: &[Box<[u8]>]) -> Result<OwnedFd, Error> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let mut folder = self.root.try_clone().map_err(at(&self.shown))?;
        for (depth, name) in path.iter().enumerate() {
            folder = openat(&folder, &name[..], flags, Mode::empty())
                .map_err(|errno| refused(&self.path(&path[..=depth]), errno))?;
        }
        Ok(folder)
    }

    fn path(&self, path: &[Box<[u8]>]) -> PathBuf {
        path.iter().fold(self.shown.clone(), |shown, name| shown.join(OsStr::from_bytes(name)))
    }

    fn entry(&mut self, id: NodeId, path: Vec<Box<[u8]>>, stack: &mut Vec<Step>) -> Result<(), Error> {
        let Some((name, above)) = path.split_last() else { return Ok(()) };
        let folder = self.open(above)?;
        let node = self.tree.node(id);
        let shown = self.path(&path);
        let refused = |errno| refused(&shown, errno);
        self.report.entries += 1;
        if let Some((first_name, first_above)) =
            self.linked.get(&id.index()).and_then(|first| first.split_last())
        {
            let from = self.open(first_above)?;
            return linkat(&from, &first_name[..], &folder, &name[..], AtFlags::empty()).map_err(refused);
        }
        match &node.content {
            Content::Directory(_) => {
                match mkdirat(&folder, &name[..], Mode::RWXU) {
                    // Only onto a folder, which opening it finds out.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(refused(errno)),
                }
                drop(self.open(&path)?);
                stack.push(Step::Seal(id, path.clone()));
                stack.push(Step::Fill(id, path));
                return Ok(());
            }
            Content::File { size, data } => {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
                let mode = Mode::RUSR | Mode::WUSR;
                let file = File::from(openat(&folder, &name[..], flags, mode).map_err(refused)?);
                self.report.data += copy(data, *size, &self.data, &mut |offset, bytes| {
                    file.write_all_at(bytes, offset).map_err(at(&shown))
                })?;
                file.set_len(*size).map_err(at(&shown))?;
                self.seal(file.into(), &node.attributes, &path)?;
            }
            Content::Symlink(target) => {
                symlinkat(&target[..], &folder, &name[..]).map_err(refused)?;
                self.attributes_at(&folder, name, &node.attributes).map_err(refused)?;
                self.report.skipped_xattrs += node.attributes.xattrs.len() as u64;
            }
            Content::CharDevice { .. } | Content::BlockDevice { .. } | Content::Fifo => {
                let (kind, device) = match node.content {
                    Content::CharDevice { major, minor } => {
                        (FileType::CharacterDevice, makedev(major, minor))
                    }
                    Content::BlockDevice { major, minor } => (FileType::BlockDevice, makedev(major, minor)),
                    _ => (FileType::Fifo, 0),
                };
                match mknodat(&folder, &name[..], kind, Mode::RUSR | Mode::WUSR, device) {
                    Ok(()) => {}
                    Err(Errno::PERM) if kind != FileType::Fifo => {
                        self.report.entries -= 1;
                        self.report.skipped_devices += 1;
                        return Ok(());
                    }
                    Err(errno) => return Err(refused(errno)),
                }
                self.attributes_at(&folder, name, &node.attributes).map_err(refused)?;
                let mode = Mode::from_raw_mode(node.attributes.mode.into());
                // What was just made is no link.
                rustix::fs::chmodat(&folder, &name[..], mode, AtFlags::empty()).map_err(refused)?;
                self.report.skipped_xattrs += node.attributes.xattrs.len() as u64;
            }
        }
        if self.names.get(&id.index()).is_some_and(|&names| names > 1) {
            self.linked.insert(id.index(), path);
        }
        Ok(())
    }

    /// Owner and time of what cannot be opened.
    fn attributes_at(&self, folder: &OwnedFd, name: &[u8], attributes: &Attributes) -> Result<(), Errno> {
        if self.is_root {
            let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
            chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        utimensat(folder, name, &times(attributes), AtFlags::SYMLINK_NOFOLLOW)?;
        // That nobody has put something else there.
        statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).map(|_| ())
    }

    fn seal(&mut self, file: OwnedFd, attributes: &Attributes, path: &[Box<[u8]>]) -> Result<(), Error> {
        let shown = self.path(path);
        let refused = |errno| refused(&shown, errno);
        let mut mode = attributes.mode;
        if self.is_root {
            let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
            fchown(&file, Some(uid), Some(gid)).map_err(refused)?;
        } else {
            // Of another owner these bits would mean something else.
            mode &= 0o1777;
        }
        // Before the attributes: an ACL's mask is the mode's group bits.
        fchmod(&file, Mode::from_raw_mode(mode.into())).map_err(refused)?;
        let mut skipped = 0;
        for xattr in &attributes.xattrs {
            let set = fsetxattr(file.as_fd(), &xattr.name[..], &xattr.value, XattrFlags::empty());
            skipped += u64::from(set.is_err());
        }
        futimens(&file, &times(attributes)).map_err(refused)?;
        self.report.skipped_xattrs += skipped;
        Ok(())
    }
}

fn refused(path: &Path, errno: Errno) -> Error {
    match errno {
        Errno::EXIST | Errno::LOOP | Errno::NOTDIR => Error::Invalid {
            what: path.display().to_string(),
            reason: "something is there already: nothing is replaced, and no link is followed".to_owned(),
        },
        _ => at(path)(errno.into()),
    }
}

fn times(attributes: &Attributes) -> Timestamps {
    let time = Timespec { tv_sec: attributes.mtime.seconds, tv_nsec: attributes.mtime.nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}
