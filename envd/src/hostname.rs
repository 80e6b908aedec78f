//! The sandbox's hostname. Call it on a thread of the sandbox's root.

use std::fs;
use std::io;

/// The longest that Linux takes (`__NEW_UTS_LEN`).
const MAX_LENGTH: usize = 64;

/// Sets the hostname and the files that programs look it up in.
pub(crate) fn set(hostname: &str) -> io::Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    if hostname.len() > MAX_LENGTH || !hostname.bytes().all(plain) {
        let message = format!(
            "invalid hostname {hostname:?}: expected at most {MAX_LENGTH} letters, digits, '-' and '.'"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    rustix::system::sethostname(hostname.as_bytes())?;
    fs::write("/etc/hostname", format!("{hostname}\n")).or_else(without_etc)?;
    // An image that names hosts of its own keeps them.
    if fs::metadata("/etc/hosts").map_or(true, |metadata| metadata.len() == 0) {
        let hosts = format!(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
        );
        fs::write("/etc/hosts", hosts).or_else(without_etc)?;
    }
    Ok(())
}

/// An image from scratch has no /etc, and nobody in it who would look.
fn without_etc(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
