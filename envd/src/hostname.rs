//! The sandbox's hostname. Call it on a thread of the sandbox's root.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;

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
    write("/etc/hostname", &format!("{hostname}\n"));
    // An image that names hosts of its own keeps them.
    if fs::metadata("/etc/hosts").map_or(true, |metadata| metadata.len() == 0) {
        let hosts = format!(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
        );
        write("/etc/hosts", &hosts);
    }
    Ok(())
}

/// Writes a file of an image that can hold anything in its place: a FIFO must not hold us, a link lead us elsewhere, and
/// what cannot be written (an image from scratch has no /etc) costs the sandbox no more than that file.
fn write(path: &str, text: &str) {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOFOLLOW;
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(flags.bits() as i32)
        .open(path)
        .and_then(|mut file| {
            if !file.metadata()?.is_file() {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
            }
            file.set_len(0)?;
            file.write_all(text.as_bytes())
        });
    match written {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            crate::log::warn(format_args!("writing {path}: {error}"))
        }
        _ => {}
    }
}
