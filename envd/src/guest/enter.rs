//! The spawner of a container whose PID 1 is the image's own: a process that the agent makes and that enters.
//!
//! ```text
//! agent ── re-executes itself ──► `envd spawner-enter`: its leaf and limits
//!   │                                  └ fork: the child enters the container's namespaces, takes the profile's
//!   │                                          capabilities, and is the spawner
//!   └────────────── spawner socket ──────────────┘
//! ```
//!
//! It lives in the leaf `/box/main/spawner`, outside of what the init sees and manages. The kernel's out-of-memory killer
//! takes it as late as an init. When it dies, the agent makes it again.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;

use envd_proto::boot::Profile;
use envd_sys::Forked;
use nix::sched::{CloneFlags, setns};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities};

use super::runtime_spec::{INIT_OOM_SCORE, OPEN_FILES_SOFT};
use super::{OPEN_FILES_HARD, cgroups, profile};
use crate::spawner::{self, Spawner};

/// The subcommand; its argument is the profile.
pub const HELPER: &str = "spawner-enter";

/// Starts a spawner in the container of the process behind `init`; gives the agent's end of its socket. Blocks until it
/// has entered, or says why not.
pub(super) fn start(init: &Arc<OwnedFd>, profile: Profile) -> io::Result<OwnedFd> {
    let (agent, spawner) = Spawner::socketpair()?;
    let mut helper = Command::new("/proc/self/exe")
        .arg(HELPER)
        .arg(profile.name())
        .env_clear()
        .stdin(Stdio::from(spawner))
        // No output: a descriptor that comes along without leaking into other children.
        .stdout(Stdio::from(init.try_clone()?))
        .spawn()?;
    match helper.wait() {
        Ok(status) if !status.success() => {
            Err(io::Error::other(format!("the spawner could not enter the container ({status})")))
        }
        Ok(_) => Ok(agent),
        // The agent's reaper of orphans was quicker. A helper that failed has closed the socket, which is seen too.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::CHILD.raw_os_error()) => Ok(agent),
        Err(error) => Err(error),
    }
}

/// The helper's main function: standard input is the socket, standard output the pidfd of the container's init.
pub fn enter(mut arguments: impl Iterator<Item = String>) -> io::Result<()> {
    // Before it is where a tenant could look into it.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let profile = arguments.next().unwrap_or_default().parse::<Profile>().map_err(io::Error::other)?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let init = io::stdout().as_fd().try_clone_to_owned()?;
    let filter = profile::filter(profile)?;
    cgroups::enter_spawner_leaf()?;
    std::fs::write("/proc/self/oom_score_adj", INIT_OOM_SCORE.to_string())?;
    setrlimit(Resource::Nofile, Rlimit { current: Some(OPEN_FILES_SOFT), maximum: Some(OPEN_FILES_HARD) })?;
    rustix::process::setsid()?;
    let (answer, entered) = pipe_with(PipeFlags::CLOEXEC)?;
    // Only children are born into another pid namespace.
    setns(&init, CloneFlags::CLONE_NEWPID)?;
    match envd_sys::fork()? {
        Forked::Parent(_) => {
            drop(entered);
            // A byte when it has entered; the end of the pipe when it has died, after its last words.
            File::from(answer).read_exact(&mut [0])
        }
        Forked::Child => {
            drop(answer);
            settle(init, profile)?;
            rustix::io::write(&entered, &[0])?;
            drop(entered);
            // Its standard error is the agent's until here.
            rustix::stdio::dup2_stderr(File::options().write(true).open("/dev/null")?)?;
            spawner::serve(&socket, filter.as_ref())
        }
    }
}

/// The rest of the container's ways.
fn settle(init: OwnedFd, profile: Profile) -> io::Result<()> {
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP;
    setns(&init, namespaces)?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    match profile::capability_set(profile) {
        Some(keep) => limit_capabilities(keep),
        None => Ok(()),
    }
}

/// The bounding set first: dropping from it needs a capability that goes with the others.
pub(super) fn limit_capabilities(keep: CapabilitySet) -> io::Result<()> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if keep.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // Past the last that this kernel has.
            Err(rustix::io::Errno::INVAL) => break,
            result => result?,
        }
    }
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    Ok(set_capabilities(None, sets)?)
}
