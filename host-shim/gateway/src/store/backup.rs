//! A copy of the database while others use it.
//!
//! SQLite's online backup, all pages in one step: that is one read transaction, so the copy is what was committed at one
//! moment, and in WAL mode nobody waits for it. The copy appears under its name whole, checked and on disk, or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, OpenFlags};
use rustix::fs::{CWD, RenameFlags};

use super::BUSY_TIMEOUT;
use crate::identity::{hex, random};

/// There is no copy.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// Nothing to copy.
    #[error("there is no database {}: no gateway has served from this data folder", .0.display())]
    NoDatabase(PathBuf),
    /// A file is in its place.
    #[error("{} is there already: name another file, or say --force to replace it", .0.display())]
    Exists(PathBuf),
    /// It can have no such name.
    #[error("{} is no name for a file", .0.display())]
    NoName(PathBuf),
    /// SQLite's own error.
    #[error("cannot copy the database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// What was copied is damaged.
    #[error("the copy of the database is damaged, and was not kept: {0}")]
    Damaged(String),
    /// A file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// Copies `database` to the file `to` (0600), in the place of another file only where `replace` says so.
pub fn backup(database: &Path, to: &Path, replace: bool) -> Result<(), BackupError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| BackupError::Io { path, source }
    };
    let name = to.file_name().ok_or_else(|| BackupError::NoName(to.to_owned()))?.to_string_lossy();
    let exists = || BackupError::Exists(to.to_owned());
    match fs::symlink_metadata(to) {
        Ok(found) if found.is_dir() => return Err(BackupError::NoName(to.to_owned())),
        Ok(_) if !replace => return Err(exists()),
        _ => {}
    }
    let folder = match to.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let id = hex(&random::<4>().map_err(io(Path::new("getrandom(2)")))?);
    // Names have 255 bytes at most.
    let start: String = name.chars().take(32).collect();
    let new = Temporary(folder.join(format!(".{start}.{id}.new")));
    copy(database, &new.0)?;
    File::open(&new.0).and_then(|file| file.sync_all()).map_err(io(&new.0))?;
    let renamed = match replace {
        true => fs::rename(&new.0, to),
        false => rustix::fs::renameat_with(CWD, &new.0, CWD, to, RenameFlags::NOREPLACE).map_err(Into::into),
    };
    match renamed {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(exists()),
        other => other.map_err(io(to))?,
    }
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io(folder))
}

fn copy(database: &Path, new: &Path) -> Result<(), BackupError> {
    let io = |source| BackupError::Io { path: new.to_owned(), source };
    if !database.exists() {
        return Err(BackupError::NoDatabase(database.to_owned()));
    }
    // Its locks and its index of the log are files that a reader writes; the database itself is not written.
    let source = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    source.busy_timeout(BUSY_TIMEOUT)?;
    // It holds tokens: its owner's alone, before anything is in it.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(new).map_err(io)?;
    let mut copy = Connection::open_with_flags(new, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    // Nobody else knows the file, and it is synced once it is whole.
    copy.pragma_update(None, "journal_mode", "OFF")?;
    copy.pragma_update(None, "synchronous", "OFF")?;
    let step = Backup::new(&source, &mut copy)?.step(-1)?;
    if step != StepResult::Done {
        return Err(BackupError::Damaged(format!("SQLite stopped with {step:?}")));
    }
    // The header says WAL, as the source's does; one file is all that a copy is.
    copy.pragma_update(None, "journal_mode", "DELETE")?;
    let check: String = copy.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if check != "ok" {
        return Err(BackupError::Damaged(check));
    }
    copy.close().map_err(|(_, error)| error)?;
    Ok(())
}

/// A file that is gone with this, unless it has another name by then.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::config::Capacity;
    use crate::store::Store;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_copy_under_writes_is_of_one_moment() {
        let dir = tempfile::tempdir().unwrap();
        let (database, to) = (dir.path().join("gateway.db"), dir.path().join("copies/copy.db"));
        fs::create_dir(dir.path().join("copies")).unwrap();
        let store = Store::open(&database).unwrap();
        // They are made in order: no copy has one without those before it.
        store.create_team("0", Capacity::UNLIMITED).await.unwrap();
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let writing = {
            let (store, stop) = (store.clone(), stop.clone());
            tokio::spawn(async move {
                let mut made = 0;
                while !stop.load(Ordering::Relaxed) {
                    made += 1;
                    store.create_team(&made.to_string(), Capacity::UNLIMITED).await.unwrap();
                }
                made
            })
        };
        let mut seen = 0;
        for _ in 0..8 {
            let (from, to) = (database.clone(), to.clone());
            tokio::task::spawn_blocking(move || backup(&from, &to, true).unwrap()).await.unwrap();
            assert_eq!(names(&dir.path().join("copies")), ["copy.db"], "one file");
            let copy = Store::open(&dir.path().join("copies/copy.db")).unwrap();
            let mut teams: Vec<u32> =
                copy.teams().await.unwrap().iter().map(|team| team.name.parse().unwrap()).collect();
            teams.sort_unstable();
            assert!(teams.iter().copied().eq(0..teams.len() as u32), "a hole in {teams:?}");
            assert!(teams.len() >= seen, "older than the copy before");
            seen = teams.len();
        }
        stop.store(true, Ordering::Relaxed);
        assert!(writing.await.unwrap() >= 1);
        let mode = fs::metadata(&to).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn nothing_is_lost_where_it_cannot_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let (database, to) = (dir.path().join("gateway.db"), dir.path().join("copy.db"));
        let error = backup(&database, &to, false).unwrap_err().to_string();
        assert!(error.contains("no database") && names(dir.path()).is_empty(), "{error}");
        let store = Store::open(&database).unwrap();
        fs::write(&to, "precious").unwrap();
        assert!(matches!(backup(&database, &to, false), Err(BackupError::Exists(_))));
        assert_eq!(fs::read(&to).unwrap(), b"precious");
        assert!(matches!(backup(&database, dir.path(), true), Err(BackupError::NoName(_))));
        let error = backup(&database, &dir.path().join("none/copy.db"), false).unwrap_err().to_string();
        assert!(error.contains("none/.copy.db."), "{error}");
        drop(store);
        // What is no database is not copied over one.
        fs::write(&database, "noise ".repeat(1000)).unwrap();
        assert!(matches!(backup(&database, &to, true), Err(BackupError::Sqlite(_))));
        assert_eq!(fs::read(&to).unwrap(), b"precious");
        assert!(names(dir.path()).iter().all(|name| !name.ends_with(".new")), "{:?}", names(dir.path()));
    }
}
