//! The spawner: a small single-threaded process inside the container that starts programs for the agent.
//!
//! ```text
//! agent                                        spawner (the container's PID 1, or a child of the agent)
//!   Start: memfd, stdio, cgroup ────────────►  clone3 into the cgroup, execve
//!   Started{id, pid} + pidfd, Failed{id} ◄───
//!   Exited{pid, status} ◄────────────────────  reaps; what it did not start, it only reaps
//! ```
//!
//! Where it is not PID 1 it can die alone (kept.rs): it is made again, what it had started is followed by pidfd.
//!
//! It lives where the programs live, so a start needs no new namespaces and no shell, and it is the parent of all, so
//! no exit status is lost. The agent takes its messages for hostile: root in the container can be its master.
//!
//! The socket is of type SEQPACKET: a message is a datagram, and the end of either side is seen.

mod client;
mod kept;
mod serve;
mod wire;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};

pub use client::{Launch, LaunchError, Launched, Spawner};
pub use serve::serve;

/// The subcommand that runs the spawner as a child of the agent.
pub const CHILD: &str = "spawner";

/// Makes another spawner in place of one that died; gives the agent's end of its socket. May block.
pub type Respawn = Box<dyn Fn() -> io::Result<OwnedFd> + Send + Sync>;

/// Starts a spawner as a child process: for an agent without a container. The child is the caller's to reap.
pub fn start_child() -> io::Result<(OwnedFd, Child)> {
    let (agent, spawner) = Spawner::socketpair()?;
    let child = Command::new("/proc/self/exe")
        .arg(CHILD)
        .stdin(Stdio::from(spawner))
        .stdout(Stdio::null())
        .spawn()?;
    // It has started nothing yet: it was not told to.
    crate::open_files::give_back(rustix::process::Pid::from_child(&child))?;
    Ok((agent, child))
}

/// The main function of [`CHILD`]: standard input is the socket.
pub fn child() -> io::Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    // What the programs leave behind comes here instead of to the machine's init.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    serve(&socket, None)
}
