//! The sandbox's hostname. Call it on a thread of the sandbox's root.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;

/// The longest that Linux takes (`__NEW_UTS_LEN`).
const MAX_LENGTH: usize = 64;

/// Whether a hostname can be one.
pub(crate) fn check(hostname: &str) -> io::Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    if hostname.len() > MAX_LENGTH || !hostname.bytes().all(plain) {
        let message = format!(
            "invalid hostname {hostname:?}: expected at most {MAX_LENGTH} letters, digits, '-' and '.'"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(())
}

/// Sets the kernel's hostname, and gives the one before.
pub(crate) fn set(hostname: &str) -> io::Result<Vec<u8>> {
    check(hostname)?;
    let before = rustix::system::uname().nodename().to_bytes().to_vec();
    rustix::system::sethostname(hostname.as_bytes())?;
    Ok(before)
}

/// Writes the files that programs look it up in. A clone's files name its source: that name, `before`, is replaced.
pub(crate) fn write_files(hostname: &str, before: &[u8]) {
    write("/etc/hostname", &format!("{hostname}\n"));
    let own = |name: &str| {
        format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{name}\n")
    };
    // An image that names hosts of its own keeps them.
    let ours = own(&String::from_utf8_lossy(before));
    let replaceable = match fs::symlink_metadata("/etc/hosts") {
        Ok(metadata) if metadata.is_file() && metadata.len() == ours.len() as u64 => {
            fs::read("/etc/hosts").is_ok_and(|text| text == ours.as_bytes())
        }
        Ok(metadata) => metadata.len() == 0,
        Err(_) => true,
    };
    if replaceable {
        write("/etc/hosts", &own(hostname));
    }
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
