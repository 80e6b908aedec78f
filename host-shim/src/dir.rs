//! The sandbox folder: the shim's whole interface, and what tells anyone whether its shim is alive.
//!
//! ```text
//! DIR/
//!   lock          flock(2)ed by the shim for as long as it lives; says whether the folder goes with it
//!   spec.json     the caller's
//!   state.json    ours, replaced atomically
//!   snapshot/     a paused sandbox, whole or absent; used up when it is resumed
//!   api.sock  vsock.sock  vmm/  scratch.*  base/  gone when the sandbox has ended
//!   console.log[.1]  shim.log[.1]  vmm.log         stay
//! ```
//!
//! A lock that can be taken means that its shim is gone, and whoever takes it may sweep the folder.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sandbox_folder::spec::SandboxSpec;
use sandbox_folder::{API_SOCKET, End, Lifecycle, SNAPSHOT, SPEC, STATE, SandboxId, State, VSOCK_SOCKET};
use serde::Serialize;

use crate::Error;
use crate::snapshot::{self, MANIFEST_FILE};

/// The longest path of a folder: its sockets must fit into `sun_path` (108 bytes with the NUL).
const MAX_PATH: usize = 107 - "/vmm/vsock_4294967295".len();

/// The file of a folder that its shim holds locked.
pub const LOCK: &str = "lock";

/// How folders begin that a sandbox wrote for forks of it, and that nobody has taken away.
pub const FORK_PREFIX: &str = "fork-";

/// Links to the files of the snapshot that a running sandbox was restored from, so that its own snapshots can share them.
pub(crate) const BASE: &str = "base";
/// The scratch disk of a booted sandbox.
pub(crate) const SCRATCH: &str = "scratch.ext4";
/// The scratch disk of a restored sandbox: what differs from its snapshot's.
pub(crate) const SCRATCH_OVERLAY: &str = "scratch.qcow2";
/// The longest state that is written over: more than one with all the labels that a Configure can have.
const MAX_STATE: usize = 1 << 20;
/// A snapshot that is being removed.
const USED: &str = "snapshot.used";
/// The sockets of a channel, and of a VMM.
pub(crate) const VMM: &str = "vmm";
/// What a VMM prints that has a log of its own.
pub(crate) const VMM_LOG: &str = "vmm.log";

/// What the lock file of a folder says that lives and dies with its shim.
const EPHEMERAL: &[u8] = b"ephemeral\n";
/// What the lock file of a caller's folder says.
const KEPT: &[u8] = b"kept\n";
/// What a caller writes into the lock file of a folder that it gives away: the shim that takes it makes it ephemeral.
pub const GIVEN: &[u8] = b"given\n";

/// A sandbox folder that this process owns.
#[derive(Debug)]
pub struct SandboxDir {
    path: PathBuf,
    ephemeral: bool,
    // Released by the kernel with this process, however it ends.
    _lock: File,
}

impl SandboxDir {
    /// Makes `sandboxes/ID`, a folder that goes with its shim.
    pub fn create(sandboxes: &Path, id: &SandboxId) -> Result<Self, Error> {
        let target = absolute(&sandboxes.join(id.as_str()))?;
        check_length(&target)?;
        fs::create_dir_all(sandboxes).map_err(Error::io("make the folder", sandboxes))?;
        // Nobody sweeps while this is held: a folder without its lock taken is then always a dead one.
        let _guard = global_lock(sandboxes)?;
        // Whoever sees the final name sees a lock that says what the folder is.
        let fresh = sandboxes.join(format!(".new-{id}"));
        private_dir(&fresh).map_err(Error::io("make the folder", &fresh))?;
        let made = take_lock(&fresh, EPHEMERAL).and_then(|lock| {
            fs::rename(&fresh, &target).map_err(Error::io("make the folder", &target))?;
            Ok(lock)
        });
        match made {
            Ok(lock) => Ok(Self { path: target, ephemeral: true, _lock: lock }),
            Err(error) => {
                let _ = fs::remove_dir_all(&fresh);
                Err(error)
            }
        }
    }

