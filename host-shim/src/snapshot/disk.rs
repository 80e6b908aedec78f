//! Disks: empty overlays, and copies that share what can be shared.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD};
use rustix::io::Errno;

use super::{Error, FileName, qcow2, sparse};

/// How a file came to its place, the cheapest way first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Placed {
    /// The same inode.
    Linked,
    /// Another inode that shares the blocks on disk.
    Reflinked,
    /// A copy of its data; holes stay holes.
    Copied,
}

/// Makes `out` an empty qcow2 overlay of `size` bytes over the raw file `scratch.ext4` of `backing_size` bytes. Where
/// it is larger, the rest reads as zeros.
pub fn overlay(out: &Path, size: u64, backing_size: u64) -> Result<(), Error> {
    if size < backing_size || !size.is_multiple_of(512) || size == 0 || size > qcow2::MAX_SIZE {
        let reason = format!(
            "expected {backing_size} (the snapshot's) to {} bytes in whole sectors, got {size}",
            qcow2::MAX_SIZE
        );
        return Err(Error::invalid("size of the scratch disk", reason));
    }
    let (image, length) = qcow2::empty_overlay(size, FileName::Scratch.as_str());
    let needed = Some(image.len() as u64);
    created(out, |mut file| {
        file.write_all(&image).and_then(|()| file.set_len(length)).map_err(Error::write(out, needed))
    })
    .map(drop)
}

/// Makes `to` a copy of `from` that shares no later write with it: a reflink where the file system can, else its data.
pub fn copy_sparse(from: &File, to: &Path) -> Result<Placed, Error> {
    let metadata = from.metadata().map_err(Error::io("read the original of", to))?;
    let needed = Some(metadata.blocks() * 512);
    created(to, |file| match rustix::fs::ioctl_ficlone(file, from) {
        Ok(()) => Ok(Placed::Reflinked),
        Err(error @ (Errno::NOSPC | Errno::DQUOT)) => Err(Error::write(to, needed)(error.into())),
        // Another file system, or one that has no reflinks: each says so in its own way.
        Err(_) => {
            sparse::copy(from, metadata.len(), file).map_err(Error::write(to, needed))?;
            Ok(Placed::Copied)
        }
    })
}

/// Makes `to` the same file as `from`.
pub fn link(from: &File, to: &Path) -> rustix::io::Result<()> {
    // By its descriptor: its path may lead to another file by now.
    let descriptor = format!("/proc/self/fd/{}", from.as_raw_fd());
    rustix::fs::linkat(CWD, descriptor.as_str(), CWD, to, AtFlags::SYMLINK_FOLLOW)
}

/// Makes `to` the same file as `from`, which nobody may write any more, or where that cannot be, a copy.
pub fn link_or_copy(from: &File, to: &Path) -> Result<Placed, Error> {
    match link(from, to) {
        Ok(()) => Ok(Placed::Linked),
        // Another file system; a file that is not ours (protected_hardlinks) or a file system without links; too many;
        // a file whose last name is gone.
        Err(Errno::XDEV | Errno::PERM | Errno::OPNOTSUPP | Errno::MLINK | Errno::NOENT) => {
            copy_sparse(from, to)
        }
        Err(error @ (Errno::NOSPC | Errno::DQUOT)) => Err(Error::write(to, None)(error.into())),
        Err(error) => Err(Error::io("make the link", to)(error.into())),
    }
}

/// Makes the new private file `path`; when `fill` fails, nothing is left.
fn created<T>(path: &Path, fill: impl FnOnce(&File) -> Result<T, Error>) -> Result<T, Error> {
    let file = create(path).map_err(Error::write(path, None))?;
    fill(&file).inspect_err(|_| {
        if let Err(error) = fs::remove_file(path) {
            tracing::warn!(%error, path = %path.display(), "cannot remove an unfinished file");
        }
    })
}

