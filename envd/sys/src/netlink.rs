//! Socket options of netlink.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Makes the kernel explain its errors on a netlink socket (`NETLINK_EXT_ACK`), without the request sent back
/// (`NETLINK_CAP_ACK`).
pub fn explain_netlink_errors(socket: BorrowedFd<'_>) -> io::Result<()> {
    for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
        let on: libc::c_int = 1;
        // SAFETY: the option's value is an int, which lives over the call and has the size that is given.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_NETLINK,
                option,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
