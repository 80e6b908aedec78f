//! Programs of the image that the agent runs for itself: resume hooks, ssh-keygen. Hostile like everything in there:
//! bounded in time and in what they say.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitStatus;
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, unlinkat};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::sandbox::{Leaf, Sandbox};
use crate::spawner::Launch;

/// What is kept of a program's output, for the log.
const MAX_OUTPUT: usize = 512;

/// The search path; what login shells have.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// As much as a client's: the agent itself goes last.
const OOM_SCORE_ADJ: i32 = 100;

/// A program to run as root in the container.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) path: String,
    pub(super) arguments: Vec<String>,
    pub(super) env: Vec<String>,
    pub(super) deadline: Duration,
    /// Runs only when nothing else wants to.
    pub(super) low_priority: bool,
}

impl Program {
    /// Runs it to its end or its deadline, when it is killed with all that it started. `Err` says what went wrong.
    pub(super) async fn run(&self, sandbox: &Sandbox) -> Result<(), String> {
        let failed = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
        let cgroup = ProgramGroup::new(sandbox);
        let null = File::options().read(true).write(true).open("/dev/null").map_err(failed("/dev/null"))?;
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed("a pipe")(error.into()))?;
        let bytes = |text: &String| text.clone().into_bytes();
        let launch = Launch {
            terminal: false,
            rlimits: Vec::new(),
            nice: None,
            programs: vec![bytes(&self.path)],
            argv: std::iter::once(&self.path).chain(&self.arguments).map(bytes).collect(),
            env: std::iter::once(&PATH.to_owned()).chain(&self.env).map(bytes).collect(),
            cwd: b"/".to_vec(),
            credentials: None,
            oom_score_adj: Some(OOM_SCORE_ADJ),
            stdio: [null.as_fd(), write.as_fd(), write.as_fd()],
            cgroup: cgroup.fd().or_else(|| sandbox.cgroup(Leaf::System)),
        };
        let running = tokio::time::timeout(self.deadline, async {
            let launched = sandbox.spawner().launch(launch).await.map_err(|error| error.to_string())?;
            if self.low_priority {
                lower_priority(&launched.pidfd);
            }
            Ok::<_, String>(launched)
        });
        let launched = running.await.map_err(|_| "it was not started in time".to_owned())??;
        drop(write);
        let mut output = pipe::Receiver::from_owned_fd(read).map_err(failed("its output"))?;
        let mut said = Vec::new();
        let mut exit = launched.exit;
        let ended = tokio::time::timeout(self.deadline, async {
            let mut buffer = [0; 4096];
            let mut open = true;
            loop {
                tokio::select! {
                    status = &mut exit => return status.map_err(|_| "the sandbox's spawner died".to_owned()),
                    read = output.read(&mut buffer), if open => match read {
                        Ok(count) if count > 0 => keep(&mut said, &buffer[..count]),
                        _ => open = false,
                    },
                }
            }
        });
        let ended: Result<ExitStatus, String> = match ended.await {
            Ok(ended) => ended,
            Err(_) => {
                cgroup.kill();
                // It may end by itself at this moment.
                let _ = pidfd_send_signal(&launched.pidfd, Signal::KILL);
                Err(format!("killed: it ran longer than {} s", self.deadline.as_secs_f32()))
            }
        };
        // A program that has ended may have left the last of its words in the pipe.
        let mut buffer = [0; MAX_OUTPUT];
        if let Ok(count) = output.try_read(&mut buffer) {
            keep(&mut said, &buffer[..count]);
        }
        let result = ended.and_then(|status| if status.success() { Ok(()) } else { Err(status.to_string()) });
        let said = String::from_utf8_lossy(&said);
        let outcome = result.as_ref().err().map_or("", String::as_str);
        crate::log::info(
            format_args!("ran a program of the image"),
            &[("program", self.path.as_str()), ("error", outcome), ("output", said.trim_end())],
        );
        result
    }
}

fn keep(said: &mut Vec<u8>, new: &[u8]) {
    let room = MAX_OUTPUT - said.len().min(MAX_OUTPUT);
    said.extend_from_slice(&new[..new.len().min(room)]);
}

/// The scheduler's lowest; what cannot be lowered runs as it is.
fn lower_priority(pidfd: &OwnedFd) {
    use std::os::fd::AsRawFd;
    const LOWEST: i32 = 19;
    let info =
        std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap_or_default();
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::setpriority_process(Some(pid), LOWEST);
    }
}

/// A cgroup below the system class for one program, so that all that it starts can be ended; without cgroups nothing.
struct ProgramGroup<'a> {
    parent: Option<(std::os::fd::BorrowedFd<'a>, String)>,
    group: Option<OwnedFd>,
}

impl<'a> ProgramGroup<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let parent = sandbox
            .cgroup(Leaf::System)
            .map(|parent| (parent, format!("program-{}", NEXT.fetch_add(1, Ordering::Relaxed))));
        let group = parent.as_ref().and_then(|(parent, name)| {
            mkdirat(parent, name.as_str(), Mode::from_raw_mode(0o755)).ok()?;
            openat(parent, name.as_str(), OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
        });
        Self { parent, group }
    }

    fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.group.as_ref().map(AsFd::as_fd)
    }

    fn kill(&self) {
        let Some(group) = &self.group else { return };
        let killed = openat(group, "cgroup.kill", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::io::write(&file, b"1"));
        if let Err(error) = killed {
            crate::log::warn(format_args!("ending a program of the image: {error}"));
        }
    }
}

impl Drop for ProgramGroup<'_> {
    fn drop(&mut self) {
        let Some((parent, name)) = &self.parent else { return };
        // A daemon that the program left behind keeps it.
        let _ = unlinkat(parent, name.as_str(), AtFlags::REMOVEDIR);
    }
}
