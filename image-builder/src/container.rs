//! The other half of a RUN step: a process of one thread that makes the container and waits for it.
//!
//! libcontainer clones without exec and changes the process that calls it, so it runs in this program started again
//! (`image-builder run-container`). The outcome goes to a file in the bundle, because the exit code alone cannot tell a
//! command's failure from ours.

use std::fs;
use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};

/// The file in the bundle that holds the [`Outcome`].
pub(crate) const OUTCOME_FILE: &str = "outcome.json";
const CGROUPS: &str = "/sys/fs/cgroup";

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The command ended by itself.
    Exited(i32),
    /// The command was killed by that signal.
    Killed(String),
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
    own_cgroups()?;

    let state = bundle.join("state");
    let chain = |error: &dyn std::error::Error| {
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
    };
    let mut container = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .validate_id()
        .map_err(|error| chain(&error))?
        .with_root_path(&state)
        .and_then(|builder| {
            // Attached: the container keeps our stdio.
            builder.as_init(bundle).with_systemd(false).with_detach(false).build()
        })
        .map_err(|error| chain(&error))?;
    // The container has its mask already; from here on signals are waited for.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD]);
    signals.thread_block().map_err(failed("signal mask"))?;
    let pid = container.pid().map(|pid| Pid::from_raw(pid.as_raw())).ok_or("the container has no process")?;
    if let Err(error) = container.start() {
        let _ = kill(pid, Signal::SIGKILL);
        let _ = waitpid(pid, None);
        return Err(chain(&error));
    }
    let outcome = loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)).map_err(failed("waitpid"))? {
            WaitStatus::Exited(_, code) => break Outcome::Exited(code),
            WaitStatus::Signaled(_, signal, _) => break Outcome::Killed(signal.to_string()),
            _ => {}
        }
        if signals.wait().map_err(failed("sigwait"))? != Signal::SIGCHLD {
            // PID 1 of the container: everything in its namespace dies with it.
            kill(pid, Signal::SIGKILL).map_err(failed("kill"))?;
            waitpid(pid, None).map_err(failed("waitpid"))?;
            break Outcome::Interrupted;
        }
    };
    // Takes the cgroup and the state folder away; the command's result stands whatever happens here.
    let _ = container.delete(true);
    Ok(outcome)
}

/// libcontainer is built with cgroup v2 alone, and takes whatever is mounted at /sys/fs/cgroup. On a host with the
/// hybrid or legacy layout that is a tmpfs, so this process mounts the v2 tree there, in a mount namespace of its own.
/// Steps have no limits, so it does not matter which controllers v2 has.
fn own_cgroups() -> Result<(), String> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("unshare: {error}"))?;
    let is_v2 = rustix::fs::statfs(CGROUPS).is_ok_and(|stat| stat.f_type == 0x6367_7270);
    if is_v2 {
        return Ok(());
    }
    mount("cgroup2", CGROUPS, "cgroup2", MountFlags::empty(), None)
        .map_err(|error| format!("{CGROUPS}: {error}"))
}