    /// Takes a caller's folder, which stays when the sandbox ends unless it was [`GIVEN`] away. What a dead shim left in it
    /// is swept.
    pub fn adopt(path: &Path) -> Result<Self, Error> {
        let path = absolute(path)?;
        check_length(&path)?;
        match private_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("make the folder", &path)(error));
            }
            _ => {}
        }
        let ephemeral = fs::read(path.join(LOCK)).is_ok_and(|word| word == GIVEN);
        let lock = take_lock(&path, if ephemeral { EPHEMERAL } else { KEPT })?;
        let dir = Self { path, ephemeral, _lock: lock };
        remove_live_files(&dir.path)?;
        snapshot::sweep(&dir.path)?;
        Ok(dir)
    }

    /// Where the snapshot of a paused sandbox is.
    pub fn snapshot(&self) -> PathBuf {
        self.file(SNAPSHOT)
    }

    /// Removes the snapshot: the sandbox goes on, or begins anew.
    pub fn use_up_snapshot(&self) -> Result<(), Error> {
        // By another name first: a removal that is cut short must not leave half of one.
        let used = self.file(USED);
        absent_is_fine(fs::remove_dir_all(&used)).map_err(Error::io("remove", &used))?;
        absent_is_fine(fs::rename(self.snapshot(), &used)).map_err(Error::io("rename", self.snapshot()))?;
        if let Err(error) = absent_is_fine(fs::remove_dir_all(&used)) {
            // It is used up all the same, and whoever ends the sandbox tries again.
            tracing::warn!(%error, path = %used.display(), "a snapshot that is used up stays for now");
        }
        Ok(())
    }

    /// Replaces `spec.json` by what the sandbox is; on disk when this returns, if `durable`.
    pub fn write_spec(&self, spec: &SandboxSpec, durable: bool) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(spec)
            .map_err(|error| Error::io("write", self.file(SPEC))(error.into()))?;
        replace(&self.path, SPEC, &text, durable)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file of the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Replaces `state.json`. How a sandbox ended in a caller's folder is on disk when this returns; of one that runs a
    /// power cut leaves nothing that would be worth the wait.
    pub fn write_state(&self, state: &State) -> Result<(), Error> {
        write_state(&self.path, state, !self.ephemeral && state.phase.is_over())
    }

    /// Removes what only a running sandbox needs.
    pub fn clear(&self) -> Result<(), Error> {
        remove_live_files(&self.path).map(drop)
    }

    /// Removes what an ended sandbox leaves: everything, or all but the logs and the state in a caller's folder.
    pub fn finish(self) -> Result<(), Error> {
        if self.ephemeral { remove_all(&self.path) } else { self.clear() }
    }

    /// Removes a folder that nothing was started in, whosever it is.
    pub fn withdraw(self) -> Result<(), Error> {
        absent_is_fine(fs::remove_file(self.file(LOCK))).map_err(Error::io("remove", self.file(LOCK)))?;
        // Anything else in it is not ours.
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            done => absent_is_fine(done).map(drop).map_err(Error::io("remove", &self.path)),
        }
    }

    /// Whether the folder goes with its shim.
    pub fn is_ephemeral(&self) -> bool {
        self.ephemeral
    }
}

/// What [`sweep`] did to a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Swept {
    /// Its shim is alive, or it never had one.
    Untouched,
    /// It was its shim's, and is gone.
    Removed,
    /// It is a caller's: its sockets and disks are gone, `state.json` says that the shim was killed.
    Cleaned,
}

/// Sweeps every folder of `sandboxes` whose shim is dead. Folders of live shims are not touched.
pub fn sweep(sandboxes: &Path) -> Result<Vec<(PathBuf, Swept)>, Error> {
    if !sandboxes.exists() {
        return Ok(Vec::new());
    }
    let _guard = global_lock(sandboxes)?;
    let mut swept = Vec::new();
    for entry in fs::read_dir(sandboxes).map_err(Error::io("list", sandboxes))? {
        let path = entry.map_err(Error::io("list", sandboxes))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(".new-") {
            // Its maker held the global lock and died.
            remove_all(&path)?;
            swept.push((path, Swept::Removed));
        } else if path.is_dir() {
            match sweep_one(&path)? {
                Swept::Untouched => {}
                done => swept.push((path, done)),
            }
        }
    }
    Ok(swept)
}