/// A new file: what VMs write is for nobody else.
pub(super) fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;
    use crate::snapshot::hash::{self, Scheme};

    fn qemu_img(arguments: &[&str]) -> String {
        let output =
            Command::new("qemu-img").args(arguments).output().expect("qemu-img (package qemu-utils) runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    #[test]
    fn qemu_reads_an_empty_overlay_as_its_backing_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let backing =
            File::options().read(true).write(true).create_new(true).open(path("scratch.ext4")).unwrap();
        let backing_size = 48 << 20;
        backing.set_len(backing_size).unwrap();
        for at in [0, 70_000, backing_size - 11] {
            backing.write_all_at(b"hello world", at).unwrap();
        }
        // The same size, grown within one L1 table, and to more than one cluster of it.
        for size in [backing_size, 3 << 30, 5 << 40] {
            let out = path(&format!("{size}.qcow2"));
            overlay(Path::new(&out), size, backing_size).unwrap();
            qemu_img(&["check", "-f", "qcow2", &out]);
            let info: serde_json::Value =
                serde_json::from_str(&qemu_img(&["info", "-f", "qcow2", "--output=json", &out])).unwrap();
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["cluster-size"], qcow2::CLUSTER);
            assert_eq!(info["backing-filename"], "scratch.ext4");
            assert_eq!(info["backing-filename-format"], "raw");
            assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
        }
        let (out, raw) = (path(&format!("{}.qcow2", 3_u64 << 30)), path("raw"));
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &out, &raw]);
        backing.set_len(3 << 30).unwrap();
        let identical = qemu_img(&["compare", "-f", "raw", "-F", "raw", &raw, &path("scratch.ext4")]);
        assert!(identical.contains("identical"), "{identical}");

        // And it takes writes: clusters are allocated, the backing file stays.
        let before = hash::digest(&backing, Scheme::Sparse).unwrap();
        let write = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 9 1M 200k", &out]).status();
        assert!(write.expect("qemu-io (package qemu-utils) runs").success());
        qemu_img(&["check", "-f", "qcow2", &out]);
        assert_eq!(hash::digest(&backing, Scheme::Sparse).unwrap(), before);
    }

    #[test]
    fn an_overlay_is_never_smaller_than_its_backing_file() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("o.qcow2");
        for (size, backing) in [(512, 1024), (1000, 512), (0, 0), (qcow2::MAX_SIZE + 512, 512)] {
            let error = overlay(&out, size, backing).unwrap_err().to_string();
            assert!(error.contains("invalid size of the scratch disk: expected"), "{error}");
        }
        assert!(!out.exists());
        fs::write(&out, "mine").unwrap();
        overlay(&out, 1024, 1024).unwrap_err();
        assert_eq!(fs::read(&out).unwrap(), b"mine", "what was there is not touched");
    }

    #[test]
    fn a_copy_shares_no_write() {
        let dir = tempfile::tempdir().unwrap();
        let from =
            File::options().read(true).write(true).create_new(true).open(dir.path().join("from")).unwrap();
        from.set_len(10 << 20).unwrap();
        from.write_all_at(b"data", 5 << 20).unwrap();
        let to = dir.path().join("to");
        assert!(copy_sparse(&from, &to).unwrap() > Placed::Linked);
        from.write_all_at(b"more", 5 << 20).unwrap();
        let copy = fs::read(&to).unwrap();
        assert_eq!((copy.len(), &copy[5 << 20..][..4]), (10 << 20, b"data".as_slice()));
        assert_eq!(fs::metadata(&to).unwrap().mode() & 0o777, 0o600);
        let again = copy_sparse(&from, &to).unwrap_err();
        assert!(matches!(again, Error::Io { .. }) && to.exists(), "{again}");
    }

    #[test]
    fn a_link_is_of_the_open_file_and_not_of_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("from");
        fs::write(&name, "first").unwrap();
        let from = File::open(&name).unwrap();
        fs::rename(&name, dir.path().join("moved")).unwrap();
        fs::write(&name, "second").unwrap();
        let to = dir.path().join("to");
        assert_eq!(link_or_copy(&from, &to).unwrap(), Placed::Linked);
        assert_eq!(fs::metadata(&to).unwrap().ino(), from.metadata().unwrap().ino());
        // Its last name is gone: only its contents can be had.
        fs::remove_file(dir.path().join("moved")).unwrap();
        fs::remove_file(&to).unwrap();
        assert!(link_or_copy(&from, &to).unwrap() > Placed::Linked);
        assert_eq!(fs::read(&to).unwrap(), b"first");
        // Another file system.
        let other = tempfile::tempdir_in("/dev/shm").unwrap();
        if fs::metadata(other.path()).unwrap().dev() != from.metadata().unwrap().dev() {
            assert_eq!(link_or_copy(&from, &other.path().join("to")).unwrap(), Placed::Copied);
            assert_eq!(fs::read(other.path().join("to")).unwrap(), b"first");
        }
    }
}
