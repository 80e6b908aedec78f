//! Small files that are whole or absent, whatever ends the program: temporary name, sync, rename.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::{Error, at};

/// What a killed writer leaves begins so; the next sweep takes it away.
pub(crate) const NEW_PREFIX: &str = ".new-";

/// Puts the file in its place, in a folder that is there.
pub(crate) fn write(path: &Path, contents: &[u8]) -> Result<(), Error> {
    persist(path, contents, |file| file.sync_all())?;
    let folder = folder_of(path);
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder))
}

/// As [`write()`], but a power cut may take it: for what saves time and no more. Its reader must know a damaged one.
pub(crate) fn write_lazily(path: &Path, contents: &[u8]) -> Result<(), Error> {
    persist(path, contents, |_| Ok(()))
}

fn persist(path: &Path, contents: &[u8], sync: fn(&File) -> io::Result<()>) -> Result<(), Error> {
    let folder = folder_of(path);
    let mode = fs::Permissions::from_mode(0o644);
    let file = tempfile::Builder::new().prefix(NEW_PREFIX).permissions(mode).tempfile_in(folder);
    let mut file = file.map_err(at(folder))?;
    file.write_all(contents).and_then(|()| sync(file.as_file())).map_err(at(path))?;
    file.persist(path).map_err(|error| at(path)(error.error))?;
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A folder that several processes write to. As long as it is held, nothing that another one is writing is swept.
#[derive(Debug)]
pub(crate) struct Held(#[expect(dead_code, reason = "it is the lock, not what is in it")] File);

/// Makes the folder where it is missing, removes what killed writers left unless somebody else is at work, and holds it.
pub(crate) fn hold(folder: &Path) -> Result<Held, Error> {
    fs::create_dir_all(folder).map_err(at(folder))?;
    let lock = File::open(folder).map_err(at(folder))?;
    if lock.try_lock().is_ok() {
        for path in half_made(folder)? {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(at(&path))?;
        }
        lock.unlock().map_err(at(folder))?;
    }
    lock.lock_shared().map_err(at(folder))?;
    Ok(Held(lock))
}

/// What is being written in the folder, or was when its writer was killed. Empty where there is no folder.
pub(crate) fn half_made(folder: &Path) -> Result<Vec<std::path::PathBuf>, Error> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(folder)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(at(folder))?;
        if entry.file_name().to_string_lossy().starts_with(NEW_PREFIX) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_writer_leaves_what_the_next_one_sweeps() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("file"), b"one").unwrap();
        write(&dir.path().join("file"), b"two").unwrap();
        assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"two");
        fs::write(dir.path().join(".new-half"), b"").unwrap();
        let held = hold(dir.path()).unwrap();
        assert!(half_made(dir.path()).unwrap().is_empty());
        fs::write(dir.path().join(".new-live"), b"").unwrap();
        let other = hold(dir.path()).unwrap();
        assert_eq!(half_made(dir.path()).unwrap().len(), 1, "somebody is at work");
        drop((held, other));
        hold(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
