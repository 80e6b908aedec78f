//! What other programs make of a file system: e2fsck, debugfs, the kernel, and the ext4-view crate.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ext4_view::Ext4;

/// Runs a program to its end, whatever that is.
pub(crate) fn run(program: &str, args: &[&OsStr]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program} must be installed: {error}"))
}

/// Runs a program that must succeed; its standard output.
pub(crate) fn succeed(program: &str, args: &[&OsStr]) -> String {
    let output = run(program, args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {args:?}:\n{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// A full check that finds nothing to complain about.
pub(crate) fn assert_clean(image: &Path) {
    succeed("e2fsck", &["-fn".as_ref(), image.as_os_str()]);
}

/// The answer of one debugfs command.
pub(crate) fn debugfs(image: &Path, command: &str) -> String {
    succeed("debugfs", &["-R".as_ref(), command.as_ref(), image.as_os_str()])
}

/// Whether this process may mount; says why not.
pub(crate) fn may_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: a kernel mount needs root, and this is not root");
    }
    root
}

/// A loop mount, gone when dropped.
pub(crate) struct Mount {
    point: tempfile::TempDir,
}

impl Mount {
    pub(crate) fn new(image: &Path, options: &str) -> Self {
        let point = tempfile::tempdir().unwrap();
        let options = format!("loop,{options}");
        let args = [OsStr::new("-t"), "ext4".as_ref(), "-o".as_ref(), options.as_ref()];
        succeed("mount", &[&args[..], &[image.as_os_str(), point.path().as_os_str()]].concat());
        Self { point }
    }

    pub(crate) fn path(&self) -> &Path {
        self.point.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let output = run("umount", &[self.point.path().as_os_str()]);
        if !output.status.success() {
            eprintln!("umount {}: {}", self.path().display(), String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// Everything about an entry that a program can see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    /// Contents of a file, target of a link.
    pub(crate) contents: Vec<u8>,
    pub(crate) device: u64,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// For a directory, the subdirectories and 2.
    pub(crate) links: u64,
    /// The first name of the same inode.
    pub(crate) same_as: Vec<u8>,
}

pub(crate) type Snapshot = BTreeMap<Vec<u8>, Seen>;

/// The tree under `root`, as this machine's kernel shows it. `lost+found` is left out.
pub(crate) fn snapshot(root: &Path) -> Snapshot {
    let mut seen = Snapshot::new();
    let mut stack = vec![PathBuf::new()];
    while let Some(relative) = stack.pop() {
        let path = root.join(&relative);
        let metadata = fs::symlink_metadata(&path).unwrap();
        let file_type = metadata.file_type();
        let contents = if file_type.is_file() {
            fs::read(&path).unwrap()
        } else if file_type.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_vec()
        } else {
            Vec::new()
        };
        let is_device = file_type.is_char_device() || file_type.is_block_device();
        let xattrs = xattr::list(&path).unwrap().map(|name| {
            let value = xattr::get(&path, &name).unwrap().unwrap_or_default();
            (name.into_vec(), value)
        });
        let entry = Seen {
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
            contents,
            device: if is_device { metadata.rdev() } else { 0 },
            xattrs: xattrs.collect(),
            links: metadata.nlink(),
            same_as: metadata.ino().to_le_bytes().to_vec(),
        };
        if file_type.is_dir() {
            for child in fs::read_dir(&path).unwrap() {
                let name = child.unwrap().file_name();
                if !(relative.as_os_str().is_empty() && name == "lost+found") {
                    stack.push(relative.join(name));
                }
            }
        }
        seen.insert(relative.as_os_str().as_bytes().to_vec(), entry);
    }
    let mut first = BTreeMap::new();
    for (path, entry) in &mut seen {
        entry.same_as = first.entry(entry.same_as.clone()).or_insert_with(|| path.clone()).clone();
    }
    seen
}

/// What the ext4-view crate, which shares no code with ours, sees of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Viewed {
    pub(crate) kind: char,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) contents: Vec<u8>,
}

/// The tree in `image` without a mount. `lost+found` is left out.
pub(crate) fn view(image: &Path) -> BTreeMap<Vec<u8>, Viewed> {
    let ext4 = Ext4::load_from_path(image).unwrap();
    let mut seen = BTreeMap::new();
    let mut stack = vec![b"/".to_vec()];
    while let Some(path) = stack.pop() {
        let metadata = ext4.symlink_metadata(&path[..]).unwrap();
        let kind = metadata.file_type();
        let (kind, contents) = if kind.is_regular_file() {
            ('-', ext4.read(&path[..]).unwrap())
        } else if kind.is_symlink() {
            ('l', ext4.read_link(&path[..]).unwrap().as_ref().to_vec())
        } else if kind.is_dir() {
            ('d', Vec::new())
        } else if kind.is_char_dev() {
            ('c', Vec::new())
        } else if kind.is_block_dev() {
            ('b', Vec::new())
        } else {
            assert!(kind.is_fifo(), "{}", String::from_utf8_lossy(&path));
            ('p', Vec::new())
        };
        if kind == 'd' {
            for entry in ext4.read_dir(&path[..]).unwrap() {
                let child = entry.unwrap().path();
                let child: &[u8] = child.as_ref();
                if !child.ends_with(b"/.") && !child.ends_with(b"/..") && child != b"/lost+found" {
                    stack.push(child.to_vec());
                }
            }
        }
        let entry = Viewed {
            kind,
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: (metadata.modified().seconds(), metadata.modified().nanoseconds()),
            contents,
        };
        seen.insert(path[1..].to_vec(), entry);
    }
    seen
}
