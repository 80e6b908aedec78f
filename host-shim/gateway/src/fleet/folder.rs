//! A sandbox's folder, from the owner's side: written before its shim starts, removed when nothing uses it any more.
//!
//! Whoever holds the lock of the folder decides about it. A shim takes it for life; a folder is removed under it, `spec.json`
//! first. A shim that comes late, of a gateway that was killed, then finds either the lock taken or the spec gone, and
//! starts nothing.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use sandbox_folder::spec::SandboxSpec;
use sandbox_folder::{SNAPSHOT, SPEC};

/// The file that a shim holds an flock(2) on for as long as it lives.
const LOCK: &str = "lock";

/// What a shim says before its log is there, and when it fails.
pub(super) const SHIM_STDERR: &str = "shim.stderr";

/// For whoever still has the lock: a dying shim or its reaper, both done in milliseconds.
const LOCK_DEADLINE: Duration = Duration::from_secs(20);

/// Makes the folder with its `spec.json`; gives the file for the shim's standard error.
pub(super) fn write(dir: &Path, spec: &SandboxSpec) -> io::Result<File> {
    // Its owner's alone: the spec holds the sandbox's token.
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let create = |name: &str| File::options().create_new(true).write(true).mode(0o600).open(dir.join(name));
    create(SPEC)?.write_all(&serde_json::to_vec(spec)?)?;
    create(SHIM_STDERR)
}

/// Whether a sandbox is paused in the folder, where no shim has it; what is there is whole.
pub(super) fn is_paused(dir: &Path) -> bool {
    dir.join(SNAPSHOT).is_dir()
}

/// A file for the standard error of a folder's next shim.
pub(super) fn fresh_stderr(dir: &Path) -> io::Result<File> {
    File::options().create(true).truncate(true).write(true).mode(0o600).open(dir.join(SHIM_STDERR))
}

/// Whether the folder has a shim.
#[derive(Debug)]
pub(super) enum Lock {
    /// There is no folder.
    NoFolder,
    /// None; it cannot get one for as long as this is held.
    Free(File),
    /// Somebody has it.
    Held(File),
}

/// Tries the lock of a folder.
pub(super) fn try_lock(dir: &Path) -> io::Result<Lock> {
    let Some(file) = open_lock(dir)? else { return Ok(Lock::NoFolder) };
    match file.try_lock() {
        Ok(()) => Ok(Lock::Free(file)),
        Err(TryLockError::WouldBlock) => Ok(Lock::Held(file)),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Removes the folder once nobody has its lock; one that is not there is fine.
pub(super) async fn remove(dir: &Path) -> io::Result<()> {
    let dir = dir.to_owned();
    let work = tokio::task::spawn_blocking(move || {
        let Some(lock) = open_lock(&dir)? else { return Ok(()) };
        lock.lock()?;
        remove_locked(&dir, lock)
    });
    match tokio::time::timeout(LOCK_DEADLINE, work).await {
        Ok(done) => done.map_err(io::Error::other)?,
        Err(_) => Err(io::Error::new(ErrorKind::TimedOut, "its lock is still held")),
    }
}

/// Removes a folder whose lock is ours.
pub(super) fn remove_locked(dir: &Path, lock: File) -> io::Result<()> {
    absent_is_fine(fs::remove_file(dir.join(SPEC)))?;
    let removed = match fs::remove_dir_all(dir) {
        // A late shim looked in, and went.
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => fs::remove_dir_all(dir),
        done => done,
    };
    drop(lock);
    absent_is_fine(removed)
}

/// Removes what killed sandboxes left in `sandboxes`: folders of `is_ours` are not touched, nor what has no lock.
pub(super) fn sweep(sandboxes: &Path, is_ours: impl Fn(&str) -> bool) -> io::Result<()> {
    let entries = match fs::read_dir(sandboxes) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let Some(name) = name.to_str().filter(|name| name.parse::<sandbox_folder::SandboxId>().is_ok())
        else {
            continue;
        };
        if is_ours(name) || !path.join(LOCK).exists() {
            continue;
        }
        if let Lock::Free(lock) = try_lock(&path)? {
            tracing::info!(sandbox = name, "swept the folder of a sandbox that nobody has");
            remove_locked(&path, lock)?;
        }
    }
    Ok(())
}

fn open_lock(dir: &Path) -> io::Result<Option<File>> {
    let mut open = File::options();
    match open.create(true).truncate(false).read(true).write(true).mode(0o600).open(dir.join(LOCK)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_goes_when_its_lock_is_free_and_only_then() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("abc1");
        assert!(matches!(try_lock(&dir).unwrap(), Lock::NoFolder));
        write(&dir, &SandboxSpec::new("/t")).unwrap();
        let Lock::Free(held) = try_lock(&dir).unwrap() else { panic!("nobody has it") };
        assert!(matches!(try_lock(&dir).unwrap(), Lock::Held(_)));
        let waiting = tokio::spawn({
            let dir = dir.clone();
            async move { remove(&dir).await }
        });
        tokio::task::yield_now().await;
        assert!(dir.join(SPEC).exists());
        drop(held);
        waiting.await.unwrap().unwrap();
        assert!(!dir.exists());
        remove(&dir).await.unwrap();
    }

    #[test]
    fn only_dead_sandboxes_of_nobody_are_swept() {
        let root = tempfile::tempdir().unwrap();
        sweep(&root.path().join("none"), |_| false).unwrap();
        for name in ["dead", "ours", "alive", "photos", ".new-dead"] {
            fs::create_dir(root.path().join(name)).unwrap();
            if name != "photos" {
                fs::write(root.path().join(name).join(LOCK), "kept\n").unwrap();
            }
        }
        let _alive = try_lock(&root.path().join("alive")).unwrap();
        sweep(root.path(), |name| name == "ours").unwrap();
        let mut left: Vec<_> =
            fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".new-dead", "alive", "ours", "photos"]);
    }
}
