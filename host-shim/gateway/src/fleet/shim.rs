//! One `host-shim` process: started or found again, waited for, ended.
//!
//! A process is known by its handle, never by a bare pid: our own child, or a pidfd of a process that was seen to have the
//! folder's lock file open *after* the pidfd was opened.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use sandbox_folder::stop::StopRequest;
use sandbox_folder::{API_SOCKET, SPEC, STATE, Start, State};
use serde::Deserialize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdout, Command};

use super::folder::{self, Lock, SHIM_STDERR};
use crate::config::Config;

/// Until a shim that was told to end has ended; it only kills its VMM.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// Until a process is gone after SIGKILL. One that is not is stuck in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Beyond what the shim allows a sandbox that has to boot (60 s) and to run its template's commands (300 s), for a machine
/// that is so busy that even the shim is late. A restored one is there in a fraction of a second.
const READY_DEADLINE: Duration = Duration::from_secs(480);

/// The longest line of readiness; it has some dozens of phases.
const MAX_READY_LINE: u64 = 64 << 10;

/// How much of a failed shim's words is read; the console's end is in them.
const MAX_WORDS: u64 = 16 << 10;

/// How often, and at which interval, the holder of a lock is looked for: a shim that has just taken it has not written
/// its state yet, and a sweep of others takes the lock for a moment.
const LOOKS: u32 = 500;
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A shim that lives, or whose end was not noticed yet.
#[derive(Debug)]
pub(super) struct Shim {
    dir: PathBuf,
    process: Process,
}

#[derive(Debug)]
enum Process {
    Child(Child),
    Found { pid: Pid, pidfd: AsyncFd<OwnedFd> },
}

/// What a shim says once its sandbox is ready.
#[derive(Debug, Deserialize)]
pub(super) struct Ready {
    #[serde(rename = "ready")]
    _ready: bool,
    /// The agent's version.
    #[serde(default)]
    pub(super) agent_version: Option<String>,
    /// How it came to life.
    #[serde(default)]
    pub(super) start: Option<Start>,
    /// Why it booted although it could have been restored.
    #[serde(default)]
    pub(super) booted_because: Option<String>,
}

/// A sandbox did not become ready.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// Its folder could not be made.
    #[error("cannot make its folder {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Its process could not be made.
    #[error("cannot start {}: {source}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The shim failed, in its own words.
    #[error("{0}")]
    Failed(String),
    /// It said nothing in time.
    #[error("the sandbox was not ready within {} s", READY_DEADLINE.as_secs())]
    Deadline,
}

impl Shim {
    /// Starts the shim of a folder that has its spec; gives where it will say that it is ready. With `park` its sandbox waits
    /// to be somebody's then.
    pub(super) fn start(
        config: &Config,
        dir: &Path,
        stderr: fs::File,
        park: bool,
    ) -> io::Result<(Self, ChildStdout)> {
        Self::run(config, dir, stderr, |command| {
            command.args(park.then_some("--park")).arg("--spec").arg(dir.join(SPEC))
        })
    }

    /// Starts the shim of a folder with a paused sandbox, which goes on.
    pub(super) fn resume(config: &Config, dir: &Path, stderr: fs::File) -> io::Result<(Self, ChildStdout)> {
        Self::run(config, dir, stderr, |command| command.arg("--resume"))
    }

    fn run(
        config: &Config,
        dir: &Path,
        stderr: fs::File,
        aim: impl FnOnce(&mut Command) -> &mut Command,
    ) -> io::Result<(Self, ChildStdout)> {
        let mut command = Command::new(&config.host_shim);
        let mut child = aim(command.args(["run", "--new-session", "--quiet"]))
            .arg("--dir")
            .arg(dir)
            .arg("--data-dir")
            .arg(config.data.path())
            // Only the line of readiness is ours to read; nothing else may depend on a gateway that can go away.
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .current_dir("/")
            // Its readiness is not the gateway's.
            .env_remove("NOTIFY_SOCKET")
            .spawn()?;
        let stdout = child.stdout.take().ok_or(ErrorKind::BrokenPipe)?;
        Ok((Self { dir: dir.to_owned(), process: Process::Child(child) }, stdout))
    }

