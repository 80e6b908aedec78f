//! What is copied: one entry of a tree.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use indicatif::ProgressBar;
use sandbox_folder::client::Attributes;
use tokio::io::{AsyncRead, ReadBuf};

/// The longest path that is copied: the kernel's `PATH_MAX`. A tree that never ends is a sandbox's own invention.
pub(super) const MAX_PATH: usize = 4096;

/// The contents of a file.
pub(super) type Contents = Box<dyn AsyncRead + Send + Unpin>;

pub(super) struct Item {
    /// Names with a `/` between them, from where the copy goes to; none is empty, `.` or `..`. Empty is that place itself.
    pub(super) path: Vec<u8>,
    pub(super) what: What,
    pub(super) attributes: Attributes,
}

pub(super) enum What {
    File {
        /// As it was when it was opened; a tar stream needs it before the bytes.
        length: u64,
        contents: Contents,
    },
    Directory,
    Symlink(Vec<u8>),
    /// Another name of a file that came before, by its path.
    Link(Vec<u8>),
}

/// A path below another.
pub(super) fn join(above: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = above.to_vec();
    if !path.is_empty() && !path.ends_with(b"/") && !name.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// The folder above, and the last name.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// Whether a name can be one of a directory's.
pub(super) fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.contains(&b'/') && !name.contains(&0)
}

/// Contents whose progress is shown.
pub(super) struct Counted {
    pub(super) inner: Contents,
    pub(super) bar: ProgressBar,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.bar.inc((buf.filled().len() - before) as u64);
        polled
    }
}
