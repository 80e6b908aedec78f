//! The sandboxes of this machine, as their folders tell.
//!
//! ```text
//! <data>/sandboxes/ID/   made by `start`, `fork` or a gateway; an ID, the beginning of one, or a --name means it
//! a path with a slash    any other sandbox folder
//! ```
//!
//! What the state says is read loosely: a phase of a later shim is shown as it is.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use host_shim::dir::{self, GIVEN, LOCK};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use sandbox_folder::api::{ApiClient, ApiError};
use sandbox_folder::client::SandboxClient;
use sandbox_folder::{API_SOCKET, SPEC, STATE, SandboxId, VSOCK_SOCKET};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::Error;

/// The label that holds what `--name` said.
pub(crate) const NAME_LABEL: &str = "tiffin.name";

/// The longest state or spec that is read; the shim reads specs of half of it.
const MAX_JSON: u64 = 1 << 20;

/// How a sandbox ended whose shim could not write it down itself.
const KILLED: &str = "its host-shim was killed";

/// What the state says, as far as every version says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Seen {
    pub(crate) id: Option<String>,
    pub(crate) phase: Option<String>,
    pub(crate) shim_pid: Option<i32>,
    pub(crate) vmm_pid: Option<i32>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) end: Option<Value>,
}

/// A sandbox's folder, as it was when it was looked at.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    pub(crate) dir: PathBuf,
    pub(crate) id: String,
    pub(crate) seen: Seen,
    /// All of the state; null when there is none yet.
    pub(crate) state: Value,
    /// All of the spec; null for one of `run TEMPLATE`.
    pub(crate) spec: Value,
}

/// The process that owns a sandbox, while it lives.
pub(crate) struct Shim {
    pidfd: AsyncFd<OwnedFd>,
}

/// `<data>/sandboxes`.
#[derive(Clone, Debug)]
pub(crate) struct Sandboxes(pub(crate) PathBuf);

impl Sandboxes {
    /// Every sandbox, by id.
    pub(crate) fn list(&self) -> Result<Vec<Sandbox>, Error> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("list", &self.0)(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::io("list", &self.0))?.path();
            let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            // What goes away meanwhile is none.
            if !hidden && let Some(sandbox) = Sandbox::open(&path) {
                found.push(sandbox);
            }
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    /// The sandbox that a user means.
    pub(crate) fn find(&self, given: &str) -> Result<Sandbox, Error> {
        let none = |known| Error::NoSuchSandbox { name: given.to_owned(), known };
        if given.contains('/') {
            return Sandbox::open(Path::new(given)).ok_or_else(|| Error::Invalid {
                what: "sandbox",
                reason: format!("{given} is no sandbox's folder: neither {STATE} nor {SPEC} is in it"),
            });
        }
        // An id needs no look at all the others.
        if given.parse::<SandboxId>().is_ok()
            && let Some(sandbox) = Sandbox::open(&self.0.join(given))
        {
            return Ok(sandbox);
        }
        let all = self.list()?;
        let mut named: Vec<_> = all.iter().filter(|sandbox| sandbox.name() == Some(given)).collect();
        if named.is_empty() && !given.is_empty() {
            named = all.iter().filter(|sandbox| sandbox.id.starts_with(given)).collect();
        }
        match named[..] {
            [one] => Ok(one.clone()),
            [] => Err(none(all.into_iter().map(|sandbox| sandbox.id).collect())),
            _ => {
                let known = named.iter().map(|sandbox| sandbox.id.clone()).collect();
                Err(Error::Ambiguous { name: given.to_owned(), known })
            }
        }
    }

