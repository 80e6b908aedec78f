//! The blocking side of `filesystem.Filesystem`. Paths are absolute here.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, lchown};
use std::path::Path;

use envd_proto::filesystem::EntryInfo;

use super::entry::{entry, link_text};
use crate::connect::{Code, Error};
use crate::root::Unanswered;
use crate::users::{User, UserDatabase};

/// Who gets what a call makes; `None` when the agent cannot give files away.
pub(super) type Owner = Option<(u32, u32)>;

pub(super) fn owner(user: &User, can_change: bool) -> Owner {
    can_change.then_some((user.credentials.uid, user.credentials.gid))
}

/// The one place where errors of the system get their codes.
pub(super) fn io_error(what: &str, path: &Path, error: &io::Error) -> Error {
    if let Some(unanswered) = Unanswered::of(error) {
        return Error::new(unanswered.code(), format!("{what} '{}': {unanswered}", path.display()));
    }
    let code = match error.kind() {
        // std's kind for this is not stable yet.
        _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => Code::FailedPrecondition,
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::AlreadyExists => Code::AlreadyExists,
        io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidFilename => Code::InvalidArgument,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Code::ResourceExhausted
        }
        io::ErrorKind::PermissionDenied => Code::PermissionDenied,
        io::ErrorKind::ReadOnlyFilesystem => Code::FailedPrecondition,
        _ => Code::Internal,
    };
    Error::new(code, format!("{what} '{}': {error}", path.display()))
}

/// As [`stat`], with the text of a link.
pub(super) fn exact_stat(path: &Path, users: &UserDatabase) -> Result<EntryInfo, Error> {
    Ok(EntryInfo { link_text: link_text(path), ..stat(path, users)? })
}

pub(super) fn stat(path: &Path, users: &UserDatabase) -> Result<EntryInfo, Error> {
    entry(path, path, users).map_err(|error| io_error("cannot stat", path, &error))
}

pub(super) fn make_directory(path: &Path, owner: Owner, users: &UserDatabase) -> Result<EntryInfo, Error> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            let message = format!("directory already exists: {}", path.display());
            return Err(Error::new(Code::AlreadyExists, message));
        }
        Ok(_) => {
            let message = format!("path already exists but it is not a directory: {}", path.display());
            return Err(Error::new(Code::InvalidArgument, message));
        }
        Err(_) => {}
    }
    make_directories(path, owner).map_err(|error| io_error("cannot make the directory", path, &error))?;
    stat(path, users)
}

/// mkdir -p; what is made belongs to `owner`.
pub(super) fn make_directories(path: &Path, owner: Owner) -> io::Result<()> {
    let missing: Vec<_> =
        path.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists()).collect();
    for folder in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o755).create(folder) {
            Ok(()) => give(folder, owner)?,
            // Somebody else made it in the meantime.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    if fs::metadata(path)?.is_dir() { Ok(()) } else { Err(io::Error::from(io::ErrorKind::NotADirectory)) }
}

pub(super) fn give(path: &Path, owner: Owner) -> io::Result<()> {
    match owner {
        // A link that somebody put there meanwhile must not give away what it leads to.
        Some((uid, gid)) => lchown(path, Some(uid), Some(gid)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{relocate::relocate, remove::remove};
    use super::*;

    #[test]
    fn moves_and_removals_have_the_codes_that_clients_know() {
        let dir = tempfile::tempdir().unwrap();
        let users = UserDatabase::default();
        let file = dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        assert_eq!(make_directory(dir.path(), None, &users).unwrap_err().code(), Code::AlreadyExists);
        assert_eq!(make_directory(&file, None, &users).unwrap_err().code(), Code::InvalidArgument);
        let moved = relocate(&file, &dir.path().join("new/place"), None, &users).unwrap();
        assert_eq!(moved.name, "place");
        assert_eq!(relocate(&file, &dir.path().join("x"), None, &users).unwrap_err().code(), Code::NotFound);
        remove(&dir.path().join("new")).unwrap();
        remove(&dir.path().join("new")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