/// Sweeps one folder if its shim is dead.
pub fn sweep_one(path: &Path) -> Result<Swept, Error> {
    let lock = match File::open(path.join(LOCK)) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Swept::Untouched),
        Err(error) => return Err(Error::io("open", path.join(LOCK))(error)),
    };
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Swept::Untouched),
        Err(TryLockError::Error(error)) => return Err(Error::io("lock", path.join(LOCK))(error)),
    }
    if !is_at(&lock, &path.join(LOCK)) {
        // The folder went, and another may have come by its name.
        return Ok(Swept::Untouched);
    }
    let mut kind = Vec::new();
    (&lock)
        .take(EPHEMERAL.len() as u64)
        .read_to_end(&mut kind)
        .map_err(Error::io("read", path.join(LOCK)))?;
    if kind == EPHEMERAL {
        remove_all(path)?;
        return Ok(Swept::Removed);
    }
    let mut cleaned = remove_live_files(path)?;
    cleaned |= !snapshot::sweep(path)?.is_empty();
    if let Some(mut state) = read_state(path)?
        && !state.phase.is_over()
    {
        // A shim that was killed while it paused the sandbox, or resumed it, has left a whole snapshot or none.
        let paused = path.join(SNAPSHOT).join(MANIFEST_FILE).exists();
        state.phase = if paused { Lifecycle::Paused } else { Lifecycle::Ended };
        state.vmm_pid = None;
        state.end = (!paused).then_some(End::ShimKilled);
        write_state(path, &state, true)?;
        cleaned = true;
    }
    Ok(if cleaned { Swept::Cleaned } else { Swept::Untouched })
}

/// Reads `state.json`; `None` when there is none yet, or one that no shim of this version wrote.
pub fn read_state(path: &Path) -> Result<Option<State>, Error> {
    let file = path.join(STATE);
    match fs::read(&file) {
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", file)(error)),
    }
}

fn write_state(path: &Path, state: &State, durable: bool) -> Result<(), Error> {
    let file = path.join(STATE);
    let text = serde_json::to_vec_pretty(state).map_err(|error| Error::io("write", &file)(error.into()))?;
    match replace(path, STATE, &text, durable) {
        Err(error) if error.is_full() => overwrite(&file, text).map_err(|_| error),
        done => done,
    }
}

/// Writes over a file where a full disk has no room for a second one: its blocks are there already. What a sandbox is must
/// stay true also then.
fn overwrite(file: &Path, mut text: Vec<u8>) -> io::Result<()> {
    let out = File::options().write(true).open(file)?;
    let length = usize::try_from(out.metadata()?.len()).unwrap_or(usize::MAX);
    // In one call, and never shorter: a reader must not see half of one state and half of another.
    text.resize((text.len() + 1).max(length.min(MAX_STATE)), b' ');
    if let Some(last) = text.last_mut() {
        *last = b'\n';
    }
    out.write_at(&text, 0).and_then(|written| match written == text.len() {
        true => out.sync_data(),
        false => Err(io::ErrorKind::StorageFull.into()),
    })
}

/// Replaces a file of a folder atomically. It may hold a token.
fn replace(folder: &Path, name: &str, text: &[u8], durable: bool) -> Result<(), Error> {
    let (file, fresh) = (folder.join(name), folder.join(format!("{name}.new")));
    let replace = || {
        let mut out = File::options().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
        out.write_all(&[text, b"\n"].concat())?;
        if durable {
            out.sync_data()?;
        }
        fs::rename(&fresh, &file)?;
        if durable { File::open(folder)?.sync_all() } else { Ok(()) }
    };
    replace().map_err(|error| {
        // What is left of a full disk is better without it.
        let _ = fs::remove_file(&fresh);
        Error::io("write", &file)(error)
    })
}

