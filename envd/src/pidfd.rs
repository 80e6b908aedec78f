//! Processes that are not children: waiting for their end, and telling their descriptors from others.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// More than the kernel says of a pidfd: `NSpid` has a number for each of at most 32 namespaces.
const MAX_FDINFO: u64 = 1 << 10;

/// Waits until the process behind a pidfd has ended; its status is its parent's.
pub(crate) async fn ended(pidfd: OwnedFd) -> io::Result<()> {
    #[expect(
        deprecated,
        reason = "unsound only for types that lend out other descriptors: an OwnedFd is its own"
    )]
    let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
    pidfd.readable().await.map(drop)
}

/// Whether a descriptor is the pidfd of a process that its own pid namespace knows as `pid`. Of one that is reaped
/// already, nobody can tell its pid any more: any will do.
pub(crate) fn is_of(descriptor: BorrowedFd<'_>, pid: u32) -> io::Result<bool> {
    Ok(fdinfo_is_of(&fdinfo(descriptor)?, pid))
}

/// The pid of a pidfd's process as the agent sees it; `None` when it was reaped.
pub(crate) fn host_pid(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let pid = field(&fdinfo(pidfd).ok()?, "Pid:")?.parse().ok()?;
    (pid > 0).then_some(pid)
}

/// What the kernel says of a descriptor (proc_pid_fdinfo(5)).
fn fdinfo(descriptor: BorrowedFd<'_>) -> io::Result<String> {
    let mut text = String::new();
    let file = File::open(format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd()))?;
    file.take(MAX_FDINFO).read_to_string(&mut text)?;
    Ok(text)
}

fn field<'a>(fdinfo: &'a str, name: &str) -> Option<&'a str> {
    fdinfo.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

fn fdinfo_is_of(fdinfo: &str, pid: u32) -> bool {
    // -1 once the process is reaped, 0 when it is in no namespace below the reader's.
    match field(fdinfo, "Pid:").and_then(|pid| pid.parse::<i64>().ok()) {
        Some(-1) => true,
        Some(outer) if outer > 0 => {
            let inner = field(fdinfo, "NSpid:").and_then(|pids| pids.split_whitespace().last()?.parse().ok());
            inner.unwrap_or(outer) == i64::from(pid)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::process::Command;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    #[test]
    fn only_a_pidfd_of_the_right_process_is_one() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let of_child = is_of(pidfd.as_fd(), child.id());
        let of_another = is_of(pidfd.as_fd(), child.id() + 1);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(of_child.unwrap() && !of_another.unwrap());
        assert!(is_of(pidfd.as_fd(), child.id()).unwrap(), "a process that has ended");
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(!is_of(socket.as_fd(), child.id()).unwrap());
    }

    #[test]
    fn the_pid_is_the_one_of_the_innermost_namespace() {
        let of_seven = |end: &str| fdinfo_is_of(&format!("pos:\t0\nflags:\t02000002\nmnt_id:\t15\n{end}"), 7);
        for yes in
            ["Pid:\t7\nNSpid:\t7\n", "Pid:\t123\nNSpid:\t123\t7\n", "Pid:\t7\n", "Pid:\t-1\nNSpid:\t-1\n"]
        {
            assert!(of_seven(yes), "{yes:?}");
        }
        // A process of the host's, the agent's own, and things that are no process.
        for no in
            ["Pid:\t0\nNSpid:\t0\n", "Pid:\t7\nNSpid:\t7\t1\n", "Pid:\t-2\n", "Pid:\tx\n", "tfd: 7\n", ""]
        {
            assert!(!of_seven(no), "{no:?}");
        }
    }
}
