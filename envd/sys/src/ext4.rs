//! ext4's own ioctls.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `EXT4_IOC_RESIZE_FS`, `_IOW('f', 16, __u64)` (`fs/ext4/ext4.h`).
const RESIZE: libc::c_ulong = 0x4008_6610;

/// Grows a mounted ext4 to so many of its blocks; `mounted` is a directory of it. Never makes it smaller (`EINVAL`).
pub fn grow_ext4(mounted: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    // SAFETY: the call reads a u64, which lives over it. Of a descriptor that is no ext4's it is refused with ENOTTY.
    if unsafe { libc::ioctl(mounted.as_raw_fd(), RESIZE, &raw const blocks) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_no_ext4_is_refused() {
        let proc = File::open("/proc").unwrap();
        assert_eq!(grow_ext4(proc.as_fd(), 1 << 20).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