    /// Makes the folder of a sandbox that is to be started, with its spec. One that is `given` away goes with its shim.
    pub(crate) fn create(
        &self,
        id: &SandboxId,
        mut spec: Map<String, Value>,
        given: bool,
    ) -> Result<PathBuf, Error> {
        fs::create_dir_all(&self.0).map_err(Error::io("make the folder", &self.0))?;
        spec.insert("id".into(), id.as_str().into());
        // While it is held nobody else takes the name, and nobody sweeps what is half made.
        let _guard = dir::global_lock(&self.0)?;
        let name = spec.get("labels").and_then(|labels| labels.get(NAME_LABEL)).and_then(Value::as_str);
        if let Some(name) = name
            && let Some(other) = self.list()?.iter().find(|other| other.name() == Some(name))
        {
            let reason = format!("{name:?} is the name of {}: remove it, or take another", other.id);
            return Err(Error::invalid("name", reason));
        }
        let (fresh, path) = (self.0.join(format!(".new-{id}")), self.0.join(id.as_str()));
        let make = || {
            fs::DirBuilder::new().mode(0o700).create(&fresh)?;
            write_private(&fresh.join(SPEC), &serde_json::to_vec_pretty(&spec)?)?;
            if given {
                write_private(&fresh.join(LOCK), GIVEN)?;
            }
            fs::rename(&fresh, &path)
        };
        make().map_err(|error| {
            let _ = fs::remove_dir_all(&fresh);
            Error::io("make the folder", &path)(error)
        })?;
        Ok(path)
    }

    /// Removes the folder of a sandbox that does not run. Whether it was there; fails when it runs.
    pub(crate) fn remove(&self, folder: &Path) -> Result<bool, Error> {
        // The folder may be anywhere; those of ours are made and swept under the lock.
        let ours = folder.parent() == Some(self.0.as_path());
        let _guard = if ours { Some(dir::global_lock(&self.0)?) } else { None };
        let lock = match fs::File::options().read(true).open(folder.join(LOCK)) {
            Ok(lock) => Some(lock),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("open", folder.join(LOCK))(error)),
        };
        if let Some(lock) = &lock
            && let Err(fs::TryLockError::WouldBlock) = lock.try_lock()
        {
            return Err(Error::Io {
                action: "remove",
                path: folder.to_owned(),
                source: std::io::Error::new(ErrorKind::ResourceBusy, "its sandbox runs"),
            });
        }
        // Out of sight first: whoever dies on the way leaves what the next sweep takes away.
        let mut doomed = folder.to_owned();
        if ours && let Some(name) = folder.file_name() {
            doomed = self.0.join(format!(".new-{}", name.to_string_lossy()));
            match fs::rename(folder, &doomed) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                renamed => renamed.map_err(Error::io("remove", folder))?,
            }
        }
        match fs::remove_dir_all(&doomed) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            removed => removed.map(|()| true).map_err(Error::io("remove", folder)),
        }
    }
}

impl Sandbox {
    /// The sandbox of a folder, if it is one.
    pub(crate) fn open(dir: &Path) -> Option<Self> {
        let dir = std::path::absolute(dir).ok()?;
        let (state, spec) = (read_json(&dir.join(STATE)), read_json(&dir.join(SPEC)));
        if state.is_null() && spec.is_null() {
            return None;
        }
        let mut seen: Seen = serde_json::from_value(state.clone()).unwrap_or_default();
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let id = seen.id.take().or_else(|| text(&spec["id"]));
        let id = id.unwrap_or_else(|| dir.file_name().unwrap_or_default().to_string_lossy().into_owned());
        if state.is_null()
            && let Ok(labels) = serde_json::from_value(spec["labels"].clone())
        {
            seen.labels = labels;
        }
        Some(Self { dir, id, seen, state, spec })
    }

    /// The folder once more.
    pub(crate) fn again(&self) -> Option<Self> {
        Self::open(&self.dir)
    }

    /// What `--name` said.
    pub(crate) fn name(&self) -> Option<&str> {
        self.seen.labels.get(NAME_LABEL).map(String::as_str)
    }

