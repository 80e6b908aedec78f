//! Files that the agent writes into an image, which can hold anything in their place. Call it on a thread of the sandbox's root.

use std::fs::{self, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Puts a file in the place of whatever is there, at once: a link is replaced and not followed, a FIFO holds nobody up.
/// Its folder is made when it is missing, as in an image from scratch.
pub(crate) fn replace(path: &str, text: &str, mode: u32) -> io::Result<()> {
    let path = Path::new(path);
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("writing {}: {error}", path.display()));
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(named)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let temporary = folder.join(format!(".{name}.{:016x}", u64::from_ne_bytes(random)));
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        // The agent's umask does not count.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        // What was half written is nobody's.
        let _ = fs::remove_file(&temporary);
        named(error)
    })
}

/// As [`replace`]; a file that is as one of ours would be is written in its place, which spares a file system much work. Only
/// where nobody reads it meanwhile.
pub(crate) fn rewrite(path: &str, text: &str, mode: u32) -> io::Result<()> {
    match overwrite(path, text, |file| file.nlink() == 1 && file.mode() & 0o7777 == mode) {
        Ok(true) => Ok(()),
        // Whatever is in its place, or keeps it from being written.
        Ok(false) | Err(_) => replace(path, text, mode),
    }
}

/// Writes a regular file in its place when it is `fit`, and says whether it was: a FIFO does not hold us up, a link leads
/// nowhere.
pub(crate) fn overwrite(path: &str, text: &str, fit: impl FnOnce(&Metadata) -> bool) -> io::Result<bool> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOFOLLOW;
    let file = OpenOptions::new().write(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || !fit(&metadata) {
        return Ok(false);
    }
    file.write_all_at(text.as_bytes(), 0)?;
    // To give blocks back and take them again is most of the work.
    if metadata.len() > text.len() as u64 {
        file.set_len(text.len() as u64)?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_was_there_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (file, other) = (folder.path().join("etc/file"), folder.path().join("other"));
        replace(file.to_str().unwrap(), "one\n", 0o444).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o444);
        fs::remove_file(&file).unwrap();
        fs::write(&other, "kept").unwrap();
        std::os::unix::fs::symlink(&other, &file).unwrap();
        replace(file.to_str().unwrap(), "two\n", 0o644).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "two\n");
        assert_eq!(fs::read_to_string(&other).unwrap(), "kept");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        let error = replace(file.to_str().unwrap(), "x", 0o644).unwrap_err().to_string();
        assert!(error.contains("etc/file"), "{error}");
        assert_eq!(fs::read_dir(folder.path().join("etc")).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_fit_keeps_its_inode_and_another_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let (file, other) = (folder.path().join("id"), folder.path().join("other"));
        let path = file.to_str().unwrap();
        let inode = || fs::metadata(&file).unwrap().ino();
        rewrite(path, "a longer text\n", 0o444).unwrap();
        let first = inode();
        for text in ["short\n", "longer again\n", ""] {
            rewrite(path, text, 0o444).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        assert_eq!(inode(), first);
        rewrite(path, "one\n", 0o644).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
        fs::hard_link(&file, &other).unwrap();
        rewrite(path, "two\n", 0o644).unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "one\n");
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&other, &file).unwrap();
        rewrite(path, "three\n", 0o644).unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "one\n");
        assert_eq!(fs::read_to_string(&file).unwrap(), "three\n");
        fs::remove_file(&file).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, 0o644.into(), 0).unwrap();
        rewrite(path, "four\n", 0o644).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "four\n");
    }
}
