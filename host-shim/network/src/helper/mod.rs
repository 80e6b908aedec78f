//! The process that holds a network: made of the owner's own program, run once more.
//!
//! ```text
//! owner ─socket─► outer: unshare(user, pid) ─► inner, PID 1: namespace, TAP, rules, uplink; then answers until the socket ends
//! ```
//!
//! The inner one's end is the end of all that it started: the kernel kills a PID namespace with its first process. A parent's
//! death would not do: pasta gives itself capabilities, and the kernel forgets the wish for a signal then (prctl(2),
//! PR_SET_PDEATHSIG).

mod address_watch;
mod command;
mod host_rules;
mod make;
pub(crate) mod protocol;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Command, ExitCode, Stdio};

use nix::sched::{CloneFlags, unshare};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::{Error, Uplink};
use make::Made;
use protocol::{Answer, Channel, Request};

pub(crate) const VETH: &str = "veth";
pub(crate) const PASTA: &str = "pasta";
pub(crate) const PROBE: &str = "probe";
const INSIDE: &str = "inside";

/// Runs the helper with what follows its name on the command line. Only in a process that has one thread.
///
/// `again` is the command for this same program that leads here.
pub fn main(arguments: &[OsString], again: Command) -> ExitCode {
    let words: Vec<_> = arguments.iter().map(|word| word.to_str().unwrap_or_default()).collect();
    let done = match words[..] {
        [VETH] => outer(Uplink::Veth, VETH, again),
        [PASTA] => outer(Uplink::Pasta, PASTA, again),
        [PROBE] => enter(Uplink::Pasta),
        [INSIDE, VETH] => inner(Uplink::Veth),
        [INSIDE, PASTA] => inner(Uplink::Pasta),
        _ => Err(Error::Step(format!("expected {VETH}, {PASTA} or {PROBE}, got {words:?}"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Enters the namespaces of users and processes. The caller itself stays in its PID namespace; its children do not.
fn enter(uplink: Uplink) -> Result<(), Error> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let flags = match uplink {
        Uplink::Veth => CloneFlags::CLONE_NEWPID,
        Uplink::Pasta => CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID,
    };
    unshare(flags).map_err(Error::io("make namespaces"))?;
    if uplink == Uplink::Pasta {
        let write = |file: &str, text: String| {
            std::fs::write(file, text).map_err(Error::io("map the user into its namespace"))
        };
        // Without it the kernel lets an ordinary user map no group (user_namespaces(7)).
        write("/proc/self/setgroups", "deny".to_owned())?;
        write("/proc/self/uid_map", format!("0 {} 1", user.as_raw()))?;
        write("/proc/self/gid_map", format!("0 {} 1", group.as_raw()))?;
    }
    Ok(())
}

fn outer(uplink: Uplink, word: &str, mut again: Command) -> Result<(), Error> {
    if let Err(error) = enter(uplink) {
        // The owner has no other way to learn why.
        let channel = Channel::new(socket()?);
        channel.receive::<Request>()?;
        return channel.send(&Answer::Failed(reason(&error)), None);
    }
    let mut child = again
        .args([INSIDE, word])
        .stdin(socket()?)
        .stdout(Stdio::null())
        .spawn()
        .map_err(Error::io("start the process that holds it"))?;
    drop(again);
    child.wait().map(drop).map_err(Error::io("wait for the process that holds it"))
}

fn inner(uplink: Uplink) -> Result<(), Error> {
    let channel = Channel::new(socket()?);
    let Some((Request::Make(rules), _)) = channel.receive()? else { return Ok(()) };
    let mut made = match Made::new(uplink, &rules) {
        Ok((made, tap)) => {
            // The owner has the only one from here on: with the VMM's and its end the guest's link goes down.
            channel.send(&Answer::Done, Some(&tap))?;
            made
        }
        Err(error) => return channel.send(&Answer::Failed(reason(&error)), None),
    };
    let served = serve(&channel, &mut made);
    made.end();
    served
}

fn serve(channel: &Channel, made: &mut Made) -> Result<(), Error> {
    loop {
        let [asked, others] = wait(channel.as_fd(), made.address_watch().as_fd())?;
        // Before what is asked, and without an end of its own: with the addresses that it knows the network is as closed as
        // it was.
        if others && let Err(error) = made.follow_host() {
            eprintln!("{error}");
        }
        if !asked {
            continue;
        }
        let Some((request, _)) = channel.receive::<Request>()? else { return Ok(()) };
        let answer = match request {
            Request::Make(_) => Err(Error::Step("it is made already".to_owned())),
            Request::Change(rules) => made.change(&rules).map(|()| Answer::Done),
            Request::Report => made.report().map(Answer::Report),
        };
        channel.send(&answer.unwrap_or_else(|error| Answer::Failed(reason(&error))), None)?;
    }
}

/// Waits until one of them can be read or is at its end.
fn wait(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> Result<[bool; 2], Error> {
    let mut both = [one, other].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        match poll(&mut both, None) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("wait for the owner")(error)),
            Ok(_) => return Ok(both.map(|fd| !fd.revents().is_empty())),
        }
    }
}

fn socket() -> Result<std::os::fd::OwnedFd, Error> {
    io::stdin().as_fd().try_clone_to_owned().map_err(Error::io("take the owner's socket"))
}

fn reason(error: &Error) -> String {
    match error {
        Error::Step(reason) => reason.clone(),
        other => other.to_string().trim_start_matches("network: ").to_owned(),
    }
}
