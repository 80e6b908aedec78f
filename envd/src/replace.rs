//! Files that the agent writes into an image, which can hold anything in their place. Call it on a thread of the sandbox's root.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
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
}