/// Removes what only a running sandbox needs; tells whether there was any.
fn remove_live_files(path: &Path) -> Result<bool, Error> {
    let mut removed = false;
    for name in [API_SOCKET, VSOCK_SOCKET, SCRATCH, SCRATCH_OVERLAY, "state.json.new", "spec.json.new"] {
        removed |=
            absent_is_fine(fs::remove_file(path.join(name))).map_err(Error::io("remove", path.join(name)))?;
    }
    for name in [VMM, BASE, USED] {
        let folder = path.join(name);
        removed |= absent_is_fine(fs::remove_dir_all(&folder)).map_err(Error::io("remove", &folder))?;
    }
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let entry = entry.map_err(Error::io("list", path))?;
        if entry.file_name().to_string_lossy().starts_with(FORK_PREFIX) {
            let fork = entry.path();
            removed |= absent_is_fine(fs::remove_dir_all(&fork)).map_err(Error::io("remove", &fork))?;
        }
    }
    Ok(removed)
}

fn remove_all(path: &Path) -> Result<(), Error> {
    absent_is_fine(fs::remove_dir_all(path)).map(drop).map_err(Error::io("remove", path))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sandboxes hold their tenants' data: nobody else may look in.
fn private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)
}

/// Holds every sweep of `sandboxes` off, and everybody else who makes or removes a folder there.
pub fn global_lock(sandboxes: &Path) -> Result<File, Error> {
    let path = sandboxes.join(".lock");
    let open = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = open.map_err(Error::io("open", &path))?;
    file.lock().map_err(Error::io("lock", &path))?;
    Ok(file)
}

fn take_lock(dir: &Path, kind: &[u8]) -> Result<File, Error> {
    let path = dir.join(LOCK);
    let open = File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(&path);
    let file = open.map_err(Error::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let owner = read_state(dir)?.map_or(String::new(), |state| format!(" (pid {})", state.shim_pid));
            let reason = format!("{} belongs to a host-shim that is running{owner}", dir.display());
            return Err(Error::invalid("sandbox folder", reason));
        }
        Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
    }
    if !is_at(&file, &path) {
        let reason = format!("{} was removed while it was taken", dir.display());
        return Err(Error::invalid("sandbox folder", reason));
    }
    // In this order it never says nothing: a given folder must not be kept because its shim was killed here.
    let written = file.write_all_at(kind, 0).and_then(|()| file.set_len(kind.len() as u64));
    written.map_err(Error::io("write", &path))?;
    Ok(file)
}

/// Whether an open file is what the path leads to.
fn is_at(file: &File, path: &Path) -> bool {
    let same = |a: fs::Metadata, b: fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    fs::symlink_metadata(path).is_ok_and(|here| file.metadata().is_ok_and(|ours| same(here, ours)))
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(Error::io("resolve", path))
}

fn check_length(path: &Path) -> Result<(), Error> {
    let length = path.as_os_str().len();
    if length <= MAX_PATH {
        return Ok(());
    }
    let reason = format!(
        "{} has {length} bytes, at most {MAX_PATH} fit into a Unix socket's address: use a shorter --dir or --data-dir",
        path.display()
    );
    Err(Error::invalid("sandbox folder", reason))
}

#[cfg(test)]
mod tests {
    use sandbox_folder::STATE_VERSION;

    use super::*;

    fn id() -> SandboxId {
        "abc1".parse().unwrap()
    }

    fn state(phase: Lifecycle) -> State {
        State {
            schema_version: STATE_VERSION,
            id: id(),
            phase,
            shim_pid: 7,
            vmm_pid: Some(8),
            accelerator: None,
            channel: None,
            agent_version: None,
            start: None,
            booted_because: None,
            generation: None,
            phases: Vec::new(),
            labels: Default::default(),
            end: None,
        }
    }

    #[test]
    fn a_live_folder_is_left_alone_and_a_dead_one_swept() {
        let root = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(root.path(), &id()).unwrap();
        let path = dir.path().to_owned();
        fs::write(dir.file("scratch.ext4"), "x").unwrap();
        assert_eq!(sweep(root.path()).unwrap(), vec![]);
        assert!(path.exists());
        drop(dir); // As the kernel does for a killed shim.
        assert_eq!(sweep(root.path()).unwrap(), vec![(path.clone(), Swept::Removed)]);
        assert!(!path.exists());
    }