    /// The shim of a folder, if it is alive.
    pub(super) async fn find(dir: &Path) -> io::Result<Option<Self>> {
        let dir = dir.to_owned();
        let folder = dir.clone();
        let found =
            tokio::task::spawn_blocking(move || look_for(&folder)).await.map_err(io::Error::other)??;
        found
            .map(|(pid, pidfd)| Ok(Self { dir, process: Process::Found { pid, pidfd: watch(pidfd)? } }))
            .transpose()
    }

    /// Waits for its readiness.
    pub(super) async fn ready(&mut self, stdout: ChildStdout) -> Result<Ready, StartError> {
        let mut line = String::new();
        let mut stdout = BufReader::new(stdout.take(MAX_READY_LINE));
        match tokio::time::timeout(READY_DEADLINE, stdout.read_line(&mut line)).await {
            Err(_) => return Err(StartError::Deadline),
            Ok(Err(error)) => return Err(StartError::Failed(format!("cannot read from host-shim: {error}"))),
            Ok(Ok(_)) => {}
        }
        if line.is_empty() {
            // It closed its output, so it is about to end.
            let status = tokio::time::timeout(STOP_DEADLINE, self.ended()).await;
            let words = self.words().await;
            let fallback = || format!("host-shim ended without a word ({})", status.unwrap_or_default());
            return Err(StartError::Failed(if words.is_empty() { fallback() } else { words }));
        }
        serde_json::from_str(&line).map_err(|error| {
            StartError::Failed(format!("host-shim said {line:?}, expected a line of JSON: {error}"))
        })
    }

    /// Waits for its end, and says how it came as far as that is known. Cancel safe.
    pub(super) async fn ended(&mut self) -> String {
        let status = match &mut self.process {
            Process::Child(child) => match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            },
            Process::Found { pidfd, .. } => match pidfd.readable().await {
                Ok(_) => "unknown exit status".to_owned(),
                Err(error) => error.to_string(),
            },
        };
        match read_state(&self.dir).ok().and_then(|state| state.end) {
            Some(end) => format!("{status}; {}", serde_json::to_string(&end).unwrap_or_default()),
            None => status,
        }
    }

    /// Ends it and all that it started. Nothing of its processes is left when this returns.
    pub(super) async fn end(&mut self) -> io::Result<()> {
        let asked = async {
            match stop(&self.dir.join(API_SOCKET)).await {
                Ok(()) => {}
                // It does not serve yet: a boot is broken off by a signal.
                Err(_) => self.process.signal(Signal::TERM)?,
            }
            self.process.gone().await
        };
        match tokio::time::timeout(STOP_DEADLINE, asked).await {
            Ok(done) => return done,
            Err(_) => tracing::warn!(dir = %self.dir.display(), "a host-shim does not end: it is killed"),
        }
        // They die with it, and may take a moment longer.
        let children = self.process.children()?;
        self.process.signal(Signal::KILL)?;
        let gone = async {
            self.process.gone().await?;
            for child in children {
                let child = watch(child)?;
                let _ = child.readable().await?;
            }
            Ok(())
        };
        tokio::time::timeout(KILL_DEADLINE, gone).await.unwrap_or_else(|_| {
            let reason = format!("its processes are still there {} s after SIGKILL", KILL_DEADLINE.as_secs());
            Err(io::Error::new(ErrorKind::TimedOut, reason))
        })
    }

    /// What it said when it failed, without the console's end.
    async fn words(&self) -> String {
        let mut words = Vec::new();
        if let Ok(file) = tokio::fs::File::open(self.dir.join(SHIM_STDERR)).await {
            // What could be read is better than nothing.
            let _ = file.take(MAX_WORDS).read_to_end(&mut words).await;
        }
        let words = String::from_utf8_lossy(&words);
        let (words, console) = words.split_once("\n--- end of the console ---").unwrap_or((&words, ""));
        if !console.is_empty() {
            tracing::warn!(dir = %self.dir.display(), console, "a sandbox did not start");
        }
        words.trim().trim_start_matches("host-shim: ").to_owned()
    }
}

