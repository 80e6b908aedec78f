//! The kernel's random state.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// The longest seed: what the kernel's pool holds is 32 bytes, more than this says nothing new.
pub const MAX_SEED: usize = 256;

/// `struct rand_pool_info` of `linux/random.h`, whose last member is an array of the length given in it.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MAX_SEED],
}

/// `_IOW('R', 0x03, int [2])`
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)`
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Mixes `seed` into the kernel's random state, credits its bits, and makes the generator use it at once.
///
/// A machine that was restored from a snapshot gives the same random bytes as every other one from it until this was done.
pub fn seed_random(seed: &[u8]) -> io::Result<()> {
    if seed.is_empty() || seed.len() > MAX_SEED {
        let message = format!("a seed of {} bytes: expected 1 to {MAX_SEED}", seed.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let mut info = RandPoolInfo {
        // Both fit: the length is at most MAX_SEED.
        entropy_count: (seed.len() * 8) as libc::c_int,
        buf_size: seed.len() as libc::c_int,
        buf: [0; MAX_SEED],
    };
    info.buf[..seed.len()].copy_from_slice(seed);
    let device = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: RNDADDENTROPY reads a rand_pool_info and buf_size bytes behind it, which are within `info`.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const info) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: RNDRESEEDCRNG takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_bounded_and_needs_root() {
        assert_eq!(seed_random(&[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(seed_random(&[1; MAX_SEED + 1]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        match (seed_random(&[7; 32]), rustix::process::geteuid().is_root()) {
            (Ok(()), true) => {}
            // A container of the tests may lack CAP_SYS_ADMIN.
            (Err(error), _) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
            (Ok(()), false) => panic!("an ordinary user seeded the kernel"),
        }
    }
}
