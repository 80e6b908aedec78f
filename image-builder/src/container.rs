//! The other half of a RUN step: a process of one thread that makes the container and waits for it.
//!
//! libcontainer clones without exec and changes the process that calls it, so it runs in this program started again
//! (`image-builder run-container`). It is told what to do by two files in the bundle, the OCI spec and an [`Order`], and
//! answers with an [`Outcome`], because the exit code alone cannot tell a command's failure from ours. Its stdin is the lock
//! of the step's folder: nobody removes that before this process has ended.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::default::DefaultExecutor;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};

use crate::cgroups::{self, Controllers, Groups};
use crate::limits::StepLimits;
use crate::loopback;

/// The file in the bundle that holds the [`Order`].
pub(crate) const ORDER_FILE: &str = "order.json";
/// The file in the bundle that holds the [`Outcome`].
pub(crate) const OUTCOME_FILE: &str = "outcome.json";

/// What the spec does not say.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// A network of its own, with a loopback interface.
    pub(crate) own_network: bool,
    /// Files to lock before the command starts.
    pub(crate) locks: Vec<Lock>,
    pub(crate) limits: StepLimits,
    /// Where groups for the limits are made.
    pub(crate) controllers: Controllers,
}

/// A lock that a step waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lock {
    pub(crate) file: PathBuf,
    /// Nobody else may have it.
    pub(crate) exclusive: bool,
    /// What it is for.
    pub(crate) what: String,
}

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The command ended by itself.
    Exited(i32),
    /// The command was killed by that signal.
    Killed(String),
    /// The command failed after the kernel had killed a process for lack of memory.
    OutOfMemory,
    /// The command took too long, and was killed.
    TimedOut,
    /// There was no command.
    Failed(String),
    /// We were asked to stop, and killed the command.
    Interrupted,
}

/// Runs the bundle's container and writes the outcome into the bundle. `parent` is the process that must not die
/// before us. The container's cgroup has the name `id`, so no other container of this machine may have it.
pub fn run_container(bundle: &Path, id: &str, parent: u32) -> std::io::Result<()> {
    let outcome = run(bundle, id, parent).unwrap_or_else(Outcome::Failed);
    fs::write(bundle.join(OUTCOME_FILE), serde_json::to_vec(&outcome)?)
}

fn run(bundle: &Path, id: &str, parent: u32) -> Result<Outcome, String> {
    let failed = |what: &'static str| move |error: nix::errno::Errno| format!("{what}: {error}");
    // When the build is killed, so is its step.
    let signal = rustix::process::Signal::TERM;
    rustix::process::set_parent_process_death_signal(Some(signal))
        .map_err(|error| format!("prctl: {error}"))?;
    if nix::unistd::getppid().as_raw() as u32 != parent {
        return Ok(Outcome::Interrupted);
    }
    let order = bundle.join(ORDER_FILE);
    let order = fs::read(&order).map_err(|error| format!("{}: {error}", order.display()))?;
    let order: Order = serde_json::from_slice(&order).map_err(|error| error.to_string())?;
    // While it waits for these a signal just ends it.
    let _locks: Vec<File> = order.locks.iter().map(take).collect::<Result<_, _>>()?;

    // From here on signals are waited for; the command gets its own mask back.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD]);
    signals.thread_block().map_err(failed("signal mask"))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(failed("signalfd"))?;
    // Groups of the user who builds are nothing to the command. In a namespace of one id they cannot be given up.
    let _ = nix::unistd::setgroups(&[]);
    if order.own_network {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET).map_err(failed("a network namespace"))?;
        loopback::up().map_err(|errno| format!("the loopback interface: {errno}"))?;
    }
    let mut groups = Groups::open(id, &order.controllers, &order.limits)
        .map_err(|(folder, errno)| format!("{}: {errno}", folder.display()))?;
    own_cgroups()?;

    let state = bundle.join("state");
    let null = || File::open("/dev/null").map(OwnedFd::from).map_err(|error| format!("/dev/null: {error}"));
    let mut container = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .validate_id()
        .map_err(|error| chain(&error))?
        .with_executor(Command)
        .with_stdin(null()?)
        .with_root_path(&state)
        .and_then(|builder| {
            // Attached: the container keeps our stdio.
            builder.as_init(bundle).with_systemd(false).with_detach(false).build()
        })
        .map_err(|error| chain(&error))?;
    let pid = container.pid().map(|pid| Pid::from_raw(pid.as_raw())).ok_or("the container has no process")?;
    let started = groups.limit(pid.as_raw(), &order.limits).and_then(|()| {
        // The order may have come while the container was made.
        container.start().map_err(|error| chain(&error))
    });
    let outcome = match started {
        Ok(()) => wait(pid, &signals, order.limits.timeout)?,
        Err(error) => {
            end(pid)?;
            Outcome::Failed(error)
        }
    };
    let failed =
        matches!(&outcome, Outcome::Exited(code) if *code != 0) || matches!(outcome, Outcome::Killed(_));
    let outcome = if failed && groups.ran_out_of_memory() { Outcome::OutOfMemory } else { outcome };
    // Takes the cgroup and the state folder away; the command's result stands whatever happens here.
    let _ = container.delete(true);
    Ok(outcome)
}

