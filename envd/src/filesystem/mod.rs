//! Files of the sandbox: `filesystem.Filesystem` and /files.
//!
//! Every call runs on a thread of the sandbox's [`Root`](crate::root::Root), as root, and gives what it makes to the
//! calling user. A path is looked up by the kernel inside that root and nowhere else.

mod entry;
mod operations;
mod service;
mod transfer;

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub use service::FilesystemService;
pub use transfer::{FilesQuery, download, error_response, upload};

/// Reads a regular file up to `limit` bytes. Never waits for the other end of a FIFO that stands in its place.
pub(crate) fn read_bounded(path: impl AsRef<Path>, limit: usize) -> io::Result<Vec<u8>> {
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}
