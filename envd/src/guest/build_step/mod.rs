//! `envd build-step`: a `RUN` step of a build, on disks of its own ([`envd_proto::build`]).
//!
//! ```text
//! this process, in the sandbox's container        the command, PID 1 of its own namespaces
//!   disks ─► lowers, upper  ─► overlay ─────────────► / with /proc, /dev, /sys and the step's mounts
//!   waits: its end, or that of standard input         Docker's capabilities, seccomp and devices
//!   outcome.json, unmounts: the disk is whole
//! ```
//!
//! The sandbox around it has next to nothing in it, so nothing of it gets into the layer. Mount points that the image does
//! not have are in a layer of their own between the image and what the command changes: they need not be taken away again.

mod cgroup;
mod command;
mod disks;
mod outside;
mod root;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use envd_proto::build::{MAX_OUTCOME, MAX_STEP, OUTCOME, Outcome, Step};
use envd_sys::Forked;
use nix::sched::{CloneFlags, unshare};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};

use cgroup::Cgroup;
use outside::{Inside, Outside};

/// The longest sentence about a command that could not be started.
const MAX_REASON: u64 = 4096;

/// The subcommand's main function. It has one thread.
pub fn run() -> io::Result<()> {
    let mut input = BufReader::new(io::stdin());
    let mut line = Vec::new();
    (&mut input).take(MAX_STEP).read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        return Err(io::Error::other(format!("expected a step in a line of at most {MAX_STEP} bytes")));
    }
    let step: Step = serde_json::from_slice(&line)?;
    drop(line);

    // Mounts end with this process, whatever happens.
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    if let Some(network) = &step.network {
        let plan = crate::network::Plan::parse(network).map_err(io::Error::other)?;
        // The machine ends with the step: nothing is put back.
        let _ = crate::network::apply(&plan)?;
    }
    let (outside, inside) = Outside::mount(&step)?;
    // Room for it, which a command that fills the disk cannot take.
    let file = File::create(outside.upper_disk().join(OUTCOME))?;
    (&file).write_all(&[b' '; MAX_OUTCOME as usize])?;
    file.sync_all()?;
    drop(file);
    let cgroup = Cgroup::make()?;
    let outcome = run_command(&step, inside, &cgroup)?;
    write_outcome(&outside, &outcome).map_err(named("writing the outcome"))?;
    outside.unmount()
}

/// Over the blanks that are there, which JSON may end with.
fn write_outcome(outside: &Outside, outcome: &Outcome) -> io::Result<()> {
    let file = File::options().write(true).open(outside.upper_disk().join(OUTCOME))?;
    let text = serde_json::to_vec(outcome)?;
    (&file).write_all(&text[..text.len().min(MAX_OUTCOME as usize)])
}

/// Runs the command to its end.
fn run_command(step: &Step, inside: Inside, cgroup: &Cgroup) -> io::Result<Outcome> {
    // Takes some milliseconds and memory, so not between fork and exec.
    let filter = super::seccomp::filter()?;
    let (words, told) = pipe_with(PipeFlags::CLOEXEC)?;
    // For the child alone: it is PID 1 there.
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = match envd_sys::fork()? {
        Forked::Child => {
            drop(words);
            let error = command::become_command(step, &inside, &filter, cgroup);
            let _ = rustix::io::write(&told, error.to_string().as_bytes());
            std::process::exit(1);
        }
        Forked::Parent(pid) => Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?,
    };
    drop((told, inside));
    let pidfd = pidfd_open(child, PidfdFlags::empty())?;
    wait_or_kill(&pidfd)?;
    let status = waitid(WaitId::Pid(child), WaitIdOptions::EXITED)?.ok_or(io::ErrorKind::NotFound)?;
    let mut reason = String::new();
    File::from(words).take(MAX_REASON).read_to_string(&mut reason)?;
    if !reason.is_empty() {
        return Ok(Outcome::Failed(reason));
    }
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Ok(Outcome::Exited(code)),
        (None, Some(signal)) => Ok(Outcome::Killed { signal, out_of_memory: cgroup.ran_out_of_memory() }),
        (None, None) => Err(io::Error::other("the command neither exited nor was killed")),
    }
}

/// Waits for the end of the process. When standard input ends before, nobody wants the step any more.
fn wait_or_kill(pidfd: &OwnedFd) -> io::Result<()> {
    let stdin = io::stdin();
    let mut wanted = true;
    loop {
        let mut fds = vec![PollFd::new(pidfd, PollFlags::IN)];
        if wanted {
            fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result?,
        };
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
        // It says nothing after the step, so this is its end.
        if fds.len() > 1 && !fds[1].revents().is_empty() {
            wanted = false;
            pidfd_send_signal(pidfd, Signal::KILL)?;
        }
    }
}

/// Says what was tried.
fn named(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}