    /// The template's name, or its path where it is not among the others.
    pub(crate) fn template(&self) -> Option<String> {
        let path = Path::new(self.spec["template"].as_str()?);
        Some(
            path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into()),
        )
    }

    /// When it was made.
    pub(crate) fn created(&self) -> Option<SystemTime> {
        let metadata = fs::metadata(&self.dir).ok()?;
        metadata.created().or_else(|_| metadata.modified()).ok()
    }

    /// Where it is in its life; `dead` when its shim was killed and nobody has swept it yet.
    pub(crate) fn phase(&self) -> String {
        match self.seen.phase.as_deref() {
            None => "created".to_owned(),
            Some(phase @ ("ended" | "paused")) => phase.to_owned(),
            Some(phase) if self.shim_pidfd().is_some() => phase.to_owned(),
            Some(_) => "dead".to_owned(),
        }
    }

    /// Whether its processes can be reached.
    pub(crate) fn is_running(&self) -> bool {
        self.phase() == "running"
    }

    /// Whether nothing of it stays when its shim ends.
    pub(crate) fn goes_with_its_shim(&self) -> bool {
        // What the shim wrote into it when it took the folder.
        fs::read(self.dir.join(LOCK)).is_ok_and(|word| word.starts_with(b"ephemeral"))
    }

    /// How it ended, in a few words.
    pub(crate) fn end(&self) -> String {
        match &self.seen.end {
            None if self.phase() == "dead" => KILLED.to_owned(),
            None => self.phase(),
            Some(end) if end["reason"] == "shim_killed" => KILLED.to_owned(),
            Some(end) => {
                let reason = end["reason"].as_str().unwrap_or("unknown").replace('_', " ");
                match end["message"].as_str().or_else(|| end["code"].as_u64().map(|_| "")) {
                    Some(message) if !message.is_empty() => format!("{reason}: {}", plain(message)),
                    _ => reason,
                }
            }
        }
    }

    /// A client of its processes and files; an error when nothing of it runs.
    pub(crate) fn client(&self) -> Result<SandboxClient, Error> {
        let phase = self.phase();
        if phase != "running" {
            let remedy = match phase.as_str() {
                "paused" => ": `host-shim resume` brings it back",
                "created" | "booting" | "ready" => " and not running yet",
                "parked" => ": `host-shim configure` makes it a sandbox",
                "ended" | "dead" => ": nothing of it runs",
                _ => ", not running",
            };
            return Err(Error::WrongPhase { id: self.id.clone(), phase, remedy });
        }
        Ok(self.raw_client())
    }

    /// As [`Sandbox::client`], whatever the state says.
    pub(crate) fn raw_client(&self) -> SandboxClient {
        let client = SandboxClient::unix(self.dir.join(VSOCK_SOCKET));
        match self.spec["access_token"].as_str() {
            Some(token) => client.with_token(token),
            None => client,
        }
    }

    /// A client of its owner's calls.
    pub(crate) fn api(&self) -> ApiClient {
        ApiClient::unix(self.dir.join(API_SOCKET))
    }

    /// Its shim, if that lives.
    pub(crate) fn shim(&self) -> Option<Shim> {
        #[expect(
            deprecated,
            reason = "its successor is unsafe, for descriptors that may be closed elsewhere; an OwnedFd is not"
        )]
        let pidfd = AsyncFd::with_interest(self.shim_pidfd()?, Interest::READABLE).ok()?;
        Some(Shim { pidfd })
    }

    /// A pid alone is nobody: the process must have the folder's lock file open, seen after its pidfd was opened.
    fn shim_pidfd(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(self.seen.shim_pid?)?;
        let lock = fs::metadata(self.dir.join(LOCK)).ok()?;
        let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?;
        let fds = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).ok()?;
        let same = |path: PathBuf| {
            fs::metadata(path).is_ok_and(|open| (open.dev(), open.ino()) == (lock.dev(), lock.ino()))
        };
        fds.flatten().any(|fd| same(fd.path())).then_some(pidfd)
    }

    /// Says why a call failed when the sandbox has ended under it; waits a little for its shim's last words.
    pub(crate) async fn explain(&self, shim: Option<&Shim>, error: Error) -> Error {
        /// What a shim does after its machine's end: it kills, cleans and writes.
        const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(10);
        let broke = match &error {
            Error::Client(client) | Error::File { source: client, .. } => client.code().is_none(),
            Error::Api(error) => !matches!(error, ApiError::Refused { .. }),
            // Of a stream from the sandbox; those of files have the system's number.
            Error::Io { source, .. } => source.raw_os_error().is_none(),
            _ => false,
        };
        if !broke {
            return error;
        }
        if let Some(shim) = shim
            && tokio::time::timeout(LAST_WORDS, shim.gone()).await.is_err()
        {
            return error;
        }
        let how = match self.again() {
            Some(now) if now.is_running() => return error,
            Some(now) => now.end(),
            None => "its folder is gone".to_owned(),
        };
        Error::Ended { how }
    }
}