impl Process {
    fn signal(&mut self, signal: Signal) -> io::Result<()> {
        let sent = match self {
            // A child that was waited for has no id any more.
            Self::Child(child) => match child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
                Some(pid) => rustix::process::kill_process(pid, signal),
                None => Ok(()),
            },
            Self::Found { pidfd, .. } => pidfd_send_signal(pidfd.get_ref(), signal),
        };
        match sent {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    async fn gone(&mut self) -> io::Result<()> {
        match self {
            Self::Child(child) => child.wait().await.map(drop),
            Self::Found { pidfd, .. } => pidfd.readable().await.map(drop),
        }
    }

    /// The processes that it has started, while it lives.
    fn children(&self) -> io::Result<Vec<OwnedFd>> {
        let parent = match self {
            Self::Child(child) => child.id().and_then(|id| Pid::from_raw(id.cast_signed())),
            Self::Found { pid, .. } => Some(*pid),
        };
        let mut children = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Some(pid) = Pid::from_raw(pid).filter(|pid| parent_of(*pid) == parent) else { continue };
            // It may have ended by now, and another have its pid: then that one has another parent.
            if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::NONBLOCK)
                && parent_of(pid) == parent
            {
                children.push(pidfd);
            }
        }
        Ok(children)
    }
}

/// A pidfd is readable once its process has ended.
fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(
        deprecated,
        reason = "its successor is unsafe, for descriptors that may be closed elsewhere; an OwnedFd is not"
    )]
    AsyncFd::with_interest(pidfd, Interest::READABLE)
}

/// The process that has the folder's lock.
fn look_for(dir: &Path) -> io::Result<Option<(Pid, OwnedFd)>> {
    for _ in 0..LOOKS {
        let lock = match folder::try_lock(dir)? {
            Lock::NoFolder | Lock::Free(_) => return Ok(None),
            Lock::Held(lock) => lock.metadata()?,
        };
        let pid = read_state(dir).ok().and_then(|state| Pid::from_raw(state.shim_pid.cast_signed()));
        if let Some(pid) = pid
            && let Ok(pidfd) = pidfd_open(pid, PidfdFlags::NONBLOCK)
            && has_open(pid, &lock)
        {
            return Ok(Some((pid, pidfd)));
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    let reason = format!("{} is locked, and not by the process that its {STATE} names", dir.display());
    Err(io::Error::new(ErrorKind::TimedOut, reason))
}

fn has_open(pid: Pid, file: &fs::Metadata) -> bool {
    let folder = format!("/proc/{}/fd", pid.as_raw_nonzero());
    let same = |path: PathBuf| {
        fs::metadata(path).is_ok_and(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
    };
    fs::read_dir(folder).is_ok_and(|fds| fds.flatten().any(|fd| same(fd.path())))
}

fn parent_of(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name, in parentheses, may hold anything; behind it are the state and the parent (proc_pid_stat(5)).
    let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
    Pid::from_raw(parent.parse().ok()?)
}

fn read_state(dir: &Path) -> io::Result<State> {
    Ok(serde_json::from_slice(&fs::read(dir.join(STATE))?)?)
}

/// Asks for the end at once.
async fn stop(socket: &Path) -> io::Result<()> {
    let stream = UnixStream::connect(socket).await?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(io::Error::other)?;
    let body = Full::new(Bytes::from(serde_json::to_vec(&StopRequest::AT_ONCE)?));
    let request = http::Request::post("/stop").header(http::header::HOST, "sandbox").body(body);
    let sent = async {
        let response =
            sender.send_request(request.map_err(io::Error::other)?).await.map_err(io::Error::other)?;
        let status = response.status();
        if status.is_success() { Ok(()) } else { Err(io::Error::other(format!("/stop answered {status}"))) }
    };
    tokio::select! {
        // The shim may be gone before its answer is.
        sent = sent => sent,
        _ = connection => Ok(()),
    }
}
