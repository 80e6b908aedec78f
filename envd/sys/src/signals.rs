//! Signals by number: the safe wrappers refuse those that the C library keeps for itself and the real-time ones.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_long, c_uint, siginfo_t};

/// From `linux/pidfd.h`, since Linux 6.9.
const PIDFD_SIGNAL_PROCESS_GROUP: c_uint = 1 << 2;

/// The number of a signal that a process can get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalNumber(c_int);

impl SignalNumber {
    /// SIGKILL.
    pub const KILL: Self = Self(libc::SIGKILL);
    /// SIGTERM.
    pub const TERM: Self = Self(libc::SIGTERM);
    /// SIGSTOP.
    pub const STOP: Self = Self(libc::SIGSTOP);

    /// The signal of this number, from 1 to 64.
    pub fn new(number: i32) -> Option<Self> {
        (1..=super::LAST_SIGNAL).contains(&number).then_some(Self(number))
    }

    /// Its number.
    pub fn number(self) -> i32 {
        self.0
    }
}

/// Sends a signal to the process that a pidfd refers to.
pub fn signal_process(pidfd: BorrowedFd<'_>, signal: SignalNumber) -> io::Result<()> {
    pidfd_send_signal(pidfd, signal, 0)
}

/// Sends a signal to the process group that the process of a pidfd leads.
///
/// `pid` is that process's pid in the caller's namespace, for kernels before 6.9: the kernel gives a pid out again only
/// when no group has its number any more, so it is the right group as long as the process is there.
pub fn signal_group(pidfd: BorrowedFd<'_>, pid: i32, signal: SignalNumber) -> io::Result<()> {
    match pidfd_send_signal(pidfd, signal, PIDFD_SIGNAL_PROCESS_GROUP) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && pid > 1 => {
            // SAFETY: kill takes two numbers; a pid above 1 negated names one group.
            check(unsafe { libc::kill(-pid, signal.0) }.into())
        }
        sent => sent,
    }
}

fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: SignalNumber, flags: c_uint) -> io::Result<()> {
    let info = std::ptr::null::<siginfo_t>();
    // SAFETY: pidfd is open over the call; a null siginfo is allowed and means one as kill(2) makes it.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal.0, info, flags) })
}

fn check(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