impl Shim {
    /// Waits for its end.
    pub(crate) async fn gone(&self) {
        // A pidfd is readable once its process has ended; it cannot fail otherwise.
        let _ = self.pidfd.readable().await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // One that is gone has what it was sent for.
        let _ = pidfd_send_signal(self.pidfd.get_ref(), signal);
    }
}

/// Text of the sandbox's, which can reach a terminal.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// Writes a file that nobody else may read.
pub(crate) fn write_private(path: &Path, contents: &[u8]) -> std::io::Result<()> {
    fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(contents)
}

fn read_json(path: &Path) -> Value {
    use std::io::Read;
    let read = || {
        let mut text = Vec::new();
        fs::File::open(path)?.take(MAX_JSON).read_to_end(&mut text)?;
        Ok::<_, std::io::Error>(serde_json::from_slice(&text)?)
    };
    // One that is not there, or makes no sense, says nothing.
    read().unwrap_or(Value::Null)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(labels: Value) -> Map<String, Value> {
        let Value::Object(spec) = json!({"schema_version": 1, "template": "/t/demo", "labels": labels})
        else {
            unreachable!()
        };
        spec
    }

    #[test]
    fn a_sandbox_is_known_by_its_id_the_beginning_of_it_its_name_or_its_path() {
        let data = tempfile::tempdir().unwrap();
        let sandboxes = Sandboxes(data.path().join("sandboxes"));
        let make = |id: &str, labels| sandboxes.create(&id.parse().unwrap(), spec(labels), false);
        let path = make("abcd1", json!({"tiffin.name": "web"})).unwrap();
        make("abce2", json!({})).unwrap();
        for given in ["abcd1", "abcd", "web", path.to_str().unwrap()] {
            let found = sandboxes.find(given).unwrap();
            assert_eq!((found.id.as_str(), found.phase().as_str()), ("abcd1", "created"), "{given}");
            assert_eq!(found.template().as_deref(), Some("demo"));
        }
        let error = sandboxes.find("abc").unwrap_err().to_string();
        assert_eq!(error, "\"abc\" can be each of abcd1, abce2: give more of the id");
        let error = sandboxes.find("x").unwrap_err().to_string();
        assert_eq!(error, "No such sandbox: x (there are: abcd1, abce2)");
        for bad in ["", "./nope", "../sandboxes", "ABCD1", "."] {
            assert!(sandboxes.find(bad).is_err(), "{bad:?}");
        }
        let error = make("abcf3", json!({"tiffin.name": "web"})).unwrap_err().to_string();
        assert!(error.contains("is the name of abcd1"), "{error}");
        assert_eq!(fs::read_dir(&sandboxes.0).unwrap().count(), 3, "two folders and the lock");

        assert!(sandboxes.remove(&path).unwrap());
        assert!(!sandboxes.remove(&path).unwrap());
        assert_eq!(sandboxes.list().unwrap().len(), 1);
    }

    #[test]
    fn who_holds_the_lock_is_running_and_not_removed() {
        let data = tempfile::tempdir().unwrap();
        let sandboxes = Sandboxes(data.path().join("sandboxes"));
        let path = sandboxes.create(&"abcd1".parse().unwrap(), spec(json!({})), false).unwrap();
        let state = json!({"id": "abcd1", "phase": "running", "shim_pid": std::process::id(), "novel": 1});
        fs::write(path.join(STATE), state.to_string()).unwrap();
        // Any process may have that pid.
        assert_eq!(sandboxes.find("abcd1").unwrap().phase(), "dead");
        let dir = host_shim::dir::SandboxDir::adopt(&path).unwrap();
        assert_eq!(sandboxes.find("abcd1").unwrap().phase(), "running");
        let error = sandboxes.remove(&path).unwrap_err().to_string();
        assert!(error.contains("its sandbox runs"), "{error}");
        drop(dir);
        assert!(sandboxes.remove(&path).unwrap());
    }
}
