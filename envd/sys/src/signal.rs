//! Real-time signals, which safe wrappers have no names for.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sends `SIGRTMIN + n` to the process behind a pidfd. What that means is the receiver's; systemd's list is in systemd(1).
pub fn send_real_time_signal(process: BorrowedFd<'_>, n: u8) -> io::Result<()> {
    let signal = libc::SIGRTMIN() + i32::from(n);
    // SAFETY: takes numbers, and no siginfo.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
