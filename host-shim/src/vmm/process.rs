//! Children that cannot outlive their parent.
//!
//! Each is started through this program's own `vmm-exec`, which asks the kernel for SIGKILL at the parent's death
//! (`PR_SET_PDEATHSIG`) and then becomes the child. The request follows the *thread* that forked: processes are
//! started from the main thread, which is where a current-thread runtime runs.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use tokio::process::Command;

use crate::Error;

/// The name of the hidden subcommand.
pub const EXEC: &str = "vmm-exec";

/// A command that runs `program` and dies with this process. `fds` become the child's.
pub fn bound(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = impl AsRef<OsStr>>,
    fds: Vec<FdMapping>,
) -> Result<Command, Error> {
    // The link and not its target: the target of a binary that was replaced by an update does not exist.
    let mut command = Command::new("/proc/self/exe");
    command.arg(EXEC).arg(getpid().as_raw_nonzero().to_string()).arg(program).args(args);
    // A group of its own: Ctrl-C in the terminal is for the shim, which decides what it means for the VMM.
    command.process_group(0).kill_on_drop(true);
    command
        .fd_mappings(fds)
        .map_err(|collision| Error::invalid("file descriptors", collision.to_string()))?;
    Ok(command)
}

/// Becomes `program`, bound to the life of `parent`. Returns only an error.
pub fn exec(parent: i32, program: &OsStr, args: &[OsString]) -> io::Error {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return error.into();
    }
    // A parent that died before the request was made sends no signal for it.
    if getppid().map(Pid::as_raw_pid) != Some(parent) {
        return io::Error::other("the parent is gone");
    }
    std::process::Command::new(program).args(args).exec()
}
