//! Remove.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, OFlags, unlinkat};

use super::operations::io_error;
use super::walk::{self, Name, Walk};
use crate::connect::{Code, Error};

/// Names that are read of a directory at a time: its size must not become the agent's.
const BATCH: usize = 1024;

/// Removes what is there, a directory with all that is in it; nothing there is no error. What is mounted in it is not
/// emptied: that is another file system, and rarely what a client means.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(path) {
        Ok(_) if walk::is_mount_point(path).unwrap_or(false) => return Err(mounted(path)),
        Ok(metadata) if metadata.is_dir() => return remove_tree(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if !gone(&error) => Err(io_error("cannot remove", path, &error)),
        _ => Ok(()),
    }
}

fn remove_tree(path: &Path) -> Result<(), Error> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::ResourceBusy => mounted(path),
        _ => io_error("cannot remove", path, &error),
    };
    let result = empty(path);
    match result {
        Ok(Emptied::All) => {}
        Ok(Emptied::MountPoint) => return Err(mounted(path)),
        Err(error) if gone(&error) => {}
        Err(error) => return Err(failed(error)),
    }
    match fs::remove_dir(path) {
        Err(error) if !gone(&error) => Err(failed(error)),
        _ => Ok(()),
    }
}

enum Emptied {
    All,
    MountPoint,
}

fn empty(path: &Path) -> io::Result<Emptied> {
    let flags = (OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW).bits() as i32;
    let mut walk = Walk::begin_at(fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?)?;
    // What is left of each directory's batch, on the way to where the walk is; and the names of that way.
    let mut open: Vec<Vec<Name>> = vec![Vec::new()];
    let mut way: Vec<OsString> = Vec::new();
    loop {
        let Some(here) = open.last_mut() else { return Ok(Emptied::All) };
        let Some(Name { name, directory }) = here.pop() else {
            let (batch, _) = walk.names(BATCH)?;
            if !batch.is_empty() {
                *here = batch;
                continue;
            }
            open.pop();
            let Some(name) = way.pop() else { return Ok(Emptied::All) };
            walk.ascend()?;
            // Full again: somebody puts files there. It comes with the next batch.
            match unlinkat(CWD, &name, AtFlags::REMOVEDIR).map_err(io::Error::from) {
                Err(error) if !gone(&error) && error.kind() != io::ErrorKind::DirectoryNotEmpty => {
                    return Err(error);
                }
                _ => continue,
            }
        };
        if directory != Some(true) {
            match unlinkat(CWD, &name, AtFlags::empty()).map_err(io::Error::from) {
                // It is a directory after all.
                Err(error) if error.kind() == io::ErrorKind::IsADirectory => {}
                Err(error) if !gone(&error) => return Err(error),
                _ => continue,
            }
        }
        match walk.descend(&name) {
            Ok(()) if walk.at_mount_point()? => return Ok(Emptied::MountPoint),
            Ok(()) => {
                open.push(Vec::new());
                way.push(name);
            }
            // Gone, or no directory any more: what there is now comes with the next batch.
            Err(error) if gone(&error) || error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => return Err(error),
        }
    }
}

fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn mounted(path: &Path) -> Error {
    let message = format!("cannot remove '{}': something is mounted there; unmount it first", path.display());
    Error::new(Code::FailedPrecondition, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_tree_goes_with_its_links_and_without_what_they_lead_to() {
        let dir = tempfile::tempdir().unwrap();
        let keep = dir.path().join("keep");
        fs::create_dir(&keep).unwrap();
        fs::write(keep.join("file"), b"x").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        symlink(&keep, tree.join("a/link")).unwrap();
        for n in 0..3 * BATCH {
            fs::write(tree.join(format!("a/b/{n}")), b"").unwrap();
        }
        let link = dir.path().join("link");
        symlink(&tree, &link).unwrap();
        remove(&link).unwrap();
        assert!(tree.exists(), "a link goes by itself");
        remove(&tree).unwrap();
        remove(&tree).unwrap();
        assert!(keep.join("file").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_tree_deeper_than_any_path_and_any_stack_goes() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let small = std::thread::Builder::new().stack_size(128 << 10);
        let path = tree.clone();
        let thread = small.spawn(move || {
            let mut walk = Walk::begin(&path).unwrap();
            for _ in 0..5000 {
                rustix::fs::mkdirat(CWD, "directory", rustix::fs::Mode::RWXU).unwrap();
                walk.descend("directory".as_ref()).unwrap();
            }
            drop(walk);
            remove(&path).unwrap();
        });
        thread.unwrap().join().unwrap();
        assert!(!tree.exists());
    }
}