/// Waits for the end of the command, of the time, or of our patience.
fn wait(pid: Pid, signals: &SignalFd, timeout: Option<Duration>) -> Result<Outcome, String> {
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)).map_err(|errno| format!("waitpid: {errno}"))? {
            WaitStatus::Exited(_, code) => return Ok(Outcome::Exited(code)),
            WaitStatus::Signaled(_, signal, _) => return Ok(Outcome::Killed(signal.to_string())),
            _ => {}
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            end(pid)?;
            return Ok(Outcome::TimedOut);
        }
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [PollFd::new(signals, PollFlags::IN)];
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(format!("poll: {errno}")),
        }
        while let Some(signal) = signals.read_signal().map_err(|errno| format!("signalfd: {errno}"))? {
            if i32::try_from(signal.ssi_signo) != Ok(Signal::SIGCHLD as i32) {
                end(pid)?;
                return Ok(Outcome::Interrupted);
            }
        }
    }
}

/// Kills PID 1 of the container: everything in its namespace dies with it, and is gone when it is.
fn end(pid: Pid) -> Result<(), String> {
    kill(pid, Signal::SIGKILL).map_err(|errno| format!("kill: {errno}"))?;
    waitpid(pid, None).map(drop).map_err(|errno| format!("waitpid: {errno}"))
}

/// Takes a lock, and says so when it has to wait.
fn take(lock: &Lock) -> Result<File, String> {
    let fail = |error: std::io::Error| format!("{}: {error}", lock.file.display());
    let file = File::open(&lock.file).map_err(fail)?;
    let now = if lock.exclusive { file.try_lock() } else { file.try_lock_shared() };
    match now {
        Ok(()) => return Ok(file),
        Err(fs::TryLockError::WouldBlock) => eprintln!("waiting for {}, which another step uses", lock.what),
        Err(fs::TryLockError::Error(error)) => return Err(fail(error)),
    }
    if lock.exclusive { file.lock() } else { file.lock_shared() }.map_err(fail)?;
    Ok(file)
}

/// Starts the command as libcontainer does, with the signals of an ordinary process. The container's first process dies with
/// ours also before it is the command.
#[derive(Clone)]
struct Command;

impl Executor for Command {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        SigSet::all()
            .thread_unblock()
            .map_err(|errno| ExecutorError::Other(format!("signal mask: {errno}")))?;
        DefaultExecutor {}.exec(spec)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        // After the last change of credentials, which would clear it.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(|errno| ExecutorValidationError::ArgValidationError(format!("prctl: {errno}")))?;
        DefaultExecutor {}.validate(spec)
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// libcontainer is built with cgroup v2 alone, and takes whatever is mounted at /sys/fs/cgroup. On a host with the
/// hybrid or legacy layout that is a tmpfs, so this process mounts the v2 tree there, in a mount namespace of its own;
/// [`Groups`] knows the other controllers. Where root of a user namespace may not do that, a cgroup namespace helps.
fn own_cgroups() -> Result<(), String> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("unshare: {error}"))?;
    if cgroups::is_unified() {
        return Ok(());
    }
    let here = || mount("cgroup2", cgroups::ROOT, "cgroup2", MountFlags::empty(), None);
    let mounted = match here() {
        Err(rustix::io::Errno::PERM) => {
            let namespace = nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP);
            namespace.map_err(|error| format!("a cgroup namespace: {error}"))?;
            here()
        }
        other => other,
    };
    mounted.map_err(|error| format!("{}: {error}", cgroups::ROOT))
}
