//! The container's PID 1, seen from outside: what it is, how it is asked to end, that it has ended.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Instant;

use envd_proto::boot::Init;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::mounts::BOX_ROOT;
use super::runtime_spec::init_program;

/// `SIGRTMIN + 3`: systemd halts (systemd(1), "Signals").
const SYSTEMD_HALT: u8 = 3;

/// How an init is asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopSignal {
    /// Not at all: it ends with the machine.
    None,
    /// SIGTERM.
    Terminate,
    /// What systemd takes for a shutdown.
    SystemdHalt,
}

/// The container's PID 1.
#[derive(Clone, Debug)]
pub(super) struct ContainerInit {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    stop: StopSignal,
    name: String,
}

impl ContainerInit {
    /// Takes the init that was just started; nobody reaps yet, so the pid is still its.
    pub(super) fn new(pid: u32, stop: StopSignal, init: &Init) -> io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
        let pidfd = Arc::new(pidfd_open(raw, PidfdFlags::empty())?);
        Ok(Self { pid, pidfd, stop, name: init_program(init).unwrap_or("envd's own").to_owned() })
    }

    /// Its pid as the agent sees it.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// For entering its namespaces.
    pub(super) fn pidfd(&self) -> &Arc<OwnedFd> {
        &self.pidfd
    }

    /// Waits for its end, which is the sandbox's; says so.
    pub(super) async fn ended(&self) -> io::Error {
        let waiting = async { crate::pidfd::ended(self.pidfd.try_clone()?).await };
        match waiting.await {
            Ok(()) => io::Error::other(format!(
                "the container's init ({}) has ended, and the sandbox with it",
                self.name
            )),
            Err(error) => error,
        }
    }

    /// Asks it to end; true when it was told something that it can obey.
    pub(super) fn ask_to_end(&self) -> bool {
        let asked = match self.stop {
            StopSignal::None => return false,
            StopSignal::Terminate => pidfd_send_signal(&self.pidfd, Signal::TERM).map_err(io::Error::from),
            StopSignal::SystemdHalt => envd_sys::send_real_time_signal(self.pidfd.as_fd(), SYSTEMD_HALT),
        };
        asked.is_ok()
    }

    /// Waits for its end until the deadline, on a thread that may block; false when it still runs.
    pub(super) fn wait_ended(&self, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(timeout) = Timespec::try_from(left) else { return false };
            match poll(&mut [PollFd::new(&*self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) | Err(_) => return false,
                Ok(_) => return true,
            }
        }
    }
}

/// Finds the init in the image and how to stop it. A missing one is told here, where the words can be clear.
pub(super) fn check(init: &Init) -> io::Result<StopSignal> {
    let Some(path) = init_program(init) else { return Ok(StopSignal::None) };
    let missing = |error: io::Error| {
        let hint = match init {
            Init::Image => "; install one in the image (Debian: systemd-sysv) or choose the init 'envd'",
            _ => "",
        };
        io::Error::new(error.kind(), format!("init {path}: not a program of the image: {error}{hint}"))
    };
    let found = find(path).map_err(missing)?;
    let name = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    match name.file_name().and_then(|name| name.to_str()) {
        Some("systemd") => Ok(StopSignal::SystemdHalt),
        _ => Ok(StopSignal::Terminate),
    }
}

/// A program of the image; its links lead to the image's files and nowhere else.
fn find(path: &str) -> io::Result<OwnedFd> {
    let root = openat(CWD, BOX_ROOT, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let found = openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    let metadata = File::from(found.try_clone()?).metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("expected a file"));
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is not executable"));
    }
    Ok(found)
}