    #[test]
    fn a_callers_folder_keeps_its_logs_and_learns_how_it_ended() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("mine");
        let dir = SandboxDir::adopt(&path).unwrap();
        dir.write_state(&state(Lifecycle::Running)).unwrap();
        for name in ["api.sock", "scratch.ext4", "console.log"] {
            fs::write(dir.file(name), "x").unwrap();
        }
        fs::create_dir(dir.file("vmm")).unwrap();
        let error = SandboxDir::adopt(&path).unwrap_err().to_string();
        assert!(error.contains("belongs to a host-shim that is running (pid 7)"), "{error}");
        drop(dir);
        assert_eq!(sweep(root.path()).unwrap(), vec![(path.clone(), Swept::Cleaned)]);
        assert!(path.join("console.log").exists());
        assert!(!path.join("scratch.ext4").exists() && !path.join("vmm").exists());
        let after = read_state(&path).unwrap().unwrap();
        assert_eq!((after.phase, after.end), (Lifecycle::Ended, Some(End::ShimKilled)));
        assert_eq!(sweep(root.path()).unwrap(), vec![], "a second sweep finds nothing");
        SandboxDir::adopt(&path).unwrap().finish().unwrap();
        assert!(path.join("console.log").exists());
    }

    #[test]
    fn a_state_is_written_over_where_there_is_no_room_for_a_second_one() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join(STATE);
        let long =
            State { end: Some(End::Failed { message: "x".repeat(5000) }), ..state(Lifecycle::Pausing) };
        write_state(root.path(), &long, false).unwrap();
        let length = fs::metadata(&file).unwrap().len();
        for phase in [Lifecycle::Running, Lifecycle::Paused] {
            overwrite(&file, serde_json::to_vec_pretty(&state(phase)).unwrap()).unwrap();
            assert_eq!(read_state(root.path()).unwrap(), Some(state(phase)));
            assert_eq!(fs::metadata(&file).unwrap().len(), length);
        }
        assert!(overwrite(&root.path().join("none"), b"{}".to_vec()).is_err());
        assert!(!root.path().join("none").exists());
    }

    #[test]
    fn a_lock_of_a_folder_that_went_meanwhile_is_no_lock() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(LOCK);
        fs::write(&path, KEPT).unwrap();
        let open = File::open(&path).unwrap();
        assert!(is_at(&open, &path));
        fs::remove_file(&path).unwrap();
        assert!(!is_at(&open, &path));
        fs::write(&path, KEPT).unwrap();
        assert!(!is_at(&open, &path));
    }

    #[test]
    fn a_folder_that_was_given_away_goes_with_its_shim() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("given");
        fs::create_dir(&path).unwrap();
        fs::write(path.join(LOCK), GIVEN).unwrap();
        assert_eq!(sweep(root.path()).unwrap(), vec![], "nobody sweeps it before its shim has it");
        let dir = SandboxDir::adopt(&path).unwrap();
        assert!(dir.is_ephemeral());
        drop(dir); // As the kernel does for a killed shim.
        assert_eq!(sweep(root.path()).unwrap(), vec![(path.clone(), Swept::Removed)]);
        fs::create_dir(&path).unwrap();
        fs::write(path.join(LOCK), GIVEN).unwrap();
        SandboxDir::adopt(&path).unwrap().finish().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_sandbox_is_not_swept() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("photos")).unwrap();
        fs::create_dir(root.path().join(".new-abc1")).unwrap();
        assert_eq!(sweep(root.path()).unwrap(), vec![(root.path().join(".new-abc1"), Swept::Removed)]);
        assert!(root.path().join("photos").exists());
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_before_anything_is_made() {
        let root = tempfile::tempdir().unwrap();
        let long = root.path().join("x".repeat(MAX_PATH));
        let error = SandboxDir::adopt(&long).unwrap_err();
        assert!(error.to_string().contains("use a shorter --dir"), "{error}");
        assert!(error.is_bad_input() && !long.exists());
    }
}
