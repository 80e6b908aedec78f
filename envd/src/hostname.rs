//! The sandbox's hostname. Call it on a thread of the sandbox's root.

use std::fs;
use std::io::{self, Write};

use crate::replace::overwrite;

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

/// Writes a file of an image that can hold anything in its place: what cannot be written (an image from scratch has no /etc)
/// costs the sandbox no more than that file.
fn write(path: &str, text: &str) {
    let make = || fs::OpenOptions::new().write(true).create_new(true).open(path)?.write_all(text.as_bytes());
    let written = match overwrite(path, text, |_| true) {
        Ok(true) => Ok(()),
        Ok(false) => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(),
        Err(error) => Err(error),
    };
    match written {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            crate::log::warn(format_args!("writing {path}: {error}"))
        }
        _ => {}
    }
}
