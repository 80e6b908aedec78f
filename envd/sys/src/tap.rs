//! TAP interfaces.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Makes a TAP in the calling thread's network namespace; it is there as long as the descriptor is. Each read and write is
/// one Ethernet frame. The name is 1 to 15 bytes (`IFNAMSIZ` less the NUL).
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    // SAFETY: ifreq is integers and byte arrays, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        let reason = format!("expected a name of 1 to 15 bytes for a TAP, got {name:?}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // Without a header of virtio: what a VMM offers its guest must be the same with and without a TAP behind the device.
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads the name and the flags of an ifreq and writes its name, and the ifreq lives over the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        for name in ["", "sixteen-letters-"] {
            assert_eq!(open_tap(name).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
