//! The blocking side of `filesystem.Filesystem`. Paths are absolute here.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};

use envd_proto::filesystem::EntryInfo;

use super::entry::entry;
use crate::connect::{Code, Error};
use crate::users::{User, UserDatabase};

/// Entries that one ListDir gives; more would not fit into a message.
const MAX_ENTRIES: usize = 10_000;

/// Who gets what a call makes; `None` when the agent cannot give files away.
pub(super) type Owner = Option<(u32, u32)>;

pub(super) fn owner(user: &User, can_change: bool) -> Owner {
    can_change.then_some((user.credentials.uid, user.credentials.gid))
}

pub(super) fn io_error(what: &str, path: &Path, error: &io::Error) -> Error {
    let code = match error.kind() {
        // std's kind for this is not stable yet.
        _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => Code::FailedPrecondition,
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::AlreadyExists => Code::AlreadyExists,
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory | io::ErrorKind::InvalidInput => {
            Code::InvalidArgument
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
        io::ErrorKind::PermissionDenied => Code::PermissionDenied,
        _ => Code::Internal,
    };
    Error::new(code, format!("{what} '{}': {error}", path.display()))
}

pub(super) fn stat(path: &Path, users: &UserDatabase) -> Result<EntryInfo, Error> {
    entry(path, path, users).map_err(|error| io_error("cannot stat", path, &error))
}

/// The entries below a directory, each directory before what is in it, by name; links are not followed.
pub(super) fn list(path: &Path, depth: u32, users: &UserDatabase) -> Result<Vec<EntryInfo>, Error> {
    let root = fs::canonicalize(path).map_err(|error| io_error("cannot list", path, &error))?;
    let metadata = fs::metadata(&root).map_err(|error| io_error("cannot list", path, &error))?;
    if !metadata.is_dir() {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("path is not a directory: {}", path.display()),
        ));
    }
    let mut found = Vec::new();
    // What is still to be shown, the next one last: (where it is, how the client named the way to it, depth left).
    let mut pending = Vec::new();
    push_children(&mut pending, &root, path, depth.max(1))
        .map_err(|error| io_error("cannot list", path, &error))?;
    while let Some((at, shown, depth)) = pending.pop() {
        if found.len() == MAX_ENTRIES {
            let message = format!("'{}' has more than {MAX_ENTRIES} entries: list its parts", path.display());
            return Err(Error::new(Code::ResourceExhausted, message));
        }
        let entry = match entry(&at, &shown, users) {
            Ok(entry) => entry,
            // Somebody removed it while we walked.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io_error("cannot list", &shown, &error)),
        };
        let directory = entry.symlink_target.is_none() && entry.permissions.starts_with('d');
        found.push(entry);
        if directory && depth > 1 {
            match push_children(&mut pending, &at, &shown, depth - 1) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("cannot list", &shown, &error));
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

fn push_children(
    pending: &mut Vec<(PathBuf, PathBuf, u32)>,
    at: &Path,
    shown: &Path,
    depth: u32,
) -> io::Result<()> {
    // One more than can be shown is enough to know that it is too many.
    let room = (MAX_ENTRIES + 1).saturating_sub(pending.len());
    let names = fs::read_dir(at)?.take(room).map(|entry| Ok(entry?.file_name()));
    let mut names = names.collect::<io::Result<Vec<_>>>()?;
    names.sort_unstable_by(|a, b| b.cmp(a));
    pending.extend(names.into_iter().map(|name| (at.join(&name), shown.join(&name), depth)));
    Ok(())
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
        Some((uid, gid)) => chown(path, Some(uid), Some(gid)),
        None => Ok(()),
    }
}

pub(super) fn rename(from: &Path, to: &Path, owner: Owner, users: &UserDatabase) -> Result<EntryInfo, Error> {
    fs::symlink_metadata(from).map_err(|error| io_error("cannot move", from, &error))?;
    let internal = |error: io::Error| {
        let message = format!("cannot move '{}' to '{}': {error}", from.display(), to.display());
        Error::new(Code::Internal, message)
    };
    if let Some(parent) = to.parent() {
        make_directories(parent, owner).map_err(internal)?;
    }
    fs::rename(from, to).map_err(internal)?;
    stat(to, users)
}

/// Removes what is there, a directory with all that is in it; nothing there is no error.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error("cannot remove", path, &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_listing_is_in_order_and_does_not_follow_links() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        make_directories(&base.join("b/deep/deeper"), None).unwrap();
        fs::write(base.join("a"), b"").unwrap();
        fs::write(base.join("b/c"), b"").unwrap();
        symlink("..", base.join("up")).unwrap();
        symlink("base", dir.path().join("link")).unwrap();
        let users = UserDatabase::default();
        let names = |path: &Path, depth| -> Vec<String> {
            let listed = list(path, depth, &users).unwrap();
            listed
                .iter()
                .map(|entry| Path::new(&entry.path).strip_prefix(path).unwrap().display().to_string())
                .collect()
        };
        assert_eq!(names(&base, 0), ["a", "b", "up"]);
        assert_eq!(names(&base, 2), ["a", "b", "b/c", "b/deep", "up"]);
        assert_eq!(names(&dir.path().join("link"), 9), ["a", "b", "b/c", "b/deep", "b/deep/deeper", "up"]);

        let code = |path: &Path| list(path, 1, &users).unwrap_err().code();
        assert_eq!(code(&base.join("a")), Code::InvalidArgument);
        assert_eq!(code(&base.join("missing")), Code::NotFound);
        symlink("loop", base.join("loop")).unwrap();
        assert_eq!(code(&base.join("loop")), Code::FailedPrecondition);
    }

    #[test]
    fn moves_and_removals_have_the_codes_that_clients_know() {
        let dir = tempfile::tempdir().unwrap();
        let users = UserDatabase::default();
        let file = dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        assert_eq!(make_directory(dir.path(), None, &users).unwrap_err().code(), Code::AlreadyExists);
        assert_eq!(make_directory(&file, None, &users).unwrap_err().code(), Code::InvalidArgument);
        let moved = rename(&file, &dir.path().join("new/place"), None, &users).unwrap();
        assert_eq!(moved.name, "place");
        assert_eq!(rename(&file, &dir.path().join("x"), None, &users).unwrap_err().code(), Code::NotFound);
        remove(&dir.path().join("new")).unwrap();
        remove(&dir.path().join("new")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
